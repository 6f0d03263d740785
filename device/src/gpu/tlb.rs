// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The translations that one engine remembers: 128 sets of four.
//!
//! It is not coherent with the page tables. What is in it stays until it is invalidated or displaced,
//! whatever happens to the page table, and a driver that forgets to invalidate will see that.

use pinion_abi::PAGE_SHIFT;

const SETS: usize = 128;
const WAYS: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Zero stands for no entry: a valid page table entry has a bit set.
    pte: u64,
    page: u64,
    context: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Set {
    ways: [Entry; WAYS],
    /// The way that is replaced next, modulo their number.
    next: u8,
}

/// A translation cache.
#[derive(Debug)]
pub struct Tlb {
    sets: Box<[Set; SETS]>,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            sets: Box::new([Set::default(); SETS]),
        }
    }
}

impl Tlb {
    /// Number of translations it has room for.
    pub const CAPACITY: usize = SETS * WAYS;

    fn index(context: u32, page: u64) -> usize {
        let mixed = page ^ (page >> 7) ^ u64::from(context).wrapping_mul(0x9e37);
        mixed as usize & (SETS - 1)
    }

    /// The remembered entry for the page of `va`.
    pub fn get(&self, context: u32, va: u64) -> Option<u64> {
        let page = va >> PAGE_SHIFT;
        let set = self.sets.get(Self::index(context, page))?;
        set.ways
            .iter()
            .find(|entry| entry.pte != 0 && entry.page == page && entry.context == context)
            .map(|entry| entry.pte)
    }

    /// Remembers `pte`, instead of an older entry for the same page if there is one.
    pub fn put(&mut self, context: u32, va: u64, pte: u64) {
        let page = va >> PAGE_SHIFT;
        let Some(set) = self.sets.get_mut(Self::index(context, page)) else {
            return;
        };
        let new = Entry { pte, page, context };
        let same = |entry: &&mut Entry| entry.pte != 0 && entry.page == page && entry.context == context;
        if let Some(entry) = set.ways.iter_mut().find(same) {
            *entry = new;
            return;
        }
        let way = usize::from(set.next);
        set.next = set.next.wrapping_add(1);
        if let Some(entry) = set.ways.get_mut(way & (WAYS - 1)) {
            *entry = new;
        }
    }

    /// Forgets what `forget` says of (context, page number).
    fn retain(&mut self, forget: impl Fn(u32, u64) -> bool) {
        for entry in self.sets.iter_mut().flat_map(|set| &mut set.ways) {
            if forget(entry.context, entry.page) {
                *entry = Entry::default();
            }
        }
    }

    /// Forgets the pages of `va..end` of one context.
    pub fn invalidate(&mut self, context: u32, va: u64, end: u64) {
        let (first, last) = (va >> PAGE_SHIFT, end >> PAGE_SHIFT);
        if last.saturating_sub(first) > SETS as u64 {
            self.retain(|of, page| of == context && (first..last).contains(&page));
            return;
        }
        for page in first..last {
            let Some(set) = self.sets.get_mut(Self::index(context, page)) else {
                continue;
            };
            for entry in &mut set.ways {
                if entry.page == page && entry.context == context {
                    *entry = Entry::default();
                }
            }
        }
    }

    /// Forgets all of one context.
    pub fn invalidate_context(&mut self, context: u32) {
        self.retain(|of, _| of == context);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.retain(|_, _| true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_by_context_and_page() {
        let mut tlb = Tlb::default();
        tlb.put(1, 0x5123, 7);
        assert_eq!(tlb.get(1, 0x5fff), Some(7));
        assert_eq!(tlb.get(1, 0x6000), None);
        assert_eq!(tlb.get(2, 0x5000), None);
        tlb.put(1, 0x5000, 9);
        assert_eq!(tlb.get(1, 0x5000), Some(9));
    }

    #[test]
    fn is_bounded() {
        let mut tlb = Tlb::default();
        for page in 0..10_000_u64 {
            tlb.put(0, page << 12, 1);
        }
        let kept = (0..10_000_u64)
            .filter(|page| tlb.get(0, page << 12).is_some())
            .count();
        assert_eq!(kept, Tlb::CAPACITY);
    }

    #[test]
    fn invalidation_takes_its_range_and_no_more() {
        for pages in [1_u64, 5, 128, 129, 400] {
            let mut tlb = Tlb::default();
            for page in 0..Tlb::CAPACITY as u64 {
                tlb.put(page as u32 & 1, page << 12, page + 1);
            }
            let before: Vec<_> = (0..512_u64)
                .map(|page| tlb.get(page as u32 & 1, page << 12))
                .collect();
            tlb.invalidate(1, 10 << 12, (10 + pages) << 12);
            for page in 0..512_u64 {
                let gone = page & 1 == 1 && page >= 10 && page < 10 + pages;
                let expect = if gone { None } else { before[page as usize] };
                assert_eq!(
                    tlb.get(page as u32 & 1, page << 12),
                    expect,
                    "page {page}, {pages} pages"
                );
            }
        }
    }

    #[test]
    fn whole_contexts_and_everything() {
        let mut tlb = Tlb::default();
        tlb.put(0, 0, 1);
        tlb.put(1, 0, 1);
        tlb.invalidate_context(0);
        assert_eq!((tlb.get(0, 0), tlb.get(1, 0)), (None, Some(1)));
        tlb.clear();
        assert_eq!(tlb.get(1, 0), None);
    }
}
