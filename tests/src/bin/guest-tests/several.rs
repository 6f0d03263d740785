// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two GPUs in one guest: each for itself, and both on the same memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pinion_client::{Atomics, Command, Gpu, Location, PageState, Status};
use pinion_tests::{DEVICE, Failure, Mapping};

use crate::support::{
    Outcome, PASSED, Test, TestResult, add, ensure_eq, execute, execute_ok, fork, join, open, page_with,
    soon, submit, value,
};

/// These want a second GPU, and run only when they are asked for by name.
pub(crate) const TESTS: &[Test] = &[
    ("two_gpus_work_independently", independent),
    ("two_gpus_take_pages_from_each_other", by_turns),
    ("two_gpus_move_memory_from_vram_to_vram", from_vram_to_vram),
    ("two_gpus_contend_for_a_page", contended),
    ("apertures_of_two_gpus", apertures),
];

fn both() -> Result<[Gpu; 2], Failure> {
    Ok([open()?, Gpu::open(DEVICE.replace('0', "1"))?])
}

/// How many pages of the memory are in a state, as that GPU sees it.
fn pages_in(gpu: &Gpu, memory: &Mapping, state: PageState) -> Result<usize, Failure> {
    let pages = gpu.query(memory.as_ptr(), memory.len())?;
    Ok(pages.iter().filter(|page| page.state == state).count())
}

fn independent() -> TestResult {
    let [one, two] = both()?;
    // What one cannot do is no concern of the other, nor is its end.
    let completion = execute(&one, &[Command::atomic_add(0x1000 as *mut u64, 1)])?;
    ensure_eq!(completion.status, Status::Fault, "where nothing is");
    let memory = page_with(1)?;
    execute_ok(&two, &[add(&memory, 1)])?;
    drop(one);
    execute_ok(&two, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 3, "the number");

    // Each with a process of its own, at the same time.
    let work = |number: usize| {
        let gpu = &both()?[number];
        for round in 0..20 {
            let memory = Mapping::anonymous(64)?;
            let work = add(&memory, round).repeat(64).stride(4096);
            execute_ok(gpu, &[work, work])?;
            for page in 0..64 {
                let found = memory.atomic(page * 4096).load(Ordering::Relaxed);
                ensure_eq!(found, 2 * round, "page {page} in round {round}");
            }
        }
        Ok(())
    };
    let children = [fork(|| work(0))?, fork(|| work(1))?];
    for child in children {
        join(child)?;
    }
    PASSED
}

fn by_turns() -> TestResult {
    let ways = [
        (Atomics::Pin, PageState::Pinned),
        (Atomics::Exclusive, PageState::Exclusive),
        (Atomics::Migrate, PageState::Vram),
    ];
    for (how, state) in ways {
        let gpus = both()?;
        let memory = Mapping::anonymous(16)?;
        for page in 0..16 {
            memory
                .atomic(page * 4096 + 8)
                .store(page as u64, Ordering::Relaxed);
        }
        for gpu in &gpus {
            gpu.advise_atomics(memory.as_ptr(), memory.len(), how)?;
        }
        let work = add(&memory, 1).repeat(16).stride(4096);
        for round in 0..6 {
            let (has, has_not) = (&gpus[round % 2], &gpus[(round + 1) % 2]);
            execute_ok(has, &[work])?;
            ensure_eq!(pages_in(has, &memory, state)?, 16, "{state:?} in round {round}");
            ensure_eq!(
                pages_in(has_not, &memory, PageState::Cpu)?,
                16,
                "not known to the other in round {round}"
            );
        }
        for page in 0..16 {
            let number = memory.atomic(page * 4096).load(Ordering::Relaxed);
            ensure_eq!(number, 6, "page {page}, {how:?}");
            let other = memory.atomic(page * 4096 + 8).load(Ordering::Relaxed);
            ensure_eq!(other, page as u64, "what else is in page {page}, {how:?}");
        }
    }
    PASSED
}

