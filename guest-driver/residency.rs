// SPDX-License-Identifier: GPL-2.0-only

//! Where pages are, and how they get home.
//!
//! A page that the GPU has to itself is represented by a device-private page, which knows in which context and at which
//! address the GPU maps it. It is either pinned in place or in VRAM. Coming home always goes the same way: unmap and lock
//! the device-private page (so that nobody pins, moves or faults meanwhile), revoke the GPU's mapping, and then give the
//! very same page back, or copy the data from VRAM to a new one.
//!
//! A page in that part of VRAM that the CPU sees (coherent memory) is mirrored: any number of contexts may map it, and
//! whatever unmaps it from the CPU, our own migrations included, takes it from them too, through their notifiers. It
//! knows the context that has mapped it last, for it can be evicted through that. Only the driver brings it home.
//!
//! **Eviction.** When VRAM is full, the block (2 MiB) that has not been used for the longest time goes home: not used
//! means neither faulted on by the GPU nor moved to. That is done on behalf of a process that wants room, with no lock
//! of that process held, since it takes those of others. It reaches pages through the process that moved
//! them; those which that process cannot reach any more stay where they are until a CPU touches or frees them.

use crate::{
    address_space::AddressSpace,
    copy::{Location, Transfers},
    gpu::{Contexts, Gpu, Leaving},
    hmm::{
        memory::{Data, DeviceBlock, DeviceMemory, DevicePage, FaultedPage, Handler, Kind, Outcome, Place},
        migrate::{self, Source, Unmapped, What, MAX_PAGES},
        page::{NewSystemPage, PinnedPage},
    },
    trace,
};
use core::ops::Range;
use kernel::{
    mm::MmWithUser,
    new_spinlock,
    prelude::*,
    sync::{atomic::Relaxed, Arc, SpinLock},
    time::{delay::fsleep, Delta},
};

/// How long to wait before trying again to bring home a page that others use.
const PAUSE: Delta = Delta::from_millis(1);
/// Tries after which to say that something is in the way.
const PATIENCE: u32 = 5000;
/// Tries to get pages out of VRAM while the device still lives: what is left then is lost.
const ROUNDS: usize = 3000;
/// Tries to take away what CPUs have in a lost device's aperture before it is reset: fewer than fit into the time for which the
/// reset is put off.
const ROUNDS_BEFORE_RESET: usize = 200;
/// Pages that come home from VRAM when the CPU touches one of them: 64 KiB.
const AROUND: usize = 16;
/// Pinned pages that the CPU takes back one after the other, as they follow each other in memory, before it gets the rest of
/// their 2 MiB at once.
const MANY_IN_A_ROW: usize = 8;
/// Blocks that are evicted at most to make room for one.
const MOST_EVICTIONS: usize = 64;
/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// By whom and where a page is mapped.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// The context.
    pub(crate) context: u32,
    /// The virtual address.
    pub(crate) va: usize,
}

impl Mapped {
    /// A page that no context maps any more.
    const NOWHERE: Self = Self {
        context: u32::MAX,
        va: 0,
    };

    /// Whether `other` is the next page.
    fn precedes(self, other: Self) -> bool {
        self.context == other.context && self.va + PAGE_SIZE == other.va
    }
}

/// What device-private memory knows of the driver.
#[pin_data]
pub(crate) struct Residency {
    contexts: Arc<Contexts>,
    /// While it is there. It owns the memory, which must not own it for ever.
    #[pin]
    gpu: SpinLock<Option<Arc<Gpu>>>,
    /// What CPUs have taken back last.
    #[pin]
    streak: SpinLock<Streak>,
}

/// Pages that have come home because a CPU has touched one after the other, as they follow each other in memory.
#[derive(Clone, Copy, Default)]
struct Streak {
    /// The page that comes next.
    next: Mapped,
    /// How many there have been.
    pages: usize,
}

/// Why pages have not come home.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Trouble {
    /// They are in use by somebody else.
    Busy,
    /// There is no memory for them.
    NoMemory,
    /// The device is lost, and their data with it.
    Lost,
}

