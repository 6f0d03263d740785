// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The page table of one context: four levels of 512 entries over 48 bits, the lowest of which a large
//! page does without.
//!
//! Nodes are made when an entry below them becomes valid and given up when the last one is cleared, so
//! that every operation, a clear of the whole space too, costs no more than what is there.

use std::mem;

use pinion_abi::{
    LARGE_PAGE_SHIFT, LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PTE_ADDRESS, PTE_MASK, PTE_VALID, VA_END,
};

use super::status::Error;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicUsize, Ordering};

const INDEX_BITS: u32 = 9;
const FANOUT: usize = 1 << INDEX_BITS;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
/// Bits of a virtual address below one entry of a node of each level.
const SMALL_SHIFT: u32 = PAGE_SHIFT as u32;
const LARGE_SHIFT: u32 = LARGE_PAGE_SHIFT as u32;
const TOP_SHIFT: u32 = SMALL_SHIFT + 3 * INDEX_BITS;

const _: () = assert!(LARGE_SHIFT == SMALL_SHIFT + INDEX_BITS);

/// Most nodes in the page table of one context.
pub const MAX_NODES_PER_CONTEXT: usize = 1 << 14;
/// Most nodes in all page tables of the device. A lowest one takes 4 KiB, others 8: 512 MiB at most.
pub const MAX_NODES: usize = 1 << 16;

/// A valid entry, and the size of the page that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The entry.
    pub pte: u64,
    /// Base-2 logarithm of the size of the page: [`PAGE_SHIFT`] or [`LARGE_PAGE_SHIFT`].
    pub shift: u8,
}

impl Translation {
    /// Size of the page in bytes.
    pub fn page_size(self) -> u64 {
        1_u64.wrapping_shl(self.shift.into())
    }

    fn offset_mask(self) -> u64 {
        self.page_size().wrapping_sub(1)
    }

    /// The guest physical address, or offset into VRAM, that `va`, which is in the page, leads to.
    pub fn address_of(self, va: u64) -> u64 {
        (self.pte & PTE_ADDRESS & !self.offset_mask()) | (va & self.offset_mask())
    }

    /// How many bytes there are from `va` to the end of its page; at least one.
    pub fn left_in_page(self, va: u64) -> u64 {
        self.page_size().wrapping_sub(va & self.offset_mask())
    }
}

/// How many nodes the page tables of the device may have in all.
#[derive(Debug)]
pub struct Budget {
    left: AtomicUsize,
}

impl Budget {
    /// A budget of `nodes`.
    pub fn new(nodes: usize) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(nodes),
        })
    }

    /// How many nodes may still be made.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

/// What a table counts its nodes with.
#[derive(Debug)]
struct Account {
    budget: Arc<Budget>,
    nodes: usize,
    limit: usize,
}

impl Account {
    /// Takes all of `nodes`, or after an error none.
    fn take(&mut self, nodes: usize) -> Result<(), Error> {
        let sum = self.nodes.checked_add(nodes).ok_or(Error::Limit)?;
        if nodes == 0 {
            return Ok(());
        }
        if sum > self.limit {
            return Err(Error::Limit);
        }
        self.budget
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(nodes)
            })
            .map_err(|_| Error::Limit)?;
        self.nodes = sum;
        Ok(())
    }

    /// Gives back all but `nodes`.
    fn keep(&mut self, nodes: usize) {
        let spare = self.nodes.saturating_sub(nodes);
        if spare > 0 {
            self.nodes = nodes;
            self.budget.left.fetch_add(spare, Ordering::Relaxed);
        }
    }
}

/// A node of the lowest level: the entries of small pages, zero where there is none.
#[derive(Debug)]
struct Leaf {
    /// How many entries are not zero.
    used: usize,
    entries: [u64; FANOUT],
}

/// A node of another level.
#[derive(Debug)]
struct Inner {
    /// How many slots are not empty.
    used: usize,
    /// Number of nodes at and below this one.
    total: usize,
    slots: [Slot; FANOUT],
}

