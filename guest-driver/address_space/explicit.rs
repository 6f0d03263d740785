// SPDX-License-Identifier: GPL-2.0-only

//! What is done with an address space because somebody has asked for just that, and not because the GPU has faulted.

use super::{AddressSpace, Atomics, Window, ATTEMPTS, PAGE_SIZE, WINDOW_SIZE};
use crate::{
    abi,
    hmm::{
        memory::Kind,
        notifier::{Event, IntervalNotifier, Mirror},
        page::Pfn,
        range::{read_range, Found, Pages, Wanted},
    },
    residency::{Trouble, Which},
};
use core::ops::Range;
use kernel::{
    mm::{virt, MmWithUser},
    prelude::*,
    sync::atomic::{Full, Relaxed},
    time::{delay::fsleep, Delta},
};

/// How often a piece is tried to be moved to VRAM while others get in the way.
const MOVE_ATTEMPTS: u32 = 10;
/// How often a piece is tried to be brought home while there is no memory for it.
const HOME_ATTEMPTS: u32 = 3;
/// How often something is tried to be mapped for an access that is still to come.
const AHEAD_ATTEMPTS: usize = 3;

/// A page as the CPU's page table has it, seen from a GPU.
pub(crate) enum Seen {
    /// It is nothing that the process could read, or that a device could use.
    Error,
    /// Nothing is there, or nothing that can be used as it is.
    Nothing,
    /// A page of the system.
    System {
        /// Which.
        pfn: Pfn,
        /// Whether it may be written.
        writable: bool,
        /// Base-2 logarithm of the number of pages that are mapped as one.
        order: usize,
    },
    /// A device-private page of this GPU.
    Private {
        /// As above.
        writable: bool,
        /// As above.
        order: usize,
    },
    /// A page of a GPU's memory that the CPU can use.
    Coherent {
        /// Whether it is this GPU's.
        local: bool,
        /// As above.
        writable: bool,
        /// As above.
        order: usize,
    },
}

/// Mirrors nothing: what is read is only looked at.
struct Nothing;

impl Mirror for Nothing {
    fn ignores(&self, _event: &Event<'_>) -> bool {
        false
    }

    fn invalidate(&mut self, _range: Range<usize>, _may_wait: bool) -> bool {
        true
    }
}

impl AddressSpace {
    /// Maps what an access that has stalled is going to go on to, as far as that can be done. Where it cannot, the access will stall
    /// again.
    pub(super) fn map_ahead(&self, fault: &abi::EventRecord, rest: Range<usize>) {
        let mut start = rest.start;
        while start < rest.end {
            let end = ((start & !(WINDOW_SIZE - 1)) + WINDOW_SIZE).min(rest.end);
            let access = abi::EventRecord {
                va: start as u64,
                length: (end - start) as u64,
                fault: 0,
                ..*fault
            };
            let mut batch = KVec::new();
            if batch.push(access, GFP_KERNEL).is_err() {
                return;
            }
            for attempt in 0..AHEAD_ATTEMPTS {
                if self.is_closing() {
                    return;
                }
                match self.resolve(&mut batch) {
                    Err(error) if error == EAGAIN || error == EBUSY => {
                        fsleep(Delta::from_micros(1 << attempt));
                    }
                    _ => break,
                }
            }
            start = end;
        }
    }

    /// Why the GPU's last access could not be repaired, if it could not; the context is in error then.
    pub(crate) fn failure(&self) -> Option<Error> {
        let doomed = self.doomed.load(Relaxed);
        (doomed != 0).then(|| Error::from_errno(doomed))
    }

    /// Has the context go on after an error: with the page table that it has, and without the work.
    ///
    /// # Errors
    ///
    /// ENODEV: the device is lost.
    pub(crate) fn recover(&self) -> Result {
        // Nobody handles a fault of work that is about to end.
        let _handling = self.handling.lock();
        self.gpu.reset_context(self.context)?;
        self.faults.lock().clear();
        self.doomed.store(0, Relaxed);
        Ok(())
    }

    /// What is observed of the GPU's faults.
    pub(crate) fn observation(&self) -> &super::Observation {
        &self.observation
    }

    /// Has the next allocation of memory fail that a page of this address space is to move to, in either direction.
    pub(crate) fn fail_next_allocation(&self) {
        self.failing.store(true, Relaxed);
    }

    /// Whether an allocation that comes now is to fail; the next one is not.
    pub(crate) fn take_failure(&self) -> bool {
        self.failing.load(Relaxed) && self.failing.xchg(false, Full)
    }

