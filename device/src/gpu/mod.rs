// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual GPU itself. It knows nothing of virtio, vhost or sockets: requests and submissions come
//! as bytes, answers leave through the [`Host`], memory is behind [`SystemMemory`].
//!
//! | file | subject |
//! |---|---|
//! | `command.rs` | decoding and checking of submissions |
//! | `operation.rs` | what ATOMICs do, and semaphores ask |
//! | `request.rs` | decoding and checking of requests |
//! | `context.rs` | contexts |
//! | `page_table.rs`, `tlb.rs` | translation |
//! | `gate.rs` | the invalidation promise |
//! | `access.rs` | how commands reach memory |
//! | `execute.rs` | commands, step by step |
//! | `atomic_unit.rs` | atomic operations of several engines on system memory |
//! | `engine.rs`, `lane.rs`, `share.rs` | the threads that serve the rings |
//! | `timeline.rs`, `clock.rs`, `bus.rs` | how far rings are, the time, how slow the bus is |
//! | `fault.rs`, `event.rs` | faults, and how the driver hears of them |
//! | `counters.rs` | how often which memory is accessed |
//! | `memory.rs`, `vram.rs` | what translations lead to |
//! | `inject.rs`, `statistics.rs`, `state.rs` | deliberate defects; what has happened, and how things are |
//! | `sabotage.rs` | promises that models break |
//!
//! Lock order: making, then any other; gate, then a turn of the atomic unit, then page table; gate, then the poisoned pages of VRAM; gate, then event log; fault table,
//! then event log; counters, then event log. Nothing else is nested, and the [`Host`] is called with none of them held.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that fails may panic"
    )
)]

pub mod access;
pub mod atomic_unit;
pub mod bus;
pub mod clock;
pub mod command;
pub mod context;
pub mod counters;
mod engine;
pub mod event;
pub mod execute;
pub mod fault;
pub mod gate;
pub mod inject;
mod lane;
pub mod memory;
pub mod operation;
pub mod page_table;
pub mod request;
pub mod sabotage;
mod share;
pub mod state;
pub mod statistics;
pub mod status;
#[cfg(test)]
mod tests;
pub mod timeline;
pub mod tlb;
pub mod vram;

use std::num::NonZeroU64;
use std::time::Duration;

use pinion_abi as abi;

use atomic_unit::AtomicUnit;
use bus::Bus;
use clock::Clock;
use context::Contexts;
use counters::Counters;
use engine::{Engine, Worker};
use event::EventLog;
use fault::{FaultTable, Rings};
use inject::{Defect, Injector};
use memory::SystemMemory;
use page_table::{Budget, MAX_NODES};
use request::{Invalidate, Query, Request};
use sabotage::{Sabotage, sabotaged};
use state::{ContextState, DeviceState, RingState, State};
use statistics::Statistics;
use status::Error;
use timeline::Timelines;
use vram::Vram;

use crate::rate_limit::{RateLimit, warn_limited};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Mutex};

/// Number of statuses.
const STATUSES: usize = abi::STATUS_HUNG as usize + 1;

/// What a device is like.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Size of VRAM in bytes.
    pub vram: u64,
    /// How much of it, from its beginning, is in the aperture.
    pub aperture: u64,
    /// Number of rings.
    pub rings: u16,
    /// Number of engines, 1 to the number of rings.
    pub engines: u16,
    /// How long a submission may run, or wait for a semaphore or fence, before its context is in error.
    pub watchdog: Option<Duration>,
    /// How long everything takes to cross the bus, in one direction.
    pub latency: Duration,
    /// Bytes that cross the bus in a second; none: as many as the host can move.
    pub bandwidth: Option<NonZeroU64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            vram: 256 << 20,
            aperture: 0,
            rings: 1,
            engines: 1,
            watchdog: None,
            latency: Duration::ZERO,
            bandwidth: None,
        }
    }
}

