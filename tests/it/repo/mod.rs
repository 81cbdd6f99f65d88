//! The documents and deployment files agree with the program.

pub(crate) mod contract;
mod deploy;
mod docs;
mod layout;
mod pages;
