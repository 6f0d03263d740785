// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of the process in VRAM: how it gets there, how it gets home, and what is in it on the way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pinion_client::{Atomics, Command, Gpu, Location, PageState, Status};
use pinion_tests::smaps::kilobytes;
use pinion_tests::{Failure, Mapping, module, repeatedly};

use crate::support::{
    Outcome, PASSED, TestResult, add, ensure, ensure_eq, execute, execute_ok, fork, join, meminfo, open,
    page_with, soon, submit, tests, value,
};

tests! {
    moved_to_vram_by_an_access
    moved_to_vram_ahead_of_use
    written_in_vram
    vram_that_was_never_touched_reads_as_zero
    vram_of_another_process_is_cleared
    a_huge_page_moves_as_one
    a_huge_page_comes_home_as_one
    a_huge_page_in_vram_is_split
    small_pages_move_together
    a_cpu_that_goes_on_gets_the_rest
    in_vram_then_unmapped_in_part
    in_vram_then_dropped
    discarded_in_vram
    discarded_in_vram_then_written
    discarded_in_vram_but_shared_with_a_child
    prefetched_to_system_memory
    in_vram_then_moved
    in_vram_then_moved_and_left_by_the_driver
    in_vram_then_write_protected
    in_vram_then_forked_child_first
    in_vram_then_forked_parent_first
    in_vram_then_forked_gpu_first
    in_vram_then_read_by_the_kernel
    in_vram_then_mlocked
    in_vram_then_closed
    in_vram_and_pinned
    in_vram_for_two_files
    files_stay_where_they_are
    atomic_operations_in_vram
    atomic_operations_in_vram_under_contention
    atomic_operations_on_exclusive_pages
    atomic_operations_on_an_exclusive_page_under_contention
    vram_accounting_is_the_same_after_a_round_trip
    munmap_while_moving
}

/// Those that fill VRAM, and more than that. They want it small, and run only when they are asked for by name.
pub(crate) const FILLING: &[crate::support::Test] = &[
    (
        "small_vram_is_free_after_processes_were_killed",
        vram_is_free_after_processes_were_killed,
    ),
    ("small_vram_holds_four_times_as_much", more_than_vram_can_hold),
    (
        "small_vram_does_not_copy_what_is_discarded",
        evicted_after_it_was_discarded,
    ),
    (
        "small_vram_holds_four_times_as_much_for_two_processes",
        more_than_vram_can_hold_for_two_processes,
    ),
];

/// Bytes of a huge page.
pub(crate) const HUGE: usize = 2 << 20;
/// Says where all of the memory had better be.
pub(crate) fn prefer(gpu: &Gpu, memory: &Mapping, place: Location) -> Result<(), Failure> {
    Ok(gpu.advise_location(memory.as_ptr(), memory.len(), place)?)
}

/// Brings all of the memory there.
pub(crate) fn prefetch(gpu: &Gpu, memory: &Mapping, place: Location) -> Result<(), Failure> {
    Ok(gpu.prefetch(memory.as_ptr(), memory.len(), place)?)
}

/// Says how the GPU gets exclusive access to all of the memory.
fn atomics(gpu: &Gpu, memory: &Mapping, how: Atomics) -> Result<(), Failure> {
    Ok(gpu.advise_atomics(memory.as_ptr(), memory.len(), how)?)
}

/// How many pages of the memory are in a state.
pub(crate) fn pages_in(gpu: &Gpu, memory: &Mapping, state: PageState) -> Result<usize, Failure> {
    let pages = gpu.query(memory.as_ptr(), memory.len())?;
    Ok(pages.iter().filter(|page| page.state == state).count())
}

/// How many pages of the memory are in VRAM.
fn pages_in_vram(gpu: &Gpu, memory: &Mapping) -> Result<usize, Failure> {
    pages_in(gpu, memory, PageState::Vram)
}

/// The word of the pattern with that index.
pub(crate) fn pattern(seed: u64, word: usize) -> u64 {
    (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed
}

/// Memory in huge pages or small ones, aligned, with that many huge pages' worth.
pub(crate) fn memory_of(count: usize, advice: i32) -> Result<Mapping, Failure> {
    let anywhere = Mapping::anonymous((count + 1) * HUGE / 4096)?;
    let start = anywhere.as_ptr().addr().next_multiple_of(HUGE);
    drop(anywhere);
    let memory = Mapping::new(
        Some(start),
        count * HUGE / 4096,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    )?;
    memory.advise(advice)?;
    Ok(memory)
}

pub(crate) fn fill(memory: &Mapping, seed: u64) {
    for word in 0..memory.len() / 8 {
        memory
            .atomic(word * 8)
            .store(pattern(seed, word), Ordering::Relaxed);
    }
}

pub(crate) fn check(memory: &Mapping, seed: u64) -> Result<(), Failure> {
    check_part(memory, 0, memory.len(), seed)
}

fn check_part(memory: &Mapping, offset: usize, length: usize, seed: u64) -> Result<(), Failure> {
    for word in offset / 8..(offset + length) / 8 {
        let found = memory.atomic(word * 8).load(Ordering::Relaxed);
        ensure_eq!(found, pattern(seed, word), "what is at {:#x}", word * 8);
    }
    Ok(())
}

/// Has the GPU copy the memory, which brings it to VRAM, and looks at the copy.
pub(crate) fn copy_and_check(gpu: &Gpu, memory: &Mapping, seed: u64) -> Result<(), Failure> {
    let copy = Mapping::anonymous(memory.pages())?;
    execute_ok(
        gpu,
        &[Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len())],
    )?;
    check(&copy, seed)
}

