// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the GPU may access: what the process may, and nothing else.

use std::ptr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pinion_client::{Command, Gpu, PageState, Status};
use pinion_tests::{Failure, Mapping, patiently, repeatedly};

use crate::support::{
    PASSED, TestResult, add, ensure, ensure_eq, execute, execute_ok, expect_failure, fork, join, open,
    page_with, pin, soon, submit, tests, value,
};

tests! {
    memory_that_was_never_touched_reads_as_zero
    memory_that_was_never_touched_can_be_written
    a_page_that_was_only_read_can_be_written
    reading_mirrors_a_page
    read_only_memory_cannot_be_written
    inaccessible_memory_cannot_be_accessed
    unmapped_addresses_cannot_be_accessed
    odd_addresses_cannot_be_accessed
    a_fault_does_not_disturb_others
    a_failure_says_how_far_it_got
    protection_is_followed
    unmapping_is_followed
    remapping_is_followed
    copy_on_write_after_fork_is_followed
    an_atomic_operation_on_shared_memory_ends
    memory_in_a_huge_page
    two_processes_have_their_own_memory
    two_files_of_a_process_share_its_memory
}

fn memory_that_was_never_touched_reads_as_zero() -> TestResult {
    let gpu = open()?;
    let (source, target) = (Mapping::anonymous(2)?, Mapping::anonymous(2)?);
    target.write(0, &[0xff; 8192]);
    execute_ok(&gpu, &[Command::copy(source.as_ptr(), target.as_ptr(), 8192)])?;
    ensure_eq!(target.read(0, 8192) == [0; 8192], true, "zeroes arrived");
    PASSED
}

fn memory_that_was_never_touched_can_be_written() -> TestResult {
    let gpu = open()?;
    for atomic in [false, true] {
        let memory = Mapping::anonymous(1)?;
        let target = memory.as_ptr().cast::<u64>();
        execute_ok(
            &gpu,
            &[if atomic {
                Command::atomic_add(target, 6)
            } else {
                Command::fill(target, 1, 6_u64)
            }],
        )?;
        ensure_eq!(value(&memory), 6, "atomic: {atomic}");
        ensure_eq!(memory.read(8, 4088) == [0; 4088], true, "the rest is zero");
    }
    PASSED
}

fn a_page_that_was_only_read_can_be_written() -> TestResult {
    let gpu = open()?;
    for atomic in [false, true] {
        let memory = Mapping::anonymous(1)?;
        // Maps the zero page.
        ensure_eq!(value(&memory), 0, "new memory");
        let target = memory.as_ptr().cast::<u64>();
        execute_ok(
            &gpu,
            &[if atomic {
                Command::atomic_add(target, 6)
            } else {
                Command::fill(target, 1, 6_u64)
            }],
        )?;
        ensure_eq!(value(&memory), 6, "atomic: {atomic}");
        ensure_eq!(value(&Mapping::anonymous(1)?), 0, "the zero page");
    }
    PASSED
}

fn reading_mirrors_a_page() -> TestResult {
    let gpu = open()?;
    let (source, target) = (page_with(1)?, page_with(2)?);
    ensure_eq!(
        gpu.query(source.as_ptr(), 4096)?[0].state,
        PageState::Cpu,
        "at first"
    );
    execute_ok(&gpu, &[Command::copy(source.as_ptr(), target.as_ptr(), 8)])?;
    for (name, memory) in [("source", &source), ("target", &target)] {
        let page = gpu.query(memory.as_ptr(), 4096)?[0];
        ensure_eq!(page.state, PageState::Mirrored, "{name}");
        ensure!(page.rights.read && !page.rights.atomic, "{name}: {page:?}");
    }
    ensure!(
        gpu.query(target.as_ptr(), 4096)?[0].rights.write,
        "the target can be written"
    );
    // The CPU goes on to use both.
    source.atomic(0).store(3, Ordering::Relaxed);
    execute_ok(&gpu, &[Command::copy(source.as_ptr(), target.as_ptr(), 8)])?;
    ensure_eq!(value(&target), 3, "what the CPU wrote meanwhile");
    PASSED
}

