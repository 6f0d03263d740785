// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Engines: each serves some rings, a slice of time after the other.
//!
//! An engine has a thread, but that is not always who does its work. Whoever has time for it when a doorbell rings, and the engine has nothing to do,
//! begins with it himself ([`attend`]): to wake another thread takes longer than most submissions. After one slice the thread
//! takes over, as it does in everything that has to be waited for.
//!
//! Ring `n` is on engine `n % engines`. A ring that cannot go on (it is stalled on a fault, waits for a semaphore or for
//! the bus, or is empty) costs its engine nothing, and the others on it go on. Among those that can, the next
//! slice goes to the context that has had the least time: a context with many busy rings gets no more than one
//! with a single ring. A ring whose stalled access is replayed comes first, for the driver waits for that.

use std::time::Duration;

use pinion_abi::{ACCESS_READ, Completion};

use super::access::{AccessFault, Tally, Trouble, Window};
use super::command::{self, Command, Submission};
use super::execute::{Budget, Execution, Progress, Surroundings};
use super::fault::{Origin, Replayed, Wake};
use super::gate::Gate;
use super::inject::Defect;
use super::lane::{Lane, State, Task};
use super::sabotage::{Sabotage, sabotaged};
use super::share::Shares;
use super::status::Error;
use super::{Host, Shared};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Condvar, Instant, Mutex, now, overdue};

/// How long an engine works for one ring before it looks whether another one should be served.
const SLICE: Duration = Duration::from_micros(100);
/// Completions after which they are announced in any case.
const BATCH: u32 = 64;
/// Submissions that are refused before another ring is looked at.
const REFUSALS: u32 = 64;
/// How soon a ring that waits for a number in memory looks at it again; the time doubles up to the second one.
const POLL_FIRST: Duration = Duration::from_micros(5);
const POLL_LAST: Duration = Duration::from_micros(500);

/// What has happened while an engine did not look.
#[derive(Clone, Copy, Debug, Default)]
struct Bell {
    /// Rings with new submissions, or whose stall has ended; as bits.
    rings: u32,
    /// Something that others may wait for.
    poke: bool,
}

/// The part of an engine that others reach.
#[derive(Default)]
pub(super) struct Engine {
    /// Where it touches memory.
    pub(super) gate: Gate,
    bell: Mutex<Bell>,
    rung: Condvar,
}

impl Engine {
    /// Tells the engine that there is something new about a ring.
    pub(super) fn ring(&self, ring: u16) {
        if sabotaged(Sabotage::RingsFirst) {
            self.wake();
        }
        self.note(ring);
        if !sabotaged(Sabotage::RingsFirst) {
            self.wake();
        }
    }

    /// Wakes the engine's thread, if it has anything to look at.
    fn wake(&self) {
        self.rung.notify_one();
    }

    /// Tells the engine to look again at whatever its rings wait for, and whether it is to end.
    pub(super) fn poke(&self) {
        self.bell.lock().poke = true;
        self.rung.notify_one();
    }

    /// Notes that there is something new about a ring, for somebody who is going to look.
    fn note(&self, ring: u16) {
        self.bell.lock().rings |= 1_u32.checked_shl(ring.into()).unwrap_or(0);
    }

    /// What has happened since the last time. Waits for something, if it may.
    fn listen(&self, wait: Wait) -> Bell {
        let mut bell = self.bell.lock();
        while bell.rings == 0 && !bell.poke {
            match wait {
                Wait::No => break,
                Wait::Forever => self.rung.wait(&mut bell),
                Wait::Until(time) => {
                    if self.rung.wait_until(&mut bell, time).timed_out() {
                        break;
                    }
                }
            }
        }
        std::mem::take(&mut *bell)
    }
}

#[derive(Clone, Copy, Debug)]
enum Wait {
    No,
    Until(Instant),
    Forever,
}

/// Whose thread an engine works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    /// Its own.
    Own,
    /// That of somebody who has rung a doorbell, and has other things to do.
    Borrowed,
}

/// How a stay inside the gate ended.
enum Stay {
    /// All commands are done.
    Finished,
    /// There is more to be done.
    More,
    /// The device is stopped.
    Paused,
    /// A command waits for something other than a page table entry.
    Waiting,
    /// A command has crossed the bus, which takes this long.
    Crossing,
    Stuck(Trouble),
    Ended(Error),
    Abandoned,
}

