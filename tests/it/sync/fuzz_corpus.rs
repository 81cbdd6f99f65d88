//! Runs the fuzz target of `tests/fuzz` on its saved corpus, the recorded payloads, and mutations of both.

#[path = "../../fuzz/target.rs"]
mod target;

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;

use target::decode_and_map;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    files
}

fn seeds() -> Vec<Vec<u8>> {
    let corpus = files("tests/fuzz/corpus/event").into_iter().map(|file| std::fs::read(file).unwrap());
    let payloads =
        files("tests/payloads").into_iter().filter(|file| file.extension().is_some_and(|e| e == "ndjson"));
    let lines = payloads.flat_map(|file| {
        let text = std::fs::read(file).unwrap();
        text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>()
    });
    corpus.chain(lines).filter(|seed| !seed.is_empty()).collect()
}

#[test]
fn the_saved_corpus_and_the_recorded_payloads_pass() {
    let seeds = seeds();
    assert!(seeds.len() > 100, "{} seeds", seeds.len());
    for seed in &seeds {
        decode_and_map(seed);
    }
}

/// A change to bytes.
#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Cut(Index, Index),
    /// A piece of another seed.
    Insert(Index, Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (index(), index()).prop_map(|(from, to)| Change::Cut(from, to)),
        (index(), index(), index(), index())
            .prop_map(|(at, seed, from, to)| Change::Insert(at, seed, from, to)),
    ]
}

fn span(len: usize, one: Index, other: Index) -> std::ops::Range<usize> {
    let (one, other) = (one.index(len + 1), other.index(len + 1));
    one.min(other)..one.max(other)
}

#[test]
fn mutated_inputs_pass() {
    let seeds = seeds();
    let input = (any::<Index>(), proptest::collection::vec(change(), 1..6));
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) };
    proptest!(config, |((seed, changes) in input)| {
        let mut bytes = seeds[seed.index(seeds.len())].clone();
        for change in changes {
            match change {
                Change::Set(at, byte) if !bytes.is_empty() => {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
                Change::Set(_, byte) => bytes.push(byte),
                Change::Cut(from, to) => drop(bytes.drain(span(bytes.len(), from, to))),
                Change::Insert(at, seed, from, to) => {
                    let other = &seeds[seed.index(seeds.len())];
                    let piece = other[span(other.len(), from, to)].to_vec();
                    let at = at.index(bytes.len() + 1);
                    bytes.splice(at..at, piece);
                }
            }
        }
        decode_and_map(&bytes);
    });
}
