// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long a fault of the GPU takes, and how long a submission.

use std::sync::atomic::Ordering;

use pinion_client::{Command, Gpu, Location, PAGE_SIZE, Submit};
use pinion_tests::measurement::{Count, Row, Subject};
use pinion_tests::{Failure, Mapping};
use std::os::fd::AsFd as _;

use crate::Bench;
use crate::memory::{self, HUGE_PAGES, Pages};
use crate::peer::Event;
use crate::turns::{self, Series, timed};

/// Faults in a submission.
const FAULTS: usize = 64;
/// Round trips in a turn.
const TRIPS: usize = 64;

/// Has the GPU forget what it maps of the memory.
fn forget(gpu: &Gpu, memory: &Mapping) -> Result<(), Failure> {
    // Every piece of advice does.
    Ok(gpu.advise_location(memory.as_ptr(), memory.len(), Location::System)?)
}

/// Seconds that it takes a CPU to get at that many pages of memory which it has never touched.
pub(crate) fn minor_faults(memory: &Mapping, pages: usize) -> Result<f64, Failure> {
    memory.advise(libc::MADV_DONTNEED)?;
    let (seconds, ()) = timed(|| {
        for page in 0..pages {
            memory.atomic(page * PAGE_SIZE).store(1, Ordering::Relaxed);
        }
    });
    Ok(seconds / pages as f64)
}

/// Work for a ring that faults on every other page of some memory: each fault is one of its own.
struct Faulting {
    memory: Mapping,
    target: Mapping,
    commands: Vec<Command>,
}

impl Faulting {
    fn new() -> Result<Self, Failure> {
        // 2 MiB each, so that faults of several rings have nothing to do with each other.
        let memory = memory::aligned(HUGE_PAGES, Pages::Small)?;
        let target = memory::aligned(1, Pages::Small)?;
        memory::fill(&memory);
        target.atomic(0).store(0, Ordering::Relaxed);
        let commands = (0..FAULTS)
            .map(|fault| Command::copy(memory.page(2 * fault), target.at(fault * 8), 8))
            .collect();
        Ok(Self {
            memory,
            target,
            commands,
        })
    }

