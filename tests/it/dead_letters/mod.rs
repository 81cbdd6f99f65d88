//! Operating dead letters.

mod commands;
mod edit;
mod export;
mod replay;
