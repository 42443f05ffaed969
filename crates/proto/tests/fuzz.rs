//! The fuzz target as a small test: the whole corpus, and a bounded number of mutations.
//!
//! `cargo xtask fuzz` sets the two variables read here, so that it runs for longer and from a seed of
//! its own. An input that breaks the wire is printed; put it into `fuzz/corpus` with the mending.

#[path = "../fuzz/body.rs"]
mod body;

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// Mutations of an ordinary run: about a second in a debug build.
const MUTATIONS: u64 = 20_000;

fn corpus() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut files: Vec<_> = std::fs::read_dir(&dir)
        .expect("the corpus is part of the repository")
        .map(|entry| entry.expect("readable").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "the corpus is part of the repository");
    files
        .iter()
        .map(|file| std::fs::read(file).expect("readable"))
        .collect()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: `{text}`")),
    )
}

fn check(input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| body::wire(input))).is_err() {
        let hex = input.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to memory");
            text
        });
        panic!("these bytes break the wire: {hex}");
    }
}

#[test]
#[expect(
    clippy::print_stdout,
    reason = "a person who fuzzes wants to know how much was tried"
)]
fn no_bytes_break_the_wire() {
    let corpus = corpus();
    for input in &corpus {
        check(input);
    }
    let limit = number("SMOLVM_FUZZ_SECONDS").map(Duration::from_secs);
    let seed = number("SMOLVM_FUZZ_SEED").unwrap_or(1);
    let (mut mutator, begin, mut done) = (body::Mutator::new(seed), Instant::now(), 0u64);
    while limit.map_or(done < MUTATIONS, |limit| begin.elapsed() < limit) {
        check(&mutator.input(&corpus));
        done += 1;
    }
    println!(
        "{} inputs of the corpus, {done} mutations from seed {seed}",
        corpus.len()
    );
}