/// The other side of the core: where work comes from and answers go.
pub trait Host: Send + Sync + 'static {
    /// Names a request or submission that has not been answered.
    type Ticket: Send + 'static;

    /// Takes the next submission of a ring and appends its device-readable bytes to `bytes`, at most
    /// one more than [`command::MAX_SUBMISSION`]. The number is its position in the ring, counted
    /// without end.
    fn next(&self, ring: u16, bytes: &mut Vec<u8>) -> Option<(Self::Ticket, u64)>;

    /// The position that the next submission which the driver makes will have.
    fn position(&self, ring: u16) -> u64;

    /// The engine of this ring is at work and needs no doorbell.
    fn busy(&self, ring: u16);

    /// The engine has found nothing to do: announces completions and sees to it that the doorbell rings
    /// for the next submission. True if there is one already.
    fn idle(&self, ring: u16) -> bool;

    /// Ends a submission. The driver may be told later, in [`Host::announce`] or [`Host::idle`].
    fn complete(&self, ring: u16, ticket: Self::Ticket, completion: abi::Completion);

    /// Tells the driver of the completions so far.
    fn announce(&self, ring: u16);

    /// Answers a REPLAY: this many accesses got through.
    fn replayed(&self, ticket: Self::Ticket, through: u64);

    /// There may be something in the event log.
    fn events(&self);
}

/// What requests, engines and their owner share.
struct Shared<H: Host> {
    host: Arc<H>,
    log: Arc<EventLog>,
    contexts: Contexts,
    counters: Counters,
    vram: Vram,
    faults: FaultTable<H::Ticket>,
    timelines: Timelines,
    engines: Vec<Engine>,
    /// What each ring is doing: the number of a [`lane::State`]. Only to be looked at.
    activities: Vec<AtomicU8>,
    /// For each ring, the position of the first submission behind the last reset of the device.
    reset: Vec<AtomicU64>,
    clock: Clock,
    bus: Bus,
    atomic_unit: AtomicUnit,
    watchdog: Option<Duration>,
    statistics: Arc<Statistics>,
    injector: Arc<Injector>,
    /// For each kind of mistake that is logged.
    complaints: [RateLimit; STATUSES],
    /// Held while a context or a counter is made, and while the device is reset.
    making: Mutex<()>,
    ending: AtomicBool,
}

impl<H: Host> Shared<H> {
    /// The number of the engine that serves a ring.
    fn engine_of(&self, ring: u16) -> usize {
        usize::from(ring).checked_rem(self.engines.len()).unwrap_or(0)
    }

    /// Tells an engine that there is something new about a ring.
    fn ring(&self, ring: u16) {
        if let Some(engine) = self.engines.get(self.engine_of(ring)) {
            engine.ring(ring);
        }
    }

    /// Wakes the engines of rings whose stall has ended.
    fn wake(&self, rings: Rings) {
        for ring in rings.iter() {
            self.ring(ring);
        }
    }

    /// Goes through the gates of all engines, one after the other.
    fn through_gates(&self, mut action: impl FnMut(&mut gate::Inside)) {
        let skipped = usize::from(sabotaged(Sabotage::SkipsEngine));
        for engine in self.engines.iter().rev().skip(skipped).rev() {
            engine.gate.with(&mut action);
        }
    }

    /// Has all engines look again at what their rings wait for.
    fn poke(&self) {
        for engine in &self.engines {
            engine.poke();
        }
    }

    /// Like [`Shared::poke`], if a ring waits for a number. To be called when the number is there.
    ///
    /// A ring first says that it waits and then looks at the number for the last time. So either it sees the number,
    /// or this sees the ring: the fences stand between the one's store and load and the other's.
    fn poke_waiting(&self) {
        fence(Ordering::SeqCst);
        for (ring, activity) in self.activities.iter().enumerate() {
            if activity.load(Ordering::Relaxed) == lane::WAITING {
                if let Some(engine) = self.engines.get(self.engine_of(ring as u16)) {
                    engine.poke();
                }
            }
        }
    }

