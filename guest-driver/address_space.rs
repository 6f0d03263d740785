// SPDX-License-Identifier: GPL-2.0-only

//! The address space of an open file: what the GPU maps of a process's memory.
//!
//! An address space is bound to the mm of the opener. It is divided into windows of 2 MiB, which come into
//! being when the GPU first touches them; each has a notifier, so that changes elsewhere cost nothing.
//!
//! Faults of the GPU are taken as they have come, several at a time, and sorted: what is needed of one window is mapped with one
//! request, which lets all go on that it is good for. A fault ends with a mapping (`resolve`) or, if the
//! process could not have made the access either, with the work being cancelled. What is mapped depends on the
//! access, and on what the program has said about that memory ([`crate::advice`]):
//!
//! - READ, WRITE: the page is *mirrored*: the CPU keeps its mapping, and a change of that is followed. Or it is moved to
//!   VRAM, with all there is in its window, if that is where it had better be.
//! - ATOMIC: the page is *pinned*: the CPU's mapping goes, and an access by the CPU brings the page home. Or it is moved to
//!   VRAM, or made exclusive to the GPU in the way that the kernel has for it. In VRAM that the CPU sees, the two share it. The `UNPROTECTED` mode does neither and loses updates; it exists to show that.

pub(crate) mod explicit;
mod observation;

pub(crate) use self::observation::Observation;

use crate::{
    abi,
    advice::{Advice, Atomics, Location, Policy},
    copy::{Location as Place, Transfers},
    fence::Progress,
    gpu::{Gpu, MAX_REPLAYS},
    hmm::{
        blocks::{BLOCK_ORDER, BLOCK_PAGES},
        exclusive::ExclusivePage,
        memory::{self, Data, DevicePage, Kind, NewDevicePage},
        migrate::{self, Outcome, Purpose, Source, Unmapped, What},
        notifier::{IntervalNotifier, Owner, Sequence},
        page::Pfn,
        range::{read_page, read_range, Found, Wanted},
    },
    residency::{Mapped, Residency, Trouble, Which},
    submission::Submissions,
    sync::ModuleQueue,
    trace, uapi,
    window::{Window, PAGE_SIZE, WINDOW_SIZE},
};
use core::ops::Range;
use kernel::{
    impl_has_work,
    mm::{Mm, MmWithUser},
    new_mutex, new_spinlock, new_work,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    sync::{
        aref::ARef,
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        Arc, Mutex, SpinLock,
    },
    time::{delay::fsleep, Delta, Instant, Monotonic},
    workqueue::{Work, WorkItem},
};

/// Most windows of an address space (128 GiB of memory in use by the GPU): a bound on kernel memory.
const MAX_WINDOWS: usize = 65536;
/// Most faults that can be waiting to be handled: a ring has at most one.
const MAX_FAULTS: usize = 2 * abi::MAX_RINGS as usize;
/// How often a fault is tried to be resolved while others are in the way. Attempts get rarer, up to one in a
/// millisecond, so that this is about a second.
const ATTEMPTS: u32 = 1000;
/// How often while there is no room.
const ROOM_ATTEMPTS: u32 = 64;

/// Counters of an address space, since it was opened.
pub(crate) struct Statistics {
    /// Faults of the GPU that were handled.
    pub(crate) faults: Atomic<i64>,
    /// Pages that were pinned.
    pub(crate) pins: Atomic<i64>,
    /// Pinned pages that came home.
    pub(crate) unpins: Atomic<i64>,
    /// Pages that were mirrored.
    pub(crate) mirrors: Atomic<i64>,
    /// INVALIDATEs on behalf of the CPU's side.
    pub(crate) invalidations: Atomic<i64>,
    /// Pages that were made exclusive to the GPU.
    pub(crate) exclusives: Atomic<i64>,
    /// Pages that were moved to VRAM.
    pub(crate) to_vram: Atomic<i64>,
    /// Pages that came home from VRAM.
    pub(crate) from_vram: Atomic<i64>,
    /// Those of them that had to make room for others.
    pub(crate) evictions: Atomic<i64>,
}

impl Statistics {
    /// All zero.
    pub(crate) fn new() -> Self {
        Self {
            faults: Atomic::new(0),
            pins: Atomic::new(0),
            unpins: Atomic::new(0),
            mirrors: Atomic::new(0),
            invalidations: Atomic::new(0),
            exclusives: Atomic::new(0),
            to_vram: Atomic::new(0),
            from_vram: Atomic::new(0),
            evictions: Atomic::new(0),
        }
    }
}

/// Faults that are handled together.
type Batch = KVec<abi::EventRecord>;

/// A page as [`AddressSpace::query`] found it.
pub(crate) struct Resident {
    /// `uapi::PAGE_*`.
    pub(crate) state: u32,
    /// What the GPU may do: bits of a page table entry.
    pub(crate) rights: u8,
    /// Bytes of the page of the GPU that it is part of; 0 if it maps nothing.
    pub(crate) size: usize,
    /// The frame of a page that is pinned.
    pub(crate) pfn: Option<Pfn>,
}

/// The address space of an open file.
#[pin_data]
pub(crate) struct AddressSpace {
    gpu: Arc<Gpu>,
    context: u32,
    mm: ARef<Mm>,
    #[pin]
    windows: Mutex<Windows>,
    #[pin]
    advice: Advice,
    /// Faults that wait to be handled.
    #[pin]
    faults: SpinLock<KVec<abi::EventRecord>>,
    #[pin]
    work: Work<Self>,
    /// No faults are to be handled any more.
    closing: Atomic<bool>,
    /// Held while faults are handled: these.
    #[pin]
    handling: Mutex<Batch>,
    /// The device has ended the context: it accesses nothing of it any more.
    ended: Atomic<bool>,
    /// Nothing is left to be done for closing.
    closed: Atomic<bool>,
    /// Why no fault can be handled any more: an errno, or 0. The context is in error, or about to be.
    doomed: Atomic<i32>,
    /// What is known of accesses to come, and wanted to be known of their faults.
    #[pin]
    observation: Observation,
    /// The next allocation of memory for a page that moves is to fail.
    failing: Atomic<bool>,
    /// Its work.
    submissions: Arc<Submissions>,
    statistics: Arc<Statistics>,
}

