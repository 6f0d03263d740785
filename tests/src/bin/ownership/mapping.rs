// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a process does to its mappings: fork, munmap, mremap, mprotect, madvise, mlock.

use std::sync::atomic::Ordering;

use pinion_client::{Command, Gpu, Status};
use pinion_tests::matrix::Size;
use pinion_tests::smaps::kilobytes;
use pinion_tests::work::{execute, execute_ok};
use pinion_tests::{Failure, Mapping, ensure, ensure_eq};

use crate::cell::{Body, Cell, ELSEWHERE, Outcome, Subject, anonymous, compare, pattern};
use crate::others::Helper;

pub(crate) const EVENTS: &[(&str, Body)] = &[
    ("fork-child-first", fork_child_first),
    ("fork-parent-first", fork_parent_first),
    ("fork-gpu-first", fork_gpu_first),
    ("munmap", munmap),
    ("mremap", mremap),
    ("mprotect-read-only", mprotect_read_only),
    ("mprotect-and-back", mprotect_and_back),
    ("madvise-dontneed", madvise_dontneed),
    ("madvise-free", madvise_free),
    ("madvise-collapse", madvise_collapse),
    ("mlock", mlock),
];

/// From 6.1 on; not in every C library.
const MADV_COLLAPSE: i32 = 25;

/// What a child does that has the memory as it was: looks at it, and writes something else.
fn as_a_child(memory: &Mapping, expected: &[u64]) -> Result<(), Failure> {
    compare(&memory.words(), expected, "the child")?;
    let other = pattern(9, expected.len());
    memory.set_words(&other);
    compare(&memory.words(), &other, "the child, after it has written")
}

fn fork_child_first(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    Helper::new(|| as_a_child(&subject.memory, &subject.expected))?.act()?;
    subject.finish()
}

/// The parent does something before the child does.
fn fork_then(
    cell: &Cell<'_>,
    act: impl FnOnce(&mut Subject) -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let helper = Helper::new(|| as_a_child(&subject.memory, &subject.expected))?;
    act(&mut subject)?;
    // When the child touches what they share, it comes home for both.
    let result = subject.observe()?;
    helper.act()?;
    subject.finish_as(result)
}

fn fork_parent_first(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    fork_then(cell, |subject| {
        subject
            .memory
            .atomic(subject.target())
            .fetch_add(10, Ordering::Relaxed);
        let number = subject.number();
        *number = number.wrapping_add(10);
        Ok(())
    })
}

fn fork_gpu_first(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    fork_then(cell, |subject| {
        execute_ok(subject.gpu(), &[Command::atomic_add(subject.pointer(), 11)])?;
        let number = subject.number();
        *number = number.wrapping_add(11);
        Ok(())
    })
}

/// A GPU of its own must not be able to do that, since the process could not.
fn must_fault(device: &str, command: Command) -> Result<(), Failure> {
    let completion = execute(&Gpu::open(device)?, &[command])?;
    ensure_eq!(completion.status, Status::Fault, "{completion:x?}");
    Ok(())
}

fn munmap(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let old = subject.memory.as_ptr();
    let length = subject.memory.len();
    // SAFETY: Nothing refers to what is there, and something is mapped there again before anything accesses it.
    ensure_eq!(unsafe { libc::munmap(old.cast(), length) }, 0, "munmap");
    let pages = subject.gpu().query(old, length)?;
    ensure!(
        pages.iter().all(|page| !page.rights.read),
        "the GPU still maps what was unmapped"
    );
    // With the context that had it mapped, which this puts into error.
    let copy = anonymous(ELSEWHERE, 1)?;
    let completion = execute(subject.gpu(), &[Command::copy(old, copy.as_ptr(), 8)])?;
    ensure_eq!(completion.status, Status::Fault, "{completion:x?}");

    std::mem::forget(std::mem::replace(&mut subject.memory, cell.memory()?));
    ensure_eq!(subject.memory.as_ptr(), old, "where the new mapping is");
    subject.open(cell.device)?;
    let result = subject.observe()?;
    ensure_eq!(subject.charged()?, 0, "KiB in the new mapping");
    subject.expected.fill(0);
    subject.settle()?;
    Ok(Outcome::Result(result))
}

