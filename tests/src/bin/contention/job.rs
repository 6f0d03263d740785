// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One row: both sides increment for a while, and then every counter is looked at.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinion_client::{Command, Completion, Gpu, PAGE_SIZE, Statistics, Submission};
use pinion_tests::{Failure, Mapping};

use crate::Mode;

/// What every byte of a page that is not in a counter holds.
const FILLER: u8 = 0xa5;

/// Pages that have to be taken back by the CPU before a protected row has shown anything.
const ENOUGH_RETURNS: u64 = 10;

/// How much longer than asked for a row may take until both sides have got on.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to do for a row.
#[derive(Debug)]
pub(crate) struct Settings<'a> {
    pub(crate) device: &'a Path,
    /// The first ring, and how many.
    pub(crate) ring: u32,
    pub(crate) rings: u32,
    pub(crate) threads: usize,
    pub(crate) pages: usize,
    pub(crate) counters: usize,
    pub(crate) repeat: u32,
    pub(crate) in_flight: usize,
    pub(crate) duration: Duration,
    /// What part of all increments each side has to make at least, in percent.
    pub(crate) least_share: u8,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) mode: Mode,
    /// Increments that the CPU threads made.
    pub(crate) cpu: u64,
    /// Increments in submissions that the GPU has completed.
    pub(crate) gpu: u64,
    /// Sum of all counters.
    pub(crate) found: u64,
    /// Increments that are missing, counter by counter.
    pub(crate) lost: u64,
    /// Increments that nobody made, counter by counter.
    pub(crate) surplus: u64,
    /// The first bytes beside the counters that have changed.
    pub(crate) damaged: Option<usize>,
    pub(crate) statistics: Statistics,
    /// What part of all increments each side has to make at least, in percent.
    least_share: u8,
    pub(crate) cpu_rate: f64,
    pub(crate) gpu_rate: f64,
}

impl Row {
    pub(crate) fn expected(&self) -> u64 {
        self.cpu + self.gpu
    }

    /// The share of the GPU in all increments while both sides were at work, in percent.
    pub(crate) fn gpu_share(&self) -> f64 {
        100.0 * self.gpu_rate / (self.cpu_rate + self.gpu_rate).max(1.0)
    }

    /// What is wrong with it.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut complain = |text: String| complaints.push(format!("row '{}': {text}", self.mode.name()));
        if self.cpu_rate == 0.0 {
            complain("a CPU thread made no progress".to_owned());
        }
        if self.gpu_rate == 0.0 {
            complain("the GPU made no progress".to_owned());
        }
        if self.mode.protects() {
            if self.lost > 0 {
                complain(format!(
                    "{} of {} increments are lost",
                    self.lost,
                    self.expected()
                ));
            }
            let (acquired, returned) = self.mode.handed_over(&self.statistics);
            if returned < ENOUGH_RETURNS {
                complain(format!(
                    "the CPU took a page back only {returned} times (the GPU had got {acquired}), so this shows nothing"
                ));
            }
            let share = self.gpu_share();
            let least = f64::from(self.least_share);
            if share < least || share > 100.0 - least {
                complain(format!(
                    "the GPU made {share:.1} % of all increments; both sides have to make {least} % at least"
                ));
            }
        } else if self.lost == 0 {
            complain("nothing was lost, so this run has no power to detect a loss".to_owned());
        }
        if self.surplus > 0 {
            complain(format!(
                "the counters hold {} increments that nobody made",
                self.surplus
            ));
        }
        if let Some(offset) = self.damaged {
            complain(format!(
                "memory beside the counters has changed, at offset {offset:#x}"
            ));
        }
        complaints
    }
}

/// Does a row.
///
/// On a busy host it may take a while until both sides run at the same time at all: without that nothing can get
/// lost. So the unprotected row is tried again, for a while, when nothing was.
pub(crate) fn run(settings: &Settings<'_>, mode: Mode) -> Result<Row, Failure> {
    let started = Instant::now();
    loop {
        let row = round(settings, mode)?;
        if mode.protects() || row.lost > 0 || started.elapsed() > PATIENCE {
            return Ok(row);
        }
    }
}

