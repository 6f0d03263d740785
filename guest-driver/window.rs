// SPDX-License-Identifier: GPL-2.0-only

//! What the GPU maps of 2 MiB of an address space.

use crate::{
    abi,
    address_space::Statistics,
    gpu::Gpu,
    hmm::{
        memory::Kind,
        notifier::{Event, Mirror, Owner},
    },
    trace,
};
use core::ops::Range;
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
};

/// Bytes of a page.
pub(crate) const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;
/// Bytes of a window.
pub(crate) const WINDOW_SIZE: usize = 2 << 20;
/// Pages of a window.
pub(crate) const WINDOW_PAGES: usize = WINDOW_SIZE / PAGE_SIZE;

/// What the GPU maps of 2 MiB.
///
/// # Invariants
///
/// The GPU's page table, and whatever the device remembers of it, gives no more rights to a page than `rights` says. If
/// `large`, then it may be one entry that gives them.
pub(crate) struct Window {
    gpu: Arc<Gpu>,
    context: u32,
    base: usize,
    /// Bits 1 to 3 of the page table entry (`abi::PTE_READ` and so on), or 0; and [`EXCLUSIVE`].
    rights: [u8; WINDOW_PAGES],
    /// How many of them are not 0.
    mapped: usize,
    /// Everything is mapped by one entry.
    large: bool,
    /// What these do to pages leaves this mirror as it is: they see to it themselves.
    ours: [Owner; 2],
    statistics: Arc<Statistics>,
}

impl Mirror for Window {
    fn ignores(&self, event: &Event<'_>) -> bool {
        // Coherent pages of a lost device go to nobody else: it does not matter whether it still maps them, and whoever takes
        // them away must not wait for its reset, which waits for that.
        let abandoned = |owner| self.gpu.is_lost() && event.is_by(owner);
        self.ours.iter().any(|owner| event.is_by(*owner))
            || self.gpu.memory().owner(Kind::Coherent).is_some_and(abandoned)
    }

    fn invalidate(&mut self, range: Range<usize>, may_wait: bool) -> bool {
        let Some(pages) = self.mapped_in(range) else {
            return true;
        };
        if !may_wait {
            return false;
        }
        self.statistics.invalidations.add(1, Relaxed);
        self.clear(pages);
        true
    }
}

