// SPDX-License-Identifier: GPL-2.0-only

//! Reading the CPU's page table.
//!
//! C header: `include/linux/hmm.h`.

use super::{
    memory::DevicePage,
    notifier::{Mirror, Owner, Sequence},
    page::Pfn,
};
use crate::bindings as c;
use core::ptr;
use kernel::{error::to_result, mm::MmWithUser, prelude::*};

// enum hmm_pfn_flags; helpers.c asserts that these are the kernel's values.
const VALID: usize = 1 << 63;
const WRITE: usize = 1 << 62;
const ERROR: usize = 1 << 61;
const PFN: usize = (1 << 53) - 1;

/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

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
pub(crate) enum Found {
    /// Nothing is there (only with [`Wanted::Nothing`]).
    Nothing,
    /// A page that the CPU can use, in the way that was wanted.
    System(Pfn),
    /// A device-private page of the owner that was named.
    Device {
        /// Which.
        page: DevicePage,
        /// Whether it may be written.
        writable: bool,
    },
}

/// Reads the entry of the page at `address`, within a sequence that has begun. Takes mmap_lock of `mm`, which
/// must be the notifier's.
///
/// Device-private pages of `owner` are returned as they are; those of others, and all if there is no
/// `owner`, migrate home first.
///
/// # Errors
///
/// EAGAIN: something has changed meanwhile, begin a new sequence. EFAULT, EPERM, ENOMEM and others: the
/// process could not make this access either.
pub(crate) fn read_page<M: Mirror>(
    sequence: &Sequence<'_, M>,
    mm: &MmWithUser,
    address: usize,
    wanted: Wanted,
    owner: Option<Owner>,
) -> Result<Found> {
    let start = address & !(PAGE_SIZE - 1);
    let mut pfn = 0usize;
    let (notifier, notifier_seq) = sequence.as_raw();
    let mut range = c::hmm_range {
        notifier,
        notifier_seq,
        start,
        end: start + PAGE_SIZE,
        hmm_pfns: &mut pfn,
        default_flags: match wanted {
            Wanted::Nothing => 0,
            Wanted::Read => VALID,
            Wanted::Write => VALID | WRITE,
        },
        pfn_flags_mask: 0,
        dev_private_owner: owner.map_or(ptr::null_mut(), |owner| owner.0),
    };
    if !sequence.is_for(mm) {
        return Err(EINVAL);
    }
    let _mmap = mm.mmap_read_lock();
    // SAFETY: `range` is one page with room for one entry, within the notifier's mm, whose mmap_lock is held;
    // the sequence was begun on that notifier.
    to_result(unsafe { c::hmm_range_fault(&mut range) }).map_err(|error| match error {
        EBUSY => EAGAIN,
        other => other,
    })?;
    if pfn & ERROR != 0 {
        return Err(EFAULT);
    }
    if pfn & VALID == 0 {
        return Ok(Found::Nothing);
    }
    let writable = pfn & WRITE != 0;
    // SAFETY: HMM returns frames that have a `struct page`.
    let pfn = unsafe { Pfn::new(pfn & PFN) };
    Ok(match DevicePage::from_pfn(pfn) {
        Some(page) => Found::Device { page, writable },
        None => Found::System(pfn),
    })
}