/// All commands that write to an address.
fn writes(target: *mut u8) -> Result<[Command; 3], Failure> {
    static SOURCE: u64 = 0x77;
    Ok([
        Command::fill(target, 8, 0x77_u8),
        Command::copy((&raw const SOURCE).cast(), target, 8),
        Command::atomic_add(target.cast::<u64>(), 1),
    ])
}

fn read_only_memory_cannot_be_written() -> TestResult {
    let memory = page_with(5)?;
    memory.protect(libc::PROT_READ)?;
    for command in writes(memory.as_ptr())? {
        expect_failure(command, Status::Fault, memory.as_ptr().addr() as u64)?;
    }
    ensure_eq!(value(&memory), 5, "the number");
    // It can be read.
    let target = page_with(0)?;
    execute_ok(&open()?, &[Command::copy(memory.as_ptr(), target.as_ptr(), 8)])?;
    ensure_eq!(value(&target), 5, "the copy");
    PASSED
}

fn inaccessible_memory_cannot_be_accessed() -> TestResult {
    let memory = page_with(5)?;
    memory.protect(libc::PROT_NONE)?;
    let target = page_with(6)?;
    let address = memory.as_ptr().addr() as u64;
    for command in writes(memory.as_ptr())? {
        expect_failure(command, Status::Fault, address)?;
    }
    expect_failure(
        Command::copy(memory.as_ptr(), target.as_ptr(), 8),
        Status::Fault,
        address,
    )?;
    memory.protect(libc::PROT_READ)?;
    ensure_eq!((value(&memory), value(&target)), (5, 6), "the numbers");
    PASSED
}

fn unmapped_addresses_cannot_be_accessed() -> TestResult {
    let target = page_with(6)?;
    // The last has neighbours on both sides.
    let around = Mapping::anonymous(3)?;
    around.write(0, &vec![1; around.len()]);
    let gap = around.page(1);
    // SAFETY: It is ours, and nothing refers to it.
    unsafe { libc::munmap(gap.cast(), 4096) };
    for address in [ptr::null_mut(), ptr::without_provenance_mut(0x1000), gap] {
        for command in writes(address)? {
            expect_failure(command, Status::Fault, address.addr() as u64)?;
        }
        expect_failure(
            Command::copy(address, target.as_ptr(), 8),
            Status::Fault,
            address.addr() as u64,
        )?;
    }
    ensure_eq!(value(&target), 6, "the target");
    PASSED
}

fn odd_addresses_cannot_be_accessed() -> TestResult {
    // The kernel's half, addresses that are not canonical, and the end of what the GPU can address.
    let (high, end) = (0xffff_8880_0000_0000_usize, 1_usize << 48);
    for address in [high, end, end - 8, 1 << 47, usize::MAX - 7, 1 << 63] {
        let target: *mut u64 = ptr::without_provenance_mut(address);
        let completion = execute(&open()?, &[Command::fill(target, 1, 1_u64)])?;
        let status = completion.status;
        ensure!(
            [Status::Fault, Status::BadAddress, Status::Invalid].contains(&status),
            "{address:#x}: {completion:x?}"
        );
    }
    PASSED
}

fn a_fault_does_not_disturb_others() -> TestResult {
    let (good, bad) = (open()?, open()?);
    let memory = page_with(0)?;
    let nowhere: *mut u64 = ptr::without_provenance_mut(0x1000);
    let works = [
        submit(&good, &[add(&memory, 1).repeat(100_000)])?,
        submit(&bad, &[Command::fill(nowhere, 1, 1_u64)])?,
        submit(&good, &[add(&memory, 1).repeat(100_000)])?,
    ];
    ensure_eq!(bad.wait(works[1], soon())?.status, Status::Fault, "the bad one");
    ensure_eq!(good.wait(works[0], soon())?.status, Status::Ok, "the good one");
    ensure_eq!(good.wait(works[2], soon())?.status, Status::Ok, "the good one");
    ensure_eq!(value(&memory), 200_000, "the number");
    PASSED
}

