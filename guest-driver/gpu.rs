// SPDX-License-Identifier: GPL-2.0-only

//! The device: its requests, its events, and what becomes of it.
//!
//! Locks, in the order in which they are taken:
//!
//! 1. `AddressSpace::handling`
//! 2. mmap_lock
//! 3. folio locks
//! 4. the state of an interval notifier (`hmm::notifier`); under it nothing is allocated
//! 5. `CopyEngine::mapped`, `Gpu::transport` (held only to take or drop it), `Contexts::table`
//! 6. spinlocks: channels, fences (`fence.rs`), the page table of `hmm::memory`
//!
//! `Ring::state` is taken with none of them held, and only spinlocks are taken under it. `Advice::pieces` is taken with 1 to 3 held;
//! under it memory is allocated, and no other lock is taken. `Dmirror::turn` comes before 1.
//!
//! A request waits with 4 held, but for a time that is bounded: a device that does not answer within
//! `timeout_ms` is lost. It is then reset, which ends all that was outstanding, and nothing is asked of it
//! any more. Loss is final until the device is probed again.

use crate::{
    abi,
    address_space::AddressSpace,
    chardev::{self, CharDevice},
    copy::{self, CopyEngine, Transfers},
    debugfs, dmirror,
    file::FileHandle,
    hmm::memory::{DeviceMemory, Kind},
    pins::{Pins, Pressure},
    residency::Residency,
    ring::Ring,
    shrinker::Shrinker,
    sync::{Completion, ModuleQueue},
    virtio::{self, Channel, Device, Layout, Pending, Transport},
};
use core::ops::Range;
use kernel::{
    device, impl_has_work, new_mutex, new_spinlock, new_work,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        Arc, Mutex, SpinLock,
    },
    task::Kuid,
    time::Msecs,
    workqueue::{Work, WorkItem},
};

/// Slots of the control queue, and of the invalidation queue: two for each ring (MAP and REPLAY), and some.
const CONTROL_SLOTS: usize = 2 * abi::MAX_RINGS as usize + 8;
/// Slots of a ring.
const RING_SLOTS: usize = 64;
/// Page table entries in one request that this driver sends, at most.
const MAP_ENTRIES: usize = 512;
/// Faults that are replayed with one request to map, at most: a ring has at most one.
pub(crate) const MAX_REPLAYS: usize = abi::MAX_RINGS as usize;
/// Most commands in a batch that this driver sends: 64 KiB of them.
const MAX_BATCH: u32 = 1024;
/// Milliseconds after which the device is asked whether it lives, while it has work.
const HEARTBEAT: Msecs = 1000;
/// Milliseconds for which the reset of a lost device is put off, so that CPUs lose what they have in its aperture first.
const ABANDON_PATIENCE: Msecs = 1000;
/// Pages that can be pinned at a time, at most.
const PIN_PAGES: usize = 32768;

/// `/dev/pinionN`.
type Node = CharDevice<FileHandle, Arc<Gpu>>;

/// What the device offers.
pub(crate) struct Limits {
    /// Number of rings that programs can use.
    pub(crate) rings: u32,
    /// Most commands in one submission.
    pub(crate) max_batch: u32,
    /// Bytes of VRAM.
    pub(crate) vram_size: u64,
    /// Most page table entries in one request.
    max_map_entries: usize,
}

/// The address spaces that are open, by context.
#[pin_data]
pub(crate) struct Contexts {
    #[pin]
    table: SpinLock<KVVec<Option<Arc<AddressSpace>>>>,
    /// Contexts that are taken, though not (yet, or any more) in the table, and for whom.
    #[pin]
    taken: SpinLock<KVVec<Option<Holder>>>,
    /// How many journeys home are under way with pages of each context; the last one is for those of no context.
    leaving: KVVec<Atomic<i32>>,
    /// How many journeys have begun.
    departures: Atomic<i64>,
}

/// Whom a context is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// A program of this user.
    User(Kuid),
    /// The driver itself, whoever has loaded it.
    Driver,
}

/// A page is on its way home; dropping this ends that.
pub(crate) struct Leaving<'a>(Option<&'a Atomic<i32>>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0 {
            count.fetch_sub(1, Full);
        }
    }
}