impl From<kernel::alloc::AllocError> for Trouble {
    fn from(_: kernel::alloc::AllocError) -> Self {
        Self::NoMemory
    }
}

/// Which pages are to come home.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// All.
    All,
    /// Those in VRAM.
    Vram,
    /// Those in VRAM of that kind.
    Only(Kind),
    /// Those that are pinned.
    Pins,
    /// The one with this index, which is pinned.
    Pinned(usize),
    /// All. What was in the VRAM of a lost device comes home as zeros.
    Remains,
    /// Those in the aperture of a lost device. They do not come home: the CPU gets SIGBUS where they are.
    Abandoned,
}

impl Which {
    /// Whether there can be some among the device pages of that kind.
    fn includes(self, kind: Kind) -> bool {
        match self {
            Self::Only(this) => this == kind,
            // What stands in for a pinned page is private.
            Self::Pins => kind == Kind::Private,
            Self::Abandoned => kind == Kind::Coherent,
            Self::All | Self::Vram | Self::Pinned(_) | Self::Remains => true,
        }
    }

    fn has(self, index: usize, place: Place) -> bool {
        match (self, place) {
            (Self::Remains, _) => true,
            (_, Place::Lost) | (Self::Abandoned, _) => false,
            (Self::All, _) | (Self::Vram | Self::Only(_), Place::Device(_)) => true,
            (Self::Pinned(this), Place::Pinned(_)) => this == index,
            (Self::Pins, Place::Pinned(_)) => true,
            (Self::Vram | Self::Only(_), Place::Pinned(_))
            | (Self::Pins | Self::Pinned(_), Place::Device(_)) => false,
        }
    }
}

/// A page that has been taken out of the table, to come home.
struct Traveller {
    index: usize,
    page: DevicePage,
    mapped: Mapped,
    /// What is given back. None: the data is in VRAM, and is copied, or is lost.
    pinned: Option<PinnedPage>,
    /// Nobody needs what is in VRAM.
    discarded: bool,
    lost: bool,
    home: bool,
}

/// What goes home as one folio.
struct Piece {
    index: usize,
    new: NewSystemPage,
    /// Where in VRAM it is.
    offset: u64,
    /// Somebody needs what is there.
    needed: bool,
}

/// Pages on their way home.
struct Journey<'a> {
    memory: &'a DeviceMemory<Residency>,
    travellers: KVVec<Traveller>,
    transfers: Transfers,
    /// Whoever closes one of these contexts waits for us.
    leaving: KVec<(u32, Leaving<'a>)>,
    /// Whether the next allocation is to fail: not known before the first.
    failing: Option<bool>,
}

impl<'a> Journey<'a> {
    /// One of `count` pages at most.
    fn new(memory: &'a DeviceMemory<Residency>, count: usize, which: Which) -> Result<Self, Trouble> {
        let copies = if matches!(which, Which::Pins | Which::Pinned(_)) {
            0
        } else {
            count
        };
        Ok(Self {
            memory,
            travellers: KVVec::with_capacity(count, GFP_KERNEL)?,
            transfers: Transfers::with_capacity(copies).map_err(|_| Trouble::NoMemory)?,
            leaving: KVec::new(),
            failing: None,
        })
    }

    /// Takes `page` out of the table.
    fn take(&mut self, index: usize, page: DevicePage) -> Result<(), Trouble> {
        let Some((_, note)) = self.memory.get(page) else {
            return Err(Trouble::Busy);
        };
        if !self.leaving.iter().any(|(context, _)| *context == note.context) {
            let leaving = self.memory.handler().contexts.leave(note.context);
            self.leaving.push((note.context, leaving), GFP_KERNEL)?;
        }
        self.travellers.reserve(1, GFP_KERNEL)?;
        let (data, mapped) = self.memory.take(page).ok_or(Trouble::Busy)?;
        let (discarded, lost) = (matches!(data, Data::Discarded), matches!(data, Data::Lost));
        let pinned = match data {
            Data::Device | Data::Discarded | Data::Lost => None,
            Data::Pinned(pinned) => Some(pinned),
        };
        let traveller = Traveller {
            index,
            page,
            mapped,
            pinned,
            discarded,
            lost,
            home: false,
        };
        self.travellers.push(traveller, GFP_KERNEL)?;
        Ok(())
    }

