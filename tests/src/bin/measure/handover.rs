// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that are handed to the GPU, so that it has them for itself, and that the CPU takes back: `pin`, `exclusive` and
//! `migrate` side by side.

use std::sync::atomic::Ordering;

use pinion_client::{Atomics, Command, Gpu, Location, PAGE_SIZE, PageState};
use pinion_tests::measurement::{Handover, Ratio, Row, Spread, Subject};
use pinion_tests::{Failure, Mapping, pagemap};

use crate::Bench;
use crate::latency::minor_faults;
use crate::memory::{self, HUGE_PAGES, Pages};
use crate::turns::{self, Series, timed};

/// Most that acquiring and releasing 512 pages by `pin` may take, in terms of the others.
const AIM_TO_MIGRATE: f64 = 0.5;
const AIM_TO_EXCLUSIVE: f64 = 1.2;
/// Most that a single page may take, in terms of the same without a device.
const AIM_TO_NO_DEVICE: f64 = 2.0;

/// Pages that are handed over in a turn, at least.
const MANY: usize = 32;
/// Minor page faults in a turn, to compare with.
const MINOR_FAULTS: usize = 64;

/// The ways to hand pages over.
pub(crate) const MECHANISMS: [(&str, Atomics, PageState); 3] = [
    ("pin", Atomics::Pin, PageState::Pinned),
    ("exclusive", Atomics::Exclusive, PageState::Exclusive),
    ("migrate", Atomics::Migrate, PageState::Vram),
];

/// What is handed over.
#[derive(Clone, Copy, Debug)]
struct Shape {
    pages: usize,
    kind: Pages,
}

const SHAPES: [Shape; 4] = [
    Shape {
        pages: 1,
        kind: Pages::Small,
    },
    Shape {
        pages: 16,
        kind: Pages::Small,
    },
    Shape {
        pages: HUGE_PAGES,
        kind: Pages::Small,
    },
    Shape {
        pages: HUGE_PAGES,
        kind: Pages::Huge,
    },
];

impl Shape {
    fn name(self) -> String {
        match self {
            Self { pages: 1, .. } => "1 page".to_owned(),
            Self {
                pages,
                kind: Pages::Small,
            } => format!("{pages} pages"),
            Self { .. } => "a folio of 2 MiB".to_owned(),
        }
    }
}

/// Memory that is handed over in one of the ways, and what that took.
struct Contestant {
    gpu: Gpu,
    memory: Mapping,
    shape: Shape,
    state: PageState,
    atomics: Atomics,
    /// What is in each page, by its number of increments.
    expected: u64,
    acquire: Series,
    release: Series,
    release_at_once: Series,
    trips: [Vec<f64>; 3],
    faults: Vec<f64>,
    moved: Vec<f64>,
}

/// How the CPU gets pages back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Release {
    /// By touching each.
    ByFaults,
    /// By asking for all, and then touching each.
    AtOnce,
}

impl Contestant {
    fn new(bench: &Bench, shape: Shape, atomics: Atomics, state: PageState) -> Result<Self, Failure> {
        let gpu = bench.open()?;
        let memory = memory::aligned(shape.pages, shape.kind)?;
        gpu.advise_atomics(memory.as_ptr(), memory.len(), atomics)?;
        memory::populate(&memory);
        Ok(Self {
            gpu,
            memory,
            shape,
            state,
            atomics,
            expected: 0,
            acquire: Series::default(),
            release: Series::default(),
            release_at_once: Series::default(),
            trips: [const { Vec::new() }; 3],
            faults: Vec::new(),
            moved: Vec::new(),
        })
    }

    /// There is an operation that takes back many pages which are pinned or in VRAM.
    fn can_release_at_once(&self) -> bool {
        self.atomics != Atomics::Exclusive
    }

    /// Whether pages stay where they are.
    fn is_in_place(&self) -> bool {
        self.atomics != Atomics::Migrate
    }

    /// The frames of the first and the last page.
    fn frames(&self) -> Result<[u64; 2], Failure> {
        let last = self.shape.pages - 1;
        Ok([
            pagemap::pfn(self.memory.page(0))?,
            pagemap::pfn(self.memory.page(last))?,
        ])
    }

