// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernel wants pages: to swap them out, or to join them with others of the same content.

use pinion_tests::pagemap::{self, Entry};
use pinion_tests::smaps::kilobytes;
use pinion_tests::{Failure, ensure};

use crate::cell::{Body, Cell, ELSEWHERE, Outcome, anonymous};
use crate::machine::run_ksm;

pub(crate) const EVENTS: &[(&str, Body)] = &[
    ("madvise-pageout", madvise_pageout),
    ("swap-out", swap_out),
    ("ksm", ksm),
];

/// How often the kernel is asked to reclaim: the first time it finds out what was used lately.
const ROUNDS: usize = 8;

/// Has the kernel swap out what it can.
fn swapped(
    cell: &Cell<'_>,
    reclaim: impl Fn(&pinion_tests::Mapping) -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    if let Err(reason) = &cell.machine.swap {
        return Ok(Outcome::Blank(reason.clone()));
    }
    let subject = cell.enter()?;
    for _ in 0..ROUNDS {
        reclaim(&subject.memory)?;
        if kilobytes(&subject.memory, "Swap")? as usize * 1024 == subject.memory.len() {
            break;
        }
    }
    subject.finish()
}

fn madvise_pageout(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    swapped(cell, |memory| Ok(memory.advise(libc::MADV_PAGEOUT)?))
}

fn swap_out(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let cgroup = match cell.machine.cgroup() {
        Ok(cgroup) => cgroup,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    cgroup.join()?;
    let outcome = swapped(cell, |_| {
        cgroup.reclaim();
        Ok(())
    });
    cgroup.leave()?;
    outcome
}

fn ksm(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    let pages = subject.memory.pages();
    let twin = anonymous(ELSEWHERE, pages)?;
    twin.set_words(&subject.expected);
    for memory in [&subject.memory, &twin] {
        memory.advise(libc::MADV_MERGEABLE)?;
    }
    run_ksm()?;
    let entries = pagemap::entries(subject.memory.as_ptr(), pages)?;
    let others = pagemap::entries(twin.as_ptr(), pages)?;
    let same = |(one, other): &(&Entry, &Entry)| matches!(one, Entry::Present(_)) && one == other;
    let joined = entries.iter().zip(&others).filter(same).count();
    ensure!(
        joined == 0 || joined == pages,
        "{joined} of {pages} pages have been joined"
    );
    let outcome = subject.finish()?;
    // What was written is a copy's.
    crate::cell::compare(&twin.words(), &cell.content(), "the twin's owner")?;
    match outcome {
        Outcome::Result(state) if joined > 0 => Ok(Outcome::Result(format!("{state}, joined"))),
        other => Ok(other),
    }
}
