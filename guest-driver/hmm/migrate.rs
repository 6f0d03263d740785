// SPDX-License-Identifier: GPL-2.0-only

//! Migration of pages between the system and a device, and pinning in place.
//!
//! A migration is a state machine that cannot be left halfway:
//!
//! ```text
//!   setup_*() -> Unmapped --(destinations are set, data is copied)--> advance() -> Moved --drop--> finished
//!                   |
//!                   +--drop--> every page is mapped again as it was
//! ```
//!
//! While one of the two exists, the pages are locked and mapped nowhere: CPU accesses wait. What has no destination, or
//! does not get there, is mapped again as it was. Between `advance()` and the end the pages are the new ones already, but
//! nobody can access them yet: it is then that a device gets them into its page table.
//!
//! A range is up to 2 MiB. Folios of 512 pages migrate as one (`MIGRATE_VMA_SELECT_COMPOUND`) if they get a
//! destination of that size, and are split by the kernel if they get small ones.
//!
//! **Pinning in place** migrates the metadata of a page to a device-private page and leaves the page itself, with its
//! data, with the driver. It has two implementations, chosen when the module is built (`has_migrate_pfn_pin`, see
//! Kbuild):
//!
//! - with `MIGRATE_PFN_PIN` and `MIGRATE_PFN_UNPIN` the kernel knows what is going on;
//! - without, [`Unmapped::advance`] takes a reference of its own to the source page between `migrate_vma_pages()` and
//!   `migrate_vma_finalize()`. The latter puts only the destination on the LRU, so that the source stays where it is, with that
//!   one reference, and a mapping that means nothing any more: who would look at it asks for LRU pages. The reverse holds for
//!   giving it back.
//!
//! A folio is always split to be pinned: its pages go home one by one.
//!
//! C header: `include/linux/migrate.h`. Kernel document: `Documentation/mm/hmm.rst`.

use super::{
    blocks::{BLOCK_ORDER, BLOCK_PAGES},
    memory::{DevicePage, FaultedPage, Kind as MemoryKind, NewDevicePage},
    notifier::Owner,
    page::{NewSystemPage, Pfn, PinnedPage},
};
use crate::bindings as c;
use core::{marker::PhantomData, ops::Range};
use kernel::{bindings, error::to_result, mm::MmapReadGuard, prelude::*};

const VALID: usize = c::PINION_MIGRATE_PFN_VALID;
const MIGRATE: usize = c::PINION_MIGRATE_PFN_MIGRATE;
const WRITE: usize = c::PINION_MIGRATE_PFN_WRITE;
const COMPOUND: usize = c::PINION_MIGRATE_PFN_COMPOUND;
const SHIFT: usize = c::PINION_MIGRATE_PFN_SHIFT;

#[cfg(has_migrate_pfn_pin)]
const PIN: usize = c::PINION_MIGRATE_PFN_PIN;
#[cfg(not(has_migrate_pfn_pin))]
const PIN: usize = 0;
#[cfg(has_migrate_pfn_pin)]
const UNPIN: usize = c::PINION_MIGRATE_PFN_UNPIN;
#[cfg(not(has_migrate_pfn_pin))]
const UNPIN: usize = 0;

/// Whether the kernel pins pages in place itself.
pub(crate) const KERNEL_PINS: bool = cfg!(has_migrate_pfn_pin);

/// Most pages of a migration.
pub(crate) const MAX_PAGES: usize = BLOCK_PAGES;
/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;
/// Bytes of a large folio.
const BLOCK_SIZE: usize = BLOCK_PAGES * PAGE_SIZE;
/// Bits of a word of a map.
const BITS: usize = u64::BITS as usize;

/// What is to become of pages of the system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// They stay where they are, with the driver.
    Pin,
    /// They are copied to device pages.
    Move,
}

/// What an entry of a migration is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// Nothing is there yet (or only zeros).
    Hole,
    /// A system page.
    System(Pfn),
    /// A device page, private or coherent.
    Device(DevicePage),
}

/// An entry that is unmapped and locked, and can migrate.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    /// How many pages it is after the beginning of the range.
    pub(crate) index: usize,
    /// What is there.
    pub(crate) what: What,
    /// Base-2 logarithm of its number of pages: 0, or that of a block.
    pub(crate) order: u32,
    /// Whether the process may write to it.
    pub(crate) writable: bool,
}

