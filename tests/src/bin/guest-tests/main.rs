// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the driver, for the guest. Output is KTAP.
//!
//! Each test runs in a process of its own, since it may crash, hang, or have the kernel kill it. A test that takes
//! too long fails and is left behind.

mod access;
mod aperture;
mod commands;
mod interface;
mod kinds;
mod lifetime;
mod meanwhile;
mod observing;
mod ownership;
mod pins;
mod several;
mod submitting;
mod support;
mod vram;

use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Outcome, Test};

/// Longest time that a test may take, where nothing slows it down.
const LIMIT: Duration = Duration::from_secs(100);

/// The exit status of a test that was skipped (as in the kernel's selftests).
const SKIPPED: u8 = 4;

/// The environment variable that names the test which this process is to run.
const SELECTED: &str = "PINION_TEST";

fn all() -> Vec<Test> {
    [
        interface::TESTS,
        submitting::TESTS,
        commands::TESTS,
        access::TESTS,
        ownership::TESTS,
        pins::TESTS,
        vram::TESTS,
        kinds::TESTS,
        meanwhile::TESTS,
        lifetime::TESTS,
        observing::TESTS,
    ]
    .concat()
}

/// Those that run only when they are asked for.
fn on_request() -> Vec<Test> {
    [vram::FILLING, several::TESTS, aperture::TESTS, pins::FEW].concat()
}

/// Runs a test in this process.
fn run_here(name: &str) -> ExitCode {
    let Some((_, body)) = all().into_iter().chain(on_request()).find(|test| test.0 == name) else {
        eprintln!("there is no test '{name}'");
        return ExitCode::FAILURE;
    };
    match body() {
        Ok(Outcome::Passed) => ExitCode::SUCCESS,
        Ok(Outcome::Skipped(reason)) => {
            eprintln!("{reason}");
            ExitCode::from(SKIPPED)
        }
        Err(error) => {
            eprintln!("{}", pinion_tests::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// How a test ended that ran in another process.
enum End {
    Passed,
    Skipped,
    Failed(String),
}

/// Runs a test in another process. What it says goes to the output at once.
fn run_apart(name: &str) -> std::io::Result<End> {
    let mut child = Command::new(std::env::current_exe()?)
        .env(SELECTED, name)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let (said_all, all_said) = mpsc::channel::<()>();
    if let Some(stderr) = child.stderr.take() {
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                println!("# {line}");
            }
            drop(said_all);
        });
    }
    let (sender, receiver) = mpsc::channel();
    let pid = child.id();
    thread::spawn(move || sender.send(child.wait()));
    let limit = pinion_tests::patiently(LIMIT);
    let Ok(status) = receiver.recv_timeout(limit) else {
        if let Ok(wait) = std::fs::read_to_string(format!("/proc/{pid}/stack")) {
            println!("# {}", wait.trim().replace('\n', "\n# "));
        }
        // SAFETY: It has not been reaped, so the number is still its own.
        unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        return Ok(End::Failed(format!("it was not done after {limit:?}")));
    };
    // Not for long: what a test has left behind may still have its output open.
    let _ = all_said.recv_timeout(Duration::from_millis(500));
    let status = status?;
    Ok(match status.code() {
        Some(0) => End::Passed,
        Some(code) if code == i32::from(SKIPPED) => End::Skipped,
        _ => End::Failed(status.to_string()),
    })
}

fn main() -> ExitCode {
    if let Ok(descriptor) = std::env::var(lifetime::INHERITED) {
        return match lifetime::inherited(&descriptor) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    if let Ok(name) = std::env::var(SELECTED) {
        return run_here(&name);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument.starts_with('-')) {
        println!(
            "Usage: guest-tests [TEXT]...\n\nRuns the tests that have one of the texts in their name, or all:"
        );
        for (name, _) in all() {
            println!("  {name}");
        }
        println!("\nand, only when asked for:");
        for (name, _) in on_request() {
            println!("  {name}");
        }
        return ExitCode::SUCCESS;
    }
    let named = |(name, _): &Test| arguments.iter().any(|text| name.contains(text.as_str()));
    let selected: Vec<_> = if arguments.is_empty() {
        all()
    } else {
        all().into_iter().chain(on_request()).filter(named).collect()
    };
    if selected.is_empty() {
        eprintln!("no test has any of these in its name: {}", arguments.join(" "));
        return ExitCode::FAILURE;
    }

    println!("KTAP version 1\n1..{}", selected.len());
    let mut failures = 0;
    for (number, (name, _)) in (1..).zip(selected) {
        let started = Instant::now();
        let end = run_apart(name).unwrap_or_else(|error| End::Failed(error.to_string()));
        let took = started.elapsed().as_millis();
        match end {
            End::Passed => println!("ok {number} {name} # {took} ms"),
            End::Skipped => println!("ok {number} {name} # SKIP"),
            End::Failed(why) => {
                failures += 1;
                println!("not ok {number} {name} # {took} ms, {why}");
            }
        }
    }
    if failures == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
