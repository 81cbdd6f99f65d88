//! The entries of the journal: what one worker records for the next (`design.md` §9).
//!
//! The journal is an append-only log that outlives the process. An entry says what a worker is about to create, what Close
//! answered, which keys lead to a record, and which event last set each field of it. Entries hold ids of records, hashes
//! and times. They hold no personal data: a reader of the log can test whether it mentions an email that they know, and
//! learns nothing else.
//!
//! **Applying entries twice, or in part, does no harm.** Ids only point to records, which are read before they are used;
//! times are joined by taking the newest. So a checkpoint can be written while other entries are appended.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::fmt::serde::timestamp::microsecond;
use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};
use uuid::Uuid;

use crate::domain::mapping::Key;
use crate::domain::record::{ContactId, LeadId};
use crate::domain::staleness::FieldHash;

/// The version of the format. A worker skips entries of a newer version.
pub const VERSION: u32 = 1;

/// Separates these hashes from all other uses of the same function.
const NAMESPACE: Uuid = Uuid::from_u128(0x6f0c_9a1e_7d43_4b52_9c8a_51f3_2ad0_77e1);

/// A hash of a [`Key`]. Two keys with one hash cost a needless read, because a record is compared with the key itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyHash(u64);

impl KeyHash {
    pub fn of(key: &Key) -> Self {
        let (kind, text) = match key {
            Key::Company(text) => (b'c', text),
            Key::User(text) => (b'u', text),
            Key::Email(text) => (b'e', text),
        };
        let bytes = [&[kind], text.as_bytes()].concat();
        Self(Uuid::new_v5(&NAMESPACE, &bytes).as_u64_pair().0)
    }

    pub fn of_all(keys: &[Key]) -> Vec<Self> {
        keys.iter().map(Self::of).collect()
    }
}

/// A hash of the id of an organization in Close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OrganizationHash(u64);

impl OrganizationHash {
    pub fn of(id: &str) -> Self {
        Self(Uuid::new_v5(&NAMESPACE, format!("o{id}").as_bytes()).as_u64_pair().0)
    }
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// A session has become the active one. Whatever it reads up to this entry comes from its predecessors.
    Start {
        /// The worker's clock.
        #[serde(rename = "t", with = "microsecond::required")]
        at: Timestamp,
    },
    /// A record with these keys is about to be created.
    Creating {
        #[serde(rename = "o")]
        operation: Uuid,
        #[serde(rename = "k")]
        keys: Vec<KeyHash>,
        /// A Lead with its Contact, not a Contact in an existing Lead.
        #[serde(rename = "l")]
        lead: bool,
        /// The worker's clock.
        #[serde(rename = "t", with = "microsecond::required")]
        at: Timestamp,
    },
    /// Close created nothing, or the records that a [`Entry::Keys`] before this one names.
    Settled {
        #[serde(rename = "o")]
        operation: Uuid,
    },
    /// These keys lead to this Lead or Contact. Search may not show it by them yet.
    Keys {
        #[serde(rename = "r")]
        record: RecordId,
        #[serde(rename = "k")]
        keys: Vec<KeyHash>,
        #[serde(rename = "c")]
        change: ChangeKind,
        /// When the record got the keys, by the worker's clock.
        #[serde(rename = "t", with = "microsecond::required")]
        at: Timestamp,
    },
    /// An event of this time has set these fields of a record, or has found its values in them.
    Written {
        #[serde(rename = "r")]
        record: RecordId,
        #[serde(rename = "t", with = "microsecond::required")]
        at: Timestamp,
        #[serde(rename = "f")]
        fields: Vec<FieldHash>,
        /// The time in the record's own field for it, where one is configured.
        #[serde(
            rename = "s",
            with = "microsecond::optional",
            skip_serializing_if = "Option::is_none",
            default
        )]
        stored: Option<Timestamp>,
        /// The record's `date_updated` after that. Reads may lag behind it for a moment.
        #[serde(
            rename = "u",
            with = "microsecond::optional",
            skip_serializing_if = "Option::is_none",
            default
        )]
        updated: Option<Timestamp>,
    },
    /// From here on the journal repeats all that is remembered, up to [`Entry::CheckpointEnd`].
    CheckpointBegin {
        #[serde(rename = "c")]
        checkpoint: Uuid,
    },
    /// The checkpoint is complete.
    CheckpointEnd {
        #[serde(rename = "c")]
        checkpoint: Uuid,
    },
    /// Changes of this kind up to this time are missing from the checkpoint: there was no room for them, and search had not
    /// shown them.
    Forgotten {
        #[serde(rename = "c")]
        change: ChangeKind,
        /// The worker's clock.
        #[serde(rename = "t", with = "microsecond::required")]
        at: Timestamp,
        /// When search shows them even without proof.
        #[serde(rename = "u", with = "microsecond::required")]
        until: Timestamp,
    },
}