/// Memory in VRAM, with the pattern in it. None if there is no VRAM.
fn in_vram(count: usize, advice: i32, seed: u64) -> Result<Option<(Gpu, Mapping)>, Failure> {
    let gpu = open()?;
    if gpu.info()?.vram_size == 0 {
        return Ok(None);
    }
    let memory = memory_of(count, advice)?;
    fill(&memory, seed);
    prefer(&gpu, &memory, Location::Vram)?;
    prefetch(&gpu, &memory, Location::Vram)?;
    ensure_eq!(pages_in_vram(&gpu, &memory)?, memory.pages(), "pages in VRAM");
    Ok(Some((gpu, memory)))
}

macro_rules! vram {
    ($count:expr, $advice:expr, $seed:expr) => {
        match in_vram($count, $advice, $seed)? {
            Some(both) => both,
            None => return Ok(Outcome::Skipped("there is no VRAM".to_owned())),
        }
    };
}

fn moved_to_vram_by_an_access() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let gpu = open()?;
        let memory = memory_of(3, advice)?;
        fill(&memory, 1);
        prefer(&gpu, &memory, Location::Vram)?;
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM before");
        copy_and_check(&gpu, &memory, 1)?;
        ensure_eq!(pages_in_vram(&gpu, &memory)?, memory.pages(), "pages in VRAM");
        // Once more, from there.
        copy_and_check(&gpu, &memory, 1)?;
        check(&memory, 1)?;
        ensure_eq!(
            pages_in_vram(&gpu, &memory)?,
            0,
            "pages in VRAM after the CPU has looked"
        );
        let moved = gpu.statistics()?.to_vram;
        ensure_eq!(moved, memory.pages() as u64, "pages that have moved");
        ensure_eq!(gpu.statistics()?.from_vram, moved, "pages that have come home");
    }
    PASSED
}

fn moved_to_vram_ahead_of_use() -> TestResult {
    let (gpu, memory) = vram!(2, libc::MADV_NOHUGEPAGE, 2);
    let faults = gpu.statistics()?.faults;
    execute_ok(
        &gpu,
        &[add(&memory, 0).repeat(memory.pages() as u32).stride(4096)],
    )?;
    ensure_eq!(gpu.statistics()?.faults, faults, "faults");
    prefetch(&gpu, &memory, Location::System)?;
    ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
    check(&memory, 2).map(|()| Outcome::Passed)
}

fn written_in_vram() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 3);
        let source = Mapping::anonymous(memory.pages())?;
        fill(&source, 4);
        // All but the first and the last 100 bytes.
        let length = memory.len() - 200;
        execute_ok(&gpu, &[Command::copy(source.at(100), memory.at(100), length)])?;
        ensure_eq!(pages_in_vram(&gpu, &memory)?, memory.pages(), "pages in VRAM");
        let mut expected = source.read(0, source.len());
        fill(&source, 3);
        let old = source.read(0, source.len());
        expected[..100].copy_from_slice(&old[..100]);
        expected[old.len() - 100..].copy_from_slice(&old[old.len() - 100..]);
        ensure!(memory.read(0, memory.len()) == expected, "the content is another");
    }
    PASSED
}

fn vram_that_was_never_touched_reads_as_zero() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        // Something else than zeros is there before.
        drop(vram!(4, advice, 5));
        let gpu = open()?;
        let memory = memory_of(4, advice)?;
        prefer(&gpu, &memory, Location::Vram)?;
        execute_ok(&gpu, &[add(&memory, 7)])?;
        let pages = pages_in_vram(&gpu, &memory)?;
        // An atomic operation pins, by default, or moves.
        ensure!(pages <= HUGE / 4096, "{pages} pages in VRAM");
        prefetch(&gpu, &memory, Location::Vram)?;
        let copy = Mapping::anonymous(memory.pages())?;
        execute_ok(
            &gpu,
            &[Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len())],
        )?;
        for memory in [&copy, &memory] {
            let bytes = memory.read(0, memory.len());
            ensure_eq!(bytes[0], 7, "the number");
            let other = bytes.iter().skip(1).position(|byte| *byte != 0);
            ensure_eq!(other, None, "a byte that is not zero");
        }
    }
    PASSED
}

