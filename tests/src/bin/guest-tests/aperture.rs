// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of the process in the part of VRAM that the CPU can access too.

use std::io::{Read as _, Write as _};
use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::{Command, Gpu, Location, PageState, Status};
use pinion_tests::{Failure, Mapping, process};

use crate::support::{
    Outcome, PASSED, Test, TestResult, add, ensure, ensure_eq, execute, execute_ok, fork, join, meminfo, open,
};
use crate::vram::{
    HUGE, check, copy_and_check, count_together, fill, memory_of, pages_in, pattern, prefer, prefetch,
};

/// These want a device with an aperture that is smaller than its VRAM, and both small (`--vram 32M --aperture 8M`). They run
/// only when they are asked for by name.
pub(crate) const TESTS: &[Test] = &[
    ("aperture_is_reported", reported),
    ("aperture_memory_is_shared", shared),
    ("aperture_memory_begins_as_zeros", begins_as_zeros),
    ("aperture_counters_lose_nothing", counters),
    ("aperture_and_the_rest_of_vram", two_kinds),
    ("aperture_holds_four_times_as_much", four_times_as_much),
    ("aperture_pages_of_two_files", two_files),
    ("aperture_then_forked", forked),
    ("aperture_then_write_protected", write_protected),
    ("aperture_then_moved", moved),
    ("aperture_then_unmapped_in_part", unmapped_in_part),
    ("aperture_then_accessed_by_the_kernel", accessed_by_the_kernel),
    ("aperture_then_pinned_for_long", pinned_for_long),
    ("aperture_then_closed", closed),
    ("aperture_accounting", accounting),
    ("aperture_is_free_after_processes_were_killed", killed),
    ("aperture_then_unbound", unbound),
];

const BOTH: [i32; 2] = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE];

/// How much of the memory is in the aperture, in pages.
fn there(gpu: &Gpu, memory: &Mapping) -> Result<usize, Failure> {
    pages_in(gpu, memory, PageState::Coherent)
}

/// Memory in the aperture, with the pattern in it.
fn in_aperture(count: usize, advice: i32, seed: u64) -> Result<(Gpu, Mapping), Failure> {
    let gpu = open()?;
    let memory = memory_of(count, advice)?;
    fill(&memory, seed);
    prefer(&gpu, &memory, Location::Aperture)?;
    prefetch(&gpu, &memory, Location::Aperture)?;
    ensure_eq!(there(&gpu, &memory)?, memory.pages(), "pages in the aperture");
    Ok((gpu, memory))
}

/// No page has come home.
fn none_came_home(gpu: &Gpu) -> Result<(), Failure> {
    ensure_eq!(gpu.statistics()?.from_vram, 0, "pages that have come home");
    Ok(())
}

fn reported() -> TestResult {
    let info = open()?.info()?;
    ensure!(
        (1 << 20..=8 << 20).contains(&info.aperture_size) && info.aperture_size < info.vram_size,
        "this takes a device with a small aperture (--vram 32M --aperture 8M): {info:?}"
    );
    ensure!(info.locations.contains(&Location::Aperture), "{info:?}");
    ensure!(info.locations.contains(&Location::Vram), "{info:?}");
    PASSED
}