/// How a record gets keys. Search shows the two kinds each with a lag of its own (close-api.md §15, 1).
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    IntoStaticStr,
    VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ChangeKind {
    /// It is created with them.
    Creation,
    /// It exists, and gets another company id, user id or email.
    KeyChange,
}

impl ChangeKind {
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The id of a record that keys lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum RecordId {
    Lead(LeadId),
    Contact(ContactId),
}

impl From<RecordId> for String {
    fn from(id: RecordId) -> Self {
        id.as_str().to_owned()
    }
}

impl TryFrom<String> for RecordId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let lead = LeadId::parse(&text).map(Self::Lead);
        lead.or_else(|| ContactId::parse(&text).map(Self::Contact)).ok_or("not the id of a Lead or a Contact")
    }
}

impl RecordId {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Lead(id) => id.as_str(),
            Self::Contact(id) => id.as_str(),
        }
    }
}

/// The entries of one message to the broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    #[serde(rename = "v")]
    pub version: u32,
    /// The session that appended them.
    #[serde(rename = "s")]
    pub session: Uuid,
    /// The organization that the records belong to, if Close says it.
    #[serde(rename = "g", skip_serializing_if = "Option::is_none", default)]
    pub organization: Option<OrganizationHash>,
    /// `None` as long as the session has not found it.
    #[serde(rename = "a", skip_serializing_if = "Option::is_none", default)]
    pub anchor: Option<Anchor>,
    /// How many entries the session has appended, these included.
    #[serde(rename = "n")]
    pub appended: u64,
    /// When they were sent, by the worker's clock. Earlier versions do not say it.
    #[serde(rename = "t", with = "microsecond::optional", skip_serializing_if = "Option::is_none", default)]
    pub at: Option<Timestamp>,
    #[serde(rename = "e")]
    pub entries: Vec<Entry>,
}

/// Where a successor begins to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// Of the newest complete checkpoint, or of the first message.
    #[serde(rename = "p")]
    pub position: u64,
    /// What events of this time or later have written is in the journal from there on.
    #[serde(rename = "f", with = "microsecond::required")]
    pub remembered_from: Timestamp,
}

/// Why a message of the journal is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("not an entry of close-sync")]
    Foreign,
    #[error("written by a newer version of close-sync")]
    Newer,
}