fn round(settings: &Settings<'_>, mode: Mode) -> Result<Row, Failure> {
    let gpu = Gpu::open(settings.device)?;
    let memory = Mapping::anonymous(settings.pages)?;
    memory.write(0, &vec![FILLER; memory.len()]);
    let counters: Vec<usize> = (0..settings.pages)
        .flat_map(|page| (0..settings.counters).map(move |counter| page * PAGE_SIZE + counter * 8))
        .collect();
    for &counter in &counters {
        memory.atomic(counter).store(0, Ordering::Relaxed);
    }
    gpu.advise_atomics(memory.as_ptr(), memory.len(), mode.advice())?;

    let crew = Crew::new(settings.threads);
    let mut feeders = (0..settings.rings)
        .map(|ring| Feeder::new(&gpu, settings.ring + ring, settings, &memory))
        .collect::<Result<Vec<_>, _>>()?;
    let started = Instant::now();
    let (tallies, worked, rates) = thread::scope(|scope| {
        let workers: Vec<_> = (0..settings.threads)
            .map(|index| {
                let (memory, counters, crew) = (&memory, &counters, &crew);
                scope.spawn(move || crew.work(index, memory, counters))
            })
            .collect();
        // A thread for each ring, none of which waits for another.
        let worked: Vec<_> = thread::scope(|rings| {
            let rings: Vec<_> = feeders
                .iter_mut()
                .map(|feeder| rings.spawn(|| feed(feeder, settings, mode, &crew)))
                .collect();
            rings.into_iter().map(|ring| ring.join()).collect()
        });
        let elapsed = started.elapsed().as_secs_f64();
        let rates = (
            crew.least_progress().min(1) as f64 * crew.total() as f64 / elapsed,
            feeders.iter().map(Feeder::increments).sum::<u64>() as f64 / elapsed,
        );
        crew.stop.store(true, Ordering::Relaxed);
        let tallies: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        (tallies, worked, rates)
    });
    for ring in worked {
        ring.map_err(|_| "the thread of a ring panicked")??;
    }
    for feeder in &mut feeders {
        feeder.drain()?;
    }

    let mut row = Row {
        mode,
        cpu: 0,
        gpu: feeders.iter().map(Feeder::increments).sum(),
        found: 0,
        lost: 0,
        surplus: 0,
        damaged: None,
        statistics: Statistics::default(),
        cpu_rate: rates.0,
        gpu_rate: rates.1,
        least_share: settings.least_share,
    };
    let tallies: Vec<Vec<u64>> = tallies
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|_| "a CPU thread panicked")?;
    for (index, &counter) in counters.iter().enumerate() {
        let cpu: u64 = tallies.iter().map(|tally| tally[index]).sum();
        let gpu = feeders
            .iter()
            .map(|feeder| feeder.share(index % settings.counters));
        let expected = cpu + gpu.sum::<u64>();
        let found = memory.atomic(counter).load(Ordering::Relaxed);
        row.cpu += cpu;
        row.found = row.found.wrapping_add(found);
        row.lost += expected.saturating_sub(found);
        row.surplus = row.surplus.saturating_add(found.saturating_sub(expected));
    }
    row.damaged = (0..settings.pages).find_map(|page| {
        let start = page * PAGE_SIZE + settings.counters * 8;
        let rest = memory.read(start, (page + 1) * PAGE_SIZE - start);
        rest.iter()
            .position(|&byte| byte != FILLER)
            .map(|offset| start + offset)
    });
    // Only now: reading the counters has taken the last pages back.
    row.statistics = gpu.statistics()?;
    Ok(row)
}

/// Keeps a ring busy for the time asked for, and until both sides have got on.
fn feed(feeder: &mut Feeder<'_>, settings: &Settings<'_>, mode: Mode, crew: &Crew) -> Result<(), Failure> {
    let end = Instant::now() + settings.duration;
    let limit = end + PATIENCE;
    loop {
        feeder.step()?;
        let now = Instant::now();
        if now < end {
            continue;
        }
        let (_, returned) = mode.handed_over(&feeder.gpu.statistics()?);
        let shown = !mode.protects() || returned >= ENOUGH_RETURNS;
        let enough = feeder.completed > 0 && crew.least_progress() > 0 && shown;
        if enough || now >= limit {
            return Ok(());
        }
    }
}

/// The CPU threads.
struct Crew {
    stop: AtomicBool,
    progress: Vec<Progress>,
}

/// How much a thread has done, on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Progress(AtomicU64);