    /// Says that a ring waits. Whoever changes a number that it looks at afterwards wakes its engine.
    fn publish_waiting(&self, ring: u16) {
        if let Some(place) = self.activities.get(usize::from(ring)) {
            place.store(lane::WAITING, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Says what a ring is doing.
    fn publish(&self, ring: u16, state: lane::State) {
        if let Some(place) = self.activities.get(usize::from(ring)) {
            place.store(state.number(), Ordering::Relaxed);
        }
    }

    /// Counts an error, and logs it once in a while: as a warning if only a mistake leads to it.
    fn refused(&self, what: std::fmt::Arguments<'_>, error: Error) {
        self.statistics.status(error).count();
        let Some(limit) = self.complaints.get(error.code() as usize) else {
            return;
        };
        match error {
            Error::Invalid | Error::Unsupported | Error::BadAddress | Error::Bus | Error::Limit => {
                warn_limited!(limit = *limit; "{what} was refused: {error}");
            }
            // A driver gets these without a mistake too: things end while it speaks of them.
            _ => {
                if let Some(suppressed) = limit.admit() {
                    log::info!("{what} was refused: {error}{suppressed}");
                }
            }
        }
    }

    /// The position that the next submission of each ring will have.
    fn positions(&self) -> Vec<u64> {
        (0..self.timelines.len())
            .map(|ring| self.host.position(ring))
            .collect()
    }

    /// Why a submission has no context.
    fn without_context(&self, ring: u16, position: u64) -> Error {
        let reset = self.reset.get(usize::from(ring));
        if reset.is_some_and(|first| position < first.load(Ordering::Acquire)) {
            Error::Reset
        } else {
            Error::NoContext
        }
    }

    /// Ends all contexts and their work, and clears VRAM.
    fn reset_device(&self) {
        // A device can reset itself while a request is carried out. What that makes is there before, and goes, or comes
        // after.
        let _making = self.making.lock();
        for (first, position) in self.reset.iter().zip(self.positions()) {
            first.fetch_max(position, Ordering::AcqRel);
        }
        self.contexts.remove_all();
        // First the counters: those that are there still can put something into the log.
        self.counters.clear();
        let woken = self.faults.end_all(Error::Reset);
        if sabotaged(Sabotage::ClearsVramEarly) {
            self.vram.clear();
        }
        self.through_gates(|inside| inside.tlb.clear());
        // A PREFETCH that was in flight has put its hint into the log behind the rest.
        self.log.forget_hints(None);
        self.bus.clear();
        for engine in &self.engines {
            engine.gate.notify();
        }
        if !sabotaged(Sabotage::ClearsVramEarly) {
            self.vram.clear();
        }
        self.statistics.resets.count();
        self.wake(woken);
        self.poke();
    }

    /// A deliberate defect: the device resets itself.
    fn reset_itself(&self) {
        self.reset_device();
        self.log.push(abi::EventRecord {
            kind: abi::EVENT_DEVICE_RESET,
            ..abi::EventRecord::default()
        });
        self.host.events();
    }
}

/// Answer to a request.
#[derive(Debug)]
pub enum Answer<T> {
    /// Here it is.
    Now(T, abi::Response),
    /// It will come through [`Host::replayed`].
    Later,
}

/// The device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No VRAM.
    #[error(transparent)]
    Vram(#[from] vram::Error),
    /// No thread.
    #[error("cannot start an engine thread")]
    Thread(#[source] std::io::Error),
}

/// The virtual GPU.
pub struct Gpu<H: Host> {
    shared: Arc<Shared<H>>,
    /// The engines' own parts, each with whoever does its work.
    desks: Vec<Arc<Mutex<Worker<H>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl<H: Host> Gpu<H> {
    /// Makes a device and starts its engines.
    pub fn start(
        settings: &Settings,
        host: Arc<H>,
        log: Arc<EventLog>,
        injector: Arc<Injector>,
    ) -> Result<Self, StartError> {
        let rings = settings.rings.min(abi::MAX_RINGS);
        let engines = settings.engines.clamp(1, rings.max(1));
        let statistics = Arc::new(Statistics::default());
        let shared = Arc::new(Shared {
            host,
            log: log.clone(),
            contexts: Contexts::new(Budget::new(MAX_NODES)),
            counters: Counters::default(),
            vram: Vram::new(settings.vram)?,
            faults: FaultTable::new(rings, log, statistics.clone(), injector.clone()),
            timelines: Timelines::new(rings),
            engines: (0..engines).map(|_| Engine::default()).collect(),
            activities: (0..rings).map(|_| AtomicU8::new(0)).collect(),
            reset: (0..rings).map(|_| AtomicU64::new(0)).collect(),
            clock: Clock::default(),
            bus: Bus::new(settings.latency, settings.bandwidth),
            atomic_unit: AtomicUnit::new(settings.engines),
            watchdog: settings.watchdog,
            statistics,
            injector,
            complaints: Default::default(),
            making: Mutex::new(()),
            ending: AtomicBool::new(false),
        });
        let mut gpu = Self {
            shared,
            desks: Vec::new(),
            threads: Vec::new(),
        };
        for engine in 0..engines {
            let desk = Arc::new(Mutex::new(Worker::new(gpu.shared.clone(), engine.into())));
            gpu.desks.push(desk.clone());
            let shared = gpu.shared.clone();
            let thread = thread::Builder::new()
                .name(format!("engine{engine}"))
                .spawn(move || {
                    if let Some(engine) = shared.engines.get(usize::from(engine)) {
                        engine::run(&shared, engine, &desk);
                    }
                })
                .map_err(StartError::Thread)?;
            gpu.threads.push(thread);
        }
        Ok(gpu)
    }

    /// Configuration space of a device with these settings.
    pub fn config(settings: &Settings) -> abi::Config {
        let features = if settings.aperture > 0 {
            abi::FEATURE_APERTURE
        } else {
            0
        };
        abi::Config {
            magic: abi::MAGIC,
            version: abi::VERSION,
            features,
            vram_size: settings.vram,
            max_contexts: context::MAX_CONTEXTS,
            max_batch: command::MAX_BATCH,
            max_map_entries: request::MAX_MAP_ENTRIES,
            num_rings: settings.rings,
            va_bits: abi::VA_BITS,
            page_shift: abi::PAGE_SHIFT,
            aperture_size: settings.aperture,
            max_counters: counters::MAX_COUNTERS,
            num_engines: settings.engines,
            large_page_shift: abi::LARGE_PAGE_SHIFT,
            reserved0: 0,
            reserved: 0,
        }
    }

    /// A submission may have come in.
    pub fn doorbell(&self, ring: u16) {
        self.shared.ring(ring);
    }

    /// A submission may have come in, and the caller has time: it does the first of the work itself, for a fraction of a
    /// millisecond, if nobody else is at it. It must not hold a lock that the [`Host`] takes.
    pub fn attend(&self, ring: u16) {
        let number = self.shared.engine_of(ring);
        if let (Some(engine), Some(desk)) = (self.shared.engines.get(number), self.desks.get(number)) {
            engine::attend(engine, desk, ring);
        }
    }

    /// Carries out a request of the control queue.
    pub fn control(&self, request: &[u8], ticket: H::Ticket) -> Answer<H::Ticket> {
        self.shared.statistics.requests.count();
        let result = match Request::decode(request) {
            Ok(Request::Replay { context, fault }) => {
                if sabotaged(Sabotage::WakesFirst) {
                    self.shared.poke();
                }
                match self.shared.faults.replay(context, fault, ticket) {
                    Ok(woken) => {
                        if !sabotaged(Sabotage::WakesFirst) {
                            self.shared.wake(woken);
                        }
                        return Answer::Later;
                    }
                    Err((ticket, error)) => return Answer::Now(ticket, self.response(request, Err(error))),
                }
            }
            Ok(request) => self.carry_out(request),
            Err(error) => Err(error),
        };
        Answer::Now(ticket, self.response(request, result))
    }

    fn response(&self, request: &[u8], result: Result<u64, Error>) -> abi::Response {
        if let Err(error) = &result {
            self.shared.statistics.requests_refused.count();
            let (opcode, context) = request::subject(request);
            self.shared
                .refused(format_args!("request {opcode} for context {context}"), *error);
        }
        abi::Response {
            status: status::code(&result),
            reserved: 0,
            value: result.unwrap_or(0),
        }
    }

    fn carry_out(&self, request: Request) -> Result<u64, Error> {
        let shared = &*self.shared;
        match request {
            // REPLAY is answered elsewhere.
            Request::Ping | Request::Replay { .. } => {}
            Request::Create { context } => {
                let _making = shared.making.lock();
                shared.contexts.create(context, shared.positions())?;
            }
            Request::Destroy { context } => self.destroy(context)?,
            Request::ContextReset { context } => self.reset_context(context)?,
            Request::DeviceReset => shared.reset_device(),
            Request::Map {
                context,
                va,
                entries,
                large,
            } => {
                let context = shared.contexts.get(context)?;
                let garbage = context.table.write().write(va, &entries, large)?;
                shared.statistics.entries_written.add(entries.len() as u64);
                drop(garbage);
            }
            Request::Cancel { context, fault } => {
                let context = shared.contexts.get(context).map_err(|_| Error::NoFault)?;
                let woken = shared.faults.cancel(&context, fault)?;
                self.interrupt(woken);
                shared.host.events();
            }
            Request::Query(query) => return self.query(query),
            Request::Count(request) => {
                let _making = shared.making.lock();
                let context = shared.contexts.get(request.context)?;
                let any = shared.counters.set(&request, &shared.log)?;
                context.set_counting(any);
            }
        }
        Ok(0)
    }

    fn query(&self, query: Query) -> Result<u64, Error> {
        let shared = &*self.shared;
        Ok(match query {
            Query::Time => shared.clock.now(),
            Query::Timeline { ring } if ring < shared.timelines.len() => shared.timelines.get(ring),
            Query::Timeline { .. } => return Err(Error::Invalid),
            Query::Context { context } => shared.contexts.get(context)?.status().into(),
            Query::Entry { context, va } => {
                let found = shared.contexts.get(context)?.table.read().get(va);
                found.map_or(0, |found| {
                    let large = found.shift == abi::LARGE_PAGE_SHIFT;
                    found.pte | u64::from(large).wrapping_shl(63)
                })
            }
            Query::Count { context, va } => {
                shared.contexts.get(context)?;
                shared.counters.get(context, va)
            }
        })
    }

    /// Has engines look at once at work that was ended, wherever it is.
    fn interrupt(&self, woken: Rings) {
        if !sabotaged(Sabotage::EndsOutside) {
            for engine in &self.shared.engines {
                engine.gate.notify();
            }
        }
        self.shared.wake(woken);
        self.shared.poke();
    }

    fn destroy(&self, id: u32) -> Result<(), Error> {
        let shared = &*self.shared;
        let late = sabotaged(Sabotage::DestroysLate);
        let context = if late {
            shared.contexts.get(id)?
        } else {
            shared.contexts.remove(id)?
        };
        shared.counters.forget(id);
        let woken = shared.faults.end_context(id);
        shared.through_gates(|inside| inside.tlb.invalidate_context(id));
        shared.log.forget_hints(Some(id));
        self.interrupt(woken);
        if late {
            shared.contexts.remove(id)?;
        }
        // An engine may hold the context a little longer; what is in it goes now.
        let garbage = context.table.write().clear(0, abi::VA_END);
        drop(garbage);
        Ok(())
    }

    fn reset_context(&self, id: u32) -> Result<(), Error> {
        let shared = &*self.shared;
        let context = shared.contexts.get(id)?;
        let woken = shared.faults.reset_context(&context, &shared.positions());
        // Through all gates once: what was in flight has ended.
        self.interrupt(woken);
        shared.log.forget_hints(Some(id));
        Ok(())
    }

    /// Carries out a request of the invalidation queue.
    pub fn invalidate(&self, request: &[u8]) -> abi::Response {
        self.shared.statistics.invalidations.count();
        let result = Invalidate::decode(request).and_then(|request| self.invalidate_range(request));
        self.response(request, result.map(|()| 0))
    }

    fn invalidate_range(&self, request: Invalidate) -> Result<(), Error> {
        let shared = &*self.shared;
        match request {
            Invalidate::Everything => {
                if !shared.injector.strikes(Defect::StaleTlb) {
                    shared.through_gates(|inside| inside.tlb.clear());
                }
            }
            Invalidate::Range {
                context,
                va,
                end,
                clear,
            } => {
                let found = shared.contexts.get(context)?;
                if shared.injector.strikes(Defect::StaleTlb) {
                    return Ok(());
                }
                let late = sabotaged(Sabotage::ClearsLate);
                if clear && !late {
                    let garbage = found.table.write().clear(va, end);
                    drop(garbage);
                }
                shared.through_gates(|inside| inside.tlb.invalidate(context, va, end));
                if clear && late {
                    drop(found.table.write().clear(va, end));
                }
            }
        }
        Ok(())
    }

    /// Replaces system memory. Afterwards no access through the old map is in flight or will start.
    pub fn set_memory(&self, memory: Arc<dyn SystemMemory>) {
        self.shared.through_gates(|inside| inside.memory = memory.clone());
    }

    /// Stops the engines. Afterwards no access is in flight or will start until [`Gpu::resume`].
    pub fn pause(&self) {
        self.shared.through_gates(|inside| inside.paused = true);
    }

    /// Lets the engines go on.
    pub fn resume(&self) {
        for engine in &self.shared.engines {
            engine.gate.with(|inside| inside.paused = false);
            if !sabotaged(Sabotage::ResumesSilently) {
                engine.gate.notify();
            }
        }
        for ring in 0..self.shared.timelines.len() {
            self.shared.ring(ring);
        }
    }

    /// Forgets contexts, faults, events and work, and clears VRAM. Tickets from before are dropped or
    /// come back to a host that has to know them as old.
    pub fn reset(&self) {
        let shared = &*self.shared;
        let woken = shared.faults.abandon();
        shared.reset_device();
        self.interrupt(woken);
    }

    /// VRAM.
    pub fn vram(&self) -> &Vram {
        &self.shared.vram
    }

    /// What the device has done so far.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.shared.statistics
    }

    /// Hints for the driver that were dropped, as they may be.
    pub fn hints_dropped(&self) -> u64 {
        self.shared.log.dropped()
    }

    /// How things are.
    pub fn state(&self) -> State {
        let shared = &*self.shared;
        let contexts = shared.contexts.list();
        let contexts = contexts.iter().map(|context| ContextState {
            id: context.id(),
            status: context.status(),
            page_table_nodes: context.table.read().nodes(),
        });
        let (faults, stalled) = shared.faults.look();
        let numbers = shared
            .activities
            .iter()
            .map(|number| number.load(Ordering::Relaxed));
        let rings = (0..)
            .zip(numbers.zip(stalled))
            .map(|(ring, (number, stalled))| RingState {
                ring,
                engine: shared.engine_of(ring) as u16,
                timeline: shared.timelines.get(ring),
                submitted: shared.host.position(ring),
                activity: lane::activity(number, stalled),
            });
        State {
            device: DeviceState {
                vram_size: shared.vram.size(),
                vram_used: shared.vram.used(),
                time: shared.clock.now(),
            },
            contexts: contexts.collect(),
            rings: rings.collect(),
            faults,
            pending_events: shared.log.len(),
        }
    }
}

impl<H: Host> Drop for Gpu<H> {
    fn drop(&mut self) {
        let shared = &*self.shared;
        let late = sabotaged(Sabotage::EndsLate);
        if !late {
            shared.ending.store(true, Ordering::Relaxed);
        }
        let woken = shared.faults.close();
        self.interrupt(woken);
        if late {
            shared.ending.store(true, Ordering::Relaxed);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("an engine thread panicked");
            }
        }
    }
}
