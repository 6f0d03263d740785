// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The translations that one engine remembers: 128 sets of four for small pages, 16 for large ones.
//!
//! It is not coherent with the page tables. What is in it stays until it is invalidated or displaced,
//! whatever happens to the page table, and a driver that forgets to invalidate will see that.

use std::mem;

use pinion_abi::{LARGE_PAGE_SHIFT, PAGE_SHIFT, PTE_VALID};

use super::page_table::Translation;

const WAYS: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Zero stands for no entry: what is remembered is valid.
    pte: u64,
    page: u64,
    context: u32,
}

impl Entry {
    fn is(&self, context: u32, page: u64) -> bool {
        self.pte != 0 && self.page == page && self.context == context
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Set {
    ways: [Entry; WAYS],
    /// The way that is replaced next, modulo their number.
    next: u8,
}

/// The translations of pages of one size; the number of sets is a power of two.
#[derive(Debug)]
struct Array<const SETS: usize, const SHIFT: u8> {
    sets: Box<[Set; SETS]>,
}

impl<const SETS: usize, const SHIFT: u8> Array<SETS, SHIFT> {
    const CAPACITY: usize = SETS * WAYS;
    const INDEX_MASK: usize = {
        assert!(SETS.is_power_of_two());
        SETS - 1
    };

    fn new() -> Self {
        Self {
            sets: Box::new([Set::default(); SETS]),
        }
    }

    fn index(context: u32, page: u64) -> usize {
        let mixed = page ^ (page >> SETS.trailing_zeros()) ^ u64::from(context).wrapping_mul(0x9e37);
        mixed as usize & Self::INDEX_MASK
    }

    fn get(&self, context: u32, va: u64) -> Option<Translation> {
        let page = va >> SHIFT;
        let set = self.sets.get(Self::index(context, page))?;
        let entry = set.ways.iter().find(|entry| entry.is(context, page))?;
        Some(Translation {
            pte: entry.pte,
            shift: SHIFT,
        })
    }

    /// Says whether another translation had to make room.
    fn put(&mut self, context: u32, va: u64, pte: u64) -> bool {
        let page = va >> SHIFT;
        let Some(set) = self.sets.get_mut(Self::index(context, page)) else {
            return false;
        };
        let way = set.ways.iter().position(|entry| entry.is(context, page));
        let way = way.or_else(|| set.ways.iter().position(|entry| entry.pte == 0));
        let way = way.unwrap_or_else(|| {
            let way = set.next;
            set.next = way.wrapping_add(1);
            usize::from(way) & (WAYS - 1)
        });
        let Some(entry) = set.ways.get_mut(way) else {
            return false;
        };
        let old = mem::replace(entry, Entry { pte, page, context });
        old.pte != 0 && !old.is(context, page)
    }

    fn forget_page(&mut self, context: u32, page: u64) {
        if let Some(set) = self.sets.get_mut(Self::index(context, page)) {
            for entry in &mut set.ways {
                if entry.is(context, page) {
                    *entry = Entry::default();
                }
            }
        }
    }

    fn forget_where(&mut self, condition: impl Fn(&Entry) -> bool) {
        for entry in self.sets.iter_mut().flat_map(|set| &mut set.ways) {
            if condition(entry) {
                *entry = Entry::default();
            }
        }
    }

    /// Forgets every page that overlaps the bytes from `va` to `last`, inclusive.
    fn forget_range(&mut self, context: u32, va: u64, last: u64) {
        let pages = va >> SHIFT..=last >> SHIFT;
        if pages.end().saturating_sub(*pages.start()) < SETS as u64 {
            for page in pages {
                self.forget_page(context, page);
            }
        } else {
            self.forget_where(|entry| entry.context == context && pages.contains(&entry.page));
        }
    }
}

/// What a TLB counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Translations that were asked for and found.
    pub hits: u64,
    /// Translations that were asked for and not found.
    pub misses: u64,
    /// Translations that had to make room for others.
    pub evictions: u64,
}

/// The translation that was used last. It is in one of the arrays too.
#[derive(Clone, Copy, Debug, Default)]
struct Last {
    start: u64,
    /// Zero stands for none.
    size: u64,
    pte: u64,
    context: u32,
    shift: u8,
}

/// A translation cache.
#[derive(Debug)]
pub struct Tlb {
    last: Last,
    small: Array<128, PAGE_SHIFT>,
    large: Array<16, LARGE_PAGE_SHIFT>,
    counts: Counts,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            last: Last::default(),
            small: Array::new(),
            large: Array::new(),
            counts: Counts::default(),
        }
    }
}

