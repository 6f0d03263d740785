// SPDX-License-Identifier: GPL-2.0-only

//! Fences: how far the work of one address space on one ring has got.
//!
//! Locking: a fence's spinlock is taken in interrupts, under a channel's.

use crate::{abi, uapi, virtio::Answered};
use kernel::{
    new_condvar, new_spinlock_irq,
    prelude::*,
    sync::{Arc, CondVar, CondVarTimeoutResult, SpinLockIrq},
    time::{msecs_to_jiffies, Msecs},
};

/// How a submission ended.
#[derive(Clone, Copy)]
pub(crate) struct End {
    /// `abi::STATUS_*`, or `uapi::STATUS_DEVICE_LOST`.
    pub(crate) status: u32,
    /// Commands that were executed.
    pub(crate) executed: u32,
    /// Where it failed.
    pub(crate) fault_va: u64,
    /// Repeats that were done of the unfinished command.
    pub(crate) repeats: u64,
}

impl End {
    const fn new(status: u32) -> Self {
        Self {
            status,
            executed: 0,
            fault_va: 0,
            repeats: 0,
        }
    }
}

/// How many failures are remembered.
const FAILURES: usize = 64;

struct State {
    completed: u64,
    /// The latest submissions that failed; a ring buffer.
    failures: [(u64, End); FAILURES],
    /// How many have failed in all.
    failed: usize,
    /// The latest failure that is not remembered any more.
    forgotten: u64,
}

impl State {
    fn fail(&mut self, sequence: u64, end: End) {
        let entry = &mut self.failures[self.failed % FAILURES];
        if self.failed >= FAILURES {
            self.forgotten = entry.0;
        }
        *entry = (sequence, end);
        self.failed += 1;
    }

    fn end(&self, sequence: u64) -> Option<End> {
        let known = &self.failures[..self.failed.min(FAILURES)];
        match known.iter().find(|(failed, _)| *failed == sequence) {
            Some((_, end)) => Some(*end),
            None if sequence > self.forgotten => Some(End::new(abi::STATUS_OK)),
            None => None,
        }
    }
}

/// A timeline of submissions, numbered from 1.
#[pin_data]
pub(crate) struct Fence {
    #[pin]
    state: SpinLockIrq<State>,
    #[pin]
    changed: CondVar,
}

/// Why waiting ended.
pub(crate) enum Waited {
    /// The submission has ended.
    Ended(End),
    /// It has ended so long ago that how is not known any more.
    Forgotten,
    /// The time is over.
    TimedOut,
    /// A signal has come.
    Interrupted,
}

impl Fence {
    /// A fence that nothing has reached.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let state = State {
            completed: 0,
            failures: [(0, End::new(abi::STATUS_OK)); FAILURES],
            failed: 0,
            forgotten: 0,
        };
        Arc::pin_init(
            pin_init!(Self {
                state <- new_spinlock_irq!(state),
                changed <- new_condvar!("Fence::changed"),
            }),
            GFP_KERNEL,
        )
    }

    /// Waits for submission `sequence`, at most `timeout`.
    pub(crate) fn wait(&self, sequence: u64, timeout: Msecs) -> Waited {
        let mut state = self.state.lock();
        let mut remaining = msecs_to_jiffies(timeout);
        loop {
            if state.completed >= sequence {
                return state.end(sequence).map_or(Waited::Forgotten, Waited::Ended);
            }
            if remaining == 0 {
                return Waited::TimedOut;
            }
            remaining = match self.changed.wait_interruptible_timeout(&mut state, remaining) {
                CondVarTimeoutResult::Woken { jiffies } => jiffies,
                CondVarTimeoutResult::Timeout => 0,
                CondVarTimeoutResult::Signal { .. } => return Waited::Interrupted,
            };
        }
    }
}

impl Answered for Fence {
    fn answered(&self, sequence: u64, input: Option<&[u8]>) {
        let end = match input.map(abi::Completion::read_from_bytes) {
            Some(Ok(done)) => End {
                status: done.status,
                executed: done.executed,
                fault_va: done.fault_va,
                repeats: done.repeats,
            },
            // A device that does not write its completion is not one that can be relied on.
            _ => End::new(uapi::STATUS_DEVICE_LOST),
        };
        let mut state = self.state.lock();
        state.completed = state.completed.max(sequence);
        if end.status != abi::STATUS_OK {
            state.fail(sequence, end);
        }
        drop(state);
        self.changed.notify_all();
    }
}
