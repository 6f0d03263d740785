// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an engine knows of one of its rings.
//!
//! ```text
//!            doorbell             nothing there
//!   idle ───────────────> ready ─────────────────> idle
//!                         │  ^
//!     no page table entry │  │ REPLAY, CANCEL, the context ends
//!                         ├──> stalled
//!   semaphore, fence wait ├──> waiting    (looks again from time to time, or when it is poked)
//!            slow the bus └──> crossing   (goes on when the bus has caught up)
//! ```

use std::time::Duration;

use super::command::{Command, MAX_BATCH, MAX_SUBMISSION, Submission};
use super::context::Context;
use super::execute::{Execution, News, Scratch, scratch};
use super::state::Activity;
use super::status::Error;
use crate::sync::{Arc, Instant};

/// Whether a ring can be served.
#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// There was no submission.
    Idle,
    /// Its submission, or the next one, can be worked on.
    Ready,
    /// It is stalled on a fault, at this address.
    Stalled(u64),
    /// It waits for a number, and looks at it at this time.
    Waiting {
        /// When.
        next: Instant,
    },
    /// What it has moved is on the bus until then.
    Crossing(Instant),
}

impl State {
    /// As a number that others can look at; see [`activity`].
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Idle => 0,
            Self::Ready => 1,
            Self::Stalled(_) => 2,
            Self::Waiting { .. } => WAITING,
            Self::Crossing(_) => 4,
        }
    }
}

/// The number of [`State::Waiting`].
pub(super) const WAITING: u8 = 3;

/// What the number of a state stands for. A stall that has just ended, or begun, counts as work.
pub(super) fn activity(number: u8, stalled: Option<Activity>) -> Activity {
    match number {
        0 => Activity::Idle,
        2 => stalled.unwrap_or(Activity::Running),
        WAITING => Activity::Waiting,
        4 => Activity::Crossing,
        _ => Activity::Running,
    }
}

/// A submission that is being worked on.
pub(super) struct Task<T> {
    /// Whom to answer; none if that was done too early, on purpose.
    pub(super) ticket: Option<T>,
    /// Its context.
    pub(super) context: Arc<Context>,
    /// Where on the ring it is.
    pub(super) position: u64,
    /// Its sequence number.
    pub(super) sequence: u64,
    /// Where its commands are, if they have not been loaded yet.
    pub(super) indirect: Option<(u64, usize)>,
    /// The command that is being executed.
    pub(super) execution: Option<Execution>,
    /// Commands that were executed to their end.
    pub(super) executed: u32,
    /// An access got through since the last look.
    pub(super) moved: bool,
    /// The fault whose REPLAY waits to hear how the next access goes.
    pub(super) retried: Option<u64>,
    /// What others are to be told.
    pub(super) news: News,
    /// How long it was worked on, and has waited for numbers before.
    pub(super) worked: Duration,
    /// Since when it waits for a number, and how long it did not look last.
    pub(super) waiting: Option<(Instant, Duration)>,
}

impl<T> Task<T> {
    pub(super) fn new(ticket: T, context: Arc<Context>, position: u64, submission: Submission) -> Self {
        Self {
            ticket: Some(ticket),
            context,
            position,
            sequence: submission.sequence,
            indirect: submission.indirect,
            execution: None,
            executed: 0,
            moved: false,
            retried: None,
            news: News::default(),
            worked: Duration::ZERO,
            waiting: None,
        }
    }
}

/// A ring, as its engine sees it.
pub(super) struct Lane<T> {
    pub(super) ring: u16,
    pub(super) state: State,
    pub(super) task: Option<Task<T>>,
    /// Bytes of the submission, or of commands that are being loaded.
    pub(super) bytes: Vec<u8>,
    /// The commands of the task.
    pub(super) commands: Vec<Command>,
    /// For the command that is being executed.
    pub(super) scratch: Scratch,
    /// Completions that the driver was not told of.
    pub(super) unannounced: u32,
    /// When it was served last, as a number that grows.
    pub(super) served: u64,
}

impl<T> Lane<T> {
    pub(super) fn new(ring: u16) -> Self {
        Self {
            ring,
            state: State::Idle,
            task: None,
            bytes: Vec::with_capacity(MAX_SUBMISSION),
            commands: Vec::with_capacity(MAX_BATCH as usize),
            scratch: scratch(),
            unannounced: 0,
            served: 0,
        }
    }

    /// Whether its task may go on.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.task
            .as_ref()
            .map_or(Ok(()), |task| task.context.check(self.ring, task.position))
    }
}