    /// Allocates memory of the system for `page`, unless the address space that has it was told to let that fail.
    fn allocate(
        &mut self,
        unmapped: &Unmapped<'_>,
        page: DevicePage,
        index: usize,
        order: u32,
    ) -> Option<NewSystemPage> {
        let memory = self.memory;
        let fails = self.failing.get_or_insert_with(|| {
            let space = memory
                .get(page)
                .and_then(|(_, mapped)| memory.handler().contexts.get(mapped.context));
            space.is_some_and(|space| space.take_failure())
        });
        if core::mem::take(fails) {
            return None;
        }
        unmapped.allocate(index, order)
    }

    /// Takes a folio in VRAM out of the table, and finds room for it at home.
    fn take_vram(
        &mut self,
        unmapped: &mut Unmapped<'_>,
        source: Source,
        page: DevicePage,
        zeros: bool,
    ) -> Result<(), Trouble> {
        let memory = self.memory;
        let large = match source.order {
            0 => None,
            order => self.allocate(unmapped, page, source.index, order),
        };
        let order = if large.is_some() { source.order } else { 0 };
        let mut large = large;
        let mut piece: Option<Piece> = None;
        let pages = memory.following(page, 1 << source.order);
        for (index, page) in (source.index..).zip(pages) {
            let first_of_piece = order == 0 || index == source.index;
            if first_of_piece {
                let new = large.take().or_else(|| self.allocate(unmapped, page, index, 0));
                // The kernel splits a folio of which the first page has somewhere to go; the others can stay.
                let Some(new) = new else {
                    if index == source.index {
                        return Err(Trouble::NoMemory);
                    }
                    continue;
                };
                self.end_piece(unmapped, piece.take())?;
                let offset = memory.offset(page).ok_or(Trouble::Busy)?;
                piece = Some(Piece {
                    index,
                    new,
                    offset,
                    needed: false,
                });
            }
            self.take(index, page)?;
            // Known from here on: whoever maps the page now does not find it in the table.
            let discarded = self.travellers.last().is_some_and(|last| last.discarded);
            if let Some(piece) = &mut piece {
                piece.needed |= !zeros && !discarded;
            }
        }
        self.end_piece(unmapped, piece)
    }

    /// Sends a piece home, with its data if that is needed.
    fn end_piece(&mut self, unmapped: &mut Unmapped<'_>, piece: Option<Piece>) -> Result<(), Trouble> {
        let Some(mut piece) = piece else { return Ok(()) };
        if piece.needed {
            let to = Location::system(piece.new.pfn().address());
            let length = (PAGE_SIZE << piece.new.order()) as u64;
            self.transfers
                .copy(Location::vram(piece.offset), to, length)
                .map_err(|_| Trouble::NoMemory)?;
        } else {
            piece.new.clear();
        }
        unmapped.send_home(piece.index, piece.new);
        Ok(())
    }

    /// Takes a page of which the data is lost out of the table, and sends zeros home.
    fn take_lost(
        &mut self,
        unmapped: &mut Unmapped<'_>,
        index: usize,
        page: DevicePage,
    ) -> Result<(), Trouble> {
        let mut new = unmapped.allocate(index, 0).ok_or(Trouble::NoMemory)?;
        self.take(index, page)?;
        new.clear();
        unmapped.send_home(index, new);
        Ok(())
    }

    /// Calls `each` for the address spaces in which the pages are mapped, with how many follow each other from where on.
    fn for_each_run(&self, mut each: impl FnMut(&AddressSpace, Range<usize>)) {
        for run in self
            .travellers
            .chunk_by(|one, next| one.mapped.precedes(next.mapped))
        {
            if let Some(space) = self.memory.handler().contexts.get(run[0].mapped.context) {
                let start = run[0].mapped.va;
                each(&space, start..start + run.len() * PAGE_SIZE);
            }
        }
    }

