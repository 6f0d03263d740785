// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs a target with random mutations of its corpus: `pinion-fuzz TARGET SECONDS [SEED]`, or with one file:
//! `pinion-fuzz TARGET FILE`.
//!
//! The input is kept in a file while it is tried, and its name is said at the end if that was not reached.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pinion_fuzz::{corpus, mutate, run, target};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (Some(target), Some(what)) = (arguments.first().and_then(|name| target(name)), arguments.get(1))
    else {
        eprintln!("usage: pinion-fuzz TARGET SECONDS [SEED], or pinion-fuzz TARGET FILE");
        return ExitCode::FAILURE;
    };
    let Ok(seconds) = what.parse() else {
        match std::fs::read(Path::new(what)) {
            Ok(data) => run(target.name, &data),
            Err(error) => eprintln!("{what}: {error}"),
        }
        return ExitCode::SUCCESS;
    };
    let seed = arguments.get(2).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let inputs: Vec<_> = corpus(target).into_iter().map(|(_, bytes)| bytes).collect();
    let file = std::env::temp_dir().join(format!("pinion-fuzz-{}-{}", target.name, std::process::id()));
    eprintln!(
        "{}: {} inputs, each kept in {} while it is tried",
        target.name,
        inputs.len(),
        file.display()
    );
    let start = Instant::now();
    let mut count = 0;
    mutate::explore(&inputs, target.most, seed, u64::MAX, |_, data| {
        if let Err(error) = std::fs::write(&file, data) {
            eprintln!("{}: {error}", file.display());
            return false;
        }
        run(target.name, data);
        count += 1;
        start.elapsed() < Duration::from_secs(seconds)
    });
    eprintln!("{}: {count} inputs in {:?}", target.name, start.elapsed());
    let _ = std::fs::remove_file(&file);
    ExitCode::SUCCESS
}