impl Contexts {
    fn new(count: usize) -> Result<Arc<Self>> {
        let mut table = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            table.push(None, GFP_KERNEL)?;
        }
        let taken = KVVec::from_elem(None, count, GFP_KERNEL)?;
        let mut leaving = KVVec::with_capacity(count + 1, GFP_KERNEL)?;
        for _ in 0..=count {
            leaving.push(Atomic::new(0), GFP_KERNEL)?;
        }
        Arc::pin_init(
            pin_init!(Self {
                table <- new_spinlock!(table),
                taken <- new_spinlock!(taken),
                leaving,
                departures: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// Reserves a context for the current user.
    ///
    /// # Errors
    ///
    /// EDQUOT: this user has too many. ENOSPC: there is none left.
    fn reserve(&self) -> Result<u32> {
        let user = Holder::User(Kuid::current_euid());
        let limit = crate::module_parameters::contexts_per_user.value() as usize;
        let mut exempt = false;
        let mut taken = self.taken.lock();
        while !exempt && taken.iter().filter(|owner| **owner == Some(user)).count() >= limit {
            drop(taken);
            if !chardev::caller_may_exceed_limits() {
                return Err(EDQUOT);
            }
            exempt = true;
            taken = self.taken.lock();
        }
        Self::take(&mut taken, user)
    }

    /// Reserves a context for the driver itself, which counts for nobody.
    fn reserve_own(&self) -> Result<u32> {
        Self::take(&mut self.taken.lock(), Holder::Driver)
    }

    fn take(taken: &mut [Option<Holder>], holder: Holder) -> Result<u32> {
        let context = taken.iter().position(Option::is_none).ok_or(ENOSPC)?;
        taken[context] = Some(holder);
        Ok(context as u32)
    }

    /// Makes `space` known under its context, or no address space.
    fn set(&self, context: u32, space: Option<Arc<AddressSpace>>) {
        let old = {
            let mut table = self.table.lock();
            table
                .get_mut(context as usize)
                .and_then(|entry| core::mem::replace(entry, space))
        };
        // Not under the lock: it can be the last.
        drop(old);
    }

    fn release(&self, context: u32) {
        if let Some(taken) = self.taken.lock().get_mut(context as usize) {
            *taken = None;
        }
    }

    /// Counts pages of `context`, or of none, as on their way home. To be called before any of them is taken out of the table.
    pub(crate) fn leave(&self, context: u32) -> Leaving<'_> {
        let count = self.leaving.get(context.min(self.count()) as usize);
        if let Some(count) = count {
            count.fetch_add(1, Full);
        }
        // In this order: see `departures`.
        self.departures.fetch_add(1, Full);
        Leaving(count)
    }

    /// How many journeys home have begun so far.
    ///
    /// If nobody is on the way ([`Self::all_leaving`], asked after this) and this is still the same later, then nobody was
    /// meanwhile.
    pub(crate) fn departures(&self) -> i64 {
        self.departures.load(Acquire)
    }

    /// How many journeys home are under way with pages of `context`.
    pub(crate) fn leaving(&self, context: u32) -> usize {
        self.leaving
            .get(context as usize)
            .map_or(0, |count| count.load(Acquire) as usize)
    }

    /// How many journeys home are under way, with pages of no context as well.
    pub(crate) fn all_leaving(&self) -> usize {
        self.leaving
            .iter()
            .map(|count| count.load(Acquire) as usize)
            .sum()
    }

    /// How many there can be.
    fn count(&self) -> u32 {
        (self.leaving.len() - 1) as u32
    }

    /// The address space of a context.
    pub(crate) fn get(&self, context: u32) -> Option<Arc<AddressSpace>> {
        self.table.lock().get(context as usize).cloned().flatten()
    }
}

/// A Pinion device.
#[pin_data]
pub(crate) struct Gpu {
    device: ARef<device::Device>,
    number: Number,
    limits: Limits,
    control: Arc<Channel>,
    invalidation: Arc<Channel>,
    event: Arc<Channel>,
    rings: KVec<Arc<Ring>>,
    /// None if the device has but one ring. VRAM is then not used.
    copy: Option<Pin<KBox<CopyEngine>>>,
    contexts: Arc<Contexts>,
    memory: Arc<DeviceMemory<Residency>>,
    pins: Arc<Pins>,
    lost: Atomic<bool>,
    large_pages: Atomic<bool>,
    /// The device has been reset and touches nothing any more.
    #[pin]
    stopped: Completion,
    #[pin]
    transport: Mutex<Option<Transport>>,
    #[pin]
    node: Mutex<Option<Pin<KBox<Node>>>>,
    #[pin]
    dmirror: Mutex<dmirror::Nodes>,
    #[pin]
    debug: Mutex<Option<Pin<KBox<debugfs::Directory>>>>,
    #[pin]
    event_work: Work<Gpu, 0>,
    #[pin]
    loss_work: Work<Gpu, 1>,
    /// `look_work` is running, or about to.
    looking: Atomic<bool>,
    #[pin]
    look_work: Work<Gpu, 2>,
    #[pin]
    abandon_work: Work<Gpu, 3>,
    /// `abandon_work` has done what it can before the reset.
    #[pin]
    abandoned: Completion,
    /// While the driver is bound.
    #[pin]
    shrinker: Mutex<Option<Shrinker<Pressure>>>,
    #[pin]
    pressure_work: Work<Gpu, 4>,
}

impl_has_work! {
    impl HasWork<Self, 0> for Gpu { self.event_work }
    impl HasWork<Self, 1> for Gpu { self.loss_work }
    impl HasWork<Self, 2> for Gpu { self.look_work }
    impl HasWork<Self, 3> for Gpu { self.abandon_work }
    impl HasWork<Self, 4> for Gpu { self.pressure_work }
}

/// Memory is short.
impl WorkItem<4> for Gpu {
    type Pointer = Arc<Gpu>;

    fn run(this: Arc<Gpu>) {
        this.pins.relieve(&this);
    }
}

/// Events have come.
impl WorkItem<0> for Gpu {
    type Pointer = Arc<Gpu>;

    fn run(this: Arc<Gpu>) {
        this.event
            .drain(|bytes| match abi::EventRecord::read_from_bytes(bytes) {
                Ok(event) => this.handle_event(&event),
                Err(_) => dev_err!(this.device, "an event of {} bytes; expected 64\n", bytes.len()),
            });
    }
}

/// The device is lost: make sure that it touches nothing any more.
impl WorkItem<1> for Gpu {
    type Pointer = Arc<Gpu>;

    fn run(this: Arc<Gpu>) {
        // The aperture goes with the reset, and what CPUs read there afterwards is anything. Better to take it away from
        // them before; but others wait for the reset with locks held that this may take. And it allocates memory, for which
        // reclaim may need the reset: so it is not for this queue, and is not waited for once it comes to that.
        let any = this.memory.usage(Kind::Coherent).used > 0;
        let begun = ModuleQueue::Faults
            .get()
            .is_some_and(|queue| queue.enqueue::<_, 3>(this.clone()).is_ok());
        if any && begun && this.abandoned.wait(ABANDON_PATIENCE).is_err() {
            dev_dbg!(
                this.device,
                "not all of the aperture is taken away before the reset\n"
            );
        }
        this.stop();
    }
}

/// The device is lost, and perhaps not reset yet: takes away what CPUs have in its aperture.
impl WorkItem<3> for Gpu {
    type Pointer = Arc<Gpu>;

    fn run(this: Arc<Gpu>) {
        Residency::begin_to_abandon(&this);
        this.abandoned.complete_all();
        this.wait_stopped();
        Residency::abandon(&this);
    }
}

/// The device has work: does it live?
impl WorkItem<2> for Gpu {
    type Pointer = Arc<Gpu>;

    fn run(this: Arc<Gpu>) {
        loop {
            if this.stopped.wait(HEARTBEAT).is_ok() {
                return;
            }
            if this.rings.iter().any(|ring| ring.is_busy()) {
                // If it does not live, then this ends all its work.
                let _ = this.ping();
                continue;
            }
            this.looking.store(false, Release);
            // Work that came before that has not seen it.
            if !this.rings.iter().any(|ring| ring.is_busy()) || this.looking.xchg(true, Full) {
                return;
            }
        }
    }
}

/// Numbers of the devices that exist, as bits.
static NUMBERS: Atomic<u64> = Atomic::new(0);

/// The number in `/dev/pinionN`.
struct Number(u32);

impl Number {
    fn allocate() -> Result<Self> {
        let mut numbers = NUMBERS.load(Acquire);
        loop {
            let number = numbers.trailing_ones();
            let bit = 1u64.checked_shl(number).ok_or(ENOSPC)?;
            match NUMBERS.cmpxchg(numbers, numbers | bit, Full) {
                Ok(_) => return Ok(Self(number)),
                Err(current) => numbers = current,
            }
        }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        let mut numbers = NUMBERS.load(Acquire);
        while let Err(current) = NUMBERS.cmpxchg(numbers, numbers & !(1 << self.0), Full) {
            numbers = current;
        }
    }
}

/// How long the device may take for an answer.
fn timeout() -> Msecs {
    crate::module_parameters::timeout_ms.value().clamp(100, 30_000)
}

/// Turns the status of a request into an error.
fn check(status: u32) -> Result {
    match status {
        abi::STATUS_OK => Ok(()),
        abi::STATUS_LIMIT => Err(ENOMEM),
        abi::STATUS_NO_CONTEXT | abi::STATUS_NO_FAULT => Err(ENOENT),
        abi::STATUS_CONTEXT_EXISTS => Err(EEXIST),
        abi::STATUS_UNSUPPORTED | abi::STATUS_INVALID => Err(EOPNOTSUPP),
        _ => Err(EIO),
    }
}

impl Gpu {
    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        self.number.0
    }

    /// What the device offers.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The open address spaces.
    pub(crate) fn contexts(&self) -> &Contexts {
        &self.contexts
    }

    /// The struct pages of VRAM, and those that stand in for pinned ones.
    pub(crate) fn memory(&self) -> &DeviceMemory<Residency> {
        &self.memory
    }

    /// A ring.
    pub(crate) fn ring(&self, ring: u32) -> Result<&Arc<Ring>> {
        self.rings.get(ring as usize).ok_or(EINVAL)
    }

    /// All rings.
    pub(crate) fn rings(&self) -> &[Arc<Ring>] {
        &self.rings
    }

    /// There is work: has the device asked from time to time whether it lives, until all is done. Whoever waits for
    /// the end of it need not do that.
    pub(crate) fn look_after_work(self: &Arc<Self>) {
        if !self.looking.xchg(true, Full) {
            // Fails only if it is queued already.
            let _ = ModuleQueue::Submissions
                .get()
                .map(|queue| queue.enqueue::<_, 2>(self.clone()));
        }
    }

    /// For messages.
    pub(crate) fn device(&self) -> &device::Device {
        &self.device
    }

    /// Whether the device is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Acquire)
    }