fn shared() -> TestResult {
    for advice in BOTH {
        let gpu = open()?;
        let memory = memory_of(2, advice)?;
        fill(&memory, 1);
        prefer(&gpu, &memory, Location::Aperture)?;
        ensure_eq!(there(&gpu, &memory)?, 0, "pages in the aperture before");
        copy_and_check(&gpu, &memory, 1)?;
        ensure_eq!(there(&gpu, &memory)?, memory.pages(), "pages in the aperture");
        let (faults, moved) = (gpu.statistics()?.faults, gpu.statistics()?.to_vram);
        ensure_eq!(moved, memory.pages() as u64, "pages that have moved");
        let source = Mapping::anonymous(memory.pages())?;
        for seed in 2..5 {
            // What the CPU writes the GPU reads, and the other way round, with nobody moving anything.
            fill(&memory, seed);
            copy_and_check(&gpu, &memory, seed)?;
            fill(&source, seed + 10);
            execute_ok(
                &gpu,
                &[Command::copy(source.as_ptr(), memory.as_ptr(), memory.len())],
            )?;
            check(&memory, seed + 10)?;
        }
        ensure_eq!(
            there(&gpu, &memory)?,
            memory.pages(),
            "pages in the aperture after"
        );
        ensure_eq!(gpu.statistics()?.to_vram, moved, "pages that have moved after");
        none_came_home(&gpu)?;
        // Those of the copies and of the source; none on what is in the aperture.
        let fresh = Mapping::anonymous(1)?;
        let faults_before = gpu.statistics()?.faults;
        execute_ok(&gpu, &[add(&memory, 1), add(&memory, u64::MAX)])?;
        ensure_eq!(gpu.statistics()?.faults, faults_before, "faults in the aperture");
        execute_ok(&gpu, &[Command::copy(memory.as_ptr(), fresh.as_ptr(), 8)])?;
        ensure!(gpu.statistics()?.faults > faults, "no faults at all");
        check(&memory, 14)?;
        prefetch(&gpu, &memory, Location::System)?;
        ensure_eq!(there(&gpu, &memory)?, 0, "pages in the aperture at the end");
        ensure_eq!(gpu.statistics()?.from_vram, moved, "pages that have come home");
        check(&memory, 14)?;
    }
    PASSED
}

fn begins_as_zeros() -> TestResult {
    for advice in BOTH {
        // Something else is there before.
        drop(in_aperture(3, advice, 5)?);
        let gpu = open()?;
        let memory = memory_of(3, advice)?;
        prefer(&gpu, &memory, Location::Aperture)?;
        prefetch(&gpu, &memory, Location::Aperture)?;
        ensure_eq!(there(&gpu, &memory)?, memory.pages(), "pages in the aperture");
        let bytes = memory.read(0, memory.len());
        ensure_eq!(
            bytes.iter().position(|byte| *byte != 0),
            None,
            "a byte that is not zero"
        );
        none_came_home(&gpu)?;
    }
    PASSED
}

fn counters() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(1)?;
    prefer(&gpu, &memory, Location::Aperture)?;
    count_together(&gpu, &memory)?;
    ensure_eq!(there(&gpu, &memory)?, 1, "pages in the aperture");
    let statistics = gpu.statistics()?;
    ensure_eq!(statistics.to_vram, 1, "pages that have moved");
    ensure_eq!(statistics.pins, 0, "pages that were pinned");
    none_came_home(&gpu).map(|()| Outcome::Passed)
}

fn two_kinds() -> TestResult {
    let gpu = open()?;
    for advice in BOTH {
        let memory = memory_of(2, advice)?;
        fill(&memory, 6);
        for (place, state) in [
            (Location::Vram, PageState::Vram),
            (Location::Aperture, PageState::Coherent),
            (Location::System, PageState::Cpu),
            (Location::Aperture, PageState::Coherent),
        ] {
            prefetch(&gpu, &memory, place)?;
            if place != Location::System {
                ensure_eq!(
                    pages_in(&gpu, &memory, state)?,
                    memory.pages(),
                    "pages in {place:?}"
                );
            }
            copy_and_check(&gpu, &memory, 6)?;
        }
        check(&memory, 6)?;
    }
    PASSED
}

fn four_times_as_much() -> TestResult {
    let gpu = open()?;
    let aperture = gpu.info()?.aperture_size as usize;
    let memory = memory_of(4 * aperture / HUGE, libc::MADV_NOHUGEPAGE)?;
    fill(&memory, 7);
    prefer(&gpu, &memory, Location::Aperture)?;
    for round in 1..=2 {
        for start in (0..memory.len()).step_by(HUGE) {
            let work = Command::atomic_add(memory.at(start).cast::<u64>(), 1);
            execute_ok(&gpu, &[work.repeat(512).stride(4096)])?;
        }
        let pages = there(&gpu, &memory)?;
        ensure!(
            pages > 0 && pages <= aperture / 4096,
            "{pages} pages in the aperture in round {round}"
        );
        for page in 0..memory.pages() {
            let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
            ensure_eq!(found, pattern(7, page * 512).wrapping_add(round), "page {page}");
        }
    }
    let statistics = gpu.statistics()?;
    ensure!(statistics.evictions > 0, "nothing had to make room");
    for page in 0..memory.pages() {
        memory.atomic(page * 4096).fetch_sub(2, Ordering::Relaxed);
    }
    check(&memory, 7).map(|()| Outcome::Passed)
}