    /// Memory as it is to be: a folio that was split does not become one again.
    fn renew(&mut self) -> Result<(), Failure> {
        if self.shape.kind == Pages::Small {
            return Ok(());
        }
        self.memory.advise(libc::MADV_DONTNEED)?;
        memory::populate(&self.memory);
        self.expected = 0;
        let [first, last] = self.frames()?;
        let is_whole = first % HUGE_PAGES as u64 == 0 && last == first + HUGE_PAGES as u64 - 1;
        if !is_whole {
            return Err(format!("no folio of 2 MiB: frames {first:#x} to {last:#x}").into());
        }
        Ok(())
    }

    /// There and back, `times` times.
    fn cycle(&mut self, bench: &Bench, release: Release, times: usize) -> Result<(), Failure> {
        let (mut there, mut back) = (0.0, 0.0);
        for _ in 0..times {
            self.renew()?;
            // The GPU begins without the pages: those that came home in one operation it may still access.
            self.gpu
                .advise_atomics(self.memory.as_ptr(), self.memory.len(), self.atomics)?;
            let frames = self.frames()?;
            let before = self.gpu.statistics()?;
            let start = bench.bus.kicks()?;
            let count = u32::try_from(self.shape.pages)?;
            let add = Command::atomic_add(self.memory.as_ptr().cast::<u64>(), 1);
            let add = add.repeat(count).stride(PAGE_SIZE as u32).span(count);
            let (seconds, result) = timed(|| memory::execute(&self.gpu, &[add]));
            result?;
            there += seconds;
            let acquired = bench.bus.kicks()?;
            if !memory::all_are(&self.gpu, &self.memory, self.state)? {
                return Err(format!("not all pages are {:?}", self.state).into());
            }
            let faults = self.gpu.statistics()?.faults - before.faults;
            let (seconds, result) = timed(|| {
                if release == Release::AtOnce {
                    self.gpu
                        .prefetch(self.memory.as_ptr(), self.memory.len(), Location::System)?;
                }
                self.increment();
                Ok::<_, Failure>(())
            });
            result?;
            back += seconds;
            let released = bench.bus.kicks()?;
            if !memory::all_are_home(&self.gpu, &self.memory)? {
                return Err("not all pages have come home".into());
            }
            let now = self.frames()?;
            if self.is_in_place() && now != frames {
                return Err(format!(
                    "{:?}: pages that were to stay in place have moved from {frames:x?} to {now:x?}",
                    self.atomics
                )
                .into());
            }
            let after = self.gpu.statistics()?;
            let moved = after.to_vram + after.from_vram - before.to_vram - before.from_vram;
            self.expected += 2;
            self.check()?;
            let released = released.since(acquired).round_trips as f64;
            if release == Release::ByFaults {
                self.trips[0].push(acquired.since(start).round_trips as f64);
                self.trips[1].push(released);
                self.faults.push(faults as f64);
                self.moved.push((moved * PAGE_SIZE as u64) as f64);
            } else {
                self.trips[2].push(released);
            }
        }
        let pages = (times * self.shape.pages) as f64;
        if release == Release::ByFaults {
            self.acquire.push(there / pages);
            self.release.push(back / pages);
        } else {
            self.release_at_once.push(back / pages);
        }
        Ok(())
    }

    fn increment(&self) {
        for page in 0..self.shape.pages {
            self.memory
                .atomic(page * PAGE_SIZE)
                .fetch_add(1, Ordering::Relaxed);
        }
    }

    fn check(&self) -> Result<(), Failure> {
        for page in 0..self.shape.pages {
            let found = self.memory.atomic(page * PAGE_SIZE).load(Ordering::Relaxed);
            if found != self.expected {
                return Err(format!("{found} increments of {} in page {page}", self.expected).into());
            }
        }
        Ok(())
    }

    fn row(&self, mechanism: &str, minor: &Series) -> Handover {
        let median = |list: &Vec<f64>| Spread::of(list.clone()).median;
        let at_once = self.can_release_at_once();
        Handover {
            mechanism: mechanism.to_owned(),
            pages: self.shape.pages,
            folio: self.shape.kind == Pages::Huge,
            acquire: self.acquire.to(minor),
            release: self.release.to(minor),
            release_at_once: at_once.then(|| self.release_at_once.to(minor)),
            moved: median(&self.moved) as u64,
            acquire_trips: median(&self.trips[0]),
            release_trips: median(&self.trips[1]),
            release_at_once_trips: at_once.then(|| median(&self.trips[2])),
            faults: median(&self.faults),
        }
    }
}

