// SPDX-License-Identifier: GPL-2.0-only

//! How far work has got: a [`Timeline`] for each ring of an open file, and the [`Progress`] of the file as a whole.
//!
//! A timeline counts the submissions of one file on one ring, from 1. They end in this order. Device rings have
//! numbers of their own, which no program sees (`ring.rs`).
//!
//! Locking: `Timeline::state` is taken in interrupts, under a channel's lock. `Progress::state` as well; whoever
//! needs both takes that of the progress first.

use crate::{abi, ring::Ring, uapi};
use kernel::{
    bindings,
    fs::File,
    new_spinlock_irq,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{Atomic, Relaxed},
        poll::{PollCondVarBox, PollTable},
        Arc, CondVarTimeoutResult, SpinLockIrq,
    },
    task::MAX_SCHEDULE_TIMEOUT,
    time::Jiffies,
};

/// How a submission ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// `uapi::STATUS_*`, most of which are `abi::STATUS_*`.
    pub(crate) status: u32,
    /// Commands that were executed.
    pub(crate) executed: u32,
    /// Where it failed.
    pub(crate) fault_va: u64,
    /// Repeats that were done of the unfinished command.
    pub(crate) repeats: u64,
}

impl End {
    /// An end of which nothing else is known.
    pub(crate) const fn new(status: u32) -> Self {
        Self {
            status,
            executed: 0,
            fault_va: 0,
            repeats: 0,
        }
    }
}

/// Most submissions of a file that have not ended.
pub(crate) const MAX_SUBMISSIONS: usize = 256;
/// Most commands in them: a bound on kernel memory, 1 MiB.
pub(crate) const MAX_COMMANDS: usize = 16384;

/// What became of waiting.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// What was waited for has happened.
    Done,
    /// The time is over.
    TimedOut,
    /// A signal has come.
    Interrupted,
}

struct Outstanding {
    /// Submissions that have ended since a program last asked.
    unread: u64,
    /// Submissions that have not ended, and the commands in them.
    submissions: usize,
    commands: usize,
    /// The device is lost.
    lost: bool,
}

/// Counters of a file's work.
pub(crate) struct Counters {
    /// Submissions that were accepted.
    pub(crate) submissions: Atomic<i64>,
    /// Commands in them.
    pub(crate) commands: Atomic<i64>,
    /// Submissions that have ended.
    pub(crate) completed: Atomic<i64>,
    /// Those of them that have failed.
    pub(crate) failed: Atomic<i64>,
}

/// How far all work of a file has got.
#[pin_data]
pub(crate) struct Progress {
    #[pin]
    outstanding: SpinLockIrq<Outstanding>,
    /// A submission has ended.
    changed: PollCondVarBox,
    /// What cancelled work is reported as: `uapi::STATUS_*`.
    cancelled: Atomic<i32>,
    /// The counters.
    pub(crate) counters: Counters,
}

