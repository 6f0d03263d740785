// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that move to VRAM and home: how fast, and what crosses the bus for it.

use std::ptr;

use pinion_client::{Command, Gpu, Location, Operation, PAGE_SIZE, PageState};
use pinion_tests::measurement::{Count, Ratio, Row, Spread, Subject};
use pinion_tests::{Failure, Mapping};

use crate::Bench;
use crate::memory::{self, HUGE, Pages};
use crate::turns::{self, Series, timed};

/// Bytes that are moved.
const SIZES: [(usize, &str); 4] = [
    (4 << 10, "4 KiB"),
    (64 << 10, "64 KiB"),
    (HUGE, "2 MiB"),
    (16 << 20, "16 MiB"),
];
/// Bytes that are moved or copied in a turn, at least.
const MUCH: usize = 256 << 10;
/// How often pages are asked to move before that counts as a failure: somebody may look at one just then.
const TRIES: usize = 10;
/// Most round trips for 2 MiB.
const MOST_ROUND_TRIPS: f64 = 3.0;

/// How pages move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    PrefetchToVram,
    PrefetchHome,
    FaultToVram,
    FaultHome,
}

impl Way {
    /// In an order in which one can follow the other.
    const ALL: [Self; 4] = [
        Self::PrefetchToVram,
        Self::PrefetchHome,
        Self::FaultToVram,
        Self::FaultHome,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::PrefetchToVram => "to VRAM by a prefetch",
            Self::PrefetchHome => "home by a prefetch",
            Self::FaultToVram => "to VRAM by faults of the GPU",
            Self::FaultHome => "home by faults of the CPU",
        }
    }

    /// Where they are afterwards.
    fn state(self) -> PageState {
        match self {
            Self::PrefetchToVram | Self::FaultToVram => PageState::Vram,
            Self::PrefetchHome | Self::FaultHome => PageState::Cpu,
        }
    }

    fn go(self, gpu: &Gpu, memory: &Mapping) -> Result<(), Failure> {
        let (start, length) = (memory.as_ptr(), memory.len());
        match self {
            Self::PrefetchToVram => gpu.prefetch(start, length, Location::Vram)?,
            Self::PrefetchHome => gpu.prefetch(start, length, Location::System)?,
            Self::FaultToVram => {
                // What else is in the 2 MiB of an access comes along.
                let places = u32::try_from(length.div_ceil(HUGE))?;
                let load = Command::atomic(Operation::Load, start.cast::<u64>(), 0);
                memory::execute(gpu, &[load.repeat(places).stride(HUGE as u32)])?;
            }
            Self::FaultHome => memory::touch(memory),
        }
        Ok(())
    }
}

/// What it took, each time it was done.
#[derive(Default)]
struct Findings {
    seconds: Series,
    round_trips: Vec<f64>,
    faults: Vec<f64>,
}

pub(crate) fn measure(bench: &mut Bench) -> Result<(), Failure> {
    for (size, name) in SIZES {
        for kind in [Pages::Small, Pages::Huge] {
            if kind == Pages::Small || size >= HUGE {
                measure_size(bench, size, name, kind)?;
            }
        }
    }
    Ok(())
}

fn measure_size(bench: &mut Bench, size: usize, size_name: &str, kind: Pages) -> Result<(), Failure> {
    turns::begin(&format!("migration of {size_name} in {}", kind.name()));
    let gpu = bench.open()?;
    let [memory, source, copy] = [(); 3].map(|()| memory::aligned(size / PAGE_SIZE, kind));
    let (memory, source, copy) = (memory?, source?, copy?);
    gpu.advise_location(memory.as_ptr(), size, Location::Vram)?;
    for memory in [&memory, &source, &copy] {
        memory::fill(memory);
    }
    let times = (MUCH / size).max(1);
    let mut reference = Series::default();
    let mut findings = Way::ALL.map(|_| Findings::default());
    for turn in bench.amount.turns() {
        let memcpy = |reference: &mut Series| {
            let (seconds, ()) = timed(|| {
                for _ in 0..times {
                    // SAFETY: Both are of that size, and nobody else accesses them.
                    unsafe {
                        ptr::copy_nonoverlapping(source.as_ptr(), std::hint::black_box(copy.as_ptr()), size)
                    };
                }
            });
            reference.push(seconds / times as f64);
        };
        if turn % 2 == 0 {
            memcpy(&mut reference);
        }
        let mut seconds = [0.0; Way::ALL.len()];
        for _ in 0..times {
            for (way, (sum, findings)) in Way::ALL.iter().zip(seconds.iter_mut().zip(&mut findings)) {
                *sum += travel(bench, &gpu, &memory, *way, findings)?;
            }
        }
        for (sum, findings) in seconds.iter().zip(&mut findings) {
            findings.seconds.push(sum / times as f64);
        }
        if turn % 2 == 1 {
            memcpy(&mut reference);
        }
        // How the GPU maps them shows it.
        if kind == Pages::Huge {
            Way::PrefetchToVram.go(&gpu, &memory)?;
            let whole = gpu
                .query(memory.as_ptr(), size)?
                .iter()
                .all(|page| page.page_size == HUGE);
            if !whole {
                return Err("a folio of 2 MiB has not remained one".into());
            }
            Way::PrefetchHome.go(&gpu, &memory)?;
        }
    }
    memory::check(&memory)?;
    memory::check(&copy)?;
    for (way, findings) in Way::ALL.iter().zip(&findings) {
        let name = format!("{size_name} in {}, {}", kind.name(), way.name());
        let row = findings
            .seconds
            .row(Subject::Migration, &name, ("memcpy", &reference));
        turns::print(&Row::Ratio(Ratio { speed: true, ..row }))?;
        if size == HUGE {
            turns::print(&Row::Count(Count {
                subject: Subject::Migration,
                name,
                round_trips: Spread::of(findings.round_trips.clone()).median,
                faults: Spread::of(findings.faults.clone()).median,
                aim: Some(MOST_ROUND_TRIPS),
            }))?;
        }
    }
    Ok(())
}

/// Moves all of the memory. Returns how many seconds it took.
fn travel(
    bench: &Bench,
    gpu: &Gpu,
    memory: &Mapping,
    way: Way,
    findings: &mut Findings,
) -> Result<f64, Failure> {
    let other = match way.state() {
        PageState::Vram => Way::PrefetchHome,
        _ => Way::PrefetchToVram,
    };
    for _ in 0..TRIES {
        // A prefetch home lets the GPU keep access to the pages. Each way begins with pages that it does not map.
        if way.state() == PageState::Vram {
            gpu.advise_location(memory.as_ptr(), memory.len(), Location::Vram)?;
        }
        if way.state() == PageState::Vram && !memory::all_are_home(gpu, memory)? {
            return Err("pages that are to move are there already".into());
        }
        let (kicks, faults) = (bench.bus.kicks()?, gpu.statistics()?.faults);
        let (seconds, result) = timed(|| way.go(gpu, memory));
        result?;
        let (kicks, faults) = (bench.bus.kicks()?.since(kicks), gpu.statistics()?.faults - faults);
        let are_there = match way.state() {
            PageState::Vram => memory::all_are(gpu, memory, PageState::Vram)?,
            _ => memory::all_are_home(gpu, memory)?,
        };
        if are_there {
            findings.round_trips.push(kicks.round_trips as f64);
            findings.faults.push(faults as f64);
            return Ok(seconds);
        }
        other.go(gpu, memory)?;
    }
    Err(format!("not all pages have got {} in {TRIES} tries", way.name()).into())
}