    /// Counts those that have come home.
    fn count(&self) {
        for run in self
            .travellers
            .chunk_by(|one, next| one.mapped.context == next.mapped.context)
        {
            let Some(space) = self.memory.handler().contexts.get(run[0].mapped.context) else {
                continue;
            };
            let home = run.iter().filter(|traveller| traveller.home);
            let (vram, pinned) = home.fold((0, 0), |(vram, pinned), traveller| {
                match self.memory.offset(traveller.page) {
                    Some(_) => (vram + 1, pinned),
                    None => (vram, pinned + 1),
                }
            });
            space.statistics().unpins.add(pinned, Relaxed);
            space.statistics().from_vram.add(vram, Relaxed);
            // The first address: which of the run have come home is not told one by one.
            let (gpu, context, va) = (space.gpu().number(), space.context(), run[0].mapped.va as u64);
            if pinned > 0 {
                trace::unpin(gpu, context, va, pinned as u64);
            }
            if vram > 0 {
                trace::migrate_home(gpu, context, va, vram as u64);
            }
        }
    }

    /// Takes note that the pages from `index` on have got home.
    fn arrive(&mut self, index: usize, count: usize) {
        for traveller in self.find(index..index + count) {
            traveller.home = true;
        }
    }

    /// Those with indices in `range`. (They are sorted by index.)
    fn find(&mut self, range: Range<usize>) -> &mut [Traveller] {
        let first = self
            .travellers
            .partition_point(|traveller| traveller.index < range.start);
        let end = self
            .travellers
            .partition_point(|traveller| traveller.index < range.end);
        &mut self.travellers[first..end]
    }

    /// Puts those back into the table that stay where they were.
    fn put_back(&mut self) {
        for traveller in self.travellers.iter_mut().filter(|traveller| !traveller.home) {
            let data = match traveller.pinned.take() {
                Some(pinned) => Data::Pinned(pinned),
                None if traveller.lost => Data::Lost,
                None if traveller.discarded => Data::Discarded,
                None => Data::Device,
            };
            self.memory.set(traveller.page, data, traveller.mapped);
        }
    }
}

impl Residency {
    /// Pages of the address spaces in `contexts`.
    pub(crate) fn new(contexts: Arc<Contexts>) -> impl PinInit<Self> {
        pin_init!(Self {
            contexts,
            gpu <- new_spinlock!(None, "Residency::gpu"),
            streak <- new_spinlock!(Streak::default(), "Residency::streak"),
        })
    }

    /// How many pages a CPU has taken back in a row that ends where it touches `mapped` now.
    fn in_a_row(&self, mapped: Mapped) -> usize {
        let streak = *self.streak.lock();
        if streak.next == mapped {
            streak.pages
        } else {
            0
        }
    }

    /// Takes note that it gets what there is of the `around` pages about `mapped`, after so many in a row.
    fn continue_row(&self, mapped: Mapped, around: usize, row: usize) {
        let size = around * PAGE_SIZE;
        let end = (mapped.va & !(size - 1)) + size;
        *self.streak.lock() = Streak {
            next: Mapped { va: end, ..mapped },
            pages: row + (end - mapped.va) / PAGE_SIZE,
        };
    }

    /// Takes note that what comes next is not part of a row.
    fn end_row(&self) {
        *self.streak.lock() = Streak::default();
    }

    /// Says which device it is, or that there is none any more.
    pub(crate) fn set_gpu(&self, gpu: Option<Arc<Gpu>>) {
        let old = core::mem::replace(&mut *self.gpu.lock(), gpu);
        // Not under the lock: it can be the last.
        drop(old);
    }

    /// The device.
    fn gpu(&self) -> Option<Arc<Gpu>> {
        self.gpu.lock().clone()
    }