impl Tlb {
    /// Number of translations of small pages that it has room for.
    pub const CAPACITY: usize = Array::<128, PAGE_SHIFT>::CAPACITY;
    /// Number of translations of large pages that it has room for besides.
    pub const LARGE_CAPACITY: usize = Array::<16, LARGE_PAGE_SHIFT>::CAPACITY;

    /// The remembered translation of `va`; the newest, if pages of both sizes have been put in.
    #[inline]
    pub fn get(&mut self, context: u32, va: u64) -> Option<Translation> {
        // Most accesses are to the page of the one before.
        let last = &self.last;
        if va.wrapping_sub(last.start) < last.size && last.context == context {
            self.counts.hits = self.counts.hits.wrapping_add(1);
            return Some(Translation {
                pte: last.pte,
                shift: last.shift,
            });
        }
        self.find(context, va)
    }

    fn find(&mut self, context: u32, va: u64) -> Option<Translation> {
        // If there is one of either size, the large one is newer: to put in a small one removes it.
        let found = self
            .large
            .get(context, va)
            .or_else(|| self.small.get(context, va));
        match found {
            Some(found) => {
                self.counts.hits = self.counts.hits.wrapping_add(1);
                self.used(context, va, found);
            }
            None => self.counts.misses = self.counts.misses.wrapping_add(1),
        }
        found
    }

    fn used(&mut self, context: u32, va: u64, translation: Translation) {
        let size = translation.page_size();
        self.last = Last {
            start: va & !size.wrapping_sub(1),
            size,
            pte: translation.pte,
            context,
            shift: translation.shift,
        };
    }

    /// Remembers a valid translation of `va`, instead of an older one for `va` if there is one, of
    /// whichever size.
    ///
    /// If it is of a large page, older ones of other small pages in it may come back to light when it is
    /// displaced; like anything else, they go for good when they are invalidated.
    pub fn put(&mut self, context: u32, va: u64, translation: Translation) {
        let Translation { pte, shift } = translation;
        if pte & PTE_VALID == 0 {
            return;
        }
        let evicted = if shift == LARGE_PAGE_SHIFT {
            self.small.forget_page(context, va >> PAGE_SHIFT);
            self.large.put(context, va, pte)
        } else {
            self.large.forget_page(context, va >> LARGE_PAGE_SHIFT);
            self.small.put(context, va, pte)
        };
        self.counts.evictions = self.counts.evictions.wrapping_add(evicted.into());
        // Which also replaces what was used last, should that be what has made room.
        self.used(context, va, translation);
    }

    /// Forgets the pages of `va..end` of one context, large ones that are partly in it too.
    pub fn invalidate(&mut self, context: u32, va: u64, end: u64) {
        let Some(last) = end.checked_sub(1).filter(|&last| last >= va) else {
            return;
        };
        self.last = Last::default();
        self.small.forget_range(context, va, last);
        self.large.forget_range(context, va, last);
    }

    /// Forgets all of one context.
    pub fn invalidate_context(&mut self, context: u32) {
        self.last = Last::default();
        self.small.forget_where(|entry| entry.context == context);
        self.large.forget_where(|entry| entry.context == context);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.last = Last::default();
        self.small.forget_where(|_| true);
        self.large.forget_where(|_| true);
    }