/// What one has in its aperture the other uses where it is. (These have apertures: `--aperture 8M`.)
fn apertures() -> TestResult {
    let [one, two] = both()?;
    let memory = Mapping::anonymous(64)?;
    for word in 0..memory.len() / 8 {
        memory.atomic(word * 8).store(word as u64, Ordering::Relaxed);
    }
    one.prefetch(memory.as_ptr(), memory.len(), Location::Aperture)?;
    ensure_eq!(
        pages_in(&one, &memory, PageState::Coherent)?,
        64,
        "pages of the first"
    );
    two.prefetch(memory.as_ptr(), memory.len(), Location::Aperture)?;
    ensure_eq!(
        pages_in(&two, &memory, PageState::Coherent)?,
        0,
        "pages of the second"
    );
    let copy = Mapping::anonymous(64)?;
    execute_ok(
        &two,
        &[
            Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len()),
            Command::fill(memory.as_ptr().cast::<u64>(), 1, 1000),
        ],
    )?;
    execute_ok(&one, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 1001, "the number");
    memory.atomic(0).store(0, Ordering::Relaxed);
    for word in 0..memory.len() / 8 {
        let found = [&memory, &copy].map(|memory| memory.atomic(word * 8).load(Ordering::Relaxed));
        ensure_eq!(found, [word as u64; 2], "word {word}, and its copy");
    }
    ensure_eq!(
        pages_in(&one, &memory, PageState::Coherent)?,
        64,
        "pages that have stayed"
    );
    let completion = execute(&two, &[add(&memory, 1)])?;
    ensure_eq!(completion.status, Status::NotExclusive, "where the other has it");
    ensure_eq!(value(&memory), 0, "the number");
    PASSED
}

fn from_vram_to_vram() -> TestResult {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let gpus = both()?;
        let memory = Mapping::anonymous(1024)?;
        memory.advise(advice)?;
        for word in 0..memory.len() / 8 {
            memory.atomic(word * 8).store(word as u64, Ordering::Relaxed);
        }
        for round in 0..4 {
            let (to, from) = (&gpus[round % 2], &gpus[(round + 1) % 2]);
            to.prefetch(memory.as_ptr(), memory.len(), Location::Vram)?;
            let (there, here) = (
                pages_in(to, &memory, PageState::Vram)?,
                pages_in(from, &memory, PageState::Vram)?,
            );
            ensure_eq!(
                (there, here),
                (1024, 0),
                "pages in VRAM of the two in round {round}"
            );
        }
        // And by accesses, with nothing asked for but the place.
        let copy = Mapping::anonymous(1024)?;
        for gpu in gpus.iter().chain(&gpus) {
            gpu.advise_location(memory.as_ptr(), memory.len(), Location::Vram)?;
            execute_ok(
                gpu,
                &[Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len())],
            )?;
            ensure_eq!(pages_in(gpu, &memory, PageState::Vram)?, 1024, "pages in VRAM");
            for memory in [&copy, &memory] {
                for word in 0..memory.len() / 8 {
                    let found = memory.atomic(word * 8).load(Ordering::Relaxed);
                    ensure_eq!(found, word as u64, "what is at {:#x}", word * 8);
                }
            }
        }
    }
    PASSED
}

/// Two GPUs and a CPU count up the same number.
fn contended() -> TestResult {
    for how in [Atomics::Pin, Atomics::Exclusive, Atomics::Migrate] {
        let gpus = both()?;
        let memory = page_with(0)?;
        let done = AtomicBool::new(false);
        let until = Instant::now() + Duration::from_secs(1);
        let count_on = |gpu: &Gpu| -> Result<u64, Failure> {
            gpu.advise_atomics(memory.as_ptr(), memory.len(), how)?;
            let mut count = 0;
            while count == 0 || Instant::now() < until {
                // Not many at a time: each may take the page from both others, and that in turn from a processor that is away.
                let work = submit(gpu, &[add(&memory, 1).repeat(20)])?;
                let completion = gpu.wait(work, soon())?;
                ensure_eq!(completion.status, Status::Ok, "{completion:?}");
                count += 20;
            }
            Ok(count)
        };
        let (by_gpus, by_cpu) = std::thread::scope(|scope| {
            let cpu = scope.spawn(|| {
                let mut count = 0;
                while !done.load(Ordering::Relaxed) {
                    memory.atomic(0).fetch_add(1, Ordering::Relaxed);
                    count += 1;
                }
                count
            });
            let other = scope.spawn(|| count_on(&gpus[1]));
            let by_gpus = [
                count_on(&gpus[0]),
                other.join().unwrap_or_else(|_| Err("a panic".into())),
            ];
            done.store(true, Ordering::Relaxed);
            (by_gpus, cpu.join())
        });
        let mut sum: u64 = by_cpu.map_err(|_| "the thread has panicked")?;
        for count in by_gpus {
            sum += count?;
        }
        ensure_eq!(value(&memory), sum, "the number, {how:?}");
    }
    Ok(Outcome::Passed)
}
