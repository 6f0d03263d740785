// SPDX-License-Identifier: GPL-2.0-only

//! Memory of a device for pages of processes (`MEMORY_DEVICE_PRIVATE`, `MEMORY_DEVICE_COHERENT`).
//!
//! A device page takes the place of a page of a process. There are three kinds of them:
//!
//! - Private pages of the device's own memory: the data is there, in as many bytes at the same place. The CPU cannot
//!   access it; when it tries, it faults, and the driver brings the page home ([`Handler::migrate_to_ram`]).
//! - Coherent ones: the same, and the CPU can access the data where it is. The page is mapped like any other; what
//!   becomes of it is heard through MMU notifiers.
//! - Stand-ins: the data is in a system page, which the driver has pinned where it is ([`PinnedPage`]). They are private, and
//!   in the same pagemap as those of the device, so that the kernel takes them for what they are: pages of one owner.
//!
//! With any of them the driver keeps a `T`. When the last mapping of a page goes (munmap, exit), it comes back here;
//! what a stand-in stood for is freed with it.
//!
//! ```text
//!   allocate_*() -> NewDevicePage --(migrated to)--> set() -> get(), update(), ... -> take() -> (migrated home)
//!                                                      ^------------- set() <-----------+  (not migrated after all)
//! ```
//!
//! A coherent page can also leave without `take()`: a long-term pin (`FOLL_LONGTERM`) has the kernel copy it to a page of
//! the system, after it has told the notifiers, and free it.
//!
//! Folios have one page or 512; coherent ones have one. The kernel may split one at any time; nothing here depends on how
//! pages are joined.
//!
//! Locking: the table's spinlock is a leaf, and taken from where pages are freed, in any context.
//!
//! C header: `include/linux/memremap.h`.

use super::{
    blocks::{Blocks, BLOCK_ORDER, BLOCK_PAGES},
    notifier::Owner,
    page::{Pfn, PinnedPage},
    pagemap::{Coherent, Pagemap, Private},
};
use crate::bindings as c;
use core::{marker::PhantomPinned, mem::ManuallyDrop, ops::Range};
use kernel::{
    bindings, new_spinlock_irq,
    prelude::*,
    sync::{Arc, SpinLockIrq},
};

/// Size to which device memory is rounded up: a memory section.
const SECTION: usize = 128 << 20;
/// Base-2 logarithm of the bytes of a page.
const PAGE_SHIFT: usize = kernel::page::PAGE_SHIFT;
/// Bytes of a block.
const BLOCK_SIZE: usize = BLOCK_PAGES << PAGE_SHIFT;

/// How the CPU gets at memory of the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Not at all: an access faults.
    Private,
    /// As at its own.
    Coherent,
}

impl Kind {
    /// All there are.
    pub(crate) const ALL: [Self; 2] = [Self::Private, Self::Coherent];
}

/// What became of a CPU fault on a device-private page.
pub(crate) enum Outcome {
    /// The page is home, or the access should simply be tried again.
    Done,
    /// The data is lost: SIGBUS.
    Lost,
    /// No memory: the kernel decides who has to go.
    OutOfMemory,
}

/// The driver's part in device memory.
pub(crate) trait Handler: Sized + Send + Sync + 'static {
    /// What the driver wants to know of each page.
    type PageData: Copy + Default + Send;

    /// Brings home the page on which the CPU has faulted, and what else it sees fit. mmap_lock is held and the folio
    /// locked.
    fn migrate_to_ram(memory: &DeviceMemory<Self>, fault: &FaultedPage<'_>) -> Outcome;
}

/// A device page, private or coherent; no reference, just its name.
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

    /// The page with that number, if it is private or coherent memory of a device, whosever that is.
    pub(crate) fn from_pfn(pfn: Pfn) -> Option<Self> {
        // SAFETY: There is a page of this number.
        let pgmap = unsafe { c::pinion_device_pagemap(pfn.page()) };
        (!pgmap.is_null()).then_some(Self(pfn))
    }

    /// Whether the CPU can access it.
    pub(crate) fn is_coherent(self) -> bool {
        // SAFETY: There is a page of this number.
        unsafe { c::pinion_page_is_device_coherent(self.0.page()) }
    }

    /// Its frame number.
    pub(crate) fn pfn(self) -> Pfn {
        self.0
    }
}

