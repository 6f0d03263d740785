// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Running a model through many schedules.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinion_device::gpu::sabotage::{Sabotage, sabotage};
use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Schedules of each kind that a model is run through. `PINION_SCHEDULES` is another number.
const SCHEDULES: usize = 300;
/// How often the schedules of one kind change threads at unlikely moments: enough for mistakes that take so many.
const DEPTHS: [usize; 2] = [2, 4];
/// The schedules are the same each time, unless `PINION_SEED` is another number.
const SEED: u64 = 0x0070_696e_696f_6e00;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

fn config(failure_persistence: FailurePersistence) -> Config {
    let mut config = Config::new();
    // Debug builds put nodes of page tables on the stack before they box them.
    config.stack_size = 256 << 10;
    config.failure_persistence = failure_persistence;
    config.max_steps = MaxSteps::FailAfter(20_000);
    config.silence_warnings = true;
    config
}

fn schedulers() -> Vec<Box<dyn Scheduler + Send>> {
    let count = number("PINION_SCHEDULES").map_or(SCHEDULES, |count| count as usize);
    let seed = number("PINION_SEED").unwrap_or(SEED);
    let mut schedulers: Vec<Box<dyn Scheduler + Send>> =
        vec![Box::new(RandomScheduler::new_from_seed(seed, count))];
    for depth in DEPTHS {
        schedulers.push(Box::new(PctScheduler::new_from_seed(seed, depth, count)));
    }
    schedulers
}

/// Runs a model through all schedules.
pub(crate) fn holds(model: impl Fn() + Copy + Send + Sync + 'static) {
    sabotage(None);
    for scheduler in schedulers() {
        Runner::new(scheduler, config(FailurePersistence::Print)).run(model);
    }
}

/// Runs a small model through every schedule there is; says how many there were.
pub(crate) fn holds_always(model: impl Fn() + Copy + Send + Sync + 'static) -> usize {
    sabotage(None);
    Runner::new(DfsScheduler::new(None, false), config(FailurePersistence::Print)).run(model)
}

/// Runs a model until it fails, which it has to, with a message that has `words` in it.
pub(crate) fn fails(what: &str, words: &[&str], model: impl Fn() + Copy + Send + Sync + 'static) {
    sabotage(None);
    search(what, words, model);
}

fn search(what: &str, words: &[&str], model: impl Fn() + Copy + Send + Sync + 'static) {
    let tried = Arc::new(AtomicUsize::new(0));
    for scheduler in schedulers() {
        let runner = Runner::new(scheduler, config(FailurePersistence::None));
        let count = tried.clone();
        let counted = move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
        };
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| runner.run(counted))) else {
            continue;
        };
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or_default();
        println!(
            "{what}: found in schedule {}: {text}",
            tried.load(Ordering::Relaxed)
        );
        assert!(
            words.iter().any(|words| text.contains(words)),
            "{what}: it failed, but not as it should ({words:?}): {text}"
        );
        return;
    }
    panic!("{what}: not found in {} schedules", tried.load(Ordering::Relaxed));
}

/// Runs a model with a broken promise: it has to be noticed, with one of these `words`.
pub(crate) fn finds(broken: Sabotage, words: &[&str], model: impl Fn() + Copy + Send + Sync + 'static) {
    sabotage(Some(broken));
    search(&format!("{broken:?}"), words, model);
    sabotage(None);
}

/// What a deadlock is called.
pub(crate) const DEADLOCK: &str = "deadlock";
