// SPDX-License-Identifier: GPL-2.0-only

//! The address space of an open file: what the GPU maps of a process's memory.
//!
//! An address space is bound to the mm of the opener. It is divided into ranges of 2 MiB, which come into
//! being when the GPU first touches them; each has a notifier, so that changes elsewhere cost nothing.
//!
//! A GPU fault ends with a mapping (`resolve`) or, if the process could not have made the access either, with
//! the work being cancelled. What is mapped depends on the access:
//!
//! - READ, WRITE: the page is *mirrored*: the CPU keeps its mapping, and a change of that is followed.
//! - ATOMIC: the page is *pinned*: the CPU's mapping goes, and an access by the CPU brings the page home. The
//!   `UNPROTECTED` mode does not do so and loses updates; it exists to show that.

use crate::{
    abi,
    fence::Progress,
    gpu::Gpu,
    hmm::{
        migrate,
        notifier::{Event, IntervalNotifier, Mirror, Owner, Sequence},
        page::Pfn,
        range::{read_page, Found, Wanted},
    },
    residency::{Mapped, Residency},
    submission::Submissions,
    sync::ModuleQueue,
    uapi,
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
        atomic::{Acquire, Atomic, Relaxed, Release},
        Arc, Mutex, SpinLock,
    },
    time::{delay::fsleep, Delta},
    workqueue::{Work, WorkItem},
};

/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;
/// Bytes of a range.
const RANGE_SIZE: usize = 2 << 20;
/// Pages of a range.
const RANGE_PAGES: usize = RANGE_SIZE / PAGE_SIZE;
/// Most ranges of an address space (128 GiB of memory in use by the GPU): a bound on kernel memory.
const MAX_RANGES: usize = 65536;
/// Most pieces of advice of an address space.
const MAX_ADVICE: usize = 1024;
/// Most faults that can be waiting to be handled: a ring has at most one.
const MAX_FAULTS: usize = 2 * abi::MAX_RINGS as usize;
/// Bytes of virtual address space that the GPU can reach.
const VA_END: usize = abi::VA_END as usize;
/// How often a fault is tried to be resolved while others are in the way. Attempts get rarer, up to one in a
/// millisecond, so that this is about a second.
const ATTEMPTS: u32 = 1000;

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
        }
    }
}

/// What the GPU maps of 2 MiB.
pub(crate) struct Window {
    gpu: Arc<Gpu>,
    context: u32,
    base: usize,
    /// Bits 1 to 3 of the page table entry (`abi::PTE_READ` and so on), or 0.
    rights: [u8; RANGE_PAGES],
    /// How many of them are not 0.
    mapped: usize,
    /// Migrations by these leave this mirror as it is: they see to it themselves.
    ours: [Owner; 2],
    statistics: Arc<Statistics>,
}

impl Mirror for Window {
    fn ignores(&self, event: &Event<'_>) -> bool {
        self.ours.iter().any(|owner| event.is_migration_by(*owner))
    }

    fn invalidate(&mut self, range: Range<usize>, may_wait: bool) -> bool {
        let Some(pages) = self.mapped_in(range) else {
            return true;
        };
        if !may_wait {
            return false;
        }
        self.statistics.invalidations.add(1, Relaxed);
        self.clear(pages);
        true
    }
}

impl Window {
    fn page(&self, va: usize) -> usize {
        (va - self.base) / PAGE_SIZE
    }

    /// The smallest run of pages that has in it everything that is mapped of `range`.
    fn mapped_in(&self, range: Range<usize>) -> Option<Range<usize>> {
        if self.mapped == 0 {
            return None;
        }
        let start = range.start.clamp(self.base, self.base + RANGE_SIZE);
        let end = range.end.clamp(self.base, self.base + RANGE_SIZE);
        let pages = self.page(start)..self.page(end.next_multiple_of(PAGE_SIZE));
        let rights = self.rights.get(pages.clone())?;
        let first = rights.iter().position(|rights| *rights != 0)?;
        let last = rights.iter().rposition(|rights| *rights != 0)?;
        Some(pages.start + first..pages.start + last + 1)
    }

    /// Has the GPU forget `pages`.
    fn clear(&mut self, pages: Range<usize>) {
        let va = |page| (self.base + page * PAGE_SIZE) as u64;
        self.gpu.invalidate(self.context, va(pages.start)..va(pages.end));
        for rights in &mut self.rights[pages] {
            self.mapped -= usize::from(*rights != 0);
            *rights = 0;
        }
    }