fn mremap(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let old = subject.memory.as_ptr();
    subject
        .memory
        .remap_to(anonymous(ELSEWHERE, subject.memory.pages())?)?;
    ensure!(subject.memory.as_ptr() != old, "it has moved");
    let result = subject.observe()?;
    ensure_eq!(
        subject.charged()? as usize * 1024,
        subject.memory.len(),
        "bytes that moved"
    );
    let pages = subject.gpu().query(old, subject.memory.len())?;
    ensure!(
        pages.iter().all(|page| !page.rights.read),
        "the GPU still maps the old address"
    );
    subject.settle()?;
    // In the end, since it puts the context into error.
    let copy = anonymous(old.addr() + (64 << 20), 1)?;
    let completion = execute(subject.gpu(), &[Command::copy(old, copy.as_ptr(), 8)])?;
    ensure_eq!(completion.status, Status::Fault, "where it was");
    Ok(Outcome::Result(result))
}

fn mprotect_read_only(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    subject.memory.protect(libc::PROT_READ)?;
    let result = subject.observe()?;
    let pages = subject
        .gpu()
        .query(subject.memory.as_ptr(), subject.memory.len())?;
    ensure!(
        pages.iter().all(|page| !page.rights.write && !page.rights.atomic),
        "the GPU may still write"
    );
    subject.check_gpu()?;
    let target = subject.pointer();
    must_fault(cell.device, Command::fill(target, 1, 0))?;
    must_fault(cell.device, Command::atomic_add(target, 1))?;
    // And with the context that could write before, which this puts into error.
    let completion = execute(subject.gpu(), &[Command::fill(target, 1, 0)])?;
    ensure_eq!(completion.status, Status::Fault, "{completion:x?}");
    subject.check_cpu()?;
    subject.memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    subject.open(cell.device)?;
    subject.settle()?;
    Ok(Outcome::Result(result))
}

fn mprotect_and_back(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    subject.memory.protect(libc::PROT_READ)?;
    subject.memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    subject.finish()
}

fn madvise_dontneed(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    subject.memory.advise(libc::MADV_DONTNEED)?;
    let result = subject.observe()?;
    ensure_eq!(subject.charged()?, 0, "KiB that are left");
    subject.expected.fill(0);
    subject.settle()?;
    Ok(Outcome::Result(result))
}

fn madvise_free(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    subject.memory.advise(libc::MADV_FREE)?;
    // The page waits in a processor's batch of lazily freed ones, which holds a reference to it: without MIGRATE_PFN_PIN it
    // could not be pinned until the batch is full. This empties the batches of all processors.
    std::fs::write("/proc/sys/vm/drop_caches", "1")?;
    let result = subject.observe()?;
    // Each page by itself, and what was found stays so: nothing frees it meanwhile, as memory is not short.
    let found = subject.memory.words();
    let pages = found.chunks(512).zip(subject.expected.chunks_mut(512));
    for (index, (found, expected)) in pages.enumerate() {
        if found.iter().all(|word| *word == 0) {
            expected.fill(0);
        }
        compare(found, expected, &format!("the CPU, in page {index},"))?;
    }
    subject.settle()?;
    // From here on it is needed again, so that reclaim must keep it.
    let _ = subject.memory.advise(libc::MADV_PAGEOUT);
    subject.check_cpu()?;
    subject.check_gpu()?;
    Ok(Outcome::Result(result))
}

fn madvise_collapse(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter_with_many()?;
    // It was not to be huge before.
    subject.memory.advise(libc::MADV_HUGEPAGE)?;
    let refused = match subject.memory.advise(MADV_COLLAPSE) {
        Ok(()) => {
            let huge = kilobytes(&subject.memory, "AnonHugePages")? > 0;
            let home = subject.observe()?;
            ensure!(
                huge || home == cell.state.name(),
                "it is said to be collapsed, and is {home} in small pages"
            );
            if huge && cell.size == Size::Small {
                ", huge"
            } else {
                ""
            }
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) => " (EAGAIN)",
            Some(libc::EBUSY) => " (EBUSY)",
            Some(libc::EINVAL) => " (EINVAL)",
            _ => return Err(error.into()),
        },
    };
    match subject.finish()? {
        Outcome::Result(state) => Ok(Outcome::Result(format!("{state}{refused}"))),
        blank => Ok(blank),
    }
}

fn mlock(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    let (start, length) = (subject.memory.as_ptr().cast(), subject.memory.len());
    // SAFETY: It changes no content.
    ensure_eq!(unsafe { libc::mlock(start, length) }, 0, "mlock");
    ensure_eq!(
        kilobytes(&subject.memory, "Locked")? as usize * 1024,
        length,
        "locked memory"
    );
    let outcome = subject.finish()?;
    Ok(outcome)
}
