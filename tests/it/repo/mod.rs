//! What the repository says about the program.

pub(crate) mod contract;
mod deploy;
mod docs;
mod pages;