    /// Maps `pfn` at `va`, and lets the stalled access go on.
    fn map(&mut self, va: usize, pfn: Pfn, rights: u64, fault: u64) -> Result {
        let entry = pfn.address() | rights | abi::PTE_VALID;
        let page = self.page(va);
        // Noted first: whatever becomes of the request, an invalidation must not be left out.
        let old = core::mem::replace(&mut self.rights[page], rights as u8);
        self.mapped += usize::from(old == 0);
        self.gpu.map_and_replay(self.context, va as u64, entry, fault)
    }

    /// What the GPU may do at `va`.
    pub(crate) fn rights(&self, va: usize) -> u8 {
        self.rights[self.page(va)]
    }
}

/// How the GPU gets exclusive access to a range.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Atomics {
    /// By pinning in place.
    Pin,
    /// Not at all.
    Unprotected,
}

struct Advice {
    range: Range<usize>,
    atomics: Atomics,
}

/// The address space of an open file.
#[pin_data]
pub(crate) struct AddressSpace {
    gpu: Arc<Gpu>,
    context: u32,
    mm: ARef<Mm>,
    #[pin]
    windows: Mutex<Windows>,
    /// Sorted, not overlapping; what is not in it is the default.
    #[pin]
    advice: Mutex<KVec<Advice>>,
    /// Faults that wait to be handled.
    #[pin]
    faults: SpinLock<KVec<abi::EventRecord>>,
    #[pin]
    work: Work<Self>,
    /// No faults are to be handled any more.
    closing: Atomic<bool>,
    /// Held while a fault is handled.
    #[pin]
    handling: Mutex<()>,
    /// Why no fault can be handled any more: an errno, or 0. The context is in error, or about to be.
    doomed: Atomic<i32>,
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
        while let Some(fault) = this.next_fault() {
            let _handling = this.handling.lock();
            if this.is_closing() {
                return;
            }
            this.handle(&fault);
        }
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
        Arc::pin_init(
            pin_init!(Self {
                gpu: gpu.clone(),
                context,
                mm: mm.into(),
                windows <- new_mutex!(Windows { tree: RBTree::new(), count: 0 }, "AddressSpace::windows"),
                advice <- new_mutex!(KVec::new(), "AddressSpace::advice"),
                faults <- new_spinlock!(faults, "AddressSpace::faults"),
                work <- new_work!("AddressSpace::work"),
                closing: Atomic::new(false),
                handling <- new_mutex!((), "AddressSpace::handling"),
                doomed: Atomic::new(0),
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
        self.submissions.close();
        drop(self.handling.lock());
        Residency::release(&self.gpu, self);
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

    /// The fault to be handled next. (Not written in place: the lock must not be held while it is handled.)
    fn next_fault(&self) -> Option<abi::EventRecord> {
        self.faults.lock().pop()
    }

    /// The window over `va`, made if need be. The process must have mapped something there.
    fn window(&self, mm: &MmWithUser, va: usize) -> Result<Arc<IntervalNotifier<Window>>> {
        let base = va & !(RANGE_SIZE - 1);
        if let Some(window) = self.find(base) {
            return Ok(window);
        }
        mm.mmap_read_lock()
            .vma_lookup(va)
            .filter(|vma| vma.start() <= va)
            .ok_or(EFAULT)?;
        let window = Window {
            gpu: self.gpu.clone(),
            context: self.context,
            base,
            rights: [0; RANGE_PAGES],
            mapped: 0,
            ours: [self.actor(), self.gpu.memory().owner()],
            statistics: self.statistics.clone(),
        };
        let window = IntervalNotifier::new(mm, base..base + RANGE_SIZE, window)?;
        let node = RBTreeNode::new(base, window.clone(), GFP_KERNEL)?;
        let mut windows = self.windows.lock();
        // Somebody else may have been faster; then this one is dropped, outside the lock.
        if let Some(other) = windows.tree.get(&base).cloned() {
            drop(windows);
            drop(node);
            return Ok(other);
        }
        if windows.count == MAX_RANGES {
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

    /// Takes the page at `va` away from the GPU.
    pub(crate) fn revoke(&self, va: usize) {
        if let Some(window) = self.find(va & !(RANGE_SIZE - 1)) {
            let mut window = window.revoke();
            if window.rights(va) != 0 {
                let page = window.page(va);
                window.clear(page..page + 1);
            }
        }
    }

    /// Brings the page at `va` home by an access of the process, if it is pinned and the process is still there.
    pub(crate) fn recall(&self, va: usize) {
        let (Some(mm), Some(window)) = (self.mm.mmget_not_zero(), self.find(va & !(RANGE_SIZE - 1))) else {
            return;
        };
        // What becomes of it shows in the table of pinned pages.
        let _ = read_page(&window.begin(), &mm, va, Wanted::Read, None);
    }

    /// Its context on the device.
    pub(crate) fn context(&self) -> u32 {
        self.context
    }

    /// Handles a fault of the GPU.
    fn handle(&self, fault: &abi::EventRecord) {
        self.statistics.faults.add(1, Relaxed);
        let Err(error) = self.persist(fault) else {
            return;
        };
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

    /// Tries to resolve a fault until nobody gets in the way.
    fn persist(&self, fault: &abi::EventRecord) -> Result {
        let doomed = self.doomed.load(Relaxed);
        if doomed != 0 {
            return Err(Error::from_errno(doomed));
        }
        let mut outcome = Err(EAGAIN);
        for attempt in 0..ATTEMPTS {
            if self.is_closing() {
                return Err(ESRCH);
            }
            outcome = self.resolve(fault);
            match outcome {
                Err(error) if error == EAGAIN || error == EBUSY => {
                    let pause = 1i64 << attempt.min(10);
                    fsleep(Delta::from_micros(pause));
                }
                _ => break,
            }
        }
        outcome
    }

    /// Tries once to give the GPU the access that it has faulted on, and lets it go on.
    ///
    /// # Errors
    ///
    /// EAGAIN, EBUSY: something has come in between. EOPNOTSUPP: the page cannot be pinned. ENOSPC: too many
    /// are. Others: the process could not make that access either.
    fn resolve(&self, fault: &abi::EventRecord) -> Result {
        if self.gpu.is_lost() {
            return Err(ENODEV);
        }
        let va = usize::try_from(fault.va)? & !(PAGE_SIZE - 1);
        if va >= VA_END {
            return Err(EFAULT);
        }
        let atomic = fault.access & abi::ACCESS_ATOMIC != 0;
        let wanted = match fault.access & (abi::ACCESS_WRITE | abi::ACCESS_ATOMIC) {
            0 => Wanted::Read,
            _ => Wanted::Write,
        };
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let window = self.window(&mm, va)?;
        let sequence = window.begin();
        let memory = self.gpu.memory();
        match read_page(&sequence, &mm, va, wanted, Some(memory.owner()))? {
            Found::Nothing => Err(EFAULT),
            Found::System(pfn) if atomic && self.atomics(va) == Atomics::Pin => {
                self.pin(&mm, sequence, va, pfn, fault.fault)
            }
            Found::System(pfn) => {
                let mut rights = abi::PTE_READ;
                if wanted == Wanted::Write {
                    rights |= abi::PTE_WRITE;
                }
                if atomic {
                    // Only here does the GPU get ATOMIC without having the page to itself.
                    rights |= abi::PTE_ATOMIC;
                }
                let mut guard = sequence.commit().map_err(|_| EAGAIN)?;
                if rights & abi::PTE_WRITE != 0 {
                    pfn.mark_dirty();
                }
                self.statistics.mirrors.add(1, Relaxed);
                guard.map(va, pfn, rights, fault.fault)
            }
            Found::Device { page, writable } => {
                let (pfn, mapped) = memory.get(page).ok_or(EAGAIN)?;
                // Have it home first if another address space has it, for only one can; and if it may not be
                // written as it is (after fork, or mprotect), which is for the CPU's fault handler to mend.
                // (`hmm_range_fault` returns device-private pages of ours even so.)
                if mapped.context != self.context || (wanted == Wanted::Write && !writable) {
                    read_page(&sequence, &mm, va, wanted, None)?;
                    return Err(EAGAIN);
                }
                let mut rights = abi::PTE_READ;
                if writable {
                    rights |= abi::PTE_WRITE | abi::PTE_ATOMIC;
                }
                let mut guard = sequence.commit().map_err(|_| EAGAIN)?;
                // Another migration home, of which this window knows nothing, may have come first.
                let mine = Mapped {
                    context: self.context,
                    va,
                };
                if !memory.update(page, pfn, |mapped| mapped.context == self.context, mine) {
                    return Err(EAGAIN);
                }
                guard.map(va, pfn, rights, fault.fault)
            }
        }
    }

    /// Pins the page at `va` in place, and gives it to the GPU.
    ///
    /// The replay is waited for before the migration is finished: until then a CPU access waits, so that the
    /// GPU gets at least the access done for which it has asked.
    fn pin(
        &self,
        mm: &MmWithUser,
        sequence: Sequence<'_, Window>,
        va: usize,
        expected: Pfn,
        fault: u64,
    ) -> Result {
        if !migrate::is_anonymous(expected) {
            return Err(EOPNOTSUPP);
        }
        let memory = self.gpu.memory();
        let stand_in = memory.allocate()?;
        let mmap = mm.mmap_read_lock();
        let unmapped = migrate::setup_pin(&mmap, va, self.actor())?;
        if unmapped.source().is_none_or(|source| source.pfn != expected) {
            return Err(EAGAIN);
        }
        let mine = Mapped {
            context: self.context,
            va,
        };
        let moved = unmapped.pin(stand_in, |page, pinned| memory.set(page, pinned, mine))?;
        self.statistics.pins.add(1, Relaxed);
        let result = match sequence.commit() {
            Ok(mut guard) => {
                let rights = abi::PTE_READ | abi::PTE_WRITE | abi::PTE_ATOMIC;
                guard.map(va, expected, rights, fault)
            }
            // It is pinned all the same; the next attempt finds it so.
            Err(_) => Err(EAGAIN),
        };
        moved.finish();
        result
    }

    /// How the GPU gets exclusive access to `va`.
    fn atomics(&self, va: usize) -> Atomics {
        let advice = self.advice.lock();
        let index = advice.partition_point(|advice| advice.range.end <= va);
        match advice.get(index) {
            Some(advice) if advice.range.contains(&va) => advice.atomics,
            _ => Atomics::Pin,
        }
    }

    /// Sets how the GPU gets exclusive access to `range`, and takes back what it has there.
    pub(crate) fn advise(&self, range: Range<usize>, atomics: Atomics) -> Result {
        let mut list = self.advice.lock();
        // The pieces on both sides, the new one, and what may be split.
        let mut new = KVec::with_capacity(list.len() + 2, GFP_KERNEL)?;
        let mut inserted = false;
        let mut push = |range: Range<usize>, atomics| {
            if range.is_empty() || atomics == Atomics::Pin {
                // The default.
                Ok(())
            } else {
                new.push_within_capacity(Advice { range, atomics })
                    .map_err(|_| ENOMEM)
            }
        };
        for old in list.iter() {
            push(old.range.start..old.range.end.min(range.start), old.atomics)?;
            if !inserted && old.range.end > range.start {
                push(range.clone(), atomics)?;
                inserted = true;
            }
            push(old.range.start.max(range.end)..old.range.end, old.atomics)?;
        }
        if !inserted {
            push(range.clone(), atomics)?;
        }
        if new.len() > MAX_ADVICE {
            return Err(ENOSPC);
        }
        *list = new;
        drop(list);
        let mut base = range.start & !(RANGE_SIZE - 1);
        while let Some((next, window)) = self.find_from(base, range.end) {
            window.revoke().invalidate(range.clone(), true);
            base = next + RANGE_SIZE;
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

    /// Where the page at `va` is: `uapi::PAGE_*`, what the GPU may do, and the pinned frame.
    pub(crate) fn query(&self, va: usize) -> Result<(u32, u8, Option<Pfn>)> {
        let Some(window) = self.find(va & !(RANGE_SIZE - 1)) else {
            // The GPU has never been here.
            return Ok((uapi::PAGE_CPU, 0, None));
        };
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let mut wanted = Wanted::Nothing;
        for _ in 0..ATTEMPTS {
            if kernel::current!().signal_pending() {
                return Err(EINTR);
            }
            let sequence = window.begin();
            let memory = self.gpu.memory();
            let found = match read_page(&sequence, &mm, va, wanted, Some(memory.owner())) {
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
            return Ok(match found {
                Found::Device { page, .. } => match memory.get(page) {
                    Some((pfn, _)) => (uapi::PAGE_PINNED, rights, Some(pfn)),
                    None => (uapi::PAGE_CPU, rights, None),
                },
                Found::System(_) if rights != 0 => (uapi::PAGE_MIRRORED, rights, None),
                Found::Nothing if rights != 0 => {
                    // On its way: the GPU has it already, or still, and a migration is not finished yet. To ask
                    // for read access is how to wait for that; it brings in nothing, as there is a page.
                    wanted = Wanted::Read;
                    continue;
                }
                _ => (uapi::PAGE_CPU, 0, None),
            });
        }
        Err(EAGAIN)
    }
}