    /// Calls `each` for `range`, in pieces that are part of one window and of one mapping.
    ///
    /// # Errors
    ///
    /// EINVAL: something of it is not mapped, or the process may not read it. EINTR. What `each` returns.
    fn for_each_piece(
        &self,
        range: Range<usize>,
        mut each: impl FnMut(&MmWithUser, Range<usize>) -> Result,
    ) -> Result {
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let mut start = range.start;
        while start < range.end {
            if kernel::current!().signal_pending() {
                return Err(EINTR);
            }
            let end = {
                let mmap = mm.mmap_read_lock();
                let area = mmap.vma_lookup(start).filter(|area| area.start() <= start);
                let area = area.filter(|area| area.flags() & virt::flags::READ != 0);
                area.ok_or(EINVAL)?.end()
            };
            let window = (start & !(WINDOW_SIZE - 1)) + WINDOW_SIZE;
            let piece = start..end.min(window).min(range.end);
            start = piece.end;
            each(&mm, piece)?;
        }
        Ok(())
    }

    /// Moves to VRAM of that kind what of `range` is the system's, also where there is nothing yet, and gives the GPU all of the range that is
    /// in VRAM then. What cannot move stays where it is: see [`Self::mapped`].
    ///
    /// # Errors
    ///
    /// EINVAL: something of the range is not mapped, or the process may not read it. EINTR, ENODEV.
    pub(crate) fn migrate(&self, range: Range<usize>, kind: Kind) -> Result {
        self.for_each_piece(range, |mm, piece| {
            let window = self.window(mm, piece.start)?;
            // Pages that somebody else is working on, like compaction, can be moved when they are done.
            for attempt in 0..MOVE_ATTEMPTS {
                match self.to_vram(mm, &window, kind, piece.clone(), piece.clone(), &mut KVec::new()) {
                    Err(error) if error == ENODEV || error == ENOMEM => return Err(error),
                    // Nothing there can ever move.
                    Err(error) if error == EINVAL => break,
                    _ => {}
                }
                let is_mapped = || self.mapped(piece.clone()) * PAGE_SIZE == piece.len();
                if is_mapped() {
                    break;
                }
                // What was in VRAM before has been taken from the GPU meanwhile.
                self.map_vram(mm, &window, piece.clone())?;
                if is_mapped() {
                    break;
                }
                self.pause(attempt)?;
            }
            Ok(())
        })
    }

    /// Gives the GPU what of `range`, which is part of one window, is in its VRAM on behalf of this address space.
    fn map_vram(&self, mm: &MmWithUser, window: &IntervalNotifier<Window>, range: Range<usize>) -> Result {
        let owner = Some(self.private());
        let mut entries = KVec::from_elem(0, range.len() / PAGE_SIZE, GFP_KERNEL)?;
        for attempt in 0..ATTEMPTS {
            let mut sequence = window.begin();
            let pages = match read_range(&mut sequence, mm, range.clone(), Wanted::Nothing, owner) {
                Err(error) if error == EAGAIN => {
                    self.pause(attempt)?;
                    continue;
                }
                other => other?,
            };
            let Ok(mut guard) = sequence.commit() else {
                self.pause(attempt)?;
                continue;
            };
            for (index, entry) in entries.iter_mut().enumerate() {
                let va = range.start + index * PAGE_SIZE;
                *entry = match pages.get(index) {
                    Found::Device { page, writable } => self.device_entry(page, writable, va).unwrap_or(0),
                    Found::Coherent { page, writable } if self.gpu.memory().kind(page).is_some() => {
                        self.device_entry(page, writable, va).unwrap_or(0)
                    }
                    _ => 0,
                };
            }
            return if entries.iter().any(|entry| *entry != 0) {
                guard.map(range.start, &entries, &[])
            } else {
                Ok(())
            };
        }
        Err(EBUSY)
    }

    /// Waits before another attempt, the longer the more there were.
    fn pause(&self, attempt: u32) -> Result {
        if kernel::current!().signal_pending() {
            return Err(EINTR);
        }
        fsleep(Delta::from_micros(1i64 << attempt.min(10)));
        Ok(())
    }