impl Progress {
    /// Of a file that has done nothing yet.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let outstanding = Outstanding {
            unread: 0,
            submissions: 0,
            commands: 0,
            lost: false,
        };
        Arc::pin_init(
            try_pin_init!(Self {
                outstanding <- new_spinlock_irq!(outstanding, "Progress::outstanding"),
                changed: PollCondVarBox::new(c"Progress::changed", static_lock_class!())?,
                cancelled: Atomic::new(uapi::STATUS_FAULT as i32),
                counters: Counters {
                    submissions: Atomic::new(0),
                    commands: Atomic::new(0),
                    completed: Atomic::new(0),
                    failed: Atomic::new(0),
                },
            }? Error),
            GFP_KERNEL,
        )
    }

    /// A fault of this file is about to be cancelled: sets what work that ends with it is reported as. There is
    /// no second one, for the first puts the context into error.
    pub(crate) fn set_cancelled(&self, status: u32) {
        self.cancelled.store(status as i32, Relaxed);
    }

    /// Counts a submission as outstanding, once there is room for it.
    ///
    /// # Errors
    ///
    /// EAGAIN: there is no room, and the caller does not want to wait. ERESTARTSYS.
    pub(crate) fn admit(&self, commands: usize, may_wait: bool) -> Result {
        let mut outstanding = self.outstanding.lock();
        while !outstanding.has_room(commands) {
            if !may_wait {
                return Err(EAGAIN);
            }
            if self.changed.wait_interruptible(&mut outstanding) {
                return Err(ERESTARTSYS);
            }
        }
        outstanding.submissions += 1;
        outstanding.commands += commands;
        Ok(())
    }

    /// Takes back what [`Progress::admit`] did, for a submission that did not come about.
    pub(crate) fn withdraw(&self, commands: usize) {
        self.outstanding.lock().remove(commands);
        self.changed.notify_all();
    }

    /// A submission has been queued.
    fn queued(&self, commands: usize) {
        self.counters.submissions.add(1, Relaxed);
        self.counters.commands.add(commands as i64, Relaxed);
    }

    /// A submission has ended.
    fn ended(&self, commands: usize, failed: bool) {
        self.counters.completed.add(1, Relaxed);
        self.counters.failed.add(failed.into(), Relaxed);
        let mut outstanding = self.outstanding.lock();
        outstanding.remove(commands);
        outstanding.unread += 1;
        drop(outstanding);
        self.changed.notify_all();
    }

    /// Submissions that have not ended.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding.lock().submissions
    }

    /// Waits until `done`. It is looked at whenever a submission of the file has ended.
    pub(crate) fn wait(&self, jiffies: Jiffies, mut done: impl FnMut() -> bool) -> Waited {
        let mut remaining = jiffies;
        let mut outstanding = self.outstanding.lock();
        loop {
            if done() {
                return Waited::Done;
            }
            if remaining == 0 {
                return Waited::TimedOut;
            }
            remaining = match self
                .changed
                .wait_interruptible_timeout(&mut outstanding, remaining)
            {
                CondVarTimeoutResult::Woken { jiffies } => jiffies,
                CondVarTimeoutResult::Timeout => 0,
                CondVarTimeoutResult::Signal { .. } => return Waited::Interrupted,
            };
        }
    }

    /// The device is lost: when what is outstanding has ended there will be no more.
    pub(crate) fn lose(&self) {
        self.outstanding.lock().lost = true;
        self.changed.notify_all();
    }

    /// How many submissions have ended since this was last called; waits for one.
    ///
    /// # Errors
    ///
    /// EAGAIN: none has, and the caller does not want to wait. ERESTARTSYS. ENODEV: none has, and none will.
    pub(crate) fn read(&self, may_wait: bool) -> Result<u64> {
        let mut outstanding = self.outstanding.lock();
        while outstanding.unread == 0 {
            if outstanding.lost && outstanding.submissions == 0 {
                return Err(ENODEV);
            }
            if !may_wait {
                return Err(EAGAIN);
            }
            if self.changed.wait_interruptible(&mut outstanding) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(core::mem::take(&mut outstanding.unread))
    }

    /// What [`Progress::read`] said did not get to the program.
    pub(crate) fn unread(&self, count: u64) {
        self.outstanding.lock().unread += count;
        self.changed.notify_all();
    }

    /// What can be done with the file without waiting, as `poll` says it.
    pub(crate) fn poll(&self, file: &File, table: PollTable<'_>) -> u32 {
        table.register_wait(file, &self.changed);
        let outstanding = self.outstanding.lock();
        let mut ready = 0;
        if outstanding.unread > 0 {
            ready |= bindings::POLLIN | bindings::POLLRDNORM;
        }
        if outstanding.has_room(1) {
            ready |= bindings::POLLOUT | bindings::POLLWRNORM;
        }
        if outstanding.lost {
            ready |= bindings::POLLERR | bindings::POLLHUP;
        }
        ready
    }
}

impl Outstanding {
    fn has_room(&self, commands: usize) -> bool {
        self.submissions < MAX_SUBMISSIONS && self.commands + commands <= MAX_COMMANDS
    }

    fn remove(&mut self, commands: usize) {
        self.submissions -= 1;
        self.commands -= commands;
    }
}

/// How many runs of failures are remembered.
const FAILURES: usize = 64;

/// Submissions one after the other that have all failed in the same way.
#[derive(Clone, Copy)]
struct Failures {
    first: u64,
    last: u64,
    end: End,
}

/// A ring with work that waits for a submission.
struct Watcher {
    sequence: u64,
    ring: Arc<Ring>,
}

struct State {
    submitted: u64,
    completed: u64,
    /// The latest failures; a ring buffer.
    failures: [Failures; FAILURES],
    /// How many there were in all.
    failed: usize,
    /// The latest failure that is not remembered any more.
    forgotten: u64,
    watchers: KVec<Watcher>,
}

impl State {
    fn fail(&mut self, sequence: u64, end: End) {
        let count = self.failed;
        // Whatever is queued behind a failure that puts the context into error ends alike, so that this is what
        // keeps a long queue from being forgotten.
        if let Some(latest) = count
            .checked_sub(1)
            .map(|index| &mut self.failures[index % FAILURES])
        {
            if latest.end == end && latest.last + 1 == sequence {
                latest.last = sequence;
                return;
            }
        }
        let entry = &mut self.failures[count % FAILURES];
        if count >= FAILURES {
            self.forgotten = entry.last;
        }
        *entry = Failures {
            first: sequence,
            last: sequence,
            end,
        };
        self.failed += 1;
    }

    fn end(&self, sequence: u64) -> Option<End> {
        let known = &self.failures[..self.failed.min(FAILURES)];
        match known
            .iter()
            .find(|run| (run.first..=run.last).contains(&sequence))
        {
            Some(run) => Some(run.end),
            None if sequence > self.forgotten => Some(End::new(abi::STATUS_OK)),
            None => None,
        }
    }
}

/// What is known of a submission.
pub(crate) enum Found {
    /// There is none of that number.
    Nothing,
    /// It has not ended.
    Pending,
    /// It has ended.
    Ended(End),
    /// It has ended so long ago that how is not known any more.
    Forgotten,
}

