// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process changes its address space while the GPU works in just that range. What has gone must be out of the GPU's reach
//! when the system call returns, what stays must be neither lost nor altered, and the work must end.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pinion_client::{Command, Gpu, Location, Status, Submission};
use pinion_tests::{Failure, Mapping, repeatedly};

use crate::support::{
    PASSED, TestResult, ensure, ensure_eq, execute_ok, fork, join, meminfo, open, page_with, soon, submit,
    submit_on, tests, value,
};

tests! {
    meanwhile_unmapped
    meanwhile_replaced_by_another_file
    meanwhile_write_protected
    meanwhile_discarded
    meanwhile_moved
    meanwhile_forked
    meanwhile_truncated
    meanwhile_made_huge_and_split
    meanwhile_the_process_exits
}

/// Pages that the GPU works on.
const PAGES: usize = 64;

/// Where the memory is when that begins, and how the GPU works on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Ordinary stores, to pages of the process.
    Mirrored,
    /// Atomic operations, which pin.
    Pinned,
    /// Atomic operations in VRAM.
    Vram,
}

const ALL: [How; 3] = [How::Mirrored, How::Pinned, How::Vram];

/// Counts up (or, mirrored, sets) a number in each page, over and over, for much longer than a test may take.
fn endless(memory: &Mapping, how: How) -> Command {
    let operation = match how {
        How::Mirrored => pinion_client::Operation::Store,
        How::Pinned | How::Vram => pinion_client::Operation::Add,
    };
    Command::atomic(operation, memory.as_ptr().cast::<u64>(), 1)
        .repeat(u32::MAX)
        .stride(4096)
        .span(memory.pages() as u32)
}

/// Populated memory with a number of its own in each page, beside the one that the GPU works on.
fn populated(gpu: &Gpu, how: How) -> Result<Mapping, Failure> {
    let memory = Mapping::anonymous(PAGES)?;
    for page in 0..PAGES {
        memory.atomic(page * 4096).store(0, Ordering::Relaxed);
        memory
            .atomic(page * 4096 + 8)
            .store(1000 + page as u64, Ordering::Relaxed);
    }
    if how == How::Vram && gpu.info()?.vram_size > 0 {
        gpu.advise_atomics(memory.as_ptr(), memory.len(), pinion_client::Atomics::Migrate)?;
        gpu.prefetch(memory.as_ptr(), memory.len(), Location::Vram)?;
    }
    Ok(memory)
}

/// The numbers beside are as they were.
fn check_neighbours(memory: &Mapping) -> Result<(), Failure> {
    for page in 0..memory.pages() {
        let found = memory.atomic(page * 4096 + 8).load(Ordering::Relaxed);
        ensure_eq!(found, 1000 + page as u64, "what else is in page {page}");
    }
    Ok(())
}

/// Waits until something is so.
fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), Failure> {
    let deadline = Instant::now() + soon();
    while !condition() {
        ensure!(Instant::now() < deadline, "in vain for {what}");
        std::thread::yield_now();
    }
    Ok(())
}

/// Waits until the GPU has written to a page.
fn until_written(memory: &Mapping, page: usize) -> Result<(), Failure> {
    until("the GPU to write", || {
        memory.atomic(page * 4096).load(Ordering::Relaxed) != 0
    })
}

/// Work that had its memory taken away ends with a fault: where.
fn ends_with_a_fault(gpu: &Gpu, work: Submission) -> Result<u64, Failure> {
    let completion = gpu.wait(work, soon())?;
    ensure_eq!(completion.status, Status::Fault, "{completion:x?}");
    Ok(completion.fault_address)
}

fn memory_file(name: &CStr) -> Result<File, Failure> {
    // SAFETY: The name is a C string.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(descriptor >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: It is new, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
    file.set_len((PAGES * 4096) as u64)?;
    Ok(file)
}

fn meanwhile_unmapped() -> TestResult {
    for how in ALL {
        for _ in 0..repeatedly(8) {
            let gpu = open()?;
            // It has neighbours, which nothing may happen to.
            let (before, after) = (page_with(11)?, page_with(12)?);
            let memory = populated(&gpu, how)?;
            let address = memory.as_ptr().addr() as u64;
            let work = submit(&gpu, &[endless(&memory, how)])?;
            until_written(&memory, PAGES / 2)?;
            drop(memory);
            let offset = ends_with_a_fault(&gpu, work)?.wrapping_sub(address);
            ensure!(
                offset < (PAGES * 4096) as u64,
                "{how:?}: a fault at offset {offset:#x}"
            );
            ensure_eq!((value(&before), value(&after)), (11, 12), "other memory, {how:?}");
        }
    }
    PASSED
}

