// SPDX-License-Identifier: GPL-2.0-only

//! Migration of pages, and pinning in place.
//!
//! A migration is a state machine that cannot be left halfway:
//!
//! ```text
//!   setup_*() -> Unmapped --pin()/unpin()--> Moved --drop--> finished
//!                   |
//!                   +--drop--> every page is mapped again as it was
//! ```
//!
//! While one of the two exists, the pages are locked and mapped nowhere: CPU accesses wait.
//!
//! **Pinning in place** ([`Unmapped::pin`]) migrates the metadata of a page to a
//! device-private page and leaves the page itself, with its data, with the driver. It has two
//! implementations, chosen when the module is built (`has_migrate_pfn_pin`, see Kbuild):
//!
//! - with `MIGRATE_PFN_PIN` and `MIGRATE_PFN_UNPIN` the kernel knows what is going on;
//! - without, [`Unmapped::pin`] takes a reference of its own to the source page between `migrate_vma_pages()` and
//!   `migrate_vma_finalize()`, and clears its mapping. The latter puts only the destination on the LRU, so
//!   that the source stays where it is, with that one reference. The reverse holds for giving it back.
//!
//! C header: `include/linux/migrate.h`. Kernel document: `Documentation/mm/hmm.rst`.

use super::{
    memory::{DevicePage, FaultedPage, NewDevicePage},
    notifier::Owner,
    page::{Pfn, PinnedPage},
};
use crate::bindings as c;
use core::marker::PhantomData;
use kernel::{error::to_result, mm::MmapReadGuard, prelude::*};

const VALID: usize = c::PINION_MIGRATE_PFN_VALID;
const MIGRATE: usize = c::PINION_MIGRATE_PFN_MIGRATE;
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

/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// The source page of an entry.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    /// Which page.
    pub(crate) pfn: Pfn,
}

enum Kind {
    /// A range of a process (`migrate_vma_*`).
    Vma,
    /// Device-private pages, wherever they are mapped (`migrate_device_*`).
    Pages,
}

/// The entries of a migration of one page, which is what a fault needs. Ranges will make this an array.
struct Entries {
    args: c::migrate_vma,
    source: usize,
    destination: usize,
    kind: Kind,
}

impl Entries {
    fn new(kind: Kind) -> Self {
        Self {
            // SAFETY: All-zero is what C callers start from (`struct migrate_vma args = { 0 }`).
            args: unsafe { core::mem::zeroed() },
            source: 0,
            destination: 0,
            kind,
        }
    }

    /// Collects, locks and unmaps the page.
    ///
    /// # Safety
    ///
    /// `args` must describe one page of a vma that cannot go away, with a `fault_page` that is locked if it is
    /// set at all; or, for [`Kind::Pages`], `source` must be the frame number of a device-private page.
    unsafe fn setup(&mut self) -> Result {
        self.point();
        to_result(match self.kind {
            // SAFETY: By the contract; both arrays have room for one page.
            Kind::Vma => unsafe { c::migrate_vma_setup(&mut self.args) },
            // SAFETY: By the contract.
            Kind::Pages => unsafe { c::migrate_device_pfns(&mut self.source, 1) },
        })
    }

    /// Has the arguments point to the entries where they are now.
    fn point(&mut self) {
        self.args.src = &raw mut self.source;
        self.args.dst = &raw mut self.destination;
    }

    /// The page that is unmapped and locked for migration, if it is.
    fn source(&self) -> Option<Source> {
        let wanted = VALID | MIGRATE | PIN * usize::from(self.is_pin());
        (self.source & wanted == wanted).then(|| Source {
            // SAFETY: A valid entry is a page.
            pfn: unsafe { Pfn::new(self.source >> SHIFT) },
        })
    }

    fn is_pin(&self) -> bool {
        self.args.flags & c::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM as usize != 0
    }

    /// Moves the metadata to the destination, if there is one.
    fn pages(&mut self) {
        self.point();
        match self.kind {
            // SAFETY: `args` was set up by `migrate_vma_setup`, and its arrays are in place.
            Kind::Vma => unsafe { c::migrate_vma_pages(&mut self.args) },
            // SAFETY: `source` was set up by `migrate_device_pfns`.
            Kind::Pages => unsafe { c::migrate_device_pages(&mut self.source, &mut self.destination, 1) },
        }
    }

    /// Maps whatever page is now the right one, and unlocks everything.
    fn finalize(&mut self) {
        self.point();
        match self.kind {
            // SAFETY: `migrate_vma_pages` has been called.
            Kind::Vma => unsafe { c::migrate_vma_finalize(&mut self.args) },
            // SAFETY: `migrate_device_pages` has been called.
            Kind::Pages => unsafe { c::migrate_device_finalize(&mut self.source, &mut self.destination, 1) },
        }
    }
}

