// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Replayable faults: which rings are stalled on what, and how a stall ends.
//!
//! ```text
//!                 join                        every waiter has been retried once
//!                 ┌──┐                          ┌─────────────────────────> REPLAY completes
//!   first stall ──┴─> active ──(REPLAY)──> replaying
//!                       └──(CANCEL, context destroyed, device reset)──> gone, waiters end
//! ```
//!
//! A ring is the waiter of at most one fault, so there are never more faults than rings. Whoever waits
//! on a fault that is replayed reports how the retry went, however it went: the access got through, it
//! stalled again (on another fault: one that is being replayed takes no new waiters), its context
//! ended. So a REPLAY always completes.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use pinion_abi::{EVENT_CONTEXT_ERROR, EVENT_FAULT, EventRecord, PAGE_SIZE};

use super::context::Context;
use super::event::EventLog;
use super::execute::AccessFault;
use super::inject::{Defect, Injector};
use super::state::{Activity, FaultState};
use super::status::Error;

/// How a stall ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Try again, and report to this fault how it went.
    Retry(u64),
    /// The submission is over and completes with this.
    Ended(Error),
    /// The submission is over and nobody wants to hear of it.
    Abandoned,
}

/// A REPLAY whose waiters have all been retried.
#[derive(Debug, PartialEq, Eq)]
pub struct Replayed<T> {
    /// The request it was.
    pub ticket: T,
    /// How many of them got through.
    pub through: u64,
}

#[derive(Debug)]
enum Stage<T> {
    Active,
    Replaying { ticket: T, waiting: usize, through: u64 },
}

#[derive(Debug)]
struct Fault<T> {
    id: u64,
    context: u32,
    page: u64,
    lacking: u8,
    reason: u8,
    stage: Stage<T>,
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Free,
    Stalled(u64),
    Woken(Wake),
}

#[derive(Debug)]
struct State<T> {
    last_id: u64,
    faults: Vec<Fault<T>>,
    /// By ring.
    slots: Vec<Slot>,
    closed: bool,
}

/// What a stalled access belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The ring.
    pub ring: u16,
    /// The context.
    pub context: &'a Context,
    /// The sequence number of the submission.
    pub sequence: u64,
}

/// All faults of the device.
#[derive(Debug)]
pub struct FaultTable<T> {
    state: Mutex<State<T>>,
    woken: Condvar,
    log: Arc<EventLog>,
    injector: Arc<Injector>,
}

impl<T> State<T> {
    fn stalled_on(&self, id: u64) -> usize {
        self.slots
            .iter()
            .filter(|slot| matches!(slot, Slot::Stalled(on) if *on == id))
            .count()
    }

    /// Wakes the rings that are stalled on fault `id`.
    fn wake(&mut self, id: u64, wake: Wake) {
        for slot in &mut self.slots {
            if matches!(slot, Slot::Stalled(on) if *on == id) {
                *slot = Slot::Woken(wake);
            }
        }
    }

    fn report(&mut self, id: u64, got_through: bool) -> Option<Replayed<T>> {
        let index = self.faults.iter().position(|fault| fault.id == id)?;
        let Stage::Replaying { waiting, through, .. } = &mut self.faults.get_mut(index)?.stage else {
            return None;
        };
        *waiting = waiting.saturating_sub(1);
        *through = through.saturating_add(got_through.into());
        if *waiting > 0 {
            return None;
        }
        match self.faults.swap_remove(index).stage {
            Stage::Replaying { ticket, through, .. } => Some(Replayed { ticket, through }),
            Stage::Active => None,
        }
    }

    /// Ends the active faults of a context; `of` gives what each ends with.
    fn end(&mut self, context: u32, log: &EventLog, of: impl Fn(u64) -> Error) {
        let mut ended = Vec::new();
        self.faults.retain(|fault| {
            let ends = fault.context == context && matches!(fault.stage, Stage::Active);
            if ends {
                ended.push(fault.id);
            }
            !ends
        });
        for id in ended {
            log.forget_fault(id);
            self.wake(id, Wake::Ended(of(id)));
        }
    }
}