    /// The pages that are pinned.
    pub(crate) fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    /// What is to be seen of this device in debugfs.
    fn debug_directory(&self, name: &CStr) -> Result<Pin<KBox<debugfs::Directory>>> {
        let mut rings = KVec::new();
        let mut queues = KVec::new();
        let mut queue = |name, channel: &Arc<Channel>| queues.push((name, channel.clone()), GFP_KERNEL);
        queue("control", &self.control)?;
        queue("invalidate", &self.invalidation)?;
        queue("event", &self.event)?;
        for ring in &self.rings {
            rings.push(ring.clone(), GFP_KERNEL)?;
            queue("ring", ring.channel())?;
        }
        if let Some(copy) = &self.copy {
            queue("copy", copy.ring())?;
        }
        debugfs::Directory::new(name, rings, queues, self.pins.clone())
    }

    /// Declares the device lost. It will be reset as soon as possible.
    fn lose(self: &Arc<Self>, why: &str) {
        if !self.lost.xchg(true, Full) {
            dev_err!(
                self.device,
                "device lost: {}; outstanding work is given up\n",
                why
            );
            // Fails only if it is queued already.
            let _ = ModuleQueue::Loss
                .get()
                .map(|queue| queue.enqueue::<_, 1>(self.clone()));
        }
    }

