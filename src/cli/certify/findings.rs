//! What the observations mean: each assumption about Close, what was found, and what follows. Pure.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};
use strum::{IntoStaticStr, VariantArray};

use crate::cli::certify::observations::{
    ContactsForm, Delay, Exact, FieldObservation, HeaderForm, Kept, ListForm, NotFound, Observations,
    Refusal, TimeForm,
};
use crate::cli::certify::observe::{NATIONAL, WITH_EXTENSION, WITH_TRUNK_ZERO};
use crate::domain::phone::{Country, stored_form};

/// What close-sync assumes about Close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, IntoStaticStr, VariantArray)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(super) enum Assumption {
    MissingRecord,
    UnknownUrl,
    MissingSlash,
    RateLimitHeader,
    TimeNotation,
    CreatedLead,
    LeadContacts,
    ContactLists,
    ListEndpoint,
    ReadCreated,
    ReadChanged,
    ReadDeleted,
    SearchCreated,
    SearchKey,
    SearchChanged,
    EventLog,
    EventData,
    ExactSearch,
    EmailSearch,
    DescendingCursor,
    PutIsPatch,
    PhoneRewriting,
    PhoneCountry,
    BadPhone,
    BadEmail,
    UnknownKey,
    FieldReadBack,
}

impl Assumption {
    fn assumed(self) -> &'static str {
        match self {
            Self::MissingRecord => "a 404 for a missing record says that it does not exist",
            Self::UnknownUrl => "a 404 for an unknown URL says so",
            Self::MissingSlash => "a path without its last slash is refused or redirected",
            Self::RateLimitHeader => "every answer has a readable rate limit header",
            Self::TimeNotation => "times are in UTC",
            Self::CreatedLead => "the answer to a creation has the Contacts of the Lead, or their ids",
            Self::LeadContacts => "a Lead has all its Contacts, or their ids",
            Self::ContactLists => "a Contact has its emails, phones and URLs",
            Self::ListEndpoint => "lists may lag behind writes; close-sync does not read them",
            Self::ReadCreated => "a created record can be read by its id at once",
            Self::ReadChanged => "a read by id shows a change at once",
            Self::ReadDeleted => "a deleted record answers 404 at once",
            Self::SearchCreated => "search shows a new record within close.search_lag",
            Self::SearchKey => "search finds a new record by its custom field within close.search_lag",
            Self::SearchChanged => "search finds a changed custom field within close.search_lag",
            Self::EventLog => "the event log shows a creation at once",
            Self::EventData => "events have the data of the record",
            Self::ExactSearch => "`exact_value` compares whole values",
            Self::EmailSearch => "search finds an email address in any case",
            Self::DescendingCursor => "a descending cursor may lose rows; close-sync sorts ascending",
            Self::PutIsPatch => "a PUT leaves the fields alone that it does not name",
            Self::PhoneRewriting => "phones are rewritten to international form",
            Self::PhoneCountry => "a phone without a country gets that of the organization",
            Self::BadPhone => "an invalid phone is refused, and the answer names it",
            Self::BadEmail => "an invalid email address is refused, and the answer names it",
            Self::UnknownKey => "an unknown key may be refused; close-sync sends none",
            Self::FieldReadBack => "a value comes back as it was sent, or in another notation",
        }
    }
}

/// What follows from a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    AsAssumed,
    /// Differs from the assumption, and close-sync copes with it.
    Handled,
    /// A setting should change.
    ChangeSetting,
    /// close-sync relies on the assumption, and it does not hold.
    NotSupported,
    /// Could not be seen.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Finding {
    pub(super) assumption: Assumption,
    /// The setting that the finding is about, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) subject: Option<String>,
    pub(super) status: Status,
    pub(super) assumed: &'static str,
    pub(super) found: String,
    pub(super) meaning: String,
    /// The line of the configuration that should change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) setting: Option<String>,
    /// The settings of the simulator that behave like this.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) behaviour: Map<String, Value>,
}

/// The settings that findings are compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Configured {
    pub(super) search_lag: Duration,
}

/// One finding for each assumption, and one for each configured field.
pub(super) fn findings(seen: &Observations, configured: Configured) -> Vec<Finding> {
    let of = |assumption: &Assumption| match assumption {
        Assumption::FieldReadBack => seen.fields.iter().map(field).collect(),
        other => vec![finding(*other, seen, configured)],
    };
    Assumption::VARIANTS.iter().flat_map(of).collect()
}

/// The parts of a finding that depend on the observation.
struct Found {
    status: Status,
    found: String,
    meaning: String,
    setting: Option<String>,
    behaviour: Map<String, Value>,
}

