// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The page table of one context: four levels of 512 entries over 48 bits.
//!
//! Nodes are made when an entry below them becomes valid and given up when the last one is cleared, so
//! that every operation, a clear of the whole space too, costs no more than what is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinion_abi::{PAGE_SHIFT, PAGE_SIZE, PTE_MASK, PTE_VALID, VA_END};

use super::status::Error;

const INDEX_BITS: u32 = 9;
const FANOUT: usize = 1 << INDEX_BITS;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
/// Bits of a virtual address below one entry of the topmost node.
const TOP_SHIFT: u32 = PAGE_SHIFT as u32 + 3 * INDEX_BITS;

/// Most nodes (of 4 KiB) in the page table of one context.
pub const MAX_NODES_PER_CONTEXT: usize = 1 << 14;
/// Most nodes in all page tables of the device: 256 MiB.
pub const MAX_NODES: usize = 1 << 16;

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
    fn take(&mut self) -> Result<(), Error> {
        if self.nodes >= self.limit {
            return Err(Error::Limit);
        }
        self.budget
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .map_err(|_| Error::Limit)?;
        self.nodes = self.nodes.saturating_add(1);
        Ok(())
    }

    fn give_back(&mut self, nodes: usize) {
        self.nodes = self.nodes.saturating_sub(nodes);
        self.budget.left.fetch_add(nodes, Ordering::Relaxed);
    }
}

/// A node; `used` counts the entries that are there, `total` the nodes at and below it.
#[derive(Debug)]
enum Node {
    Inner {
        used: usize,
        total: usize,
        children: Box<[Option<Node>; FANOUT]>,
    },
    Leaf {
        used: usize,
        entries: Box<[u64; FANOUT]>,
    },
}

/// Nodes that were taken out of a table. To free many of them takes a while, in which nobody should
/// have to wait for the table's lock.
#[must_use = "this is to be dropped when the table is not locked any more"]
#[derive(Debug, Default)]
pub struct Garbage(#[allow(dead_code, reason = "it is there to be dropped")] Vec<Node>);

/// The part of a range that one entry of a node covers, and the entry's index.
fn pieces(start: u64, end: u64, shift: u32) -> impl Iterator<Item = (usize, u64, u64)> {
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let index = (at >> shift) & INDEX_MASK;
        let next = ((at >> shift).wrapping_add(1)) << shift;
        let piece = (index as usize, at, next.min(end));
        at = next;
        Some(piece)
    })
}

impl Node {
    fn new(shift: u32) -> Self {
        if shift == u32::from(PAGE_SHIFT) {
            Self::Leaf {
                used: 0,
                entries: Box::new([0; FANOUT]),
            }
        } else {
            Self::Inner {
                used: 0,
                total: 1,
                children: Box::new([const { None }; FANOUT]),
            }
        }
    }

    fn used(&self) -> usize {
        match self {
            Self::Inner { used, .. } | Self::Leaf { used, .. } => *used,
        }
    }

    /// Number of nodes at and below this one.
    fn total(&self) -> usize {
        match self {
            Self::Inner { total, .. } => *total,
            Self::Leaf { .. } => 1,
        }
    }

    /// Does something below this node, and counts what became of the nodes there.
    fn counted<R>(&mut self, account: &mut Account, action: impl FnOnce(&mut Self, &mut Account) -> R) -> R {
        let before = account.nodes;
        let result = action(self, account);
        if let Self::Inner { total, .. } = self {
            *total = total.saturating_add(account.nodes).saturating_sub(before);
        }
        result
    }

    fn get(&self, va: u64, shift: u32) -> u64 {
        let index = ((va >> shift) & INDEX_MASK) as usize;
        match self {
            Self::Leaf { entries, .. } => entries.get(index).copied().unwrap_or(0),
            Self::Inner { children, .. } => match children.get(index) {
                Some(Some(child)) => child.get(va, shift.saturating_sub(INDEX_BITS)),
                _ => 0,
            },
        }
    }

    /// Makes every node that a valid entry in `start..end` needs.
    fn reserve(&mut self, start: u64, end: u64, shift: u32, account: &mut Account) -> Result<(), Error> {
        let Self::Inner { used, children, .. } = self else {
            return Ok(());
        };
        let below = shift.saturating_sub(INDEX_BITS);
        for (index, start, end) in pieces(start, end, shift) {
            let Some(slot) = children.get_mut(index) else {
                continue;
            };
            let child = match slot {
                Some(child) => child,
                None => {
                    account.take()?;
                    *used = used.saturating_add(1);
                    slot.insert(Node::new(below))
                }
            };
            child.counted(account, |child, account| {
                child.reserve(start, end, below, account)
            })?;
        }
        Ok(())
    }

