// SPDX-License-Identifier: GPL-2.0-only

//! Reading the CPU's page table.
//!
//! C header: `include/linux/hmm.h`.

use super::{
    blocks::BLOCK_ORDER,
    memory::DevicePage,
    notifier::{Mirror, Owner, Sequence},
    page::Pfn,
};
use crate::bindings as c;
use core::{ops::Range, ptr};
#[cfg(has_hmm_range_fault_unlocked)]
use kernel::time::{msecs_to_jiffies, Msecs};
use kernel::{error::to_result, mm::MmWithUser, prelude::*};

// enum hmm_pfn_flags; helpers.c asserts that these are the kernel's values.
const VALID: usize = 1 << 63;
const WRITE: usize = 1 << 62;
const ERROR: usize = 1 << 61;
const PFN: usize = (1 << ORDER_SHIFT) - 1;
const ORDER_SHIFT: usize = 53;
const ORDER_MASK: usize = 0x1f;

/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// Milliseconds for which the kernel tries again by itself when something gets in the way.
#[cfg(has_hmm_range_fault_unlocked)]
const PATIENCE: Msecs = 100;

/// What access is asked for. A page that does not allow it, or is not there, is faulted in as the process
/// itself would.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// Only look.
    Nothing,
    /// Load.
    Read,
    /// Store.
    Write,
}

/// A page that the CPU's page table leads to.
#[derive(Clone, Copy)]
pub(crate) enum Found {
    /// Nothing is there, or nothing that a device could use.
    Nothing,
    /// A page of the system.
    System {
        /// Which.
        pfn: Pfn,
        /// Whether it may be written.
        writable: bool,
    },
    /// A device-private page of the owner that was named.
    Device {
        /// Which.
        page: DevicePage,
        /// Whether it may be written.
        writable: bool,
    },
    /// A page of a device's coherent memory, whosever that is: the CPU can use it too.
    Coherent {
        /// Which.
        page: DevicePage,
        /// Whether it may be written.
        writable: bool,
    },
}

/// What was read of a range: one entry for each page.
pub(crate) struct Pages(KVec<usize>);

impl Pages {
    /// The page that many after the beginning.
    pub(crate) fn get(&self, index: usize) -> Found {
        let entry = self.0.get(index).copied().unwrap_or(0);
        if entry & ERROR != 0 || entry & VALID == 0 {
            return Found::Nothing;
        }
        let writable = entry & WRITE != 0;
        // SAFETY: HMM returns frames that have a `struct page`.
        let pfn = unsafe { Pfn::new(entry & PFN) };
        match DevicePage::from_pfn(pfn) {
            Some(page) if page.is_coherent() => Found::Coherent { page, writable },
            Some(page) => Found::Device { page, writable },
            None => Found::System { pfn, writable },
        }
    }

    /// Whether that page cannot be had at all: nothing is mapped there, or the process may not read it, or it is
    /// nothing that a device can use.
    pub(crate) fn is_error(&self, index: usize) -> bool {
        self.0.get(index).is_none_or(|entry| entry & ERROR != 0)
    }

    /// Base-2 logarithm of the number of pages that are mapped as one, of which that page is one.
    pub(crate) fn order(&self, index: usize) -> usize {
        self.0
            .get(index)
            .map_or(0, |entry| entry >> ORDER_SHIFT & ORDER_MASK)
    }

    /// Whether that page is part of a naturally aligned piece of memory of 512 pages or more that is mapped as one.
    pub(crate) fn is_huge(&self, index: usize) -> bool {
        let entry = self.0.get(index).copied().unwrap_or(0);
        entry & VALID != 0 && entry >> ORDER_SHIFT & ORDER_MASK >= BLOCK_ORDER as usize
    }

    /// The number of pages.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Reads the entries of the pages of `range`, within a sequence that has begun. Takes mmap_lock of `mm`, which
/// must be the notifier's, and not be held by the caller.
///
/// Device-private pages of `owner` are returned as they are; those of others, and all if there is no
/// `owner`, migrate home first where anything is wanted.
///
/// # Errors
///
/// EAGAIN: something has changed meanwhile, begin a new sequence. EFAULT, EPERM, ENOMEM and others: the
/// process could not make this access either, somewhere in the range.
pub(crate) fn read_range<M: Mirror>(
    sequence: &mut Sequence<'_, M>,
    mm: &MmWithUser,
    range: Range<usize>,
    wanted: Wanted,
    owner: Option<Owner>,
) -> Result<Pages> {
    if !sequence.is_for(mm) {
        return Err(EINVAL);
    }
    let mut pages = KVec::from_elem(0, (range.end - range.start) / PAGE_SIZE, GFP_KERNEL)?;
    let (notifier, notifier_seq) = sequence.as_raw();
    let mut range = c::hmm_range {
        notifier,
        notifier_seq,
        start: range.start,
        end: range.end,
        hmm_pfns: pages.as_mut_ptr(),
        default_flags: match wanted {
            Wanted::Nothing => 0,
            Wanted::Read => VALID,
            Wanted::Write => VALID | WRITE,
        },
        pfn_flags_mask: 0,
        dev_private_owner: owner.map_or(ptr::null_mut(), |owner| owner.0),
    };
    fault(&mut range, mm).map_err(|error| match error {
        EBUSY => EAGAIN,
        other => other,
    })?;
    sequence.begin_again(range.notifier_seq);
    Ok(Pages(pages))
}

/// Reads the entry of the page at `address`; as [`read_range`] otherwise.
///
/// # Errors
///
/// As [`read_range`]; EFAULT if something is wanted and what is there cannot be used by a device.
pub(crate) fn read_page<M: Mirror>(
    sequence: &mut Sequence<'_, M>,
    mm: &MmWithUser,
    address: usize,
    wanted: Wanted,
    owner: Option<Owner>,
) -> Result<Found> {
    let start = address & !(PAGE_SIZE - 1);
    let pages = read_range(sequence, mm, start..start + PAGE_SIZE, wanted, owner)?;
    // Where nothing is wanted, that can also be a huge page with another device, which would come home if it were.
    if wanted != Wanted::Nothing && pages.0.first().is_some_and(|entry| entry & ERROR != 0) {
        return Err(EFAULT);
    }
    Ok(pages.get(0))
}

/// `hmm_range_fault()`, in the form in which a fault handler may let go of mmap_lock (as userfaultfd's does) and the
/// sequence number is a new one afterwards.
#[cfg(has_hmm_range_fault_unlocked)]
fn fault(range: &mut c::hmm_range, _mm: &MmWithUser) -> Result {
    // SAFETY: `range` has room for one entry for each page and is within the notifier's mm, which has a user, `_mm`.
    to_result(unsafe { c::hmm_range_fault_unlocked_timeout(range, msecs_to_jiffies(PATIENCE)) })
}

/// `hmm_range_fault()` of kernels that have no other.
#[cfg(not(has_hmm_range_fault_unlocked))]
fn fault(range: &mut c::hmm_range, mm: &MmWithUser) -> Result {
    let _mmap = mm.mmap_read_lock();
    // SAFETY: `range` has room for one entry for each page and is within the notifier's mm, whose mmap_lock is held;
    // the sequence was begun on that notifier.
    to_result(unsafe { c::hmm_range_fault(range) })
}
