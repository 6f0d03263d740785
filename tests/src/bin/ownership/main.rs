// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fills in the ownership matrix: brings memory into each state, has each event hit it, and looks at the data and at the state
//! afterwards. A line of JSON for each cell.
//!
//! Each cell has a process of its own, which may be killed or get stuck.

mod access;
mod cell;
mod devices;
mod end;
mod kernel;
mod machine;
mod mapping;
mod others;
mod reclaim;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pinion_tests::matrix::{Boot, EVENTS, End, Event, Line, Size, State};
use pinion_tests::process::{Child, pipe};
use pinion_tests::{DEVICE, Failure, patiently};

use crate::cell::{Body, Cell, Outcome};
use crate::machine::Machine;

/// Longest time that a cell may take, where nothing slows it down.
const LIMIT: Duration = Duration::from_secs(30);

/// What an event does.
fn body(event: &Event) -> Option<Body> {
    [
        access::EVENTS,
        mapping::EVENTS,
        reclaim::EVENTS,
        kernel::EVENTS,
        others::EVENTS,
        end::EVENTS,
        devices::EVENTS,
    ]
    .concat()
    .into_iter()
    .find_map(|(name, body)| (name == event.name).then_some(body))
}

/// The outcome of a cell, in this process.
fn end_of(cell: &Cell<'_>, event: &Event) -> End {
    let Some(body) = body(event) else {
        return End::Error("there is nothing that does this".to_owned());
    };
    match body(cell) {
        Ok(Outcome::Result(state)) => End::Result(state),
        Ok(Outcome::Blank(reason)) => End::Blank(reason),
        Err(error) => End::Error(pinion_tests::chain(&*error)),
    }
}

/// Tries a cell in another process.
fn try_apart(cell: &Cell<'_>, event: &Event) -> Result<End, Failure> {
    let (mut reader, mut writer) = pipe()?;
    let body = || {
        let end = end_of(cell, event);
        let said = serde_json::to_vec(&end).map(|text| writer.write_all(&text));
        i32::from(!matches!(said, Ok(Ok(()))))
    };
    // SAFETY: This program has one thread.
    let child = unsafe { Child::fork(body) }?;
    drop(writer);
    let pid = child.pid();
    let status = match child.wait_or_keep(patiently(LIMIT))? {
        Ok(status) => status,
        Err(child) => {
            let stack = std::fs::read_to_string(format!("/proc/{pid}/stack")).unwrap_or_default();
            child.kill();
            return Ok(End::Error(format!(
                "it was not done after {:?}; {}",
                patiently(LIMIT),
                stack.trim().replace('\n', ", ")
            )));
        }
    };
    read_end(&mut reader)
        .map_err(|error| format!("the process has ended with status {status}: {error}").into())
}

fn read_end(reader: &mut File) -> Result<End, Failure> {
    let mut text = Vec::new();
    reader.read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Has this process, and those that it forks, run on one processor: what the kernel has put off for a page (such as to put it on its
/// lists) it then does when the page is asked for, which it would not for what another processor has put off.
fn stay_on_one_processor() -> std::io::Result<()> {
    // SAFETY: A set of processors may be all zeros.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: There is always a first one, and room for it.
    unsafe { libc::CPU_SET(0, &mut set) };
    // SAFETY: The set is as long as it says.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn usage() -> ExitCode {
    println!(
        "Usage: ownership [--reset] [TEXT]...\n\nTries the cells of the matrix whose name, EVENT/STATE/SIZE, has one of the texts in it, or all:\n\
         those for a guest with two GPUs, or with --reset those for a GPU that somebody resets when this says \"ready\"."
    );
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    if let Ok(descriptor) = std::env::var(end::INHERITED) {
        return end::inherited(&descriptor);
    }
    let mut boot = Boot::Usual;
    let mut texts = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--reset" => boot = Boot::Reset,
            option if option.starts_with('-') => return usage(),
            _ => texts.push(argument),
        }
    }
    if let Err(error) = stay_on_one_processor() {
        eprintln!("ownership: cannot stay on one processor: {error}");
        return ExitCode::FAILURE;
    }
    let machine = Machine::new();
    let mut failed = false;
    for event in EVENTS.iter().filter(|event| event.boot == boot) {
        for state in State::ALL {
            for size in Size::ALL {
                let name = format!("{}/{}/{}", event.name, state.name(), size.name());
                if !texts.is_empty() && !texts.iter().any(|text| name.contains(text.as_str())) {
                    continue;
                }
                let cell = Cell {
                    state,
                    size,
                    machine: &machine,
                    device: DEVICE,
                };
                let started = Instant::now();
                let end = try_apart(&cell, event).unwrap_or_else(|error| End::Error(error.to_string()));
                failed |= matches!(end, End::Error(_));
                let line = Line {
                    event: event.name.to_owned(),
                    state,
                    size,
                    end,
                    milliseconds: started.elapsed().as_millis() as u64,
                };
                match serde_json::to_string(&line) {
                    Ok(text) => println!("{text}"),
                    Err(error) => {
                        eprintln!("{name}: {error}");
                        failed = true;
                    }
                }
            }
        }
    }
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