/// An engine's own part. It belongs to whoever does the engine's work at the time.
pub(super) struct Worker<H: Host> {
    shared: Arc<Shared<H>>,
    lanes: Vec<Lane<H::Ticket>>,
    shares: Shares,
    tally: Tally,
    /// It was to work on a borrowed thread, and the device was stopped.
    paused: bool,
    /// How long the device was stopped since the last look at this.
    stopped: Duration,
}

impl<H: Host> Worker<H> {
    /// The worker of engine `number`.
    pub(super) fn new(shared: Arc<Shared<H>>, number: usize) -> Self {
        let rings = 0..shared.timelines.len();
        let lanes = rings
            .filter(|&ring| shared.engine_of(ring) == number)
            .map(Lane::new)
            .collect();
        Self {
            shared,
            lanes,
            shares: Shares::default(),
            tally: Tally::default(),
            paused: false,
            stopped: Duration::ZERO,
        }
    }

    /// Works until there is nothing that can be done now, or, on a borrowed thread, for one slice. Says for how long
    /// the engine's thread may wait before it goes on.
    fn work(&mut self, engine: &Engine, mut bell: Bell, thread: Thread) -> Wait {
        let begin = now();
        self.paused = false;
        // Lanes are taken out while they are worked on.
        let mut lanes = std::mem::take(&mut self.lanes);
        let wait = loop {
            if self.shared.ending.load(Ordering::Relaxed) {
                break Wait::No;
            }
            let time = now();
            for lane in &mut lanes {
                self.look(lane, bell, time);
            }
            let Some(lane) = self.choose(&lanes).and_then(|index| lanes.get_mut(index)) else {
                break earliest(&lanes);
            };
            self.slice(engine, lane, thread);
            let stopped = std::mem::take(&mut self.stopped);
            if !stopped.is_zero() {
                postpone(&mut lanes, stopped);
            }
            if thread == Thread::Borrowed && (self.paused || is_over(begin, now())) {
                break Wait::No;
            }
            bell = engine.listen(Wait::No);
        };
        self.lanes = lanes;
        wait
    }

    /// Brings a lane up to date.
    fn look(&mut self, lane: &mut Lane<H::Ticket>, bell: Bell, now: Instant) {
        let rung = bell.rings & 1_u32.checked_shl(lane.ring.into()).unwrap_or(0) != 0;
        match lane.state {
            State::Ready => {}
            State::Idle if rung => {
                self.shared.host.busy(lane.ring);
                lane.state = State::Ready;
            }
            State::Idle => {}
            State::Stalled(va) => {
                // A doorbell means nothing to it; a wake-up comes with one.
                if rung || bell.poke {
                    if let Some(wake) = self.shared.faults.poll(lane.ring) {
                        self.awake(lane, wake, va);
                    }
                }
            }
            State::Waiting { next, .. } => {
                if bell.poke || now >= next {
                    lane.state = State::Ready;
                }
            }
            State::Crossing(until) => {
                // However slow the bus is, work that has ended ends.
                if now >= until || (bell.poke && lane.check().is_err()) {
                    lane.state = State::Ready;
                }
            }
        }
        if matches!(lane.state, State::Ready) && lane.task.is_none() {
            self.take(lane);
        }
    }

    /// The stall of a lane has ended.
    fn awake(&mut self, lane: &mut Lane<H::Ticket>, wake: Wake, va: u64) {
        lane.state = State::Ready;
        match wake {
            Wake::Retry(id) if sabotaged(Sabotage::ReportsEarly) => {
                self.replayed(self.shared.faults.report(id, true));
            }
            Wake::Retry(id) => {
                if let Some(task) = &mut lane.task {
                    task.retried = Some(id);
                }
            }
            Wake::Ended(error) => self.finish(lane, Err(error), va),
            Wake::Abandoned => self.abandon(lane),
        }
    }