/// What an entry of an [`Inner`] leads to. Above the level of large pages there are inner nodes only, at it
/// leaves and large pages.
#[derive(Debug, Default)]
enum Slot {
    #[default]
    Empty,
    Large(u64),
    Leaf(Box<Leaf>),
    Inner(Box<Inner>),
}

/// Nodes that were taken out of a table. To free many of them takes a while, in which nobody should
/// have to wait for the table's lock.
#[must_use = "this is to be dropped when the table is not locked any more"]
#[derive(Debug, Default)]
pub struct Garbage(#[allow(dead_code, reason = "it is there to be dropped")] Vec<Slot>);

/// Entries of pages that follow each other.
#[derive(Clone, Copy)]
struct Run<'a> {
    va: u64,
    entries: &'a [u64],
    /// Base-2 logarithm of the size of their pages.
    shift: u32,
}

impl<'a> Run<'a> {
    fn has_valid(&self) -> bool {
        self.entries.iter().any(|entry| entry & PTE_VALID != 0)
    }

    /// The part of it that one entry of a node covers, and the entry's index.
    fn pieces(self, shift: u32) -> impl Iterator<Item = (usize, Run<'a>)> {
        let mut rest = self;
        std::iter::from_fn(move || {
            let (va, entries) = (rest.va, rest.entries);
            let next = ((va >> shift).wrapping_add(1)) << shift;
            let count = (next.wrapping_sub(va) >> rest.shift) as usize;
            let (now, later) = entries.split_at_checked(count).unwrap_or((entries, &[]));
            if now.is_empty() {
                return None;
            }
            rest.va = next;
            rest.entries = later;
            let piece = Run {
                entries: now,
                va,
                ..rest
            };
            Some((index(va, shift), piece))
        })
    }
}

/// The part of a range that one entry of a node covers, and the entry's index.
fn pieces(start: u64, end: u64, shift: u32) -> impl Iterator<Item = (usize, u64, u64)> {
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let next = ((at >> shift).wrapping_add(1)) << shift;
        let piece = (index(at, shift), at, next.min(end));
        at = next;
        Some(piece)
    })
}

/// The index of the entry for `va` in a node.
fn index(va: u64, shift: u32) -> usize {
    ((va >> shift) & INDEX_MASK) as usize
}

/// The entry as it is kept: whatever is not valid is zero.
fn kept(entry: u64) -> u64 {
    if entry & PTE_VALID != 0 { entry } else { 0 }
}

impl Leaf {
    fn new() -> Self {
        Self {
            used: 0,
            entries: [0; FANOUT],
        }
    }

    fn put(&mut self, run: Run<'_>) {
        let slots = self.entries.iter_mut().skip(index(run.va, SMALL_SHIFT));
        for (slot, &entry) in slots.zip(run.entries) {
            let entry = kept(entry);
            self.used = self
                .used
                .saturating_add(usize::from(entry != 0))
                .saturating_sub(usize::from(*slot != 0));
            *slot = entry;
        }
    }

    /// Clears `start..end`.
    fn clear(&mut self, start: u64, end: u64) {
        let slots = self.entries.iter_mut().skip(index(start, SMALL_SHIFT));
        for slot in slots.take((end.saturating_sub(start) >> SMALL_SHIFT) as usize) {
            self.used = self.used.saturating_sub(usize::from(*slot != 0));
            *slot = 0;
        }
    }
}