struct Windows {
    tree: RBTree<usize, Arc<IntervalNotifier<Window>>>,
    count: usize,
}

impl_has_work! {
    impl HasWork<Self> for AddressSpace { self.work }
}

impl WorkItem for AddressSpace {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while this.handle_faults() {}
        this.finish_closing();
    }
}

impl AddressSpace {
    /// Opens an address space on `gpu` for the process with `mm`.
    pub(crate) fn open(
        gpu: &Arc<Gpu>,
        mm: &Mm,
        statistics: Arc<Statistics>,
        progress: &Arc<Progress>,
    ) -> Result<Arc<Self>> {
        let context = gpu.create_context()?;
        let this = Self::new(gpu, mm, context, statistics, progress);
        match &this {
            Ok(space) => gpu.publish(context, space.clone()),
            Err(_) => {
                gpu.destroy_context(context);
                gpu.forget_context(context);
            }
        }
        this
    }

    fn new(
        gpu: &Arc<Gpu>,
        mm: &Mm,
        context: u32,
        statistics: Arc<Statistics>,
        progress: &Arc<Progress>,
    ) -> Result<Arc<Self>> {
        let submissions = Submissions::new(gpu, context, progress)?;
        let faults = KVec::with_capacity(MAX_FAULTS, GFP_KERNEL)?;
        let batch = KVec::with_capacity(MAX_FAULTS, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                gpu: gpu.clone(),
                context,
                mm: mm.into(),
                windows <- new_mutex!(Windows { tree: RBTree::new(), count: 0 }, "AddressSpace::windows"),
                advice <- Advice::new(),
                faults <- new_spinlock!(faults, "AddressSpace::faults"),
                work <- new_work!("AddressSpace::work"),
                closing: Atomic::new(false),
                ended: Atomic::new(false),
                handling <- new_mutex!(batch, "AddressSpace::handling"),
                closed: Atomic::new(false),
                doomed: Atomic::new(0),
                observation <- Observation::new(),
                failing: Atomic::new(false),
                submissions,
                statistics,
            }),
            GFP_KERNEL,
        )
    }

    /// Closes it: the GPU forgets it, and its pinned pages go home.
    pub(crate) fn close(&self) {
        self.closing.store(true, Release);
        // Ends the work, and with it whatever a ring is stalled on, even if a fault of ours takes its time. The
        // context stays known until the end, so that a CPU fault meanwhile revokes its mapping.
        self.gpu.destroy_context(self.context);
        // Before the look whether somebody handles a fault, who looks at this afterwards.
        self.ended.xchg(true, Full);
        self.submissions.close();
        self.finish_closing();
    }

    /// Does what is left to be done for closing, once the device has ended the context (until then its notifiers are needed)
    /// and no fault is being handled. Whoever handles one when the file is
    /// closed does this afterwards: that can be held up for as long as somebody (userfaultfd) likes who waits in turn for the
    /// one who closes.
    fn finish_closing(&self) {
        if !self.ended.load(Acquire) {
            return;
        }
        let Some(handling) = self.handling.try_lock() else {
            return;
        };
        if self.closed.load(Relaxed) {
            return;
        }
        self.closed.store(true, Relaxed);
        Residency::release(&self.gpu, self);
        drop(handling);
        let windows = core::mem::replace(&mut self.windows.lock().tree, RBTree::new());
        drop(windows);
        self.gpu.forget_context(self.context);
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Acquire)
    }

    /// Its work: how it is submitted, and waited for.
    pub(crate) fn submissions(&self) -> &Arc<Submissions> {
        &self.submissions
    }

    /// The counters.
    pub(crate) fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }

    /// Takes note of a fault of the GPU. From the event queue.
    pub(crate) fn fault(self: Arc<Self>, event: &abi::EventRecord) {
        if self.faults.lock().push_within_capacity(*event).is_err() {
            // The device has more faults outstanding than it has rings.
            dev_err!(
                self.gpu.device(),
                "context {}: too many faults outstanding\n",
                self.context
            );
            return;
        }
        // Fails if it is queued already, which is as good.
        let _ = ModuleQueue::Faults.get().map(|queue| queue.enqueue(self));
    }

    /// The window over `va`, made if need be. The process must have mapped something there.
    fn window(&self, mm: &MmWithUser, va: usize) -> Result<Arc<IntervalNotifier<Window>>> {
        let base = va & !(WINDOW_SIZE - 1);
        if let Some(window) = self.find(base) {
            return Ok(window);
        }
        mm.mmap_read_lock()
            .vma_lookup(va)
            .filter(|vma| vma.start() <= va)
            .ok_or(EFAULT)?;
        // What becomes of coherent pages has to be heard, whoever does it.
        let ours = [self.actor(), self.private()];
        let window = Window::new(&self.gpu, self.context, base, ours, &self.statistics);
        let window = IntervalNotifier::new(mm, base..base + WINDOW_SIZE, window)?;
        let node = RBTreeNode::new(base, window.clone(), GFP_KERNEL)?;
        let mut windows = self.windows.lock();
        // Somebody else may have been faster; then this one is dropped, outside the lock.
        if let Some(other) = windows.tree.get(&base).cloned() {
            drop(windows);
            drop(node);
            return Ok(other);
        }
        if windows.count == MAX_WINDOWS {
            drop(windows);
            drop(node);
            return Err(ENOMEM);
        }
        windows.count += 1;
        windows.tree.insert(node);
        Ok(window)
    }

    fn find(&self, base: usize) -> Option<Arc<IntervalNotifier<Window>>> {
        self.windows.lock().tree.get(&base).cloned()
    }

    /// As whom this address space migrates: itself, for what another one has of the same process must go.
    fn actor(&self) -> Owner {
        Owner::of(Arc::as_ptr(&self.statistics))
    }

    /// The owner of the device-private pages of this GPU.
    fn private(&self) -> Owner {
        self.gpu.memory().private_owner()
    }

    /// Takes what is in `range` away from the GPU.
    pub(crate) fn revoke(&self, range: Range<usize>) {
        let mut base = range.start & !(WINDOW_SIZE - 1);
        while let Some((next, window)) = self.find_from(base, range.end) {
            window.revoke().take_back(range.clone());
            base = next + WINDOW_SIZE;
        }
    }

    /// Brings home those pages in `range`, if the process is still there. With `wait`, waits for its mmap_lock. Returns how many
    /// pages have come home.
    pub(crate) fn home(&self, range: Range<usize>, which: Which, wait: bool) -> Result<usize, Trouble> {
        let mm = self.mm.mmget_not_zero().ok_or(Trouble::Busy)?;
        Residency::home(self.gpu.memory(), &mm, range, which, wait)
    }

    /// The GPU that it is on.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Its context on the device.
    pub(crate) fn context(&self) -> u32 {
        self.context
    }

    /// Handles the faults that have come. Says whether there were any.
    fn handle_faults(&self) -> bool {
        let mut batch = self.handling.lock();
        {
            let mut faults = self.faults.lock();
            while let Some(fault) = faults.pop() {
                if batch.push_within_capacity(fault).is_err() {
                    break;
                }
            }
        }
        if batch.is_empty() {
            return false;
        }
        self.statistics.faults.add(batch.len() as i64, Relaxed);
        for fault in batch.iter() {
            self.observation.count(fault);
            trace::fault(
                self.gpu.number(),
                self.context,
                fault.ring.into(),
                fault.va,
                fault.length,
                fault.access.into(),
                fault.reason.into(),
            );
        }
        sort(&mut batch);
        while !batch.is_empty() {
            if self.is_closing() {
                batch.clear();
                return false;
            }
            self.handle(&mut batch);
        }
        true
    }

    /// Handles the first fault of the batch, and takes it out, with others that go with it.
    fn handle(&self, batch: &mut Batch) {
        let Some(fault) = batch.first().copied() else {
            return;
        };
        if let Some(rest) = self.observation.ahead(&fault) {
            self.map_ahead(&fault, rest);
        }
        let Err(error) = self.persist(batch, fault.fault) else {
            return;
        };
        batch.retain(|other| other.fault != fault.fault);
        // Cancelling puts the context into error. If that fault is gone (a REPLAY has gone before), the access
        // has stalled on another one, which must not be resolved only to fail in the same way.
        self.doomed.store(error.to_errno(), Relaxed);
        let status = match error {
            _ if error == EBUSY || error == EOPNOTSUPP || error == ENOSPC => uapi::STATUS_NOT_EXCLUSIVE,
            _ if error == ENOMEM => uapi::STATUS_NO_MEMORY,
            _ => uapi::STATUS_FAULT,
        };
        self.submissions.set_cancelled(status);
        // Fails if the device is lost, which ends the work as well.
        let _ = self.gpu.cancel(self.context, fault.fault);
    }

    /// Tries to resolve the first fault of the batch until nobody gets in the way.
    fn persist(&self, batch: &mut Batch, fault: u64) -> Result {
        let doomed = self.doomed.load(Relaxed);
        if doomed != 0 {
            return Err(Error::from_errno(doomed));
        }
        let mut outcome = Err(EAGAIN);
        let begin = Instant::<Monotonic>::now();
        for attempt in 0..ATTEMPTS {
            if self.is_closing() {
                return Err(ESRCH);
            }
            outcome = self.resolve(batch);
            match outcome {
                // Resolved with what was mapped for it, though not all of that came to pass.
                _ if !batch.iter().any(|other| other.fault == fault) => return Ok(()),
                Err(error) if error == EAGAIN || error == EBUSY => pause(attempt, begin),
                // Others have been quicker to pin, or those that are to go home could not.
                Err(error) if error == ENOSPC && attempt < ROOM_ATTEMPTS => pause(attempt, begin),
                _ => break,
            }
        }
        outcome
    }

    /// What the GPU needs for the first fault of the batch, and for others that continue it: a part of one window.
    fn extent(batch: &Batch) -> Range<usize> {
        let Some(first) = batch.first() else { return 0..0 };
        let start = first.va as usize & !(PAGE_SIZE - 1);
        let limit = (start & !(WINDOW_SIZE - 1)) + WINDOW_SIZE;
        let end_of = |fault: &abi::EventRecord| {
            let end = fault.va.saturating_add(fault.length.max(1)).min(limit as u64) as usize;
            end.next_multiple_of(PAGE_SIZE)
        };
        let mut end = end_of(first);
        for fault in &batch[1..] {
            if fault.access != first.access || fault.va as usize > end || end == limit {
                break;
            }
            end = end.max(end_of(fault));
        }
        start..end
    }

    /// Tries once to give the GPU the accesses that it has faulted on, and lets it go on. Faults that have been replayed are
    /// taken out of the batch; the first one is among them if this succeeds.
    ///
    /// # Errors
    ///
    /// EAGAIN, EBUSY: something has come in between. EOPNOTSUPP: the page cannot be pinned. ENOSPC: too many
    /// are. Others: the process could not make that access either.
    fn resolve(&self, batch: &mut Batch) -> Result {
        if self.gpu.is_lost() {
            return Err(ENODEV);
        }
        let fault = *batch.first().ok_or(EINVAL)?;
        if fault.va >= abi::VA_END {
            return Err(EFAULT);
        }
        let wanted = Self::extent(batch);
        let va = wanted.start;
        let (policy, alike) = self.advice.get(va);
        let wanted = va..wanted.end.min(alike.end);
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let window = self.window(&mm, va)?;
        let atomic = fault.access & abi::ACCESS_ATOMIC != 0;
        let must = atomic && policy.atomics == Atomics::Migrate;
        let vram = match policy.atomics {
            Atomics::Auto => self.kind_for(policy.location),
            _ if !atomic => self.kind_for(policy.location),
            Atomics::Migrate => self
                .kind_for(policy.location)
                .or_else(|| self.kind_for(Location::Vram)),
            _ => None,
        };
        let vram = match vram {
            Some(kind) if self.is_at_home(&mm, &window, va)? => Some(kind),
            _ => None,
        };
        if let Some(kind) = vram {
            let base = va & !(WINDOW_SIZE - 1);
            let around = base.max(alike.start)..(base + WINDOW_SIZE).min(alike.end);
            let mut result = self.to_vram(&mm, &window, kind, around.clone(), wanted.clone(), batch);
            if result == Err(EBUSY) && !must && batch.iter().any(|other| other.fault == fault.fault) {
                // Whether it worked shows in what comes next.
                let _ = self.bring_near(&mm, &window, wanted.clone());
                result = self.to_vram(&mm, &window, kind, around, wanted.clone(), batch);
            }
            match result {
                Ok(()) | Err(EAGAIN) => return result,
                // What cannot get there stays where it is.
                Err(_) if !batch.iter().any(|other| other.fault == fault.fault) => return Ok(()),
                Err(_) if !must => {}
                Err(EINVAL) => return Err(EOPNOTSUPP),
                Err(EBUSY) => {
                    // It may be swapped out, or on its way.
                    read_page(&mut window.begin(), &mm, va, Wanted::Write, None)?;
                    return Err(EAGAIN);
                }
                Err(error) => return Err(error),
            }
        }
        if atomic && matches!(policy.atomics, Atomics::Auto | Atomics::Pin) {
            let pins = self.gpu.pins();
            let pages = wanted.len().div_ceil(PAGE_SIZE);
            // What is pinned already, and only has to be mapped again, needs no room.
            if !pins.has_room(pages) && self.is_at_home(&mm, &window, va)? {
                // With no lock held.
                pins.make_room(&self.gpu, pages);
            }
        }
        self.map_where_it_is(&mm, &window, wanted, policy, batch)
    }

    /// Brings the pages of `range`, which is a part of one window, to where they can be moved from: they may be swapped out, or in
    /// the VRAM of another GPU.
    fn bring_near(&self, mm: &MmWithUser, window: &IntervalNotifier<Window>, range: Range<usize>) -> Result {
        let owner = Some(self.private());
        read_range(&mut window.begin(), mm, range, Wanted::Read, owner).map(drop)
    }

    /// Which part of VRAM pages are moved to that had better be there, if there is such a part. What is said to be in VRAM, and no
    /// more, is out of the CPU's sight, unless the CPU sees all of it.
    fn kind_for(&self, location: Location) -> Option<Kind> {
        let memory = self.gpu.memory();
        let has = |kind: &Kind| memory.usage(*kind).total > 0;
        match location {
            Location::Anywhere | Location::System => None,
            Location::Vram => Kind::ALL.into_iter().find(has),
            Location::Aperture => Some(Kind::Coherent).filter(has),
        }
    }

    /// Whether the page at `va` is the system's, or nowhere.
    fn is_at_home(&self, mm: &MmWithUser, window: &IntervalNotifier<Window>, va: usize) -> Result<bool> {
        let owner = Some(self.private());
        Ok(
            match read_page(&mut window.begin(), mm, va, Wanted::Nothing, owner)? {
                Found::Device { .. } => false,
                Found::Coherent { page, .. } => self.gpu.memory().kind(page).is_none(),
                Found::Nothing | Found::System { .. } => true,
            },
        )
    }

    /// Maps what is in `range`, which is a part of one window, without moving it. An error means that the first page could not
    /// be mapped; what is behind it need not be.
    fn map_where_it_is(
        &self,
        mm: &MmWithUser,
        window: &IntervalNotifier<Window>,
        range: Range<usize>,
        policy: Policy,
        batch: &mut Batch,
    ) -> Result {
        let memory = self.gpu.memory();
        let fault = *batch.first().ok_or(EINVAL)?;
        let va = range.start;
        let atomic = fault.access & abi::ACCESS_ATOMIC != 0;
        let write = fault.access & (abi::ACCESS_WRITE | abi::ACCESS_ATOMIC) != 0;
        let wanted = if write { Wanted::Write } else { Wanted::Read };
        let owner = Some(self.private());
        let mut sequence = window.begin();
        let mut range = range;
        let mut pages = match read_range(&mut sequence, mm, range.clone(), wanted, owner) {
            // Perhaps not the first.
            Err(error) if error != EAGAIN && range.len() > PAGE_SIZE => {
                range.end = va + PAGE_SIZE;
                sequence = window.begin();
                read_range(&mut sequence, mm, range.clone(), wanted, owner)?
            }
            other => other?,
        };
        // What a program says about its memory is a revocation too, which comes after what it has said can be read here. Without
        // this, one that came before the sequence began would be missed, and the GPU given what it must not have any more.
        let (current, alike) = self.advice.get(va);
        if current != policy || alike.end < range.end {
            return Err(EAGAIN);
        }
        let exclusive = match policy.atomics {
            Atomics::Unprotected => false,
            _ => atomic,
        };
        match pages.get(0) {
            Found::Nothing => return Err(EFAULT),
            Found::System { pfn, .. } if exclusive => {
                if !migrate::is_anonymous(pfn) {
                    return Err(EOPNOTSUPP);
                }
                if policy.atomics == Atomics::Exclusive {
                    return self.make_exclusive(mm, sequence, va, batch);
                }
                return self.pin(mm, sequence, range, policy, batch);
            }
            // Have it home first if another address space has it, for only one can; and if it may not be
            // written as it is (after fork, or mprotect), which is for the CPU's fault handler to mend.
            // (`hmm_range_fault` returns device-private pages of ours even so.)
            Found::Device { page, writable, .. } => {
                let (_, mapped) = memory.get(page).ok_or(EAGAIN)?;
                if mapped.context != self.context || (write && !writable) {
                    if read_range(&mut sequence, mm, range, wanted, None).is_err() {
                        read_page(&mut sequence, mm, va, wanted, None)?;
                    }
                    return Err(EAGAIN);
                }
            }
            // Its operations are atomic there for the CPU as well. In another GPU's memory they are not.
            Found::Coherent { page, .. } if exclusive && memory.kind(page).is_none() => {
                return Err(EOPNOTSUPP);
            }
            Found::System { .. } | Found::Coherent { .. } => {}
        }
        let base = va & !(WINDOW_SIZE - 1);
        let is_alike = alike.start <= base && base + WINDOW_SIZE <= alike.end;
        if pages.is_huge(0) && range.len() < WINDOW_SIZE && is_alike {
            // What is mapped as one on that side can be on this one, and costs no more.
            range = base..base + WINDOW_SIZE;
            pages = read_range(&mut sequence, mm, range.clone(), Wanted::Nothing, owner)?;
        }
        let mut entries = KVec::from_elem(0, pages.len(), GFP_KERNEL)?;
        let mut guard = sequence.commit().map_err(|_| EAGAIN)?;
        for (index, entry) in entries.iter_mut().enumerate() {
            let va = range.start + index * PAGE_SIZE;
            let found = match pages.get(index) {
                // To us, the memory of another GPU is like the system's.
                Found::Coherent { page, writable } if memory.kind(page).is_none() => Found::System {
                    pfn: page.pfn(),
                    writable,
                },
                other => other,
            };
            *entry = match found {
                Found::System { pfn, writable, .. } if !exclusive && (writable || !write) => {
                    let mut rights = u64::from(guard.rights(va)) | abi::PTE_READ;
                    if write {
                        rights |= abi::PTE_WRITE;
                        pfn.mark_dirty();
                    }
                    if atomic {
                        // Only here does the GPU get ATOMIC without having the page to itself.
                        rights |= abi::PTE_ATOMIC;
                    }
                    pfn.address() | rights | abi::PTE_VALID
                }
                Found::Coherent { page, writable } | Found::Device { page, writable, .. }
                    if writable || !write =>
                {
                    match self.device_entry(page, writable, va) {
                        Some(entry) => entry,
                        None => continue,
                    }
                }
                _ => continue,
            };
        }
        if entries[(va - range.start) / PAGE_SIZE] == 0 {
            return Err(EAGAIN);
        }
        let mirrored =
            |(index, entry): (usize, &u64)| *entry != 0 && matches!(pages.get(index), Found::System { .. });
        let count = entries.iter().enumerate().filter(|page| mirrored(*page)).count();
        self.statistics.mirrors.add(count as i64, Relaxed);
        map_and_replay(&mut guard, range.start, &entries, batch)
    }

    /// The entry for a page of this GPU, which is at `va` from now on; none if it has begun to go home, or if it is
    /// device-private and another address space's. The window is locked.
    fn device_entry(&self, page: DevicePage, writable: bool, va: usize) -> Option<u64> {
        let memory = self.gpu.memory();
        let mine = Mapped {
            context: self.context,
            va,
        };
        let (place, _) = memory.get(page)?;
        let coherent = memory.kind(page) == Some(Kind::Coherent);
        // Another migration home, of which the window knows nothing, may have come first.
        let current = |mapped: &Mapped| coherent || mapped.context == self.context;
        if !memory.update(page, place, current, mine) {
            return None;
        }
        if coherent && writable {
            page.pfn().mark_dirty();
        }
        Some(place_entry(place)? | rights_of(writable) | abi::PTE_VALID)
    }

    /// Makes the page at `va` exclusive to the GPU, and gives it to it. The replay is waited for before anybody can undo that.
    fn make_exclusive(
        &self,
        mm: &MmWithUser,
        sequence: Sequence<'_, Window>,
        va: usize,
        batch: &mut Batch,
    ) -> Result {
        let mmap = mm.mmap_read_lock();
        let page = ExclusivePage::new(&mmap, mm, va, self.actor())?;
        let mut guard = sequence.commit().map_err(|_| EAGAIN)?;
        page.pfn().mark_dirty();
        self.statistics.exclusives.add(1, Relaxed);
        let entry = page.pfn().address() | rights_of(true) | abi::PTE_VALID;
        let result = map_and_replay(&mut guard, va, &[entry], batch);
        guard.set_exclusive(va);
        result
    }

    /// Pins the pages in `range` in place, as far as that can be done, and gives them to the GPU.
    ///
    /// The replay is waited for before the migration is finished: until then a CPU access waits, so that the
    /// GPU gets at least the access done for which it has asked.
    ///
    /// Migrations home that were under way when the sequence began are over once the pages are unmapped and locked: they do not count.
    /// Else the page would be handed over for nothing, and the CPU have to bring it home for nothing, which can repeat itself.
    fn pin(
        &self,
        mm: &MmWithUser,
        mut sequence: Sequence<'_, Window>,
        range: Range<usize>,
        policy: Policy,
        batch: &mut Batch,
    ) -> Result {
        let memory = self.gpu.memory();
        let mut entries = KVec::from_elem(0, range.len() / PAGE_SIZE, GFP_KERNEL)?;
        let mmap = mm.mmap_read_lock();
        let mut unmapped = migrate::setup_range(&mmap, range.clone(), self.actor(), Purpose::Pin)?;
        if unmapped.get(0).is_none() {
            return Err(EBUSY);
        }
        sequence.forget_revocations();
        // What a program says about its memory is a revocation too, which comes after what it has said can be read here.
        let (current, alike) = self.advice.get(range.start);
        if current != policy || alike.end < range.end {
            return Err(EAGAIN);
        }
        for index in 0..unmapped.len() {
            if unmapped.get(index).is_none() {
                continue;
            }
            match self.gpu.pins().allocate() {
                Ok(stand_in) => unmapped.send_away(index, stand_in),
                Err(error) if index == 0 => return Err(error),
                Err(_) => break,
            }
        }
        let mut count = 0;
        let moved = unmapped.advance(|index, outcome| {
            if let Outcome::Pinned(page, pinned) = outcome {
                let rights = abi::PTE_READ | abi::PTE_WRITE | abi::PTE_ATOMIC;
                entries[index] = pinned.pfn().address() | rights | abi::PTE_VALID;
                let mine = Mapped {
                    context: self.context,
                    va: range.start + index * PAGE_SIZE,
                };
                memory.set(page, Data::Pinned(pinned), mine);
                count += 1;
            }
        });
        self.statistics.pins.add(count, Relaxed);
        trace::pin(self.gpu.number(), self.context, range.start as u64, count as u64);
        let result = if entries[0] == 0 {
            Err(EBUSY)
        } else {
            match sequence.commit() {
                Ok(mut guard) => map_and_replay(&mut guard, range.start, &entries, batch),
                // They are pinned all the same; the next attempt finds them so.
                Err(_) => Err(EAGAIN),
            }
        };
        moved.finish();
        result
    }

    /// Moves the pages in `range`, which is a part of one window, to VRAM of that kind, and gives them to the GPU. Where there is nothing yet
    /// something comes into being only if it is in `wanted` (or would be part of the same huge page).
    ///
    /// The replay is waited for before the migration is finished, as in [`Self::pin`].
    ///
    /// # Errors
    ///
    /// EBUSY, ENOSPC, EINVAL: nothing could be moved, or not what the first fault is about.
    fn to_vram(
        &self,
        mm: &MmWithUser,
        window: &IntervalNotifier<Window>,
        kind: Kind,
        range: Range<usize>,
        wanted: Range<usize>,
        batch: &mut Batch,
    ) -> Result {
        // With no lock held.
        Residency::make_room(&self.gpu, kind, range.len() / PAGE_SIZE);
        let memory = self.gpu.memory();
        let mut sequence = window.begin();
        let mmap = mm.mmap_read_lock();
        let mut range = range;
        if let Some(vma) = mmap
            .vma_lookup(wanted.start)
            .filter(|vma| vma.start() <= wanted.start)
        {
            range.start = range.start.max(vma.start());
        }
        let mut unmapped = migrate::setup_range(&mmap, range.clone(), self.actor(), Purpose::Move)?;
        // Our own migration is not reported to us. The GPU must not write to what is about to be copied.
        window.revoke_within(&mut sequence).take_back(range.clone());
        let mut plan = Plan::new(unmapped.len())?;
        plan.failing = self.take_failure();
        let page = |va: usize| va.saturating_sub(range.start) / PAGE_SIZE;
        plan.fill(memory, kind, &mut unmapped, page(wanted.start)..page(wanted.end))?;
        if plan.count == 0 {
            // EBUSY if there is nothing that could be moved.
            return Err(unmapped.sources().next().map_or(EBUSY, |_| ENOSPC));
        }
        self.gpu.transfer(&plan.transfers)?;
        let mut entries = KVec::from_elem(0, unmapped.len(), GFP_KERNEL)?;
        let mut count = 0;
        let moved = unmapped.advance(|index, outcome| {
            if let Outcome::Away(page, order) = outcome {
                let pages = memory.following(page, 1 << order);
                for (index, page) in (index..).zip(pages) {
                    let mine = Mapped {
                        context: self.context,
                        va: range.start + index * PAGE_SIZE,
                    };
                    memory.set(page, Data::Device, mine);
                    entries[index] = plan.entries[index];
                    count += 1;
                }
            }
        });
        self.statistics.to_vram.add(count, Relaxed);
        trace::migrate(self.gpu.number(), self.context, range.start as u64, count as u64);
        let result = match sequence.commit() {
            Ok(mut guard) => map_and_replay(&mut guard, range.start, &entries, batch),
            // They are there all the same; the next attempt finds them so.
            Err(_) => Err(EAGAIN),
        };
        moved.finish();
        result?;
        match entries.get(page(wanted.start)) {
            Some(entry) if *entry != 0 => Ok(()),
            _ => Err(EBUSY),
        }
    }

    /// Sets how the GPU gets exclusive access to `range`, and takes back what it has there.
    pub(crate) fn advise(&self, range: Range<usize>, atomics: Atomics) -> Result {
        self.advice
            .change(range.clone(), |policy| policy.atomics = atomics)?;
        self.revoke(range);
        Ok(())
    }

    /// Sets where the pages of `range` had better be. What is there stays where it is until it is accessed.
    pub(crate) fn advise_location(&self, range: Range<usize>, location: Location) -> Result {
        self.advice
            .change(range.clone(), |policy| policy.location = location)?;
        self.revoke(range);
        Ok(())
    }

    /// Brings the pages of `range` to where they had better be, as far as that can be done.
    ///
    /// # Errors
    ///
    /// EINTR: a signal has come. EOPNOTSUPP: there is no VRAM. ENODEV: the device is lost.
    pub(crate) fn prefetch(&self, range: Range<usize>, location: Location) -> Result {
        let kind = self.kind_for(location);
        if kind.is_none() && location != Location::System {
            return Err(EOPNOTSUPP);
        }
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let mut start = range.start;
        while start < range.end {
            if kernel::current!().signal_pending() {
                return Err(EINTR);
            }
            if self.gpu.is_lost() {
                return Err(ENODEV);
            }
            let end = ((start & !(WINDOW_SIZE - 1)) + WINDOW_SIZE).min(range.end);
            let piece = start..end;
            start = end;
            if let Some(kind) = kind {
                if location == Location::Aperture {
                    // It does not help where it is, and there is no way from there but through here.
                    let _ = self.home(piece.clone(), Which::Only(Kind::Private), true);
                }
                let Ok(window) = self.window(&mm, piece.start) else {
                    continue;
                };
                for attempt in 0..PREFETCH_ATTEMPTS {
                    match self.to_vram(&mm, &window, kind, piece.clone(), piece.clone(), &mut KVec::new()) {
                        Err(EAGAIN) => {}
                        // What cannot even be read stays where it is.
                        Err(EBUSY) if attempt == 0 => {
                            let _ = self.bring_near(&mm, &window, piece.clone());
                        }
                        _ => break,
                    }
                }
            } else {
                if self.home(piece.clone(), Which::All, true) == Err(Trouble::NoMemory) {
                    return Err(ENOMEM);
                }
                if let Ok(window) = self.window(&mm, piece.start) {
                    // If something comes in between then the GPU asks for it.
                    let _ = self.mirror(&mm, &window, piece);
                }
            }
        }
        Ok(())
    }

    /// Maps what is in `range`, which is a part of one window, of the system's memory for the GPU, so that it need not ask for it.
    /// What cannot be had without waiting is left out.
    fn mirror(&self, mm: &MmWithUser, window: &IntervalNotifier<Window>, range: Range<usize>) -> Result {
        let mut sequence = window.begin();
        let pages = read_range(
            &mut sequence,
            mm,
            range.clone(),
            Wanted::Nothing,
            Some(self.private()),
        )?;
        let mut entries = KVec::from_elem(0, pages.len(), GFP_KERNEL)?;
        let mut guard = sequence.commit().map_err(|_| EAGAIN)?;
        let mut count = 0;
        for (index, entry) in entries.iter_mut().enumerate() {
            let Found::System { pfn, writable } = pages.get(index) else {
                continue;
            };
            let rights = u64::from(guard.rights(range.start + index * PAGE_SIZE));
            *entry = pfn.address() | rights | abi::PTE_READ | abi::PTE_VALID;
            // What belongs to a file is not to be written back for nothing.
            if writable && migrate::is_anonymous(pfn) {
                pfn.mark_dirty();
                *entry |= abi::PTE_WRITE;
            }
            count += 1;
        }
        if count == 0 {
            return Ok(());
        }
        self.statistics.mirrors.add(count, Relaxed);
        guard.map(range.start, &entries, &[])
    }

    /// Takes note that nobody needs what is in `range`: what is in VRAM, out of the CPU's sight, need not be copied when it
    /// leaves, unless the GPU gets to it before.
    ///
    /// Only where the process may write: what it shares with a child is not its own to drop.
    pub(crate) fn discard(&self, range: Range<usize>) -> Result {
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let memory = self.gpu.memory();
        let mut base = range.start & !(WINDOW_SIZE - 1);
        while let Some((next, window)) = self.find_from(base, range.end) {
            base = next + WINDOW_SIZE;
            if kernel::current!().signal_pending() {
                return Err(EINTR);
            }
            let piece = next.max(range.start)..base.min(range.end);
            for _ in 0..PREFETCH_ATTEMPTS {
                let mut sequence = window.begin();
                let owner = Some(self.private());
                let pages = match read_range(&mut sequence, &mm, piece.clone(), Wanted::Nothing, owner) {
                    Ok(pages) => pages,
                    Err(error) if error == EAGAIN => continue,
                    // Nothing that could be read is there.
                    Err(_) => break,
                };
                let in_vram = |index: usize| match pages.get(index) {
                    Found::Device { page, writable: true } => memory.kind(page).map(|_| page),
                    _ => None,
                };
                if (0..pages.len()).all(|index| in_vram(index).is_none()) {
                    break;
                }
                let Ok(mut guard) = sequence.commit() else {
                    continue;
                };
                // It has to ask before it writes there again.
                guard.take_back(piece.clone());
                for index in 0..pages.len() {
                    let mine = Mapped {
                        context: self.context,
                        va: piece.start + index * PAGE_SIZE,
                    };
                    if let Some(page) = in_vram(index) {
                        memory.discard(page, |mapped| *mapped == mine);
                    }
                }
                break;
            }
        }
        Ok(())
    }

    /// The first window at or above `base` that begins below `end`.
    fn find_from(&self, base: usize, end: usize) -> Option<(usize, Arc<IntervalNotifier<Window>>)> {
        let windows = self.windows.lock();
        let cursor = windows.tree.cursor_lower_bound(&base)?;
        let (key, window) = cursor.current();
        (*key < end).then(|| (*key, window.clone()))
    }

    /// Where the page at `va` is, and what the GPU may do.
    pub(crate) fn query(&self, va: usize) -> Result<Resident> {
        let nowhere = Resident {
            state: uapi::PAGE_CPU,
            rights: 0,
            size: 0,
            pfn: None,
        };
        let Some(window) = self.find(va & !(WINDOW_SIZE - 1)) else {
            // The GPU has never been here.
            return Ok(nowhere);
        };
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let mut wanted = Wanted::Nothing;
        for _ in 0..ATTEMPTS {
            if kernel::current!().signal_pending() {
                return Err(EINTR);
            }
            let mut sequence = window.begin();
            let memory = self.gpu.memory();
            let found = match read_page(&mut sequence, &mm, va, wanted, Some(self.private())) {
                Err(error) if error == EAGAIN => continue,
                Err(_) if wanted == Wanted::Read => {
                    wanted = Wanted::Nothing;
                    continue;
                }
                other => other?,
            };
            let Ok(guard) = sequence.commit() else {
                continue;
            };
            let rights = guard.rights(va);
            let size = match rights {
                0 => 0,
                _ if guard.is_large() => WINDOW_SIZE,
                _ => PAGE_SIZE,
            };
            let (state, pfn) = match found {
                Found::Device { page, .. } => match memory.get(page) {
                    Some((memory::Place::Pinned(pfn), _)) => (uapi::PAGE_PINNED, Some(pfn)),
                    Some((memory::Place::Device(_) | memory::Place::Lost, _)) => (uapi::PAGE_VRAM, None),
                    None => (uapi::PAGE_CPU, None),
                },
                Found::Coherent { page, .. } if memory.kind(page).is_some() => (uapi::PAGE_COHERENT, None),
                Found::System { .. } | Found::Coherent { .. } if rights != 0 => (uapi::PAGE_MIRRORED, None),
                // To look any closer would take it back.
                Found::Nothing if guard.is_exclusive(va) => (uapi::PAGE_EXCLUSIVE, None),
                Found::Nothing if rights != 0 => {
                    // On its way: the GPU has it already, or still, and a migration is not finished yet. To ask
                    // for read access is how to wait for that; it brings in nothing, as there is a page.
                    wanted = Wanted::Read;
                    continue;
                }
                _ => return Ok(nowhere),
            };
            return Ok(Resident {
                state,
                rights,
                size,
                pfn,
            });
        }
        Err(EAGAIN)
    }
}