impl<T> FaultTable<T> {
    /// No faults, for `rings` rings. What happens is told to `log`.
    pub fn new(rings: u16, log: Arc<EventLog>, injector: Arc<Injector>) -> Self {
        let slots = vec![Slot::Free; rings.into()];
        let state = State {
            last_id: 0,
            faults: Vec::new(),
            slots,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            woken: Condvar::new(),
            log,
            injector,
        }
    }

    /// Stalls a ring. If the access was the retry of another fault, that is reported too, afterwards.
    ///
    /// An error is what [`FaultTable::wait`] would have said.
    pub fn stall(
        &self,
        origin: Origin<'_>,
        fault: &AccessFault,
        retried: Option<u64>,
    ) -> (Result<(), Wake>, Option<Replayed<T>>) {
        let mut state = self.state.lock();
        let result = self.stall_locked(&mut state, origin, fault);
        let replayed = retried.and_then(|id| state.report(id, false));
        (result, replayed)
    }

    fn stall_locked(
        &self,
        state: &mut State<T>,
        origin: Origin<'_>,
        fault: &AccessFault,
    ) -> Result<(), Wake> {
        if state.closed {
            return Err(Wake::Abandoned);
        }
        // Under the lock: whoever ends a context says so in it first, and then comes here to wake.
        origin.context.check().map_err(Wake::Ended)?;
        let context = origin.context.id();
        let page = fault.va & !(PAGE_SIZE - 1);
        let same = |other: &&Fault<T>| {
            other.context == context
                && other.page == page
                && other.lacking == fault.lacking
                && matches!(other.stage, Stage::Active)
        };
        let id = match state.faults.iter().find(same) {
            Some(known) => known.id,
            None => {
                state.last_id = state.last_id.wrapping_add(1);
                let id = state.last_id;
                state.faults.push(Fault {
                    id,
                    context,
                    page,
                    lacking: fault.lacking,
                    reason: fault.reason,
                    stage: Stage::Active,
                });
                if !self.injector.strikes(Defect::LostFault) {
                    self.log.push(EventRecord {
                        kind: EVENT_FAULT,
                        ring: origin.ring,
                        context,
                        va: fault.va,
                        fault: id,
                        sequence: origin.sequence,
                        access: fault.access,
                        reason: fault.reason,
                        ..EventRecord::default()
                    });
                }
                id
            }
        };
        match state.slots.get_mut(usize::from(origin.ring)) {
            Some(slot) => *slot = Slot::Stalled(id),
            None => return Err(Wake::Abandoned),
        }
        Ok(())
    }

    /// Waits until the stall of `ring` ends.
    pub fn wait(&self, ring: u16) -> Wake {
        let mut state = self.state.lock();
        loop {
            match state.slots.get_mut(usize::from(ring)) {
                Some(Slot::Stalled(_)) => {}
                Some(slot) => {
                    return match std::mem::replace(slot, Slot::Free) {
                        Slot::Woken(wake) => wake,
                        Slot::Free | Slot::Stalled(_) => Wake::Abandoned,
                    };
                }
                None => return Wake::Abandoned,
            }
            self.woken.wait(&mut state);
        }
    }

    /// REPLAY: wakes who is stalled on a fault. The ticket comes back when they have all reported, or
    /// at once if there is no such fault.
    pub fn replay(&self, context: u32, id: u64, ticket: T) -> Result<(), (T, Error)> {
        let mut state = self.state.lock();
        let waiting = state.stalled_on(id);
        let found = state
            .faults
            .iter_mut()
            .find(|fault| fault.id == id && fault.context == context && matches!(fault.stage, Stage::Active));
        let Some(fault) = found else {
            return Err((ticket, Error::NoFault));
        };
        fault.stage = Stage::Replaying {
            ticket,
            waiting,
            through: 0,
        };
        self.log.forget_fault(id);
        state.wake(id, Wake::Retry(id));
        self.woken.notify_all();
        Ok(())
    }

