// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A page that is pinned for the GPU, and everything that can happen to it.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::{Atomics, Command, PageState, PinMethod, Status};
use pinion_tests::pagemap::{self, Entry};
use pinion_tests::{Failure, Mapping, repeatedly};

use crate::support::{
    Outcome, PASSED, TestResult, add, ensure, ensure_eq, execute, execute_ok, fork, join, open, page_with,
    pin, submit, tests, value,
};

tests! {
    pinned_in_place_and_home_again
    pinned_pages_have_their_own_content
    pinned_then_written_by_the_cpu
    pinned_then_copied_by_the_gpu
    pinned_then_unmapped
    pinned_then_discarded
    pinned_then_moved
    pinned_then_forked_child_first
    pinned_then_forked_parent_first
    pinned_then_forked_gpu_first
    pinned_while_mlocked
    pinned_while_lazily_freed
    pinned_while_in_a_pipe
    pinned_then_read_by_another_process
    pinned_then_written_through_proc_mem
    pinned_then_read_by_the_kernel
    pinned_then_advised_otherwise
    pinned_then_closed
    unprotected_memory_is_not_pinned
    a_part_of_a_huge_page_is_unprotected
    memory_accounting_is_the_same_after_a_round_trip
    hand_over_under_contention
}

fn pinned_in_place_and_home_again() -> TestResult {
    let gpu = open()?;
    for round in 0..20 {
        let memory = page_with(40)?;
        let pfn = pagemap::pfn(memory.as_ptr())?;
        let page = pin(&gpu, &memory, 2)?;
        ensure!(
            page.rights.read && page.rights.write && page.rights.atomic,
            "{page:?}"
        );
        ensure_eq!(page.pfn, Some(pfn), "the page that is pinned in round {round}");
        ensure_eq!(
            pagemap::entry(memory.as_ptr())?,
            Entry::Absent,
            "what the CPU has meanwhile"
        );
        // Looking has changed nothing.
        ensure_eq!(gpu.query(memory.as_ptr(), 1)?[0], page, "the page after looking");
        ensure_eq!(value(&memory), 42, "what the CPU finds");
        ensure_eq!(
            pagemap::entry(memory.as_ptr())?,
            Entry::Present(pfn),
            "what the CPU has afterwards"
        );
        let page = gpu.query(memory.as_ptr(), 1)?[0];
        ensure!(
            page.state != PageState::Pinned && !page.rights.atomic,
            "afterwards: {page:?}"
        );
    }
    PASSED
}

fn pinned_pages_have_their_own_content() -> TestResult {
    const PAGES: usize = 200;
    let gpu = open()?;
    let memory = Mapping::anonymous(PAGES)?;
    for page in 0..PAGES {
        memory.write(page * 4096, &[page as u8; 4096]);
        memory.atomic(page * 4096).store(page as u64, Ordering::Relaxed);
    }
    let pfns: Vec<_> = (0..PAGES)
        .map(|page| pagemap::pfn(memory.page(page)))
        .collect::<Result<_, _>>()?;
    let target = memory.as_ptr().cast::<u64>();
    execute_ok(
        &gpu,
        &[Command::atomic_add(target, 7).repeat(PAGES as u32).stride(4096)],
    )?;
    for (index, page) in gpu.query(memory.as_ptr(), memory.len())?.iter().enumerate() {
        ensure_eq!(
            (page.state, page.pfn),
            (PageState::Pinned, Some(pfns[index])),
            "page {index}"
        );
    }
    // In an order of its own.
    for page in (0..PAGES).map(|index| index * 77 % PAGES) {
        ensure_eq!(
            memory.atomic(page * 4096).load(Ordering::Relaxed),
            page as u64 + 7,
            "page {page}"
        );
        let rest = memory.read(page * 4096 + 8, 4088);
        ensure_eq!(
            rest == [page as u8; 4088],
            true,
            "the rest of page {page} is as it was"
        );
        ensure_eq!(
            pagemap::pfn(memory.page(page))?,
            pfns[page],
            "where page {page} is"
        );
    }
    PASSED
}

