// SPDX-License-Identifier: GPL-2.0-only

//! Page frames, and system pages that the driver has pinned in place.

use crate::bindings as c;
use kernel::bindings;

/// How many pages the system has.
pub(crate) fn system_pages() -> usize {
    // SAFETY: No preconditions.
    unsafe { c::pinion_totalram_pages() }
}

/// The number of a page frame for which there is a `struct page`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pfn(usize);

impl Pfn {
    /// # Safety
    ///
    /// `page` must be a valid page.
    pub(super) unsafe fn of(page: *mut bindings::page) -> Self {
        // SAFETY: By the contract.
        Self(unsafe { c::pinion_page_to_pfn(page) })
    }

    /// # Safety
    ///
    /// There must be a `struct page` for this number.
    pub(super) unsafe fn new(number: usize) -> Self {
        Self(number)
    }

    pub(super) fn page(self) -> *mut bindings::page {
        // SAFETY: There is a page of this number, by construction.
        unsafe { c::pinion_pfn_to_page(self.0) }
    }

    /// The number.
    pub(crate) fn number(self) -> usize {
        self.0
    }

    /// Whether it is the page of zeros that the CPU's page table leads to where a process has read and never written.
    pub(crate) fn is_zero(self) -> bool {
        // SAFETY: No preconditions.
        unsafe { c::pinion_pfn_is_zero(self.0) }
    }

    /// Notes that a device may write to the page, which no page table will tell. Whoever cleans the page has
    /// to revoke the device's access first.
    ///
    /// The caller knows that the page is not freed meanwhile, for example because it holds the guard of a mirror
    /// into which the page has just been committed.
    pub(crate) fn mark_dirty(self) {
        // SAFETY: There is a page of this number. Anonymous memory and shmem need no more than a flag.
        unsafe { c::pinion_page_mark_dirty(self.page()) };
    }

    /// The physical address of its first byte.
    pub(crate) fn address(self) -> u64 {
        (self.0 as u64) << kernel::page::PAGE_SHIFT
    }
}

/// A system folio that has just been allocated for a page to migrate to: locked, and nobody else knows it. Dropping it
/// frees it.
///
/// # Invariants
///
/// This owns the one reference to the folio, and its lock.
pub(crate) struct NewSystemPage {
    first: Pfn,
    order: u32,
}

impl NewSystemPage {
    /// Allocates one for `address` in the area, as a CPU fault there would; of order 0 this tries hard.
    ///
    /// # Safety
    ///
    /// `vma` must be valid.
    pub(super) unsafe fn new(vma: *mut bindings::vm_area_struct, address: usize, order: u32) -> Option<Self> {
        // SAFETY: By the contract.
        let page = unsafe { c::pinion_alloc_vma_page(vma, address, order) };
        // INVARIANT: The helper has locked it.
        (!page.is_null()).then(|| Self {
            // SAFETY: It is a page.
            first: unsafe { Pfn::of(page) },
            order,
        })
    }

    /// Allocates a folio for whatever comes. Takes the trouble to make room for a large one.
    pub(super) fn anywhere(order: u32) -> Option<Self> {
        // SAFETY: No preconditions.
        let page = unsafe { c::pinion_alloc_page(order) };
        // INVARIANT: The helper has locked it.
        (!page.is_null()).then(|| Self {
            // SAFETY: It is a page.
            first: unsafe { Pfn::of(page) },
            order,
        })
    }

    /// Its first page.
    pub(crate) fn pfn(&self) -> Pfn {
        self.first
    }

    /// Base-2 logarithm of the number of its pages.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Fills it with zeros.
    pub(crate) fn clear(&mut self) {
        // SAFETY: It is this one's own.
        unsafe { c::pinion_clear_pages(self.first.page(), self.order) };
    }

    /// Gives up ownership of the reference and the lock.
    pub(super) fn into_raw(self) -> Pfn {
        core::mem::ManuallyDrop::new(self).first
    }
}

impl Drop for NewSystemPage {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe {
            c::pinion_unlock_page(self.first.page());
            c::pinion_put_page(self.first.page());
        }
    }
}

/// A system page that has been unmapped everywhere and pinned where it is: whoever holds this has it to
/// itself. Its metadata is with a device-private page meanwhile.
///
/// Dropping it frees the page, and with it the data; that is right once the device-private page that stands
/// in for it is freed. To give the page back, see [`super::migrate::Unmapped::give_back`].
///
/// # Invariants
///
/// The page is mapped nowhere and not on the LRU; this owns one reference to it.
pub(crate) struct PinnedPage(Pfn);

impl PinnedPage {
    /// # Safety
    ///
    /// The caller hands over a reference to a page as the type invariant asks.
    pub(super) unsafe fn from_raw(pfn: Pfn) -> Self {
        // INVARIANT: By the contract.
        Self(pfn)
    }

    /// Gives up ownership.
    pub(super) fn into_raw(self) -> Pfn {
        core::mem::ManuallyDrop::new(self).0
    }

    /// Where it is.
    pub(crate) fn pfn(&self) -> Pfn {
        self.0
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        // SAFETY: This owns a reference.
        unsafe { c::pinion_put_page(self.0.page()) };
    }
}