    /// Resets the device and ends all requests. When this returns, the device touches nothing any more, even if
    /// it was somebody else who has reset it.
    fn stop(&self) {
        self.lost.store(true, Release);
        let mut transport = self.transport.lock();
        drop(transport.take());
        drop(transport);
        self.stopped.complete_all();
        // What had not gone to it ends as well.
        for ring in &self.rings {
            ring.pump();
        }
        for context in 0..self.contexts.count() {
            if let Some(space) = self.contexts.get(context) {
                space.submissions().lose();
            }
        }
    }

    /// Waits for the answer to a request; a device that does not give one is lost.
    fn answer(self: &Arc<Self>, pending: Pending<'_>, what: &str) -> Result<abi::Response> {
        match pending.wait::<abi::Response>(timeout()) {
            Ok(response) => Ok(response),
            Err(error) => {
                if error == ETIMEDOUT {
                    self.lose(what);
                }
                Err(ENODEV)
            }
        }
    }

    /// Copies and clears memory. When this returns, all has been done, or nothing more will be.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP: there is no ring for it. ENODEV: the device is lost.
    pub(crate) fn transfer(self: &Arc<Self>, transfers: &Transfers) -> Result {
        if transfers.is_empty() {
            return Ok(());
        }
        let copy = self.copy.as_ref().ok_or(EOPNOTSUPP)?;
        copy.prepare(self, transfers)?;
        let result = copy.run(self, transfers);
        if result.is_err() {
            // Work that has been given up may still be carried out, until the device is reset.
            self.wait_stopped();
        }
        result
    }

    /// Whether the CPU sees VRAM in the aperture. The device has answered a request, so the hypervisor has mapped it, or
    /// never will.
    fn sees_aperture(self: &Arc<Self>) -> Result<bool> {
        let page = self.memory.allocate_device(Kind::Coherent, 0)?;
        let offset = self.memory.offset(page.name()).ok_or(EINVAL)?;
        // Two, for one may be there by chance.
        for pattern in [0x5049_4e49_4f4e_0001, !0x5049_4e49_4f4e_0001] {
            let mut transfers = Transfers::with_capacity(1)?;
            transfers.fill(copy::Location::vram(offset), abi::PAGE_SIZE, pattern)?;
            self.transfer(&transfers)?;
            if page.peek() != Some(pattern) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Puts a batch of the driver's own into `ring`.
    pub(crate) fn send_batch<'a>(
        &self,
        ring: &'a Channel,
        header: &abi::SubmitHeader,
        commands: &[abi::Command],
    ) -> Result<Pending<'a>> {
        if self.is_lost() {
            return Err(ENODEV);
        }
        ring.request(timeout(), |output| {
            let length = put(output, header.as_bytes());
            length + put(&mut output[length..], commands.as_bytes())
        })
    }

    /// Waits for a batch of the driver's own.
    pub(crate) fn end_of_batch(self: &Arc<Self>, pending: Pending<'_>) -> Result {
        match pending.wait::<abi::Completion>(timeout()) {
            Ok(done) if done.status == abi::STATUS_OK => Ok(()),
            Ok(done) => {
                dev_err!(self.device, "a copy ended with {:?}\n", done);
                self.lose("it did not copy");
                Err(ENODEV)
            }
            Err(_) => {
                self.lose("no end of a copy");
                Err(ENODEV)
            }
        }
    }