fn a_failure_says_how_far_it_got() -> TestResult {
    let memory = Mapping::anonymous(2)?;
    memory.write(0, &vec![0; memory.len()]);
    let hole = memory.page(1);
    // SAFETY: It is ours, and nothing refers to it.
    unsafe { libc::munmap(hole.cast(), 4096) };
    // Places 0 to 3 are in the first page, the next one in the hole.
    let gpu = open()?;
    let completion = execute(
        &gpu,
        &[
            Command::nop(),
            Command::atomic_add(memory.as_ptr().cast::<u64>(), 1)
                .repeat(100)
                .stride(1024),
            Command::nop(),
        ],
    )?;
    ensure_eq!(completion.status, Status::Fault, "{completion:x?}");
    ensure_eq!(
        (completion.executed, completion.repeats),
        (1, 4),
        "{completion:x?}"
    );
    ensure_eq!(completion.fault_address, hole.addr() as u64, "{completion:x?}");
    for place in 0..4 {
        ensure_eq!(
            memory.atomic(place * 1024).load(Ordering::Relaxed),
            1,
            "place {place}"
        );
    }
    PASSED
}

/// Works on a page in a way that leaves it mapped for the GPU, and pinned or not.
fn have_mapped(gpu: &Gpu, memory: &Mapping, pinned: bool) -> Result<(), Failure> {
    if pinned {
        pin(gpu, memory, 0)?;
        return Ok(());
    }
    execute_ok(gpu, &[Command::copy(memory.as_ptr(), memory.as_ptr(), 8)])?;
    ensure_eq!(
        gpu.query(memory.as_ptr(), 1)?[0].state,
        PageState::Mirrored,
        "after a copy"
    );
    Ok(())
}

fn protection_is_followed() -> TestResult {
    for pinned in [false, true] {
        let gpu = open()?;
        let memory = page_with(5)?;
        have_mapped(&gpu, &memory, pinned)?;
        memory.protect(libc::PROT_READ)?;
        memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        execute_ok(&gpu, &[Command::fill(memory.as_ptr().cast(), 1, 6_u64)])?;
        memory.protect(libc::PROT_READ)?;
        let completion = execute(&gpu, &[Command::fill(memory.as_ptr().cast(), 1, 7_u64)])?;
        ensure_eq!(
            completion.status,
            Status::Fault,
            "pinned: {pinned}, a write to what is now read-only"
        );
        ensure_eq!(value(&memory), 6, "pinned: {pinned}");
    }
    PASSED
}

fn unmapping_is_followed() -> TestResult {
    for pinned in [false, true] {
        let gpu = open()?;
        let memory = page_with(5)?;
        let address = memory.as_ptr();
        have_mapped(&gpu, &memory, pinned)?;
        drop(memory);
        let completion = execute(&gpu, &[Command::fill(address.cast(), 1, 7_u64)])?;
        ensure_eq!(
            completion.status,
            Status::Fault,
            "pinned: {pinned}, a write to what is unmapped"
        );
    }
    PASSED
}

/// What used to be mapped at an address must be out of the GPU's reach when something else is.
fn remapping_is_followed() -> TestResult {
    let gpu = open()?;
    let result = page_with(0)?;
    let address = Mapping::anonymous(1)?.as_ptr().addr();
    for round in 1..repeatedly(200) as u64 {
        let memory = Mapping::new(
            Some(address),
            1,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        )?;
        memory.atomic(0).store(round, Ordering::Relaxed);
        if round % 2 == 0 {
            execute_ok(&gpu, &[add(&memory, 1000)])?;
        } else {
            execute_ok(&gpu, &[Command::fill(memory.at(8).cast(), 1, round)])?;
        }
        execute_ok(&gpu, &[Command::copy(memory.as_ptr(), result.as_ptr(), 8)])?;
        let expected = if round % 2 == 0 { round + 1000 } else { round };
        ensure_eq!(value(&result), expected, "what the GPU reads in round {round}");
        ensure_eq!(value(&memory), expected, "what the CPU reads in round {round}");
    }
    PASSED
}

fn copy_on_write_after_fork_is_followed() -> TestResult {
    for pinned in [false, true] {
        let gpu = open()?;
        let memory = page_with(5)?;
        have_mapped(&gpu, &memory, pinned)?;
        // From here on parent and child share the page.
        let child = fork(|| {
            std::thread::sleep(Duration::from_millis(300));
            ensure_eq!(value(&memory), 5, "pinned: {pinned}, what the child sees");
            Ok(())
        })?;
        execute_ok(&gpu, &[Command::fill(memory.as_ptr().cast(), 1, 6_u64)])?;
        execute_ok(&gpu, &[add(&memory, 1)])?;
        join(child)?;
        ensure_eq!(value(&memory), 7, "pinned: {pinned}, what the parent sees");
    }
    PASSED
}