    /// The lane to be served next.
    fn choose(&mut self, lanes: &[Lane<H::Ticket>]) -> Option<usize> {
        let mut best: Option<(usize, u64)> = None;
        for (index, lane) in lanes.iter().enumerate() {
            let (State::Ready, Some(task)) = (lane.state, &lane.task) else {
                continue;
            };
            if task.retried.is_some() {
                return Some(index);
            }
            let used = self.shares.used(task.context.id());
            if best.is_none_or(|(_, least)| used < least) {
                best = Some((index, used));
            }
        }
        let (index, used) = best?;
        self.shares.chosen(used);
        // Several lanes of the same context take turns.
        let turn = |index: usize| lanes.get(index).map_or(0, |lane| lane.served);
        let same = lanes.iter().enumerate().filter(|(_, lane)| {
            matches!(lane.state, State::Ready)
                && lane
                    .task
                    .as_ref()
                    .is_some_and(|task| self.shares.used(task.context.id()) == used)
        });
        same.map(|(index, _)| index)
            .min_by_key(|&index| turn(index))
            .or(Some(index))
    }

    /// Works for a lane, for a while.
    fn slice(&mut self, engine: &Engine, lane: &mut Lane<H::Ticket>, thread: Thread) {
        let begin = now();
        let mut last = begin;
        self.shared.statistics.slices.count();
        lane.served = self.shares.turn();
        if lane.task.as_ref().is_some_and(|task| task.waiting.is_some()) {
            self.shared.publish_waiting(lane.ring);
        } else {
            self.shared.publish(lane.ring, lane.state);
        }
        while let (State::Ready, Some(task)) = (lane.state, &lane.task) {
            let context = task.context.id();
            let stopped = self.stopped;
            self.step(engine, lane, last, thread);
            let stopped = self.stopped.saturating_sub(stopped);
            let after = now();
            let spent = after.saturating_duration_since(last).saturating_sub(stopped);
            self.shares.charge(context, spent);
            last = after;
            if let Some(task) = &mut lane.task {
                // While it waits, all of the time counts.
                if task.waiting.is_none() {
                    task.worked = task.worked.saturating_add(spent);
                }
                if self.is_hung(task, last) {
                    self.hang(lane);
                }
            }
            if self.paused || is_over(begin, last) {
                break;
            }
            if lane.task.is_none() && matches!(lane.state, State::Ready) {
                self.take(lane);
            }
        }
        let counts = engine.gate.with(|inside| inside.tlb.take_counts());
        let statistics = &self.shared.statistics;
        statistics.tlb_hits.add(counts.hits);
        statistics.tlb_misses.add(counts.misses);
        statistics.tlb_evictions.add(counts.evictions);
        self.announce(lane);
        self.shared.publish(lane.ring, lane.state);
    }

    /// One stay inside the gate, and what follows from it.
    fn step(&mut self, engine: &Engine, lane: &mut Lane<H::Ticket>, now: Instant, thread: Thread) {
        let stay = self.stay(engine, lane, thread);
        let until = self.account(lane, now);
        let Some(task) = &mut lane.task else { return };
        if std::mem::take(&mut task.moved) {
            let retried = task.retried.take();
            self.replayed(retried.and_then(|id| self.shared.faults.report(id, true)));
        }
        // To look again in vain is no end of waiting.
        if !matches!(stay, Stay::Waiting) {
            if let Some((since, _)) = task.waiting.take() {
                let waited = now.saturating_duration_since(since);
                let waited = waited.saturating_sub(self.stopped);
                task.worked = task.worked.saturating_add(waited);
            }
        }
        let news = std::mem::take(&mut task.news);
        if news.events {
            self.shared.statistics.prefetches.count();
            self.shared.host.events();
        }
        if news.signal {
            self.shared.poke_waiting();
        }
        lane.state = State::Ready;
        match stay {
            // What it has moved has to arrive first.
            Stay::Finished | Stay::More if until.is_some() => {
                if let Some(until) = until {
                    lane.state = State::Crossing(until);
                }
            }
            Stay::Finished => self.finish(lane, Ok(()), 0),
            Stay::More => {}
            Stay::Paused => self.paused = true,
            Stay::Crossing => {
                let arrival = now.checked_add(self.shared.bus.round_trip());
                if let Some(arrival) = arrival.max(until) {
                    lane.state = State::Crossing(arrival);
                }
            }
            Stay::Waiting => self.wait(lane, now),
            Stay::Stuck(Trouble::Bus(va)) => {
                self.fail(lane, Error::Bus, va);
            }
            Stay::Stuck(Trouble::Fault(fault)) => self.stall(lane, &fault),
            Stay::Ended(error) => self.finish(lane, Err(error), 0),
            Stay::Abandoned => self.abandon(lane),
        }
    }