/// Pages that are unmapped and locked, and about to be migrated.
///
/// Dropping it maps them again as they were.
pub(crate) struct Unmapped<'a> {
    /// Until they are migrated.
    entries: Option<Entries>,
    _lock: PhantomData<&'a ()>,
}

/// Whether a page is anonymous memory, the only kind that can be pinned. Nothing keeps the page from being
/// freed and used for something else: this says why a page cannot be pinned, not that it can.
pub(crate) fn is_anonymous(pfn: Pfn) -> bool {
    // SAFETY: There is a page of this number; looking at its flags needs no reference.
    unsafe { c::pinion_page_is_anon(pfn.page()) }
}

/// Unmaps the page of anonymous memory at `address` in order to pin it. `actor` is what notifiers of the
/// process will see as the owner of this migration.
///
/// # Errors
///
/// EFAULT: nothing is mapped there. EINVAL: mappings of that kind do not migrate. EBUSY: the page cannot be
/// pinned now: it is not present, is not anonymous memory, or somebody else has pinned it or is working on it.
pub(crate) fn setup_pin<'a>(
    mmap: &'a MmapReadGuard<'_>,
    address: usize,
    actor: Owner,
) -> Result<Unmapped<'a>> {
    let vma = mmap.vma_lookup(address).ok_or(EFAULT)?;
    let mut inner = Entries::new(Kind::Vma);
    inner.source = PIN;
    inner.args.vma = vma.as_ptr();
    inner.args.start = address & !(PAGE_SIZE - 1);
    inner.args.end = inner.args.start + PAGE_SIZE;
    inner.args.pgmap_owner = actor.0;
    inner.args.flags = c::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM as usize;
    // SAFETY: The vma is valid while mmap_lock is held, and the range is one page in it.
    unsafe { inner.setup() }?;
    let unmapped = Unmapped {
        entries: Some(inner),
        _lock: PhantomData,
    };
    match unmapped.source() {
        Some(source) if unmapped.may_pin(source) => Ok(unmapped),
        _ => Err(EBUSY),
    }
}

/// Unmaps the device-private page on which the CPU has faulted, in order to bring it home.
///
/// # Errors
///
/// EBUSY: the page is not there any more, or somebody else is working on it; the access is to be tried again.
pub(crate) fn setup_fault<'a>(fault: &'a FaultedPage<'_>) -> Result<Unmapped<'a>> {
    let mut inner = Entries::new(Kind::Vma);
    inner.args.vma = fault.vma();
    inner.args.start = fault.address() & !(PAGE_SIZE - 1);
    inner.args.end = inner.args.start + PAGE_SIZE;
    inner.args.pgmap_owner = fault.owner().0;
    inner.args.flags = c::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE as usize;
    inner.args.fault_page = fault.page().pfn().page();
    // SAFETY: The vma is valid during the fault, the range is one page in it, and the fault has locked the page.
    unsafe { inner.setup() }?;
    let unmapped = Unmapped {
        entries: Some(inner),
        _lock: PhantomData,
    };
    if unmapped.source().is_none() {
        return Err(EBUSY);
    }
    Ok(unmapped)
}

/// Unmaps a device-private page wherever it is mapped, in order to bring it home.
///
/// Only for what cannot be reached through a process: the kernel (7.3) does not keep the page's anon_vma while
/// such a migration is under way, although `rmap_walk_anon_lock()` asks for that of users without mmap_lock.
/// If the last mapping goes meanwhile then `remove_migration_ptes()` looks at one that may be freed (KASAN has
/// seen it). A page that is not mapped any more, but not freed yet, because it is in a batch of mlock's, say,
/// is therefore not even tried.
///
/// # Errors
///
/// EBUSY: it is free or about to be, or somebody else is working on it.
pub(crate) fn setup_device_page(page: DevicePage) -> Result<Unmapped<'static>> {
    let mut inner = Entries::new(Kind::Pages);
    inner.source = page.pfn().number();
    // SAFETY: There is a page of this number.
    if !unsafe { c::pinion_page_is_mapped(page.pfn().page()) } {
        // SAFETY: Migrates nothing; all that this does is to drain the batches of this CPU.
        unsafe { c::migrate_device_pfns(&mut inner.source, 0) };
        return Err(EBUSY);
    }
    // SAFETY: `source` is the frame number of a device-private page.
    unsafe { inner.setup() }?;
    let unmapped = Unmapped {
        entries: Some(inner),
        _lock: PhantomData,
    };
    if unmapped.source().is_none() {
        return Err(EBUSY);
    }
    Ok(unmapped)
}