fn pinned_then_written_by_the_cpu() -> TestResult {
    let gpu = open()?;
    let memory = page_with(0)?;
    for round in 1..=100 {
        pin(&gpu, &memory, 1)?;
        memory.atomic(0).fetch_add(10, Ordering::Relaxed);
        ensure_eq!(value(&memory), 11 * round, "round {round}");
    }
    PASSED
}

fn pinned_then_copied_by_the_gpu() -> TestResult {
    let gpu = open()?;
    let (memory, target) = (page_with(5)?, page_with(0)?);
    let page = pin(&gpu, &memory, 1)?;
    execute_ok(
        &gpu,
        &[
            Command::copy(memory.as_ptr(), target.as_ptr(), 8),
            Command::fill(memory.at(8).cast(), 1, 9_u64),
            add(&memory, 1),
        ],
    )?;
    ensure_eq!(gpu.query(memory.as_ptr(), 1)?[0], page, "it has stayed pinned");
    ensure_eq!(
        (
            value(&target),
            value(&memory),
            memory.atomic(8).load(Ordering::Relaxed)
        ),
        (6, 7, 9),
        "the numbers"
    );
    PASSED
}

fn pinned_then_unmapped() -> TestResult {
    let gpu = open()?;
    for _ in 0..repeatedly(300) {
        let memory = page_with(5)?;
        execute_ok(&gpu, &[add(&memory, 1)])?;
    }
    PASSED
}

fn pinned_then_discarded() -> TestResult {
    let gpu = open()?;
    for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
        let memory = page_with(5)?;
        pin(&gpu, &memory, 1)?;
        memory.advise(advice)?;
        let found = value(&memory);
        let fine = found == 0 || (advice == libc::MADV_FREE && found == 6);
        ensure!(fine, "advice {advice} leaves {found}");
        memory.atomic(0).store(7, Ordering::Relaxed);
        pin(&gpu, &memory, 1)?;
        ensure_eq!(value(&memory), 8, "after advice {advice}");
    }
    PASSED
}

fn pinned_then_moved() -> TestResult {
    let gpu = open()?;
    let mut memory = page_with(5)?;
    let old = memory.as_ptr();
    pin(&gpu, &memory, 1)?;
    memory.remap()?;
    ensure!(memory.as_ptr() != old, "it has moved");
    // The GPU first, at the new address.
    execute_ok(&gpu, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 7, "after a move");
    pin(&gpu, &memory, 1)?;
    memory.remap()?;
    ensure_eq!(value(&memory), 8, "after a move");
    pin(&gpu, &memory, 1)?;
    ensure_eq!(value(&memory), 9, "after a move");
    PASSED
}

fn pinned_then_forked_child_first() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    pin(&gpu, &memory, 1)?;
    let child = fork(|| {
        ensure_eq!(value(&memory), 6, "what the child sees");
        memory.atomic(0).store(99, Ordering::Relaxed);
        ensure_eq!(value(&memory), 99, "what the child has written");
        Ok(())
    })?;
    join(child)?;
    ensure_eq!(value(&memory), 6, "what the parent sees");
    pin(&gpu, &memory, 1)?;
    ensure_eq!(value(&memory), 7, "what the parent sees");
    PASSED
}

/// A child that looks at the page when it is told to.
fn forked_then(
    memory: &Mapping,
    expected: u64,
    act: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (mut reader, mut writer) = pinion_tests::process::pipe()?;
    let child = fork(|| {
        reader.read_exact(&mut [0])?;
        ensure_eq!(value(memory), expected, "what the child sees");
        memory.atomic(0).store(99, Ordering::Relaxed);
        Ok(())
    })?;
    act()?;
    writer.write_all(&[1])?;
    join(child)
}

fn pinned_then_forked_parent_first() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    pin(&gpu, &memory, 1)?;
    forked_then(&memory, 6, || {
        memory.atomic(0).fetch_add(10, Ordering::Relaxed);
        Ok(())
    })?;
    ensure_eq!(value(&memory), 16, "what the parent sees");
    PASSED
}