impl Crew {
    fn new(threads: usize) -> Self {
        Self {
            stop: AtomicBool::new(false),
            progress: (0..threads).map(|_| Progress::default()).collect(),
        }
    }

    /// Increments all counters in turn until it is told to stop. Returns how often it did which.
    fn work(&self, index: usize, memory: &Mapping, counters: &[usize]) -> Vec<u64> {
        // The threads start in different places.
        let first = index * counters.len() / self.progress.len();
        let cells: Vec<_> = counters.iter().map(|&counter| memory.atomic(counter)).collect();
        let mut rounds = 0;
        while !self.stop.load(Ordering::Relaxed) {
            for cell in cells[first..].iter().chain(&cells[..first]) {
                cell.fetch_add(1, Ordering::Relaxed);
            }
            rounds += 1;
            self.progress[index]
                .0
                .store(rounds * cells.len() as u64, Ordering::Relaxed);
        }
        vec![rounds; counters.len()]
    }

    fn total(&self) -> u64 {
        self.progress
            .iter()
            .map(|progress| progress.0.load(Ordering::Relaxed))
            .sum()
    }

    fn least_progress(&self) -> u64 {
        self.progress
            .iter()
            .map(|progress| progress.0.load(Ordering::Relaxed))
            .min()
            .unwrap_or(0)
    }
}

/// The GPU's side: a ring.
struct Feeder<'a> {
    gpu: &'a Gpu,
    ring: u32,
    batch: Vec<Command>,
    in_flight: VecDeque<Submission>,
    depth: usize,
    /// Batches that have completed.
    completed: u64,
    repeat: u64,
    counters: u64,
}

impl<'a> Feeder<'a> {
    fn new(gpu: &'a Gpu, ring: u32, settings: &Settings<'_>, memory: &Mapping) -> Result<Self, Failure> {
        let info = gpu.info()?;
        if settings.pages > info.max_batch as usize {
            return Err(format!("--pages: a batch holds no more than {} commands", info.max_batch).into());
        }
        let span = u32::try_from(settings.counters)?;
        let batch = (0..settings.pages)
            .map(|page| Command::atomic_add(memory.page(page).cast::<u64>(), 1))
            .map(|command| command.repeat(settings.repeat).stride(8).span(span))
            .collect();
        Ok(Self {
            gpu,
            ring,
            batch,
            in_flight: VecDeque::new(),
            depth: settings.in_flight,
            completed: 0,
            repeat: settings.repeat.into(),
            counters: span.into(),
        })
    }

    /// Queues what there is room for, and waits a moment for the oldest.
    fn step(&mut self) -> Result<(), Failure> {
        while self.in_flight.len() < self.depth {
            // SAFETY: The commands work on the mapping, of which there are atomic references only, and which is
            // there until the work is done: it is dropped after `drain`, or after the GPU is closed.
            let work = unsafe { self.gpu.submit(self.ring, &self.batch) }?;
            self.in_flight.push_back(work);
        }
        self.reap(Duration::from_millis(100)).map(drop)
    }

    /// Waits for the oldest. False, if it has not ended in time.
    fn reap(&mut self, timeout: Duration) -> Result<bool, Failure> {
        let Some(&work) = self.in_flight.front() else {
            return Ok(false);
        };
        match self.gpu.wait(work, timeout) {
            Ok(completion) => self.count(completion)?,
            Err(error) if error.is_timeout() => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.in_flight.pop_front();
        Ok(true)
    }

    fn count(&mut self, completion: Completion) -> Result<(), Failure> {
        if !completion.is_ok() {
            return Err(format!("the GPU's work failed: {completion:x?}").into());
        }
        self.completed += 1;
        Ok(())
    }

    /// Waits for all.
    fn drain(&mut self) -> Result<(), Failure> {
        while !self.in_flight.is_empty() {
            if !self.reap(PATIENCE)? {
                return Err(format!(
                    "the GPU has not finished a batch within {PATIENCE:?}, though nobody else touches the pages"
                )
                .into());
            }
        }
        Ok(())
    }

    /// Increments in what has completed.
    fn increments(&self) -> u64 {
        self.completed * self.batch.len() as u64 * self.repeat
    }

    /// How many of them went to that counter of a page.
    fn share(&self, counter: usize) -> u64 {
        let extra = u64::from((counter as u64) < self.repeat % self.counters);
        self.completed * (self.repeat / self.counters + extra)
    }
}