impl<'a> Unmapped<'a> {
    /// The page, if it is unmapped.
    pub(crate) fn source(&self) -> Option<Source> {
        self.entries.as_ref()?.source()
    }

    /// What the patched kernel has checked already.
    fn may_pin(&self, source: Source) -> bool {
        // SAFETY: The page is locked and referenced by the migration.
        KERNEL_PINS || unsafe { c::pinion_page_may_pin(source.pfn.page()) }
    }

    /// Pins the page, with `stand_in` in its place. `keep` takes it, before anybody can free the stand-in.
    ///
    /// # Errors
    ///
    /// EBUSY: it could not be pinned, and will be mapped again.
    pub(crate) fn pin(
        mut self,
        stand_in: NewDevicePage,
        keep: impl FnOnce(DevicePage, PinnedPage),
    ) -> Result<Moved<'a>> {
        let mut entries = self.entries.take().filter(Entries::is_pin).ok_or(EINVAL)?;
        let name = stand_in.name();
        entries.destination = (stand_in.into_raw().number() << SHIFT) | VALID;
        entries.pages();
        let done = entries.source & MIGRATE != 0;
        // SAFETY: The entry was valid when it was set up.
        let source = unsafe { Pfn::new(entries.source >> SHIFT) };
        let moved = Moved {
            entries,
            _lock: PhantomData,
        };
        if !done {
            return Err(EBUSY);
        }
        if !KERNEL_PINS {
            // SAFETY: The source page is still locked and referenced by the migration, mapped nowhere, and its
            // metadata has moved to the destination, so that its mapping means nothing any more. This takes
            // the reference that makes it the driver's.
            unsafe {
                c::pinion_get_page(source.page());
                c::pinion_page_clear_mapping(source.page());
            }
        }
        // SAFETY: The reference is the one just taken, or the one that the kernel hands over in finalize for an
        // entry that has been migrated with MIGRATE_PFN_PIN. The page is unmapped and isolated.
        keep(name, unsafe { PinnedPage::from_raw(source) });
        Ok(moved)
    }

    /// Gives back the page for which the unmapped one stands in, and finishes. If that fails then `keep` takes
    /// the page, before anybody can free the stand-in. Says whether it was given back.
    pub(crate) fn unpin(mut self, pinned: PinnedPage, keep: impl FnOnce(PinnedPage)) -> bool {
        let Some(mut entries) = self.entries.take_if(|entries| !entries.is_pin()) else {
            keep(pinned);
            return false;
        };
        let pfn = pinned.into_raw();
        // SAFETY: This owns the page's one reference; nobody else can hold its lock for long. A kernel without
        // MIGRATE_PFN_UNPIN drops a destination that it does not need, so give it a reference of its own.
        unsafe {
            c::pinion_lock_page(pfn.page());
            if !KERNEL_PINS {
                c::pinion_get_page(pfn.page());
            }
        }
        entries.destination = (pfn.number() << SHIFT) | VALID | UNPIN;
        entries.pages();
        let done = entries.source & MIGRATE != 0;
        let moved = Moved {
            entries,
            _lock: PhantomData,
        };
        if !done {
            // SAFETY: The page has not been used: it is as it was, with the driver's reference.
            keep(unsafe { PinnedPage::from_raw(pfn) });
            return false;
        }
        if !KERNEL_PINS {
            // No page table says that the device has written to the page; if it was marked as lazily freed,
            // reclaim would take it for unused.
            pfn.mark_dirty();
        }
        moved.finish();
        if !KERNEL_PINS {
            // SAFETY: The second reference from above.
            unsafe { c::pinion_put_page(pfn.page()) };
        }
        true
    }
}

impl Drop for Unmapped<'_> {
    fn drop(&mut self) {
        if let Some(entries) = &mut self.entries {
            // Without a destination this only marks the page as not migrated; finalize maps it again.
            entries.pages();
            entries.finalize();
        }
    }
}

/// A migration that has been carried out as far as it goes; the pages are still locked. Finishing lets the CPU
/// at them, or at what stands in for them.
#[must_use]
pub(crate) struct Moved<'a> {
    entries: Entries,
    _lock: PhantomData<&'a ()>,
}

impl Moved<'_> {
    /// Finishes, as dropping does.
    pub(crate) fn finish(self) {}
}

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        self.entries.finalize();
    }
}