fn vram_of_another_process_is_cleared() -> TestResult {
    for _ in 0..repeatedly(3) {
        let child = fork(|| {
            let Some((gpu, memory)) = in_vram(8, libc::MADV_HUGEPAGE, 6)? else {
                return Ok(());
            };
            let more = memory_of(4, libc::MADV_NOHUGEPAGE)?;
            fill(&more, 6);
            prefetch(&gpu, &more, Location::Vram)?;
            drop((memory, more));
            Ok(())
        })?;
        join(child)?;
        let child = fork(|| {
            let gpu = open()?;
            for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
                let memory = memory_of(6, advice)?;
                // Some of them are there, others come into being in VRAM.
                for page in (0..memory.pages()).step_by(3) {
                    memory.atomic(page * 4096).store(0, Ordering::Relaxed);
                }
                prefetch(&gpu, &memory, Location::Vram)?;
                let bytes = memory.read(0, memory.len());
                let other = bytes.iter().position(|byte| *byte != 0);
                ensure_eq!(other, None, "a byte that is not zero");
            }
            Ok(())
        })?;
        join(child)?;
    }
    PASSED
}

fn a_huge_page_moves_as_one() -> TestResult {
    let (gpu, memory) = vram!(2, libc::MADV_HUGEPAGE, 7);
    if gpu.statistics()?.from_vram != 0 {
        return Ok(Outcome::Skipped("it has come home already".to_owned()));
    }
    copy_and_check(&gpu, &memory, 7)?;
    check(&memory, 7).map(|()| Outcome::Passed)
}

fn a_huge_page_comes_home_as_one() -> TestResult {
    let gpu = open()?;
    let memory = memory_of(4, libc::MADV_HUGEPAGE)?;
    fill(&memory, 8);
    let before = kilobytes(&memory, "AnonHugePages")?;
    if before == 0 {
        return Ok(Outcome::Skipped("there are no huge pages".to_owned()));
    }
    prefetch(&gpu, &memory, Location::Vram)?;
    let moved = pages_in_vram(&gpu, &memory)?;
    ensure_eq!(moved, memory.pages(), "pages in VRAM");
    // One access to each.
    for offset in (0..memory.len()).step_by(HUGE) {
        let found = memory.atomic(offset + 4096).load(Ordering::Relaxed);
        ensure_eq!(found, pattern(8, (offset + 4096) / 8), "at {offset:#x}");
    }
    ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
    ensure_eq!(kilobytes(&memory, "AnonHugePages")?, before, "huge pages");
    check(&memory, 8).map(|()| Outcome::Passed)
}

fn a_huge_page_in_vram_is_split() -> TestResult {
    let (gpu, memory) = vram!(3, libc::MADV_HUGEPAGE, 9);
    // Only part of it is discarded, protected, or another process's.
    // SAFETY: The range is ours, and only accessed through raw pointers.
    let advised = unsafe { libc::madvise(memory.at(HUGE + 8 * 4096).cast(), 4 * 4096, libc::MADV_DONTNEED) };
    ensure_eq!(advised, 0, "madvise");
    ensure_eq!(pages_in_vram(&gpu, &memory)?, memory.pages() - 4, "pages in VRAM");
    let copy = Mapping::anonymous(memory.pages())?;
    execute_ok(
        &gpu,
        &[Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len())],
    )?;
    for memory in [&copy, &memory] {
        check_part(memory, 0, HUGE + 8 * 4096, 9)?;
        ensure!(
            memory
                .read(HUGE + 8 * 4096, 4 * 4096)
                .iter()
                .all(|byte| *byte == 0),
            "what was discarded is still there"
        );
        check_part(memory, HUGE + 12 * 4096, 2 * HUGE - 12 * 4096, 9)?;
    }
    PASSED
}

fn small_pages_move_together() -> TestResult {
    let (gpu, memory) = vram!(2, libc::MADV_NOHUGEPAGE, 10);
    let before = gpu.statistics()?.from_vram;
    ensure_eq!(
        memory.atomic(4096 * 100).load(Ordering::Relaxed),
        pattern(10, 512 * 100),
        "a number"
    );
    let home = gpu.statistics()?.from_vram - before;
    ensure!(
        (1..=64).contains(&home),
        "{home} pages have come home after one access"
    );
    let pages = pages_in_vram(&gpu, &memory)?;
    ensure_eq!(pages as u64 + home, memory.pages() as u64, "pages in all");
    check(&memory, 10).map(|()| Outcome::Passed)
}