fn two_files() -> TestResult {
    let (one, memory) = in_aperture(1, libc::MADV_NOHUGEPAGE, 8)?;
    let two = open()?;
    let work = add(&memory, 1).repeat(512).stride(4096);
    for round in 0..5 {
        execute_ok(&one, &[work])?;
        execute_ok(&two, &[work])?;
        ensure_eq!(there(&two, &memory)?, memory.pages(), "pages that both have");
        // Both have to hear of this, whoever asks for it.
        prefetch(
            if round % 2 == 0 { &one } else { &two },
            &memory,
            Location::System,
        )?;
        let other = open()?;
        ensure_eq!(there(&two, &memory)?, 0, "pages that have stayed");
        execute_ok(&two, &[work])?;
        prefetch(&other, &memory, Location::Aperture)?;
        execute_ok(&one, &[work])?;
        drop(other);
        prefetch(&one, &memory, Location::Aperture)?;
    }
    for page in 0..memory.pages() {
        memory.atomic(page * 4096).fetch_sub(20, Ordering::Relaxed);
    }
    check(&memory, 8).map(|()| Outcome::Passed)
}

fn forked() -> TestResult {
    for advice in BOTH {
        let (gpu, memory) = in_aperture(2, advice, 9)?;
        let (mut started, mut go) = process::pipe()?;
        let first = fork(|| {
            check(&memory, 9)?;
            fill(&memory, 10);
            check(&memory, 10)
        })?;
        join(first)?;
        let second = fork(|| {
            started.read_exact(&mut [0])?;
            check(&memory, 9)?;
            // In its own right, and with what it shares.
            let gpu = open()?;
            copy_and_check(&gpu, &memory, 9)?;
            execute_ok(&gpu, &[add(&memory, 1)])?;
            ensure_eq!(
                memory.atomic(0).load(Ordering::Relaxed),
                pattern(9, 0) + 1,
                "the child's"
            );
            Ok(())
        })?;
        copy_and_check(&gpu, &memory, 9)?;
        let source = memory_of(2, advice)?;
        fill(&source, 11);
        execute_ok(
            &gpu,
            &[Command::copy(source.as_ptr(), memory.as_ptr(), memory.len())],
        )?;
        go.write_all(&[0])?;
        join(second)?;
        check(&memory, 11)?;
        prefetch(&gpu, &memory, Location::System)?;
        check(&memory, 11)?;
    }
    PASSED
}

fn write_protected() -> TestResult {
    let (gpu, memory) = in_aperture(1, libc::MADV_NOHUGEPAGE, 12)?;
    memory.protect(libc::PROT_READ)?;
    copy_and_check(&gpu, &memory, 12)?;
    let completion = execute(&gpu, &[add(&memory, 1)])?;
    ensure_eq!(completion.status, Status::Fault, "writing");
    check(&memory, 12)?;
    memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    let gpu = open()?;
    execute_ok(&gpu, &[add(&memory, 1), add(&memory, u64::MAX)])?;
    check(&memory, 12).map(|()| Outcome::Passed)
}

fn moved() -> TestResult {
    let (gpu, mut memory) = in_aperture(1, libc::MADV_NOHUGEPAGE, 13)?;
    let old = memory.as_ptr();
    memory.remap()?;
    check(&memory, 13)?;
    copy_and_check(&gpu, &memory, 13)?;
    ensure_eq!(there(&gpu, &memory)?, memory.pages(), "pages in the aperture");
    let copy = Mapping::anonymous(1)?;
    let completion = execute(&open()?, &[Command::copy(old, copy.as_ptr(), 8)])?;
    ensure_eq!(completion.status, Status::Fault, "where it was");
    none_came_home(&gpu)?;
    prefetch(&gpu, &memory, Location::System)?;
    ensure_eq!(there(&gpu, &memory)?, 0, "pages in the aperture at the end");
    check(&memory, 13).map(|()| Outcome::Passed)
}