/// What has become of an entry that had a destination.
pub(crate) enum Outcome {
    /// It is represented by this device page, and those that follow up to the order.
    Away(DevicePage, u32),
    /// It is represented by this device-private page, and is itself the driver's now.
    Pinned(DevicePage, PinnedPage),
    /// It is a page of the system again, as are those that follow up to the order.
    Home(u32),
    /// It stays what it was. The page that was to be given back, if it was one, is the driver's again.
    Stayed(Option<PinnedPage>),
}

enum Kind {
    /// A range of a process (`migrate_vma_*`).
    Vma,
    /// Device pages, wherever they are mapped (`migrate_device_*`).
    Pages,
}

/// The entries of a migration.
///
/// # Invariants
///
/// `source` and `destination` are equally long; between `setup` and `finalize`, `args` points to them.
struct Entries {
    args: c::migrate_vma,
    source: KVec<usize>,
    destination: KVec<usize>,
    /// Which destinations are pages that have been pinned, as bits.
    given_back: [u64; MAX_PAGES / BITS],
    kind: Kind,
    purpose: Purpose,
}

impl Entries {
    fn new(kind: Kind, source: KVec<usize>) -> Result<Self> {
        let destination = KVec::from_elem(0, source.len(), GFP_KERNEL)?;
        Ok(Self {
            // SAFETY: All-zero is what C callers start from (`struct migrate_vma args = { 0 }`).
            args: unsafe { core::mem::zeroed() },
            source,
            destination,
            given_back: [0; MAX_PAGES / BITS],
            kind,
            purpose: Purpose::Move,
        })
    }

    /// A range of a process.
    fn range(
        vma: *mut bindings::vm_area_struct,
        range: Range<usize>,
        owner: Owner,
        flags: c::migrate_vma_direction,
        fill: usize,
    ) -> Result<Self> {
        let count = (range.end - range.start) / PAGE_SIZE;
        if count > MAX_PAGES {
            return Err(EINVAL);
        }
        let mut this = Self::new(Kind::Vma, KVec::from_elem(fill, count, GFP_KERNEL)?)?;
        this.args.vma = vma;
        this.args.start = range.start;
        this.args.end = range.end;
        this.args.pgmap_owner = owner.0;
        this.args.flags = flags as usize;
        Ok(this)
    }

    /// Collects, locks and unmaps the pages.
    ///
    /// # Safety
    ///
    /// `args` must describe a range of a vma that cannot go away, with a `fault_page` that is locked if it is
    /// set at all; or, for [`Kind::Pages`], `source` must be the frame numbers of device-private pages.
    unsafe fn setup(&mut self) -> Result {
        // INVARIANT: The buffers are not reallocated.
        self.args.src = self.source.as_mut_ptr();
        self.args.dst = self.destination.as_mut_ptr();
        to_result(match self.kind {
            // SAFETY: By the contract; both arrays have room for the range.
            Kind::Vma => unsafe { c::migrate_vma_setup(&mut self.args) },
            // SAFETY: By the contract.
            Kind::Pages => unsafe { c::migrate_device_pfns(self.args.src, self.source.len()) },
        })
    }

    fn given_back(&self, index: usize) -> bool {
        self.given_back[index / BITS] & 1 << (index % BITS) != 0
    }

    /// The entry, if it can migrate.
    fn get(&self, index: usize) -> Option<Source> {
        let entry = *self.source.get(index)?;
        let pin = self.purpose == Purpose::Pin;
        let wanted = MIGRATE | if pin { VALID | PIN } else { 0 };
        if entry & wanted != wanted {
            return None;
        }
        let what = if entry & VALID == 0 {
            What::Hole
        } else {
            // SAFETY: A valid entry is a page.
            let pfn = unsafe { Pfn::new(entry >> SHIFT) };
            DevicePage::from_pfn(pfn).map_or(What::System(pfn), What::Device)
        };
        let writable = match what {
            // SAFETY: The vma is valid while this exists. (What is not of a vma has no holes.)
            What::Hole => unsafe { c::pinion_vma_is_writable(self.args.vma) },
            _ => entry & WRITE != 0,
        };
        Some(Source {
            index,
            what,
            order: if entry & COMPOUND != 0 { BLOCK_ORDER } else { 0 },
            writable,
        })
    }