/// A timeline of submissions, numbered from 1.
#[pin_data]
pub(crate) struct Timeline {
    progress: Arc<Progress>,
    #[pin]
    state: SpinLockIrq<State>,
    /// A submission has ended.
    changed: PollCondVarBox,
    /// How many submissions the device has.
    pub(crate) in_flight: Atomic<i32>,
    /// Nanoseconds for which the ring was busy with this file's work.
    pub(crate) busy: Atomic<i64>,
}

impl Timeline {
    /// One of the file with that progress, on which nothing has been submitted.
    pub(crate) fn new(progress: &Arc<Progress>) -> Result<Arc<Self>> {
        let nothing = Failures {
            first: 0,
            last: 0,
            end: End::new(abi::STATUS_OK),
        };
        let state = State {
            submitted: 0,
            completed: 0,
            failures: [nothing; FAILURES],
            failed: 0,
            forgotten: 0,
            watchers: KVec::new(),
        };
        Arc::pin_init(
            try_pin_init!(Self {
                progress: progress.clone(),
                state <- new_spinlock_irq!(state, "Timeline::state"),
                changed: PollCondVarBox::new(c"Timeline::changed", static_lock_class!())?,
                in_flight: Atomic::new(0),
                busy: Atomic::new(0),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The number of the next submission. Whoever asks keeps others from asking before it is [`queued`].
    ///
    /// [`queued`]: Self::queued
    pub(crate) fn next(&self) -> u64 {
        self.state.lock().submitted + 1
    }

    /// A submission has been queued.
    pub(crate) fn queued(&self, sequence: u64, commands: usize) {
        self.state.lock().submitted = sequence;
        self.progress.queued(commands);
    }

    /// A submission has ended. May be called in interrupts.
    pub(crate) fn end(&self, sequence: u64, commands: usize, mut end: End) -> End {
        if end.status == abi::STATUS_FAULT_CANCELLED {
            end.status = self.progress.cancelled.load(Relaxed) as u32;
        }
        let mut state = self.state.lock();
        state.completed = state.completed.max(sequence);
        if end.status != abi::STATUS_OK {
            state.fail(sequence, end);
        }
        let completed = state.completed;
        state.watchers.retain(|watcher| {
            let passed = watcher.sequence <= completed;
            if passed {
                watcher.ring.clone().pump_later();
            }
            !passed
        });
        drop(state);
        self.changed.notify_all();
        self.progress.ended(commands, end.status != abi::STATUS_OK);
        end
    }

    /// Whether a submission has ended.
    pub(crate) fn has_passed(&self, sequence: u64) -> bool {
        self.state.lock().completed >= sequence
    }

    /// How a submission ended, or that it has not.
    pub(crate) fn find(&self, sequence: u64) -> Found {
        let state = self.state.lock();
        if sequence == 0 || sequence > state.submitted {
            Found::Nothing
        } else if sequence > state.completed {
            Found::Pending
        } else {
            state.end(sequence).map_or(Found::Forgotten, Found::Ended)
        }
    }

    /// Waits for a submission.
    pub(crate) fn wait(&self, sequence: u64, jiffies: Jiffies) -> Waited {
        let mut remaining = jiffies;
        let mut state = self.state.lock();
        while state.completed < sequence {
            if remaining == 0 {
                return Waited::TimedOut;
            }
            remaining = match self.changed.wait_interruptible_timeout(&mut state, remaining) {
                CondVarTimeoutResult::Woken { jiffies } => jiffies,
                CondVarTimeoutResult::Timeout => 0,
                CondVarTimeoutResult::Signal { .. } => return Waited::Interrupted,
            };
        }
        Waited::Done
    }

    /// Has `ring` look at what is queued on it when a submission has ended, if that is still to come.
    pub(crate) fn watch(&self, sequence: u64, ring: &Arc<Ring>) -> Result {
        let mut room = KVec::new();
        loop {
            let mut state = self.state.lock();
            if state.completed >= sequence {
                return Ok(());
            }
            let watcher = Watcher {
                sequence,
                ring: ring.clone(),
            };
            if state.watchers.push_within_capacity(watcher).is_ok() {
                return Ok(());
            }
            let wanted = state.watchers.len() + 8;
            if room.capacity() >= wanted {
                // What is in the old one fits into the new one.
                for watcher in state.watchers.drain_all() {
                    let _ = room.push_within_capacity(watcher);
                }
                core::mem::swap(&mut room, &mut state.watchers);
                continue;
            }
            drop(state);
            room = KVec::with_capacity(wanted, GFP_KERNEL)?;
        }
    }

    /// What `poll` says of a submission.
    pub(crate) fn poll(&self, sequence: u64, file: &File, table: PollTable<'_>) -> u32 {
        table.register_wait(file, &self.changed);
        if self.has_passed(sequence) {
            bindings::POLLIN | bindings::POLLRDNORM
        } else {
            0
        }
    }
}

/// A time that is as good as none.
pub(crate) const FOREVER: Jiffies = MAX_SCHEDULE_TIMEOUT as Jiffies;