fn unmapped_in_part() -> TestResult {
    for advice in BOTH {
        let (gpu, memory) = in_aperture(2, advice, 14)?;
        let third = memory.len() / 4096 / 3 * 4096;
        // SAFETY: The memory is accessed through raw pointers only: its content may change.
        let dropped = unsafe { libc::madvise(memory.at(third).cast(), third, libc::MADV_DONTNEED) };
        ensure_eq!(dropped, 0, "madvise");
        let zeros = memory.read(third, third);
        ensure!(zeros.iter().all(|byte| *byte == 0), "something is left");
        // The GPU sees the same.
        let copy = Mapping::anonymous(memory.pages())?;
        execute_ok(
            &gpu,
            &[Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len())],
        )?;
        ensure!(
            copy.read(0, copy.len()) == memory.read(0, memory.len()),
            "the GPU sees something else"
        );
        for word in (0..third / 8).chain(2 * third / 8..memory.len() / 8) {
            let found = memory.atomic(word * 8).load(Ordering::Relaxed);
            ensure_eq!(found, pattern(14, word), "what is at {:#x}", word * 8);
        }
    }
    PASSED
}

fn accessed_by_the_kernel() -> TestResult {
    let (gpu, memory) = in_aperture(1, libc::MADV_NOHUGEPAGE, 15)?;
    let (mut from, mut to) = process::pipe()?;
    // The pipe refers to the pages themselves.
    let vector = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: 8 * 4096,
    };
    // SAFETY: The vector is valid, and so is what it describes.
    let spliced = unsafe { libc::vmsplice(std::os::fd::AsRawFd::as_raw_fd(&to), &raw const vector, 1, 0) };
    ensure_eq!(spliced, 8 * 4096, "vmsplice: {}", std::io::Error::last_os_error());
    // Somebody has references to these, so they stay. They must not be lost over that.
    prefetch(&gpu, &memory, Location::System)?;
    check(&memory, 15)?;
    let stayed = there(&gpu, &memory)?;
    ensure_eq!(stayed, 8, "pages that somebody refers to");
    let mut bytes = vec![0; 8 * 4096];
    from.read_exact(&mut bytes)?;
    ensure!(
        bytes == memory.read(0, bytes.len()),
        "the pipe had something else"
    );
    prefetch(&gpu, &memory, Location::Aperture)?;
    // Another process, through the kernel.
    let other = fork(|| {
        let parent = std::os::unix::process::parent_id() as i32;
        let mut bytes = vec![0_u8; 4096];
        let local = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let remote = libc::iovec {
            iov_base: memory.as_ptr().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: Both are valid; the one in the parent is at the same place.
        let read = unsafe { libc::process_vm_readv(parent, &raw const local, 1, &raw const remote, 1, 0) };
        ensure_eq!(read, 4096, "process_vm_readv");
        bytes.reverse();
        // SAFETY: As above.
        let written =
            unsafe { libc::process_vm_writev(parent, &raw const local, 1, &raw const remote, 1, 0) };
        ensure_eq!(written, 4096, "process_vm_writev");
        Ok(())
    })?;
    join(other)?;
    let mut expected = bytes[..4096].to_vec();
    expected.reverse();
    ensure!(
        memory.read(0, 4096) == expected,
        "what the other process has written"
    );
    let copy = Mapping::anonymous(1)?;
    execute_ok(&gpu, &[Command::copy(memory.as_ptr(), copy.as_ptr(), 4096)])?;
    ensure!(copy.read(0, 4096) == expected, "the GPU sees something else");
    to.write_all(&bytes[..4096])?;
    // SAFETY: The memory is mapped, and nothing else accesses it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), 4096) };
    from.read_exact(bytes)?;
    check(&memory, 15)?;
    PASSED
}