    /// Reports how the retry of a waiter went.
    pub fn report(&self, id: u64, got_through: bool) -> Option<Replayed<T>> {
        self.state.lock().report(id, got_through)
    }

    /// All faults, and what each ring is stalled on, if it is.
    pub fn look(&self) -> (Vec<FaultState>, Vec<Option<Activity>>) {
        let state = self.state.lock();
        let describe = |fault: &Fault<T>| FaultState {
            fault: fault.id,
            context: fault.context,
            va: fault.page,
            reason: fault.reason,
            stalled: state.stalled_on(fault.id),
            replaying: matches!(fault.stage, Stage::Replaying { .. }),
        };
        let faults: Vec<_> = state.faults.iter().map(describe).collect();
        let stalled = |slot: &Slot| {
            let Slot::Stalled(id) = slot else { return None };
            let fault = faults.iter().find(|fault| fault.fault == *id)?;
            Some(Activity::Stalled {
                fault: *id,
                va: fault.va,
                reason: fault.reason,
            })
        };
        let rings = state.slots.iter().map(stalled).collect();
        (faults, rings)
    }

    /// How many rings are stalled on a fault.
    #[cfg(test)]
    pub fn stalled_on(&self, id: u64) -> usize {
        self.state.lock().stalled_on(id)
    }

    /// CANCEL: puts the context into error and ends its stalls.
    pub fn cancel(&self, context: &Context, id: u64) -> Result<(), Error> {
        let mut state = self.state.lock();
        let known = state.faults.iter().any(|fault| {
            fault.id == id && fault.context == context.id() && matches!(fault.stage, Stage::Active)
        });
        if !known {
            return Err(Error::NoFault);
        }
        let ring = state
            .slots
            .iter()
            .position(|slot| matches!(slot, Slot::Stalled(on) if *on == id));
        let page = state
            .faults
            .iter()
            .find(|fault| fault.id == id)
            .map_or(0, |fault| fault.page);
        if context.fail() {
            self.log.push(EventRecord {
                kind: EVENT_CONTEXT_ERROR,
                ring: ring.unwrap_or(0) as u16,
                context: context.id(),
                va: page,
                fault: id,
                status: Error::FaultCancelled.code(),
                ..EventRecord::default()
            });
        }
        state.end(context.id(), &self.log, |fault| {
            if fault == id {
                Error::FaultCancelled
            } else {
                Error::ContextError
            }
        });
        self.woken.notify_all();
        Ok(())
    }

    /// Puts the context into error because of something else than a fault.
    pub fn fail(&self, origin: Origin<'_>, va: u64, error: Error) {
        let mut state = self.state.lock();
        if !origin.context.fail() {
            return;
        }
        self.log.push(EventRecord {
            kind: EVENT_CONTEXT_ERROR,
            ring: origin.ring,
            context: origin.context.id(),
            va,
            sequence: origin.sequence,
            status: error.code(),
            ..EventRecord::default()
        });
        state.end(origin.context.id(), &self.log, |_| Error::ContextError);
        self.woken.notify_all();
    }

    /// Ends the stalls of a context that has been destroyed, and forgets its events.
    pub fn end_context(&self, context: u32) {
        let mut state = self.state.lock();
        state.end(context, &self.log, |_| Error::NoContext);
        self.log.forget_context(context);
        self.woken.notify_all();
    }

    /// Forgets everything and ends every stall. Fault numbers go on where they were.
    pub fn abandon(&self) {
        let mut state = self.state.lock();
        state.faults.clear();
        self.log.clear();
        for slot in &mut state.slots {
            if matches!(slot, Slot::Stalled(_)) {
                *slot = Slot::Woken(Wake::Abandoned);
            }
        }
        self.woken.notify_all();
    }

    /// [`FaultTable::abandon`], and no stall any more.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.abandon();
    }
}
