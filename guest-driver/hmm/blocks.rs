// SPDX-License-Identifier: GPL-2.0-only

//! Allocating pages, and blocks of them, out of a range.
//!
//! The range is divided into blocks of 512 pages (2 MiB). A block is handed out whole, or page by page. Pages come from
//! blocks that are broken already as long as there is room, and a block whose last page comes back is whole again: small
//! allocations do not eat up the blocks unless they have to. Everything takes constant time, except to find
//! the coldest block.
//!
//! Pure data structure: it allocates nothing after `new`, and locks nothing.

use kernel::prelude::*;

/// Base-2 logarithm of [`BLOCK_PAGES`].
pub(crate) const BLOCK_ORDER: u32 = 9;
/// Pages of a block.
pub(crate) const BLOCK_PAGES: usize = 1 << BLOCK_ORDER;

/// End of a list.
const NONE: u32 = u32::MAX;
/// Bits of a word of a map.
const BITS: usize = u64::BITS as usize;

struct Block {
    /// Which pages are in use.
    map: [u64; BLOCK_PAGES / BITS],
    /// How many.
    used: u16,
    next: u32,
    previous: u32,
    /// When it was last used by the device, as far as anybody knows.
    touched: u64,
}

/// A list of blocks, linked both ways.
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };

    fn push_back(&mut self, blocks: &mut [Block], index: u32) {
        blocks[index as usize].next = NONE;
        blocks[index as usize].previous = self.last;
        match blocks.get_mut(self.last as usize) {
            Some(last) => last.next = index,
            None => self.first = index,
        }
        self.last = index;
    }

    fn remove(&mut self, blocks: &mut [Block], index: u32) {
        let (next, previous) = (blocks[index as usize].next, blocks[index as usize].previous);
        match blocks.get_mut(previous as usize) {
            Some(block) => block.next = next,
            None => self.first = next,
        }
        match blocks.get_mut(next as usize) {
            Some(block) => block.previous = previous,
            None => self.last = previous,
        }
    }
}

/// The allocator.
///
/// # Invariants
///
/// A block is in `free` if none of its pages is in use, in `partial` if some are, and in no list if all are. `used` is
/// the number of bits that are set in all maps.
pub(crate) struct Blocks {
    blocks: KVVec<Block>,
    free: List,
    partial: List,
    used: usize,
    clock: u64,
}

impl Blocks {
    /// `count` pages, none of them in use. What does not fill a block is left out.
    pub(crate) fn new(count: usize) -> Result<Self> {
        let count = count / BLOCK_PAGES;
        let mut blocks = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            let block = Block {
                map: [0; BLOCK_PAGES / BITS],
                used: 0,
                next: NONE,
                previous: NONE,
                touched: 0,
            };
            blocks.push(block, GFP_KERNEL)?;
        }
        let mut free = List::EMPTY;
        for index in 0..count as u32 {
            free.push_back(&mut blocks, index);
        }
        // INVARIANT: No bit is set, and all blocks are in `free`.
        Ok(Self {
            blocks,
            free,
            partial: List::EMPTY,
            used: 0,
            clock: 0,
        })
    }

    /// How many pages there are.
    pub(crate) fn pages(&self) -> usize {
        self.blocks.len() * BLOCK_PAGES
    }

    /// How many pages are in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// How many pages of a block are in use.
    pub(crate) fn used_in(&self, block: usize) -> usize {
        self.blocks.get(block).map_or(0, |block| block.used.into())
    }

    /// Whether a block can be had.
    pub(crate) fn has_block(&self) -> bool {
        self.free.first != NONE
    }

    /// Takes a page: its index.
    pub(crate) fn allocate_page(&mut self) -> Option<usize> {
        let index = if self.partial.first == NONE {
            self.free.first
        } else {
            self.partial.first
        };
        let block = self.blocks.get_mut(index as usize)?;
        let word = block.map.iter().position(|word| *word != u64::MAX)?;
        let bit = block.map[word].trailing_ones() as usize;
        // INVARIANT: Below, the block changes lists as its number of used pages demands.
        block.map[word] |= 1 << bit;
        block.used += 1;
        let used = usize::from(block.used);
        self.used += 1;
        if used == 1 {
            self.free.remove(&mut self.blocks, index);
            self.partial.push_back(&mut self.blocks, index);
        }
        if used == BLOCK_PAGES {
            self.partial.remove(&mut self.blocks, index);
        }
        Some(index as usize * BLOCK_PAGES + word * BITS + bit)
    }

    /// Takes a whole block: the index of its first page.
    pub(crate) fn allocate_block(&mut self) -> Option<usize> {
        let index = self.free.first;
        let block = self.blocks.get_mut(index as usize)?;
        // INVARIANT: All of it is in use, so it leaves `free` and gets into no other list.
        block.map = [u64::MAX; BLOCK_PAGES / BITS];
        block.used = BLOCK_PAGES as u16;
        self.used += BLOCK_PAGES;
        self.free.remove(&mut self.blocks, index);
        Some(index as usize * BLOCK_PAGES)
    }

    /// Gives back `count` pages from `first` on, all of one block. Says whether they were all in use.
    pub(crate) fn free(&mut self, first: usize, count: usize) -> bool {
        let index = first / BLOCK_PAGES;
        let Some(block) = self.blocks.get_mut(index) else {
            return false;
        };
        let before = usize::from(block.used);
        let mut freed = 0;
        for page in first % BLOCK_PAGES..(first % BLOCK_PAGES + count).min(BLOCK_PAGES) {
            let (word, bit) = (page / BITS, 1 << (page % BITS));
            freed += usize::from(block.map[word] & bit != 0);
            block.map[word] &= !bit;
        }
        let after = before - freed;
        block.used = after as u16;
        self.used -= freed;
        // INVARIANT: As in `allocate_page`.
        if freed > 0 {
            if before < BLOCK_PAGES {
                self.partial.remove(&mut self.blocks, index as u32);
            }
            if after == 0 {
                self.free.push_back(&mut self.blocks, index as u32);
            } else {
                self.partial.push_back(&mut self.blocks, index as u32);
            }
        }
        freed == count
    }

    /// Notes that the device uses the block that the page is in.
    pub(crate) fn touch(&mut self, page: usize) {
        self.clock += 1;
        if let Some(block) = self.blocks.get_mut(page / BLOCK_PAGES) {
            block.touched = self.clock;
        }
    }

    /// The block with pages in use that has not been used for the longest time.
    pub(crate) fn coldest(&self) -> Option<usize> {
        let used = self.blocks.iter().enumerate().filter(|(_, block)| block.used > 0);
        used.min_by_key(|(_, block)| block.touched)
            .map(|(index, _)| index)
    }
}
