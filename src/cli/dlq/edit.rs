//! `close-sync dlq edit`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anstyle::AnsiColor;
use serde_json::{Map, Value};
use similar::{ChangeTag, TextDiff};
use tempfile::NamedTempFile;

use crate::cli::dlq::list::printable;
use crate::cli::dlq::{Failure, Meant, follow, look, nothing, open, tell_of_replay};
use crate::cli::read;
use crate::config::{self, Destination};
use crate::dead_letters::edit::{self, Edited};
use crate::dead_letters::filter::{Filter, Selection};
use crate::dead_letters::letter::DeadLetter;
use crate::text::count;

/// Change the bodies of dead letters.
///
/// Opens one in `$VISUAL` or `$EDITOR`, or applies a patch to one or many:
/// `dlq edit --reason rejected --patch '{"traits": {"phone": null}}'`. A changed dead letter takes the place of the old
/// one under the same id; what its producer sent is kept with it, and `show` prints both. Replay it afterwards.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("edited").required(true).multiple(true).args([
    "one", "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until",
]))]
pub(in crate::cli) struct Args {
    /// The id, as `list` prints it, or the message id its producer gave it.
    #[arg(value_name = "ID", conflicts_with_all = [
        "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until", "limit",
    ])]
    one: Option<String>,
    #[command(flatten)]
    meant: Meant,
    /// A JSON merge patch, `{"traits": {"phone": null}}`, or a JSON patch, `[{"op": "remove", "path": "/traits/phone"}]`.
    #[arg(long, value_name = "JSON")]
    patch: Option<String>,
    /// The new body: a file, or `-` for standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "patch")]
    body: Option<PathBuf>,
}

pub(super) async fn edit(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let patch = args.patch.as_deref().map(Patch::parse).transpose()?;
    match (&args.one, patch) {
        (Some(id), patch) => one(id, patch.as_ref(), args.body.as_deref(), destination).await,
        (None, Some(patch)) => many(args, &patch, destination).await,
        (None, None) => {
            Err(Failure::Input("several are edited with `--patch`; name an id to edit one".to_owned()))
        }
    }
}

async fn many(args: &Args, patch: &Patch, destination: &Destination) -> Result<(), Failure> {
    let which = args.meant.selection(&destination.rules);
    let change = |letter: &DeadLetter| {
        let edited = patch.apply(&letter.body)?;
        Ok((edited != letter.body).then_some(edited))
    };
    let (matched, changed) = apply(&which, change, destination).await?;
    if matched == 0 {
        return nothing(&args.meant);
    }
    anstream::println!("edited {changed} of {}", count(matched as u64, "dead letter", "dead letters"));
    Ok(())
}

async fn one(
    id: &str,
    patch: Option<&Patch>,
    body: Option<&Path>,
    destination: &Destination,
) -> Result<(), Failure> {
    let letter = open(id, destination).await?;
    // It may have been named by the id of its producer.
    let id = printable(&letter.id);
    if !edit::is_editable(&letter) {
        return Err(Failure::Input(format!(
            "the body has {} bytes: more than {} cannot be kept with an edited one. Export it, edit the file and \
             import that: `close-sync dlq export --id {id}`",
            letter.body.len(),
            edit::LARGEST_ORIGINAL,
        )));
    }
    let (edited, file) = match (patch, body) {
        (Some(patch), _) => (patch.apply(&letter.body).map_err(Failure::Input)?, None),
        (None, Some(file)) => (read(file).await?, None),
        (None, None) => {
            let (edited, file) = by_hand(&letter.body)?;
            (edited, Some(file))
        }
    };
    if edited == letter.body {
        anstream::eprintln!("nothing was changed");
        return Ok(());
    }
    let done = replace(&letter, &edited, destination).await;
    if let (Err(_), Some(file)) = (&done, file)
        && let Ok((_, path)) = file.keep()
    {
        anstream::eprintln!(
            "what you wrote is in {0}: `close-sync dlq edit {id} --body {0}`",
            path.display()
        );
    }
    done?;
    print_diff(&letter.body, &edited);
    anstream::eprintln!(
        "edited; see what would become of it with `close-sync dlq show {id}`, then `close-sync dlq replay --id {id}`"
    );
    Ok(())
}