fn pinned_then_forked_gpu_first() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    pin(&gpu, &memory, 1)?;
    forked_then(&memory, 6, || execute_ok(&gpu, &[add(&memory, 10)]))?;
    ensure_eq!(value(&memory), 16, "what the parent sees");
    PASSED
}

fn pinned_while_mlocked() -> TestResult {
    let gpu = open()?;
    let mlocked = || -> Result<i64, Failure> {
        // Pages in a processor's batch still count, and so does what it has not added up: this has all of them see to both.
        std::fs::write("/proc/sys/vm/drop_caches", "1")?;
        std::fs::write("/proc/sys/vm/stat_refresh", "1")?;
        crate::support::meminfo("Mlocked")
    };
    let before = mlocked()?;
    for _ in 0..20 {
        let memory = page_with(5)?;
        // SAFETY: It changes no content.
        ensure_eq!(unsafe { libc::mlock(memory.as_ptr().cast(), 4096) }, 0, "mlock");
        for round in 1..=3 {
            pin(&gpu, &memory, 1)?;
            ensure_eq!(value(&memory), 5 + round, "the number");
        }
        pin(&gpu, &memory, 1)?;
    }
    let after = mlocked()?;
    ensure!(after <= before, "{after} KiB are mlocked, and were {before}");
    PASSED
}

fn pinned_while_lazily_freed() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    memory.advise(libc::MADV_FREE)?;
    // From here on it is needed again: what the GPU writes must not be discarded.
    execute_ok(&gpu, &[Command::fill(memory.as_ptr().cast(), 1, 7_u64)])?;
    let completion = execute(&gpu, &[add(&memory, 1)])?;
    if completion.status == Status::NotExclusive && gpu.info()?.pin_method == PinMethod::Takeover {
        ensure_eq!(value(&memory), 7, "the number");
        let reason = "the page was still in another processor's batch of lazily freed ones, which is a reference that \
                      only MIGRATE_PFN_PIN does not mind";
        return Ok(Outcome::Skipped(reason.to_owned()));
    }
    ensure_eq!(completion.status, Status::Ok, "{completion:x?}");
    ensure_eq!(
        gpu.query(memory.as_ptr(), 1)?[0].state,
        PageState::Pinned,
        "after an atomic operation"
    );
    ensure_eq!(value(&memory), 8, "the number");
    // Fails where there is no swap, and then reclaims nothing.
    let _ = memory.advise(libc::MADV_PAGEOUT);
    ensure_eq!(value(&memory), 8, "the number after reclaim");
    PASSED
}

/// The pipe has a reference to the page. It does not move, so that is no obstacle with the kernel's own pins.
fn pinned_while_in_a_pipe() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    let (mut reader, writer) = pinion_tests::process::pipe()?;
    let vector = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: 4096,
    };
    // SAFETY: The memory is there until the pipe has been read.
    let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const vector, 1, 0) };
    ensure_eq!(spliced, 4096, "vmsplice");
    let completion = execute(&gpu, &[add(&memory, 1)])?;
    let expected = match completion.status {
        Status::Ok => 6,
        // Without MIGRATE_PFN_PIN, a page with an unknown reference is left alone.
        Status::NotExclusive if gpu.info()?.pin_method == PinMethod::Takeover => 5,
        _ => return Err(format!("{completion:x?}").into()),
    };
    ensure_eq!(value(&memory), expected, "the number");
    let mut bytes = [0; 4096];
    reader.read_exact(&mut bytes)?;
    ensure_eq!(
        u64::from_ne_bytes(bytes[..8].try_into()?),
        expected,
        "what is in the pipe"
    );
    // Now there is nothing in the way.
    let gpu = open()?;
    pin(&gpu, &memory, 1)?;
    ensure_eq!(value(&memory), expected + 1, "the number");
    PASSED
}