    /// Moves the metadata to the destinations, where there are any.
    fn pages(&mut self) {
        match self.kind {
            // SAFETY: `args` was set up by `migrate_vma_setup`, and its arrays are in place.
            Kind::Vma => unsafe { c::migrate_vma_pages(&mut self.args) },
            // SAFETY: `source` was set up by `migrate_device_pfns`.
            Kind::Pages => unsafe {
                c::migrate_device_pages(self.args.src, self.args.dst, self.source.len())
            },
        }
    }

    /// Maps whatever page is now the right one, and unlocks everything.
    fn finalize(&mut self) {
        match self.kind {
            // SAFETY: `migrate_vma_setup` has been called, and nothing in between has got lost.
            Kind::Vma => unsafe { c::migrate_vma_finalize(&mut self.args) },
            // SAFETY: `migrate_device_pfns` has been called, and nothing in between has got lost.
            Kind::Pages => unsafe {
                c::migrate_device_finalize(self.args.src, self.args.dst, self.source.len())
            },
        }
        if KERNEL_PINS {
            return;
        }
        for index in 0..self.destination.len() {
            if self.given_back(index) && self.source[index] & MIGRATE != 0 {
                // SAFETY: The second reference from `give_back`, which finalize would have dropped otherwise.
                unsafe { c::pinion_put_page(Pfn::new(self.destination[index] >> SHIFT).page()) };
            }
        }
    }
}

/// Pages that are unmapped and locked, and about to be migrated.
///
/// Dropping it maps them again as they were, except that pages which were to be given back are, since for these there is
/// nothing to wait for.
pub(crate) struct Unmapped<'a> {
    /// Until they are migrated.
    entries: Option<Entries>,
    _lock: PhantomData<&'a ()>,
}

/// Whether a page is anonymous memory, the only kind that can be pinned or moved. Nothing keeps the page from being
/// freed and used for something else: this says why a page cannot be pinned, not that it can.
pub(crate) fn is_anonymous(pfn: Pfn) -> bool {
    // SAFETY: There is a page of this number; looking at its flags needs no reference.
    unsafe { c::pinion_page_is_anon(pfn.page()) }
}

/// Unmaps the pages of anonymous memory in `range`, as far as it is in the same area as its beginning, in order to
/// migrate them. `actor` is what notifiers of the process will see as the owner of this migration.
///
/// What cannot be migrated now is left out: what is not present (if it is to be pinned), is not anonymous memory, is
/// not the system's, or is pinned or being worked on by somebody else.
///
/// # Errors
///
/// EFAULT: nothing is mapped there. EINVAL: mappings of that kind do not migrate.
pub(crate) fn setup_range<'a>(
    mmap: &'a MmapReadGuard<'_>,
    range: Range<usize>,
    actor: Owner,
    purpose: Purpose,
) -> Result<Unmapped<'a>> {
    let vma = mmap
        .vma_lookup(range.start)
        .filter(|vma| vma.start() <= range.start)
        .ok_or(EFAULT)?;
    let range = range.start..range.end.min(vma.end());
    // A private mapping of a file has pages of anonymous memory where the process has written.
    // SAFETY: The area is valid while mmap_lock is held.
    if purpose == Purpose::Move && unsafe { c::pinion_vma_is_shared(vma.as_ptr()) } {
        return Err(EINVAL);
    }
    let system = c::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM;
    let mut entries = match purpose {
        Purpose::Pin => Entries::range(vma.as_ptr(), range, actor, system, PIN),
        Purpose::Move => {
            // Where there is nothing yet, a folio of 512 pages would come into being.
            // SAFETY: As above.
            let flags = if unsafe { c::pinion_vma_may_have_huge_pages(vma.as_ptr()) } {
                system | c::migrate_vma_direction_MIGRATE_VMA_SELECT_COMPOUND
            } else {
                system
            };
            Entries::range(vma.as_ptr(), range, actor, flags, 0)
        }
    }?;
    entries.purpose = purpose;
    // SAFETY: The vma is valid while mmap_lock is held, and the range is in it.
    unsafe { Unmapped::setup(entries) }
}

