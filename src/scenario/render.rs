//! Renders the result of a scenario as text, for scenario files and diffs.
//!
//! ```text
//! added: new_in_company_lead
//! create contact "Bob" in "Acme"
//!   User ID: "u2"
//!   emails: + "bob@acme.test"
//! left alone "Info": somebody_else
//! left out phones: invalid_phone
//! ```
//!
//! The first line has the outcome, its reason, and the matching rule that decided. Then follow the writes, record by
//! record, each with the value before if there was one. Then follow the records and values that were not written.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;
use strum::VariantArray;

use crate::domain::decision::{Decision, change};
use crate::domain::mapping::Mapping;
use crate::domain::matching::Verdict;
use crate::domain::plan::{RecordPlan, RecordRef, Refusal};
use crate::domain::record::{Channel, LeadId};
use crate::outcome::Outcome;
use close_sync_simulator::Simulator;

/// Renders the decision about one message. `name` returns the name of a record by its id.
pub fn decision(
    outcome: &Outcome,
    decision: &Decision,
    mapping: &Mapping,
    name: impl Fn(&str) -> Option<String>,
) -> String {
    let mut text = match outcome {
        Outcome::Synced(effect) => effect.label().to_owned(),
        Outcome::Skipped(skip) => format!("skipped ({})", skip.label()),
        Outcome::Dead(dead) => format!("dead-lettered ({})", dead.reason.label()),
        Outcome::Delayed { cause, .. } => format!("delayed ({cause})"),
        Outcome::Paused(cause) => format!("paused ({})", cause.label()),
    };
    if let Some(case) = decision.case {
        let _ = write!(text, ": {}", case.label());
    } else if decision.repeats {
        text.push_str(": repeat");
    }
    text.push('\n');
    let called = |id: &str| quoted(name(id).as_deref());
    for record in &decision.plan.records {
        if let Some(title) = title(record, &called) {
            let refused = record.refused.map(Refusal::label);
            let _ = writeln!(
                text,
                "{title}{}",
                refused.map(|label| format!(": not done, {label}")).unwrap_or_default()
            );
            for field in record.written().filter(|_| refused.is_none()) {
                let _ = writeln!(text, "  {}: {}", mapping.label(&field.field), change(field, mapping));
            }
        }
    }
    let is_left_alone = |verdict: &Verdict| match verdict {
        Verdict::YoungerLead
        | Verdict::UserIdDecides
        | Verdict::DifferentPerson
        | Verdict::EmailsUnknown
        | Verdict::TooMany
        | Verdict::Gone => true,
        Verdict::SameCompany
        | Verdict::OtherCompany
        | Verdict::NoCompany
        | Verdict::SameUser
        | Verdict::SameEmail
        | Verdict::NoMatch => false,
    };
    let mut rest: Vec<String> = Vec::new();
    for candidate in decision.candidates.iter().filter(|candidate| is_left_alone(&candidate.verdict)) {
        rest.push(format!("left alone {}: {}", called(&candidate.id), candidate.verdict.label()));
    }
    // Search does not promise an order.
    rest.sort();
    for dropped in &decision.dropped {
        rest.push(format!("left out {}: {}", mapping.label(&dropped.field), dropped.reason.label()));
    }
    for line in rest {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// The line with the action and the name of a record. `None` if nothing is done.
fn title(record: &RecordPlan, called: &dyn Fn(&str) -> String) -> Option<String> {
    let name = quoted(record.name.as_deref());
    let touched = record.refused.is_some() || record.written().next().is_some();
    match &record.record {
        RecordRef::NewLead => Some(format!("create lead {name}")),
        RecordRef::NewContact(None) => Some(format!("create contact {name} in it")),
        RecordRef::NewContact(Some(lead)) => {
            Some(format!("create contact {name} in {}", called(LeadId::as_str(lead))))
        }
        RecordRef::Lead(_) => touched.then(|| format!("update lead {name}")),
        RecordRef::Contact(_) => touched.then(|| format!("update contact {name}")),
    }
}

fn quoted(name: Option<&str>) -> String {
    name.map_or_else(|| "without name".to_owned(), |name| Value::from(name).to_string())
}

/// The names of the records in the simulated Close, by id.
pub(super) fn names(close: &Simulator) -> BTreeMap<String, String> {
    let records = close.leads().into_iter().chain(close.contacts());
    let text =
        |record: &Value, key: &str| record[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    records.filter_map(|record| text(&record, "id").zip(text(&record, "name"))).collect()
}

/// Renders all records of the simulated Close: Leads, oldest first, each with its Contacts in order of creation.
///
/// ```text
/// lead "Acme"
///   Company ID: "acme"
///   contact "Bob"
///     User ID: "u2"
///     emails: "bob@acme.test"
/// ```
///
/// Leaves out the first Lead status, which Close sets by default.
pub fn records(close: &Simulator) -> String {
    let statuses = close.lead_statuses();
    let fields = close.fields();
    let mut text = String::new();
    let custom = |text: &mut String, record: &Value, indent: &str| {
        for field in &fields {
            let value = &record[format!("custom.{}", field.id)];
            if !value.is_null() {
                let _ = writeln!(text, "{indent}{}: {value}", field.name);
            }
        }
    };
    for lead in close.leads() {
        let _ = writeln!(text, "lead {}", quoted(lead["name"].as_str().filter(|name| !name.is_empty())));
        let first = statuses.first().map(|(id, _)| id.as_str());
        if lead["status_id"].as_str() != first {
            let _ = writeln!(text, "  status: {}", lead["status_label"]);
        }
        if lead["description"].as_str().is_some_and(|text| !text.is_empty()) {
            let _ = writeln!(text, "  description: {}", lead["description"]);
        }
        custom(&mut text, &lead, "  ");
        for contact in lead["contacts"].as_array().into_iter().flatten() {
            let _ = writeln!(
                text,
                "  contact {}",
                quoted(contact["name"].as_str().filter(|name| !name.is_empty()))
            );
            if contact["title"].as_str().is_some_and(|title| !title.is_empty()) {
                let _ = writeln!(text, "    title: {}", contact["title"]);
            }
            custom(&mut text, contact, "    ");
            for channel in Channel::VARIANTS {
                let entries = contact[channel.list()].as_array().into_iter().flatten();
                let values: Vec<String> = entries.map(|entry| entry[channel.item()].to_string()).collect();
                if !values.is_empty() {
                    let _ = writeln!(text, "    {}: {}", channel.list(), values.join(", "));
                }
            }
        }
    }
    text
}
