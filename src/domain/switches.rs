//! The five switches for what close-sync may write.

/// The names are those in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "five independent switches are what users set")]
pub struct Switches {
    /// Create Leads.
    pub allow_creating_new_leads: bool,
    /// Change existing Leads.
    pub allow_updating_existing_leads: bool,
    /// Create Contacts.
    pub allow_creating_new_contacts: bool,
    /// Change existing Contacts.
    pub allow_updating_existing_contacts: bool,
    /// Create a Contact for a person who already has one in another Lead.
    pub allow_creating_duplicate_contacts: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Self {
            allow_creating_new_leads: true,
            allow_updating_existing_leads: true,
            allow_creating_new_contacts: true,
            allow_updating_existing_contacts: true,
            allow_creating_duplicate_contacts: true,
        }
    }
}
