// SPDX-License-Identifier: GPL-2.0-only

//! Device-private memory (`MEMORY_DEVICE_PRIVATE`).
//!
//! A device-private page takes the place of a page of a process that a device has. The CPU cannot access it; when
//! it tries, it faults, and the driver brings the page home ([`Handler::migrate_to_ram`]).
//!
//! There are two kinds, in one pagemap, so that the kernel takes them for what they are: pages of one owner.
//!
//! - Pages of the device's own memory: the data is there, in as many bytes at the same place.
//! - Stand-ins: the data is in a system page, which the driver has pinned where it is ([`PinnedPage`]).
//!
//! With either the driver keeps a `T`. When the last mapping of a page goes (munmap, exit), it comes back here;
//! what a stand-in stood for is freed with it.
//!
//! ```text
//!   allocate_*() -> NewDevicePage --(migrated to)--> set() -> get(), update(), ... -> take() -> (migrated home)
//!                                                      ^------------- set() <-----------+  (not migrated after all)
//! ```
//!
//! Folios have one page or 512. The kernel may split one at any time; nothing here depends on how pages are joined.
//!
//! Locking: the table's spinlock is a leaf, and taken from where pages are freed, in any context.
//!
//! C header: `include/linux/memremap.h`.

use super::{
    blocks::{Blocks, BLOCK_ORDER, BLOCK_PAGES},
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

    /// Brings home the page on which the CPU has faulted, and what else it sees fit. mmap_lock is held and the folio
    /// locked.
    fn migrate_to_ram(memory: &PrivateMemory<Self>, fault: &FaultedPage<'_>) -> Outcome;
}

/// A device-private page; no reference, just its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DevicePage(Pfn);

/// 2 MiB of the device's memory; just its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceBlock(usize);

impl DevicePage {
    /// Base-2 logarithm of the number of pages of the folio that the page is part of, at this moment.
    pub(crate) fn order(self) -> u32 {
        // SAFETY: There is a page of this number.
        unsafe { c::pinion_page_order(self.0.page()) }
    }

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

/// A device-private folio that has just been allocated: locked, and nobody else knows it. Dropping it frees it.
pub(crate) struct NewDevicePage {
    first: Pfn,
    order: u32,
}

impl NewDevicePage {
    /// The name of its first page, by which it can be found when it is in use.
    pub(crate) fn name(&self) -> DevicePage {
        DevicePage(self.first)
    }

    /// Base-2 logarithm of the number of its pages.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Gives up ownership of the reference and the lock.
    pub(super) fn into_raw(self) -> Pfn {
        ManuallyDrop::new(self).first
    }
}

impl Drop for NewDevicePage {
    fn drop(&mut self) {
        // SAFETY: This owns the lock and one reference.
        unsafe {
            c::pinion_unlock_page(self.first.page());
            c::pinion_put_page(self.first.page());
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

    /// Whether the page is mapped as part of a folio of 512 as a whole.
    pub(super) fn is_huge(&self) -> bool {
        // Before it calls, the kernel looks up the page table entry, which a folio that is mapped whole has not.
        self.vmf.pte.is_null() && self.page.order() == BLOCK_ORDER
    }
}

/// Where the data of a device-private page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In the device's memory, this many bytes from its beginning.
    Device(u64),
    /// In this system page, which stays where it is.
    Pinned(Pfn),
}

/// What takes the place of a page: an argument of [`PrivateMemory::set`].
pub(crate) enum Data {
    /// Its data is in the device's memory.
    Device,
    /// The page itself.
    Pinned(PinnedPage),
}

impl Data {
    fn place(&self, index: usize) -> Place {
        match self {
            Self::Device => Place::Device((index << kernel::page::PAGE_SHIFT) as u64),
            Self::Pinned(page) => Place::Pinned(page.pfn()),
        }
    }
}

struct Entry<T> {
    /// None if the page is free, new, or on its way home.
    data: Option<Data>,
    note: T,
}

struct Table<T> {
    entries: KVVec<Entry<T>>,
    /// The pages of the device's memory.
    device: Blocks,
    /// The stand-ins, which come after them.
    stand_ins: Blocks,
    /// No page of the device's memory is to be allocated any more.
    closed: bool,
}

impl<T> Table<T> {
    /// The allocator that a page belongs to, and its index there.
    fn allocator(&mut self, index: usize) -> (&mut Blocks, usize) {
        match index.checked_sub(self.device.pages()) {
            Some(index) => (&mut self.stand_ins, index),
            None => (&mut self.device, index),
        }
    }
}

/// How much of the device's memory is in use.
#[derive(Clone, Copy)]
pub(crate) struct Usage {
    /// Pages in use.
    pub(crate) used: usize,
    /// Pages.
    pub(crate) total: usize,
}

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
    #[pin]
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
        // What the kernel does without is all that has to be done: nothing here depends on how pages are joined.
        folio_split: None,
    };

    /// Creates device-private pages: `device` for memory of the device's own, which is rounded down to whole blocks,
    /// and at least `stand_ins` others.
    pub(crate) fn new(
        name: &'static CStr,
        device: usize,
        stand_ins: usize,
        handler: impl PinInit<H>,
    ) -> Result<Arc<Self>> {
        let device = Blocks::new(device)?;
        let size = ((device.pages() + stand_ins) << kernel::page::PAGE_SHIFT).next_multiple_of(SECTION);
        let count = size >> kernel::page::PAGE_SHIFT;
        let stand_ins = Blocks::new(count - device.pages())?;
        let mut entries = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            let entry = Entry {
                data: None,
                note: H::PageData::default(),
            };
            entries.push(entry, GFP_KERNEL)?;
        }
        let table = Table {
            entries,
            device,
            stand_ins,
            closed: false,
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
                handler <- handler,
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

    /// Takes a free stand-in.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn allocate_stand_in(&self) -> Result<NewDevicePage> {
        let index = {
            let mut table = self.table.lock();
            let index = table.stand_ins.allocate_page().ok_or(ENOSPC)?;
            index + table.device.pages()
        };
        Ok(self.initialise(index, 0))
    }

    /// Takes a free folio of the device's memory, of order 0 or [`BLOCK_ORDER`].
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn allocate_device(&self, order: u32) -> Result<NewDevicePage> {
        let index = {
            let mut table = self.table.lock();
            let index = match order {
                _ if table.closed => None,
                0 => table.device.allocate_page(),
                BLOCK_ORDER => table.device.allocate_block(),
                _ => None,
            };
            let index = index.ok_or(ENOSPC)?;
            table.device.touch(index);
            index
        };
        Ok(self.initialise(index, order))
    }

    /// `index` must have been allocated just now, with that order.
    fn initialise(&self, index: usize, order: u32) -> NewDevicePage {
        // SAFETY: `first + index` is one of our device-private pages, by the type invariant, and those that follow
        // up to the order are too; they are free. The initialisation gives the folio one reference and locks it.
        unsafe {
            let first = Pfn::new(self.first + index);
            c::pinion_zone_device_page_init(first.page(), self.pgmap.get(), order);
            NewDevicePage { first, order }
        }
    }

    /// Where in the device's memory the data of a folio belongs; none for a stand-in.
    pub(crate) fn offset(&self, page: DevicePage) -> Option<u64> {
        let index = self.index(page)?;
        let device = self.table.lock().device.pages();
        (index < device).then_some((index << kernel::page::PAGE_SHIFT) as u64)
    }

    /// No folio of the device's memory can be allocated any more.
    pub(crate) fn close_device(&self) {
        self.table.lock().closed = true;
    }

    /// How much of the device's memory is in use.
    pub(crate) fn usage(&self) -> Usage {
        let table = self.table.lock();
        Usage {
            used: table.device.used(),
            total: table.device.pages(),
        }
    }

    /// Whether `pages` pages of the device's memory are free, as a block if that many are wanted.
    pub(crate) fn has_room(&self, pages: usize) -> bool {
        let table = self.table.lock();
        if pages >= BLOCK_PAGES {
            table.device.has_block()
        } else {
            table.device.pages() - table.device.used() >= pages
        }
    }

    /// The block of the device's memory that has not been used for the longest time, among those that have pages in
    /// use; from now on it counts as used.
    pub(crate) fn coldest(&self) -> Option<DeviceBlock> {
        let mut table = self.table.lock();
        let block = table.device.coldest()?;
        table.device.touch(block * BLOCK_PAGES);
        Some(DeviceBlock(block))
    }

    /// The blocks of the device's memory that have pages in use.
    pub(crate) fn blocks_in_use(&self) -> impl Iterator<Item = DeviceBlock> + '_ {
        let count = self.table.lock().device.pages() / BLOCK_PAGES;
        (0..count)
            .filter(|block| self.table.lock().device.used_in(*block) > 0)
            .map(DeviceBlock)
    }

    /// How many pages of `block` are in use.
    pub(crate) fn used_in(&self, block: DeviceBlock) -> usize {
        self.table.lock().device.used_in(block.0)
    }

    /// `count` pages from `page` on, as far as there are that many.
    pub(crate) fn following(&self, page: DevicePage, count: usize) -> impl Iterator<Item = DevicePage> {
        let first = page.pfn().number();
        let end = (first + count).min(self.first + self.count);
        // SAFETY: These are device-private pages, by the type invariant.
        (first..end).map(|number| DevicePage(unsafe { Pfn::new(number) }))
    }

    /// The pages of `block`.
    pub(crate) fn pages_of(&self, block: DeviceBlock) -> impl Iterator<Item = DevicePage> + '_ {
        let first = self.first + block.0 * BLOCK_PAGES;
        // SAFETY: These are device-private pages, by the type invariant.
        (first..first + BLOCK_PAGES).map(|number| DevicePage(unsafe { Pfn::new(number) }))
    }

    /// Has `page`, which must be allocated and not have any data yet, take the place of a page.
    pub(crate) fn set(&self, page: DevicePage, data: Data, note: H::PageData) {
        let index = self.index(page);
        let mut table = self.table.lock();
        let device = table.device.pages();
        let entry = index.and_then(|index| table.entries.get_mut(index));
        let fits = matches!(data, Data::Device) == index.is_some_and(|index| index < device);
        match entry {
            Some(entry) if fits && entry.data.is_none() => {
                entry.note = note;
                entry.data = Some(data);
            }
            _ => {
                drop(table);
                pr_err!("a device page cannot take the place of another; its data is lost\n");
                drop(data);
            }
        }
    }

    /// Where the data of `page` is, and the driver's note.
    pub(crate) fn get(&self, page: DevicePage) -> Option<(Place, H::PageData)> {
        let index = self.index(page)?;
        let table = self.table.lock();
        let entry = &table.entries[index];
        Some((entry.data.as_ref()?.place(index), entry.note))
    }

    /// Replaces the driver's note of `page`, if its data is still at `place` and its note is still right in
    /// the eyes of `check`. Says whether it has.
    ///
    /// Together with [`Self::take`] this decides who comes first: a page can be mapped somewhere else, or be
    /// given back from where it is mapped, but not both.
    pub(crate) fn update(
        &self,
        page: DevicePage,
        place: Place,
        check: impl FnOnce(&H::PageData) -> bool,
        note: H::PageData,
    ) -> bool {
        let Some(index) = self.index(page) else {
            return false;
        };
        let mut table = self.table.lock();
        let entry = &mut table.entries[index];
        let same = entry.data.as_ref().is_some_and(|data| data.place(index) == place) && check(&entry.note);
        if same {
            entry.note = note;
            if index < table.device.pages() {
                table.device.touch(index);
            }
        }
        same
    }

    /// Takes the data of `page`, in order to bring it home, and the driver's note.
    pub(crate) fn take(&self, page: DevicePage) -> Option<(Data, H::PageData)> {
        let index = self.index(page)?;
        let mut table = self.table.lock();
        let entry = &mut table.entries[index];
        Some((entry.data.take()?, entry.note))
    }

    /// Calls `each` for the pages with data whose note `select`s.
    pub(crate) fn for_each(&self, select: impl Fn(&H::PageData) -> bool, mut each: impl FnMut(DevicePage)) {
        let mut next = 0;
        while let Some(index) = self.next_selected(next, &select) {
            // SAFETY: One of our pages, by the type invariant.
            each(DevicePage(unsafe { Pfn::new(self.first + index) }));
            next = index + 1;
        }
    }

    /// The first page from `index` on that has data and whose note `select`s.
    fn next_selected(&self, mut index: usize, select: impl Fn(&H::PageData) -> bool) -> Option<usize> {
        /// Entries that are looked at with interrupts disabled.
        const STEP: usize = 512;
        while index < self.count {
            let table = self.table.lock();
            if table.device.used() + table.stand_ins.used() == 0 {
                return None;
            }
            let end = self.count.min(index + STEP);
            let selected = |entry: &Entry<_>| entry.data.is_some() && select(&entry.note);
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
        let (this, pfn, order) = unsafe {
            let page = c::pinion_folio_page(folio);
            (
                Self::from_pgmap(c::pinion_device_private_pagemap(page)),
                Pfn::of(page),
                c::pinion_page_order(page),
            )
        };
        let Some(index) = this.index(DevicePage(pfn)) else {
            return;
        };
        let count = 1 << order;
        // One at a time: what is dropped must not be dropped under the lock.
        for index in index..index + count {
            let data = {
                let mut table = this.table.lock();
                let entry = &mut table.entries[index];
                entry.note = H::PageData::default();
                entry.data.take()
            };
            drop(data);
        }
        let mut table = this.table.lock();
        let (allocator, index) = table.allocator(index);
        let right = allocator.free(index, count);
        drop(table);
        if !right {
            pr_err!("a device page was freed that was not in use\n");
        }
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
