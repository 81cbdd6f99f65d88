//! Personal data out of sight: what a person's values are is shown to whoever asks, and asking is audited.

/// What stands for a value.
pub(super) const HIDDEN: &str = "•••";

/// Whether values are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// Only what kind of thing is there.
    Masked,
    /// Everything: somebody asked for it.
    Personal,
}

impl Sight {
    /// What was asked for.
    pub(super) fn asked(personal: bool) -> Self {
        if personal { Self::Personal } else { Self::Masked }
    }

    /// A text, or what stands for it.
    pub(super) fn of(self, text: &str) -> &str {
        match self {
            Self::Masked => HIDDEN,
            Self::Personal => text,
        }
    }
}
