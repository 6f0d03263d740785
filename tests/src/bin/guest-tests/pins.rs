// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pins are bounded, and go home for others.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pinion_client::{Atomics, Gpu, Location, PageState};
use pinion_tests::{Failure, Mapping};

use crate::observing::{Mount, number, row};
use crate::support::{PASSED, Test, TestResult, add, ensure, ensure_eq, execute_ok, open, soon, tests};
use crate::vram::{check as check_filling, fill, memory_of, pages_in};

tests! { memory_pressure_takes_pins_back two_mebibytes_are_pinned_at_once }

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

/// How much a counter of a queue has grown: the control queue is 0, the one for INVALIDATE 1.
fn queue(debugfs: &Path, index: usize, column: &str) -> Result<i64, Failure> {
    number(&row(&debugfs.join("pinion0/queues"), index)?, column)
}

/// 512 pages take one fault, one request to map with one REPLAY in one go, and home one INVALIDATE.
fn two_mebibytes_are_pinned_at_once() -> TestResult {
    const PAGES: usize = 512;
    let mount = Mount::new("debugfs")?;
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE] {
        let gpu = open()?;
        let memory = memory_of(1, advice)?;
        fill(&memory, 31);
        gpu.advise_atomics(memory.as_ptr(), memory.len(), Atomics::Pin)?;
        let (sent, kicks) = (queue(&mount.0, 0, "sent")?, queue(&mount.0, 0, "kicks")?);
        execute_ok(&gpu, &[add(&memory, 0).repeat(PAGES as u32).stride(4096)])?;
        let statistics = gpu.statistics()?;
        ensure_eq!(
            (statistics.faults, statistics.pins),
            (1, PAGES as u64),
            "faults and pins"
        );
        ensure_eq!(pages_in(&gpu, &memory, PageState::Pinned)?, PAGES, "pinned pages");
        // The driver may have asked just now whether the device lives.
        let sent = queue(&mount.0, 0, "sent")? - sent;
        ensure!((2..=3).contains(&sent), "{sent} requests were sent for a range");
        let kicks = queue(&mount.0, 0, "kicks")? - kicks;
        ensure!(
            (1..=2).contains(&kicks),
            "{kicks} times it was kicked for a range"
        );
        let invalidations = queue(&mount.0, 1, "sent")?;
        gpu.prefetch(memory.as_ptr(), memory.len(), Location::System)?;
        ensure_eq!(pages_in(&gpu, &memory, PageState::Pinned)?, 0, "pinned pages");
        ensure_eq!(
            queue(&mount.0, 1, "sent")? - invalidations,
            1,
            "INVALIDATEs for a range"
        );
        ensure_eq!(gpu.statistics()?.unpins, PAGES as u64, "pages that came home");
        check_filling(&memory, 31)?;
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
