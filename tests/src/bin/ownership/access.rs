// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Accesses of the CPU and of the GPU, to one page of the memory.

use std::sync::atomic::Ordering;

use pinion_client::{Command, PAGE_SIZE};
use pinion_tests::work::execute_ok;
use pinion_tests::{Failure, ensure_eq};

use crate::cell::{Body, Cell, ELSEWHERE, Outcome, anonymous, compare};

pub(crate) const EVENTS: &[(&str, Body)] = &[
    ("cpu-read", cpu_read),
    ("cpu-write", cpu_write),
    ("cpu-atomic", cpu_atomic),
    ("gpu-read", gpu_read),
    ("gpu-write", gpu_write),
    ("gpu-atomic", gpu_atomic),
];

fn cpu_read(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let found = subject.memory.atomic(subject.target()).load(Ordering::Relaxed);
    ensure_eq!(found, *subject.number(), "what the CPU reads");
    subject.finish()
}

fn cpu_write(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    subject
        .memory
        .atomic(subject.target())
        .store(77, Ordering::Relaxed);
    *subject.number() = 77;
    subject.finish()
}

fn cpu_atomic(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let found = subject
        .memory
        .atomic(subject.target())
        .fetch_add(77, Ordering::Relaxed);
    let number = subject.number();
    ensure_eq!(found, *number, "what the CPU finds");
    *number = number.wrapping_add(77);
    subject.finish()
}

fn gpu_read(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    let copy = anonymous(ELSEWHERE, 1)?;
    let start = subject.target();
    let read = Command::copy(subject.memory.at(start), copy.as_ptr(), PAGE_SIZE);
    execute_ok(subject.gpu(), &[read])?;
    let expected = &subject.expected[start / 8..(start + PAGE_SIZE) / 8];
    compare(&copy.words(), expected, "the GPU")?;
    subject.finish()
}

fn gpu_write(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    execute_ok(subject.gpu(), &[Command::fill(subject.pointer(), 1, 78)])?;
    *subject.number() = 78;
    subject.finish()
}

fn gpu_atomic(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    execute_ok(subject.gpu(), &[Command::atomic_add(subject.pointer(), 79)])?;
    let number = subject.number();
    *number = number.wrapping_add(79);
    subject.finish()
}
