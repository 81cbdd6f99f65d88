//! Renders the explanation of a dry run, like `close-sync plan`.

use maud::{Markup, html};

use crate::http::admin::redact::Visibility;
use crate::sync::explain::{DEAD, Explanation, LeftOut, Record};

/// Renders a report, with values only if visible.
pub(crate) fn report(report: &Explanation, visibility: Visibility) -> Markup {
    let kind = match report.outcome {
        DEAD => "bad",
        "skipped" | "unchanged" => "so-so",
        _ => "good",
    };
    html! {
        p {
            span .badge.(kind) { (report.outcome) }
            @if let Some(reason) = report.reason { " " code { (reason) } }
        }
        @if let Some(error) = &report.error { p { (error) } }
        @for record in &report.records { (one(record, visibility)) }
        @if !report.left_out.is_empty() {
            h3 { "Left out" }
            ul { @for left_out in &report.left_out { li { (left(left_out, visibility)) } } }
        }
        dl .facts {
            @if let Some(rule) = report.rule_in_words { dt { "Rule" } dd { (rule) } }
            @if !report.look_ups.is_empty() {
                dt { "Looked up" }
                dd { (report.look_ups.join("; ")) }
            }
            @for candidate in &report.candidates {
                dt { "Candidate" }
                dd { code { (candidate.id) } " " (candidate.in_words) }
            }
            dt { "Calls to Close" }
            dd { (report.calls) "; nothing was written" }
        }
    }
}

fn one(record: &Record, visibility: Visibility) -> Markup {
    html! {
        section .record {
            h3 {
                (record.action)
                @if let Some(name) = &record.name { " " q { (visibility.of(name)) } }
                @if let Some(id) = &record.id { " " code { (id) } }
            }
            @if let Some(switch) = record.forbidden { p { "Not written: the switch " code { (switch) } " is off." } }
            @if !record.fields.is_empty() {
                div .wide {
                    table {
                        caption .hidden { "Fields of the record" }
                        thead { tr { th scope="col" { "Field" } th scope="col" { "Result" } } }
                        tbody {
                            @for field in &record.fields {
                                tr {
                                    th scope="row" { (field.label) }
                                    td {
                                        @match visibility {
                                            Visibility::Redacted => { code { (field.verdict) } }
                                            Visibility::Full => { (field.change) }
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn left(left_out: &LeftOut, visibility: Visibility) -> Markup {
    html! {
        @match visibility {
            Visibility::Redacted => { (left_out.field) ": " code { (left_out.reason) } }
            Visibility::Full => { (left_out.in_words) }
        }
    }
}