async fn replace(letter: &DeadLetter, body: &[u8], destination: &Destination) -> Result<(), Failure> {
    if let Err(error) = serde_json::from_slice::<Map<String, Value>>(body) {
        return Err(Failure::Input(format!("the new body is no JSON object ({error}); nothing was changed")));
    }
    let which = Filter { ids: [letter.id.clone()].into(), ..Filter::default() };
    let change = |now: &DeadLetter| Ok((now.body == letter.body).then(|| body.to_vec()));
    let (_, changed) = apply(&which.into(), change, destination).await?;
    if changed == 0 {
        return Err(Failure::Input(format!(
            "the dead letter `{}` was replayed, discarded or edited meanwhile; nothing was changed",
            letter.id
        )));
    }
    Ok(())
}

/// How many are meant, and how many were changed.
async fn apply(
    which: &Selection,
    change: impl Fn(&DeadLetter) -> Result<Option<Vec<u8>>, String>,
    destination: &Destination,
) -> Result<(usize, usize), Failure> {
    let bar = look();
    let edited = edit::edit(&destination.amqp, which, change, &mut follow(&bar)).await;
    bar.finish_and_clear();
    match edited? {
        Edited::Done { matched, changed, replaying } => {
            tell_of_replay(replaying);
            Ok((matched, changed))
        }
        Edited::Refused { id, why } => {
            Err(Failure::Input(format!("{why} (dead letter `{id}`); nothing was changed")))
        }
    }
}

/// What to do to a body.
enum Patch {
    Steps(json_patch::Patch),
    Merge(Value),
}

impl Patch {
    fn parse(text: &str) -> Result<Self, Failure> {
        let patch: Value = serde_json::from_str(text)
            .map_err(|error| Failure::Input(format!("the patch is no JSON: {error}")))?;
        if !patch.is_array() {
            return Ok(Self::Merge(patch));
        }
        let steps = serde_json::from_value(patch)
            .map_err(|error| Failure::Input(format!("the patch is no JSON patch: {error}")))?;
        Ok(Self::Steps(steps))
    }

    /// The new body. As it is, where the patch changes nothing.
    fn apply(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let before: Value = serde_json::from_slice(body).map_err(|_| {
            "the body is no JSON, to which no patch applies: edit it without --patch".to_owned()
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
            return Err("the new body is no JSON object".to_owned());
        }
        Ok(if event == before { body.to_vec() } else { serde_json::to_vec(&event).unwrap_or_default() })
    }
}

/// In the operator's editor. The file is theirs alone, and is deleted unless it is kept.
fn by_hand(body: &[u8]) -> Result<(Vec<u8>, NamedTempFile), Failure> {
    let environment = config::environment();
    let set = |name: &str| environment.get(name).filter(|editor| !editor.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR"));
    let Some(editor) = editor else {
        return Err(Failure::Input(
            "neither VISUAL nor EDITOR names an editor; set one, or use --patch or --body".to_owned(),
        ));
    };
    let failed = |error: std::io::Error| {
        Failure::Unavailable(format!("the editor `{editor}` cannot be used: {error}"))
    };
    let mut file =
        tempfile::Builder::new().prefix("dead-letter-").suffix(".json").tempfile().map_err(failed)?;
    let pretty =
        serde_json::from_slice::<Value>(body).ok().and_then(|event| serde_json::to_vec_pretty(&event).ok());
    let shown = pretty.as_deref().unwrap_or(body);
    file.write_all(shown).map_err(failed)?;
    // By the shell: an editor may have arguments.
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
    // Editors end a file with a new line.
    let trimmed = edited.trim_ascii_end();
    let edited = if trimmed == shown.trim_ascii_end() { body.to_vec() } else { trimmed.to_vec() };
    Ok((edited, file))
}

/// What was changed, for a terminal.
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
        anstream::println!("{color}{sign} {}{color:#}", printable(change.value().trim_end()));
    }
}