/// How often a piece is tried to be prefetched.
const PREFETCH_ATTEMPTS: usize = 3;

/// Lets others go on after so many attempts in vain since `begin`: for longer each time, up to a millisecond, and not in step
/// with somebody who is in the same situation. Two GPUs that want the same page would otherwise take it from each other for
/// ever.
fn pause(attempt: u32, begin: Instant<Monotonic>) {
    let longest = 1i64 << attempt.min(10);
    // Half of it, and a part of the other half: the low bits of how long something took are as good as random ones for this.
    let jitter = begin.elapsed().as_nanos() % (longest * 500 + 1);
    fsleep(Delta::from_nanos(longest * 500 + jitter));
}

/// Sorts by address. (There are few; what `core` has for it is much code, and objtool does not like it.)
fn sort(batch: &mut [abi::EventRecord]) {
    for end in 1..batch.len() {
        let mut place = end;
        while place > 0 && batch[place - 1].va > batch[place].va {
            batch.swap(place - 1, place);
            place -= 1;
        }
    }
}

/// The rights of a page that the GPU has to itself.
fn rights_of(writable: bool) -> u64 {
    if writable {
        abi::PTE_READ | abi::PTE_WRITE | abi::PTE_ATOMIC
    } else {
        abi::PTE_READ
    }
}