    /// What was counted since the last time.
    pub fn take_counts(&mut self) -> Counts {
        mem::take(&mut self.counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_abi::{LARGE_PAGE_SIZE, PAGE_SIZE, VA_END};
    use std::collections::BTreeMap;

    const LARGE: u64 = LARGE_PAGE_SIZE;

    fn small(n: u64) -> Translation {
        Translation {
            pte: PTE_VALID | (n << 12),
            shift: PAGE_SHIFT,
        }
    }

    fn large(n: u64) -> Translation {
        Translation {
            pte: PTE_VALID | (n << 21),
            shift: LARGE_PAGE_SHIFT,
        }
    }

    #[test]
    fn remembers_by_context_and_page() {
        let mut tlb = Tlb::default();
        tlb.put(1, 0x5123, small(7));
        assert_eq!(tlb.get(1, 0x5fff), Some(small(7)));
        assert_eq!(tlb.get(1, 0x6000), None);
        assert_eq!(tlb.get(1, 0x4fff), None);
        assert_eq!(tlb.get(2, 0x5000), None);
        tlb.put(1, 0x5000, small(9));
        assert_eq!(tlb.get(1, 0x5000), Some(small(9)));
        tlb.put(2, LARGE + 0x5123, large(7));
        assert_eq!(tlb.get(2, LARGE), Some(large(7)));
        assert_eq!(tlb.get(2, 2 * LARGE - 1), Some(large(7)));
        assert_eq!(tlb.get(2, 2 * LARGE), None);
        assert_eq!(tlb.get(2, LARGE - 1), None);
        assert_eq!(tlb.get(1, LARGE), None);
        assert_eq!(tlb.get(1, 0x5000), Some(small(9)));
    }

    #[test]
    fn nothing_is_remembered_of_what_is_not_valid() {
        let mut tlb = Tlb::default();
        for shift in [PAGE_SHIFT, LARGE_PAGE_SHIFT] {
            tlb.put(0, 0, Translation { pte: 0, shift });
            assert_eq!(tlb.get(0, 0), None);
        }
    }

    #[test]
    fn is_bounded() {
        let mut tlb = Tlb::default();
        for page in 0..10_000_u64 {
            tlb.put(0, page << 12, small(page));
            tlb.put(1, page << 21, large(page));
        }
        let kept = |tlb: &mut Tlb, context, shift| {
            let pages = 0..10_000_u64;
            pages
                .filter(|page| tlb.get(context, page << shift).is_some())
                .count()
        };
        assert_eq!(kept(&mut tlb, 0, 12), Tlb::CAPACITY);
        assert_eq!(kept(&mut tlb, 1, 21), Tlb::LARGE_CAPACITY);
        let evictions = 20_000 - (Tlb::CAPACITY + Tlb::LARGE_CAPACITY) as u64;
        let hits = (Tlb::CAPACITY + Tlb::LARGE_CAPACITY) as u64;
        let counts = Counts {
            hits,
            misses: 20_000 - hits,
            evictions,
        };
        assert_eq!(tlb.take_counts(), counts);
        assert_eq!(tlb.take_counts(), Counts::default());
    }

    #[test]
    fn a_free_way_is_taken_before_one_in_use() {
        let mut tlb = Tlb::default();
        for page in 0..Tlb::CAPACITY as u64 {
            tlb.put(0, page << 12, small(page));
        }
        tlb.invalidate(0, 0x5000, 0x6000);
        tlb.put(0, 0x5000, small(1));
        tlb.put(0, 0x6000, small(1));
        assert_eq!(tlb.take_counts().evictions, 0);
    }

    #[test]
    fn the_newer_size_is_what_is_remembered() {
        let mut tlb = Tlb::default();
        tlb.put(0, 0x5000, small(1));
        tlb.put(0, 0x5000, large(2));
        assert_eq!(tlb.get(0, 0x5000), Some(large(2)));
        tlb.put(0, 0x6000, small(3));
        assert_eq!(tlb.get(0, 0x6000), Some(small(3)));
        assert_eq!(tlb.get(0, 0x7000), None);
        tlb.put(0, 0x7000, large(4));
        assert_eq!(tlb.get(0, 0x7000), Some(large(4)));
        assert_eq!(tlb.get(0, LARGE), None);
        assert_eq!(tlb.get(0, 0x6000), Some(large(4)));
    }

    #[test]
    fn invalidation_takes_its_range_and_no_more() {
        for pages in [1_u64, 5, 128, 129, 400] {
            let mut tlb = Tlb::default();
            for page in 0..Tlb::CAPACITY as u64 {
                tlb.put(page as u32 & 1, page << 12, small(page));
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
    fn a_large_page_goes_with_any_part_of_it() {
        for (va, end, gone) in [
            (LARGE, LARGE, false),
            (LARGE + 0x5000, LARGE + 0x5000, false),
            (0, LARGE, false),
            (2 * LARGE, VA_END, false),
            (LARGE, LARGE + PAGE_SIZE, true),
            (2 * LARGE - PAGE_SIZE, 2 * LARGE, true),
            (0, LARGE + PAGE_SIZE, true),
            (2 * LARGE - PAGE_SIZE, VA_END, true),
            (0, VA_END, true),
        ] {
            let mut tlb = Tlb::default();
            tlb.put(0, LARGE, large(1));
            tlb.put(1, LARGE, large(2));
            tlb.invalidate(0, va, end);
            assert_eq!(tlb.get(0, LARGE + 0x7000).is_none(), gone, "{va:x}..{end:x}");
            assert_eq!(tlb.get(1, LARGE + 0x7000), Some(large(2)));
        }
    }

    #[test]
    fn whole_contexts_and_everything() {
        let mut tlb = Tlb::default();
        for context in 0..2 {
            tlb.put(context, 0, small(1));
            tlb.put(context, LARGE, large(1));
        }
        tlb.invalidate_context(1);
        assert_eq!((tlb.get(1, 0), tlb.get(1, LARGE)), (None, None));
        assert_eq!(tlb.get(0, 0), Some(small(1)));
        assert_eq!(tlb.get(0, LARGE), Some(large(1)));
        tlb.clear();
        assert_eq!((tlb.get(0, 0), tlb.get(0, LARGE)), (None, None));
    }

    /// What may be remembered: any of what was put in since the last invalidation, by (context, page,
    /// shift). What must be: the last one.
    #[test]
    fn never_remembers_what_was_invalidated() {
        let mut tlb = Tlb::default();
        let mut model: BTreeMap<(u32, u64, u8), Translation> = BTreeMap::new();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut found = 0;
        for n in 0..60_000 {
            let context = next(3) as u32;
            let va = [0, 30 * LARGE, VA_END - 8 * LARGE][next(3) as usize] + next(8 * LARGE);
            match next(40) {
                0 => {
                    tlb.invalidate_context(context);
                    model.retain(|&(of, ..), _| of != context);
                }
                1 if next(10) == 0 => {
                    tlb.clear();
                    model.clear();
                }
                2..8 => {
                    let va = va & !(PAGE_SIZE - 1);
                    let most = if next(2) == 0 { 8 } else { 3000 };
                    let end = (va + (next(most) << 12)).min(VA_END);
                    tlb.invalidate(context, va, end);
                    model.retain(|&(of, page, shift), _| {
                        let (start, behind) = (page << shift, (page + 1) << shift);
                        of != context || va == end || behind <= va || start >= end
                    });
                }
                8..20 => {
                    let translation = if next(3) == 0 { large(n) } else { small(n) };
                    tlb.put(context, va, translation);
                    let shift = translation.shift;
                    let other = PAGE_SHIFT + LARGE_PAGE_SHIFT - shift;
                    model.remove(&(context, va >> other, other));
                    model.insert((context, va >> shift, shift), translation);
                    assert_eq!(tlb.get(context, va), Some(translation));
                }
                _ => {
                    if let Some(translation) = tlb.get(context, va) {
                        let shift = translation.shift;
                        assert_eq!(
                            model.get(&(context, va >> shift, shift)),
                            Some(&translation),
                            "{va:x}"
                        );
                        found += 1;
                    }
                }
            }
        }
        assert!(found > 1000, "{found}");
    }
}