    /// Brings home what is unmapped, as far as it is wanted. Returns how many pages have come home.
    ///
    /// While this runs, the pages are counted as on their way, for whoever waits until none is left.
    fn bring_home(
        memory: &DeviceMemory<Self>,
        mut unmapped: Unmapped<'_>,
        which: Which,
    ) -> Result<usize, Trouble> {
        let gpu = memory.handler().gpu().ok_or(Trouble::Lost)?;
        let zeros = which == Which::Remains && gpu.is_lost();
        let mut journey = Journey::new(memory, unmapped.len(), which)?;
        let mut trouble = Trouble::Busy;
        for index in 0..unmapped.len() {
            let Some(source) = unmapped.get(index) else {
                continue;
            };
            let What::Device(page) = source.what else {
                continue;
            };
            let result = match memory.get(page) {
                Some((place, _)) if which.has(index, place) => match place {
                    Place::Pinned(_) => journey.take(index, page),
                    Place::Device(_) => journey.take_vram(&mut unmapped, source, page, zeros),
                    Place::Lost => journey.take_lost(&mut unmapped, index, page),
                },
                _ => continue,
            };
            if let Err(reason) = result {
                trouble = reason;
                break;
            }
        }
        // First taken, then revoked: whoever is about to map a page elsewhere (after mremap) either has said
        // so already, and is found here, or finds that it is gone. The pages are locked, so nobody else takes them.
        journey.for_each_run(|space, range| space.revoke(range));
        if let Err(error) = gpu.transfer(&journey.transfers) {
            dev_dbg!(gpu.device(), "pages cannot be copied from VRAM: {:?}\n", error);
            journey.put_back();
            return Err(Trouble::Lost);
        }
        for traveller in &mut journey.travellers {
            if let Some(pinned) = traveller.pinned.take() {
                unmapped.give_back(traveller.index, pinned);
            }
        }
        let moved = unmapped.advance(|index, outcome| match outcome {
            migrate::Outcome::Home(order) => journey.arrive(index, 1 << order),
            migrate::Outcome::Stayed(Some(pinned)) => {
                if let [traveller] = journey.find(index..index + 1) {
                    traveller.pinned = Some(pinned);
                }
            }
            _ => {}
        });
        // Before anybody can free the pages.
        journey.put_back();
        moved.finish();
        journey.count();
        match journey
            .travellers
            .iter()
            .filter(|traveller| traveller.home)
            .count()
        {
            0 => Err(trouble),
            count => Ok(count),
        }
    }

    /// Brings home what is in `range` of the process with `mm`, which must not go beyond [`MAX_PAGES`] pages; returns how
    /// many pages have. `whatever` is in the way is left where it is.
    ///
    /// With `wait`, waits for mmap_lock, so that no lock of another process must be held.
    pub(crate) fn home(
        memory: &DeviceMemory<Self>,
        mm: &MmWithUser,
        range: Range<usize>,
        which: Which,
        wait: bool,
    ) -> Result<usize, Trouble> {
        let mut start = range.start;
        let mut count = 0;
        while start < range.end {
            let mmap = if wait {
                mm.mmap_read_lock()
            } else {
                mm.mmap_read_trylock().ok_or(Trouble::Busy)?
            };
            // Area by area. What is not mapped is not anywhere.
            let Some(vma) = mmap.vma_lookup(start).filter(|vma| vma.start() <= start) else {
                start += PAGE_SIZE;
                continue;
            };
            let end = vma.end().min(range.end);
            for kind in Kind::ALL {
                let Some(owner) = memory.owner(kind).filter(|_| which.includes(kind)) else {
                    continue;
                };
                // Nothing is looked for in vain: for coherent pages that would take away what the GPU mirrors there.
                if kind == Kind::Coherent && memory.usage(kind).used == 0 {
                    continue;
                }
                match migrate::setup_home(&mmap, start..end, kind, owner) {
                    Ok(unmapped) if which == Which::Abandoned => count += Self::lose(memory, unmapped),
                    Ok(unmapped) => match Self::bring_home(memory, unmapped, which) {
                        Ok(home) => count += home,
                        Err(Trouble::Busy) => {}
                        Err(other) => return Err(other),
                    },
                    Err(error) if error == ENOMEM => return Err(Trouble::NoMemory),
                    // Areas of a kind that nothing migrates from.
                    Err(_) => {}
                }
            }
            start = end;
        }
        Ok(count)
    }

