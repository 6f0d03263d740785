// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the device makes of arbitrary bytes.
//!
//! A *target* is a function of some bytes that panics if the device does something that it must not do. It is the
//! same function whoever calls it:
//!
//! - `cargo fuzz run TARGET` (in this directory; it finds new inputs by looking at which code they reach),
//! - `cargo test -p pinion-fuzz` (the inputs in `corpus/`, and a fixed number of mutations of them),
//! - `cargo run --release -p pinion-fuzz -- TARGET SECONDS` (random mutations of the corpus, without `cargo fuzz`).

pub mod core;
pub mod daemon;
pub mod decoders;
pub mod mutate;
pub mod shape;

use std::io::Write;
use std::path::PathBuf;

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// What it does with some bytes.
    pub run: fn(&[u8]),
    /// Most bytes that make sense.
    pub most: usize,
    /// How many mutations the tests try.
    pub tries: u64,
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "requests",
        run: decoders::requests,
        most: 256,
        tries: 200_000,
    },
    Target {
        name: "submissions",
        run: decoders::submissions,
        most: 512,
        tries: 200_000,
    },
    Target {
        name: "injections",
        run: decoders::injections,
        most: 64,
        tries: 100_000,
    },
    Target {
        name: "control",
        run: decoders::control,
        most: 512,
        tries: 50_000,
    },
    Target {
        name: "core",
        run: core::run,
        most: 1024,
        tries: 1500,
    },
    Target {
        name: "daemon",
        run: daemon::run,
        most: 1024,
        tries: 400,
    },
];

/// The target called `name`.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Runs a target.
pub fn run(name: &str, data: &[u8]) {
    end_with_any_thread();
    match target(name) {
        Some(target) => (target.run)(data),
        None => panic!("there is no target {name}"),
    }
}

/// From now on the whole process ends when any of its threads panics: those of the device are not joined by anybody
/// who would tell.
pub fn end_with_any_thread() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(move |panic| {
            let trace = std::backtrace::Backtrace::force_capture();
            // Past the test harness, which would keep it for an end that does not come.
            let _ = writeln!(std::io::stderr(), "{panic}\n{trace}");
            std::process::abort();
        }));
    });
}

/// The inputs that are kept for a target, sorted by name.
pub fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let Ok(entries) = std::fs::read_dir(&directory) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let read = |path: PathBuf| std::fs::read(&path).ok().map(|bytes| (path, bytes));
    paths.into_iter().filter_map(read).collect()
}
