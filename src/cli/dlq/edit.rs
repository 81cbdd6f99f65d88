//! `close-sync dlq edit`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anstyle::AnsiColor;
use serde_json::Value;
use similar::{ChangeTag, TextDiff};

use super::{Failure, follow, look, open};
use crate::amqp::dead_letters::mend;
use crate::cli::read;
use crate::config::{self, Destination};

/// Change the body of a dead letter.
///
/// Opens it in `$VISUAL` or `$EDITOR`, or applies a patch. The changed dead letter takes the place of the old one under
/// the same id; what its producer sent is kept with it, and `show` prints both. Replay it afterwards.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The id, as `list` prints it.
    id: String,
    /// A JSON merge patch, `{"traits": {"phone": null}}`, or a JSON patch, `[{"op": "remove", "path": "/traits/phone"}]`.
    #[arg(long, value_name = "JSON")]
    patch: Option<String>,
    /// The new body: a file, or `-` for standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "patch")]
    body: Option<PathBuf>,
}

pub(super) async fn edit(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let letter = open(&args.id, destination).await?;
    if !mend::is_editable(&letter) {
        return Err(Failure::Input(format!(
            "the body has {} bytes: more than {} cannot be kept with an edited one. Export it, edit the file and \
             import that: `close-sync dlq export --id {}`",
            letter.body.len(),
            mend::LARGEST_ORIGINAL,
            args.id
        )));
    }
    let edited = match (&args.patch, &args.body) {
        (Some(patch), _) => patched(&letter.body, patch)?,
        (None, Some(file)) => read(file).await?,
        (None, None) => by_hand(&letter.body)?,
    };
    if edited == letter.body {
        anstream::eprintln!("nothing was changed");
        return Ok(());
    }
    if let Err(error) = serde_json::from_slice::<serde_json::Map<String, Value>>(&edited) {
        return Err(Failure::Input(format!("the new body is no JSON object ({error}); nothing was changed")));
    }
    let bar = look();
    let there = mend::edit(&destination.amqp, &letter, &edited, &mut follow(&bar)).await;
    bar.finish_and_clear();
    if !there? {
        return Err(Failure::Input(format!(
            "the dead letter `{}` was replayed, discarded or edited meanwhile; nothing was changed",
            args.id
        )));
    }
    print_diff(&letter.body, &edited);
    anstream::eprintln!(
        "edited; see what would become of it with `close-sync dlq show {0}`, then `close-sync dlq replay --id {0}`",
        args.id
    );
    Ok(())
}

fn patched(body: &[u8], patch: &str) -> Result<Vec<u8>, Failure> {
    let mut event: Value = serde_json::from_slice(body).map_err(|_| {
        Failure::Input("the body is no JSON, to which no patch applies: edit it without --patch".to_owned())
    })?;
    let patch: Value = serde_json::from_str(patch)
        .map_err(|error| Failure::Input(format!("the patch is no JSON: {error}")))?;
    if patch.is_array() {
        let patch: json_patch::Patch = serde_json::from_value(patch)
            .map_err(|error| Failure::Input(format!("the patch is no JSON patch: {error}")))?;
        json_patch::patch(&mut event, &patch)
            .map_err(|error| Failure::Input(format!("the patch does not apply: {error}")))?;
    } else {
        json_patch::merge(&mut event, &patch);
    }
    Ok(serde_json::to_vec(&event).unwrap_or_default())
}

/// In the operator's editor. The file is theirs alone, and is deleted afterwards.
fn by_hand(body: &[u8]) -> Result<Vec<u8>, Failure> {
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
    Ok(if trimmed == shown.trim_ascii_end() { body.to_vec() } else { trimmed.to_vec() })
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
        anstream::println!("{color}{sign} {}{color:#}", super::list::printable(change.value().trim_end()));
    }
}