    /// Brings home what of `range` is in VRAM of that kind. Returns how many pages have come.
    ///
    /// # Errors
    ///
    /// EINVAL: something of the range is not mapped, or the process may not read it. ENOMEM, EINTR. EIO: the data is lost.
    pub(crate) fn migrate_home(&self, range: Range<usize>, kind: Kind) -> Result<usize> {
        let mut count = 0;
        self.for_each_piece(range, |_, piece| {
            for attempt in 0..HOME_ATTEMPTS {
                match self.home(piece.clone(), Which::Only(kind), true) {
                    Ok(home) => {
                        count += home;
                        return Ok(());
                    }
                    Err(Trouble::Busy) => return Ok(()),
                    // What has come home meanwhile needs no room any more, and reclaim may have made some.
                    Err(Trouble::NoMemory) => self.pause(attempt)?,
                    Err(Trouble::Lost) => return Err(EIO),
                }
            }
            Err(ENOMEM)
        })?;
        Ok(count)
    }

    /// Whether the GPU may do atomic operations anywhere in `range`, which can be all there is: only windows are looked at.
    pub(crate) fn has_atomic(&self, range: Range<usize>) -> bool {
        let mut base = range.start & !(WINDOW_SIZE - 1);
        while let Some((next, window)) = self.find_from(base, range.end) {
            base = next + WINDOW_SIZE;
            let window = window.look();
            let is_atomic = |va| u64::from(window.rights(va)) & abi::PTE_ATOMIC != 0;
            let mut addresses = (next.max(range.start)..base.min(range.end)).step_by(PAGE_SIZE);
            if addresses.any(is_atomic) {
                return true;
            }
        }
        false
    }

    /// How many pages the GPU maps from the beginning of `range` on, up to the first that it does not.
    pub(crate) fn mapped(&self, range: Range<usize>) -> usize {
        let mut count = 0;
        let mut start = range.start;
        while start < range.end {
            let base = start & !(WINDOW_SIZE - 1);
            let end = (base + WINDOW_SIZE).min(range.end);
            let pages = (end - start) / PAGE_SIZE;
            let window = self.find(base);
            let here = window.as_ref().map_or(0, |window| {
                let window = window.look();
                let mut addresses = (start..end).step_by(PAGE_SIZE);
                addresses.position(|va| window.rights(va) == 0).unwrap_or(pages)
            });
            count += here;
            if here < pages {
                break;
            }
            start = end;
        }
        count
    }

    /// How the GPU gets exclusive access to `range`: does what [`Self::advise`] does unless it was said before.
    pub(crate) fn prefer(&self, range: Range<usize>, atomics: Atomics) -> Result {
        let (policy, alike) = self.advice.get(range.start);
        if policy.atomics == atomics && alike.end >= range.end {
            return Ok(());
        }
        self.advise(range, atomics)
    }

    /// Reads the CPU's page table for `range`, of [`crate::hmm::migrate::MAX_PAGES`] pages at most, changing nothing, and shows it to
    /// `each` as it was at one moment: as this GPU sees it, or (without `private`) as one that has no device-private pages would.
    ///
    /// # Errors
    ///
    /// EBUSY: it has kept changing. EINTR, ESRCH, ENOMEM.
    pub(crate) fn snapshot(&self, range: Range<usize>, private: bool, mut each: impl FnMut(Seen)) -> Result {
        let mm = self.mm.mmget_not_zero().ok_or(ESRCH)?;
        let owner = private.then(|| self.private());
        // Not the windows, which are there for what the GPU has.
        let notifier = IntervalNotifier::new(&mm, range.clone(), Nothing)?;
        for attempt in 0..ATTEMPTS {
            let mut sequence = notifier.begin();
            let pages = match read_range(&mut sequence, &mm, range.clone(), Wanted::Nothing, owner) {
                Err(error) if error == EAGAIN => {
                    self.pause(attempt)?;
                    continue;
                }
                other => other?,
            };
            // Kept until all has been looked at: pages cannot go away meanwhile.
            let Ok(_guard) = sequence.commit() else {
                self.pause(attempt)?;
                continue;
            };
            (0..pages.len()).for_each(|index| each(self.seen(&pages, index)));
            return Ok(());
        }
        Err(EBUSY)
    }

    fn seen(&self, pages: &Pages, index: usize) -> Seen {
        let order = pages.order(index);
        match pages.get(index) {
            _ if pages.is_error(index) => Seen::Error,
            Found::Nothing => Seen::Nothing,
            Found::System { pfn, writable } => Seen::System { pfn, writable, order },
            Found::Device { writable, .. } => Seen::Private { writable, order },
            Found::Coherent { page, writable } => Seen::Coherent {
                local: self.gpu.memory().kind(page).is_some(),
                writable,
                order,
            },
        }
    }
}