impl Found {
    fn new(status: Status, found: impl Into<String>, meaning: impl Into<String>) -> Self {
        let (found, meaning) = (found.into(), meaning.into());
        Self { status, found, meaning, setting: None, behaviour: Map::new() }
    }

    fn unknown() -> Self {
        Self::new(Status::Unknown, "not seen", "run certify again to see it")
    }

    /// The simulator behaves like this with `key` set to `value`.
    fn like(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.behaviour.insert(key.to_owned(), value.into());
        self
    }
}

fn finding(assumption: Assumption, seen: &Observations, configured: Configured) -> Finding {
    let found = found(assumption, seen, configured).unwrap_or_else(Found::unknown);
    Finding {
        assumption,
        subject: None,
        status: found.status,
        assumed: assumption.assumed(),
        found: found.found,
        meaning: found.meaning,
        setting: found.setting,
        behaviour: found.behaviour,
    }
}

fn found(assumption: Assumption, seen: &Observations, configured: Configured) -> Option<Found> {
    match assumption {
        Assumption::MissingRecord => seen.missing_record.map(missing_record),
        Assumption::UnknownUrl => seen.unknown_url.map(unknown_url),
        Assumption::MissingSlash => seen.missing_slash.map(missing_slash),
        Assumption::RateLimitHeader => headers(seen),
        Assumption::TimeNotation => times(seen),
        Assumption::CreatedLead => seen.created_lists.map(created_lists),
        Assumption::LeadContacts => seen.read_lists.map(read_lists),
        Assumption::ContactLists => seen.unknown_lists.as_deref().map(contact_lists),
        Assumption::ListEndpoint => list_endpoint(seen),
        Assumption::ReadCreated => seen.read_created.map(|delay| read(delay, "the new record")),
        Assumption::ReadChanged => seen.read_changed.map(|delay| read(delay, "the change")),
        Assumption::ReadDeleted => seen.read_deleted.map(|delay| read(delay, "the deletion")),
        Assumption::SearchCreated => {
            seen.search_created.map(|delay| search(delay, configured).like("search_lag", lag(delay)))
        }
        Assumption::SearchKey => seen.search_key.map(|delay| search(delay, configured)),
        Assumption::SearchChanged => seen.search_changed.map(|delay| search(delay, configured)),
        Assumption::EventLog => seen.event.map(event_log),
        Assumption::EventData => event_data(seen),
        Assumption::ExactSearch => seen.exact.map(exact),
        Assumption::EmailSearch => seen.email_search.map(email_search),
        Assumption::DescendingCursor => seen.descending.map(descending),
        Assumption::PutIsPatch => seen.is_patch.map(put_is_patch),
        Assumption::PhoneRewriting => phone_rewriting(seen),
        Assumption::PhoneCountry => phone_country(seen),
        Assumption::BadPhone => seen.bad_phone.map(|refusal| self::refusal(refusal, "phone")),
        Assumption::BadEmail => seen.bad_email.map(|refusal| self::refusal(refusal, "email address")),
        Assumption::UnknownKey => seen.unknown_key_refused.map(unknown_key),
        // A finding for each field.
        Assumption::FieldReadBack => None,
    }
}

fn missing_record(form: NotFound) -> Found {
    let found = Found::new;
    match form {
        NotFound::Record => found(Status::AsAssumed, "it does", "a deleted Lead is noticed"),
        NotFound::Url | NotFound::OtherJson | NotFound::NotJson => found(
            Status::NotSupported,
            "another text",
            "close-sync does not take a record for deleted; messages for deleted records are retried and then \
             dead-lettered",
        ),
        NotFound::OtherStatus => found(
            Status::NotSupported,
            "not a 404",
            "messages for deleted records are retried and then dead-lettered",
        ),
    }
}

fn unknown_url(form: NotFound) -> Found {
    match form {
        NotFound::Url => {
            Found::new(Status::AsAssumed, "it does", "a wrong close.url is told from a deleted record")
        }
        NotFound::Record => Found::new(
            Status::NotSupported,
            "the text of a missing record",
            "with a wrong route or proxy, close-sync would take records for deleted and create them again",
        ),
        NotFound::OtherJson | NotFound::NotJson | NotFound::OtherStatus => Found::new(
            Status::Handled,
            "another answer",
            "close-sync retries and takes no record for deleted",
        ),
    }
}

fn missing_slash(status: u16) -> Found {
    let meaning = "close-sync always sends the slash";
    match status {
        404 => Found::new(Status::AsAssumed, "404", meaning).like("missing_slash", "not_found"),
        300..=399 => {
            Found::new(Status::AsAssumed, status.to_string(), meaning).like("missing_slash", "redirected")
        }
        other => Found::new(Status::Handled, other.to_string(), meaning),
    }
}

