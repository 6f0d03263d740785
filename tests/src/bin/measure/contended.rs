// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A CPU thread and the GPU increment. Some of the thread's increments are on the page that the GPU works on, the others on a page
//! that it has for itself.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinion_client::{Atomics, Command, Gpu, Statistics, Submission};
use pinion_tests::measurement::{Contention, Row, Spread};
use pinion_tests::{Failure, Mapping};

use crate::Bench;
use crate::handover::MECHANISMS;
use crate::memory::{self, Pages};
use crate::turns;

/// Percent of the thread's increments that are on the GPU's page.
const SHARES: [u32; 5] = [0, 1, 10, 50, 100];
/// Increments in a batch.
const REPEAT: u32 = 1024;
/// Batches that are queued at a time.
const DEPTH: usize = 4;
/// How often to try for something to compare with.
const TRIES: usize = 20;

/// Increments in a second.
#[derive(Clone, Copy, Debug)]
struct Rates {
    cpu: f64,
    gpu: f64,
    handovers: f64,
}

pub(crate) fn measure(bench: &mut Bench) -> Result<(), Failure> {
    let (rounds, period) = if bench.amount.quick { (1, 30) } else { (5, 250) };
    let period = Duration::from_millis(period);
    let mut found = vec![Vec::new(); MECHANISMS.len() * SHARES.len()];
    for round in 0..rounds {
        turns::begin(&format!("contention, round {} of {rounds}", round + 1));
        let undisturbed = undisturbed(bench, period)?;
        let mut rates = found.iter_mut();
        for (_, atomics, _) in MECHANISMS {
            for percent in SHARES {
                let here = run(bench, atomics, percent, period)?;
                if let Some(list) = rates.next() {
                    list.push((here, undisturbed));
                }
            }
        }
    }
    let mut rates = found.iter();
    for (mechanism, ..) in MECHANISMS {
        for percent in SHARES {
            let list = rates.next().ok_or("rates")?;
            let median =
                |pick: fn(&(Rates, Rates)) -> f64| Spread::of(list.iter().map(pick).collect()).median;
            turns::print(&Row::Contention(Contention {
                mechanism: mechanism.to_owned(),
                percent,
                cpu: median(|(here, alone)| here.cpu / alone.cpu),
                gpu: median(|(here, alone)| here.gpu / alone.gpu),
                cpu_rate: median(|(here, _)| here.cpu),
                gpu_rate: median(|(here, _)| here.gpu),
                handovers: median(|(here, _)| here.handovers),
            }))?;
        }
    }
    Ok(())
}

/// Both sides when neither is in the other's way: what the others are compared with.
fn undisturbed(bench: &Bench, period: Duration) -> Result<Rates, Failure> {
    for _ in 0..TRIES {
        let rates = run(bench, Atomics::Unprotected, 0, period)?;
        // On a busy machine one of the two may not have had a processor.
        if rates.cpu > 0.0 && rates.gpu > 0.0 {
            return Ok(rates);
        }
    }
    Err(format!("in {TRIES} tries of {period:?} not both sides have got on").into())
}

/// Pages that were handed to the GPU.
fn handed_over(statistics: &Statistics) -> u64 {
    statistics.pins + statistics.exclusives + statistics.to_vram
}