    fn stay(&mut self, engine: &Engine, lane: &mut Lane<H::Ticket>, thread: Thread) -> Stay {
        let shared = &*self.shared;
        let mut inside = engine.gate.enter();
        let stay = loop {
            let Some(task) = &mut lane.task else {
                break Stay::Abandoned;
            };
            if shared.ending.load(Ordering::Relaxed) {
                break Stay::Abandoned;
            }
            // Inside the gate: whoever ends a context says so in it first and then comes through here,
            // and after that no access of the context begins.
            if let Err(error) = task.context.check(lane.ring, task.position) {
                break Stay::Ended(error);
            }
            if inside.paused {
                if thread == Thread::Borrowed && !sabotaged(Sabotage::WaitsBorrowed) {
                    // Its owner may be the one who is to let us go on.
                    break Stay::Paused;
                }
                let begin = now();
                engine.gate.wait(&mut inside);
                self.stopped = self
                    .stopped
                    .saturating_add(now().saturating_duration_since(begin));
                continue;
            }
            let inside = &mut *inside;
            let counting = task.context.is_counting();
            let context = task.context.clone();
            let mut window = Window {
                context: &context,
                tlb: &mut inside.tlb,
                memory: &*inside.memory,
                vram: &shared.vram,
                injector: &shared.injector,
                tally: &mut self.tally,
                counting,
            };
            break work(shared, &engine.gate, lane, &mut window);
        };
        Gate::leave(inside);
        stay
    }

    /// Says what the last stay has done. Returns when the bus has caught up with it, if that takes time.
    fn account(&mut self, lane: &Lane<H::Ticket>, now: Instant) -> Option<Instant> {
        let shared = &*self.shared;
        let tally = &mut self.tally;
        let statistics = &shared.statistics;
        statistics.bytes_copied.add(std::mem::take(&mut tally.copied));
        statistics.bytes_filled.add(std::mem::take(&mut tally.filled));
        statistics
            .atomic_operations
            .add(std::mem::take(&mut tally.operations));
        let bus = std::mem::take(&mut tally.bus);
        statistics.bus_bytes.add(bus);
        if let (false, Some(task)) = (tally.accesses.is_empty(), &lane.task) {
            let id = task.context.id();
            // The counters are those of the context that has this number now, which may be another one already.
            let making = shared.making.lock();
            let same = shared
                .contexts
                .get(id)
                .is_ok_and(|known| Arc::ptr_eq(&known, &task.context));
            let reached = if same {
                shared.counters.add(id, lane.ring, &tally.accesses, &shared.log)
            } else {
                0
            };
            drop(making);
            tally.accesses.clear();
            if reached > 0 {
                statistics.access_counts.add(reached);
                shared.host.events();
            }
        }
        shared.bus.moves(bus, now)
    }

    fn stall(&mut self, lane: &mut Lane<H::Ticket>, fault: &AccessFault) {
        self.announce(lane);
        let Some(task) = &mut lane.task else { return };
        let retried = task.retried.take();
        let origin = Origin {
            ring: lane.ring,
            context: &task.context,
            position: task.position,
            sequence: task.sequence,
        };
        // First, so that whoever ends the stall at once finds somebody to wake.
        lane.state = State::Stalled(fault.va);
        let early = sabotaged(Sabotage::TellsFirst);
        if early {
            self.shared.host.events();
        }
        let (stalled, replayed) = self.shared.faults.stall(origin, fault, retried);
        self.shared.publish(lane.ring, lane.state);
        if !early {
            self.shared.host.events();
        }
        self.replayed(replayed);
        if let Err(wake) = stalled {
            self.awake(lane, wake, fault.va);
        }
    }

    fn wait(&mut self, lane: &mut Lane<H::Ticket>, now: Instant) {
        let Some(task) = &mut lane.task else { return };
        let Some((since, pause)) = task.waiting else {
            task.waiting = Some((now, POLL_FIRST));
            if sabotaged(Sabotage::WaitsUnseen) {
                lane.state = State::Waiting {
                    next: now.checked_add(POLL_FIRST).unwrap_or(now),
                };
                return;
            }
            // The number may have changed while nobody could know that somebody waits. It stays ready, and looks once more.
            self.shared.publish_waiting(lane.ring);
            return;
        };
        task.waiting = Some((since, pause.saturating_mul(2).min(POLL_LAST)));
        if self.is_hung(task, now) {
            self.hang(lane);
            return;
        }
        let next = now.checked_add(pause).unwrap_or(now);
        lane.state = State::Waiting { next };
    }