pub(crate) fn measure(bench: &mut Bench) -> Result<(), Failure> {
    for shape in SHAPES {
        measure_shape(bench, shape)?;
    }
    Ok(())
}

fn measure_shape(bench: &mut Bench, shape: Shape) -> Result<(), Failure> {
    turns::begin(&format!("exclusive access to {}", shape.name()));
    let plain = memory::aligned(HUGE_PAGES, Pages::Small)?;
    let alone = memory::aligned(1, Pages::Small)?;
    memory::populate(&alone);
    let mut contestants = MECHANISMS
        .iter()
        .map(|(_, atomics, state)| Contestant::new(bench, shape, *atomics, *state))
        .collect::<Result<Vec<_>, _>>()?;
    let times = (MANY / shape.pages).max(1);
    let [mut minor, mut keeper, mut protect] = [(); 3].map(|()| Series::default());
    for turn in bench.amount.turns() {
        minor.push(minor_faults(&plain, MINOR_FAULTS)?);
        // In another order each time.
        let count = contestants.len();
        for place in 0..count {
            let contestant = &mut contestants[(turn + place) % count];
            contestant.cycle(bench, Release::ByFaults, times)?;
            if contestant.can_release_at_once() {
                contestant.cycle(bench, Release::AtOnce, times)?;
            }
        }
        if shape.pages == 1 {
            let (seconds, result) = timed(|| (0..times).try_for_each(|_| bench.keeper.cycle()));
            result?;
            keeper.push(seconds / times as f64);
            let (seconds, result) = timed(|| (0..times).try_for_each(|_| protect_and_touch(&alone)));
            result?;
            protect.push(seconds / times as f64);
        }
    }
    for ((mechanism, ..), contestant) in MECHANISMS.iter().zip(&contestants) {
        turns::print(&Row::Handover(contestant.row(mechanism, &minor)))?;
    }
    aims(shape, &contestants, &keeper, &protect)
}

/// Takes the page from the process and gives it back, as a kernel does it that has no device.
fn protect_and_touch(page: &Mapping) -> Result<(), Failure> {
    page.protect(libc::PROT_NONE)?;
    page.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    page.atomic(0).fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn aims(shape: Shape, contestants: &[Contestant], keeper: &Series, protect: &Series) -> Result<(), Failure> {
    let [pin, exclusive, migrate] = contestants else {
        return Err("there are three mechanisms".into());
    };
    let faulting = |contestant: &Contestant| contestant.acquire.with(&contestant.release);
    let at_once = |contestant: &Contestant| contestant.acquire.with(&contestant.release_at_once);
    let show = |name: &str, ours: &Series, against: &str, other: &Series, aim: Option<f64>| {
        let row = ours.row(Subject::Exclusive, name, (against, other));
        turns::print(&Row::Ratio(Ratio { aim, ..row }))
    };
    if shape.pages == 1 {
        let cycle = faulting(pin);
        let name = "1 page, pin and home by a fault of the CPU";
        let without = "another process takes the page and gives it back (userfaultfd)";
        show(name, &cycle, without, keeper, Some(AIM_TO_NO_DEVICE))?;
        let alone = "the process does so itself (mprotect), and nobody has had it";
        return show(name, &cycle, alone, protect, None);
    }
    let aim = |most| (shape.pages == HUGE_PAGES && shape.kind == Pages::Small).then_some(most);
    let shape = shape.name();
    let faults = format!("{shape}, pin and home by faults of the CPU, a page");
    show(
        &faults,
        &faulting(pin),
        "migrate",
        &faulting(migrate),
        aim(AIM_TO_MIGRATE),
    )?;
    show(
        &faults,
        &faulting(pin),
        "exclusive",
        &faulting(exclusive),
        aim(AIM_TO_EXCLUSIVE),
    )?;
    let once = format!("{shape}, pin and home in one operation, a page");
    show(
        &once,
        &at_once(pin),
        "migrate, home in one operation",
        &at_once(migrate),
        aim(AIM_TO_MIGRATE),
    )?;
    show(
        &once,
        &at_once(pin),
        "exclusive, home by faults of the CPU",
        &faulting(exclusive),
        aim(AIM_TO_EXCLUSIVE),
    )
}
