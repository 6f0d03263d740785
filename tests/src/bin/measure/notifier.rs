// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Changes of the CPU's page table where the GPU maps nothing: what it costs a process that it has opened a GPU.

use std::sync::atomic::Ordering;

use pinion_client::{Command, Gpu, PAGE_SIZE};
use pinion_tests::measurement::{Count, Row, Subject};
use pinion_tests::{Failure, Mapping};

use crate::Bench;
use crate::memory::{self, HUGE, HUGE_PAGES, Pages};
use crate::turns::{self, Series, timed};

/// Pages that are changed at a time.
const PAGES: usize = 16;
/// How often in a turn.
const TIMES: usize = 32;

/// A change of the page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Munmap,
    Mprotect,
    Discard,
}

impl Change {
    pub(crate) const ALL: [Self; 3] = [Self::Munmap, Self::Mprotect, Self::Discard];

    fn name(self) -> &'static str {
        match self {
            Self::Munmap => "munmap",
            Self::Mprotect => "mprotect (read-only)",
            Self::Discard => "madvise (MADV_DONTNEED)",
        }
    }
}

/// 2 MiB of address space, with a page at its beginning, and room for a mapping that is changed.
pub(crate) struct Region {
    first: Mapping,
}

impl Region {
    pub(crate) fn new() -> Result<Self, Failure> {
        let first = memory::aligned(1, Pages::Small)?;
        first.atomic(0).store(1, Ordering::Relaxed);
        Ok(Self { first })
    }

    /// Seconds that a change of 16 pages takes.
    pub(crate) fn change(&self, change: Change) -> Result<f64, Failure> {
        let address = self.first.as_ptr().addr() + HUGE / 2;
        let mut seconds = 0.0;
        for _ in 0..TIMES {
            let memory = Mapping::new(
                Some(address),
                PAGES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            )?;
            memory::populate(&memory);
            seconds += match change {
                Change::Munmap => timed(|| drop(memory)).0,
                Change::Mprotect => {
                    let (seconds, result) = timed(|| memory.protect(libc::PROT_READ));
                    result?;
                    seconds
                }
                Change::Discard => {
                    let (seconds, result) = timed(|| memory.advise(libc::MADV_DONTNEED));
                    result?;
                    seconds
                }
            };
        }
        Ok(seconds / TIMES as f64)
    }
}

/// Where the GPU has been.
const PLACES: [&str; 2] = [
    "where the GPU has never been",
    "in 2 MiB of which the GPU maps another page",
];

pub(crate) fn measure(bench: &mut Bench) -> Result<(), Failure> {
    let gpu = bench.open()?;
    let regions = [Region::new()?, Region::new()?];
    let target = memory::aligned(1, Pages::Small)?;
    let read = |from: &Mapping| memory::execute(&gpu, &[Command::copy(from.as_ptr(), target.as_ptr(), 8)]);
    for change in Change::ALL {
        turns::begin(change.name());
        let mut plain = Series::default();
        let mut series = [Series::default(), Series::default()];
        let mut kicks = [0; 2];
        let mut done = 0;
        for turn in bench.amount.turns() {
            // The GPU maps something, and of the second region, too.
            read(&regions[1].first)?;
            let before = turn % 2 == 0;
            if before {
                plain.push(bench.plain.change(change)?);
            }
            for (place, region) in regions.iter().enumerate() {
                let counted = bench.bus.kicks()?;
                series[place].push(region.change(change)?);
                kicks[place] += bench.bus.kicks()?.since(counted).all;
            }
            if !before {
                plain.push(bench.plain.change(change)?);
            }
            done += TIMES;
        }
        let rights = gpu.query(regions[1].first.as_ptr(), 1)?[0].rights;
        if !rights.read {
            return Err("the GPU was to map a page beside the one that changes".into());
        }
        for place in 0..2 {
            let name = format!("{} of {PAGES} pages {}", change.name(), PLACES[place]);
            let against = "the same in a process that has opened no GPU";
            turns::print(&Row::Ratio(series[place].row(
                Subject::Notifier,
                &name,
                (against, &plain),
            )))?;
            turns::print(&Row::Count(Count {
                subject: Subject::Notifier,
                name,
                round_trips: kicks[place] as f64 / done as f64,
                faults: 0.0,
                aim: Some(0.0),
            }))?;
        }
    }
    mapped(bench, &gpu)
}

/// For comparison: where there is something to be invalidated.
fn mapped(bench: &mut Bench, gpu: &Gpu) -> Result<(), Failure> {
    let name = format!("{} of {PAGES} pages that the GPU maps", Change::Mprotect.name());
    turns::begin(&name);
    let memory = memory::aligned(HUGE_PAGES, Pages::Small)?;
    memory::populate(&memory);
    let target = memory::aligned(PAGES, Pages::Small)?;
    let length = PAGES * PAGE_SIZE;
    let part = Part(&memory);
    let (mut ours, mut plain) = (Series::default(), Series::default());
    let (mut trips, mut done) = (0, 0);
    for _ in bench.amount.turns() {
        memory::execute(gpu, &[Command::copy(memory.as_ptr(), target.as_ptr(), length)])?;
        plain.push(bench.plain.change(Change::Mprotect)?);
        let before = bench.bus.kicks()?;
        let (seconds, result) = timed(|| part.protect(libc::PROT_READ));
        result?;
        trips += bench.bus.kicks()?.since(before).round_trips;
        ours.push(seconds);
        part.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        memory::populate(&memory);
        done += 1;
    }
    let against = "the same in a process that has opened no GPU";
    turns::print(&Row::Ratio(ours.row(Subject::Notifier, &name, (against, &plain))))?;
    turns::print(&Row::Count(Count {
        subject: Subject::Notifier,
        name,
        round_trips: trips as f64 / f64::from(done),
        faults: 0.0,
        aim: None,
    }))
}

/// The first pages of a mapping.
struct Part<'a>(&'a Mapping);

impl Part<'_> {
    fn protect(&self, protection: i32) -> std::io::Result<()> {
        // SAFETY: It is a part of the mapping, of which nobody has a reference.
        match unsafe { libc::mprotect(self.0.as_ptr().cast(), PAGES * PAGE_SIZE, protection) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}
