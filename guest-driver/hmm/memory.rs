// SPDX-License-Identifier: GPL-2.0-only

//! Device-private memory (`MEMORY_DEVICE_PRIVATE`).
//!
//! A device-private page stands in for a page of a process that a device has. The CPU cannot access it; when
//! it tries, it faults, and the driver brings the page home ([`Handler::migrate_to_ram`]).
//!
//! Each page here can hold a [`PinnedPage`]: the system page for which it stands in, and a `T` of the
//! driver's. When the last mapping of the page goes (munmap, exit), it comes back here and drops that page.
//!
//! Locking: the table's spinlock is a leaf, and taken from where pages are freed, in any context.
//!
//! C header: `include/linux/memremap.h`.

use super::{
    notifier::Owner,
    page::{Pfn, PinnedPage},
};
use crate::bindings as c;
use core::{mem::ManuallyDrop, ptr};
use kernel::{
    bindings,
    error::from_err_ptr,
    new_spinlock_irq,
    prelude::*,
    sync::{Arc, SpinLockIrq},
    types::Opaque,
};

/// Size to which device memory is rounded up: a memory section.
const SECTION: usize = 128 << 20;

/// What became of a CPU fault on a device-private page.
pub(crate) enum Outcome {
    /// The page is home, or the access should simply be tried again.
    Done,
    /// The data is lost: SIGBUS.
    Lost,
    /// No memory: the kernel decides who has to go.
    OutOfMemory,
}

/// The driver's part in device-private memory.
pub(crate) trait Handler: Sized + Send + Sync + 'static {
    /// What the driver wants to know of each page.
    type PageData: Copy + Default + Send;

    /// Brings home the page on which the CPU has faulted. mmap_lock is held and the page locked.
    fn migrate_to_ram(memory: &PrivateMemory<Self>, fault: &FaultedPage<'_>) -> Outcome;
}

/// A device-private page; no reference, just its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DevicePage(Pfn);

impl DevicePage {
    /// The page with that number, if it is device-private.
    pub(crate) fn from_pfn(pfn: Pfn) -> Option<Self> {
        // SAFETY: There is a page of this number.
        let pgmap = unsafe { c::pinion_device_private_pagemap(pfn.page()) };
        (!pgmap.is_null()).then_some(Self(pfn))
    }

    /// Its frame number.
    pub(crate) fn pfn(self) -> Pfn {
        self.0
    }
}

/// A device-private page that has just been allocated: locked, and nobody else knows it. Dropping it frees it.
pub(crate) struct NewDevicePage(Pfn);

impl NewDevicePage {
    /// Its name, by which it can be found when it is in use.
    pub(crate) fn name(&self) -> DevicePage {
        DevicePage(self.0)
    }

    /// Gives up ownership of the reference and the lock.
    pub(super) fn into_raw(self) -> Pfn {
        ManuallyDrop::new(self).0
    }
}

impl Drop for NewDevicePage {
    fn drop(&mut self) {
        // SAFETY: This owns the lock and one reference.
        unsafe {
            c::pinion_unlock_page(self.0.page());
            c::pinion_put_page(self.0.page());
        }
    }
}

/// A CPU fault on a device-private page.
pub(crate) struct FaultedPage<'a> {
    vmf: &'a bindings::vm_fault,
    page: DevicePage,
    owner: Owner,
}

impl FaultedPage<'_> {
    /// The page.
    pub(crate) fn page(&self) -> DevicePage {
        self.page
    }

    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    pub(super) fn vma(&self) -> *mut bindings::vm_area_struct {
        self.vmf.__bindgen_anon_1.vma
    }

    pub(super) fn address(&self) -> usize {
        self.vmf.__bindgen_anon_1.address
    }
}

struct Entry<T> {
    /// Whether the page is in use.
    used: bool,
    /// The system page for which the page stands in.
    pinned: Option<PinnedPage>,
    data: T,
    /// Free pages are chained.
    next_free: u32,
}

struct Table<T> {
    entries: KVVec<Entry<T>>,
    first_free: u32,
    used: usize,
}

/// End of the chain.
const NONE: u32 = u32::MAX;

/// A range of device-private memory.
///
/// # Invariants
///
/// `pgmap` has been given to `memremap_pages()` for `count` pages from frame `first` on, and not been taken
/// back yet.
#[pin_data(PinnedDrop)]
pub(crate) struct PrivateMemory<H: Handler> {
    #[pin]
    pgmap: Opaque<c::dev_pagemap>,
    #[pin]
    table: SpinLockIrq<Table<H::PageData>>,
    first: usize,
    count: usize,
    handler: H,
}

// SAFETY: The C structure is not changed after it was set up.
unsafe impl<H: Handler> Send for PrivateMemory<H> {}
// SAFETY: As above.
unsafe impl<H: Handler> Sync for PrivateMemory<H> {}

