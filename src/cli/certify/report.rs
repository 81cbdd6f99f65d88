//! The report of `certify`, as a table and as JSON.

use anstyle::AnsiColor::{Green, Red, Yellow};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::VERSION;
use crate::cli::certify::finding::{Finding, Status};
use crate::text::{json, line};

/// Whether close-sync fits the organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Fits,
    FitsAfterChange,
    DoesNotFit,
    /// The run ended early, or left records behind.
    Incomplete,
}

#[derive(Serialize)]
pub(super) struct Report {
    pub(super) verdict: Verdict,
    pub(super) organization: String,
    close_sync: &'static str,
    at: String,
    pub(super) calls: u32,
    /// Why the run ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stopped: Option<String>,
    pub(super) findings: Vec<Finding>,
    /// The settings that should change, as lines of the configuration.
    pub(super) settings: Vec<String>,
    /// The settings of the simulator that behave like this organization, for `simulate --like`.
    behaviour: Map<String, Value>,
    /// Records that could not be deleted.
    pub(super) left_behind: Vec<String>,
}

impl Report {
    pub(super) fn new(
        organization: String,
        calls: u32,
        stopped: Option<String>,
        findings: Vec<Finding>,
        left_behind: Vec<String>,
    ) -> Self {
        let mut behaviour: Map<String, Value> = Map::new();
        for (key, value) in findings.iter().flat_map(|finding| finding.behaviour.clone()) {
            match (behaviour.get_mut(&key), value) {
                (Some(Value::Array(known)), Value::Array(more)) => known.extend(more),
                (_, value) => drop(behaviour.insert(key, value)),
            }
        }
        let settings = longest_of_each(findings.iter().filter_map(|finding| finding.setting.as_deref()));
        let at = format!("{:.0}", jiff::Timestamp::now());
        let has = |status| findings.iter().any(|finding| finding.status == status);
        let verdict = if stopped.is_some() || !left_behind.is_empty() {
            Verdict::Incomplete
        } else if has(Status::NotSupported) {
            Verdict::DoesNotFit
        } else if has(Status::ChangeSetting) {
            Verdict::FitsAfterChange
        } else {
            Verdict::Fits
        };
        Self {
            verdict,
            organization,
            close_sync: VERSION,
            at,
            calls,
            stopped,
            findings,
            settings,
            behaviour,
            left_behind,
        }
    }

    pub(super) fn print_json(&self) {
        anstream::println!("{}", json(&serde_json::to_string_pretty(self).unwrap_or_default()));
    }

    pub(super) fn print_table(&self) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(WIDTH);
        table.set_header(["", "assumed", "found", "what it means"]);
        for finding in &self.findings {
            let assumed = match &finding.subject {
                Some(subject) => format!("{subject}: {}", finding.assumed),
                None => finding.assumed.to_owned(),
            };
            let cells = [&assumed, &finding.found, &finding.meaning].map(|text| line(text));
            let [assumed, found, meaning] = cells;
            table.add_row([word(finding.status).to_owned(), assumed, found, meaning]);
        }
        anstream::println!("{table}");
        for setting in &self.settings {
            let style = Yellow.on_default();
            anstream::println!("{style}set{style:#} {}", line(setting));
        }
        for record in &self.left_behind {
            let style = Red.on_default();
            anstream::println!("{style}left in Close{style:#} {}", line(record));
        }
        let (colour, verdict) = match self.verdict {
            Verdict::Fits => (Green, "fits"),
            Verdict::FitsAfterChange => (Yellow, "fits after this change"),
            Verdict::DoesNotFit => (Red, "does not fit"),
            Verdict::Incomplete => (Red, "incomplete"),
        };
        let style = colour.on_default();
        let unknown = self.findings.iter().filter(|finding| finding.status == Status::Unknown).count();
        let untested = if unknown == 0 { String::new() } else { format!(", {unknown} not tested") };
        anstream::println!(
            "{style}{verdict}{style:#}: the organization \"{}\", {} calls{untested}",
            line(&self.organization),
            self.calls
        );
    }
}

/// The width of the table, in characters.
const WIDTH: u16 = 118;

fn word(status: Status) -> &'static str {
    match status {
        Status::AsAssumed => "ok",
        Status::Handled => "handled",
        Status::ChangeSetting => "change",
        Status::NotSupported => "wrong",
        Status::Unknown => "unknown",
    }
}

/// One line for each setting, the one with the longest duration.
fn longest_of_each<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let seconds = |line: &str| {
        let digits: String = line.chars().filter(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or_default()
    };
    let mut longest: Vec<String> = Vec::new();
    for line in lines {
        let key = |line: &str| line.split('=').next().unwrap_or_default().to_owned();
        match longest.iter_mut().find(|known| key(known) == key(line)) {
            Some(known) if seconds(known) < seconds(line) => line.clone_into(known),
            Some(_) => {}
            None => longest.push(line.to_owned()),
        }
    }
    longest
}