    /// Puts `entries` from the page at `start` on; where there is no node they have to be invalid.
    fn put(&mut self, start: u64, entries: &mut std::slice::Iter<'_, u64>, end: u64, shift: u32) {
        let below = shift.saturating_sub(INDEX_BITS);
        for (index, start, end) in pieces(start, end, shift) {
            match self {
                Self::Leaf { used, entries: slots } => {
                    let (Some(slot), Some(&entry)) = (slots.get_mut(index), entries.next()) else {
                        return;
                    };
                    let entry = if entry & PTE_VALID != 0 { entry } else { 0 };
                    *used = used
                        .saturating_add(usize::from(entry != 0))
                        .saturating_sub(usize::from(*slot != 0));
                    *slot = entry;
                }
                Self::Inner { children, .. } => match children.get_mut(index) {
                    Some(Some(child)) => child.put(start, entries, end, below),
                    _ => {
                        let pages = (end.saturating_sub(start) >> PAGE_SHIFT) as usize;
                        for _ in 0..pages {
                            entries.next();
                        }
                    }
                },
            }
        }
    }

    /// Clears `start..end`.
    fn clear(&mut self, start: u64, end: u64, shift: u32, account: &mut Account, garbage: &mut Garbage) {
        let below = shift.saturating_sub(INDEX_BITS);
        for (index, start, end) in pieces(start, end, shift) {
            match self {
                Self::Leaf { used, entries } => {
                    let Some(slot) = entries.get_mut(index) else {
                        continue;
                    };
                    *used = used.saturating_sub(usize::from(*slot != 0));
                    *slot = 0;
                }
                Self::Inner { children, .. } => {
                    let Some(slot) = children.get_mut(index) else {
                        continue;
                    };
                    let Some(child) = slot else { continue };
                    if end.saturating_sub(start) == 1 << shift {
                        // The whole of it: gone without a look at what is inside.
                        account.give_back(child.total());
                        garbage.0.extend(slot.take());
                    } else {
                        child.counted(account, |child, account| {
                            child.clear(start, end, below, account, garbage);
                        });
                    }
                }
            }
        }
        self.prune(start, end, shift, account);
    }

    /// Gives up the empty nodes on the way to `start..end`.
    fn prune(&mut self, start: u64, end: u64, shift: u32, account: &mut Account) {
        let Self::Inner { used, children, .. } = self else {
            return;
        };
        let below = shift.saturating_sub(INDEX_BITS);
        for (index, start, end) in pieces(start, end, shift) {
            let Some(slot) = children.get_mut(index) else {
                continue;
            };
            if let Some(child) = slot {
                child.counted(account, |child, account| child.prune(start, end, below, account));
                if child.used() == 0 {
                    account.give_back(1);
                    *slot = None;
                }
            }
        }
        *used = children.iter().flatten().count();
    }
}

