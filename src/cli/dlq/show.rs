//! `close-sync dlq show`.

use serde_json::{Map, Value};

use crate::cli::dlq::select::{find, remembered_from};
use crate::cli::failure::Failure;
use crate::cli::plan;
use crate::config::Destination;
use crate::dead_letters::group::remedy;
use crate::dead_letters::letter::DeadLetter;
use crate::outcome::Reason;
use crate::sync::explain::{self, Explanation};
use crate::text::{block, json, line, shell};

/// Show one dead letter with its body, and what a replay would do now.
///
/// The output contains personal data.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Show the dead letter with this id (see `list`) or this message id of the producer.
    id: String,
    /// Skip the plan of a replay, and with it all calls to Close.
    #[arg(long)]
    no_plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn show(
    args: &Args,
    destination: &Destination,
    load: impl FnOnce() -> Result<Destination, Failure>,
) -> Result<(), Failure> {
    let letter = find(&args.id, destination).await?;
    let plan = if args.no_plan { None } else { Some(plan(&letter, load).await) };
    if args.json {
        let shown = serde_json::to_string_pretty(&as_json(&letter, plan)).unwrap_or_default();
        anstream::println!("{}", json(&shown));
    } else {
        print(&letter, plan);
    }
    Ok(())
}

/// What a replay would do now, or why this cannot be planned.
async fn plan(
    letter: &DeadLetter,
    load: impl FnOnce() -> Result<Destination, Failure>,
) -> Result<Explanation, String> {
    let message = |failure: Failure| failure.message().unwrap_or_default().to_owned();
    let destination = load().map_err(message)?;
    let remembered_from = remembered_from(&destination).await.map_err(message)?;
    let worker = plan::worker(destination).await.map_err(message)?;
    remembered_from.inspect(|from| worker.remembers_from(*from));
    let planned = explain::dry_run(&worker.rehearsal(), letter.payload(), letter.received_at()).await;
    planned.map(|(_, explanation)| explanation).map_err(|why| why.to_string())
}

fn as_json(letter: &DeadLetter, plan: Option<Result<Explanation, String>>) -> Value {
    let mut json = serde_json::to_value(letter).unwrap_or_default();
    let (properties, headers) = letter.properties_and_headers();
    json["properties"] = properties.into();
    json["headers"] = headers.into();
    json["body"] = body(&letter.readable()).unwrap_or_else(Into::into);
    if let Some(original) = letter.original() {
        json["original"] = body(&original).unwrap_or_else(Into::into);
    }
    match plan {
        Some(Ok(explanation)) => json["plan"] = serde_json::to_value(explanation).unwrap_or_default(),
        Some(Err(why)) => json["no_plan"] = why.into(),
        None => {}
    }
    json
}

/// The body as JSON, or as text if it is not JSON.
fn body(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|_| String::from_utf8_lossy(bytes).into_owned())
}

fn print(letter: &DeadLetter, plan: Option<Result<Explanation, String>>) {
    let json = serde_json::to_value(letter).unwrap_or_default();
    let fields = json.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let mut rows: Vec<_> = fields.map(|(name, value)| (name.clone(), text(value))).collect();
    rows.push(("what to do".to_owned(), remedy(&letter.fingerprint).to_owned()));
    let (properties, headers) = letter.properties_and_headers();
    let is_shown = |name: &str| name.starts_with("x-close-sync-") || name == "message_id";
    for (kind, carried) in [("property", properties), ("header", headers)] {
        let rest: Map<String, Value> = carried.into_iter().filter(|(name, _)| !is_shown(name)).collect();
        for (name, value) in rest {
            rows.push((format!("{kind} {}", line(&name)), text(&value)));
        }
    }
    for (name, value) in rows {
        anstream::println!("{name:<24} {value}");
    }
    anstream::println!("\n{}", truncated(pretty(&letter.readable())));
    if let Some(original) = letter.original() {
        anstream::println!("\nbody before the edit:\n{}", truncated(pretty(&original)));
    }
    match plan {
        Some(Ok(explanation)) => {
            anstream::println!();
            plan::print("if it were replayed now", &explanation);
            if letter.reason.as_deref() == Some(Reason::Rejected.label()) {
                anstream::println!(
                    "\nonly a replay shows whether Close accepts it now: `close-sync dlq replay --id={}`",
                    shell(&letter.id)
                );
            }
        }
        Some(Err(why)) => anstream::println!("\ncannot plan a replay: {}", block(&why)),
        None => {}
    }
}

/// Longer bodies are truncated on a terminal.
const MAX_CHARS: usize = 16 * 1024;

fn truncated(mut text: String) -> String {
    let length = text.chars().count();
    if let Some((end, _)) = text.char_indices().nth(MAX_CHARS) {
        text.truncate(end);
        return format!("{text}\n… {MAX_CHARS} of {length} characters; `--json` shows all");
    }
    text
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| line(&value.to_string()), line)
}

fn pretty(bytes: &[u8]) -> String {
    match body(bytes) {
        Ok(body) => block(&serde_json::to_string_pretty(&body).unwrap_or_default()),
        // The mark shows that a line of the text is not one of ours.
        Err(text) => text.lines().map(|each| format!("| {}", line(each))).collect::<Vec<_>>().join("\n"),
    }
}
