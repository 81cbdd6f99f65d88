//! `close-sync dlq edit`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anstyle::AnsiColor;
use serde_json::{Map, Value};
use similar::{ChangeTag, TextDiff};
use tempfile::NamedTempFile;

use crate::amqp::envelope::MAX_ORIGINAL;
use crate::cli::dlq::select::{FilterArgs, find};
use crate::cli::dlq::terminal::{observer, report_running_replay, scan_bar};
use crate::cli::failure::Failure;
use crate::cli::input::read;
use crate::config::{self, Destination};
use crate::dead_letters::edit::{self, Edited};
use crate::dead_letters::filter::{Filter, Selection};
use crate::dead_letters::letter::DeadLetter;
use crate::text::{argument, count, line, shell};

/// Edit the body of one dead letter, or patch several.
///
/// Opens one dead letter in `$VISUAL` or `$EDITOR`, or applies a patch to one or several. For example:
///
/// `close-sync dlq edit --reason rejected --patch '{"traits": {"phone": null}}'`
///
/// The id stays the same. `show` prints the new body and the one from the producer. Replay the dead letter after the
/// edit.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("edited").required(true).multiple(true).args([
    "one", "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until",
]))]
pub(in crate::cli) struct Args {
    /// Edit the dead letter with this id (see `list`) or this message id of the producer.
    #[arg(value_name = "ID", conflicts_with_all = [
        "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until", "limit",
    ])]
    one: Option<String>,
    #[command(flatten)]
    filter: FilterArgs,
    /// Apply a JSON merge patch, `{"traits": {"phone": null}}`, or a JSON patch, `[{"op": "remove", "path": "/traits/phone"}]`.
    #[arg(long, value_name = "JSON")]
    patch: Option<String>,
    /// Read the new body from this file, or from standard input with `-`.
    #[arg(long, value_name = "FILE", conflicts_with = "patch")]
    body: Option<PathBuf>,
}

pub(super) async fn edit(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let patch = args.patch.as_deref().map(Patch::parse).transpose()?;
    match (&args.one, patch) {
        (Some(id), patch) => edit_one(id, patch.as_ref(), args.body.as_deref(), destination).await,
        (None, Some(patch)) => patch_all(args, &patch, destination).await,
        (None, None) => Err(Failure::Input(
            "editing several dead letters needs `--patch`; give an id to edit one in an editor".to_owned(),
        )),
    }
}

async fn patch_all(args: &Args, patch: &Patch, destination: &Destination) -> Result<(), Failure> {
    let selection = args.filter.selection(&destination.rules);
    let change = |letter: &DeadLetter| {
        let before = letter.decoded().map_err(|error| error.to_string())?;
        let edited = patch.apply(&before)?;
        Ok((edited != *before).then_some(edited))
    };
    let (matched, changed) = apply(&selection, change, destination).await?;
    if matched == 0 {
        return args.filter.nothing_matches();
    }
    anstream::println!("edited {changed} of {}", count(matched as u64, "dead letter", "dead letters"));
    Ok(())
}

async fn edit_one(
    id: &str,
    patch: Option<&Patch>,
    body: Option<&Path>,
    destination: &Destination,
) -> Result<(), Failure> {
    let letter = find(id, destination).await?;
    // The argument may have been the message id of the producer.
    let (id, last) = (shell(&letter.id), argument(&letter.id));
    if !edit::is_editable(&letter) {
        return Err(Failure::Input(format!(
            "the body has {} bytes, more than the {} that an edit can keep; export the dead letter, edit the file and \
             import it: `close-sync dlq export --id={id}`",
            letter.body.len(),
            MAX_ORIGINAL,
        )));
    }
    let before = match letter.decoded() {
        Ok(before) => before,
        // A body from a file can replace any other.
        Err(_) if body.is_some() => letter.readable(),
        Err(error) => {
            return Err(Failure::Input(format!(
                "{error}; to replace the body, use `--body` with a file that has the plain event"
            )));
        }
    };
    let (edited, file) = match (patch, body) {
        (Some(patch), _) => (patch.apply(&before).map_err(|why| Failure::Input(line(&why)))?, None),
        (None, Some(file)) => (read(file).await?, None),
        (None, None) => {
            let (edited, file) = open_editor(&before)?;
            (edited, Some(file))
        }
    };
    if edited == *before {
        anstream::eprintln!("nothing was changed");
        return Ok(());
    }
    let done = replace(&letter, &edited, destination).await;
    if let (Err(_), Some(file)) = (&done, file)
        && let Ok((_, path)) = file.keep()
    {
        anstream::eprintln!(
            "your edit is saved in {0}; to retry: `close-sync dlq edit --body={0} {last}`",
            shell(&path.display().to_string())
        );
    }
    done?;
    print_diff(&before, &edited);
    anstream::eprintln!(
        "edited; preview a replay with `close-sync dlq show {last}`, then run `close-sync dlq replay --id={id}`"
    );
    Ok(())
}

