// SPDX-License-Identifier: GPL-2.0-only

//! Struct pages for memory that is not the system's (`struct dev_pagemap`).
//!
//! There are two kinds for memory that takes the place of a process's pages:
//!
//! | | [`Private`] | [`Coherent`] |
//! |---|---|---|
//! | physical addresses | some that nothing answers to | those at which the device shows its memory |
//! | in the CPU's page table | an entry that faults | an ordinary entry |
//! | a CPU access | has it brought home | goes to the device's memory |
//! | references of others (GUP) | none | as to any page; a long-term pin has the kernel move it home |
//! | folios | 1 or 512 pages | 1 page: the kernel (7.3) selects no larger ones for a migration home |
//!
//! What happens to coherent pages is reported by MMU notifiers as for pages of the system; so a device mirrors
//! them.
//!
//! C header: `include/linux/memremap.h`.

use super::{notifier::Owner, page::Pfn};
use crate::bindings as c;
use core::{marker::PhantomData, ops::Range, ptr};
use kernel::{error::from_err_ptr, prelude::*, types::Opaque};

/// A kind of device memory.
pub(crate) trait Kind {
    /// `MEMORY_DEVICE_*`.
    const TYPE: c::memory_type;
}

/// Memory that the CPU cannot access (`MEMORY_DEVICE_PRIVATE`).
pub(crate) enum Private {}

/// Memory that the CPU can access like its own (`MEMORY_DEVICE_COHERENT`).
pub(crate) enum Coherent {}

impl Kind for Private {
    const TYPE: c::memory_type = c::memory_type_MEMORY_DEVICE_PRIVATE;
}

impl Kind for Coherent {
    const TYPE: c::memory_type = c::memory_type_MEMORY_DEVICE_COHERENT;
}

/// Physical addresses that are reserved. Released when this is dropped.
struct Region {
    start: usize,
    size: usize,
}

impl Region {
    /// `size` bytes that nothing answers to, aligned to what the kernel asks for; `size` must be too.
    fn unused(name: &'static CStr, size: usize) -> Result<Self> {
        // SAFETY: The name is a static string.
        let resource = unsafe { c::pinion_request_free_mem_region(size, name.as_char_ptr()) };
        let resource = from_err_ptr(resource)?;
        Ok(Self {
            // SAFETY: Just allocated.
            start: unsafe { (*resource).start } as usize,
            size,
        })
    }

    /// These addresses.
    ///
    /// # Errors
    ///
    /// EBUSY: somebody else uses some of them.
    fn claim(name: &'static CStr, range: Range<usize>) -> Result<Self> {
        let size = range.len();
        // SAFETY: The name is a static string.
        match unsafe { c::pinion_request_mem_region(range.start, size, name.as_char_ptr()) } {
            true => Ok(Self {
                start: range.start,
                size,
            }),
            false => Err(EBUSY),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: Requested when this was made.
        unsafe { c::pinion_release_mem_region(self.start, self.size) };
    }
}

/// Struct pages for a range of physical addresses. Dropping it waits until all of them are free.
///
/// # Invariants
///
/// `pgmap` has been given to `memremap_pages()` for `region`, and not been taken back yet.
#[pin_data(PinnedDrop)]
pub(super) struct Pagemap<K: Kind> {
    #[pin]
    pgmap: Opaque<c::dev_pagemap>,
    region: Region,
    _kind: PhantomData<K>,
}

// SAFETY: The C structure is not changed after it was set up.
unsafe impl<K: Kind> Send for Pagemap<K> {}
// SAFETY: As above.
unsafe impl<K: Kind> Sync for Pagemap<K> {}

impl Pagemap<Private> {
    /// For `size` bytes of memory that the CPU cannot see, a multiple of a memory section (128 MiB).
    ///
    /// # Safety
    ///
    /// As for [`Pagemap::map`].
    pub(super) unsafe fn new(
        name: &'static CStr,
        size: usize,
        ops: &'static c::dev_pagemap_ops,
        owner: *mut c_void,
    ) -> Result<Pin<KBox<Self>>> {
        // SAFETY: By the contract.
        unsafe { Self::map(Region::unused(name, size)?, ops, owner) }
    }
}

impl Pagemap<Coherent> {
    /// For the memory that a device shows at these physical addresses, which are multiples of 2 MiB. Nothing is
    /// accessed there.
    ///
    /// # Errors
    ///
    /// EBUSY: somebody else has it. EINVAL: the kernel cannot map it.
    ///
    /// # Safety
    ///
    /// As for [`Pagemap::map`].
    pub(super) unsafe fn new(
        name: &'static CStr,
        range: Range<usize>,
        ops: &'static c::dev_pagemap_ops,
        owner: *mut c_void,
    ) -> Result<Pin<KBox<Self>>> {
        // SAFETY: By the contract.
        unsafe { Self::map(Region::claim(name, range)?, ops, owner) }
    }
}

impl<K: Kind> Pagemap<K> {
    /// # Safety
    ///
    /// `ops` must be able to deal with pages of this pagemap, whose owner is `owner`, until it has been dropped.
    unsafe fn map(
        region: Region,
        ops: &'static c::dev_pagemap_ops,
        owner: *mut c_void,
    ) -> Result<Pin<KBox<Self>>> {
        let (start, size) = (region.start, region.size);
        // INVARIANT: Mapped here; `drop` takes it back.
        KBox::try_pin_init(
            try_pin_init!(Self {
                pgmap <- Opaque::try_ffi_init(|slot: *mut c::dev_pagemap| {
                    // SAFETY: `slot` is valid for writes and stays in place; all-zero is what C drivers start
                    // from. The pages can be used only once this has returned.
                    unsafe {
                        ptr::write_bytes(slot, 0, 1);
                        (*slot).type_ = K::TYPE;
                        (*slot).nr_range = 1;
                        let range = c::range { start: start as u64, end: (start + size - 1) as u64 };
                        // A union of one range and an array of them.
                        (&raw mut (*slot).__bindgen_anon_1).cast::<c::range>().write(range);
                        (*slot).ops = ops;
                        (*slot).owner = owner;
                        from_err_ptr(c::memremap_pages(slot, c::pinion_numa_node())).map(|_| ())
                    }
                }),
                region,
                _kind: PhantomData,
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The C structure.
    pub(super) fn as_raw(&self) -> *mut c::dev_pagemap {
        self.pgmap.get()
    }

    /// Who owns its pages, in the eyes of MMU notifiers.
    pub(super) fn owner(&self) -> Owner {
        // SAFETY: Set in `map`, and not changed since.
        Owner(unsafe { (*self.pgmap.get()).owner })
    }

    /// How many pages there are.
    pub(super) fn count(&self) -> usize {
        self.region.size >> kernel::page::PAGE_SHIFT
    }

    /// How many pages after the first one that is, if it is one of these.
    pub(super) fn index(&self, pfn: Pfn) -> Option<usize> {
        let index = pfn
            .number()
            .checked_sub(self.region.start >> kernel::page::PAGE_SHIFT)?;
        (index < self.count()).then_some(index)
    }

    /// The page that many after the first one.
    pub(super) fn pfn(&self, index: usize) -> Option<Pfn> {
        let first = self.region.start >> kernel::page::PAGE_SHIFT;
        // SAFETY: By the type invariant there is such a page.
        (index < self.count()).then(|| unsafe { Pfn::new(first + index) })
    }
}

#[pinned_drop]
impl<K: Kind> PinnedDrop for Pagemap<K> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Mapped by the type invariant. The region is released after this.
        unsafe { c::memunmap_pages(self.pgmap.get()) };
    }
}