impl Slot {
    /// An empty node, whose entries are `shift` bits wide.
    fn node(shift: u32) -> Self {
        if shift == SMALL_SHIFT {
            Self::Leaf(Box::new(Leaf::new()))
        } else {
            Self::Inner(Box::new(Inner::new()))
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// Number of nodes at and below it.
    fn total(&self) -> usize {
        match self {
            Self::Empty | Self::Large(_) => 0,
            Self::Leaf(_) => 1,
            Self::Inner(inner) => inner.total,
        }
    }

    /// Puts something else here.
    fn replace(&mut self, new: Self, garbage: &mut Garbage) {
        let old = mem::replace(self, new);
        if old.total() > 0 {
            garbage.0.push(old);
        }
    }

    /// Gives up a node in which nothing is left.
    fn prune(&mut self, garbage: &mut Garbage) {
        let unused = match self {
            Self::Empty | Self::Large(_) => false,
            Self::Leaf(leaf) => leaf.used == 0,
            Self::Inner(inner) => inner.used == 0,
        };
        if unused {
            self.replace(Self::Empty, garbage);
        }
    }

    /// Puts in `run`, which is all in this slot of `shift` bits.
    fn put(&mut self, run: Run<'_>, shift: u32, garbage: &mut Garbage) {
        if shift == run.shift {
            let entry = run.entries.first().copied().map_or(0, kept);
            let new = if entry == 0 {
                Self::Empty
            } else {
                Self::Large(entry)
            };
            self.replace(new, garbage);
            return;
        }
        let below = shift.saturating_sub(INDEX_BITS);
        if let Self::Empty | Self::Large(_) = self {
            *self = if run.has_valid() {
                Self::node(below)
            } else {
                Self::Empty
            };
        }
        match self {
            Self::Empty | Self::Large(_) => {}
            Self::Leaf(leaf) => leaf.put(run),
            Self::Inner(inner) => inner.put(run, below, garbage),
        }
        self.prune(garbage);
    }

    /// Clears `start..end`, which is all in this slot of `shift` bits.
    fn clear(&mut self, start: u64, end: u64, shift: u32, garbage: &mut Garbage) {
        let below = shift.saturating_sub(INDEX_BITS);
        match self {
            Self::Empty => {}
            Self::Large(_) => *self = Self::Empty,
            // The whole of it: gone without a look at what is inside.
            _ if end.saturating_sub(start) == 1 << shift => self.replace(Self::Empty, garbage),
            Self::Leaf(leaf) => leaf.clear(start, end),
            Self::Inner(inner) => inner.clear(start, end, below, garbage),
        }
        self.prune(garbage);
    }
}

impl Inner {
    fn new() -> Self {
        Self {
            used: 0,
            total: 1,
            slots: [const { Slot::Empty }; FANOUT],
        }
    }

    fn get(&self, va: u64) -> Option<Translation> {
        let mut node = self;
        let mut shift = TOP_SHIFT;
        loop {
            match node.slots.get(index(va, shift))? {
                Slot::Empty => return None,
                Slot::Inner(inner) => node = inner,
                &Slot::Large(pte) => {
                    return Some(Translation {
                        pte,
                        shift: LARGE_PAGE_SHIFT,
                    });
                }
                Slot::Leaf(leaf) => {
                    let pte = *leaf.entries.get(index(va, SMALL_SHIFT))?;
                    return (pte != 0).then_some(Translation {
                        pte,
                        shift: PAGE_SHIFT,
                    });
                }
            }
            shift = shift.saturating_sub(INDEX_BITS);
        }
    }

    /// Does something to one slot, and counts what became of it.
    fn change(&mut self, index: usize, action: impl FnOnce(&mut Slot)) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let (empty, total) = (slot.is_empty(), slot.total());
        action(slot);
        self.used = self
            .used
            .saturating_add(usize::from(empty))
            .saturating_sub(usize::from(slot.is_empty()));
        self.total = self.total.saturating_add(slot.total()).saturating_sub(total);
    }

    fn put(&mut self, run: Run<'_>, shift: u32, garbage: &mut Garbage) {
        for (index, run) in run.pieces(shift) {
            self.change(index, |slot| slot.put(run, shift, garbage));
        }
    }

    fn clear(&mut self, start: u64, end: u64, shift: u32, garbage: &mut Garbage) {
        for (index, start, end) in pieces(start, end, shift) {
            self.change(index, |slot| slot.clear(start, end, shift, garbage));
        }
    }
}

/// How many nodes below `node`, which need not be there itself, have to be made for the valid entries
/// of `run`.
fn missing(node: Option<&Inner>, run: Run<'_>, shift: u32) -> usize {
    if shift == run.shift {
        return 0;
    }
    let below = shift.saturating_sub(INDEX_BITS);
    let one = |(index, run): (usize, Run<'_>)| {
        if !run.has_valid() {
            return 0;
        }
        match node.and_then(|node| node.slots.get(index)) {
            Some(Slot::Leaf(_)) => 0,
            Some(Slot::Inner(inner)) => missing(Some(inner), run, below),
            Some(Slot::Empty | Slot::Large(_)) | None => missing(None, run, below).saturating_add(1),
        }
    };
    run.pieces(shift).map(one).sum()
}

/// A page table.
#[derive(Debug)]
pub struct PageTable {
    root: Box<Inner>,
    account: Account,
}

/// Checks that `va..va + length` is made of pages of the address space.
pub fn check_range(va: u64, length: u64) -> Result<u64, Error> {
    if (va | length) & (PAGE_SIZE - 1) != 0 {
        return Err(Error::Invalid);
    }
    match va.checked_add(length) {
        Some(end) if end <= VA_END => Ok(end),
        _ => Err(Error::BadAddress),
    }
}

impl PageTable {
    /// An empty table, which takes its nodes from `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self::with_limit(budget, MAX_NODES_PER_CONTEXT)
    }