    fn is_hung(&self, task: &Task<H::Ticket>, now: Instant) -> bool {
        let waited = task.waiting.map_or(Duration::ZERO, |(since, _)| {
            now.saturating_duration_since(since).saturating_sub(self.stopped)
        });
        self.shared
            .watchdog
            .is_some_and(|limit| task.worked.saturating_add(waited) >= limit)
    }

    fn hang(&mut self, lane: &mut Lane<H::Ticket>) {
        self.shared.statistics.hangs.count();
        let (context, sequence) = lane
            .task
            .as_ref()
            .map_or((0, 0), |task| (task.context.id(), task.sequence));
        log::info!(
            "ring {}: the watchdog ends context {context}, submission {sequence}",
            lane.ring
        );
        self.fail(lane, Error::Hung, 0);
    }

    /// Ends a submission, and puts its context into error.
    fn fail(&mut self, lane: &mut Lane<H::Ticket>, error: Error, va: u64) {
        let Some(task) = &lane.task else { return };
        let origin = Origin {
            ring: lane.ring,
            context: &task.context,
            position: task.position,
            sequence: task.sequence,
        };
        match self.shared.faults.fail(origin, va, error) {
            Ok(woken) => {
                self.shared.wake(woken);
                self.shared.poke();
                self.shared.host.events();
                self.finish(lane, Err(error), va);
            }
            Err(ended) => self.finish(lane, Err(ended), 0),
        }
    }

    /// Takes the next submission of a lane that has none. Leaves it idle if there is none.
    fn take(&mut self, lane: &mut Lane<H::Ticket>) {
        let shared = self.shared.clone();
        for _ in 0..REFUSALS {
            lane.bytes.clear();
            let Some((ticket, position)) = shared.host.next(lane.ring, &mut lane.bytes) else {
                lane.unannounced = 0;
                if shared.host.idle(lane.ring) && !sabotaged(Sabotage::IgnoresIdle) {
                    continue;
                }
                lane.state = State::Idle;
                return;
            };
            let rings = shared.timelines.len();
            let submission = match Submission::decode(&lane.bytes, rings, &mut lane.commands) {
                Ok(submission) => submission,
                Err((sequence, error)) => {
                    let failed = self.failure(lane.ring, sequence, error);
                    self.complete(lane, Some(ticket), sequence, failed);
                    continue;
                }
            };
            if shared.injector.strikes(Defect::ResetMidway) {
                shared.reset_itself();
            }
            let context = match shared.contexts.get(submission.context) {
                Ok(context) if context.is_meant_by(lane.ring, position) => context,
                _ => {
                    let error = shared.without_context(lane.ring, position);
                    let failed = self.failure(lane.ring, submission.sequence, error);
                    self.complete(lane, Some(ticket), submission.sequence, failed);
                    continue;
                }
            };
            lane.bytes.clear();
            if sabotaged(Sabotage::AdvancesFirst) {
                shared.timelines.advance(lane.ring, submission.sequence);
            }
            let mut task = Task::new(ticket, context, position, submission);
            if shared.injector.strikes(Defect::EarlyFence) {
                let done = Completion {
                    executed: lane.commands.len() as u32,
                    ..Completion::default()
                };
                let early = task.ticket.take();
                self.complete(lane, early, submission.sequence, done);
            }
            lane.task = Some(task);
            return;
        }
    }

    /// Ends the submission of a lane.
    fn finish(&mut self, lane: &mut Lane<H::Ticket>, result: Result<(), Error>, va: u64) {
        lane.state = State::Ready;
        let Some(mut task) = lane.task.take() else { return };
        let retried = task.retried.take().filter(|_| !sabotaged(Sabotage::ForgetsRetry));
        self.replayed(retried.and_then(|id| self.shared.faults.report(id, false)));
        let mut completion = Completion {
            executed: task.executed,
            ..Completion::default()
        };
        if let Err(error) = result {
            completion = Completion {
                status: self.failure(lane.ring, task.sequence, error).status,
                fault_va: va,
                repeats: task.execution.as_ref().map_or(0, Execution::repeats),
                ..completion
            };
        }
        self.shared.statistics.commands.add(task.executed.into());
        self.complete(lane, task.ticket, task.sequence, completion);
    }