/// A long-term pin (here of a buffer that is registered with `io_uring`) has the kernel move the pages home.
fn pinned_for_long() -> TestResult {
    const REGISTER_BUFFERS: u32 = 0;
    let (gpu, memory) = in_aperture(1, libc::MADV_NOHUGEPAGE, 16)?;
    let pages = 16;
    let mut parameters = [0_u8; 120];
    // SAFETY: `struct io_uring_params` is as long as this.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    if ring < 0 {
        let error = std::io::Error::last_os_error();
        ensure_eq!(error.raw_os_error(), Some(libc::ENOSYS), "io_uring_setup");
        return Ok(Outcome::Skipped("this kernel has no io_uring".to_owned()));
    }
    let vector = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: pages * 4096,
    };
    // SAFETY: The vector is valid, and the memory stays for as long as the ring.
    let registered = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring,
            REGISTER_BUFFERS,
            &raw const vector,
            1,
        )
    };
    ensure_eq!(registered, 0, "registering: {}", std::io::Error::last_os_error());
    ensure_eq!(
        there(&gpu, &memory)?,
        memory.pages() - pages,
        "pages that have stayed"
    );
    check(&memory, 16)?;
    // The GPU follows, and they cannot be had back as long as they are pinned.
    execute_ok(
        &gpu,
        &[Command::fill(memory.as_ptr().cast::<u64>(), 1, pattern(17, 0))],
    )?;
    ensure_eq!(
        memory.atomic(0).load(Ordering::Relaxed),
        pattern(17, 0),
        "what the GPU has written"
    );
    prefetch(&gpu, &memory, Location::Aperture)?;
    ensure_eq!(
        there(&gpu, &memory)?,
        memory.pages() - pages,
        "pages in the aperture"
    );
    // SAFETY: It is ours, and nobody else's.
    unsafe { libc::close(ring as i32) };
    memory.atomic(0).store(pattern(16, 0), Ordering::Relaxed);
    copy_and_check(&gpu, &memory, 16)?;
    check(&memory, 16).map(|()| Outcome::Passed)
}

fn closed() -> TestResult {
    for advice in BOTH {
        let (gpu, memory) = in_aperture(2, advice, 18)?;
        drop(gpu);
        check(&memory, 18)?;
        let gpu = open()?;
        execute_ok(&gpu, &[add(&memory, 0)])?;
        ensure_eq!(there(&gpu, &memory)?, 0, "pages in the aperture");
        copy_and_check(&gpu, &memory, 18)?;
        check(&memory, 18)?;
    }
    PASSED
}

fn accounting() -> TestResult {
    for advice in BOTH {
        let gpu = open()?;
        let memory = memory_of(2, advice)?;
        fill(&memory, 19);
        let rss = || -> Result<u64, Failure> {
            let text = std::fs::read_to_string("/proc/self/status")?;
            let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            Ok(line.ok_or("no RssAnon")?.trim().trim_end_matches(" kB").parse()?)
        };
        let (own, all) = (rss()?, meminfo("AnonPages")?);
        for _ in 0..5 {
            prefetch(&gpu, &memory, Location::Aperture)?;
            ensure_eq!(there(&gpu, &memory)?, memory.pages(), "pages in the aperture");
            let there = rss()?;
            ensure!(
                there.abs_diff(own) <= 512,
                "{there} KiB in the aperture, and had {own}"
            );
            prefetch(&gpu, &memory, Location::System)?;
            check(&memory, 19)?;
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

fn killed() -> TestResult {
    let aperture = open()?.info()?.aperture_size as usize;
    // Three quarters of it each time: without eviction there is room only if it comes back.
    for round in 0..4 {
        let (mut ready, mut told) = process::pipe()?;
        let child = fork(|| {
            let (gpu, _memory) = in_aperture(aperture / HUGE * 3 / 4, libc::MADV_NOHUGEPAGE, round)?;
            ensure_eq!(gpu.statistics()?.evictions, 0, "evictions");
            told.write_all(&[0])?;
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        })?;
        ready.read_exact(&mut [0])?;
        // With it goes the child.
        drop(child);
    }
    PASSED
}

/// Without its driver the device has nothing of the process any more, and with it again it has an aperture again.
fn unbound() -> TestResult {
    let driver = std::path::Path::new("/sys/bus/virtio/drivers/pinion");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(driver)? {
        let name = entry?.file_name();
        if name.to_string_lossy().starts_with("virtio") {
            names.push(name);
        }
    }
    ensure_eq!(names.len(), 1, "devices that the driver has");
    for advice in BOTH {
        let (gpu, memory) = in_aperture(2, advice, 20)?;
        let other = memory_of(2, advice)?;
        fill(&other, 21);
        prefetch(&gpu, &other, Location::Vram)?;
        ensure_eq!(
            pages_in(&gpu, &other, PageState::Vram)?,
            other.pages(),
            "pages in VRAM"
        );
        std::fs::write(driver.join("unbind"), names[0].as_encoded_bytes())?;
        check(&memory, 20)?;
        check(&other, 21)?;
        drop(gpu);
        check(&memory, 20)?;
        std::fs::write(driver.join("bind"), names[0].as_encoded_bytes())?;
        check(&memory, 20)?;
    }
    drop(in_aperture(1, BOTH[0], 22)?);
    PASSED
}
