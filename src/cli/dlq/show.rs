//! `close-sync dlq show`.

use serde_json::{Map, Value};

use crate::cli::dlq::list::printable;
use crate::cli::dlq::{Failure, open};
use crate::cli::{plan, single};
use crate::config::{Config, Destination, Problems};
use crate::dead_letters::group::remedy;
use crate::dead_letters::letter::DeadLetter;
use crate::outcome::Reason;
use crate::sync::explain::{self, Explanation};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The id, as `list` prints it, or the message id its producer gave it.
    id: String,
    /// Do not ask Close what would become of it now.
    #[arg(long)]
    no_plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn show(
    args: &Args,
    destination: &Destination,
    whole: impl FnOnce() -> Result<Config, Problems>,
) -> Result<(), Failure> {
    let letter = open(&args.id, destination).await?;
    let plan = if args.no_plan { None } else { Some(plan(&letter, whole).await) };
    if args.json {
        anstream::println!("{}", serde_json::to_string_pretty(&as_json(&letter, plan)).unwrap_or_default());
    } else {
        print(&letter, plan);
    }
    Ok(())
}

/// What would become of it now, or why that is not known.
async fn plan(
    letter: &DeadLetter,
    whole: impl FnOnce() -> Result<Config, Problems>,
) -> Result<Explanation, String> {
    let config = whole().map_err(|problems| problems.to_string())?;
    let told = |failure| match failure {
        Failure::Input(told) | Failure::Unavailable(told) | Failure::Configuration(told) => told,
        Failure::Told(_) => String::new(),
    };
    let worker = plan::worker(single(config).map_err(told)?).await.map_err(told)?;
    let rehearsed = explain::dry_run(&worker, &letter.body, letter.received_at()).await;
    rehearsed.map(|(_, report)| report).map_err(|why| why.to_string())
}

fn as_json(letter: &DeadLetter, plan: Option<Result<Explanation, String>>) -> Value {
    let mut whole = serde_json::to_value(letter).unwrap_or_default();
    let (properties, headers) = letter.properties_and_headers();
    whole["properties"] = properties.into();
    whole["headers"] = headers.into();
    whole["body"] = body(&letter.body).unwrap_or_else(Into::into);
    if let Some(original) = letter.original() {
        whole["original"] = body(&original).unwrap_or_else(Into::into);
    }
    match plan {
        Some(Ok(report)) => whole["plan"] = serde_json::to_value(report).unwrap_or_default(),
        Some(Err(why)) => whole["no_plan"] = why.into(),
        None => {}
    }
    whole
}

/// The body as JSON, or else as text.
fn body(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|_| String::from_utf8_lossy(bytes).into_owned())
}

fn print(letter: &DeadLetter, plan: Option<Result<Explanation, String>>) {
    let whole = serde_json::to_value(letter).unwrap_or_default();
    let about = whole.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let mut rows: Vec<_> = about.map(|(name, value)| (name.clone(), text(value))).collect();
    rows.push(("what to do".to_owned(), remedy(&letter.fingerprint).to_owned()));
    let (properties, headers) = letter.properties_and_headers();
    let told = |name: &str| name.starts_with("x-close-sync-") || name == "message_id";
    for (kind, carried) in [("property", properties), ("header", headers)] {
        let rest: Map<String, Value> = carried.into_iter().filter(|(name, _)| !told(name)).collect();
        for (name, value) in rest {
            rows.push((format!("{kind} {}", printable(&name)), text(&value)));
        }
    }
    for (name, value) in rows {
        anstream::println!("{name:<24} {value}");
    }
    anstream::println!("\n{}", cut(pretty(&letter.body)));
    if let Some(original) = letter.original() {
        anstream::println!("\nbefore it was edited:\n{}", cut(pretty(&original)));
    }
    match plan {
        Some(Ok(report)) => {
            anstream::println!();
            plan::print("if it were replayed now", &report);
            if letter.reason.as_deref() == Some(Reason::Rejected.label()) {
                anstream::println!(
                    "\nwhat Close refuses is only found out by sending it: `close-sync dlq replay --id {}`",
                    printable(&letter.id)
                );
            }
        }
        Some(Err(why)) => anstream::println!("\nwhat would become of it now is not known: {why}"),
        None => {}
    }
}

/// Characters of a body for a terminal.
const MOST_SHOWN: usize = 16 * 1024;

fn cut(mut text: String) -> String {
    let length = text.chars().count();
    if let Some((end, _)) = text.char_indices().nth(MOST_SHOWN) {
        text.truncate(end);
        return format!("{text}\n… {MOST_SHOWN} of {length} characters; `--json` has all");
    }
    text
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), printable)
}

fn pretty(bytes: &[u8]) -> String {
    let text = body(bytes).map(|body| serde_json::to_string_pretty(&body).unwrap_or_default());
    printable(&text.unwrap_or_else(|text| text))
}