/// A device folio that has just been allocated: locked, and nobody else knows it. Dropping it frees it.
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

    /// What the CPU sees in the first eight bytes, if it is coherent memory.
    pub(crate) fn peek(&self) -> Option<u64> {
        self.name().is_coherent().then(|| {
            // SAFETY: The kernel has mapped coherent memory, and nobody else uses this page. Whatever answers there, it
            // is read as a number.
            unsafe { c::pinion_page_peek(self.first.page()) }
        })
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

/// Where the data of a device page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In the device's memory, this many bytes from its beginning.
    Device(u64),
    /// In this system page, which stays where it is.
    Pinned(Pfn),
    /// Nowhere: the device has taken it with it.
    Lost,
}

/// What takes the place of a page: an argument of [`DeviceMemory::set`].
pub(crate) enum Data {
    /// Its data is in the device's memory.
    Device,
    /// As above, and nobody needs it ([`DeviceMemory::discard`]).
    Discarded,
    /// The page itself.
    Pinned(PinnedPage),
    /// Nothing: the data is lost.
    Lost,
}

impl Data {
    fn place(&self, index: usize) -> Place {
        match self {
            Self::Device | Self::Discarded => Place::Device((index << PAGE_SHIFT) as u64),
            Self::Pinned(page) => Place::Pinned(page.pfn()),
            Self::Lost => Place::Lost,
        }
    }
}

struct Entry<T> {
    /// None if the page is free, new, or on its way home.
    data: Option<Data>,
    note: T,
}

struct Table<T> {
    /// Coherent pages, then private ones, then stand-ins.
    entries: KVVec<Entry<T>>,
    /// The beginning of the device's memory.
    coherent: Blocks,
    /// The rest of it.
    private: Blocks,
    stand_ins: Blocks,
    /// From where on stand-ins are looked for that are to go home for others.
    hand: usize,
    /// No page of the device's memory is to be allocated any more.
    closed: bool,
    /// The coherent pages are not there, for all that was said.
    withdrawn: bool,
}

impl<T> Table<T> {
    /// The pages of the device's memory of that kind.
    fn device(&mut self, kind: Kind) -> &mut Blocks {
        match kind {
            Kind::Coherent => &mut self.coherent,
            Kind::Private => &mut self.private,
        }
    }

    /// How many pages come before those of that kind.
    fn before(&self, kind: Kind) -> usize {
        match kind {
            Kind::Coherent => 0,
            Kind::Private => self.coherent.pages(),
        }
    }

