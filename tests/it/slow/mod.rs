//! The slow tier: tests that start brokers or a browser of their own, or put load on the machine for a while.
//! `tests/run` leaves them out, `tests/run --all` and `.ci/run` do not.

mod browser;
mod cluster;
mod soak;
