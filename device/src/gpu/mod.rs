// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtual GPU itself. It knows nothing of virtio, vhost or sockets: requests and submissions come
//! as bytes, answers leave through the [`Host`], memory is behind [`SystemMemory`].
//!
//! | file | subject |
//! |---|---|
//! | `command.rs` | decoding and checking of submissions |
//! | `request.rs` | decoding and checking of requests |
//! | `context.rs` | contexts |
//! | `page_table.rs`, `tlb.rs` | translation |
//! | `gate.rs` | the invalidation promise |
//! | `execute.rs` | commands, chunk by chunk |
//! | `engine.rs` | the thread of a ring |
//! | `fault.rs`, `event.rs` | faults, and how the driver hears of them |
//! | `memory.rs`, `vram.rs` | what translations lead to |
//!
//! Lock order: gate, then page table; fault table, then event log. Nothing else is nested, and the
//! [`Host`] is called with none of them held.

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

pub mod command;
pub mod context;
mod engine;
pub mod event;
pub mod execute;
pub mod fault;
pub mod gate;
pub mod inject;
pub mod memory;
pub mod page_table;
pub mod request;
pub mod state;
pub mod statistics;
pub mod status;
#[cfg(test)]
mod tests;
pub mod tlb;
pub mod vram;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pinion_abi as abi;

use context::Contexts;
use engine::{Engine, Worker};
use event::EventLog;
use fault::FaultTable;
use inject::{Defect, Injector};
use memory::SystemMemory;
use page_table::{Budget, MAX_NODES};
use request::{Invalidate, Request};
use state::{Activity, ContextState, DeviceState, RingState, State};
use statistics::Statistics;
use status::Error;
use vram::Vram;

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
    contexts: Contexts,
    vram: Vram,
    faults: FaultTable<H::Ticket>,
    engines: Vec<Engine>,
    ending: AtomicBool,
    injector: Arc<Injector>,
    statistics: Arc<Statistics>,
    log: Arc<EventLog>,
    started: std::time::Instant,
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
    workers: Vec<JoinHandle<()>>,
}

impl<H: Host> Gpu<H> {
    /// Makes a device, with an engine thread for each ring.
    pub fn start(
        settings: &Settings,
        host: Arc<H>,
        log: Arc<EventLog>,
        injector: Arc<Injector>,
    ) -> Result<Self, StartError> {
        let shared = Arc::new(Shared {
            host,
            contexts: Contexts::new(Budget::new(MAX_NODES)),
            vram: Vram::new(settings.vram)?,
            faults: FaultTable::new(settings.rings, log.clone(), injector.clone()),
            engines: (0..settings.rings).map(|_| Engine::default()).collect(),
            ending: AtomicBool::new(false),
            injector,
            statistics: Arc::default(),
            log,
            started: std::time::Instant::now(),
        });
        let mut gpu = Self {
            shared,
            workers: Vec::new(),
        };
        for ring in 0..settings.rings {
            let worker = Worker {
                shared: gpu.shared.clone(),
                ring,
            };
            let thread = std::thread::Builder::new()
                .name(format!("engine{ring}"))
                .spawn(move || worker.run())
                .map_err(StartError::Thread)?;
            gpu.workers.push(thread);
        }
        Ok(gpu)
    }

    /// Configuration space of a device with these settings.
    pub fn config(settings: &Settings) -> abi::Config {
        abi::Config {
            magic: abi::MAGIC,
            version: abi::VERSION,
            features: if settings.aperture > 0 {
                abi::FEATURE_APERTURE
            } else {
                0
            },
            vram_size: settings.vram,
            max_contexts: context::MAX_CONTEXTS,
            max_batch: command::MAX_BATCH,
            max_map_entries: request::MAX_MAP_ENTRIES,
            num_rings: settings.rings,
            va_bits: abi::VA_BITS,
            page_shift: abi::PAGE_SHIFT,
            aperture_size: settings.aperture,
            max_counters: 0,
            num_engines: settings.rings,
            large_page_shift: abi::LARGE_PAGE_SHIFT,
            reserved0: 0,
            reserved: 0,
        }
    }

    /// A submission may have come in.
    pub fn doorbell(&self, ring: u16) {
        if let Some(engine) = self.shared.engines.get(usize::from(ring)) {
            engine.ring();
        }
    }

    /// Carries out a request of the control queue.
    pub fn control(&self, request: &[u8], ticket: H::Ticket) -> Answer<H::Ticket> {
        let result = match Request::decode(request) {
            Ok(Request::Replay { context, fault }) => {
                return match self.shared.faults.replay(context, fault, ticket) {
                    Ok(()) => Answer::Later,
                    Err((ticket, error)) => Answer::Now(ticket, response(&Err(error))),
                };
            }
            Ok(request) => self.carry_out(request),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            log::debug!("request refused: {error}");
        }
        Answer::Now(ticket, response(&result))
    }