/// Unmaps the device pages of `owner`, which are of that kind, in `range`, as far as it is in the same area as its beginning, in
/// order to bring them home.
///
/// # Errors
///
/// As [`setup_range`].
pub(crate) fn setup_home<'a>(
    mmap: &'a MmapReadGuard<'_>,
    range: Range<usize>,
    kind: MemoryKind,
    owner: Owner,
) -> Result<Unmapped<'a>> {
    let vma = mmap
        .vma_lookup(range.start)
        .filter(|vma| vma.start() <= range.start)
        .ok_or(EFAULT)?;
    let range = range.start..range.end.min(vma.end());
    let flags = match kind {
        MemoryKind::Private => {
            c::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE
                | c::migrate_vma_direction_MIGRATE_VMA_SELECT_COMPOUND
        }
        MemoryKind::Coherent => c::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_COHERENT,
    };
    let entries = Entries::range(vma.as_ptr(), range, owner, flags, 0)?;
    // SAFETY: The vma is valid while mmap_lock is held, and the range is in it.
    unsafe { Unmapped::setup(entries) }
}

/// Unmaps the device-private page on which the CPU has faulted, in order to bring it home: the whole folio if it
/// is mapped as one, else up to `around` pages (a power of two) about it that are the same owner's.
///
/// # Errors
///
/// EBUSY: the page is not there any more, or somebody else is working on it; the access is to be tried again.
pub(crate) fn setup_fault<'a>(fault: &'a FaultedPage<'_>, around: usize) -> Result<Unmapped<'a>> {
    let mut flags = c::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE;
    let size = if fault.is_huge() {
        flags |= c::migrate_vma_direction_MIGRATE_VMA_SELECT_COMPOUND;
        BLOCK_SIZE
    } else if fault.page().order() > 0 {
        // Mapped in pieces: the kernel splits it.
        PAGE_SIZE
    } else {
        around * PAGE_SIZE
    };
    // SAFETY: The vma is valid during the fault.
    let (first, end) = unsafe {
        (
            (*fault.vma()).__bindgen_anon_1.__bindgen_anon_1.vm_start,
            (*fault.vma()).__bindgen_anon_1.__bindgen_anon_1.vm_end,
        )
    };
    let base = fault.address() & !(size - 1);
    let range = base.max(first)..(base + size).min(end);
    let mut entries = Entries::range(fault.vma(), range.clone(), fault.owner(), flags, 0)?;
    entries.args.fault_page = fault.page().pfn().page();
    // SAFETY: The vma is valid during the fault, the range is in it, and the fault has locked the page.
    let unmapped = unsafe { Unmapped::setup(entries) }?;
    let index = if fault.is_huge() {
        0
    } else {
        (fault.address() - range.start) / PAGE_SIZE
    };
    match unmapped.get(index) {
        Some(_) => Ok(unmapped),
        None => Err(EBUSY),
    }
}

/// Unmaps device pages wherever they are mapped, in order to bring them home.
///
/// Only for what cannot be reached through a process: the kernel (7.3) does not keep the page's anon_vma while
/// such a migration is under way, although `rmap_walk_anon_lock()` asks for that of users without mmap_lock.
/// If the last mapping goes meanwhile then `remove_migration_ptes()` looks at one that may be freed (KASAN has
/// seen it). A page that is not mapped any more, but not freed yet, because it is in a batch of mlock's, say,
/// is therefore not even tried.
///
/// # Errors
///
/// EBUSY: none of them can be migrated: they are free or about to be, or somebody else is working on them.
pub(crate) fn setup_device_pages(pages: impl Iterator<Item = DevicePage>) -> Result<Unmapped<'static>> {
    let mut source = KVec::with_capacity(MAX_PAGES, GFP_KERNEL)?;
    let mut skip = 0;
    for page in pages {
        if skip > 0 {
            skip -= 1;
            continue;
        }
        let count = 1 << page.order();
        // SAFETY: There is a page of this number.
        if unsafe { c::pinion_page_is_mapped(page.pfn().page()) } && source.len() + count <= MAX_PAGES {
            // The kernel looks only at the first one of a folio, but wants room for all.
            for index in 0..count {
                source.push(page.pfn().number() + index, GFP_KERNEL)?;
            }
            skip = count - 1;
        }
    }
    let nothing = source.is_empty();
    let mut entries = Entries::new(Kind::Pages, source)?;
    // SAFETY: `source` has the frame numbers of device-private pages. Without any, all that this does is to drain the
    // batches of this CPU.
    unsafe { entries.setup() }?;
    let unmapped = Unmapped {
        entries: Some(entries),
        _lock: PhantomData,
    };
    if nothing || unmapped.sources().next().is_none() {
        return Err(EBUSY);
    }
    Ok(unmapped)
}