/// Two files take turns at an address that the GPU writes to all the time. When one has gone from there, the GPU must not write
/// to it, though nothing has been freed and everything goes on.
fn meanwhile_replaced_by_another_file() -> TestResult {
    let gpu = open()?;
    let files = [memory_file(c"one")?, memory_file(c"other")?];
    let seen = [
        Mapping::of_file(&files[0], PAGES, libc::MAP_SHARED)?,
        Mapping::of_file(&files[1], PAGES, libc::MAP_SHARED)?,
    ];
    let memory = Mapping::of_file(&files[0], PAGES, libc::MAP_SHARED)?;
    let work = submit(&gpu, &[endless(&memory, How::Mirrored)])?;
    for round in 0..repeatedly(200) {
        let (here, next) = (round % 2, (round + 1) % 2);
        let page = round * 7 % PAGES;
        until_written(&seen[here], page)?;
        // SAFETY: It replaces a mapping of ours, of the same size, by another.
        let replaced = unsafe {
            libc::mmap(
                memory.as_ptr().cast(),
                memory.len(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                files[next].as_raw_fd(),
                0,
            )
        };
        ensure!(
            replaced == memory.as_ptr().cast(),
            "mmap: {}",
            io::Error::last_os_error()
        );
        for page in 0..PAGES {
            seen[here].atomic(page * 4096).store(0, Ordering::Relaxed);
        }
        // The GPU goes on, on the other file, and leaves this one alone.
        for page in [0, PAGES - 1] {
            until_written(&seen[next], page)?;
        }
        for page in 0..PAGES {
            let found = seen[here].atomic(page * 4096).load(Ordering::Relaxed);
            ensure_eq!(
                found,
                0,
                "page {page} of what is not mapped any more, round {round}"
            );
        }
    }
    drop(memory);
    ends_with_a_fault(&gpu, work)?;
    PASSED
}

fn meanwhile_write_protected() -> TestResult {
    for how in ALL {
        for _ in 0..repeatedly(8) {
            let gpu = open()?;
            let memory = populated(&gpu, how)?;
            let work = submit(&gpu, &[endless(&memory, how)])?;
            until_written(&memory, PAGES / 2)?;
            memory.protect(libc::PROT_READ)?;
            let frozen: Vec<_> = (0..PAGES)
                .map(|page| memory.atomic(page * 4096).load(Ordering::Relaxed))
                .collect();
            ends_with_a_fault(&gpu, work)?;
            for (page, expected) in frozen.iter().enumerate() {
                let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
                ensure_eq!(found, *expected, "page {page} since it is read-only, {how:?}");
            }
            check_neighbours(&memory)?;
        }
    }
    PASSED
}

fn meanwhile_discarded() -> TestResult {
    for how in ALL {
        let gpu = open()?;
        let memory = populated(&gpu, how)?;
        let work = submit(&gpu, &[endless(&memory, how)])?;
        for round in 0..repeatedly(12) {
            until_written(&memory, round % PAGES)?;
            memory.advise(libc::MADV_DONTNEED)?;
            for page in 0..PAGES {
                let found = memory.atomic(page * 4096 + 8).load(Ordering::Relaxed);
                ensure_eq!(found, 0, "what was discarded in page {page}, {how:?}");
                memory.atomic(page * 4096 + 8).store(5, Ordering::Relaxed);
            }
            let rest = memory.read(16, 4080);
            ensure!(rest.iter().all(|byte| *byte == 0), "the rest of the first page");
        }
        // It goes on all the while, and ends when there is nothing at all.
        ensure!(
            gpu.wait(work, Duration::ZERO)
                .is_err_and(|error| error.is_timeout()),
            "the work has ended"
        );
        drop(memory);
        ends_with_a_fault(&gpu, work)?;
    }
    PASSED
}

fn meanwhile_moved() -> TestResult {
    for how in ALL {
        for _ in 0..repeatedly(8) {
            let gpu = open()?;
            let mut memory = populated(&gpu, how)?;
            let work = submit(&gpu, &[endless(&memory, how)])?;
            until_written(&memory, PAGES / 2)?;
            memory.remap()?;
            let moved: Vec<_> = (0..PAGES)
                .map(|page| memory.atomic(page * 4096).load(Ordering::Relaxed))
                .collect();
            ends_with_a_fault(&gpu, work)?;
            for (page, expected) in moved.iter().enumerate() {
                let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
                ensure_eq!(found, *expected, "page {page} since it has moved, {how:?}");
            }
            check_neighbours(&memory)?;
            // And the GPU finds it where it is now.
            let gpu = open()?;
            let add = Command::atomic_add(memory.as_ptr().cast::<u64>(), 3);
            execute_ok(&gpu, &[add.repeat(PAGES as u32).stride(4096)])?;
            for (page, expected) in moved.iter().enumerate() {
                let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
                ensure_eq!(found, *expected + 3, "page {page} where it is now, {how:?}");
            }
        }
    }
    PASSED
}

/// A child has what was there at one moment; what the GPU does afterwards is the parent's, and none of it is lost.
fn meanwhile_forked() -> TestResult {
    const TIMES: u32 = 200;
    for how in ALL {
        let gpu = open()?;
        let memory = populated(&gpu, how)?;
        let counting = Command::atomic_add(memory.as_ptr().cast::<u64>(), 1)
            .repeat(TIMES * PAGES as u32)
            .stride(4096)
            .span(PAGES as u32);
        let rounds = repeatedly(12) as u64;
        for _ in 0..rounds {
            let work = submit(&gpu, &[counting])?;
            let child = fork(|| {
                let now = || -> Vec<u64> {
                    (0..PAGES)
                        .map(|page| memory.atomic(page * 4096).load(Ordering::Relaxed))
                        .collect()
                };
                let first = now();
                std::thread::sleep(Duration::from_millis(20));
                ensure_eq!(now(), first, "the child's numbers, later");
                check_neighbours(&memory)?;
                for page in 0..PAGES {
                    memory.atomic(page * 4096 + 8).store(0, Ordering::Relaxed);
                }
                Ok(())
            })?;
            let completion = gpu.wait(work, soon())?;
            ensure_eq!(completion.status, Status::Ok, "{how:?}: {completion:x?}");
            join(child)?;
        }
        for page in 0..PAGES {
            let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
            ensure_eq!(found, rounds * u64::from(TIMES), "page {page}, {how:?}");
        }
        check_neighbours(&memory)?;
    }
    PASSED
}

fn meanwhile_truncated() -> TestResult {
    for _ in 0..repeatedly(12) {
        let gpu = open()?;
        let file = memory_file(c"truncated")?;
        let memory = Mapping::of_file(&file, PAGES, libc::MAP_SHARED)?;
        let work = submit(&gpu, &[endless(&memory, How::Mirrored)])?;
        until_written(&memory, PAGES - 1)?;
        file.set_len(4096 * 10)?;
        ends_with_a_fault(&gpu, work)?;
        file.set_len((PAGES * 4096) as u64)?;
        for page in 0..PAGES {
            let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
            ensure_eq!(found, u64::from(page < 10), "page {page}");
        }
    }
    PASSED
}

/// Huge pages come and go under work that counts.
fn meanwhile_made_huge_and_split() -> TestResult {
    const HUGE: usize = 2 << 20;
    let gpu = open()?;
    let memory = Mapping::anonymous(2 * HUGE / 4096)?;
    let first = memory.as_ptr().align_offset(HUGE);
    let at = |page: usize| memory.atomic(first + page * 4096);
    let counting = Command::atomic_add(memory.at(first).cast::<u64>(), 1)
        .repeat(4 * 512)
        .stride(4096)
        .span(512);
    let advise = |advice: i32| -> Result<(), Failure> {
        // SAFETY: None of the advice given here changes the content.
        let result = unsafe { libc::madvise(memory.at(first).cast(), HUGE, advice) };
        ensure_eq!(result, 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    };
    let protect_half = |protection: i32| -> Result<(), Failure> {
        let half = memory.at(first + HUGE / 2).cast();
        // SAFETY: It can be read and written all the time.
        let result = unsafe { libc::mprotect(half, HUGE / 2, protection) };
        ensure_eq!(result, 0, "mprotect: {}", io::Error::last_os_error());
        Ok(())
    };
    let mut expected = 0;
    for page in 0..512 {
        at(page).store(0, Ordering::Relaxed);
    }
    for round in 0..repeatedly(8) {
        let work = submit(&gpu, &[counting])?;
        if round % 2 == 0 {
            advise(libc::MADV_HUGEPAGE)?;
            // It may find the pages in use, and say so.
            let _ = advise(libc::MADV_COLLAPSE);
        } else {
            // Half of it for another protection and back: that splits.
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            protect_half(protection | libc::PROT_EXEC)?;
            protect_half(protection)?;
            advise(libc::MADV_NOHUGEPAGE)?;
        }
        let completion = gpu.wait(work, soon())?;
        ensure_eq!(completion.status, Status::Ok, "round {round}: {completion:x?}");
        expected += 4;
        for page in 0..512 {
            let found = at(page).load(Ordering::Relaxed);
            ensure_eq!(found, expected, "page {page} in round {round}");
        }
    }
    PASSED
}

/// A process that ends in the midst of it takes nothing with it: neither memory nor somebody else's work.
fn meanwhile_the_process_exits() -> TestResult {
    let gpu = open()?;
    let own = page_with(0)?;
    let mut spans = Vec::new();
    let rounds = repeatedly(16) as u64;
    for round in 0..rounds {
        let free = meminfo("MemAvailable")?;
        let how = ALL[round as usize % 3];
        let child = fork(|| {
            let gpu = open()?;
            let memory = populated(&gpu, how)?;
            for ring in 0..gpu.info()?.rings {
                submit_on(&gpu, ring, &[endless(&memory, how)])?;
            }
            until_written(&memory, PAGES / 2)?;
            // It is not closed, and nothing is unmapped, but by the process's end.
            std::mem::forget((gpu, memory));
            Ok(())
        })?;
        join(child)?;
        execute_ok(&gpu, &[Command::atomic_add(own.as_ptr().cast::<u64>(), 1)])?;
        spans.push(free - meminfo("MemAvailable")?);
    }
    ensure_eq!(value(&own), rounds, "the number");
    let pages = (PAGES * 4) as i64;
    ensure!(
        spans.iter().any(|lost| *lost < pages / 2),
        "of {pages} KiB in use each time, {spans:?} KiB are gone"
    );
    PASSED
}