fn pinned_then_read_by_another_process() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    pin(&gpu, &memory, 1)?;
    let parent = std::process::id() as i32;
    let child = fork(|| {
        let mut found = 0_u64;
        let local = libc::iovec {
            iov_base: (&raw mut found).cast(),
            iov_len: 8,
        };
        let remote = libc::iovec {
            iov_base: memory.as_ptr().cast(),
            iov_len: 8,
        };
        // SAFETY: The number is there to be written to.
        let read = unsafe { libc::process_vm_readv(parent, &raw const local, 1, &raw const remote, 1, 0) };
        ensure_eq!(read, 8, "process_vm_readv");
        ensure_eq!(found, 6, "what the child reads");
        Ok(())
    })?;
    join(child)?;
    ensure_eq!(value(&memory), 6, "the number");
    PASSED
}

fn pinned_then_written_through_proc_mem() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    let file = OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    let address = memory.as_ptr().addr() as u64;
    pin(&gpu, &memory, 1)?;
    file.write_all_at(&50_u64.to_ne_bytes(), address)?;
    execute_ok(&gpu, &[add(&memory, 1)])?;
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, address)?;
    ensure_eq!(u64::from_ne_bytes(bytes), 51, "what is read back");
    ensure_eq!(value(&memory), 51, "the number");
    PASSED
}

fn pinned_then_read_by_the_kernel() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    let (mut reader, writer) = pinion_tests::process::pipe()?;
    // As the source and as the destination of a system call.
    pin(&gpu, &memory, 1)?;
    // SAFETY: The memory is there.
    let written = unsafe { libc::write(writer.as_raw_fd(), memory.as_ptr().cast(), 8) };
    ensure_eq!(written, 8, "write");
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes)?;
    ensure_eq!(u64::from_ne_bytes(bytes), 6, "what was written");
    pin(&gpu, &memory, 1)?;
    let zero = File::open("/dev/zero")?;
    // SAFETY: The memory is there to be written to.
    let read = unsafe { libc::read(zero.as_raw_fd(), memory.as_ptr().cast(), 8) };
    ensure_eq!(read, 8, "read");
    ensure_eq!(value(&memory), 0, "the number");
    PASSED
}

fn pinned_then_advised_otherwise() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    pin(&gpu, &memory, 1)?;
    gpu.advise_atomics(memory.as_ptr(), 4096, Atomics::Unprotected)?;
    execute_ok(&gpu, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 7, "the number");
    gpu.advise_atomics(memory.as_ptr(), 4096, Atomics::Pin)?;
    pin(&gpu, &memory, 1)?;
    ensure_eq!(value(&memory), 8, "the number");
    PASSED
}

fn pinned_then_closed() -> TestResult {
    let memory = page_with(5)?;
    for round in 1..=50 {
        let gpu = open()?;
        let pfn = pagemap::pfn(memory.as_ptr())?;
        pin(&gpu, &memory, 1)?;
        drop(gpu);
        ensure_eq!(value(&memory), 5 + round, "the number");
        ensure_eq!(pagemap::pfn(memory.as_ptr())?, pfn, "where the page is");
    }
    PASSED
}

/// What the CPU maps as one, a program can say different things about.
fn a_part_of_a_huge_page_is_unprotected() -> TestResult {
    const HUGE: usize = 2 << 20;
    let gpu = open()?;
    let memory = Mapping::anonymous(2 * HUGE / 4096)?;
    memory.advise(libc::MADV_HUGEPAGE)?;
    let first = memory.as_ptr().align_offset(HUGE);
    memory.write(first, &vec![0; HUGE]);
    let half = first + HUGE / 2;
    gpu.advise_atomics(memory.at(first), HUGE / 2, Atomics::Unprotected)?;
    execute_ok(&gpu, &[Command::atomic_add(memory.at(first).cast::<u64>(), 1)])?;
    let page = gpu.query(memory.at(first), 4096)?[0];
    ensure!(
        page.state == PageState::Mirrored && page.rights.atomic,
        "what is unprotected: {page:?}"
    );
    for page in &gpu.query(memory.at(half), HUGE / 2)? {
        ensure!(!page.rights.atomic, "what is not: {page:?}");
    }
    execute_ok(&gpu, &[Command::atomic_add(memory.at(half).cast::<u64>(), 1)])?;
    let page = gpu.query(memory.at(half), 4096)?[0];
    ensure_eq!(page.state, PageState::Pinned, "what is not, afterwards");
    for offset in [first, half] {
        ensure_eq!(memory.atomic(offset).load(Ordering::Relaxed), 1, "the number");
    }
    PASSED
}