    /// Notes that a submission fails.
    fn failure(&self, ring: u16, sequence: u64, error: Error) -> Completion {
        self.shared.statistics.submissions_failed.count();
        self.shared
            .refused(format_args!("submission {sequence} to ring {ring}"), error);
        Completion {
            status: error.code(),
            ..Completion::default()
        }
    }

    /// Answers a submission. (One that was answered too early has no ticket any more.)
    fn complete(
        &self,
        lane: &mut Lane<H::Ticket>,
        ticket: Option<H::Ticket>,
        sequence: u64,
        completion: Completion,
    ) {
        let shared = &*self.shared;
        let Some(ticket) = ticket else { return };
        shared.statistics.submissions.count();
        if sabotaged(Sabotage::PokesFirst) {
            shared.poke_waiting();
        }
        let completion = Completion {
            sequence,
            timeline: shared.timelines.advance(lane.ring, sequence),
            time: shared.clock.now(),
            ..completion
        };
        if !shared.injector.strikes(Defect::LostCompletion) {
            shared.host.complete(lane.ring, ticket, completion);
            lane.unannounced = lane.unannounced.saturating_add(1);
        }
        if !sabotaged(Sabotage::PokesFirst) {
            shared.poke_waiting();
        }
        if lane.unannounced >= BATCH {
            self.announce(lane);
        }
    }

    /// Forgets all submissions.
    fn abandon_all(&mut self) {
        let mut lanes = std::mem::take(&mut self.lanes);
        for lane in &mut lanes {
            self.abandon(lane);
        }
    }

    /// Forgets the submission of a lane: nobody wants to hear of it.
    fn abandon(&self, lane: &mut Lane<H::Ticket>) {
        lane.state = State::Ready;
        if let Some(task) = lane.task.take() {
            let replayed = task.retried.and_then(|id| self.shared.faults.report(id, false));
            self.replayed(replayed);
        }
    }

    fn announce(&self, lane: &mut Lane<H::Ticket>) {
        if std::mem::take(&mut lane.unannounced) > 0 {
            self.shared.host.announce(lane.ring);
        }
    }

    fn replayed(&self, replayed: Option<Replayed<H::Ticket>>) {
        if let Some(Replayed { ticket, through }) = replayed {
            self.shared.host.replayed(ticket, through);
        }
    }
}

/// The work of an engine, on its own thread, until the device ends.
pub(super) fn run<H: Host>(shared: &Shared<H>, engine: &Engine, desk: &Mutex<Worker<H>>) {
    let mut wait = Wait::Forever;
    while !shared.ending.load(Ordering::Relaxed) {
        let bell = engine.listen(wait);
        wait = desk.lock().work(engine, bell, Thread::Own);
    }
    desk.lock().abandon_all();
}

/// There is something new about a ring: does what can be done about it at once, unless somebody else is at it.
pub(super) fn attend<H: Host>(engine: &Engine, desk: &Mutex<Worker<H>>, ring: u16) {
    engine.note(ring);
    let Some(mut worker) = desk.try_lock() else {
        // Whoever it is may have looked before. The engine's thread looks again.
        if !sabotaged(Sabotage::RingsUnheard) {
            engine.wake();
        }
        return;
    };
    let bell = engine.listen(Wait::No);
    let wait = worker.work(engine, bell, Thread::Borrowed);
    drop(worker);
    if !matches!(wait, Wait::Forever) && !sabotaged(Sabotage::LeavesSilently) {
        engine.poke();
    }
}

/// Whether a slice that began at `begin` is over.
fn is_over(begin: Instant, now: Instant) -> bool {
    now.saturating_duration_since(begin) >= SLICE || overdue()
}

/// Has what waits for numbers have waited less long by `stopped`, in which the device did not go on.
fn postpone<T>(lanes: &mut [Lane<T>], stopped: Duration) {
    for lane in lanes {
        if let Some((since, _)) = lane.task.as_mut().and_then(|task| task.waiting.as_mut()) {
            *since = since.checked_add(stopped).unwrap_or(*since);
        }
    }
}