/// It cannot be pinned. However that ends, it must end, and must be true.
fn an_atomic_operation_on_shared_memory_ends() -> TestResult {
    let gpu = open()?;
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    );
    let memory = Mapping::new(None, 1, protection, flags)?;
    memory.atomic(0).store(5, Ordering::Relaxed);
    let started = Instant::now();
    let completion = execute(&gpu, &[add(&memory, 1)])?;
    let expected = match completion.status {
        Status::Ok => 6,
        Status::NotExclusive => 5,
        _ => return Err(format!("{completion:x?}").into()),
    };
    ensure_eq!(value(&memory), expected, "the number after {completion:x?}");
    ensure!(
        started.elapsed() < patiently(Duration::from_secs(5)),
        "only after {:?}",
        started.elapsed()
    );
    PASSED
}

fn memory_in_a_huge_page() -> TestResult {
    const HUGE: usize = 2 << 20;
    let gpu = open()?;
    let memory = Mapping::anonymous(2 * HUGE / 4096)?;
    memory.advise(libc::MADV_HUGEPAGE)?;
    let first = memory.as_ptr().align_offset(HUGE);
    for page in (0..HUGE).step_by(4096) {
        memory.atomic(first + page).store(page as u64, Ordering::Relaxed);
    }
    let at = |offset: usize| memory.at(first + offset).cast::<u64>();
    // Some here and there, then all of it.
    let few = [0, 4096, HUGE / 2, HUGE - 4096].map(|offset| Command::atomic_add(at(offset), 1));
    execute_ok(&gpu, &few[..few.len().min(gpu.info()?.max_batch as usize)])?;
    execute_ok(&gpu, &[Command::atomic_add(at(0), 1).repeat(512).stride(4096)])?;
    for page in (0..HUGE).step_by(4096) {
        let extra = if [0, 4096, HUGE / 2, HUGE - 4096].contains(&page) {
            2
        } else {
            1
        };
        let found = memory.atomic(first + page).load(Ordering::Relaxed);
        ensure_eq!(found, page as u64 + extra, "at {page:#x}");
    }
    PASSED
}

fn two_processes_have_their_own_memory() -> TestResult {
    let memory = page_with(5)?;
    let child = fork(|| {
        // The same address, and not the same memory.
        let gpu = open()?;
        memory.atomic(0).store(100, Ordering::Relaxed);
        for round in 1..=200 {
            execute_ok(&gpu, &[add(&memory, 1)])?;
            if round % 3 == 0 {
                ensure_eq!(value(&memory), 100 + round, "what the child sees");
            }
        }
        ensure_eq!(value(&memory), 300, "what the child sees");
        Ok(())
    })?;
    let gpu = open()?;
    for round in 1..=200 {
        execute_ok(&gpu, &[add(&memory, 1)])?;
        if round % 5 == 0 {
            ensure_eq!(value(&memory), 5 + round, "what the parent sees");
        }
    }
    join(child)?;
    ensure_eq!(value(&memory), 205, "what the parent sees");
    PASSED
}

fn two_files_of_a_process_share_its_memory() -> TestResult {
    let (first, second) = (open()?, open()?);
    let memory = page_with(5)?;
    for round in 1..=50 {
        execute_ok(&first, &[add(&memory, 1)])?;
        execute_ok(&second, &[add(&memory, 1)])?;
        if round % 5 == 0 {
            ensure_eq!(value(&memory), 5 + 2 * round, "the number");
        }
    }
    // Both at a time.
    let works = [
        submit(&first, &[add(&memory, 1).repeat(5000)])?,
        submit(&second, &[add(&memory, 1).repeat(5000)])?,
    ];
    ensure_eq!(first.wait(works[0], soon())?.status, Status::Ok, "the first");
    ensure_eq!(second.wait(works[1], soon())?.status, Status::Ok, "the second");
    ensure_eq!(value(&memory), 5 + 100 + 10_000, "the number");
    PASSED
}