    fn carry_out(&self, request: Request) -> Result<(), Error> {
        let shared = &*self.shared;
        match request {
            // REPLAY is answered elsewhere.
            Request::Ping | Request::Replay { .. } => Ok(()),
            Request::Create { context } => {
                let rings = 0..shared.engines.len() as u16;
                let born = rings.map(|ring| shared.host.position(ring)).collect();
                shared.contexts.create(context, born)
            }
            Request::Destroy { context } => self.destroy(context),
            Request::Map { context, va, entries } => {
                shared.contexts.get(context)?.table.write().write(va, &entries)
            }
            Request::Cancel { context, fault } => {
                shared
                    .faults
                    .cancel(&*shared.contexts.get(context).map_err(|_| Error::NoFault)?, fault)?;
                for engine in &shared.engines {
                    engine.gate.notify();
                }
                shared.host.events();
                Ok(())
            }
        }
    }

    fn destroy(&self, id: u32) -> Result<(), Error> {
        let shared = &*self.shared;
        let context = shared.contexts.remove(id)?;
        shared.faults.end_context(id);
        for engine in &shared.engines {
            engine.gate.with(|inside| inside.tlb.invalidate_context(id));
            engine.gate.notify();
        }
        // An engine may hold the context a little longer; what is in it goes now.
        let garbage = context.table.write().clear(0, abi::VA_END);
        drop(garbage);
        Ok(())
    }

    /// Carries out a request of the invalidation queue.
    pub fn invalidate(&self, request: &[u8]) -> abi::Response {
        response(&Invalidate::decode(request).and_then(|request| self.invalidate_range(&request)))
    }

    fn invalidate_range(&self, request: &Invalidate) -> Result<(), Error> {
        let Invalidate {
            context,
            va,
            end,
            clear,
        } = *request;
        let found = self.shared.contexts.get(context)?;
        if self.shared.injector.strikes(Defect::StaleTlb) {
            return Ok(());
        }
        if clear {
            let garbage = found.table.write().clear(va, end);
            drop(garbage);
        }
        for engine in &self.shared.engines {
            engine.gate.with(|inside| inside.tlb.invalidate(context, va, end));
        }
        Ok(())
    }

    /// Replaces system memory. Afterwards no access through the old map is in flight or will start.
    pub fn set_memory(&self, memory: Arc<dyn SystemMemory>) {
        for engine in &self.shared.engines {
            engine.gate.with(|inside| inside.memory = memory.clone());
        }
    }

    /// Stops the engines. Afterwards no access is in flight or will start until [`Gpu::resume`].
    pub fn pause(&self) {
        for engine in &self.shared.engines {
            engine.gate.with(|inside| inside.paused = true);
        }
    }

    /// Lets the engines go on.
    pub fn resume(&self) {
        for engine in &self.shared.engines {
            engine.gate.with(|inside| inside.paused = false);
            engine.gate.notify();
            engine.ring();
        }
    }

    /// Forgets contexts, faults, events and work, and clears VRAM. Tickets from before are dropped or
    /// come back to a host that has to know them as old.
    pub fn reset(&self) {
        let shared = &*self.shared;
        shared.contexts.remove_all();
        shared.faults.abandon();
        for engine in &shared.engines {
            engine.gate.with(|inside| inside.tlb.clear());
            engine.gate.notify();
        }
        shared.vram.clear();
    }

    /// What the device has counted.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.shared.statistics
    }

    /// What the device is doing.
    pub fn state(&self) -> State {
        let shared = &*self.shared;
        let contexts = shared.contexts.all();
        let describe = |context: Arc<context::Context>| ContextState {
            id: context.id(),
            status: status::code(&context.check()),
            page_table_nodes: context.table.read().nodes(),
        };
        let (faults, rings) = shared.faults.look();
        let ring = |(number, stalled): (usize, Option<Activity>)| RingState {
            ring: number as u16,
            engine: number as u16,
            activity: stalled.unwrap_or_default(),
            ..RingState::default()
        };
        State {
            device: DeviceState {
                vram_size: shared.vram.size(),
                vram_used: shared.vram.used(),
                time: u64::try_from(shared.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            },
            contexts: contexts.into_iter().map(describe).collect(),
            rings: rings.into_iter().enumerate().map(ring).collect(),
            faults,
            pending_events: shared.log.len(),
        }
    }

    /// VRAM.
    pub fn vram(&self) -> &Vram {
        &self.shared.vram
    }
}

impl<H: Host> Drop for Gpu<H> {
    fn drop(&mut self) {
        let shared = &*self.shared;
        shared.ending.store(true, Ordering::Relaxed);
        shared.faults.close();
        for engine in &shared.engines {
            engine.gate.notify();
            engine.ring();
        }
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                log::error!("an engine thread panicked");
            }
        }
    }
}

fn response(result: &Result<(), Error>) -> abi::Response {
    abi::Response {
        status: status::code(result),
        ..abi::Response::default()
    }
}
