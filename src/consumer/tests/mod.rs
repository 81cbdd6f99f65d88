//! The real loop, over a broker and a Close in memory and in virtual time.

mod harness;
mod journal;
mod pauses;
mod scheduling;
mod session;
mod settle;
mod state;