    /// Puts a request into the control queue.
    ///
    /// # Errors
    ///
    /// EBUSY: the queue has been full all the time.
    fn send<T: IntoBytes + zerocopy::Immutable + ?Sized>(&self, request: &T) -> Result<Pending<'_>> {
        self.send_with(|output| put(output, request.as_bytes()))
    }

    /// As [`Self::send`], for a request that is written in place.
    fn send_with(&self, write: impl FnOnce(&mut [u8]) -> usize) -> Result<Pending<'_>> {
        match self.control.request(timeout(), write) {
            Err(error) if error == ETIMEDOUT => Err(EBUSY),
            other => other,
        }
    }

    /// Sends a request on the control queue and waits for the answer.
    fn request<T: IntoBytes + zerocopy::Immutable>(self: &Arc<Self>, request: &T, what: &str) -> Result<u64> {
        if self.is_lost() {
            return Err(ENODEV);
        }
        let pending = self.send(request)?;
        self.control.kick();
        let response = self.answer(pending, what)?;
        check(response.status)?;
        Ok(response.value)
    }

    /// Asks whether the device is still there.
    pub(crate) fn ping(self: &Arc<Self>) -> Result {
        self.request(&header(abi::REQUEST_PING, 0), "no answer to PING")
            .map(|_| ())
    }

    /// Makes a context for a new address space.
    pub(crate) fn create_context(self: &Arc<Self>) -> Result<u32> {
        let context = self.contexts.reserve()?;
        let request = header(abi::REQUEST_CONTEXT_CREATE, context);
        if let Err(error) = self.request(&request, "no answer to CONTEXT_CREATE") {
            self.contexts.release(context);
            return Err(error);
        }
        Ok(context)
    }

    /// Has events of `context` go to `space`.
    pub(crate) fn publish(&self, context: u32, space: Arc<AddressSpace>) {
        self.contexts.set(context, Some(space));
    }

    /// Ends a context. When this returns, the device accesses nothing of it any more.
    pub(crate) fn destroy_context(self: &Arc<Self>, context: u32) {
        let request = header(abi::REQUEST_CONTEXT_DESTROY, context);
        loop {
            match self.request(&request, "no answer to CONTEXT_DESTROY") {
                Ok(_) => return,
                // Nothing has been sent: others keep the queue busy.
                Err(error) if error == EBUSY => {}
                Err(_) => return self.wait_stopped(),
            }
        }
    }

    /// Ends all work of a context, which is alive afterwards if it was in error. When this returns, no access of that work is in
    /// flight or will start.
    pub(crate) fn reset_context(self: &Arc<Self>, context: u32) -> Result {
        let request = header(abi::REQUEST_CONTEXT_RESET, context);
        self.request(&request, "no answer to CONTEXT_RESET").map(|_| ())
    }

    /// Forgets the address space of a context that has ended, and frees its number.
    pub(crate) fn forget_context(&self, context: u32) {
        self.contexts.set(context, None);
        self.contexts.release(context);
    }

    /// Writes page table entries, and retries the accesses that are stalled on `faults` ([`MAX_REPLAYS`] at most). Returns
    /// when that has happened, so that whoever keeps the pages meanwhile has let the device make progress.
    ///
    /// All requests go over the bus at once, if there are no more entries than one request can hold.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP: the device knows no large pages.
    pub(crate) fn map(
        self: &Arc<Self>,
        context: u32,
        va: u64,
        entries: &[u64],
        large: bool,
        faults: &[u64],
    ) -> Result {
        if self.is_lost() {
            return Err(ENODEV);
        }
        let size = if large {
            abi::LARGE_PAGE_SIZE
        } else {
            abi::PAGE_SIZE
        };
        let limit = self.limits.max_map_entries;
        let mut va = va;
        let mut rest = entries;
        while rest.len() > limit {
            let (now, later) = rest.split_at(limit);
            let map = self.send_map(context, va, now, large)?;
            self.control.kick();
            check(self.answer(map, "no answer to MAP")?.status)?;
            va += now.len() as u64 * size;
            rest = later;
        }
        let map = self.send_map(context, va, rest, large)?;
        let mut replays = [const { None }; MAX_REPLAYS];
        for (replay, fault) in replays.iter_mut().zip(faults) {
            *replay = Some(self.send(&fault_request(abi::REQUEST_REPLAY, context, *fault)));
        }
        self.control.kick();
        let map = self.answer(map, "no answer to MAP");
        let mut result = Ok(());
        for replay in replays.into_iter().flatten() {
            let replay = replay.and_then(|replay| self.answer(replay, "no answer to REPLAY"));
            let replay = match replay.and_then(|answer| check(answer.status)) {
                // The fault may be gone with its context.
                Err(error) if error == ENOENT => Ok(()),
                other => other,
            };
            result = result.and(replay);
        }
        // Only now: with the fault replayed in vain, the access has stalled on another one.
        let map = check(map?.status);
        if large && map == Err(EOPNOTSUPP) {
            self.large_pages.store(false, Relaxed);
        }
        map?;
        result
    }

    /// Whether the device knows large pages, as far as anybody has tried.
    pub(crate) fn has_large_pages(&self) -> bool {
        self.large_pages.load(Relaxed)
    }

    fn send_map(&self, context: u32, va: u64, entries: &[u64], large: bool) -> Result<Pending<'_>> {
        let request = abi::MapRequest {
            header: abi::RequestHeader {
                opcode: abi::REQUEST_MAP,
                flags: if large { abi::MAP_LARGE } else { 0 },
                context,
            },
            va,
            count: entries.len() as u32,
            reserved: 0,
        };
        self.send_with(|output| {
            let length = put(output, request.as_bytes());
            length + put(&mut output[length..], entries.as_bytes())
        })
    }

    /// Retries the accesses that are stalled on `fault`, as [`Self::map`] does.
    pub(crate) fn replay(self: &Arc<Self>, context: u32, fault: u64) -> Result {
        match self.request(
            &fault_request(abi::REQUEST_REPLAY, context, fault),
            "no answer to REPLAY",
        ) {
            Err(error) if error == ENOENT => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Gives up the accesses that are stalled on `fault`.
    pub(crate) fn cancel(self: &Arc<Self>, context: u32, fault: u64) -> Result {
        let request = fault_request(abi::REQUEST_CANCEL, context, fault);
        self.request(&request, "no answer to CANCEL").map(|_| ())
    }

    /// Clears the entries of `range`. When this returns, no access through them is under way or will begin;
    /// if the device does not say so, then because it has been reset.
    ///
    /// Allocates nothing. Waits `timeout_ms` at most for the device, and then until it has been reset.
    pub(crate) fn invalidate(self: &Arc<Self>, context: u32, range: Range<u64>) {
        if self.try_invalidate(context, range).is_err() {
            self.wait_stopped();
        }
    }

    fn try_invalidate(self: &Arc<Self>, context: u32, range: Range<u64>) -> Result {
        if self.is_lost() {
            return Err(ENODEV);
        }
        let request = abi::InvalidateRequest {
            header: abi::RequestHeader {
                opcode: abi::REQUEST_INVALIDATE,
                flags: abi::INVALIDATE_CLEAR,
                context,
            },
            va: range.start,
            length: range.end - range.start,
        };
        let pending = match self
            .invalidation
            .request(timeout(), |output| put(output, request.as_bytes()))
        {
            Ok(pending) => pending,
            Err(error) => {
                if error == ETIMEDOUT {
                    self.lose("its invalidation queue is stuck");
                }
                return Err(error);
            }
        };
        self.invalidation.kick();
        match self.answer(pending, "no answer to INVALIDATE")?.status {
            // A context that does not exist accesses nothing.
            abi::STATUS_OK | abi::STATUS_NO_CONTEXT => Ok(()),
            status => {
                dev_err!(self.device, "INVALIDATE ended with status {}\n", status);
                self.lose("it did not invalidate");
                Err(EIO)
            }
        }
    }

    /// Waits until a lost device has been reset: until then it may access memory, and whoever waits here is about
    /// to free some. The reset does not need the device's cooperation, only the hypervisor's.
    fn wait_stopped(self: &Arc<Self>) {
        if !self.is_lost() {
            self.lose("a request failed");
        }
        while self.stopped.wait(timeout()).is_err() {
            dev_err!(self.device, "still waiting for the lost device to be reset\n");
        }
    }

    fn handle_event(self: &Arc<Self>, event: &abi::EventRecord) {
        match event.kind {
            abi::EVENT_FAULT
                if self
                    .copy
                    .as_ref()
                    .is_some_and(|copy| copy.context() == event.context) =>
            {
                dev_err!(self.device, "a copy of the driver's has faulted: {:?}\n", event);
                self.lose("it does not map what it was told to");
            }
            abi::EVENT_FAULT => {
                if let Some(space) = self.contexts.get(event.context) {
                    space.fault(event);
                }
            }
            abi::EVENT_CONTEXT_ERROR => {
                dev_dbg!(
                    self.device,
                    "context {} in error: status {}\n",
                    event.context,
                    event.status
                );
            }
            // Nothing depends on these.
            abi::EVENT_PREFETCH | abi::EVENT_ACCESS_COUNT => {}
            abi::EVENT_DEVICE_RESET => self.lose("it has reset itself"),
            kind => dev_err!(self.device, "an event of unknown kind {}\n", kind),
        }
    }
}

/// Copies `bytes` to the beginning of `output`; returns how many.
fn put(output: &mut [u8], bytes: &[u8]) -> usize {
    let length = bytes.len().min(output.len());
    output[..length].copy_from_slice(&bytes[..length]);
    length
}

fn header(opcode: u16, context: u32) -> abi::RequestHeader {
    abi::RequestHeader {
        opcode,
        flags: 0,
        context,
    }
}

fn fault_request(opcode: u16, context: u32, fault: u64) -> abi::FaultRequest {
    abi::FaultRequest {
        header: header(opcode, context),
        fault,
    }
}

/// Pages that are pinned at most.
fn most_pins() -> usize {
    (crate::module_parameters::pins.value() as usize).min(PIN_PAGES)
}

/// Pages of VRAM that are used at most: twice as many as the system has. The struct pages of more would take up too much of
/// its memory.
fn most_vram_pages() -> usize {
    2 * crate::hmm::page::system_pages()
}

/// Believes the device only what makes sense.
fn validate(device: &Device) -> Result<abi::Config> {
    let config: abi::Config = device.read_config();
    let dev = device.generic();
    if config.magic != abi::MAGIC {
        dev_info!(
            dev,
            "magic {:#x} is not Pinion's; leaving the device alone\n",
            config.magic
        );
        return Err(ENODEV);
    }
    if config.version != abi::VERSION {
        dev_err!(
            dev,
            "interface version {}; this driver knows {}\n",
            config.version,
            abi::VERSION
        );
        return Err(ENODEV);
    }
    let sane = config.va_bits == abi::VA_BITS
        && config.page_shift == abi::PAGE_SHIFT
        && (1..=abi::MAX_RINGS).contains(&config.num_rings)
        && (1..=1 << 20).contains(&config.max_contexts)
        && config.max_batch > 0
        && config.max_map_entries > 0;
    if !sane {
        dev_err!(dev, "configuration out of range: {:?}\n", config);
        return Err(EINVAL);
    }
    Ok(config)
}

/// Where the CPU sees the beginning of VRAM, if it does. (Not yet, though: see `started`.)
fn aperture(device: &Device, config: &abi::Config) -> Option<Range<usize>> {
    if config.features & abi::FEATURE_APERTURE == 0 {
        return None;
    }
    let range = device.shared_memory(abi::APERTURE_REGION)?;
    let size = usize::try_from(config.aperture_size).ok()?.min(range.len());
    Some(range.start..range.start + size)
}

impl virtio::Driver for Gpu {
    const NAME: &'static CStr = c"pinion";
    const DEVICE_ID: u32 = abi::VIRTIO_ID;

    fn probe(device: &Device) -> Result<Arc<Self>> {
        let config = validate(device)?;
        let response = size_of::<abi::Response>();
        let max_batch = config.max_batch.min(MAX_BATCH);
        let mut layouts = KVec::new();
        let mut layout = |output, input, slots| layouts.push(Layout { output, input, slots }, GFP_KERNEL);
        layout(
            size_of::<abi::MapRequest>() + MAP_ENTRIES * size_of::<u64>(),
            response,
            CONTROL_SLOTS,
        )?;
        layout(size_of::<abi::InvalidateRequest>(), response, CONTROL_SLOTS)?;
        layout(0, size_of::<abi::EventRecord>(), usize::MAX)?;
        // The last ring is the driver's own, if there are two at least.
        let rings_of_users = if config.num_rings > 1 {
            config.num_rings - 1
        } else {
            1
        };
        let copy_batch = config.max_batch.min(copy::MAX_BATCH);
        for ring in 0..config.num_rings {
            let (commands, slots) = if ring < rings_of_users {
                // Submissions come in buffers of their own.
                (0, RING_SLOTS)
            } else {
                (copy_batch, copy::SLOTS)
            };
            layout(
                size_of::<abi::SubmitHeader>() + commands as usize * size_of::<abi::Command>(),
                size_of::<abi::Completion>(),
                slots,
            )?;
        }
        let number = Number::allocate()?;
        let contexts = Contexts::new(config.max_contexts as usize)?;
        let vram = if config.num_rings > 1 { config.vram_size } else { 0 };
        let vram = usize::try_from(vram >> abi::PAGE_SHIFT)?.min(most_vram_pages());
        let memory = |aperture| {
            let residency = Residency::new(contexts.clone());
            DeviceMemory::new(c"pinion", vram, aperture, PIN_PAGES, residency)
        };
        let memory = match aperture(device, &config) {
            Some(range) => memory(Some(range.clone())).or_else(|error| {
                // That the CPU sees it is an advantage, and no more.
                dev_err!(
                    device.generic(),
                    "the aperture at {:#x?} cannot be used: {:?}\n",
                    range,
                    error
                );
                memory(None)
            })?,
            None => memory(None)?,
        };
        let transport = Transport::new::<Self>(device, &layouts)?;
        let mut rings = KVec::new();
        let mut copy = None;
        for ring in 0..config.num_rings {
            let channel = transport.channel((abi::QUEUE_FIRST_RING + ring).into())?;
            if ring < rings_of_users {
                rings.push(Ring::new(number.0, ring.into(), channel)?, GFP_KERNEL)?;
            } else {
                let engine = CopyEngine::new(contexts.reserve_own()?, channel, copy_batch)?;
                copy = Some(KBox::pin_init(engine, GFP_KERNEL)?);
            }
        }
        let control = transport.channel(abi::QUEUE_CONTROL.into())?;
        let invalidation = transport.channel(abi::QUEUE_INVALIDATE.into())?;
        let event = transport.channel(abi::QUEUE_EVENT.into())?;
        let limits = Limits {
            rings: rings_of_users.into(),
            max_batch,
            vram_size: config.vram_size,
            max_map_entries: (config.max_map_entries as usize).min(MAP_ENTRIES),
        };
        Arc::pin_init(
            try_pin_init!(Self {
                device: device.generic().into(),
                number,
                limits,
                control,
                invalidation,
                event,
                rings,
                copy,
                contexts,
                pins: Arc::new(Pins::new(memory.clone(), most_pins()), GFP_KERNEL)?,
                memory,
                lost: Atomic::new(false),
                large_pages: Atomic::new(true),
                stopped <- Completion::new(),
                transport <- new_mutex!(Some(transport), "Gpu::transport"),
                node <- new_mutex!(None, "Gpu::node"),
                dmirror <- new_mutex!(KVec::new(), "Gpu::dmirror"),
                debug <- new_mutex!(None, "Gpu::debug"),
                event_work <- new_work!("Gpu::event_work"),
                loss_work <- new_work!("Gpu::loss_work"),
                looking: Atomic::new(false),
                look_work <- new_work!("Gpu::look_work"),
                abandon_work <- new_work!("Gpu::abandon_work"),
                abandoned <- Completion::new(),
                shrinker <- new_mutex!(None, "Gpu::shrinker"),
                pressure_work <- new_work!("Gpu::pressure_work"),
            }? Error),
            GFP_KERNEL,
        )
    }

    fn started(this: &Arc<Self>) -> Result {
        if let Some(transport) = &*this.transport.lock() {
            transport.ready();
        }
        this.event.post_inputs()?;
        this.ping()?;
        this.memory.handler().set_gpu(Some(this.clone()));
        if let Some(copy) = &this.copy {
            let request = header(abi::REQUEST_CONTEXT_CREATE, copy.context());
            this.request(&request, "no answer to CONTEXT_CREATE")?;
        }
        if this.memory.usage(Kind::Coherent).total > 0 && !this.sees_aperture()? {
            dev_err!(
                this.device,
                "VRAM is not where the aperture should be; doing without that part\n"
            );
            this.memory.withdraw_coherent();
        }
        let name = CString::try_from_fmt(fmt!("pinion{}", this.number.0))?;
        *this.debug.lock() = Some(this.debug_directory(&name)?);
        let node = KBox::pin_init(Node::with_poll(name, 0o666, this.clone()), GFP_KERNEL)?;
        *this.node.lock() = Some(node);
        *this.dmirror.lock() = dmirror::nodes(this)?;
        let pressure = Arc::new(Pressure(this.clone()), GFP_KERNEL)?;
        *this.shrinker.lock() = Some(Shrinker::new(c"pinion-pins", pressure)?);
        Ok(())
    }

    fn interrupt(this: &Arc<Self>, queue: u16) {
        match queue {
            abi::QUEUE_CONTROL => this.control.collect(),
            abi::QUEUE_INVALIDATE => this.invalidation.collect(),
            // Fails if it is queued already, which is as good.
            abi::QUEUE_EVENT => {
                let _ = ModuleQueue::Faults
                    .get()
                    .map(|queue| queue.enqueue::<_, 0>(this.clone()));
            }
            queue => {
                match (
                    this.rings.get((queue - abi::QUEUE_FIRST_RING) as usize),
                    &this.copy,
                ) {
                    (Some(ring), _) => ring.interrupt(),
                    (None, Some(copy)) => copy.ring().collect(),
                    (None, None) => {}
                }
            }
        }
    }

    fn remove(this: Arc<Self>) {
        let node = this.node.lock().take();
        drop(node);
        let nodes = core::mem::replace(&mut *this.dmirror.lock(), KVec::new());
        drop(nodes);
        let debug = this.debug.lock().take();
        drop(debug);
        // What it has queued is waited for below.
        let shrinker = this.shrinker.lock().take();
        drop(shrinker);
        // As long as the device can still copy.
        Residency::evacuate(&this);
        // If it was lost: it has been reset after this, or is after the next.
        ModuleQueue::Loss.flush();
        this.stop();
        ModuleQueue::Loss.flush();
        // Whoever is pinning a page is done after this, and whoever comes later finds the device lost. Twice, for
        // events queue the handling of faults. And what CPUs had in the aperture of a lost device has been taken away.
        ModuleQueue::Faults.flush();
        ModuleQueue::Faults.flush();
        Residency::evict_all(&this);
        this.memory.handler().set_gpu(None);
    }
}