/// What a CPU goes through page by page does not take a round trip for each piece; what it touches here and there comes home alone.
fn a_cpu_that_goes_on_gets_the_rest() -> TestResult {
    let (gpu, memory) = vram!(2, libc::MADV_NOHUGEPAGE, 40);
    let touch = |memory: &Mapping, page: usize, expected: u64| -> Result<(), Failure> {
        let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
        ensure_eq!(found, expected, "page {page}");
        Ok(())
    };
    for (page, left) in [
        (80, 1008),
        (200, 992),
        (208, 976),
        (300, 960),
        (304, 944),
        (320, 512),
    ] {
        touch(&memory, page, pattern(40, 512 * page))?;
        ensure_eq!(
            pages_in_vram(&gpu, &memory)?,
            left,
            "pages left after page {page}"
        );
    }
    check(&memory, 40)?;

    let memory = memory_of(1, libc::MADV_NOHUGEPAGE)?;
    fill(&memory, 41);
    atomics(&gpu, &memory, Atomics::Pin)?;
    execute_ok(&gpu, &[add(&memory, 1).repeat(512).stride(4096)])?;
    let scattered = [300, 100, 200].map(|page| (page, 1));
    let row = (0..8).map(|page| (page, 1));
    let mut left = pages_in(&gpu, &memory, PageState::Pinned)?;
    ensure_eq!(left, 512, "pages that are pinned");
    for (page, home) in scattered.into_iter().chain(row).chain([(8, 501)]) {
        touch(&memory, page, pattern(41, 512 * page) + 1)?;
        left -= home;
        ensure_eq!(
            pages_in(&gpu, &memory, PageState::Pinned)?,
            left,
            "pages pinned after page {page}"
        );
    }
    for page in 0..memory.pages() {
        memory.atomic(page * 4096).fetch_sub(1, Ordering::Relaxed);
    }
    check(&memory, 41).map(|()| Outcome::Passed)
}

fn in_vram_then_unmapped_in_part() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 11);
        let hole = 100 * 4096..300 * 4096;
        // SAFETY: The range is ours, nothing refers to it, and the test does not access it any more.
        let unmapped = unsafe { libc::munmap(memory.at(hole.start).cast(), hole.len()) };
        ensure_eq!(unmapped, 0, "munmap");
        let copy = Mapping::anonymous(memory.pages())?;
        let around = |start: usize, end: usize| Command::copy(memory.at(start), copy.at(start), end - start);
        execute_ok(&gpu, &[around(0, hole.start), around(hole.end, memory.len())])?;
        for memory in [&copy, &memory] {
            check_part(memory, 0, hole.start, 11)?;
            check_part(memory, hole.end, memory.len() - hole.end, 11)?;
        }
        let completion = execute(&gpu, &[Command::copy(memory.at(hole.start), copy.as_ptr(), 8)])?;
        ensure_eq!(completion.status, Status::Fault, "where nothing is");
    }
    PASSED
}

fn in_vram_then_dropped() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 12);
        memory.advise(libc::MADV_DONTNEED)?;
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
        execute_ok(&gpu, &[add(&memory, 1)])?;
        let bytes = memory.read(0, memory.len());
        ensure_eq!(
            bytes.iter().filter(|byte| **byte != 0).count(),
            1,
            "bytes that are not zero"
        );
    }
    PASSED
}

/// Says that nobody needs what is in part of the memory.
fn discard(gpu: &Gpu, memory: &Mapping, start: usize, length: usize) -> Result<(), Failure> {
    // SAFETY: The memory is mapped, and nobody else accesses it meanwhile.
    let part = unsafe { std::slice::from_raw_parts_mut(memory.at(start), length) };
    Ok(gpu.discard(part)?)
}

/// Nothing is copied that was discarded: zeros come home. All around it is as it was.
fn discarded_in_vram() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(3, advice, 29);
        // The whole of the second huge page, and in the third every other page.
        discard(&gpu, &memory, HUGE, HUGE)?;
        for page in (1024..1536).step_by(2) {
            discard(&gpu, &memory, page * 4096, 4096)?;
        }
        ensure_eq!(pages_in_vram(&gpu, &memory)?, memory.pages(), "pages in VRAM");
        let rights = gpu.query(memory.at(HUGE), HUGE)?;
        ensure!(
            rights.iter().all(|page| !page.rights.read),
            "the GPU may go on without asking"
        );
        check_part(&memory, 0, HUGE, 29)?;
        let zeros = memory.read(HUGE, HUGE);
        ensure!(zeros.iter().all(|byte| *byte == 0), "something has been copied");
        for page in 1024..1536 {
            let bytes = memory.read(page * 4096, 4096);
            let discarded = page % 2 == 0;
            // What moves as one is copied as one.
            let zeros = bytes.iter().all(|byte| *byte == 0);
            if !discarded || !zeros {
                check_part(&memory, page * 4096, 4096, 29)?;
            }
            ensure!(
                zeros || !discarded || advice == libc::MADV_HUGEPAGE,
                "page {page} was copied"
            );
        }
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM at the end");
        fill(&memory, 29);
        copy_and_check(&gpu, &memory, 29)?;
    }
    PASSED
}

