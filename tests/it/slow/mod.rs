//! The slow tests: they need a cluster or a browser, or load the machine for a while.
//!
//! `tests/run` runs `browser` and `takeover`, which are quick. `cluster` and `soak` run with `tests/run --all`, as in `.ci/run`.
//! A test that takes longer than about 15 seconds on an idle machine belongs in one of these two.

mod browser;
mod cluster;
mod soak;
mod takeover;