impl<H: Handler> PrivateMemory<H> {
    const OPS: c::dev_pagemap_ops = c::dev_pagemap_ops {
        folio_free: Some(Self::folio_free),
        migrate_to_ram: Some(Self::migrate_to_ram),
        memory_failure: None,
        folio_split: None,
    };

    /// Creates `count` device-private pages (rounded up to whole memory sections).
    pub(crate) fn new(name: &'static CStr, count: usize, handler: H) -> Result<Arc<Self>> {
        let size = (count << kernel::page::PAGE_SHIFT).next_multiple_of(SECTION);
        let count = size >> kernel::page::PAGE_SHIFT;
        let mut entries = KVVec::with_capacity(count, GFP_KERNEL)?;
        for index in 0..count {
            let next_free = if index + 1 == count {
                NONE
            } else {
                index as u32 + 1
            };
            let entry = Entry {
                used: false,
                pinned: None,
                data: H::PageData::default(),
                next_free,
            };
            entries.push(entry, GFP_KERNEL)?;
        }
        let table = Table {
            entries,
            first_free: 0,
            used: 0,
        };
        // SAFETY: The name is a static string.
        let resource = unsafe { c::pinion_request_free_mem_region(size, name.as_char_ptr()) };
        let resource = from_err_ptr(resource)?;
        // SAFETY: Just allocated.
        let start = unsafe { (*resource).start } as usize;
        let release = kernel::types::ScopeGuard::new(|| {
            // SAFETY: Requested above.
            unsafe { c::pinion_release_mem_region(start, size) }
        });
        let this = Arc::pin_init(
            try_pin_init!(Self {
                table <- new_spinlock_irq!(table),
                first: start >> kernel::page::PAGE_SHIFT,
                count,
                handler,
                pgmap <- Opaque::try_ffi_init(|slot: *mut c::dev_pagemap| {
                    // SAFETY: `slot` is valid for writes and stays in place; all-zero is what C drivers start
                    // from. The pages can be used only once this has returned.
                    unsafe {
                        ptr::write_bytes(slot, 0, 1);
                        (*slot).type_ = c::memory_type_MEMORY_DEVICE_PRIVATE;
                        (*slot).nr_range = 1;
                        let range = c::range { start: start as u64, end: (start + size - 1) as u64 };
                        // A union of one range and an array of them.
                        (&raw mut (*slot).__bindgen_anon_1).cast::<c::range>().write(range);
                        (*slot).ops = &Self::OPS;
                        (*slot).owner = slot.cast();
                        from_err_ptr(c::memremap_pages(slot, c::pinion_numa_node())).map(|_| ())
                    }
                }),
            }? Error),
            GFP_KERNEL,
        )?;
        // `drop` of `this` releases it.
        release.dismiss();
        Ok(this)
    }

    /// The owner of this memory.
    pub(crate) fn owner(&self) -> Owner {
        Owner::of(self.pgmap.get())
    }

    /// The driver's part.
    pub(crate) fn handler(&self) -> &H {
        &self.handler
    }

    fn index(&self, page: DevicePage) -> Option<usize> {
        let index = page.pfn().number().checked_sub(self.first)?;
        (index < self.count).then_some(index)
    }

