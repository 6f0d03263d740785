// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A short run of every target: the corpus, and mutations of it, the same ones each time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pinion_fuzz::{Target, corpus, end_with_any_thread, mutate, target};

/// Enough of a slow machine's time.
const ENOUGH: Duration = Duration::from_secs(20);
/// No input takes that long.
const TOO_LONG: Duration = Duration::from_secs(60);

/// Runs the target with `data`, and ends the test if it does not come back.
fn run(target: &Target, data: &[u8], what: &str) {
    let done = std::sync::Arc::new(AtomicBool::new(false));
    let guard = {
        let done = done.clone();
        let (name, what, data) = (target.name, what.to_owned(), data.to_vec());
        std::thread::spawn(move || {
            let start = Instant::now();
            while !done.load(Ordering::Relaxed) {
                assert!(
                    start.elapsed() < TOO_LONG,
                    "{name}: {what} takes too long: {data:02x?}"
                );
                std::thread::park_timeout(Duration::from_secs(1));
            }
        })
    };
    (target.run)(data);
    done.store(true, Ordering::Relaxed);
    guard.thread().unpark();
    guard.join().unwrap();
}

fn short_run(name: &str) {
    end_with_any_thread();
    let target = target(name).unwrap();
    let inputs = corpus(target);
    assert!(!inputs.is_empty(), "{name} has no corpus");
    for (path, data) in &inputs {
        run(target, data, &path.display().to_string());
    }
    let inputs: Vec<_> = inputs.into_iter().map(|(_, data)| data).collect();
    let start = Instant::now();
    mutate::explore(
        &inputs,
        target.most,
        0x7069_6e69_6f6e,
        target.tries,
        |number, data| {
            if target.tries < 10_000 {
                run(target, data, &format!("mutation {number}"));
            } else {
                // Too quick to be watched each.
                (target.run)(data);
            }
            start.elapsed() < ENOUGH
        },
    );
}

#[test]
fn requests() {
    short_run("requests");
}

#[test]
fn submissions() {
    short_run("submissions");
}

#[test]
fn injections() {
    short_run("injections");
}

#[test]
fn control() {
    short_run("control");
}

#[test]
fn core() {
    short_run("core");
}

#[test]
fn daemon() {
    short_run("daemon");
}
