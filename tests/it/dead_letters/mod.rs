//! `dlq`: operators list, edit, export, import, replay and discard dead letters.

mod commands;
mod edit;
mod encodings;
mod export;
mod replay;
