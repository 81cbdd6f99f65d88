//! Tests of the commands and their settings.

mod check;
mod destinations;
mod plan;
mod publish;
mod systemd;
mod untrusted_text;