    /// Checks that the GPU has read what is there.
    fn check(&self) -> Result<(), Failure> {
        for fault in 0..FAULTS {
            let there = self.memory.atomic(2 * fault * PAGE_SIZE).load(Ordering::Relaxed);
            let found = self.target.atomic(fault * 8).load(Ordering::Relaxed);
            if found != there {
                return Err(format!("the GPU has read {found:#x} where {there:#x} is").into());
            }
            self.target.atomic(fault * 8).store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}

pub(crate) fn faults(bench: &mut Bench) -> Result<(), Failure> {
    turns::begin("faults");
    let gpu = bench.open()?;
    let rings = gpu.info()?.rings;
    let plain = memory::aligned(HUGE_PAGES, Pages::Small)?;
    let works = (0..rings)
        .map(|_| Faulting::new())
        .collect::<Result<Vec<_>, _>>()?;
    let first = works.first().ok_or("there is no ring")?;
    let (large, copy) = (
        memory::aligned(HUGE_PAGES, Pages::Small)?,
        memory::aligned(HUGE_PAGES, Pages::Small)?,
    );
    memory::fill(&large);
    memory::populate(&copy);
    let run = |works: &[Faulting]| -> Result<(), Failure> {
        let work = (0..).zip(works);
        let work = work
            .map(|(ring, work)| memory::submit(&gpu, ring, &work.commands))
            .collect::<Result<Vec<_>, _>>()?;
        for completion in gpu.wait_all(&work, memory::patience())? {
            if !completion.is_ok() {
                return Err(format!("the GPU's work failed: {completion:x?}").into());
            }
        }
        Ok(())
    };
    let whole = [Command::copy(large.as_ptr(), copy.as_ptr(), large.len())];
    run(&works)?;
    memory::execute(&gpu, &whole)?;
    let [mut minor, mut many_minor, mut single, mut many, mut range] = [(); 5].map(|()| Series::default());
    let (mut trips, mut turns) = ([0; 3], 0);
    for turn in bench.amount.turns() {
        let reference = |minor: &mut Series, many_minor: &mut Series| -> Result<(), Failure> {
            minor.push(minor_faults(&plain, FAULTS)?);
            many_minor.push(minor_faults(&plain, HUGE_PAGES)?);
            Ok(())
        };
        if turn % 2 == 0 {
            reference(&mut minor, &mut many_minor)?;
        }
        for work in &works {
            forget(&gpu, &work.memory)?;
        }
        let mut counted = |index: usize, expected: usize, what: &dyn Fn() -> Result<(), Failure>| {
            let (kicks, faults) = (bench.bus.kicks()?, gpu.statistics()?.faults);
            let (seconds, result) = timed(what);
            result?;
            let faults = gpu.statistics()?.faults - faults;
            if faults != expected as u64 {
                return Err(Failure::from(format!(
                    "{faults} faults where {expected} are expected"
                )));
            }
            trips[index] += bench.bus.kicks()?.since(kicks).round_trips;
            Ok(seconds)
        };
        single.push(counted(0, FAULTS, &|| run(std::slice::from_ref(first)))? / FAULTS as f64);
        first.check()?;
        forget(&gpu, &first.memory)?;
        let all = FAULTS * works.len();
        many.push(counted(1, all, &|| run(&works))? / all as f64);
        works.iter().try_for_each(Faulting::check)?;
        forget(&gpu, &large)?;
        range.push(counted(2, 1, &|| memory::execute(&gpu, &whole))? / HUGE_PAGES as f64);
        if turn % 2 == 1 {
            reference(&mut minor, &mut many_minor)?;
        }
        turns += 1;
    }
    memory::check(&copy)?;
    let against = "a minor page fault of a CPU";
    let rows = [
        (
            "a fault of the GPU, one at a time".to_owned(),
            &single,
            &minor,
            1.0,
            FAULTS,
        ),
        (
            format!("a fault of the GPU, on {rings} rings at a time"),
            &many,
            &minor,
            1.0,
            FAULTS * works.len(),
        ),
        (
            "a page of 2 MiB that one fault of the GPU is about (and 2 MiB copied)".to_owned(),
            &range,
            &many_minor,
            1.0 / HUGE_PAGES as f64,
            HUGE_PAGES,
        ),
    ];
    for ((name, series, reference, faults, count), trips) in rows.into_iter().zip(trips) {
        turns::print(&Row::Ratio(series.row(
            Subject::Faults,
            &name,
            (against, reference),
        )))?;
        turns::print(&Row::Count(Count {
            subject: Subject::Faults,
            name,
            round_trips: trips as f64 / (turns * count) as f64,
            faults,
            aim: None,
        }))?;
    }
    Ok(())
}

pub(crate) fn submissions(bench: &mut Bench) -> Result<(), Failure> {
    turns::begin("submissions");
    let gpu = bench.open()?;
    let flag = memory::aligned(1, Pages::Small)?;
    flag.atomic(0).store(0, Ordering::Relaxed);
    let event = Event::new()?;
    let [mut echo, mut waited, mut notified, mut polled, mut many] = [(); 5].map(|()| Series::default());
    let mut number = 0;
    let per = |(seconds, result): (f64, Result<(), Failure>)| result.map(|()| seconds / TRIPS as f64);
    let signal = |number: u64| [Command::semaphore_signal(flag.as_ptr().cast::<u64>(), number)];
    // The page is mapped from now on.
    memory::execute(&gpu, &signal(number))?;
    for turn in bench.amount.turns() {
        let reference = |echo: &mut Series| -> Result<(), Failure> {
            echo.push(per(timed(|| {
                (0..TRIPS).try_for_each(|_| Ok(bench.echo.round_trip()?))
            }))?);
            Ok(())
        };
        if turn % 2 == 0 {
            reference(&mut echo)?;
        }
        waited.push(per(timed(|| {
            (0..TRIPS).try_for_each(|_| memory::execute(&gpu, &[Command::nop()]))
        }))?);
        notified.push(per(timed(|| {
            (0..TRIPS).try_for_each(|_| {
                // SAFETY: It touches no memory.
                unsafe { Submit::new(0).notify(event.as_fd()).send(&gpu, &[Command::nop()]) }?;
                Ok(event.wait()?)
            })
        }))?);
        polled.push(per(timed(|| {
            (0..TRIPS).try_for_each(|_| {
                number += 1;
                memory::submit(&gpu, 0, &signal(number))?;
                while flag.atomic(0).load(Ordering::Acquire) != number {
                    std::hint::spin_loop();
                }
                Ok(())
            })
        }))?);
        many.push(per(timed(|| {
            let work = (0..TRIPS).map(|_| memory::submit(&gpu, 0, &[Command::nop()]));
            let work = work.collect::<Result<Vec<_>, _>>()?;
            memory::finish(&gpu, *work.last().ok_or("no work")?)
        }))?);
        if turn % 2 == 1 {
            reference(&mut echo)?;
        }
    }
    let against = "two processes that wake each other through eventfds";
    for (name, series) in [
        ("a submission, waited for (interrupt)", &waited),
        (
            "a submission, waited for through an eventfd (interrupt)",
            &notified,
        ),
        ("a submission, its end polled for in memory", &polled),
        (&*format!("a submission, {TRIPS} at a time"), &many),
    ] {
        turns::print(&Row::Ratio(series.row(
            Subject::Submission,
            name,
            (against, &echo),
        )))?;
    }
    Ok(())
}