    /// The allocator that a page belongs to, and its index there.
    fn allocator(&mut self, index: usize) -> (&mut Blocks, usize) {
        let (coherent, private) = (self.coherent.pages(), self.private.pages());
        match index {
            _ if index < coherent => (&mut self.coherent, index),
            _ if index < coherent + private => (&mut self.private, index - coherent),
            _ => (&mut self.stand_ins, index - coherent - private),
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

/// The memory of a device, and stand-ins.
///
/// # Invariants
///
/// `table.entries` has as many entries as the pagemaps have pages, the coherent ones first.
#[pin_data]
pub(crate) struct DeviceMemory<H: Handler> {
    // Dropped first, and in this order: that waits until all pages are free, which takes the rest.
    private: Pin<KBox<Pagemap<Private>>>,
    coherent: Option<Pin<KBox<Pagemap<Coherent>>>>,
    #[pin]
    table: SpinLockIrq<Table<H::PageData>>,
    /// Pages of the device's memory.
    device: usize,
    #[pin]
    handler: H,
    /// Its address is the owner of the coherent pages; that of the whole is the owner of the private ones.
    coherent_owner: u8,
    /// Pagemaps point here.
    #[pin]
    _pin: PhantomPinned,
}

impl<H: Handler> DeviceMemory<H> {
    const PRIVATE: c::dev_pagemap_ops = c::dev_pagemap_ops {
        folio_free: Some(Self::folio_free),
        migrate_to_ram: Some(Self::migrate_to_ram),
        memory_failure: None,
        // What the kernel does without is all that has to be done: nothing here depends on how pages are joined.
        folio_split: None,
    };

    const COHERENT: c::dev_pagemap_ops = c::dev_pagemap_ops {
        migrate_to_ram: None,
        ..Self::PRIVATE
    };

    /// Creates device pages: `device` for memory of the device's own, which is rounded down to whole blocks, and at
    /// least `stand_ins` others.
    ///
    /// `aperture` is where the CPU sees the beginning of the device's memory, if it does: physical addresses, of which whole
    /// blocks are used. Nothing is accessed there before a page of that kind has been allocated.
    ///
    /// # Errors
    ///
    /// EBUSY, EINVAL: that is not where the aperture can be. Others: there is no memory, or are no addresses.
    pub(crate) fn new(
        name: &'static CStr,
        device: usize,
        aperture: Option<Range<usize>>,
        stand_ins: usize,
        handler: impl PinInit<H>,
    ) -> Result<Arc<Self>> {
        let aperture = aperture.map(|range| {
            let blocks = (range.len() / BLOCK_SIZE).min(device / BLOCK_PAGES);
            range.start..range.start + blocks * BLOCK_SIZE
        });
        let aperture = aperture.filter(|range| !range.is_empty());
        if aperture
            .as_ref()
            .is_some_and(|range| range.start % BLOCK_SIZE != 0)
        {
            return Err(EINVAL);
        }
        let coherent = aperture.as_ref().map_or(0, |range| range.len() >> PAGE_SHIFT);
        let coherent = Blocks::new(coherent)?;
        let private = Blocks::new(device - coherent.pages())?;
        let device = coherent.pages() + private.pages();
        let stand_ins = stand_ins + coherent.pages();
        let size = ((private.pages() + stand_ins) << PAGE_SHIFT).next_multiple_of(SECTION);
        let count = coherent.pages() + (size >> PAGE_SHIFT);
        let stand_ins = Blocks::new(count - device)?;
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
            coherent,
            private,
            stand_ins,
            hand: 0,
            closed: false,
            withdrawn: false,
        };
        // INVARIANT: As many as `count` says.
        Arc::pin_init(
            try_pin_init!(&this in Self {
                table <- new_spinlock_irq!(table),
                device,
                handler <- handler,
                coherent_owner: 0,
                _pin: PhantomPinned,
                // SAFETY: The functions find this by the owner, and the pagemap is gone before the rest is.
                private: unsafe {
                    Pagemap::<Private>::new(name, size, &Self::PRIVATE, this.as_ptr().cast())
                }?,
                coherent: match aperture {
                    // SAFETY: As above.
                    Some(range) => Some(unsafe {
                        let owner = &raw mut (*this.as_ptr()).coherent_owner;
                        Pagemap::<Coherent>::new(name, range, &Self::COHERENT, owner.cast())
                    }?),
                    None => None,
                },
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The owner of the private pages.
    pub(crate) fn private_owner(&self) -> Owner {
        self.private.owner()
    }

    /// The owner of the pages of that kind, if there are any.
    pub(crate) fn owner(&self, kind: Kind) -> Option<Owner> {
        match kind {
            Kind::Private => Some(self.private.owner()),
            Kind::Coherent => self.coherent.as_ref().map(|pagemap| pagemap.owner()),
        }
    }

    /// The driver's part.
    pub(crate) fn handler(&self) -> &H {
        &self.handler
    }

    fn coherent_pages(&self) -> usize {
        self.coherent.as_ref().map_or(0, |pagemap| pagemap.count())
    }

    /// How many pages there are.
    fn count(&self) -> usize {
        self.coherent_pages() + self.private.count()
    }

    fn index(&self, page: DevicePage) -> Option<usize> {
        let coherent = self.coherent.as_ref().and_then(|pagemap| pagemap.index(page.0));
        coherent.or_else(|| Some(self.coherent_pages() + self.private.index(page.0)?))
    }

    fn page(&self, index: usize) -> Option<DevicePage> {
        let pfn = match (index.checked_sub(self.coherent_pages()), &self.coherent) {
            (Some(index), _) => self.private.pfn(index),
            (None, coherent) => coherent.as_ref()?.pfn(index),
        };
        pfn.map(DevicePage)
    }

    /// The kind of a page of the device's memory; none for a stand-in, and for what is not of this memory.
    pub(crate) fn kind(&self, page: DevicePage) -> Option<Kind> {
        match self.index(page)? {
            index if index < self.coherent_pages() => Some(Kind::Coherent),
            index => (index < self.device).then_some(Kind::Private),
        }
    }

    /// Takes a free stand-in for a page that is to be pinned, unless `limit` of them are in use.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn allocate_stand_in(&self, limit: usize) -> Result<NewDevicePage> {
        let index = {
            let mut table = self.table.lock();
            // The rest is set aside, see below.
            let free = table.stand_ins.pages() - table.stand_ins.used();
            let free = free > table.coherent.pages() && table.stand_ins.used() < limit;
            free.then(|| table.stand_ins.allocate_page()).flatten()
        };
        self.initialise(index.ok_or(ENOSPC)? + self.device, 0)
    }

    /// Takes a free stand-in for a coherent page of which the data is lost. There is one for each.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn allocate_for_lost(&self) -> Result<NewDevicePage> {
        let index = self.table.lock().stand_ins.allocate_page();
        self.initialise(index.ok_or(ENOSPC)? + self.device, 0)
    }

    /// Takes a free folio of the device's memory, of order 0 or, for private memory, [`BLOCK_ORDER`].
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn allocate_device(&self, kind: Kind, order: u32) -> Result<NewDevicePage> {
        let index = {
            let mut table = self.table.lock();
            let before = table.before(kind);
            let closed = table.closed || (kind == Kind::Coherent && table.withdrawn);
            let blocks = table.device(kind);
            let index = match order {
                _ if closed => None,
                0 => blocks.allocate_page(),
                // The kernel could not migrate it home again.
                BLOCK_ORDER if kind == Kind::Private => blocks.allocate_block(),
                _ => None,
            };
            let index = index.ok_or(ENOSPC)?;
            blocks.touch(index);
            before + index
        };
        self.initialise(index, order)
    }

    /// `index` must have been allocated just now, with that order.
    fn initialise(&self, index: usize, order: u32) -> Result<NewDevicePage> {
        let first = self.page(index).ok_or(EINVAL)?.0;
        let pagemap = match &self.coherent {
            Some(coherent) if index < coherent.count() => coherent.as_raw(),
            _ => self.private.as_raw(),
        };
        // SAFETY: It is a page of that pagemap, those that follow up to the order are too, and they are free. The
        // initialisation gives the folio one reference and locks it.
        unsafe { c::pinion_zone_device_page_init(first.page(), pagemap, order) };
        Ok(NewDevicePage { first, order })
    }

    /// Where in the device's memory the data of a folio belongs; none for a stand-in.
    pub(crate) fn offset(&self, page: DevicePage) -> Option<u64> {
        let index = self.index(page)?;
        (index < self.device).then_some((index << PAGE_SHIFT) as u64)
    }

    /// No folio of the device's memory can be allocated any more.
    pub(crate) fn close_device(&self) {
        self.table.lock().closed = true;
    }

    /// The CPU does not see the device's memory where it should: no coherent page can be allocated, and there are none.
    pub(crate) fn withdraw_coherent(&self) {
        self.table.lock().withdrawn = true;
    }

    /// How much of the device's memory of that kind is in use.
    pub(crate) fn usage(&self, kind: Kind) -> Usage {
        let mut table = self.table.lock();
        let there = kind == Kind::Private || !table.withdrawn;
        let blocks = table.device(kind);
        Usage {
            used: blocks.used(),
            total: if there { blocks.pages() } else { 0 },
        }
    }

    /// Pages of the device's memory that are in use.
    pub(crate) fn used(&self) -> usize {
        let table = self.table.lock();
        table.coherent.used() + table.private.used()
    }

    /// Whether `pages` pages of the device's memory are free; of private memory, as a block if that many are wanted.
    pub(crate) fn has_room(&self, kind: Kind, pages: usize) -> bool {
        let mut table = self.table.lock();
        let blocks = table.device(kind);
        if kind == Kind::Private && pages >= BLOCK_PAGES {
            blocks.has_block()
        } else {
            blocks.pages() - blocks.used() >= pages
        }
    }

    /// The block of the device's memory that has not been used for the longest time, among those that have pages in
    /// use; from now on it counts as used.
    pub(crate) fn coldest(&self, kind: Kind) -> Option<DeviceBlock> {
        let mut table = self.table.lock();
        let before = table.before(kind);
        let blocks = table.device(kind);
        let block = blocks.coldest()?;
        blocks.touch(block * BLOCK_PAGES);
        Some(DeviceBlock(before / BLOCK_PAGES + block))
    }

    /// The kind of the pages of `block`.
    pub(crate) fn kind_of(&self, block: DeviceBlock) -> Kind {
        if block.0 * BLOCK_PAGES < self.coherent_pages() {
            Kind::Coherent
        } else {
            Kind::Private
        }
    }

    /// The blocks of the device's memory that have pages in use.
    pub(crate) fn blocks_in_use(&self) -> impl Iterator<Item = DeviceBlock> + '_ {
        (0..self.device / BLOCK_PAGES)
            .map(DeviceBlock)
            .filter(|block| self.used_in(*block) > 0)
    }

    /// How many pages of `block` are in use.
    pub(crate) fn used_in(&self, block: DeviceBlock) -> usize {
        let mut table = self.table.lock();
        let (blocks, index) = table.allocator(block.0 * BLOCK_PAGES);
        blocks.used_in(index / BLOCK_PAGES)
    }

    /// `count` pages from `page` on, as far as there are that many.
    pub(crate) fn following(&self, page: DevicePage, count: usize) -> impl Iterator<Item = DevicePage> + '_ {
        let first = self.index(page).unwrap_or(self.count());
        (first..(first + count).min(self.count())).filter_map(|index| self.page(index))
    }

    /// The pages of `block`.
    pub(crate) fn pages_of(&self, block: DeviceBlock) -> impl Iterator<Item = DevicePage> + '_ {
        let first = block.0 * BLOCK_PAGES;
        (first..first + BLOCK_PAGES).filter_map(|index| self.page(index))
    }

    /// Has `page`, which must be allocated and not have any data yet, take the place of a page.
    pub(crate) fn set(&self, page: DevicePage, data: Data, note: H::PageData) {
        let index = self.index(page);
        let device = self.device;
        let mut table = self.table.lock();
        let entry = index.and_then(|index| table.entries.get_mut(index));
        let of_device = matches!(data, Data::Device | Data::Discarded);
        let fits = of_device == index.is_some_and(|index| index < device);
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
            if let Some(data @ Data::Discarded) = &mut entry.data {
                *data = Data::Device;
            }
            let (blocks, index) = table.allocator(index);
            blocks.touch(index);
        }
        same
    }