impl Batch {
    pub fn encode(&self) -> Vec<u8> {
        // Serializing values of these types to memory cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Leaves only what matters to a session of any organization: that another one has started.
    pub fn keep_starts(&mut self) {
        self.anchor = None;
        self.entries.retain(|entry| matches!(entry, Entry::Start { .. }));
    }

    /// Whether its records are certainly of another organization.
    pub fn is_of_other(&self, organization: Option<OrganizationHash>) -> bool {
        self.organization.zip(organization).is_some_and(|(one, other)| one != other)
    }

    /// How many entries the session had appended with this message, if it is from the session. Reads no entries.
    pub fn appended_by(session: Uuid, body: &[u8]) -> Option<u64> {
        #[derive(Deserialize)]
        struct Header {
            v: u32,
            s: Uuid,
            n: u64,
        }
        let Header { v, s, n } = serde_json::from_slice(body).ok()?;
        (v == VERSION && s == session).then_some(n)
    }

    /// # Errors
    /// When the message is not one of this version.
    pub fn decode(body: &[u8]) -> Result<Self, Unreadable> {
        #[derive(Deserialize)]
        struct Header {
            v: u32,
        }
        match serde_json::from_slice::<Self>(body) {
            Ok(batch) if batch.version == VERSION => Ok(batch),
            // A second look only at what is not of this version: a takeover waits for this.
            Ok(_) | Err(_) => match serde_json::from_slice::<Header>(body) {
                Ok(Header { v }) if v > VERSION => Err(Unreadable::Newer),
                Ok(_) | Err(_) => Err(Unreadable::Foreign),
            },
        }
    }
}

/// The entries for one record: its fields by the time of the event that set them.
pub fn written(
    record: RecordId,
    fields: impl IntoIterator<Item = (FieldHash, Timestamp)>,
    stored: Option<Timestamp>,
    updated: Option<Timestamp>,
) -> impl Iterator<Item = Entry> {
    let mut by_time = BTreeMap::<Timestamp, Vec<FieldHash>>::new();
    for (field, at) in fields {
        by_time.entry(at).or_default().push(field);
    }
    by_time.into_iter().map(move |(at, fields)| Entry::Written {
        record: record.clone(),
        at,
        fields,
        stored,
        updated,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn times() -> impl Strategy<Value = Timestamp> {
        (0..4_102_444_800_000_000_i64).prop_map(|micros| Timestamp::from_microsecond(micros).unwrap())
    }

    fn entries() -> impl Strategy<Value = Entry> {
        let keys = || prop::collection::vec(any::<u64>().prop_map(KeyHash), 0..4);
        let record = || {
            let lead = "[a-zA-Z0-9]{1,43}".prop_map(|id| RecordId::Lead(LeadId::new(format!("lead_{id}"))));
            let contact = "[a-zA-Z0-9]{1,43}";
            prop_oneof![lead, contact.prop_map(|id| RecordId::Contact(ContactId::new(format!("cont_{id}"))))]
        };
        let id = || any::<u128>().prop_map(Uuid::from_u128);
        let fields = prop::collection::vec("[a-z_.]{1,20}".prop_map(|name| FieldHash::of(&name)), 0..20);
        prop_oneof![
            times().prop_map(|at| Entry::Start { at }),
            (id(), keys(), any::<bool>(), times()).prop_map(|(operation, keys, lead, at)| Entry::Creating {
                operation,
                keys,
                lead,
                at
            }),
            id().prop_map(|operation| Entry::Settled { operation }),
            (record(), keys(), prop::sample::select(ChangeKind::VARIANTS), times())
                .prop_map(|(record, keys, change, at)| Entry::Keys { record, keys, change, at }),
            (record(), times(), fields, prop::option::of(times()), prop::option::of(times())).prop_map(
                |(record, at, fields, stored, updated)| Entry::Written {
                    record,
                    at,
                    fields,
                    stored,
                    updated
                }
            ),
            id().prop_map(|checkpoint| Entry::CheckpointBegin { checkpoint }),
            id().prop_map(|checkpoint| Entry::CheckpointEnd { checkpoint }),
            (prop::sample::select(ChangeKind::VARIANTS), times(), times())
                .prop_map(|(change, at, until)| Entry::Forgotten { change, at, until }),
        ]
    }

    proptest! {
        #[test]
        fn a_batch_that_was_encoded_is_decoded(
            session in any::<u128>(),
            organization in prop::option::of(any::<u64>().prop_map(OrganizationHash)),
            anchor in prop::option::of((any::<u64>(), times())),
            appended in any::<u64>(),
            at in prop::option::of(times()),
            entries in prop::collection::vec(entries(), 0..20),
        ) {
            let session = Uuid::from_u128(session);
            let anchor = anchor.map(|(position, remembered_from)| Anchor { position, remembered_from });
            let batch = Batch { version: VERSION, session, organization, anchor, appended, at, entries };
            prop_assert_eq!(Batch::decode(&batch.encode()), Ok(batch));
        }

        /// Of what other programs write, most is not JSON. Damaged entries get further.
        #[test]
        fn damaged_entries_are_read_without_a_panic(
            entries in prop::collection::vec(entries(), 1..5),
            damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            length in any::<prop::sample::Index>(),
        ) {
            let batch = Batch { version: VERSION, session: Uuid::nil(), organization: None, anchor: None, appended: 1, at: None, entries };
            let mut body = batch.encode();
            for (at, byte) in damages {
                let at = at.index(body.len());
                body[at] = byte;
            }
            let _ = Batch::decode(&body);
            let _ = Batch::decode(&body[..length.index(body.len())]);
        }
    }

    #[test]
    fn what_another_program_or_version_wrote_is_recognized() {
        assert_eq!(Batch::decode(br#"{"v":2,"entries":"of the future"}"#), Err(Unreadable::Newer));
        let invalid_id =
            r#"{"v":1,"s":"00000000-0000-0000-0000-000000000000","n":1,"e":[{"keys":{"r":"../x","k":[]}}]}"#;
        for body in ["", "[]", "hello", r#"{"v":1}"#, invalid_id] {
            assert_eq!(Batch::decode(body.as_bytes()), Err(Unreadable::Foreign), "{body}");
        }
    }

    #[test]
    fn a_session_recognizes_its_own_messages_without_their_entries() {
        let (session, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let entries = vec![Entry::Settled { operation: other }];
        let batch = Batch {
            version: VERSION,
            session,
            organization: None,
            anchor: None,
            appended: 7,
            at: None,
            entries,
        };
        let newer = Batch { version: VERSION + 1, ..batch.clone() };
        let appended = |session, batch: &Batch| Batch::appended_by(session, &batch.encode());
        assert_eq!(appended(session, &batch), Some(7));
        assert_eq!([appended(other, &batch), appended(session, &newer)], [None; 2]);
        assert_eq!(Batch::appended_by(session, b"hello"), None);
    }

    #[test]
    fn keys_of_different_kinds_have_different_hashes() {
        let keys = [Key::Company("a".into()), Key::User("a".into()), Key::Email("a".into())];
        let [company, user, email] = KeyHash::of_all(&keys)[..] else { panic!("three hashes") };
        assert!(company != user && user != email && email != company);
        assert_eq!(KeyHash::of(&keys[0]), company);
    }
}