    /// An empty table of at most `limit` nodes.
    pub fn with_limit(budget: Arc<Budget>, limit: usize) -> Self {
        // The topmost node is part of the context and not counted.
        Self {
            root: Box::new(Inner::new()),
            account: Account {
                budget,
                nodes: 0,
                limit,
            },
        }
    }

    /// The valid entry for the page that `va` is in, if there is one.
    pub fn get(&self, va: u64) -> Option<Translation> {
        if va >= VA_END { None } else { self.root.get(va) }
    }

    /// Writes `entries` from the page at `va` on, a large one if `large`: all of them, or after an error
    /// none.
    ///
    /// What is there of the other size goes: the small pages below a large entry, valid or not, and the
    /// whole of a large page in which a small one is written, valid or not. The nodes for valid entries
    /// must be within the limits before any that have become empty are given up.
    pub fn write(&mut self, va: u64, entries: &[u64], large: bool) -> Result<Garbage, Error> {
        let (shift, size) = if large {
            (LARGE_SHIFT, LARGE_PAGE_SIZE)
        } else {
            (SMALL_SHIFT, PAGE_SIZE)
        };
        if va & size.wrapping_sub(1) != 0 {
            return Err(Error::Invalid);
        }
        let length = (entries.len() as u64)
            .checked_mul(size)
            .ok_or(Error::BadAddress)?;
        check_range(va, length)?;
        let mask = PTE_MASK & !(PTE_ADDRESS & size.wrapping_sub(1));
        if entries.iter().any(|&entry| kept(entry) & !mask != 0) {
            return Err(Error::Invalid);
        }
        let run = Run { va, entries, shift };
        self.account.take(missing(Some(&self.root), run, TOP_SHIFT))?;
        let mut garbage = Garbage::default();
        self.root.put(run, TOP_SHIFT, &mut garbage);
        self.account.keep(self.root.total.saturating_sub(1));
        Ok(garbage)
    }

    /// Clears the pages of `va..end`, which [`check_range`] has approved of; a large page that is partly in
    /// it whole.
    pub fn clear(&mut self, va: u64, end: u64) -> Garbage {
        let mut garbage = Garbage::default();
        self.root.clear(va, end.min(VA_END), TOP_SHIFT, &mut garbage);
        self.account.keep(self.root.total.saturating_sub(1));
        garbage
    }