/// What the GPU writes after the program has said that nobody needs what was there is kept, and what it only reads is right too.
fn discarded_in_vram_then_written() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 31);
        discard(&gpu, &memory, 0, memory.len())?;
        let source = memory_of(2, advice)?;
        fill(&source, 32);
        execute_ok(
            &gpu,
            &[Command::copy(source.as_ptr(), memory.as_ptr(), memory.len())],
        )?;
        check(&memory, 32)?;
        // Discarded at home: nothing comes of it.
        discard(&gpu, &memory, 0, memory.len())?;
        check(&memory, 32)?;
    }
    PASSED
}

fn discarded_in_vram_but_shared_with_a_child() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(1, advice, 33);
        let (mut go, mut started) = pinion_tests::process::pipe().map(|(reader, writer)| (writer, reader))?;
        let child = fork(|| {
            use std::io::Read as _;
            started.read_exact(&mut [0])?;
            check(&memory, 33)
        })?;
        discard(&gpu, &memory, 0, memory.len())?;
        {
            use std::io::Write as _;
            go.write_all(&[0])?;
        }
        join(child)?;
    }
    PASSED
}

/// It comes home, and the GPU need not ask for it.
fn prefetched_to_system_memory() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 34);
        prefetch(&gpu, &memory, Location::System)?;
        ensure_eq!(
            pages_in(&gpu, &memory, PageState::Mirrored)?,
            memory.pages(),
            "pages that the GPU maps"
        );
        // So that it does not move again.
        prefer(&gpu, &memory, Location::System)?;
        prefetch(&gpu, &memory, Location::System)?;
        let faults = gpu.statistics()?.faults;
        execute_ok(&gpu, &[Command::copy(memory.at(HUGE), memory.as_ptr(), HUGE)])?;
        ensure_eq!(gpu.statistics()?.faults, faults, "faults");
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
        check_part(&memory, HUGE, HUGE, 34)?;
        for word in 0..HUGE / 8 {
            let found = memory.atomic(word * 8).load(Ordering::Relaxed);
            ensure_eq!(found, pattern(34, HUGE / 8 + word), "what is at {:#x}", word * 8);
        }
    }
    PASSED
}

fn in_vram_then_moved() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, mut memory) = vram!(2, advice, 13);
        let old = memory.as_ptr();
        memory.remap()?;
        copy_and_check(&gpu, &memory, 13)?;
        let copy = Mapping::anonymous(1)?;
        let other = open()?;
        let completion = execute(&other, &[Command::copy(old, copy.as_ptr(), 8)])?;
        ensure_eq!(completion.status, Status::Fault, "where it was");
        check(&memory, 13)?;
    }
    PASSED
}

/// Nobody leads the driver to what has moved, and whose file was closed: it has to find that by itself when it goes.
fn in_vram_then_moved_and_left_by_the_driver() -> TestResult {
    let Ok(file) = std::fs::File::open(module::FILE) else {
        return Ok(Outcome::Skipped(format!(
            "there is no {} to load again",
            module::FILE
        )));
    };
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, mut memory) = vram!(1, advice, 31);
        memory.remap_to(memory_of(1, advice)?)?;
        drop(gpu);
        module::unload()?;
        check(&memory, 31)?;
        module::load(&file)?;
        let deadline = Instant::now() + soon();
        while !std::path::Path::new(pinion_tests::DEVICE).exists() {
            ensure!(Instant::now() < deadline, "the device file has not come back");
            std::thread::sleep(Duration::from_millis(10));
        }
        copy_and_check(&open()?, &memory, 31)?;
    }
    PASSED
}

fn in_vram_then_write_protected() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 14);
        memory.protect(libc::PROT_READ)?;
        copy_and_check(&gpu, &memory, 14)?;
        let completion = execute(&gpu, &[Command::fill(memory.as_ptr().cast::<u64>(), 1, 0)])?;
        ensure_eq!(completion.status, Status::Fault, "writing");
        check(&memory, 14)?;
        memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        let gpu = open()?;
        prefetch(&gpu, &memory, Location::Vram)?;
        execute_ok(
            &gpu,
            &[Command::fill(memory.as_ptr().cast::<u64>(), 1, pattern(14, 0))],
        )?;
        check(&memory, 14)?;
    }
    PASSED
}

fn in_vram_then_forked_child_first() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 15);
        let child = fork(|| {
            check(&memory, 15)?;
            fill(&memory, 16);
            check(&memory, 16)
        })?;
        join(child)?;
        copy_and_check(&gpu, &memory, 15)?;
        check(&memory, 15)?;
    }
    PASSED
}