fn headers(seen: &Observations) -> Option<Found> {
    let names: Vec<&str> = seen.headers.iter().map(|form| (*form).into()).collect();
    let worst = seen.headers.iter().max_by_key(|form| match form {
        HeaderForm::Absent => 2,
        HeaderForm::Unreadable => 1,
        HeaderForm::Comma
        | HeaderForm::Semicolon
        | HeaderForm::Triple
        | HeaderForm::Legacy
        | HeaderForm::Proxy => 0,
    })?;
    let (status, meaning) = match worst {
        HeaderForm::Absent => (
            Status::Handled,
            "some answers have none; close-sync keeps its own cautious pace and slows down on a 429",
        ),
        HeaderForm::Unreadable => {
            (Status::Handled, "close-sync reads the other headers, or keeps its own cautious pace")
        }
        _ => (Status::AsAssumed, "close-sync uses the whole limit and avoids a 429"),
    };
    let found = Found::new(status, names.join(", "), meaning);
    Some(match worst {
        HeaderForm::Unreadable | HeaderForm::Triple => found,
        _ => found.like("header_style", <&str>::from(worst)),
    })
}

fn times(seen: &Observations) -> Option<Found> {
    let names: Vec<&str> = seen.times.iter().map(|form| (*form).into()).collect();
    if names.is_empty() {
        return None;
    }
    let meaning = "close-sync compares instants";
    let status = if seen.times.contains(&TimeForm::Unreadable) {
        Status::NotSupported
    } else if seen.times.iter().all(|form| matches!(form, TimeForm::Utc | TimeForm::Zulu)) {
        Status::AsAssumed
    } else {
        Status::Handled
    };
    Some(Found::new(status, names.join(", "), meaning))
}

fn created_lists(form: ContactsForm) -> Found {
    let word: &'static str = form.into();
    match form {
        ContactsForm::Whole | ContactsForm::WithoutContactIds | ContactsForm::WithoutContacts => {
            let status = if form == ContactsForm::Whole { Status::AsAssumed } else { Status::Handled };
            Found::new(status, word, "the new Contact is known without another call")
                .like("created_lead", word)
        }
        ContactsForm::Partial | ContactsForm::Neither => Found::new(
            Status::Handled,
            word,
            "close-sync looks up the new Contact before the next message of that person",
        ),
    }
}

fn read_lists(form: ContactsForm) -> Found {
    let word: &'static str = form.into();
    match form {
        ContactsForm::Whole => Found::new(Status::AsAssumed, word, "a Lead is read in one call"),
        ContactsForm::WithoutContactIds => Found::new(Status::Handled, word, "close-sync uses `contacts`"),
        ContactsForm::WithoutContacts | ContactsForm::Partial => {
            Found::new(Status::Handled, word, "close-sync reads the missing Contacts one by one")
        }
        ContactsForm::Neither => Found::new(
            Status::NotSupported,
            word,
            "close-sync cannot see the people of a Lead, and would create them again",
        ),
    }
}