/// Where a page table entry has to lead, if there is something.
fn place_entry(place: memory::Place) -> Option<u64> {
    match place {
        memory::Place::Device(offset) => Some(offset | abi::PTE_VRAM),
        memory::Place::Pinned(pfn) => Some(pfn.address()),
        memory::Place::Lost => None,
    }
}

/// Maps `entries` from `va` on, and lets those accesses of the batch go on which they are good for. Those are taken out of the
/// batch.
fn map_and_replay(window: &mut Window, va: usize, entries: &[u64], batch: &mut Batch) -> Result {
    let granted = |fault: &abi::EventRecord| {
        let page = (fault.va as usize & !(PAGE_SIZE - 1)).checked_sub(va)? / PAGE_SIZE;
        let entry = entries.get(page)?;
        // `ACCESS_*` are the bits of an entry, without VALID.
        let needed = u64::from(fault.access) << 1;
        // An access that is still to come has no fault to be replayed.
        let stalled = fault.fault != 0;
        (stalled && entry & abi::PTE_VALID != 0 && entry & needed == needed).then_some(fault.fault)
    };
    let mut faults = [0; MAX_REPLAYS];
    let mut count = 0;
    for (place, fault) in faults.iter_mut().zip(batch.iter().filter_map(granted)) {
        *place = fault;
        count += 1;
    }
    let faults = &faults[..count];
    window.map(va, entries, faults)?;
    batch.retain(|fault| !faults.contains(&fault.fault));
    Ok(())
}