impl<'a> Unmapped<'a> {
    /// # Safety
    ///
    /// As for [`Entries::setup`], for as long as `'a`.
    unsafe fn setup(mut entries: Entries) -> Result<Self> {
        // SAFETY: By the contract.
        unsafe { entries.setup() }?;
        Ok(Self {
            entries: Some(entries),
            _lock: PhantomData,
        })
    }

    /// How many pages it is long.
    pub(crate) fn len(&self) -> usize {
        self.entries.as_ref().map_or(0, |entries| entries.source.len())
    }

    /// The entry that many pages after the beginning, if it can migrate.
    pub(crate) fn get(&self, index: usize) -> Option<Source> {
        let entries = self.entries.as_ref()?;
        let source = entries.get(index)?;
        match source.what {
            What::System(pfn) => {
                // The patched kernel has checked this already.
                let pinnable = KERNEL_PINS || entries.purpose != Purpose::Pin || {
                    // SAFETY: The page is locked and referenced by the migration.
                    unsafe { c::pinion_page_may_pin(pfn.page()) }
                };
                // The kernel would go on comparing such a page with others, for which it has to read it.
                // SAFETY: As above.
                let compared = unsafe { c::pinion_page_is_ksm(pfn.page()) };
                (pinnable && !compared && is_anonymous(pfn)).then_some(source)
            }
            _ => Some(source),
        }
    }

    /// The entries that can migrate.
    pub(crate) fn sources(&self) -> impl Iterator<Item = Source> + '_ {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    /// Allocates memory of the system for the entry that many pages after the beginning to go home to.
    pub(crate) fn allocate(&self, index: usize, order: u32) -> Option<NewSystemPage> {
        let entries = self.entries.as_ref()?;
        if entries.args.vma.is_null() {
            // A folio that is not reached through a process goes as it is: the kernel splits it for a process only.
            return NewSystemPage::anywhere(order);
        }
        // SAFETY: The vma is valid while this exists.
        unsafe { NewSystemPage::new(entries.args.vma, entries.args.start + index * PAGE_SIZE, order) }
    }

    fn set_destination(&mut self, index: usize, pfn: Pfn, order: u32, flags: usize) -> Option<()> {
        let entries = self.entries.as_mut()?;
        let slot = entries.destination.get_mut(index)?;
        let compound = if order > 0 { COMPOUND } else { 0 };
        *slot = (pfn.number() << SHIFT) | VALID | compound | flags;
        Some(())
    }

    /// Has the entry migrate to a device folio, of the same order or less. Its data has to get there before
    /// [`Self::advance`], unless it is pinned.
    pub(crate) fn send_away(&mut self, index: usize, page: NewDevicePage) {
        let order = page.order();
        let pfn = page.into_raw();
        // Nothing comes of an index that is not there, but for a page that stays locked for ever.
        let _ = self.set_destination(index, pfn, order, 0);
    }

    /// Has the entry, which is a device page, migrate to a folio of the system, of the same order or less. Its data has
    /// to get there before [`Self::advance`].
    pub(crate) fn send_home(&mut self, index: usize, page: NewSystemPage) {
        let order = page.order();
        let pfn = page.into_raw();
        let _ = self.set_destination(index, pfn, order, 0);
    }

    /// Gives back the page for which the entry stands in.
    pub(crate) fn give_back(&mut self, index: usize, page: PinnedPage) {
        let pfn = page.into_raw();
        // SAFETY: This owns the page's one reference; nobody else can hold its lock for long. A kernel without
        // MIGRATE_PFN_UNPIN drops a destination that it does not need, so give it a reference of its own; and it
        // takes a destination for new memory, so the mapping that the page had goes. (Not before: as long as entries of page tables
        // lead to the page, for which it is being migrated, whoever removes one looks there for what to take it off of.)
        unsafe {
            c::pinion_lock_page(pfn.page());
            if !KERNEL_PINS {
                c::pinion_get_page(pfn.page());
                c::pinion_page_clear_mapping(pfn.page());
            }
        }
        let _ = self.set_destination(index, pfn, 0, UNPIN);
        if let Some(entries) = &mut self.entries {
            entries.given_back[index / BITS] |= 1 << (index % BITS);
        }
    }