    /// Where the pages of `pages` are mapped: pages that follow each other as one.
    pub(crate) fn runs(
        memory: &DeviceMemory<Self>,
        pages: impl Iterator<Item = DevicePage>,
    ) -> Result<KVVec<(Mapped, usize)>> {
        let mut runs: KVVec<(Mapped, usize)> = KVVec::new();
        for page in pages {
            let Some((_, mapped)) = memory.get(page) else {
                continue;
            };
            match runs.last_mut() {
                Some((first, count))
                    if *count < MAX_PAGES
                        && first.context == mapped.context
                        && first.va + *count * PAGE_SIZE == mapped.va =>
                {
                    *count += 1;
                }
                _ => runs.push((mapped, 1), GFP_KERNEL)?,
            }
        }
        Ok(runs)
    }

    /// Sends those pages of `block` home, as far as their processes can reach them. Returns how many have gone.
    fn evict(gpu: &Gpu, block: DeviceBlock, which: Which) -> usize {
        let memory = gpu.memory();
        let Ok(runs) = Self::runs(memory, memory.pages_of(block)) else {
            return 0;
        };
        let mut count = 0;
        for (mapped, pages) in &runs {
            let Some(space) = gpu.contexts().get(mapped.context) else {
                continue;
            };
            let gone = space.home(mapped.va..mapped.va + pages * PAGE_SIZE, which, false);
            let gone = gone.unwrap_or(0);
            if which == Which::Abandoned {
                continue;
            }
            space.statistics().evictions.add(gone as i64, Relaxed);
            trace::evict(gpu.number(), mapped.context, mapped.va as u64, gone as u64);
            count += gone;
        }
        count
    }

    /// Makes room for `pages` pages in VRAM of that kind, for a whole block if that many are wanted. Says whether there is room
    /// now, which somebody else may take.
    ///
    /// Takes locks of other processes: none of any process may be held.
    pub(crate) fn make_room(gpu: &Gpu, kind: Kind, pages: usize) -> bool {
        let memory = gpu.memory();
        for _ in 0..MOST_EVICTIONS {
            if memory.has_room(kind, pages) {
                return true;
            }
            let Some(block) = memory.coldest(kind) else {
                return false;
            };
            Self::evict(gpu, block, Which::Only(kind));
        }
        memory.has_room(kind, pages)
    }

    /// Brings home the pages of `space`, which the device does not access any more, as far as its process
    /// can reach them. The others (moved by mremap, or shared with a child that has outlived the
    /// process) belong to nobody from now on, and come home when a CPU touches them.
    pub(crate) fn release(gpu: &Gpu, space: &AddressSpace) {
        let memory = gpu.memory();
        let mine = |mapped: &Mapped| mapped.context == space.context();
        let mut run = Mapped::NOWHERE.va..Mapped::NOWHERE.va;
        memory.for_each(mine, |page| {
            let Some((_, mapped)) = memory.get(page) else {
                return;
            };
            if run.end == mapped.va && run.len() < MAX_PAGES * PAGE_SIZE {
                run.end += PAGE_SIZE;
                return;
            }
            let _ = space.home(run.clone(), Which::All, true);
            run = mapped.va..mapped.va + PAGE_SIZE;
        });
        let _ = space.home(run, Which::All, true);
        // After this nobody revokes a mapping of that context, whose number will be used again.
        // A page is on its way for as long as revoking it takes, which is bounded.
        while gpu.contexts().leaving(space.context()) > 0 {
            fsleep(PAUSE);
        }
        memory.for_each(mine, |page| {
            if let Some((place, _)) = memory.get(page) {
                memory.update(page, place, mine, Mapped::NOWHERE);
            }
        });
    }

    /// Brings home what is in VRAM, while the device can still copy it. Nothing gets there any more.
    pub(crate) fn evacuate(gpu: &Gpu) {
        gpu.memory().close_device();
        let _ = Self::vacate(gpu, ROUNDS);
    }