async fn replace(letter: &DeadLetter, body: &[u8], destination: &Destination) -> Result<(), Failure> {
    if let Err(error) = serde_json::from_slice::<Map<String, Value>>(body) {
        return Err(Failure::Input(format!(
            "the new body is not a JSON object ({error}); nothing was changed"
        )));
    }
    let filter = Filter { ids: [letter.id.clone()].into(), ..Filter::default() };
    let change = |now: &DeadLetter| Ok((now.body == letter.body).then(|| body.to_vec()));
    let (_, changed) = apply(&filter.into(), change, destination).await?;
    if changed == 0 {
        return Err(Failure::Input(format!(
            "the dead letter `{}` was replayed, discarded or edited in the meantime; nothing was changed",
            line(&letter.id)
        )));
    }
    Ok(())
}

/// Returns how many dead letters matched, and how many changed.
async fn apply(
    selection: &Selection,
    change: impl Fn(&DeadLetter) -> Result<Option<Vec<u8>>, String>,
    destination: &Destination,
) -> Result<(usize, usize), Failure> {
    let bar = scan_bar();
    let edited = edit::edit(&destination.amqp, selection, change, &mut observer(&bar)).await;
    bar.finish_and_clear();
    match edited? {
        Edited::Done { matched, changed, replaying } => {
            report_running_replay(replaying);
            Ok((matched, changed))
        }
        Edited::Refused { id, why } => {
            Err(Failure::Input(format!("{} (dead letter `{}`); nothing was changed", line(&why), line(&id))))
        }
    }
}

/// A change to a body.
enum Patch {
    /// RFC 6902.
    Steps(json_patch::Patch),
    /// RFC 7396.
    Merge(Value),
}

impl Patch {
    fn parse(text: &str) -> Result<Self, Failure> {
        let patch: Value = serde_json::from_str(text)
            .map_err(|error| Failure::Input(format!("the patch is not valid JSON: {error}")))?;
        if !patch.is_array() {
            return Ok(Self::Merge(patch));
        }
        let steps = serde_json::from_value(patch)
            .map_err(|error| Failure::Input(format!("not a valid JSON patch: {error}")))?;
        Ok(Self::Steps(steps))
    }

    /// Returns the new body. It is byte for byte the same if the patch changes nothing.
    fn apply(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let before: Value = serde_json::from_slice(body).map_err(|_| {
            "the body is not valid JSON, so a patch cannot change it; edit it without --patch".to_owned()
        })?;
        let mut event = before.clone();
        match self {
            Self::Steps(steps) => {
                json_patch::patch(&mut event, steps)
                    .map_err(|error| format!("the patch does not apply: {error}"))?;
            }
            Self::Merge(patch) => json_patch::merge(&mut event, patch),
        }
        if !event.is_object() {
            return Err("the new body is not a JSON object".to_owned());
        }
        Ok(if event == before { body.to_vec() } else { serde_json::to_vec(&event).unwrap_or_default() })
    }
}

/// Opens the body in the operator's editor. Only the operator can read the file. It is deleted unless it is kept.
fn open_editor(body: &[u8]) -> Result<(Vec<u8>, NamedTempFile), Failure> {
    let environment = config::environment();
    let variable = |name: &str| environment.get(name).filter(|editor| !editor.is_empty());
    let editor = variable("VISUAL").or_else(|| variable("EDITOR"));
    let Some(editor) = editor else {
        return Err(Failure::Input(
            "neither VISUAL nor EDITOR is set; set one to an editor, or use --patch or --body".to_owned(),
        ));
    };
    let failed =
        |error: std::io::Error| Failure::Unavailable(format!("cannot use the editor `{editor}`: {error}"));
    let mut file =
        tempfile::Builder::new().prefix("dead-letter-").suffix(".json").tempfile().map_err(failed)?;
    let pretty =
        serde_json::from_slice::<Value>(body).ok().and_then(|event| serde_json::to_vec_pretty(&event).ok());
    let shown = pretty.as_deref().unwrap_or(body);
    file.write_all(shown).map_err(failed)?;
    // The shell splits arguments off: EDITOR may be `code --wait`.
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("{editor} \"$1\""), "sh"])
        .arg(file.path())
        .status()
        .map_err(failed)?;
    if !status.success() {
        return Err(Failure::Unavailable(format!(
            "the editor `{editor}` failed ({status}); nothing was changed"
        )));
    }
    let edited = std::fs::read(file.path()).map_err(failed)?;
    // Editors add a line break at the end of the file.
    let trimmed = edited.trim_ascii_end();
    let edited = if trimmed == shown.trim_ascii_end() { body.to_vec() } else { trimmed.to_vec() };
    Ok((edited, file))
}

/// Prints the change on a terminal. Elsewhere it would put personal data into logs.
fn print_diff(before: &[u8], after: &[u8]) {
    if !std::io::stdout().is_terminal() {
        return;
    }
    let pretty = |bytes: &[u8]| match serde_json::from_slice::<Value>(bytes) {
        Ok(event) => serde_json::to_string_pretty(&event).unwrap_or_default(),
        Err(_) => String::from_utf8_lossy(bytes).into_owned(),
    };
    let (before, after) = (pretty(before), pretty(after));
    for change in TextDiff::from_lines(&before, &after).iter_all_changes() {
        let (sign, color) = match change.tag() {
            ChangeTag::Delete => ("-", AnsiColor::Red.on_default()),
            ChangeTag::Insert => ("+", AnsiColor::Green.on_default()),
            ChangeTag::Equal => continue,
        };
        anstream::println!("{color}{sign} {}{color:#}", line(change.value().trim_end()));
    }
}
