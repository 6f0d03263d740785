// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtqueues, as the core sees them.
//!
//! A chain belongs to the life of the device in which it was taken, its *epoch*: a device reset begins
//! a new one, and what is answered after that to an older chain goes nowhere. A chain that is answered
//! while its queue is stopped, but the device was not reset, is *parked*, and used when the queue runs
//! again. Nothing is ever written into, or on behalf of, a queue that is stopped.
//!
//! Lock order: a vring, then its parked answers. No lock of the core is taken under them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pinion_abi::{self as abi, QUEUE_CONTROL, QUEUE_EVENT, QUEUE_FIRST_RING};
use vhost_user_backend::{VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::chain::{self, Ticket};
pub(super) use super::vring::Vring;
use super::vring::signal;
use crate::gpu::Host;
use crate::gpu::command::MAX_SUBMISSION;
use crate::gpu::event::EventLog;
use crate::gpu::inject::{Defect, Injector};
use crate::rate_limit::{RateLimit, warn_limited};

/// Bad chains that are returned before other queues are looked at.
const MAX_BAD_CHAINS: usize = 64;
/// Largest queue that a frontend may set up.
pub(super) const MAX_QUEUE_SIZE: usize = 1024;

pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// One virtqueue.
#[derive(Default)]
struct Slot {
    /// The library hands it out with its first event.
    vring: OnceLock<Vring>,
    /// Chains taken so far.
    taken: AtomicU64,
    parked: Mutex<VecDeque<(Ticket, Vec<u8>)>>,
    /// Something was used that the driver was not told of.
    unannounced: AtomicBool,
    /// Of messages about broken chains.
    complaints: RateLimit,
}

/// All virtqueues of a connection.
pub(super) struct Queues {
    memory: Memory,
    slots: Vec<Slot>,
    epoch: AtomicU64,
    /// The connection ends: no queue runs any more.
    closed: AtomicBool,
    log: Arc<EventLog>,
    injector: Arc<Injector>,
}

impl Queues {
    pub(super) fn new(memory: Memory, rings: u16, log: Arc<EventLog>, injector: Arc<Injector>) -> Self {
        let count = usize::from(QUEUE_FIRST_RING).saturating_add(rings.into());
        let slots = (0..count).map(|_| Slot::default()).collect();
        Self {
            memory,
            slots,
            epoch: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            log,
            injector,
        }
    }

    fn slot(&self, queue: u16) -> Option<&Slot> {
        self.slots.get(usize::from(queue))
    }

    /// Does something with a queue, if it runs.
    fn with<R>(&self, queue: u16, action: impl FnOnce(&Slot, &mut VringState<Memory>) -> R) -> Option<R> {
        let slot = self.slot(queue)?;
        let mut vring = slot.vring.get()?.get_mut();
        self.runs(&vring).then(|| action(slot, &mut vring))
    }

    /// Whether chains may be taken from and returned to a queue.
    fn runs(&self, vring: &VringState<Memory>) -> bool {
        vring.is_enabled() && vring.get_queue().ready() && !self.closed.load(Ordering::Relaxed)
    }

    /// No queue runs any more. A guest that goes on filling them keeps nobody busy.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Waits until whoever is at a queue is done with what it knew of memory.
    pub(super) fn settle(&self) {
        for vring in self.slots.iter().filter_map(|slot| slot.vring.get()) {
            // Memory is looked at under the vring's lock only, and found anew each time.
            drop(vring.get_mut());
        }
    }

    fn announce_locked(&self, slot: &Slot, vring: &mut VringState<Memory>) {
        if !slot.unannounced.swap(false, Ordering::Relaxed) {
            return;
        }
        // If the driver's wish cannot be read it is told too often rather than never.
        if !vring.needs_notification().unwrap_or(true) || self.injector.strikes(Defect::DropInterrupt) {
            return;
        }
        if let Err(error) = signal(vring) {
            warn_limited!("cannot notify the driver: {error}");
        }
    }

    /// Makes a queue known.
    pub(super) fn learn(&self, queue: u16, vring: &Vring) {
        if let Some(slot) = self.slot(queue) {
            slot.vring.get_or_init(|| vring.clone());
        }
    }

    /// The index of the next chain that will be taken from a queue.
    pub(super) fn next_index(&self, queue: u16) -> Option<u16> {
        Some(self.slot(queue)?.vring.get()?.queue_next_avail())
    }

    pub(super) fn is_running(&self, queue: u16) -> bool {
        self.with(queue, |_, _| ()).is_some()
    }

    /// Takes the next chain of a queue; bad ones are used with nothing written to them. If there are many of
    /// those it gives up, and [`Queues::listen`] says that there are more.
    fn take(&self, queue: u16, bytes: &mut Vec<u8>, limit: usize, answer: usize) -> Option<(Ticket, u64)> {
        // The lock is given up after each, so that a driver that makes bad chains without end keeps
        // nobody else from the queue; and whoever takes them has other queues to look at.
        for _ in 0..MAX_BAD_CHAINS {
            let taken = self.with(queue, |slot, vring| {
                if self.waiting(vring) == 0 {
                    return None;
                }
                let chain = vring.get_queue_mut().pop_descriptor_chain(self.memory.memory())?;
                let position = slot.taken.fetch_add(1, Ordering::Relaxed);
                bytes.clear();
                let (ticket, result) = Ticket::take(chain, self.epoch(), bytes, limit, answer);
                match result {
                    Ok(()) => Some(Some((ticket, position))),
                    Err(error) => {
                        self.refuse(queue, slot, vring, &ticket, &error);
                        self.announce_locked(slot, vring);
                        Some(None)
                    }
                }
            })??;
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Returns a bad chain. There is nowhere to say what is wrong but the log.
    fn refuse(
        &self,
        queue: u16,
        slot: &Slot,
        vring: &mut VringState<Memory>,
        ticket: &Ticket,
        error: &chain::Error,
    ) {
        warn_limited!(limit = slot.complaints; "queue {queue}: the driver made a bad descriptor chain: {error}");
        self.put(slot, vring, ticket.head, 0);
    }

    fn put(&self, slot: &Slot, vring: &mut VringState<Memory>, head: u16, written: u32) {
        slot.unannounced.store(true, Ordering::Relaxed);
        if let Err(error) = vring.add_used(head, written) {
            warn_limited!("cannot return a descriptor chain: {error}");
        }
    }

    /// Answers a chain; the driver is not told yet.
    fn answer(&self, queue: u16, ticket: Ticket, answer: &[u8]) {
        let Some(slot) = self.slot(queue) else { return };
        let Some(vring) = slot.vring.get() else { return };
        let mut vring = vring.get_mut();
        if ticket.epoch != self.epoch() {
            return;
        }
        if self.runs(&vring) {
            let written = ticket.answer(&self.memory.memory(), answer);
            self.put(slot, &mut vring, ticket.head, written);
        } else {
            // No more than there are engines and pending REPLAYs.
            slot.parked.lock().push_back((ticket, answer.to_vec()));
        }
    }

    /// Uses the chains that were answered while a queue was stopped.
    pub(super) fn unpark(&self, queue: u16) {
        self.with(queue, |slot, vring| {
            for (ticket, answer) in slot.parked.lock().drain(..) {
                let written = ticket.answer(&self.memory.memory(), &answer);
                self.put(slot, vring, ticket.head, written);
            }
            self.announce_locked(slot, vring);
        });
    }

    /// Begins a new epoch.
    pub(super) fn reset(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        for slot in &self.slots {
            // Under the vring's lock, so that whoever is answering has either done so or sees the epoch.
            let vring = slot.vring.get().map(|vring| vring.get_mut());
            slot.parked.lock().clear();
            drop(vring);
        }
    }

    /// The driver need not kick.
    pub(super) fn quiet(&self, queue: u16) {
        self.with(queue, |_, vring| vring.disable_notification());
    }

    /// The driver has to kick again. True if there is a chain already.
    pub(super) fn listen(&self, queue: u16) -> bool {
        self.with(queue, |_, vring| self.listen_locked(vring))
            .unwrap_or(false)
    }

    fn listen_locked(&self, vring: &mut VringState<Memory>) -> bool {
        vring.enable_notification().unwrap_or(false) && self.waiting(vring) > 0
    }

    /// How many chains wait to be taken.
    fn waiting(&self, vring: &VringState<Memory>) -> u16 {
        let queue = vring.get_queue();
        let memory = self.memory.memory();
        // A ring that ends outside of memory is none: the entry that comes next could not be read, now or later.
        let length = 4_usize.saturating_add(usize::from(queue.size()).saturating_mul(2));
        if !memory.check_range(GuestAddress(queue.avail_ring()), length) {
            return 0;
        }
        let available = queue.avail_idx(&*memory, Ordering::Acquire);
        let waiting = available.map_or(0, |index| index.0.wrapping_sub(queue.next_avail()));
        // A nonsensical index stands for no chain, or we would be kept busy with nothing.
        if waiting > queue.size() { 0 } else { waiting }
    }

    /// Takes a request of the control or the invalidation queue.
    pub(super) fn request(&self, queue: u16, bytes: &mut Vec<u8>, limit: usize) -> Option<Ticket> {
        self.take(queue, bytes, limit, size_of::<abi::Response>())
            .map(|(ticket, _)| ticket)
    }

    /// Answers a request and tells the driver.
    pub(super) fn respond(&self, queue: u16, ticket: Ticket, response: &abi::Response) {
        self.answer(queue, ticket, response.as_bytes());
        self.with(queue, |slot, vring| self.announce_locked(slot, vring));
    }

    /// Fills buffers of the event queue as long as there are events and buffers.
    pub(super) fn pump_events(&self) {
        let mut bytes = Vec::new();
        self.with(QUEUE_EVENT, |slot, vring| {
            let mut bad = 0_usize;
            while !self.log.is_empty() {
                // The driver has to say when there are buffers; it may just have made some.
                if self.waiting(vring) == 0 && !self.listen_locked(vring) {
                    break;
                }
                let memory = self.memory.memory();
                // Memory can have gone this very moment. Nothing is waited for here, under the vring's lock.
                let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                    break;
                };
                bytes.clear();
                let size = size_of::<abi::EventRecord>();
                let (ticket, result) = Ticket::take(chain, self.epoch(), &mut bytes, 0, size);
                if let Err(error) = result {
                    self.refuse(QUEUE_EVENT, slot, vring, &ticket, &error);
                    bad = bad.saturating_add(1);
                    if bad > MAX_QUEUE_SIZE {
                        break;
                    }
                    continue;
                }
                let Some(record) = self.log.take() else {
                    // It was forgotten this very moment.
                    vring.get_queue_mut().go_to_previous_position();
                    break;
                };
                log::debug!("event: {record:?}");
                let written = ticket.answer(&memory, record.as_bytes());
                self.put(slot, vring, ticket.head, written);
            }
            self.announce_locked(slot, vring);
        });
    }

    fn ring(ring: u16) -> u16 {
        QUEUE_FIRST_RING.saturating_add(ring)
    }
}

impl Host for Queues {
    type Ticket = Ticket;

    fn next(&self, ring: u16, bytes: &mut Vec<u8>) -> Option<(Ticket, u64)> {
        self.take(
            Self::ring(ring),
            bytes,
            MAX_SUBMISSION,
            size_of::<abi::Completion>(),
        )
    }

    fn position(&self, ring: u16) -> u64 {
        let Some(slot) = self.slot(Self::ring(ring)) else {
            return 0;
        };
        let Some(vring) = slot.vring.get() else { return 0 };
        let vring = vring.get_ref();
        let taken = slot.taken.load(Ordering::Relaxed);
        let waiting = if self.runs(&vring) {
            self.waiting(&vring)
        } else {
            0
        };
        taken.saturating_add(waiting.into())
    }

    fn busy(&self, ring: u16) {
        self.quiet(Self::ring(ring));
    }

    fn idle(&self, ring: u16) -> bool {
        self.announce(ring);
        self.listen(Self::ring(ring))
    }

    fn complete(&self, ring: u16, ticket: Ticket, completion: abi::Completion) {
        self.answer(Self::ring(ring), ticket, completion.as_bytes());
    }

    fn announce(&self, ring: u16) {
        self.with(Self::ring(ring), |slot, vring| self.announce_locked(slot, vring));
    }

    fn replayed(&self, ticket: Ticket, through: u64) {
        let response = abi::Response {
            status: abi::STATUS_OK,
            reserved: 0,
            value: through,
        };
        self.respond(QUEUE_CONTROL, ticket, &response);
    }

    fn events(&self) {
        self.pump_events();
    }
}