    /// Brings home what is in VRAM, whoever has it there, in `rounds` at most. Says whether it is all home, which it need not stay.
    /// Takes locks of processes: none of any process may be held.
    pub(crate) fn vacate(gpu: &Gpu, rounds: usize) -> bool {
        let memory = gpu.memory();
        for _ in 0..rounds {
            for block in memory.blocks_in_use() {
                Self::evict(gpu, block, Which::Only(memory.kind_of(block)));
                if memory.used_in(block) == 0 || gpu.is_lost() {
                    continue;
                }
                // What its process cannot reach, and what somebody else has been using just now.
                if let Ok(unmapped) = migrate::setup_device_pages(memory.pages_of(block)) {
                    let _ = Self::bring_home(memory, unmapped, Which::Vram);
                }
            }
            if memory.used() == 0 {
                return true;
            }
            if gpu.is_lost() {
                return false;
            }
            fsleep(PAUSE);
        }
        false
    }

    /// Has what is unmapped represented by pages on which the CPU faults, and finds nothing. Returns how many.
    fn lose(memory: &DeviceMemory<Self>, mut unmapped: Unmapped<'_>) -> usize {
        let Ok(mut journey) = Journey::new(memory, unmapped.len(), Which::Pinned(0)) else {
            return 0;
        };
        for index in 0..unmapped.len() {
            let What::Device(page) = unmapped.get(index).map_or(What::Hole, |source| source.what) else {
                continue;
            };
            let Ok(stand_in) = memory.allocate_for_lost() else {
                break;
            };
            if journey.take(index, page).is_ok() {
                unmapped.send_away(index, stand_in);
            }
        }
        let mut count = 0;
        let moved = unmapped.advance(|index, outcome| {
            if let (migrate::Outcome::Away(page, _), [traveller]) = (outcome, journey.find(index..index + 1))
            {
                memory.set(page, Data::Lost, traveller.mapped);
                traveller.home = true;
                count += 1;
            }
        });
        journey.put_back();
        moved.finish();
        count
    }

    /// The device is lost, and has perhaps not been reset: does of [`Self::abandon`] what takes nothing of the device, and is
    /// not the last word. Pages that were being moved when the device was lost are locked until they are back where they were;
    /// so it looks again, for as long as the reset is put off at most.
    pub(crate) fn begin_to_abandon(gpu: &Gpu) {
        let memory = gpu.memory();
        memory.close_device();
        for _ in 0..ROUNDS_BEFORE_RESET {
            for block in memory.blocks_in_use() {
                if memory.kind_of(block) == Kind::Coherent {
                    Self::evict(gpu, block, Which::Abandoned);
                }
            }
            if memory.usage(Kind::Coherent).used == 0 {
                return;
            }
            fsleep(PAUSE);
        }
    }

    /// The device is lost and has been reset, so that there is no telling what the CPU sees in the aperture: takes away what
    /// processes have there. Whoever touches it gets SIGBUS.
    pub(crate) fn abandon(gpu: &Gpu) {
        let memory = gpu.memory();
        memory.close_device();
        for _ in 0..ROUNDS {
            for block in memory.blocks_in_use() {
                if memory.kind_of(block) != Kind::Coherent {
                    continue;
                }
                Self::evict(gpu, block, Which::Abandoned);
                if memory.used_in(block) > 0 {
                    // What its process cannot reach, as in `evacuate`.
                    if let Ok(unmapped) = migrate::setup_device_pages(memory.pages_of(block)) {
                        Self::lose(memory, unmapped);
                    }
                }
            }
            if memory.usage(Kind::Coherent).used == 0 {
                return;
            }
            fsleep(PAUSE);
        }
        let left = memory.usage(Kind::Coherent).used;
        dev_err!(
            gpu.device(),
            "{} lost pages are in use by others and stay mapped\n",
            left
        );
    }