/// A page table.
#[derive(Debug)]
pub struct PageTable {
    root: Node,
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
            root: Node::new(TOP_SHIFT),
            account: Account {
                budget,
                nodes: 0,
                limit,
            },
        }
    }

    /// The entry of the page that `va` is in; zero if there is none.
    pub fn get(&self, va: u64) -> u64 {
        if va >= VA_END {
            0
        } else {
            self.root.get(va, TOP_SHIFT)
        }
    }

    /// Writes `entries` from the page at `va` on: all of them, or after an error none.
    pub fn write(&mut self, va: u64, entries: &[u64]) -> Result<(), Error> {
        let length = (entries.len() as u64)
            .checked_mul(PAGE_SIZE)
            .ok_or(Error::BadAddress)?;
        let end = check_range(va, length)?;
        if entries
            .iter()
            .any(|entry| entry & PTE_VALID != 0 && entry & !PTE_MASK != 0)
        {
            return Err(Error::Invalid);
        }
        let mut reserved = Ok(());
        if entries.iter().any(|entry| entry & PTE_VALID != 0) {
            reserved = self.root.counted(&mut self.account, |root, account| {
                root.reserve(va, end, TOP_SHIFT, account)
            });
        }
        if reserved.is_ok() {
            self.root.put(va, &mut entries.iter(), end, TOP_SHIFT);
        }
        self.root.counted(&mut self.account, |root, account| {
            root.prune(va, end, TOP_SHIFT, account)
        });
        reserved
    }

    /// Clears the pages of `va..end`, which [`check_range`] has approved of.
    pub fn clear(&mut self, va: u64, end: u64) -> Garbage {
        let mut garbage = Garbage::default();
        self.root.counted(&mut self.account, |root, account| {
            root.clear(va, end.min(VA_END), TOP_SHIFT, account, &mut garbage)
        });
        garbage
    }

    /// How many nodes there are below the topmost one.
    pub fn nodes(&self) -> usize {
        self.account.nodes
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        let nodes = self.account.nodes;
        self.account.give_back(nodes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_abi::{PTE_READ, PTE_WRITE};
    use std::collections::BTreeMap;

    const ENTRY: u64 = PTE_VALID | PTE_READ | PTE_WRITE;

    fn table() -> PageTable {
        PageTable::new(Budget::new(MAX_NODES))
    }

    #[test]
    fn an_entry_is_found_in_its_page_only() {
        let mut table = table();
        let va = 0x1234_5678_9000;
        table.write(va, &[ENTRY | 0x7000]).unwrap();
        assert_eq!(table.get(va), ENTRY | 0x7000);
        assert_eq!(table.get(va + 0xfff), ENTRY | 0x7000);
        assert_eq!(table.get(va + 0x1000), 0);
        assert_eq!(table.get(va - 1), 0);
        assert_eq!(table.nodes(), 3);
    }

    #[test]
    fn ends_of_the_address_space() {
        let mut table = table();
        table.write(VA_END - PAGE_SIZE, &[ENTRY]).unwrap();
        table.write(0, &[ENTRY]).unwrap();
        assert_eq!(table.get(VA_END - 1), ENTRY);
        assert_eq!(table.get(0), ENTRY);
        assert_eq!(table.get(VA_END), 0);
        assert_eq!(table.get(u64::MAX), 0);
        assert_eq!(table.write(VA_END, &[ENTRY]), Err(Error::BadAddress));
        assert_eq!(
            table.write(VA_END - PAGE_SIZE, &[ENTRY, ENTRY]),
            Err(Error::BadAddress)
        );
        assert_eq!(table.write(u64::MAX - 0xfff, &[ENTRY]), Err(Error::BadAddress));
        assert_eq!(table.write(8, &[ENTRY]), Err(Error::Invalid));
    }

    #[test]
    fn nodes_are_given_back() {
        let budget = Budget::new(MAX_NODES);
        let mut table = PageTable::new(budget.clone());
        for n in 0..50_u64 {
            table.write(n << 33, &[ENTRY; 300]).unwrap();
        }
        assert!(table.nodes() >= 50);
        drop(table.clear(0, VA_END));
        assert_eq!(table.nodes(), 0);
        assert_eq!(budget.left(), MAX_NODES);
        table.write(0x1000, &[ENTRY]).unwrap();
        table.write(0x1000, &[0]).unwrap();
        assert_eq!(table.nodes(), 0);
        table.write(0x1000, &[ENTRY]).unwrap();
        drop(table);
        assert_eq!(budget.left(), MAX_NODES);
    }

    #[test]
    fn at_the_limit_a_write_changes_nothing() {
        let budget = Budget::new(MAX_NODES);
        let mut table = PageTable::with_limit(budget.clone(), 4);
        table.write(0x1ff000, &[ENTRY]).unwrap();
        assert_eq!(table.nodes(), 3);
        table.write(0x1ff000, &[ENTRY | 0x1000, ENTRY | 0x2000]).unwrap();
        assert_eq!(table.nodes(), 4);
        // Across a 2 MiB border where the second half needs a node too many.
        assert_eq!(table.write(0x3ff000, &[ENTRY, ENTRY]), Err(Error::Limit));
        assert_eq!(table.get(0x3ff000), 0);
        assert_eq!(table.nodes(), 4);
        // Nothing is needed for what is not valid.
        table.write(0x4000_0000, &[0; 512]).unwrap();
        assert_eq!(table.nodes(), 4);
        assert_eq!(budget.left(), MAX_NODES - 4);
    }

    #[test]
    fn reserved_bits_are_refused_in_valid_entries_only() {
        let mut table = table();
        for bit in 0..64 {
            let entry = 1_u64 << bit;
            let expect = if entry & PTE_MASK == 0 {
                Err(Error::Invalid)
            } else {
                Ok(())
            };
            assert_eq!(table.write(0, &[PTE_VALID | entry]), expect, "bit {bit}");
            assert_eq!(table.write(0, &[entry & !PTE_VALID]), Ok(()), "bit {bit}");
            assert_eq!(table.get(0), 0);
        }
    }

    #[test]
    fn agrees_with_a_map_under_random_operations() {
        let mut table = table();
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for _ in 0..3000 {
            // Few places, near borders of nodes of every level.
            let base = [0, 1 << 21, 1 << 30, 1 << 39, VA_END - (1 << 21)][next(5) as usize];
            let va = (base + (next(1100) << 12)).saturating_sub(550 << 12) & (VA_END - 1) & !0xfff;
            let pages = 1 + next(700);
            let pages = pages.min((VA_END - va) >> 12);
            if next(3) == 0 {
                let end = if next(10) == 0 { VA_END } else { va + (pages << 12) };
                drop(table.clear(va, end));
                model.retain(|&page, _| page < va || page >= end);
            } else {
                let entries: Vec<u64> = (0..pages)
                    .map(|n| if next(4) == 0 { 0 } else { ENTRY | (n << 12) })
                    .collect();
                table.write(va, &entries).unwrap();
                for (n, &entry) in entries.iter().enumerate() {
                    let page = va + ((n as u64) << 12);
                    if entry == 0 {
                        model.remove(&page)
                    } else {
                        model.insert(page, entry)
                    };
                }
            }
            for (&page, &entry) in model.iter().take(20).chain(model.iter().rev().take(20)) {
                assert_eq!(table.get(page), entry);
            }
            assert_eq!(table.root.total(), table.nodes() + 1);
            let probe = va + (next(pages) << 12);
            assert_eq!(table.get(probe), model.get(&probe).copied().unwrap_or(0));
        }
        drop(table.clear(0, VA_END));
        assert_eq!(table.nodes(), 0);
    }
}