/// When the first of the lanes has to be looked at again.
fn earliest<T>(lanes: &[Lane<T>]) -> Wait {
    let times = lanes.iter().filter_map(|lane| match lane.state {
        State::Waiting { next } => Some(next),
        State::Crossing(until) => Some(until),
        // It has refused so many submissions that others had to be looked at.
        State::Ready => Some(now()),
        State::Idle | State::Stalled(_) => None,
    });
    times.min().map_or(Wait::Forever, Wait::Until)
}

/// Works on the task of a lane, inside the gate.
fn work<H: Host>(
    shared: &Shared<H>,
    gate: &Gate,
    lane: &mut Lane<H::Ticket>,
    window: &mut Window<'_>,
) -> Stay {
    let Some(task) = &mut lane.task else {
        return Stay::Abandoned;
    };
    let mut budget = Budget::new(gate, shared.bus.stay());
    if let Some((va, length)) = task.indirect {
        match load(window, va, length, &mut lane.bytes) {
            Ok(()) => task.indirect = None,
            Err((trouble, moved)) => {
                task.moved |= moved;
                return Stay::Stuck(trouble);
            }
        }
        task.moved = true;
        if let Err(error) = command::decode_commands(&lane.bytes, shared.timelines.len(), &mut lane.commands)
        {
            return Stay::Ended(error);
        }
    }
    let around = Surroundings {
        ring: lane.ring,
        sequence: task.sequence,
        timelines: &shared.timelines,
        clock: &shared.clock,
        log: &shared.log,
        round_trip: shared.bus.round_trip(),
        atomic_unit: &shared.atomic_unit,
    };
    loop {
        let execution = match &mut task.execution {
            Some(execution) => execution,
            None => {
                let Some(&command) = lane.commands.get(task.executed as usize) else {
                    return Stay::Finished;
                };
                let command = if shared.injector.strikes(Defect::HangEngine) {
                    Command::Hang
                } else {
                    command
                };
                task.execution.insert(Execution::new(command, &mut lane.scratch))
            }
        };
        let (before, crossed) = (execution.moves(), window.tally.bus);
        let progress = execution.go_on(window, &around, &mut lane.scratch, &mut budget);
        let moved = execution.moves() != before;
        task.moved |= moved;
        // Also if it does not get to its end now: it may stall, and somebody may wait for what it has done so far.
        task.news.signal |= execution.signals(moved)
            && (!sabotaged(Sabotage::SignalsAtEnd) || progress == Ok(Progress::Done));
        match progress {
            Ok(Progress::Done) => {
                task.news.events |= execution.missed();
                task.execution = None;
                task.waiting = None;
                task.executed = task.executed.saturating_add(1);
                if window.tally.bus != crossed && !around.round_trip.is_zero() {
                    return Stay::Crossing;
                }
            }
            Ok(Progress::More) => return Stay::More,
            Ok(Progress::Wait) => return Stay::Waiting,
            Err(trouble) => return Stay::Stuck(trouble),
        }
        budget.yield_if_wanted();
        if budget.is_spent() {
            return Stay::More;
        }
    }
}

/// Loads the commands of an indirect submission behind those in `bytes`. With an error it says whether it came forward.
fn load(window: &mut Window<'_>, va: u64, length: usize, bytes: &mut Vec<u8>) -> Result<(), (Trouble, bool)> {
    let mut moved = false;
    // At most 64 KiB: one stay.
    while bytes.len() < length {
        let left = length.saturating_sub(bytes.len()) as u64;
        let at = va.wrapping_add(bytes.len() as u64);
        let piece = window.translate(at, ACCESS_READ, left).and_then(|from| {
            window
                .slice(from, at, left.min(window.reach(from, at)))
                .map(|piece| (from, piece))
        });
        let (from, piece) = piece.map_err(|trouble| (trouble, moved))?;
        let old = bytes.len();
        bytes.resize(old.saturating_add(piece.len()), 0);
        if let Some(target) = bytes.get_mut(old..) {
            piece.copy_to(target);
        }
        window.crossed(from, piece.len() as u64);
        moved = true;
    }
    Ok(())
}