    /// Brings home every page. The device does not access memory any more, and nothing is being pinned.
    /// There is no giving up: the struct pages that stand in for them are about to go away. If there still is something in
    /// VRAM then it is lost, and zeros take its place.
    pub(crate) fn evict_all(gpu: &Gpu) {
        let memory = gpu.memory();
        let lost = memory.used();
        if lost > 0 {
            dev_err!(gpu.device(), "the data of {} pages in VRAM is lost\n", lost);
        }
        memory.for_each(
            |_| true,
            |page| {
                let mapped = memory.get(page).map(|(_, mapped)| mapped);
                if let Some((space, mapped)) =
                    mapped.and_then(|mapped| Some((gpu.contexts().get(mapped.context)?, mapped)))
                {
                    let _ = space.home(mapped.va..mapped.va + PAGE_SIZE, Which::All, true);
                }
            },
        );
        let mut round = 0u32;
        loop {
            // Who is on the way is not in the table, and can come back to it behind the back of whoever walks over it. And what somebody is
            // moving or pinning right now has no data yet, and is not found: but it is in use, and will have.
            let contexts = gpu.contexts();
            let departures = contexts.departures();
            let leaving = contexts.all_leaving();
            let left = Self::evict_once(gpu) + leaving;
            let left = left.max(memory.used() + memory.pinned());
            if left == 0 && contexts.departures() == departures {
                return;
            }
            round = round.wrapping_add(1);
            if round % PATIENCE == 0 {
                dev_warn!(gpu.device(), "waiting for {} pages to come home\n", left);
            }
            fsleep(PAUSE);
        }
    }

    /// Brings home every page; returns how many are in use by others for the moment (a CPU fault, somebody
    /// who walks over them).
    fn evict_once(gpu: &Gpu) -> usize {
        let memory = gpu.memory();
        let mut left = 0;
        memory.for_each(
            |_| true,
            |page| {
                let folio = memory.following(page, 1 << page.order());
                let home = migrate::setup_device_pages(folio)
                    .is_ok_and(|unmapped| Self::bring_home(memory, unmapped, Which::Remains).is_ok());
                left += usize::from(!home);
            },
        );
        left
    }
}

impl Handler for Residency {
    type PageData = Mapped;

    fn migrate_to_ram(memory: &DeviceMemory<Self>, fault: &FaultedPage<'_>) -> Outcome {
        let handler = memory.handler();
        let found = memory.get(fault.page());
        let row = found.map_or(0, |(_, mapped)| handler.in_a_row(mapped));
        // What is pinned next to it the GPU may still be busy with; what is in VRAM comes in pieces. But a CPU that goes
        // through memory does not get each piece by a fault and a round trip of its own.
        let (around, which) = match found {
            Some((Place::Device(_), _)) if row >= AROUND => (MAX_PAGES, Which::Vram),
            Some((Place::Device(_), _)) => (AROUND, Which::Vram),
            Some((Place::Lost, _)) => return Outcome::Lost,
            _ if row >= MANY_IN_A_ROW => (MAX_PAGES, Which::All),
            _ => (1, Which::Pinned(0)),
        };
        match migrate::setup_fault(fault, around) {
            Ok(unmapped) => match Self::bring_home(memory, unmapped, which) {
                Ok(_) => {
                    if let Some((_, mapped)) = found {
                        handler.continue_row(mapped, around, row);
                    }
                    Outcome::Done
                }
                // A page that could not be brought home is where it was; the CPU tries again.
                Err(Trouble::Busy) => Outcome::Done,
                Err(Trouble::NoMemory) => Outcome::OutOfMemory,
                // What is lost is something next to it in VRAM. The CPU tries again, and gets this page alone.
                Err(Trouble::Lost) if around > 1 && matches!(found, Some((Place::Pinned(_), _))) => {
                    handler.end_row();
                    Outcome::Done
                }
                Err(Trouble::Lost) => Outcome::Lost,
            },
            Err(error) if error == EBUSY => Outcome::Done,
            Err(error) if error == ENOMEM => Outcome::OutOfMemory,
            Err(_) => Outcome::Lost,
        }
    }
}
