// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The beginning and the end of things: files, processes, the module.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::time::{Duration, Instant};

use pinion_client::Command;
use pinion_tests::{Failure, Mapping, module, patiently};

use crate::support::{
    Outcome, PASSED, TestResult, add, ensure, ensure_eq, execute_ok, fork, join, long_work, meminfo, open,
    page_with, pin, submit, tests, value,
};

tests! {
    opened_and_closed_many_times
    opened_many_times_at_once
    closed_with_work_queued
    closed_with_a_fault_outstanding
    killed_with_work_queued
    killed_with_pages_pinned_leaks_nothing
    exec_leaves_the_address_space_behind
    the_module_stays_while_it_is_used_and_can_be_loaded_again
}

fn opened_and_closed_many_times() -> TestResult {
    let memory = page_with(0)?;
    for round in 1..=60 {
        let gpu = open()?;
        execute_ok(&gpu, &[add(&memory, 1)])?;
        if round % 10 == 0 {
            ensure_eq!(value(&memory), round, "the number");
        }
    }
    PASSED
}

/// As many as the device has contexts for, at least some; then an error; then they can be opened again.
fn opened_many_times_at_once() -> TestResult {
    let memory = page_with(0)?;
    for _ in 0..2 {
        let mut gpus = Vec::new();
        let error = loop {
            match pinion_client::Gpu::open(pinion_tests::DEVICE) {
                Ok(gpu) => gpus.push(gpu),
                Err(error) => break Some(error),
            }
            if gpus.len() == 100 {
                break None;
            }
        };
        ensure!(gpus.len() >= 8, "only {} could be opened: {error:?}", gpus.len());
        execute_ok(&gpus[0], &[add(&memory, 1)])?;
        execute_ok(&gpus[gpus.len() - 1], &[add(&memory, 1)])?;
    }
    ensure_eq!(value(&memory), 4, "the number");
    PASSED
}

fn closed_with_work_queued() -> TestResult {
    let memory = page_with(0)?;
    for _ in 0..10 {
        let gpu = open()?;
        for _ in 0..3 {
            submit(&gpu, &long_work(&memory))?;
        }
        std::thread::sleep(Duration::from_millis(5));
        let started = Instant::now();
        drop(gpu);
        ensure!(
            started.elapsed() < patiently(Duration::from_secs(5)),
            "closing has taken {:?}",
            started.elapsed()
        );
    }
    // The GPU has let go of the page, and can be used.
    let before = value(&memory);
    std::thread::sleep(Duration::from_millis(20));
    ensure_eq!(value(&memory), before, "the number, after all was closed");
    execute_ok(&open()?, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), before + 1, "the number");
    PASSED
}

fn closed_with_a_fault_outstanding() -> TestResult {
    for pages in [1, 64] {
        for _ in 0..30 {
            let gpu = open()?;
            let memory = Mapping::anonymous(pages)?;
            submit(
                &gpu,
                &[Command::atomic_add(memory.as_ptr().cast::<u64>(), 1)
                    .repeat(pages as u32)
                    .stride(4096)],
            )?;
            drop(gpu);
        }
    }
    PASSED
}

/// A child that does `body`, says so, and then waits for its end.
fn child_that(body: impl FnOnce() -> Result<(), Failure>) -> Result<pinion_tests::process::Child, Failure> {
    let (mut reader, mut writer) = pinion_tests::process::pipe()?;
    let child = fork(|| {
        body()?;
        writer.write_all(&[1])?;
        std::thread::sleep(Duration::from_secs(60));
        Ok(())
    })?;
    drop(writer);
    reader
        .read_exact(&mut [0])
        .map_err(|error| format!("the child has ended too early: {error}"))?;
    Ok(child)
}

fn kill(child: pinion_tests::process::Child) -> Result<(), Failure> {
    child.kill();
    ensure_eq!(
        child.wait(patiently(Duration::from_secs(15)))?,
        -libc::SIGKILL,
        "status of the child"
    );
    Ok(())
}