fn in_vram_then_forked_parent_first() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 17);
        let (mut go, mut started) = pinion_tests::process::pipe().map(|(reader, writer)| (writer, reader))?;
        let child = fork(|| {
            use std::io::Read as _;
            started.read_exact(&mut [0])?;
            check(&memory, 17)
        })?;
        fill(&memory, 18);
        copy_and_check(&gpu, &memory, 18)?;
        {
            use std::io::Write as _;
            go.write_all(&[0])?;
        }
        join(child)?;
        check(&memory, 18)?;
    }
    PASSED
}

fn in_vram_then_forked_gpu_first() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 19);
        let source = memory_of(2, advice)?;
        fill(&source, 20);
        let (mut go, mut started) = pinion_tests::process::pipe().map(|(reader, writer)| (writer, reader))?;
        let child = fork(|| {
            use std::io::Read as _;
            started.read_exact(&mut [0])?;
            check(&memory, 19)
        })?;
        execute_ok(
            &gpu,
            &[Command::copy(source.as_ptr(), memory.as_ptr(), memory.len())],
        )?;
        {
            use std::io::Write as _;
            go.write_all(&[0])?;
        }
        join(child)?;
        check(&memory, 20)?;
    }
    PASSED
}

fn in_vram_then_read_by_the_kernel() -> TestResult {
    use std::io::{Read as _, Seek as _, Write as _};
    let (gpu, memory) = vram!(1, libc::MADV_NOHUGEPAGE, 21);
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open("/tmp/vram")?;
    // SAFETY: The memory is mapped, and nothing changes it.
    let bytes = unsafe { std::slice::from_raw_parts(memory.as_ptr(), memory.len()) };
    file.write_all(bytes)?;
    prefetch(&gpu, &memory, Location::Vram)?;
    let mut read = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut read)?;
    std::fs::remove_file("/tmp/vram")?;
    ensure!(
        read == memory.read(0, memory.len()),
        "the file has something else"
    );
    check(&memory, 21).map(|()| Outcome::Passed)
}

fn in_vram_then_mlocked() -> TestResult {
    let (gpu, memory) = vram!(1, libc::MADV_HUGEPAGE, 22);
    // SAFETY: Locking changes nothing.
    let locked = unsafe { libc::mlock(memory.as_ptr().cast(), memory.len()) };
    ensure_eq!(locked, 0, "mlock");
    copy_and_check(&gpu, &memory, 22)?;
    check(&memory, 22).map(|()| Outcome::Passed)
}

fn in_vram_then_closed() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 23);
        drop(gpu);
        let gpu = open()?;
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
        copy_and_check(&gpu, &memory, 23)?;
        check(&memory, 23)?;
    }
    PASSED
}

fn in_vram_and_pinned() -> TestResult {
    let (gpu, memory) = vram!(2, libc::MADV_NOHUGEPAGE, 24);
    // Every other page is at home, and pinned by the next operation; all of them are counted up.
    for page in (0..memory.pages()).step_by(32) {
        memory.atomic(page * 4096).fetch_add(0, Ordering::Relaxed);
    }
    let work = add(&memory, 1).repeat(memory.pages() as u32).stride(4096);
    execute_ok(&gpu, &[work])?;
    execute_ok(&gpu, &[work])?;
    for page in 0..memory.pages() {
        memory.atomic(page * 4096).fetch_sub(2, Ordering::Relaxed);
    }
    check(&memory, 24).map(|()| Outcome::Passed)
}

fn in_vram_for_two_files() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let (gpu, memory) = vram!(2, advice, 25);
        let other = open()?;
        prefer(&other, &memory, Location::Vram)?;
        for _ in 0..repeatedly(3) {
            copy_and_check(&other, &memory, 25)?;
            copy_and_check(&gpu, &memory, 25)?;
        }
        execute_ok(&gpu, &[Command::fill(memory.as_ptr().cast::<u64>(), 1, 1)])?;
        execute_ok(
            &other,
            &[Command::fill(memory.as_ptr().cast::<u64>(), 1, pattern(25, 0))],
        )?;
        copy_and_check(&gpu, &memory, 25)?;
        check(&memory, 25)?;
    }
    PASSED
}

fn files_stay_where_they_are() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::new(
        None,
        64,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    )?;
    fill(&memory, 26);
    prefer(&gpu, &memory, Location::Vram)?;
    copy_and_check(&gpu, &memory, 26)?;
    prefetch(&gpu, &memory, Location::Vram)?;
    ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
    check(&memory, 26).map(|()| Outcome::Passed)
}

fn atomic_operations_in_vram() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    atomics(&gpu, &memory, Atomics::Migrate)?;
    for round in 0..20 {
        execute_ok(&gpu, &[add(&memory, 1)])?;
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 1, "pages in VRAM");
        ensure_eq!(value(&memory), 6 + round, "the number");
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages in VRAM");
    }
    PASSED
}

