// SPDX-License-Identifier: GPL-2.0-only

//! MMU interval notifiers.
//!
//! A driver that mirrors page table entries must not act on an entry that has changed since it was read. The
//! kernel's protocol for this (`mmu_interval_read_begin()`, `mmu_interval_read_retry()`, a lock of the
//! driver's) is easy to get wrong in C; here it is in the types. The mirror state belongs to the notifier,
//! and there are two ways to it:
//!
//! ```text
//!   begin() -> Sequence --(read the CPU's page table)--> Sequence::commit() -> guard, or Stale: start again
//!   revoke() -> guard                                    (to take away, which needs no reading)
//!   revoke_within(sequence) -> guard                     (the same, as part of what the sequence is for)
//!   forget_revocations(sequence)                         (those until now do not count: nobody can get at the pages)
//! ```
//!
//! The callback gets the state under the same lock. So an entry can be put into the mirror only by someone
//! who began before reading it and in whose way nothing came.
//!
//! Locking: the state's mutex is taken under mmap_lock, folio locks and in reclaim. Under it nothing may be
//! allocated that can enter reclaim.
//!
//! C header: `include/linux/mmu_notifier.h`.

use crate::bindings as c;
use core::{ops::Range, ptr};
use kernel::{
    error::to_result,
    mm::Mm,
    new_mutex,
    prelude::*,
    sync::{lock::mutex::MutexGuard, Arc, Mutex},
    types::Opaque,
};

/// Why a range is being invalidated.
pub(crate) struct Event<'a>(&'a c::mmu_notifier_range);

impl Event<'_> {
    /// The part of the address space that changes.
    pub(crate) fn range(&self) -> Range<usize> {
        self.0.start..self.0.end
    }

    /// A migration that was started on behalf of `owner` (`pgmap_owner` of its `migrate_vma`), or a page that is being made
    /// exclusive to it.
    pub(crate) fn is_by(&self, owner: Owner) -> bool {
        let ours = [
            c::mmu_notifier_event_MMU_NOTIFY_MIGRATE,
            c::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE,
        ];
        ours.contains(&self.0.event) && self.0.owner == owner.0
    }
}

/// Identifies who started a migration, or whose device-private memory a page is. Only compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner(pub(super) *mut c_void);

// SAFETY: Never dereferenced.
unsafe impl Send for Owner {}
// SAFETY: As above.
unsafe impl Sync for Owner {}

impl Owner {
    /// `value` as an owner; it must outlive the use of that identity.
    pub(crate) fn of<T>(value: *const T) -> Self {
        Self(value.cast_mut().cast())
    }
}

/// A mirror of a part of an address space.
pub(crate) trait Mirror: Send + Unpin + 'static {
    /// Whether this event can be left out, because whoever caused it has seen to the mirror itself.
    fn ignores(&self, event: &Event<'_>) -> bool;

    /// Takes everything in `range` out of the mirror. When this returns true, the device uses none of it. It
    /// may return false only if `may_wait` is false and it would have to wait.
    ///
    /// Runs under reclaim: allocates nothing, and waits for nothing that needs memory to make progress.
    fn invalidate(&mut self, range: Range<usize>, may_wait: bool) -> bool;
}

struct State<M> {
    mirror: M,
    /// Counts [`IntervalNotifier::revoke`]s: they invalidate what was read before, as the kernel's own
    /// events do.
    revocations: u64,
}

/// A registered `mmu_interval_notifier` over a mirror.
///
/// # Invariants
///
/// `inner` is registered from the end of `new` to `drop`.
#[pin_data(PinnedDrop)]
pub(crate) struct IntervalNotifier<M: Mirror> {
    #[pin]
    state: Mutex<State<M>>,
    #[pin]
    inner: Opaque<c::mmu_interval_notifier>,
}

// SAFETY: The C structure has its own locking, and `M` is `Send` and behind a mutex.
unsafe impl<M: Mirror> Send for IntervalNotifier<M> {}
// SAFETY: As above.
unsafe impl<M: Mirror> Sync for IntervalNotifier<M> {}

/// What is read from the CPU's page table after this was taken can be committed with it, unless something
/// has changed in between.
#[must_use]
pub(crate) struct Sequence<'a, M: Mirror> {
    notifier: &'a IntervalNotifier<M>,
    kernel: usize,
    revocations: u64,
}

impl<'a, M: Mirror> Sequence<'a, M> {
    /// Ends reading: if nothing has changed since it began, what was read may be put into the mirror while the
    /// guard is held.
    pub(crate) fn commit(self) -> Result<Guard<'a, M>, Stale> {
        let guard = self.notifier.state.lock();
        // SAFETY: The notifier is registered, and the lock is the one under which `invalidate` sets the sequence.
        let stale = unsafe { c::pinion_interval_read_retry(self.notifier.inner.get(), self.kernel) };
        if stale || guard.revocations != self.revocations {
            return Err(Stale);
        }
        Ok(Guard(guard))
    }

    /// The C notifier, and the kernel's sequence number.
    pub(super) fn as_raw(&self) -> (*mut c::mmu_interval_notifier, usize) {
        (self.notifier.inner.get(), self.kernel)
    }

    /// Begins anew with a number of the kernel's, which must be that of a `mmu_interval_read_begin()` for this notifier
    /// after this sequence began. Revocations count from the first beginning on.
    pub(super) fn begin_again(&mut self, kernel: usize) {
        self.kernel = kernel;
    }

    /// [`IntervalNotifier::revoke`]s until now do not make this stale any more; changes that the kernel reports still do.
    ///
    /// For whoever has unmapped and locked all pages that are going to be committed, and found them where they belong. What
    /// others have taken out of the mirror before is out of it, since they did that under its lock; and nobody can have
    /// begun to take these pages home, who would need their locks.
    pub(crate) fn forget_revocations(&mut self) {
        self.revocations = self.notifier.state.lock().revocations;
    }

    /// Whether `mm` is the address space that this reads.
    pub(super) fn is_for(&self, mm: &Mm) -> bool {
        // SAFETY: `inner` is initialised; its mm does not change.
        unsafe { (*self.notifier.inner.get()).mm == mm.as_raw() }
    }
}