    /// Migrates the metadata of all entries that have got a destination. `each` hears what has become of them, by how
    /// many pages they are after the beginning; it takes pages that are the driver's from now on, before anybody can
    /// free what stands in for them.
    pub(crate) fn advance(mut self, mut each: impl FnMut(usize, Outcome)) -> Moved<'a> {
        let mut entries = self.entries.take();
        if let Some(entries) = &mut entries {
            carry_out(entries, &mut each);
        }
        Moved {
            entries,
            _lock: PhantomData,
        }
    }
}

/// Migrates metadata. See [`Unmapped::advance`].
fn carry_out(entries: &mut Entries, each: &mut dyn FnMut(usize, Outcome)) {
    entries.pages();
    for index in 0..entries.destination.len() {
        let (source, destination) = (entries.source[index], entries.destination[index]);
        if destination & VALID == 0 {
            continue;
        }
        // SAFETY: A valid destination is a page.
        let pfn = unsafe { Pfn::new(destination >> SHIFT) };
        if source & MIGRATE == 0 {
            let kept = entries.given_back(index).then(|| {
                // SAFETY: The page has not been used: it is as it was, with the driver's reference.
                unsafe { PinnedPage::from_raw(pfn) }
            });
            each(index, Outcome::Stayed(kept));
            continue;
        }
        let order = if destination & COMPOUND != 0 {
            BLOCK_ORDER
        } else {
            0
        };
        let Some(page) = DevicePage::from_pfn(pfn) else {
            // No page table says that the device has written to it; if it was marked as lazily freed, reclaim would
            // take it for unused.
            pfn.mark_dirty();
            each(index, Outcome::Home(order));
            continue;
        };
        if entries.purpose == Purpose::Move {
            each(index, Outcome::Away(page, order));
            continue;
        }
        // SAFETY: The entry was valid when it was set up, and has migrated.
        let source = unsafe { Pfn::new(source >> SHIFT) };
        if !KERNEL_PINS {
            // SAFETY: The source page is still locked and referenced by the migration. This takes the reference that makes
            // it the driver's.
            unsafe { c::pinion_get_page(source.page()) };
        }
        // SAFETY: The reference is the one just taken, or the one that the kernel hands over in finalize for an
        // entry that has been migrated with MIGRATE_PFN_PIN. The page is unmapped and isolated.
        let pinned = unsafe { PinnedPage::from_raw(source) };
        each(index, Outcome::Pinned(page, pinned));
    }
}

impl Drop for Unmapped<'_> {
    fn drop(&mut self) {
        let Some(entries) = &mut self.entries else {
            return;
        };
        let mut any = false;
        for index in 0..entries.source.len() {
            if entries.given_back(index) {
                any = true;
                continue;
            }
            // Finalize maps it again.
            entries.source[index] &= !MIGRATE;
            let destination = core::mem::replace(&mut entries.destination[index], 0);
            if destination & VALID != 0 {
                // SAFETY: A valid destination is a page. It was locked and had one reference when it was set.
                unsafe {
                    let page = Pfn::new(destination >> SHIFT).page();
                    c::pinion_unlock_page(page);
                    c::pinion_put_page(page);
                }
            }
        }
        if any {
            carry_out(entries, &mut |_, outcome| {
                if let Outcome::Stayed(Some(pinned)) = outcome {
                    // It is as if it were mapped nowhere; better to lose the page than to free it.
                    core::mem::forget(pinned);
                    pr_err!("a page could not be given back\n");
                }
            });
        }
        entries.finalize();
    }
}

/// A migration that has been carried out as far as it goes; the pages are still locked. Finishing lets the CPU
/// at them, or at what stands in for them.
#[must_use]
pub(crate) struct Moved<'a> {
    entries: Option<Entries>,
    _lock: PhantomData<&'a ()>,
}

impl Moved<'_> {
    /// Finishes, as dropping does.
    pub(crate) fn finish(self) {}
}

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        if let Some(entries) = &mut self.entries {
            entries.finalize();
        }
    }
}