fn atomic_operations_in_vram_under_contention() -> TestResult {
    contend(Atomics::Migrate)
}

fn atomic_operations_on_an_exclusive_page_under_contention() -> TestResult {
    contend(Atomics::Exclusive)
}

fn atomic_operations_on_exclusive_pages() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let gpu = open()?;
        let memory = memory_of(1, advice)?;
        fill(&memory, 28);
        // What is in huge pages stays there. But khugepaged must not look at it: as many pages as are exclusive below, an eighth, it takes
        // for pages in swap that it may fetch to make one huge page of them all.
        memory.advise(libc::MADV_NOHUGEPAGE)?;
        atomics(&gpu, &memory, Atomics::Exclusive)?;
        // A fault each, so not all of them.
        let used = (0..memory.pages()).step_by(8);
        let work = add(&memory, 1).repeat(used.len() as u32).stride(8 * 4096);
        for round in 1..=3 {
            execute_ok(&gpu, &[work])?;
            ensure!(gpu.statistics()?.exclusives > 0, "no page was exclusive");
            // To ask takes nothing back: asked again, the answer is the same.
            for _ in 0..2 {
                let exclusive = pages_in(&gpu, &memory, PageState::Exclusive)?;
                ensure_eq!(exclusive, used.len(), "exclusive pages");
            }
            for page in used.clone().step_by(7) {
                let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
                ensure_eq!(found, pattern(28, page * 512) + round, "page {page}");
            }
        }
        ensure_eq!(gpu.statistics()?.pins, 0, "pins");
        for page in used {
            memory.atomic(page * 4096).fetch_sub(3, Ordering::Relaxed);
        }
        check(&memory, 28)?;
    }
    PASSED
}

fn contend(how: Atomics) -> TestResult {
    let gpu = open()?;
    let memory = page_with(0)?;
    atomics(&gpu, &memory, how)?;
    count_together(&gpu, &memory).map(|()| Outcome::Passed)
}

/// The CPU and the GPU count up the same number, which is zero.
pub(crate) fn count_together(gpu: &Gpu, memory: &Mapping) -> Result<(), Failure> {
    let done = AtomicBool::new(false);
    let (by_gpu, by_cpu) = std::thread::scope(|scope| {
        let cpu = scope.spawn(|| {
            let mut count = 0u64;
            while !done.load(Ordering::Relaxed) {
                memory.atomic(0).fetch_add(1, Ordering::Relaxed);
                count += 1;
            }
            count
        });
        let until = Instant::now() + Duration::from_secs(2);
        let gpu_side = || -> Result<u64, Failure> {
            let mut count = 0;
            while Instant::now() < until {
                // Not many at a time: each may take the page from the CPU, while that is busy elsewhere.
                let work = submit(gpu, &[add(memory, 1).repeat(100)])?;
                let completion = gpu.wait(work, soon())?;
                ensure_eq!(completion.status, Status::Ok, "{completion:?}");
                count += 100;
            }
            Ok(count)
        };
        let by_gpu = gpu_side();
        done.store(true, Ordering::Relaxed);
        (by_gpu, cpu.join())
    });
    let (by_gpu, by_cpu) = (by_gpu?, by_cpu.map_err(|_| "the thread has panicked")?);
    ensure!(
        by_gpu > 0 && by_cpu > 0,
        "{by_gpu} by the GPU and {by_cpu} by the CPU"
    );
    ensure_eq!(value(memory), by_gpu + by_cpu, "the number");
    Ok(())
}

fn vram_accounting_is_the_same_after_a_round_trip() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let gpu = open()?;
        let memory = memory_of(4, advice)?;
        fill(&memory, 27);
        let rss = || -> Result<u64, Failure> {
            let text = std::fs::read_to_string("/proc/self/status")?;
            let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            Ok(line.ok_or("no RssAnon")?.trim().trim_end_matches(" kB").parse()?)
        };
        let (own, all) = (rss()?, meminfo("AnonPages")?);
        for _ in 0..repeatedly(5) {
            prefetch(&gpu, &memory, Location::Vram)?;
            let there = rss()?;
            ensure!(there.abs_diff(own) <= 512, "{there} KiB in VRAM, and had {own}");
            check(&memory, 27)?;
        }
        let (own_after, all_after) = (rss()?, meminfo("AnonPages")?);
        ensure!(
            own_after.abs_diff(own) <= 256,
            "the process has {own_after} KiB, and had {own}"
        );
        ensure!(
            (all_after - all).abs() <= 2048,
            "the system has {all_after} KiB, and had {all}"
        );
    }
    PASSED
}