/// What is to be moved to VRAM.
struct Plan {
    /// The page table entries that this will come to.
    entries: KVec<u64>,
    transfers: Transfers,
    /// How many pages.
    count: usize,
    /// The next allocation is to fail.
    failing: bool,
}

impl Plan {
    /// For a range of `count` pages.
    fn new(count: usize) -> Result<Self> {
        Ok(Self {
            entries: KVec::from_elem(0, count, GFP_KERNEL)?,
            transfers: Transfers::with_capacity(count)?,
            count: 0,
            failing: false,
        })
    }

    /// Takes a folio of VRAM.
    fn allocate(
        &mut self,
        memory: &memory::DeviceMemory<Residency>,
        kind: Kind,
        order: u32,
    ) -> Result<NewDevicePage> {
        if core::mem::take(&mut self.failing) {
            return Err(ENOSPC);
        }
        memory.allocate_device(kind, order)
    }

    /// Finds a place in VRAM for what is unmapped, as far as there is room.
    fn fill(
        &mut self,
        memory: &memory::DeviceMemory<Residency>,
        kind: Kind,
        unmapped: &mut Unmapped<'_>,
        wanted: Range<usize>,
    ) -> Result {
        for index in 0..unmapped.len() {
            let Some(source) = unmapped.get(index) else {
                continue;
            };
            let count = 1 << source.order;
            let is_wanted = index < wanted.end && wanted.start < index + count;
            match source.what {
                What::Device(_) => continue,
                What::Hole if !is_wanted => continue,
                _ => {}
            }
            if source.order > 0 {
                if let Ok(block) = self.allocate(memory, kind, BLOCK_ORDER) {
                    self.send(memory, unmapped, source, 0, block)?;
                    continue;
                }
            }
            if source.order > 0 && source.what == What::Hole {
                // In pieces, then; the kernel wants all of them or none.
                let mut pieces = KVec::with_capacity(BLOCK_PAGES, GFP_KERNEL)?;
                for _ in 0..BLOCK_PAGES {
                    let Ok(page) = self.allocate(memory, kind, 0) else {
                        break;
                    };
                    pieces.push(page, GFP_KERNEL)?;
                }
                if pieces.len() == BLOCK_PAGES {
                    for (piece, page) in pieces.into_iter().enumerate() {
                        self.send(memory, unmapped, source, piece, page)?;
                    }
                }
                continue;
            }
            for piece in 0..count {
                let Ok(page) = self.allocate(memory, kind, 0) else {
                    return Ok(());
                };
                self.send(memory, unmapped, source, piece, page)?;
            }
        }
        Ok(())
    }

    /// Sends the `piece`th page of the source, or all of it, to `page`.
    fn send(
        &mut self,
        memory: &memory::DeviceMemory<Residency>,
        unmapped: &mut Unmapped<'_>,
        source: Source,
        piece: usize,
        page: NewDevicePage,
    ) -> Result {
        let offset = memory.offset(page.name()).ok_or(EINVAL)?;
        let count = 1 << page.order();
        let length = (count * PAGE_SIZE) as u64;
        match source.what {
            What::System(pfn) => {
                let from = pfn.address() + (piece * PAGE_SIZE) as u64;
                self.transfers
                    .copy(Place::system(from), Place::vram(offset), length)?;
            }
            _ => self.transfers.clear(Place::vram(offset), length)?,
        }
        let first = source.index + piece;
        for index in 0..count {
            let address = offset + (index * PAGE_SIZE) as u64;
            let entry = address | abi::PTE_VRAM | abi::PTE_VALID | rights_of(source.writable);
            if let Some(place) = self.entries.get_mut(first + index) {
                *place = entry;
            }
        }
        self.count += count;
        unmapped.send_away(first, page);
        Ok(())
    }
}