fn contact_lists(unknown: &[(&'static str, ListForm)]) -> Found {
    if unknown.is_empty() {
        return Found::new(Status::AsAssumed, "it does", "close-sync adds to the lists");
    }
    let parts: Vec<String> =
        unknown.iter().map(|(list, form)| format!("{list} {}", <&str>::from(form))).collect();
    Found::new(Status::Handled, parts.join(", "), "close-sync does not write over a list that it cannot see")
}

fn list_endpoint(seen: &Observations) -> Option<Found> {
    let shows_new = seen.list_shows_new?;
    // Without a lag of search, both kinds of lists look the same.
    let tells = shows_new && seen.search_created == Some(Delay::None);
    let found = if shows_new { "shows a new Lead at once" } else { "does not show a new Lead at once" };
    let found = Found::new(Status::AsAssumed, found, "no consequence");
    Some(if tells { found } else { found.like("lists_from_index", !shows_new) })
}

fn seconds(duration: Duration) -> String {
    let tenths = duration.as_millis().div_ceil(100);
    if tenths.is_multiple_of(10) {
        format!("{}s", tenths / 10)
    } else {
        format!("{}.{}s", tenths / 10, tenths % 10)
    }
}

/// A lag for the simulator.
fn lag(delay: Delay) -> String {
    match delay {
        Delay::None => "0s".into(),
        Delay::Within(time) | Delay::Longer(time) => seconds(time),
    }
}

fn within(delay: Delay) -> String {
    match delay {
        Delay::None => "at once".into(),
        Delay::Within(time) => format!("after {}", seconds(time)),
        Delay::Longer(time) => format!("not within {}", seconds(time)),
    }
}

fn read(delay: Delay, what: &str) -> Found {
    let found = format!("reads show {what} {}", within(delay));
    match delay {
        Delay::None => Found::new(Status::AsAssumed, found, "close-sync reads what it wrote"),
        Delay::Within(_) | Delay::Longer(_) => Found::new(
            Status::Handled,
            found,
            "close-sync remembers its own writes, and takes no older answer for the current state",
        ),
    }
}

/// Doubled, because the lag varies, in whole seconds.
fn recommended(lag: Duration) -> Duration {
    Duration::from_secs(lag.saturating_mul(2).as_secs().saturating_add(1))
}

fn search(delay: Delay, configured: Configured) -> Found {
    let found = within(delay);
    let set = |status: Status, meaning: String, value: Duration| {
        let setting = Some(format!("close.search_lag = \"{}s\"", value.as_secs()));
        Found { setting, ..Found::new(status, found.clone(), meaning) }
    };
    let now = seconds(configured.search_lag);
    match delay {
        Delay::None => Found::new(Status::AsAssumed, found, format!("close.search_lag is {now}")),
        Delay::Within(lag) if lag <= configured.search_lag => {
            Found::new(Status::AsAssumed, found, format!("close.search_lag is {now}"))
        }
        Delay::Within(lag) => set(
            Status::ChangeSetting,
            format!("close.search_lag is {now}; a search that comes too early makes a duplicate"),
            recommended(lag),
        ),
        Delay::Longer(lag) if lag < configured.search_lag => Found::new(
            Status::Unknown,
            found,
            format!("close.search_lag is {now}; measure it with a longer --max-wait"),
        ),
        Delay::Longer(lag) => set(
            Status::ChangeSetting,
            format!("close.search_lag is {now}; measure the lag with a longer --max-wait"),
            lag.saturating_mul(5),
        ),
    }
}

fn event_log(delay: Delay) -> Found {
    let found = within(delay);
    let found = match delay {
        Delay::None => Found::new(Status::AsAssumed, found, "a creation without an answer is found soon"),
        Delay::Within(_) | Delay::Longer(_) => {
            Found::new(Status::Handled, found, "a creation without an answer waits for close.search_lag")
        }
    };
    found.like("event_lag", lag(delay))
}

fn event_data(seen: &Observations) -> Option<Found> {
    if seen.event_has_data == Some(false) {
        return Some(Found::new(
            Status::Handled,
            "new events have no data",
            "a creation without an answer waits for close.search_lag",
        ));
    }
    match seen.old_event_has_data {
        Some(false) => Some(
            Found::new(
                Status::Handled,
                "not after an hour: the user of the API key is not an admin",
                "with close.search_lag above 25 minutes, a creation without an answer waits for search",
            )
            .like("event_data", "hidden_after_an_hour"),
        ),
        Some(true) => Some(
            Found::new(Status::AsAssumed, "they do, also after an hour", "no consequence")
                .like("event_data", "kept"),
        ),
        None => seen.event_has_data.map(|_| {
            Found::new(Status::AsAssumed, "they do; there is no older event to look at", "no consequence")
        }),
    }
}

fn exact(exact: Exact) -> Found {
    let word: &'static str = exact.into();
    match exact {
        Exact::FoldsCase => Found::new(Status::AsAssumed, "it ignores case", "close-sync compares again")
            .like("exact_value", word),
        Exact::Exact => Found::new(Status::AsAssumed, "it distinguishes case", "close-sync compares again")
            .like("exact_value", word),
        Exact::Words => Found::new(
            Status::Handled,
            "it also finds longer values",
            "close-sync compares again; searches return more rows",
        ),
        Exact::Refused => Found::new(
            Status::Handled,
            "Close refuses it",
            "close-sync searches by phrase and compares again; searches return more rows",
        )
        .like("exact_value", word),
        Exact::FindsNothing => Found::new(
            Status::NotSupported,
            "it does not find the value",
            "close-sync would create a Lead and a Contact with every message; do not run it",
        ),
    }
}

fn email_search(finds: bool) -> Found {
    if finds {
        Found::new(Status::AsAssumed, "it does", "people are found by email")
    } else {
        Found::new(
            Status::NotSupported,
            "it does not",
            "people whose address Close has in another case are created again",
        )
    }
}

fn descending(is_exact: bool) -> Found {
    let (found, value) = if is_exact { ("every row once", "exact") } else { ("rows are lost", "loses_rows") };
    Found::new(Status::AsAssumed, found, "no consequence").like("descending_cursor", value)
}

fn put_is_patch(is_patch: bool) -> Found {
    if is_patch {
        Found::new(Status::AsAssumed, "it does", "fields that no rule fills stay as people left them")
    } else {
        Found::new(
            Status::NotSupported,
            "other fields were lost",
            "close-sync would delete data; do not run it",
        )
    }
}

/// Each phone as it was sent and kept.
fn phones<'a>(seen: &'a Observations, wanted: &[&str]) -> Vec<(&'static str, Option<&'a str>)> {
    let phones = seen.phones.iter().filter(|(sent, _)| wanted.contains(sent));
    phones.map(|(sent, kept)| (*sent, kept.as_deref())).collect()
}

fn phone_rewriting(seen: &Observations) -> Option<Found> {
    let phones = phones(seen, &[WITH_TRUNK_ZERO, WITH_EXTENSION]);
    if phones.is_empty() {
        return None;
    }
    let shown = |(sent, kept): &(&str, Option<&str>)| format!("{sent} → {}", kept.unwrap_or("refused"));
    let text = phones.iter().map(shown).collect::<Vec<_>>().join(", ");
    let is_expected = phones.iter().all(|(sent, kept)| stored_form(sent, None).as_deref() == *kept);
    Some(if is_expected {
        Found::new(Status::AsAssumed, text, "a phone is added once, in any spelling")
    } else {
        Found::new(
            Status::Handled,
            text,
            "close-sync learns what Close keeps; send phones in international form",
        )
    })
}

fn phone_country(seen: &Observations) -> Option<Found> {
    let (_, kept) = phones(seen, &[NATIONAL]).pop()?;
    let meaning = "send phones with their country";
    let Some(kept) = kept else {
        return Some(Found::new(Status::Handled, "Close refuses a phone without a country", meaning));
    };
    let found = Found::new(Status::AsAssumed, format!("{NATIONAL} → {kept}"), meaning);
    Some(match Country::of_answer(NATIONAL, kept) {
        Some(country) => found.like("country", country.to_string()),
        None => Found { status: Status::Handled, ..found },
    })
}

fn refusal(refusal: Refusal, what: &str) -> Found {
    let word: &'static str = refusal.into();
    match refusal {
        Refusal::Nested | Refusal::Dotted | Refusal::Plain | Refusal::List | Refusal::Detail => Found::new(
            Status::AsAssumed,
            format!("refused, {word} shape"),
            format!("only the {what} is left out; the rest is written"),
        ),
        Refusal::General | Refusal::NotJson => Found::new(
            Status::Handled,
            format!("refused without a name ({word})"),
            "all optional values of that message are left out; the rest is written",
        ),
        Refusal::Kept | Refusal::LeftOut => Found::new(
            Status::Handled,
            format!("accepted ({word})"),
            format!("an invalid {what} is not reported by Close"),
        ),
        Refusal::OtherStatus => Found::new(
            Status::NotSupported,
            "an unexpected status",
            format!("a message with an invalid {what} may be retried and dead-lettered"),
        ),
    }
}

fn unknown_key(is_refused: bool) -> Found {
    let found = if is_refused { "it is refused" } else { "it is ignored" };
    Found::new(Status::AsAssumed, found, "no consequence").like("strict_contact_keys", is_refused)
}

fn field(observation: &FieldObservation) -> Finding {
    let FieldObservation { setting, kind, sent, kept } = observation;
    let (status, found, meaning) = match kept {
        Kept::Same => (Status::AsAssumed, "as it was sent".to_owned(), "no consequence"),
        Kept::OtherNotation(kept) => {
            (Status::Handled, format!("{sent} → {kept}"), "close-sync compares by meaning")
        }
        Kept::Different(kept) => (
            Status::Handled,
            format!("{sent} → {kept}"),
            "close-sync remembers the pair and does not send the value again",
        ),
        Kept::Missing => (
            Status::NotSupported,
            format!("{sent} was not kept"),
            "values for this field are lost; check the permissions of the field in Close",
        ),
        Kept::Refused => (
            Status::NotSupported,
            format!("{sent} was refused"),
            "values for this field are left out; check its type in Close",
        ),
    };
    Finding {
        assumption: Assumption::FieldReadBack,
        subject: Some(format!("{setting} ({kind})")),
        status,
        assumed: Assumption::FieldReadBack.assumed(),
        found,
        meaning: meaning.to_owned(),
        setting: None,
        behaviour: Map::new(),
    }
}