fn vram_is_free_after_processes_were_killed() -> TestResult {
    let vram = small_vram(&open()?)?;
    // Three quarters of it each time: without eviction there is room only if it comes back.
    let count = vram / HUGE * 3 / 4;
    for round in 0..4 {
        let (mut ready, mut told) = pinion_tests::process::pipe()?;
        let child = fork(|| {
            use std::io::Write as _;
            let kept = in_vram(count, libc::MADV_HUGEPAGE, round)?;
            if let Some((gpu, _)) = &kept {
                ensure_eq!(gpu.statistics()?.evictions, 0, "evictions");
            }
            told.write_all(&[0])?;
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        })?;
        {
            use std::io::Read as _;
            drop(ready.read_exact(&mut [0]));
        }
        drop(child);
    }
    PASSED
}

/// How large VRAM is, which must be small.
fn small_vram(gpu: &Gpu) -> Result<usize, Failure> {
    let vram = gpu.info()?.vram_size as usize;
    ensure!(
        (1..=32 << 20).contains(&vram),
        "this takes a device with a VRAM of 32 MiB at most (--vram 32M), not {vram:#x} bytes"
    );
    Ok(vram)
}

/// Four times what VRAM can hold, over and over.
fn work_on_much(seed: u64) -> Result<(), Failure> {
    let gpu = open()?;
    let vram = small_vram(&gpu)?;
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let memory = memory_of(4 * vram / HUGE, advice)?;
        prefer(&gpu, &memory, Location::Vram)?;
        let words = memory.len() / 8;
        let piece = 16 << 10;
        for word in (0..words).step_by(piece / 8) {
            memory
                .atomic(word * 8)
                .store(pattern(seed, word), Ordering::Relaxed);
        }
        for round in 0..2u64 {
            for start in (0..memory.len()).step_by(4 * HUGE) {
                let count = (4 * HUGE / piece) as u32;
                let address = memory.at(start).cast::<u64>();
                let fill = Command::fill(memory.at(start + 8).cast::<u64>(), 1, round);
                execute_ok(
                    &gpu,
                    &[
                        Command::copy(memory.at(start), memory.at(start + 16), 8),
                        fill,
                        Command::atomic_add(address, 1).repeat(count).stride(piece as u32),
                    ],
                )?;
            }
        }
        for word in (0..words).step_by(piece / 8) {
            let found = memory.atomic(word * 8).load(Ordering::Relaxed);
            ensure_eq!(found, pattern(seed, word) + 2, "what is at {:#x}", word * 8);
        }
        ensure!(gpu.statistics()?.evictions > 0, "nothing had to make room");
    }
    Ok(())
}

/// What has to make room and was discarded goes without a copy; what was not is kept.
fn evicted_after_it_was_discarded() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let vram = small_vram(&open()?)?;
        let Some((gpu, memory)) = in_vram(vram / HUGE, advice, 35)? else {
            return Err("there is no VRAM".into());
        };
        let half = memory.len() / 2;
        discard(&gpu, &memory, 0, half)?;
        let other = memory_of(vram / HUGE, advice)?;
        fill(&other, 36);
        prefer(&gpu, &other, Location::Vram)?;
        prefetch(&gpu, &other, Location::Vram)?;
        ensure!(gpu.statistics()?.evictions > 0, "nothing had to make room");
        ensure_eq!(pages_in_vram(&gpu, &memory)?, 0, "pages that have stayed");
        let bytes = memory.read(0, half);
        ensure!(
            bytes.iter().all(|byte| *byte == 0),
            "what was discarded was copied"
        );
        check_part(&memory, half, half, 35)?;
        check(&other, 36)?;
    }
    PASSED
}

fn more_than_vram_can_hold() -> TestResult {
    work_on_much(30).map(|()| Outcome::Passed)
}

fn more_than_vram_can_hold_for_two_processes() -> TestResult {
    let one = fork(|| work_on_much(31))?;
    let two = fork(|| work_on_much(32))?;
    join(one)?;
    join(two).map(|()| Outcome::Passed)
}

fn munmap_while_moving() -> TestResult {
    let gpu = open()?;
    for round in 0..repeatedly(40) {
        let advice = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE][round % 2];
        let memory = memory_of(2, advice)?;
        for page in 0..memory.pages() {
            memory.atomic(page * 4096).store(1, Ordering::Relaxed);
        }
        let length = memory.len();
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                // Both fail or not, as it comes.
                let _ = prefetch(&gpu, &memory, Location::Vram);
                let _ = prefetch(&gpu, &memory, Location::System);
            });
            for part in 0..4 {
                let start = part * length / 4;
                let part = memory.at(start).cast();
                if round % 3 == 0 {
                    // SAFETY: The range is ours, and nothing accesses it any more.
                    unsafe { libc::madvise(part, length / 8, libc::MADV_DONTNEED) };
                } else {
                    // SAFETY: As above.
                    unsafe { libc::munmap(part, length / 8) };
                }
            }
            let _ = mover.join();
        });
    }
    execute_ok(&gpu, &[add(&page_with(1)?, 1)]).map(|()| Outcome::Passed)
}