fn run(bench: &Bench, atomics: Atomics, percent: u32, period: Duration) -> Result<Rates, Failure> {
    let gpu = bench.open()?;
    let memory = memory::aligned(1, Pages::Small)?;
    let own = memory::aligned(1, Pages::Small)?;
    memory::populate(&memory);
    memory::populate(&own);
    gpu.advise_atomics(memory.as_ptr(), memory.len(), atomics)?;
    let (started, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut feeder = Feeder::new(&gpu, &memory);
    // The page is the GPU's when this begins.
    feeder.step()?;
    let before = handed_over(&gpu.statistics()?);
    let (thread, fed, seconds) = thread::scope(|scope| {
        let (memory, own, started, stop) = (&memory, &own, &started, &stop);
        let thread = scope.spawn(move || {
            started.store(true, Ordering::Relaxed);
            increment(memory, own, percent, stop)
        });
        let mut fed = Ok(());
        while fed.is_ok() && !started.load(Ordering::Relaxed) {
            fed = feeder.step();
        }
        let start = Instant::now();
        while fed.is_ok() && start.elapsed() < period {
            fed = feeder.step();
        }
        stop.store(true, Ordering::Relaxed);
        let thread = thread.join();
        (thread, fed, start.elapsed().as_secs_f64())
    });
    let handovers = handed_over(&gpu.statistics()?) - before;
    // What the GPU has done by now: the thread has stopped, and knows what it has done.
    let (shared, alone) = thread.map_err(|_| "a CPU thread panicked")?;
    let gpu_now = memory.atomic(0).load(Ordering::Relaxed).wrapping_sub(shared);
    fed?;
    feeder.drain()?;
    let (found, expected) = (
        memory.atomic(0).load(Ordering::Relaxed),
        shared + feeder.increments(),
    );
    if found != expected {
        return Err(format!("{found} increments of {expected}: {atomics:?}, {percent} %").into());
    }
    if own.atomic(0).load(Ordering::Relaxed) != alone {
        return Err("increments of the thread's own page are lost".into());
    }
    Ok(Rates {
        cpu: (shared + alone) as f64 / seconds,
        gpu: gpu_now as f64 / seconds,
        handovers: handovers as f64 / seconds,
    })
}

/// Increments until it is told to stop; returns how often on the GPU's page, and how often on the other.
fn increment(memory: &Mapping, own: &Mapping, percent: u32, stop: &AtomicBool) -> (u64, u64) {
    let (there, here) = (memory.atomic(0), own.atomic(0));
    let (mut shared, mut alone, mut due) = (0, 0, 0);
    // Once at least.
    while shared + alone == 0 || !stop.load(Ordering::Relaxed) {
        due += percent;
        if due >= 100 {
            due -= 100;
            there.fetch_add(1, Ordering::Relaxed);
            shared += 1;
        } else {
            here.fetch_add(1, Ordering::Relaxed);
            alone += 1;
        }
    }
    (shared, alone)
}

/// Keeps the GPU busy.
struct Feeder<'a> {
    gpu: &'a Gpu,
    batch: [Command; 1],
    in_flight: VecDeque<Submission>,
    completed: u64,
}

impl<'a> Feeder<'a> {
    fn new(gpu: &'a Gpu, memory: &Mapping) -> Self {
        Self {
            gpu,
            batch: [Command::atomic_add(memory.as_ptr().cast::<u64>(), 1).repeat(REPEAT)],
            in_flight: VecDeque::new(),
            completed: 0,
        }
    }

    /// Queues what there is room for, and waits a moment for the oldest.
    fn step(&mut self) -> Result<(), Failure> {
        while self.in_flight.len() < DEPTH {
            self.in_flight
                .push_back(memory::submit(self.gpu, 0, &self.batch)?);
        }
        self.reap(Duration::from_millis(10)).map(drop)
    }

    /// Waits for the oldest. False, if it has not ended in time.
    fn reap(&mut self, timeout: Duration) -> Result<bool, Failure> {
        let Some(&work) = self.in_flight.front() else {
            return Ok(false);
        };
        match self.gpu.wait(work, timeout) {
            Ok(completion) if completion.is_ok() => self.completed += 1,
            Ok(completion) => return Err(format!("the GPU's work failed: {completion:x?}").into()),
            Err(error) if error.is_timeout() => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.in_flight.pop_front();
        Ok(true)
    }

    fn drain(&mut self) -> Result<(), Failure> {
        while !self.in_flight.is_empty() {
            if !self.reap(memory::patience())? {
                return Err("the GPU has not finished a batch, though nobody else touches its page".into());
            }
        }
        Ok(())
    }

    fn increments(&self) -> u64 {
        self.completed * u64::from(REPEAT)
    }
}
