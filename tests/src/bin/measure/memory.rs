// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory to be measured on, and what must be in it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::{Command, Gpu, PAGE_SIZE, PageState, Submission};
use pinion_tests::{Failure, Mapping, patiently};

/// Bytes of a large folio.
pub(crate) const HUGE: usize = 2 << 20;
/// Pages of one.
pub(crate) const HUGE_PAGES: usize = HUGE / PAGE_SIZE;

/// In which pages memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    Small,
    Huge,
}

impl Pages {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Small => "4 KiB pages",
            Self::Huge => "2 MiB folios",
        }
    }
}

/// Memory that begins at a multiple of 2 MiB, in such pages. Nothing else is in its last 2 MiB.
pub(crate) fn aligned(pages: usize, kind: Pages) -> Result<Mapping, Failure> {
    let room = pages.next_multiple_of(HUGE_PAGES) + HUGE_PAGES;
    let anywhere = Mapping::anonymous(room)?;
    let start = anywhere.as_ptr().addr().next_multiple_of(HUGE);
    drop(anywhere);
    let (read_write, private) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    let memory = Mapping::new(Some(start), pages, read_write, private)?;
    memory.advise(match kind {
        Pages::Small => libc::MADV_NOHUGEPAGE,
        Pages::Huge => libc::MADV_HUGEPAGE,
    })?;
    Ok(memory)
}

/// What is at the word with that index.
fn pattern(word: usize) -> u64 {
    (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes to all of it.
pub(crate) fn fill(memory: &Mapping) {
    for word in 0..memory.len() / 8 {
        memory.atomic(word * 8).store(pattern(word), Ordering::Relaxed);
    }
}

/// Checks that what `fill` has written is there.
pub(crate) fn check(memory: &Mapping) -> Result<(), Failure> {
    for word in 0..memory.len() / 8 {
        let found = memory.atomic(word * 8).load(Ordering::Relaxed);
        if found != pattern(word) {
            return Err(format!("the data is wrong: {found:#x} at offset {:#x}", word * 8).into());
        }
    }
    Ok(())
}

/// Reads a word of each page.
pub(crate) fn touch(memory: &Mapping) {
    for page in 0..memory.pages() {
        std::hint::black_box(memory.atomic(page * PAGE_SIZE).load(Ordering::Relaxed));
    }
}

/// Writes to each page: its first word is zero. Not all of it is, or the kernel would put the zero page in its place when it splits a
/// large folio.
pub(crate) fn populate(memory: &Mapping) {
    for page in 0..memory.pages() {
        memory.atomic(page * PAGE_SIZE).store(0, Ordering::Relaxed);
        memory.atomic(page * PAGE_SIZE + 8).store(1, Ordering::Relaxed);
    }
}

/// Whether all pages are in that state.
pub(crate) fn all_are(gpu: &Gpu, memory: &Mapping, state: PageState) -> Result<bool, Failure> {
    let pages = gpu.query(memory.as_ptr(), memory.len())?;
    Ok(pages.iter().all(|page| page.state == state))
}

/// Whether the CPU can access all pages, whether or not the GPU can, too.
pub(crate) fn all_are_home(gpu: &Gpu, memory: &Mapping) -> Result<bool, Failure> {
    let pages = gpu.query(memory.as_ptr(), memory.len())?;
    let is_home = |state| matches!(state, PageState::Cpu | PageState::Mirrored);
    Ok(pages.iter().all(|page| is_home(page.state)))
}

/// The time that work may take, however slow the machine is.
pub(crate) fn patience() -> Duration {
    patiently(Duration::from_secs(30))
}

/// Queues commands.
pub(crate) fn submit(gpu: &Gpu, ring: u32, commands: &[Command]) -> Result<Submission, Failure> {
    // SAFETY: All memory that is measured on is accessed through raw pointers and atomics, and stays until the work is done,
    // which is waited for.
    Ok(unsafe { gpu.submit(ring, commands) }?)
}

/// Waits for work, which must succeed.
pub(crate) fn finish(gpu: &Gpu, work: Submission) -> Result<(), Failure> {
    let completion = gpu.wait(work, patience())?;
    if !completion.is_ok() {
        return Err(format!("the GPU's work failed: {completion:x?}").into());
    }
    Ok(())
}

/// Has commands executed on ring 0.
pub(crate) fn execute(gpu: &Gpu, commands: &[Command]) -> Result<(), Failure> {
    finish(gpu, submit(gpu, 0, commands)?)
}