/// Something has changed since the sequence began.
#[derive(Debug)]
pub(crate) struct Stale;

/// The mirror state, locked.
pub(crate) struct Guard<'a, M: Mirror>(MutexGuard<'a, State<M>>);

impl<M: Mirror> core::ops::Deref for Guard<'_, M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.0.mirror
    }
}

impl<M: Mirror> core::ops::DerefMut for Guard<'_, M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.0.mirror
    }
}

impl<M: Mirror> IntervalNotifier<M> {
    const OPS: c::mmu_interval_notifier_ops = c::mmu_interval_notifier_ops {
        invalidate: Some(Self::invalidate),
        invalidate_start: None,
        invalidate_finish: None,
    };

    /// Starts to listen for changes of `range` in `mm`, which the caller keeps from being torn down.
    ///
    /// mmap_lock must not be held: the first notifier of an mm takes it for writing.
    pub(crate) fn new(mm: &Mm, range: Range<usize>, mirror: M) -> Result<Arc<Self>> {
        let mm = mm.as_raw();
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_mutex!(State { mirror, revocations: 0 }, "IntervalNotifier::state"),
                // The callback can run as soon as this is registered, and the state it uses is in place.
                inner <- Opaque::try_ffi_init(|slot: *mut c::mmu_interval_notifier| {
                    // SAFETY: `slot` is valid for writes and stays in place until `drop` has removed it; all-zero
                    // is what the kernel starts from. `mm` is valid.
                    to_result(unsafe {
                        ptr::write_bytes(slot, 0, 1);
                        c::mmu_interval_notifier_insert(
                            slot,
                            mm,
                            range.start,
                            range.end - range.start,
                            &Self::OPS,
                        )
                    })
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Begins to read. Waits until no invalidation of the range is under way.
    ///
    /// To be called without mmap_lock, which whoever invalidates may be holding.
    pub(crate) fn begin(&self) -> Sequence<'_, M> {
        let revocations = self.state.lock().revocations;
        // SAFETY: Registered by the type invariant.
        let kernel = unsafe { c::mmu_interval_read_begin(self.inner.get()) };
        Sequence {
            notifier: self,
            kernel,
            revocations,
        }
    }

    /// Locks the mirror in order to look at it, and no more.
    pub(crate) fn look(&self) -> impl core::ops::Deref<Target = M> + '_ {
        Guard(self.state.lock())
    }

    /// Locks the mirror in order to take something out of it. Whoever has begun to read and not committed
    /// yet will find that stale.
    pub(crate) fn revoke(&self) -> Guard<'_, M> {
        let mut guard = self.state.lock();
        guard.revocations += 1;
        Guard(guard)
    }

    /// As [`Self::revoke`], except that `sequence`, on whose behalf this is, does not get stale by it.
    pub(crate) fn revoke_within(&self, sequence: &mut Sequence<'_, M>) -> Guard<'_, M> {
        let mut guard = self.state.lock();
        if core::ptr::eq(sequence.notifier, self) && guard.revocations == sequence.revocations {
            sequence.revocations += 1;
        }
        guard.revocations += 1;
        Guard(guard)
    }

    /// # Safety
    ///
    /// Called by the kernel with the `inner` of a notifier that is not being dropped.
    unsafe extern "C" fn invalidate(
        raw: *mut c::mmu_interval_notifier,
        range: *const c::mmu_notifier_range,
        sequence: usize,
    ) -> bool {
        // SAFETY: By the contract; `Opaque` is transparent.
        let this = unsafe { &*kernel::container_of!(Opaque::cast_from(raw), Self, inner) };
        // SAFETY: Valid during the call.
        let event = Event(unsafe { &*range });
        let blockable = event.0.flags & c::PINION_RANGE_BLOCKABLE != 0;
        let mut guard = if blockable {
            this.state.lock()
        } else if let Some(guard) = this.state.try_lock() {
            guard
        } else {
            return false;
        };
        if guard.mirror.ignores(&event) {
            return true;
        }
        // SAFETY: Registered, and under the lock that `commit` compares it under.
        unsafe { c::pinion_interval_set_seq(raw, sequence) };
        guard.mirror.invalidate(event.range(), blockable)
    }
}

#[pinned_drop]
impl<M: Mirror> PinnedDrop for IntervalNotifier<M> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered by the type invariant. This waits for callbacks that are running.
        unsafe { c::mmu_interval_notifier_remove(self.inner.get()) };
    }
}