impl Window {
    /// One of which the GPU maps nothing.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        context: u32,
        base: usize,
        ours: [Owner; 2],
        statistics: &Arc<Statistics>,
    ) -> Self {
        Self {
            gpu: gpu.clone(),
            context,
            base,
            rights: [0; WINDOW_PAGES],
            mapped: 0,
            large: false,
            ours,
            statistics: statistics.clone(),
        }
    }

    fn page(&self, va: usize) -> usize {
        (va - self.base) / PAGE_SIZE
    }

    fn va(&self, page: usize) -> u64 {
        (self.base + page * PAGE_SIZE) as u64
    }

    /// The smallest run of pages that has in it everything that is mapped of `range`.
    fn mapped_in(&self, range: Range<usize>) -> Option<Range<usize>> {
        if self.mapped == 0 {
            return None;
        }
        let start = range.start.clamp(self.base, self.base + WINDOW_SIZE);
        let end = range.end.clamp(self.base, self.base + WINDOW_SIZE);
        let pages = self.page(start)..self.page(end.next_multiple_of(PAGE_SIZE));
        let rights = self.rights.get(pages.clone())?;
        let first = rights.iter().position(|rights| *rights != 0)?;
        let last = rights.iter().rposition(|rights| *rights != 0)?;
        Some(pages.start + first..pages.start + last + 1)
    }

    /// Has the GPU forget `pages`, and with them all others if they are mapped by one entry.
    fn clear(&mut self, pages: Range<usize>) {
        let pages = if self.large { 0..WINDOW_PAGES } else { pages };
        // INVARIANT: After this, the device gives no rights to these pages.
        self.gpu
            .invalidate(self.context, self.va(pages.start)..self.va(pages.end));
        let count = pages.len() as u64;
        trace::invalidate(self.gpu.number(), self.context, self.va(pages.start), count);
        for rights in &mut self.rights[pages] {
            self.mapped -= usize::from(*rights != 0);
            *rights = 0;
        }
        self.large = false;
    }

    /// Takes what is mapped of `range` away from the GPU.
    pub(crate) fn take_back(&mut self, range: Range<usize>) {
        if let Some(pages) = self.mapped_in(range) {
            self.clear(pages);
        }
    }

    fn note(&mut self, page: usize, rights: u8) {
        let old = core::mem::replace(&mut self.rights[page], rights);
        self.mapped -= usize::from(old != 0);
        self.mapped += usize::from(rights != 0);
    }

    /// Maps `entries` from `va` on, those that are not zero, and lets the accesses go on that are stalled on `faults`.
    ///
    /// What an entry replaces must lead to the same page, or to none.
    pub(crate) fn map(&mut self, va: usize, entries: &[u64], faults: &[u64]) -> Result {
        if let Some(entry) = as_large(entries).filter(|_| self.gpu.has_large_pages()) {
            // INVARIANT: Noted first, for it may be known whatever becomes of the request.
            for page in 0..WINDOW_PAGES {
                self.note(page, entry as u8 & RIGHTS);
            }
            self.large = true;
            match self.gpu.map(self.context, self.va(0), &[entry], true, faults) {
                Err(error) if error == EOPNOTSUPP => self.large = false,
                other => return other,
            }
        }
        if self.large {
            // The device forgets a large page in which a small one is written, though not at once.
            self.clear(0..WINDOW_PAGES);
        }
        let mut first = self.page(va);
        let mut rest = entries;
        loop {
            let hole = rest.iter().take_while(|entry| **entry == 0).count();
            rest = &rest[hole..];
            first += hole;
            // A zero clears what is there. Where nothing is, it does no harm, and saves a request.
            let keeps = |(page, entry): (usize, &u64)| *entry == 0 && self.rights[page] != 0;
            let run = (first..).zip(rest).position(keeps).unwrap_or(rest.len());
            let (run, after) = rest.split_at(run);
            let last = after.iter().all(|entry| *entry == 0);
            let used = run
                .iter()
                .rposition(|entry| *entry != 0)
                .map_or(0, |last| last + 1);
            // INVARIANT: As above.
            for (page, entry) in (first..).zip(run) {
                self.note(page, *entry as u8 & RIGHTS);
            }
            let faults = if last { faults } else { &[] };
            if used == 0 {
                return faults
                    .iter()
                    .try_for_each(|fault| self.gpu.replay(self.context, *fault));
            }
            self.gpu
                .map(self.context, self.va(first), &run[..used], false, faults)?;
            if last {
                return Ok(());
            }
            first += run.len();
            rest = after;
        }
    }

    /// What the GPU may do at `va`.
    pub(crate) fn rights(&self, va: usize) -> u8 {
        self.rights[self.page(va)] & RIGHTS
    }

    /// Notes that what is mapped at `va` was made exclusive to the GPU, which the CPU's page table does not tell without
    /// undoing it. Forgotten with the mapping.
    pub(crate) fn set_exclusive(&mut self, va: usize) {
        let page = self.page(va);
        if self.rights[page] != 0 {
            self.rights[page] |= EXCLUSIVE;
        }
    }

    /// Whether what is mapped at `va` was made exclusive to the GPU, and is so still: the notifier comes before that ends.
    pub(crate) fn is_exclusive(&self, va: usize) -> bool {
        self.rights[self.page(va)] & EXCLUSIVE != 0
    }

    /// Whether it is one entry that maps everything.
    pub(crate) fn is_large(&self) -> bool {
        self.large
    }
}

/// The bits of an entry that are rights.
const RIGHTS: u8 = (abi::PTE_READ | abi::PTE_WRITE | abi::PTE_ATOMIC) as u8;
/// A mark of a page, which is in none of its rights.
const EXCLUSIVE: u8 = 1 << 7;

/// The entry of a large page that means the same as `entries`, if there is one.
fn as_large(entries: &[u64]) -> Option<u64> {
    let first = *entries.first()?;
    let alike = |(index, entry): (usize, &u64)| *entry == first + (index * PAGE_SIZE) as u64;
    let aligned = (first & abi::PTE_ADDRESS) % abi::LARGE_PAGE_SIZE == 0;
    (first != 0 && aligned && entries.len() == WINDOW_PAGES && entries.iter().enumerate().all(alike))
        .then_some(first)
}
