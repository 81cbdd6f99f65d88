//! What becomes of messages in Close.

mod calls;
mod careless_producers;
mod close_answers;
mod duplicates;
mod failures;
mod fault_table;
mod foreign_answers;
mod fuzz_corpus;
mod invalid_ids;
mod matching_rules;
mod memory;
mod ordering;
mod pauses;
mod rate_limits;
mod read_back;
mod scenarios;
mod schema_changes;
mod sdk_payloads;
mod stale_reads;
mod waits;
