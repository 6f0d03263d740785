// SPDX-License-Identifier: GPL-2.0-only

//! Pages that a device has to itself while they stay pages of the process (`make_device_exclusive()`).
//!
//! The CPU's page table entry is replaced by one that faults. The kernel undoes that by itself when the CPU accesses the
//! page, or when anybody else wants it, and tells notifiers; there is nothing to give back.
//!
//! C header: `include/linux/rmap.h`.

use super::{notifier::Owner, page::Pfn};
use crate::bindings as c;
use core::{marker::PhantomData, ptr};
use kernel::{bindings, error::from_err_ptr, mm::MmWithUser, mm::MmapReadGuard, prelude::*};

/// A page that has just been made exclusive to a device. As long as this exists, nobody undoes it: they wait.
pub(crate) struct ExclusivePage<'a> {
    pfn: Pfn,
    /// # Invariants
    ///
    /// This owns a reference to the folio, and its lock.
    folio: *mut bindings::folio,
    _lock: PhantomData<&'a ()>,
}

impl<'a> ExclusivePage<'a> {
    /// Makes the page of anonymous memory at `address` exclusive, on behalf of `actor`, whom notifiers of the process
    /// see as the one who did.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP: it is not anonymous memory. Others: the process could not write there either.
    pub(crate) fn new(
        _mmap: &'a MmapReadGuard<'_>,
        mm: &MmWithUser,
        address: usize,
        actor: Owner,
    ) -> Result<Self> {
        let mut folio = ptr::null_mut();
        // SAFETY: `mm` is valid, and its mmap_lock is held.
        let page = unsafe { c::make_device_exclusive(mm.as_raw(), address, actor.0, &mut folio) };
        let page = from_err_ptr(page)?;
        // INVARIANT: The kernel returns the folio locked and referenced.
        Ok(Self {
            // SAFETY: A page that has been found in the page table, and whose folio is referenced.
            pfn: unsafe { Pfn::of(page) },
            folio,
            _lock: PhantomData,
        })
    }

    /// Which page it is.
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Drop for ExclusivePage<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe {
            let page = c::pinion_folio_page(self.folio);
            c::pinion_unlock_page(page);
            c::pinion_put_page(page);
        }
    }
}
