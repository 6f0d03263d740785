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

use pinion_abi::{EVENT_CONTEXT_ERROR, EVENT_FAULT, EventRecord, PAGE_SIZE};

use super::access::AccessFault;
use super::context::Context;
use super::event::EventLog;
use super::inject::{Defect, Injector};
use super::state::{Activity, FaultState};
use super::statistics::Statistics;
use super::status::Error;
use crate::sync::{Arc, Mutex};

/// Rings whose stall has ended: their engines are to be woken.
#[must_use = "whoever ends a stall wakes the engine"]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rings(u32);

impl Rings {
    fn add(&mut self, ring: usize) {
        self.0 |= 1_u32.checked_shl(ring as u32).unwrap_or(0);
    }

    fn join(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Their numbers.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        (0..u32::BITS as u16).filter(move |&ring| self.0 & 1_u32.checked_shl(ring.into()).unwrap_or(0) != 0)
    }
}

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
    /// Where the submission is on the ring.
    pub position: u64,
    /// Its sequence number.
    pub sequence: u64,
}

/// All faults of the device.
#[derive(Debug)]
pub struct FaultTable<T> {
    state: Mutex<State<T>>,
    log: Arc<EventLog>,
    statistics: Arc<Statistics>,
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
    fn wake(&mut self, id: u64, wake: Wake) -> Rings {
        let mut woken = Rings::default();
        for (ring, slot) in self.slots.iter_mut().enumerate() {
            if matches!(slot, Slot::Stalled(on) if *on == id) {
                *slot = Slot::Woken(wake);
                woken.add(ring);
            }
        }
        woken
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
    fn end(&mut self, context: u32, log: &EventLog, of: impl Fn(u64) -> Error) -> Rings {
        let mut ended = Vec::new();
        let mut woken = Rings::default();
        self.faults.retain(|fault| {
            let ends = fault.context == context && matches!(fault.stage, Stage::Active);
            if ends {
                ended.push(fault.id);
            }
            !ends
        });
        for id in ended {
            log.forget_fault(id);
            woken.join(self.wake(id, Wake::Ended(of(id))));
        }
        woken
    }
}

impl<T> FaultTable<T> {
    /// No faults, for `rings` rings. What happens is told to `log`.
    pub fn new(rings: u16, log: Arc<EventLog>, statistics: Arc<Statistics>, injector: Arc<Injector>) -> Self {
        let slots = vec![Slot::Free; rings.into()];
        let state = State {
            last_id: 0,
            faults: Vec::new(),
            slots,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            log,
            statistics,
            injector,
        }
    }