    /// Notes that nobody needs the data of `page`, if it is in the device's memory and its note is right in the eyes of
    /// `check`. That holds until [`Self::update`], after which the device may write there.
    ///
    /// The caller knows that the device does not access the page.
    pub(crate) fn discard(&self, page: DevicePage, check: impl FnOnce(&H::PageData) -> bool) {
        let Some(index) = self.index(page) else { return };
        let mut table = self.table.lock();
        let entry = &mut table.entries[index];
        if check(&entry.note) {
            if let Some(data @ Data::Device) = &mut entry.data {
                *data = Data::Discarded;
            }
        }
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
            if let Some(page) = self.page(index) {
                each(page);
            }
            next = index + 1;
        }
    }

    /// Stand-ins that are in use.
    pub(crate) fn pinned(&self) -> usize {
        self.table.lock().stand_ins.used()
    }

    /// Fills `pages` up to its capacity with stand-ins that have data, beginning where the last call ended and at most once round.
    pub(crate) fn next_pinned(&self, pages: &mut KVec<DevicePage>) {
        let mut left = self.count() - self.device;
        while left > 0 && pages.len() < pages.capacity() {
            let index = {
                let mut table = self.table.lock();
                if table.stand_ins.used() == 0 {
                    return;
                }
                let index = table.hand.max(self.device);
                // Those that are looked at with interrupts disabled, as below.
                let end = self.count().min(index + left.min(512));
                let found = table.entries[index..end]
                    .iter()
                    .position(|entry| entry.data.is_some());
                let next = found.map_or(end, |found| index + found + 1);
                left -= next - index;
                table.hand = if next < self.count() { next } else { self.device };
                found.map(|found| index + found)
            };
            if let Some(page) = index.and_then(|index| self.page(index)) {
                // There is room, as above.
                let _ = pages.push_within_capacity(page);
            }
        }
    }

    /// The first page from `index` on that has data and whose note `select`s.
    fn next_selected(&self, mut index: usize, select: impl Fn(&H::PageData) -> bool) -> Option<usize> {
        /// Entries that are looked at with interrupts disabled.
        const STEP: usize = 512;
        while index < self.count() {
            let table = self.table.lock();
            if table.coherent.used() + table.private.used() + table.stand_ins.used() == 0 {
                return None;
            }
            let end = self.count().min(index + STEP);
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
    /// `pgmap` must be one of a `DeviceMemory<H>` that is alive.
    unsafe fn from_pgmap<'a>(pgmap: *mut c::dev_pagemap) -> &'a Self {
        // SAFETY: By the contract, and because `new` has made it with one of these owners.
        unsafe {
            let owner = (*pgmap).owner;
            if (*pgmap).type_ == c::memory_type_MEMORY_DEVICE_COHERENT {
                &*kernel::container_of!(owner.cast::<u8>(), Self, coherent_owner)
            } else {
                &*owner.cast()
            }
        }
    }

    /// # Safety
    ///
    /// Called by the kernel with a folio of this memory whose last reference is gone. Any context.
    unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
        // SAFETY: The folio is one of ours; the pagemaps' `drop` waits until all are free.
        let (this, pfn, order) = unsafe {
            let page = c::pinion_folio_page(folio);
            (
                Self::from_pgmap(c::pinion_device_pagemap(page)),
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
            let this = Self::from_pgmap(c::pinion_device_pagemap(page));
            let page = DevicePage(Pfn::of(page));
            (
                this,
                FaultedPage {
                    vmf: &*vmf,
                    page,
                    owner: this.private_owner(),
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
