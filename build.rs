//! Embeds the commit of the build, for `--version` and the metrics.
//!
//! The commit is the variable `CLOSE_SYNC_COMMIT` (for builds without git, of a container image for example), or else
//! the answer of git, with `-dirty` if there are uncommitted changes. Without either it is `unknown`. In builds with debug
//! assertions it is `debug`, because otherwise each commit would rebuild everything.

#![expect(clippy::disallowed_methods, reason = "cargo passes arguments to build scripts in variables")]

use std::path::Path;
use std::process::Command;

const COMMIT: &str = "CLOSE_SYNC_COMMIT";

fn main() {
    println!("cargo::rerun-if-env-changed={COMMIT}");
    let given = std::env::var(COMMIT).ok().filter(|commit| !commit.is_empty());
    let is_debug = std::env::var_os("CARGO_CFG_DEBUG_ASSERTIONS").is_some();
    let commit = given.or_else(|| if is_debug { Some("debug".to_owned()) } else { ask_git() });
    println!("cargo::rustc-env={COMMIT}={}", commit.as_deref().unwrap_or("unknown"));
}

fn ask_git() -> Option<String> {
    // The answer changes with a commit, a checkout or an edit.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    for path in [log.as_str(), "src", "Cargo.toml", "Cargo.lock"] {
        // A missing path would run this script at each build.
        if Path::new(path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output =
        Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}