    /// Stalls a ring. If the access was the retry of another fault, that is reported too, afterwards.
    ///
    /// An error is what [`FaultTable::poll`] would have said.
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
        origin
            .context
            .check(origin.ring, origin.position)
            .map_err(Wake::Ended)?;
        let context = origin.context.id();
        let page = fault.va & !(PAGE_SIZE - 1);
        let same = |other: &&Fault<T>| {
            other.context == context
                && other.page == page
                && other.lacking == fault.lacking
                && matches!(other.stage, Stage::Active)
        };
        let id = match state.faults.iter().find(same) {
            Some(known) => {
                self.statistics.faults_joined.count();
                known.id
            }
            None => {
                self.statistics.faults.count();
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
                let record = EventRecord {
                    kind: EVENT_FAULT,
                    ring: origin.ring,
                    context,
                    va: fault.va,
                    fault: id,
                    sequence: origin.sequence,
                    access: fault.access,
                    reason: fault.reason,
                    length: fault.length,
                    ..EventRecord::default()
                };
                if !self.injector.strikes(Defect::LostFault) {
                    self.log.push(record);
                }
                if self.injector.strikes(Defect::DuplicateFault) {
                    self.log.push(record);
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

    /// How the stall of `ring` ended, if it has.
    pub fn poll(&self, ring: u16) -> Option<Wake> {
        let mut state = self.state.lock();
        match state.slots.get_mut(usize::from(ring)) {
            Some(Slot::Stalled(_)) => None,
            Some(slot) => match std::mem::replace(slot, Slot::Free) {
                Slot::Woken(wake) => Some(wake),
                Slot::Free | Slot::Stalled(_) => Some(Wake::Abandoned),
            },
            None => Some(Wake::Abandoned),
        }
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

    /// REPLAY: wakes who is stalled on a fault. The ticket comes back when they have all reported, or
    /// at once if there is no such fault.
    pub fn replay(&self, context: u32, id: u64, ticket: T) -> Result<Rings, (T, Error)> {
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
        self.statistics.replays.count();
        Ok(state.wake(id, Wake::Retry(id)))
    }

    /// Reports how the retry of a waiter went.
    pub fn report(&self, id: u64, got_through: bool) -> Option<Replayed<T>> {
        self.statistics.replays_through.add(got_through.into());
        self.state.lock().report(id, got_through)
    }

    /// How many rings are stalled on a fault.
    #[cfg(test)]
    pub fn stalled_on(&self, id: u64) -> usize {
        self.state.lock().stalled_on(id)
    }

    /// CANCEL: puts the context into error and ends its stalls.
    pub fn cancel(&self, context: &Context, id: u64) -> Result<Rings, Error> {
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
        self.statistics.cancels.count();
        if context.fail(Error::FaultCancelled) {
            self.statistics.context_errors.count();
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
        Ok(state.end(context.id(), &self.log, |fault| {
            if fault == id {
                Error::FaultCancelled
            } else {
                Error::ContextError
            }
        }))
    }

    /// Puts the context into error because of something else than a fault. An error is why the work had ended already.
    pub fn fail(&self, origin: Origin<'_>, va: u64, error: Error) -> Result<Rings, Error> {
        let mut state = self.state.lock();
        // Under the lock: a context that was taken out of error is not put back into it by the work that was reset.
        origin.context.check(origin.ring, origin.position)?;
        if !origin.context.fail(error) {
            return Ok(Rings::default());
        }
        self.statistics.context_errors.count();
        self.log.push(EventRecord {
            kind: EVENT_CONTEXT_ERROR,
            ring: origin.ring,
            context: origin.context.id(),
            va,
            sequence: origin.sequence,
            status: error.code(),
            ..EventRecord::default()
        });
        Ok(state.end(origin.context.id(), &self.log, |_| Error::ContextError))
    }

    /// Has the work of a context that is in front of these positions end with RESET, forgets its events, and takes the
    /// context out of error.
    pub fn reset_context(&self, context: &Context, positions: &[u64]) -> Rings {
        let mut state = self.state.lock();
        context.reset(positions);
        self.log.forget_context(context.id());
        state.end(context.id(), &self.log, |_| Error::Reset)
    }

    /// Ends the stalls of a context with `error`, and forgets the events about its work; all of them if it has gone.
    pub fn end_context(&self, context: u32, error: Error) -> Rings {
        let mut state = self.state.lock();
        if error == Error::NoContext {
            self.log.forget_context(context);
        } else {
            self.log.forget_work(context);
        }
        state.end(context, &self.log, |_| error)
    }

    /// Ends all stalls with `error`, and forgets all events.
    pub fn end_all(&self, error: Error) -> Rings {
        let mut state = self.state.lock();
        self.log.clear();
        let contexts: Vec<u32> = state.faults.iter().map(|fault| fault.context).collect();
        let mut woken = Rings::default();
        for context in contexts {
            woken.join(state.end(context, &self.log, |_| error));
        }
        woken
    }

    /// Forgets everything and ends every stall. Fault numbers go on where they were.
    pub fn abandon(&self) -> Rings {
        let mut state = self.state.lock();
        state.faults.clear();
        self.log.clear();
        let mut woken = Rings::default();
        for (ring, slot) in state.slots.iter_mut().enumerate() {
            if matches!(slot, Slot::Stalled(_)) {
                *slot = Slot::Woken(Wake::Abandoned);
                woken.add(ring);
            }
        }
        woken
    }

    /// [`FaultTable::abandon`], and no stall any more.
    pub fn close(&self) -> Rings {
        self.state.lock().closed = true;
        self.abandon()
    }
}