    /// How many nodes there are below the topmost one.
    pub fn nodes(&self) -> usize {
        self.account.nodes
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        self.account.keep(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_abi::{PTE_READ, PTE_WRITE};
    use std::collections::{BTreeMap, BTreeSet};

    const ENTRY: u64 = PTE_VALID | PTE_READ | PTE_WRITE;
    const LARGE: u64 = LARGE_PAGE_SIZE;

    fn table() -> PageTable {
        PageTable::new(Budget::new(MAX_NODES))
    }

    fn small(pte: u64) -> Option<Translation> {
        Some(Translation { pte, shift: 12 })
    }

    fn large(pte: u64) -> Option<Translation> {
        Some(Translation { pte, shift: 21 })
    }

    fn put(table: &mut PageTable, va: u64, entries: &[u64], large: bool) {
        drop(table.write(va, entries, large).unwrap());
    }

    fn refusal(table: &mut PageTable, va: u64, entries: &[u64], large: bool) -> Error {
        table.write(va, entries, large).map(drop).unwrap_err()
    }

    #[test]
    fn nodes_are_as_large_as_the_limits_say() {
        assert!(size_of::<Leaf>() <= 4096 + 64);
        assert!(size_of::<Inner>() <= 8192 + 64);
    }

    #[test]
    fn a_translation_knows_its_page() {
        let of = |shift| Translation {
            pte: ENTRY | (1 << 63) | 0x1_2340_0000,
            shift,
        };
        let va = 0x5_4321_0123;
        assert_eq!(of(12).page_size(), PAGE_SIZE);
        assert_eq!(of(12).address_of(va), 0x1_2340_0123);
        assert_eq!(of(12).left_in_page(va), 0x1000 - 0x123);
        assert_eq!(of(21).page_size(), LARGE);
        assert_eq!(of(21).address_of(va), 0x1_2341_0123);
        assert_eq!(of(21).left_in_page(va), LARGE - 0x1_0123);
        assert_eq!(of(21).left_in_page(LARGE), LARGE);
    }

    #[test]
    fn an_entry_is_found_in_its_page_only() {
        let mut table = table();
        let va = 0x1234_5678_9000;
        put(&mut table, va, &[ENTRY | 0x7000], false);
        assert_eq!(table.get(va), small(ENTRY | 0x7000));
        assert_eq!(table.get(va + 0xfff), small(ENTRY | 0x7000));
        assert_eq!(table.get(va + 0x1000), None);
        assert_eq!(table.get(va - 1), None);
        assert_eq!(table.nodes(), 3);
        let va = 0x2234_5660_0000;
        put(&mut table, va, &[ENTRY | (7 * LARGE)], true);
        assert_eq!(table.get(va), large(ENTRY | (7 * LARGE)));
        assert_eq!(table.get(va + LARGE - 1), large(ENTRY | (7 * LARGE)));
        assert_eq!(table.get(va + LARGE), None);
        assert_eq!(table.get(va - 1), None);
        assert_eq!(table.nodes(), 5);
    }

    #[test]
    fn ends_of_the_address_space() {
        for (size, is_large) in [(PAGE_SIZE, false), (LARGE, true)] {
            let mut table = table();
            put(&mut table, VA_END - size, &[ENTRY], is_large);
            put(&mut table, 0, &[ENTRY], is_large);
            assert_eq!(table.get(VA_END - 1).unwrap().pte, ENTRY);
            assert_eq!(table.get(0).unwrap().page_size(), size);
            assert_eq!(table.get(VA_END), None);
            assert_eq!(table.get(u64::MAX), None);
            for (va, error) in [
                (VA_END, Error::BadAddress),
                (VA_END - size, Error::BadAddress),
                (!(size - 1), Error::BadAddress),
                (8, Error::Invalid),
                (size / 2, Error::Invalid),
            ] {
                assert_eq!(refusal(&mut table, va, &[ENTRY; 2], is_large), error, "{va:x}");
                assert_eq!(refusal(&mut table, va, &[0; 2], is_large), error, "{va:x}");
            }
        }
    }

    #[test]
    fn nodes_are_given_back() {
        let budget = Budget::new(MAX_NODES);
        let mut table = PageTable::new(budget.clone());
        for n in 0..50_u64 {
            put(&mut table, n << 33, &[ENTRY; 300], n % 3 == 0);
        }
        assert!(table.nodes() >= 50);
        drop(table.clear(0, VA_END));
        assert_eq!(table.nodes(), 0);
        assert_eq!(budget.left(), MAX_NODES);
        for is_large in [false, true] {
            put(&mut table, LARGE, &[ENTRY], is_large);
            put(&mut table, LARGE, &[0], is_large);
            assert_eq!(table.nodes(), 0);
        }
        put(&mut table, 0x1000, &[ENTRY], false);
        drop(table);
        assert_eq!(budget.left(), MAX_NODES);
    }

    #[test]
    fn at_the_limit_a_write_changes_nothing() {
        let budget = Budget::new(MAX_NODES);
        let mut table = PageTable::with_limit(budget.clone(), 4);
        put(&mut table, 0x1ff000, &[ENTRY], false);
        assert_eq!(table.nodes(), 3);
        put(&mut table, 0x1ff000, &[ENTRY | 0x1000, ENTRY | 0x2000], false);
        assert_eq!(table.nodes(), 4);
        // Across a 2 MiB border where the second half needs a node too many.
        assert_eq!(
            refusal(&mut table, 0x3ff000, &[ENTRY, ENTRY], false),
            Error::Limit
        );
        assert_eq!(table.get(0x3ff000), None);
        assert_eq!(table.nodes(), 4);
        // Nothing is needed for what is not valid.
        put(&mut table, 0x4000_0000, &[0; 512], false);
        put(&mut table, 0x3ff000, &[ENTRY, 0], false);
        put(&mut table, 0x4000_0000, &[0; 512], true);
        // Or what is large, where its neighbours are.
        put(&mut table, 2 * LARGE, &[ENTRY; 510], true);
        assert_eq!(table.nodes(), 4);
        assert_eq!(budget.left(), MAX_NODES - 4);
        // A large page stays if there is no node for what is to be written into it.
        let entries = [ENTRY | 0x8000, ENTRY | 0x9000];
        assert_eq!(
            refusal(&mut table, 2 * LARGE - 0x1000, &entries, false),
            Error::Limit
        );
        assert_eq!(table.get(2 * LARGE), large(ENTRY));
        assert_eq!(table.get(2 * LARGE - 0x1000), small(ENTRY));
        put(&mut table, 3 * LARGE, &[0], false);
        assert_eq!(table.get(3 * LARGE + 0x1000), None);
        // Small ones give up their node to a large one.
        put(&mut table, LARGE, &[ENTRY], true);
        assert_eq!(table.nodes(), 3);
        put(&mut table, 2 * LARGE - 0x1000, &entries[..1], false);
        assert_eq!(table.get(2 * LARGE - 0x1000), small(entries[0]));
        assert_eq!(table.get(2 * LARGE - 0x2000), None);
    }

    #[test]
    fn tables_share_a_budget() {
        let budget = Budget::new(5);
        let mut tables = [0; 2].map(|_| PageTable::new(budget.clone()));
        put(&mut tables[0], 0, &[ENTRY], false);
        assert_eq!(refusal(&mut tables[1], 0, &[ENTRY], false), Error::Limit);
        assert_eq!((tables[1].nodes(), budget.left()), (0, 2));
        put(&mut tables[1], 0, &[ENTRY], true);
        assert_eq!(budget.left(), 0);
        drop(tables);
        assert_eq!(budget.left(), 5);
    }

    #[test]
    fn the_sizes_displace_each_other() {
        let mut table = table();
        put(&mut table, 0, &[ENTRY; 1024], false);
        put(&mut table, 0, &[ENTRY | LARGE], true);
        assert_eq!(table.get(0x5000), large(ENTRY | LARGE));
        assert_eq!(table.get(LARGE), small(ENTRY));
        assert_eq!(table.nodes(), 3);
        // A large entry that is not valid clears small pages too.
        put(&mut table, LARGE, &[0], true);
        assert_eq!(table.get(LARGE), None);
        assert_eq!(table.nodes(), 2);
        put(&mut table, 0x7000, &[ENTRY | 0x3000], false);
        assert_eq!(table.get(0x7000), small(ENTRY | 0x3000));
        assert_eq!(table.get(0x6000), None);
        // So does a small one with a large page.
        put(&mut table, LARGE, &[ENTRY | LARGE; 2], true);
        put(&mut table, LARGE + 0x7000, &[0], false);
        assert_eq!(table.get(LARGE), None);
        assert_eq!(table.get(2 * LARGE), large(ENTRY | LARGE));
    }

    #[test]
    fn clearing_takes_large_pages_whole() {
        let mut table = table();
        put(&mut table, 0, &[ENTRY; 4], true);
        drop(table.clear(LARGE + 0x1000, LARGE + 0x1000));
        assert_eq!(table.get(LARGE), large(ENTRY));
        drop(table.clear(2 * LARGE - 0x1000, 2 * LARGE + 0x1000));
        assert_eq!(
            [0, 1, 2, 3].map(|n| table.get(n * LARGE).is_some()),
            [true, false, false, true]
        );
        drop(table.clear(0x5000, 0x6000));
        drop(table.clear(3 * LARGE, 4 * LARGE));
        assert_eq!(table.nodes(), 0);
    }

    #[test]
    fn reserved_bits_are_refused_in_valid_entries_only() {
        for (size, is_large) in [(PAGE_SIZE, false), (LARGE, true)] {
            let mut table = table();
            for bit in 1..64 {
                let entry = 1_u64 << bit;
                let in_page = entry & PTE_ADDRESS != 0 && entry < size;
                put(&mut table, 0, &[entry], is_large);
                assert_eq!(table.get(0), None, "bit {bit}");
                if entry & PTE_MASK == 0 || in_page {
                    let error = refusal(&mut table, 0, &[PTE_VALID, PTE_VALID | entry], is_large);
                    assert_eq!(error, Error::Invalid, "bit {bit}");
                    assert_eq!(table.get(0), None, "bit {bit}");
                } else {
                    put(&mut table, 0, &[PTE_VALID | entry], is_large);
                    assert_eq!(table.get(0).unwrap().pte, PTE_VALID | entry, "bit {bit}");
                }
            }
        }
    }

    /// Pages by address, each with what translates it.
    #[derive(Clone, Default)]
    struct Model(BTreeMap<u64, Translation>);

    impl Model {
        fn get(&self, va: u64) -> Option<Translation> {
            let (&page, &found) = self.0.range(..=va).next_back()?;
            (va - page < found.page_size()).then_some(found)
        }

        fn clear(&mut self, va: u64, end: u64) {
            let from = va & !(LARGE - 1);
            let gone = |(&page, found): (&u64, &Translation)| {
                (page < end && page + found.page_size() > va).then_some(page)
            };
            let pages: Vec<u64> = self.0.range(from..end).filter_map(gone).collect();
            for page in pages {
                self.0.remove(&page);
            }
        }

        fn write(&mut self, va: u64, entries: &[u64], shift: u8) {
            self.clear(va, va + ((entries.len() as u64) << shift));
            for (n, &pte) in entries.iter().enumerate() {
                if pte & PTE_VALID != 0 {
                    self.0
                        .insert(va + ((n as u64) << shift), Translation { pte, shift });
                }
            }
        }

        /// The nodes, each as its level and the number of those of the level before it.
        fn nodes(&self) -> BTreeSet<(u8, u64)> {
            let mut nodes = BTreeSet::new();
            for (&page, found) in &self.0 {
                // Nearly always the one before.
                for shift in [21, 30, 39] {
                    if shift > found.shift && !nodes.insert((shift, page >> shift)) {
                        break;
                    }
                }
            }
            nodes
        }
    }

    fn contents(node: &Inner, base: u64, shift: u32, model: &mut Model) {
        for (n, slot) in (0_u64..).zip(&node.slots) {
            let va = base + (n << shift);
            match slot {
                Slot::Empty => {}
                &Slot::Large(pte) => {
                    assert_eq!(shift, 21);
                    model.0.insert(va, Translation { pte, shift: 21 });
                }
                Slot::Leaf(leaf) => {
                    assert_eq!(shift, 21);
                    assert_eq!(leaf.used, leaf.entries.iter().filter(|&&pte| pte != 0).count());
                    model
                        .0
                        .extend((0_u64..).zip(&leaf.entries).filter_map(|(n, &pte)| {
                            (pte != 0).then_some((va + (n << 12), Translation { pte, shift: 12 }))
                        }));
                }
                Slot::Inner(inner) => contents(inner, va, shift - 9, model),
            }
        }
        let used = node.slots.iter().filter(|slot| !slot.is_empty()).count();
        assert_eq!(node.used, used);
        let total: usize = node.slots.iter().map(Slot::total).sum();
        assert_eq!(node.total, total + 1);
    }

    #[test]
    fn agrees_with_a_map_under_random_operations() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        // With room enough, and with so little that many writes fail.
        for limit in [MAX_NODES, 9] {
            let budget = Budget::new(MAX_NODES);
            let mut table = PageTable::with_limit(budget.clone(), limit);
            let mut model = Model::default();
            let mut refused = 0;
            for round in 0..3000 {
                // Few places, near borders of nodes of every level.
                let base = [0, 1 << 21, 1 << 30, 1 << 39, VA_END - (1 << 21)][next(5) as usize];
                let va = (base + (next(1100) << 12)).saturating_sub(550 << 12) & (VA_END - 1) & !0xfff;
                let is_large = next(3) == 0;
                let (shift, most) = if is_large { (21, 4) } else { (12, 700) };
                let va = va >> shift << shift;
                let pages = (1 + next(most)).min((VA_END - va) >> shift);
                if next(3) == 0 {
                    let end = if next(30) == 0 {
                        VA_END
                    } else {
                        va + (pages << shift)
                    };
                    drop(table.clear(va, end));
                    model.clear(va, end);
                } else {
                    let invalid = [1, 4, 1000][next(3) as usize];
                    let entry = |n: u64| match next(invalid) {
                        0 => n << 12 & !PTE_VALID,
                        _ => ENTRY | (n << shift),
                    };
                    let entries: Vec<u64> = (0..pages).map(entry).collect();
                    let mut valid = Model::default();
                    valid.write(va, &entries, shift);
                    let mut needed = model.nodes();
                    needed.extend(valid.nodes());
                    let result = table.write(va, &entries, is_large).map(drop);
                    if valid.0.is_empty() || needed.len() <= limit {
                        assert_eq!(result, Ok(()));
                        model.write(va, &entries, shift);
                    } else {
                        assert_eq!(result, Err(Error::Limit));
                        refused += 1;
                    }
                }
                assert_eq!(table.nodes(), model.nodes().len());
                assert_eq!(table.nodes(), table.root.total - 1);
                assert_eq!(budget.left(), MAX_NODES - table.nodes());
                for _ in 0..20 {
                    let probe = (va + next((pages + 2) << shift)).saturating_sub(1 << shift);
                    assert_eq!(table.get(probe), model.get(probe), "{probe:x}");
                }
                if round % 16 == 0 {
                    let mut all = Model::default();
                    contents(&table.root, 0, TOP_SHIFT, &mut all);
                    assert_eq!(all.0, model.0);
                }
            }
            assert_eq!(refused > 100, limit == 9, "{refused}");
            drop(table.clear(0, VA_END));
            assert_eq!((table.nodes(), budget.left()), (0, MAX_NODES));
        }
    }
}