fn killed_with_work_queued() -> TestResult {
    for _ in 0..10 {
        let child = child_that(|| {
            let gpu = open()?;
            let memory = page_with(0)?;
            for _ in 0..4 {
                submit(&gpu, &long_work(&memory))?;
            }
            std::mem::forget((gpu, memory));
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(10));
        kill(child)?;
    }
    let memory = page_with(5)?;
    let gpu = open()?;
    pin(&gpu, &memory, 1)?;
    ensure_eq!(value(&memory), 6, "the number");
    PASSED
}

fn killed_with_pages_pinned_leaks_nothing() -> TestResult {
    const PAGES: usize = 128;
    let round = || -> Result<(), Failure> {
        let child = child_that(|| {
            let gpu = open()?;
            let memory = Mapping::anonymous(PAGES)?;
            let command = Command::atomic_add(memory.as_ptr().cast::<u64>(), 1);
            execute_ok(&gpu, &[command.repeat(PAGES as u32).stride(4096)])?;
            std::mem::forget((gpu, memory));
            Ok(())
        })?;
        kill(child)
    };
    // What is free also changes for other reasons, but not by more each time.
    let mut spans = Vec::new();
    round()?;
    for _ in 0..3 {
        let free = meminfo("MemFree")?;
        for _ in 0..3 {
            round()?;
        }
        std::thread::sleep(Duration::from_millis(100));
        spans.push(free - meminfo("MemFree")?);
    }
    let pinned = (3 * PAGES * 4) as i64;
    ensure!(
        spans.iter().any(|lost| *lost < pinned / 2),
        "of {pinned} KiB pinned each time, {spans:?} KiB are gone"
    );
    PASSED
}

/// Names the descriptor of an open GPU for a program that is executed with it.
pub(crate) const INHERITED: &str = "PINION_TESTS_INHERITED";

/// A file survives `exec`, if it is not marked otherwise, but its address space was that of the program before.
fn exec_leaves_the_address_space_behind() -> TestResult {
    let child = fork(|| {
        let gpu = open()?;
        let memory = page_with(5)?;
        pin(&gpu, &memory, 1)?;
        let descriptor = gpu.as_fd().as_raw_fd();
        // SAFETY: It changes a flag of a descriptor that is open.
        ensure_eq!(unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) }, 0, "fcntl");
        let error = std::process::Command::new(std::env::current_exe()?)
            .env(INHERITED, descriptor.to_string())
            .exec();
        Err(error.into())
    })?;
    ensure_eq!(
        child.wait(patiently(Duration::from_secs(15)))?,
        0,
        "status of the program"
    );
    PASSED
}

/// What that program does: the inherited file is of no use to it, a new one is.
pub(crate) fn inherited(descriptor: &str) -> Result<(), Failure> {
    let descriptor: i32 = descriptor.parse()?;
    // PINION_IOCTL_QUERY: _IOWR(0xB9, 4, struct pinion_query)
    let request = (3 << 30) | (32 << 16) | (0xB9 << 8) | 4;
    let mut query = [32_u32, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: The structure is as long as it says.
    let status = unsafe { libc::ioctl(descriptor, request, query.as_mut_ptr()) };
    let error = std::io::Error::last_os_error();
    ensure_eq!((status, error.raw_os_error()), (-1, Some(libc::EPERM)), "{error}");
    let memory = page_with(5)?;
    pin(&open()?, &memory, 1)?;
    ensure_eq!(value(&memory), 6, "the number");
    Ok(())
}

fn the_module_stays_while_it_is_used_and_can_be_loaded_again() -> TestResult {
    let Ok(file) = File::open(module::FILE) else {
        return Ok(Outcome::Skipped(format!(
            "there is no {} to load again",
            module::FILE
        )));
    };
    for round in 0..3 {
        let gpu = open()?;
        let memory = page_with(5)?;
        pin(&gpu, &memory, 1)?;
        let refused = module::unload().err().and_then(|error| error.raw_os_error());
        ensure!(
            [Some(libc::EBUSY), Some(libc::EAGAIN)].contains(&refused),
            "while it is used: {refused:?}"
        );
        ensure_eq!(value(&memory), 6, "the number");
        drop(gpu);
        module::unload().map_err(|error| format!("unloading it in round {round}: {error}"))?;
        ensure!(
            !std::path::Path::new(pinion_tests::DEVICE).exists(),
            "the device file is still there"
        );
        module::load(&file).map_err(|error| format!("loading it in round {round}: {error}"))?;
        let deadline = Instant::now() + patiently(Duration::from_secs(5));
        while !std::path::Path::new(pinion_tests::DEVICE).exists() {
            ensure!(Instant::now() < deadline, "the device file has not come back");
            std::thread::sleep(Duration::from_millis(10));
        }
        execute_ok(&open()?, &[add(&memory, 1)])?;
        ensure_eq!(value(&memory), 7, "the number");
    }
    // A child that still has the file keeps the module, too.
    let gpu = open()?;
    let child = child_that(|| Ok(()))?;
    drop(gpu);
    let refused = module::unload().err().and_then(|error| error.raw_os_error());
    ensure!(
        [Some(libc::EBUSY), Some(libc::EAGAIN)].contains(&refused),
        "while a child has the file: {refused:?}"
    );
    kill(child)?;
    let memory = page_with(1)?;
    let child = fork(|| execute_ok(&open()?, &[add(&memory, 1)]))?;
    join(child).map(|()| Outcome::Passed)
}