fn unprotected_memory_is_not_pinned() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(3)?;
    memory.write(0, &vec![0; memory.len()]);
    gpu.advise_atomics(memory.page(1), 4096, Atomics::Unprotected)?;
    execute_ok(
        &gpu,
        &[Command::atomic_add(memory.as_ptr().cast::<u64>(), 1)
            .repeat(3)
            .stride(4096)],
    )?;
    let states: Vec<_> = gpu
        .query(memory.as_ptr(), memory.len())?
        .iter()
        .map(|page| page.state)
        .collect();
    ensure_eq!(
        states,
        [PageState::Pinned, PageState::Mirrored, PageState::Pinned],
        "the pages"
    );
    ensure!(
        matches!(pagemap::entry(memory.page(1))?, Entry::Present(_)),
        "the CPU has it too"
    );
    PASSED
}

/// Kilobytes of anonymous memory that the process has.
fn resident() -> Result<i64, Failure> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .ok_or("no Anonymous")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn memory_accounting_is_the_same_after_a_round_trip() -> TestResult {
    const PAGES: usize = 256;
    let gpu = open()?;
    let memory = Mapping::anonymous(PAGES)?;
    memory.write(0, &vec![1; memory.len()]);
    let command = Command::atomic_add(memory.as_ptr().cast::<u64>(), 1)
        .repeat(PAGES as u32)
        .stride(4096);
    let round = || -> Result<(), Failure> {
        execute_ok(&gpu, &[command])?;
        let sum: u64 = (0..PAGES)
            .map(|page| memory.atomic(page * 4096).load(Ordering::Relaxed))
            .sum();
        ensure!(sum > 0, "the numbers");
        Ok(())
    };
    round()?;
    let (own, all) = (resident()?, crate::support::meminfo("AnonPages")?);
    for _ in 0..repeatedly(10) {
        round()?;
    }
    let (own_after, all_after) = (resident()?, crate::support::meminfo("AnonPages")?);
    ensure!(
        (own_after - own).abs() <= 64,
        "the process has {own_after} KiB, and had {own}"
    );
    ensure!(
        (all_after - all).abs() <= 512,
        "the system has {all_after} KiB, and had {all}"
    );
    PASSED
}

fn hand_over_under_contention() -> TestResult {
    const ROUNDS: u64 = 300;
    let gpu = open()?;
    let memory = page_with(0)?;
    let works = (0..4)
        .map(|_| submit(&gpu, &[add(&memory, 1).repeat(50)]))
        .collect::<Result<Vec<_>, _>>()?;
    let mut works = std::collections::VecDeque::from(works);
    let mut submitted = 4;
    let mut cpu = 0;
    while let Some(work) = works.pop_front() {
        loop {
            memory.atomic(0).fetch_add(1, Ordering::Relaxed);
            cpu += 1;
            match gpu.wait(work, Duration::ZERO) {
                Ok(completion) => break ensure!(completion.is_ok(), "{completion:x?}"),
                Err(error) if error.is_timeout() => {}
                Err(error) => return Err(error.into()),
            }
        }
        if submitted < ROUNDS {
            works.push_back(submit(&gpu, &[add(&memory, 1).repeat(50)])?);
            submitted += 1;
        }
    }
    ensure_eq!(
        value(&memory),
        cpu + submitted * 50,
        "the number after {cpu} increments by the CPU"
    );
    PASSED
}