    /// Takes a free page.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn allocate(&self) -> Result<NewDevicePage> {
        let index = {
            let mut table = self.table.lock();
            let index = table.first_free;
            let entry = table.entries.get_mut(index as usize).ok_or(ENOSPC)?;
            entry.used = true;
            let next_free = entry.next_free;
            table.first_free = next_free;
            table.used += 1;
            index as usize
        };
        // SAFETY: `first + index` is one of our device-private pages, by the type invariant, and free. The
        // initialisation gives it one reference and locks it.
        unsafe {
            let pfn = Pfn::new(self.first + index);
            c::pinion_zone_device_page_init(pfn.page(), self.pgmap.get());
            Ok(NewDevicePage(pfn))
        }
    }

    /// Has `page`, which must be in use and not yet stand in for another, stand in for `pinned`.
    pub(crate) fn set(&self, page: DevicePage, pinned: PinnedPage, data: H::PageData) {
        let index = self.index(page);
        let mut table = self.table.lock();
        let entry = index.and_then(|index| table.entries.get_mut(index));
        match entry {
            Some(entry) if entry.used && entry.pinned.is_none() => {
                entry.data = data;
                entry.pinned = Some(pinned);
            }
            _ => {
                drop(table);
                pr_err!("a page cannot stand in for another; its data is lost\n");
                drop(pinned);
            }
        }
    }

    /// What `page` stands in for, and the driver's data.
    pub(crate) fn get(&self, page: DevicePage) -> Option<(Pfn, H::PageData)> {
        let index = self.index(page)?;
        let table = self.table.lock();
        let entry = &table.entries[index];
        Some((entry.pinned.as_ref()?.pfn(), entry.data))
    }

    /// Replaces the driver's data of `page`, if it still stands in for `pinned` and its data is still right in
    /// the eyes of `check`. Says whether it has.
    ///
    /// Together with [`Self::take`] this decides who comes first: a page can be mapped somewhere else, or be
    /// given back from where it is mapped, but not both.
    pub(crate) fn update(
        &self,
        page: DevicePage,
        pinned: Pfn,
        check: impl FnOnce(&H::PageData) -> bool,
        data: H::PageData,
    ) -> bool {
        let Some(index) = self.index(page) else {
            return false;
        };
        let mut table = self.table.lock();
        let entry = &mut table.entries[index];
        let same = entry.pinned.as_ref().is_some_and(|entry| entry.pfn() == pinned) && check(&entry.data);
        if same {
            entry.data = data;
        }
        same
    }

    /// Takes the page that `page` stands in for, in order to give it back, and the driver's data.
    pub(crate) fn take(&self, page: DevicePage) -> Option<(PinnedPage, H::PageData)> {
        let index = self.index(page)?;
        let mut table = self.table.lock();
        let entry = &mut table.entries[index];
        Some((entry.pinned.take()?, entry.data))
    }

    /// Calls `each` for the pages that stand in for another and whose data `select`s.
    pub(crate) fn for_each(&self, select: impl Fn(&H::PageData) -> bool, mut each: impl FnMut(DevicePage)) {
        let mut next = 0;
        while let Some(index) = self.next_selected(next, &select) {
            // SAFETY: One of our pages, by the type invariant.
            each(DevicePage(unsafe { Pfn::new(self.first + index) }));
            next = index + 1;
        }
    }

    /// The first page from `index` on that stands in for another and whose data `select`s.
    fn next_selected(&self, mut index: usize, select: impl Fn(&H::PageData) -> bool) -> Option<usize> {
        /// Entries that are looked at with interrupts disabled.
        const STEP: usize = 512;
        while index < self.count {
            let table = self.table.lock();
            if table.used == 0 {
                return None;
            }
            let end = self.count.min(index + STEP);
            let selected = |entry: &Entry<_>| entry.pinned.is_some() && select(&entry.data);
            if let Some(found) = table.entries[index..end].iter().position(selected) {
                return Some(index + found);
            }
            index = end;
        }
        None
    }

    /// # Safety
    ///
    /// `pgmap` must be that of a `PrivateMemory<H>` that is alive.
    unsafe fn from_pgmap<'a>(pgmap: *mut c::dev_pagemap) -> &'a Self {
        // SAFETY: By the contract.
        unsafe { &*kernel::container_of!(Opaque::cast_from(pgmap), Self, pgmap) }
    }

    /// # Safety
    ///
    /// Called by the kernel with a folio of this memory whose last reference is gone. Any context.
    unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
        // SAFETY: The folio is one of ours; memunmap_pages() in `drop` waits until all are free.
        let (this, pfn) = unsafe {
            let page = c::pinion_folio_page(folio);
            (
                Self::from_pgmap(c::pinion_device_private_pagemap(page)),
                Pfn::of(page),
            )
        };
        let Some(index) = this.index(DevicePage(pfn)) else {
            return;
        };
        let mut table = this.table.lock();
        let first_free = table.first_free;
        let entry = &mut table.entries[index];
        entry.used = false;
        entry.next_free = first_free;
        entry.data = H::PageData::default();
        let pinned = entry.pinned.take();
        table.first_free = index as u32;
        table.used -= 1;
        drop(table);
        drop(pinned);
    }

    /// # Safety
    ///
    /// Called by the kernel for a fault on a page of this memory.
    unsafe extern "C" fn migrate_to_ram(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The fault is valid during the call, and its page is locked, referenced, and one of ours.
        let (this, fault) = unsafe {
            let page = (*vmf).page;
            let this = Self::from_pgmap(c::pinion_device_private_pagemap(page));
            let page = DevicePage(Pfn::of(page));
            (
                this,
                FaultedPage {
                    vmf: &*vmf,
                    page,
                    owner: this.owner(),
                },
            )
        };
        match H::migrate_to_ram(this, &fault) {
            Outcome::Done => 0,
            Outcome::Lost => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
            Outcome::OutOfMemory => bindings::vm_fault_reason_VM_FAULT_OOM,
        }
    }
}

#[pinned_drop]
impl<H: Handler> PinnedDrop for PrivateMemory<H> {
    fn drop(self: Pin<&mut Self>) {
        let start = self.first << kernel::page::PAGE_SHIFT;
        let size = self.count << kernel::page::PAGE_SHIFT;
        // SAFETY: Mapped by the type invariant. This waits until every page is free: the driver has sent them
        // home.
        unsafe {
            c::memunmap_pages(self.pgmap.get());
            c::pinion_release_mem_region(start, size);
        }
    }
}
