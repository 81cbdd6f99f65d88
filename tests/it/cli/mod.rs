//! Tests of the commands and their settings.

mod certify;
mod check;
mod destinations;
mod plan;
mod publish;
mod systemd;
mod triggers;
mod untrusted_text;
