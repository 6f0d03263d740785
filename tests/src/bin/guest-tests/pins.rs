// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pins are bounded, and go home for others.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pinion_client::{Atomics, Gpu, PageState};
use pinion_tests::{Failure, Mapping};

use crate::observing::{Mount, number, row};
use crate::support::{PASSED, Test, TestResult, add, ensure, ensure_eq, execute_ok, open, soon, tests};
use crate::vram::pages_in;

tests! { memory_pressure_takes_pins_back }

/// These want a low limit (parameter `pins`), and run only when they are asked for by name.
pub(crate) const FEW: &[Test] = &[
    ("few_pins_are_enough_for_many_pages", many_pages),
    ("few_pins_are_enough_for_two_processes", two_files),
];

/// So many pages, each with its number at its beginning and its end.
fn numbered(pages: usize) -> Result<Mapping, Failure> {
    let memory = Mapping::anonymous(pages)?;
    for page in 0..pages {
        memory.atomic(page * 4096).store(page as u64, Ordering::Relaxed);
        memory
            .atomic(page * 4096 + 4088)
            .store(!(page as u64), Ordering::Relaxed);
    }
    Ok(memory)
}

/// Whether all pages hold what they had, and what was added at their beginnings.
fn check(memory: &Mapping, added: u64) -> Result<(), Failure> {
    for page in 0..memory.pages() {
        let found = [0, 4088].map(|offset| memory.atomic(page * 4096 + offset).load(Ordering::Relaxed));
        ensure_eq!(found, [page as u64 + added, !(page as u64)], "page {page}");
    }
    Ok(())
}

/// Has the GPU add one at the beginning of each page, which it pins for that.
fn add_everywhere(gpu: &Gpu, memory: &Mapping) -> Result<(), Failure> {
    let pages = u32::try_from(memory.pages())?;
    execute_ok(gpu, &[add(memory, 1).repeat(pages).stride(4096)])
}

fn state(debugfs: &Path, column: &str) -> Result<u64, Failure> {
    Ok(number(&row(&debugfs.join("pinion0/pins"), 0)?, column)?.try_into()?)
}

fn memory_pressure_takes_pins_back() -> TestResult {
    const PAGES: usize = 64;
    let mount = Mount::new("debugfs")?;
    let gpu = open()?;
    let memory = numbered(PAGES)?;
    gpu.advise_atomics(memory.as_ptr(), memory.len(), Atomics::Pin)?;
    for round in 1..=3 {
        let before = state(&mount.0, "returned")?;
        add_everywhere(&gpu, &memory)?;
        ensure_eq!(pages_in(&gpu, &memory, PageState::Pinned)?, PAGES, "pinned pages");
        // Has all shrinkers give back what they can.
        fs::write("/proc/sys/vm/drop_caches", "2")?;
        let limit = Instant::now() + soon();
        loop {
            // They are counted when the last one is home.
            let pinned = pages_in(&gpu, &memory, PageState::Pinned)?;
            let returned = state(&mount.0, "returned")? - before;
            if pinned == 0 && returned >= PAGES as u64 {
                break;
            }
            ensure!(
                Instant::now() < limit,
                "{:?} after the kernel has asked for pins {pinned} are there, and {returned} were given back",
                soon()
            );
        }
        check(&memory, round)?;
    }
    PASSED
}

/// The limit, which must be a low one.
fn low_limit(debugfs: &Path) -> Result<u64, Failure> {
    let limit = state(debugfs, "limit")?;
    ensure!(
        limit <= 64,
        "the limit is {limit}, which is not what this test is about"
    );
    Ok(limit)
}

fn many_pages() -> TestResult {
    let mount = Mount::new("debugfs")?;
    let limit = low_limit(&mount.0)?;
    let gpu = open()?;
    let memory = numbered(8 * limit as usize)?;
    gpu.advise_atomics(memory.as_ptr(), memory.len(), Atomics::Pin)?;
    for round in 1..=3 {
        let before = state(&mount.0, "given-up")?;
        add_everywhere(&gpu, &memory)?;
        let pinned = pages_in(&gpu, &memory, PageState::Pinned)? as u64;
        ensure!(
            pinned > 0 && pinned <= limit,
            "{pinned} pages are pinned in round {round}"
        );
        let given_up = state(&mount.0, "given-up")? - before;
        ensure!(
            given_up >= 6 * limit,
            "{given_up} pages were given up in round {round}"
        );
        check(&memory, round)?;
    }
    PASSED
}

fn two_files() -> TestResult {
    let mount = Mount::new("debugfs")?;
    let limit = low_limit(&mount.0)?;
    let gpus = [open()?, open()?];
    let memories = [numbered(limit as usize)?, numbered(limit as usize)?];
    for round in 1..=4 {
        for (gpu, memory) in gpus.iter().zip(&memories) {
            add_everywhere(gpu, memory)?;
            ensure!(
                state(&mount.0, "pinned")? <= limit,
                "too many pages in round {round}"
            );
        }
    }
    for memory in &memories {
        check(memory, 4)?;
    }
    PASSED
}
