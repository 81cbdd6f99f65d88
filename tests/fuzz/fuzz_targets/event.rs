//! The entry point for libFuzzer.

#![no_main]

#[path = "../target.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::decode_and_map(bytes));
