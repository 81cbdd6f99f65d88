//! Tells the program which commit it is made of, for `--version` and the metrics.
//!
//! `CLOSE_SYNC_COMMIT` says so where there is no git, in an image say; else git does, with `-dirty` for changes that are
//! in no commit. A build is never refused for want of either. Debug builds only say that they are some: otherwise each
//! commit would build everything anew.

#![expect(clippy::disallowed_methods, reason = "how cargo talks to a build script")]

use std::path::Path;
use std::process::Command;

const COMMIT: &str = "CLOSE_SYNC_COMMIT";

fn main() {
    println!("cargo::rerun-if-env-changed={COMMIT}");
    let given = std::env::var(COMMIT).ok().filter(|commit| !commit.is_empty());
    let is_debug = std::env::var("PROFILE").is_ok_and(|profile| profile == "debug");
    let commit = given.or_else(|| if is_debug { Some("debug".to_owned()) } else { ask_git() });
    println!("cargo::rustc-env={COMMIT}={}", commit.as_deref().unwrap_or("unknown"));
}

fn ask_git() -> Option<String> {
    // What makes the answer another one: a commit, a checkout, a change.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    for path in [log.as_str(), "src", "Cargo.toml", "Cargo.lock"] {
        // One that is missing would run this each time.
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
