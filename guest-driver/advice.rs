// SPDX-License-Identifier: GPL-2.0-only

//! What a program has said about how parts of its memory are to be treated.

use core::ops::Range;
use kernel::{new_mutex, prelude::*, sync::Mutex};

/// Most pieces of advice of an address space.
const MAX_PIECES: usize = 1024;

/// How the GPU gets exclusive access.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum Atomics {
    /// As the driver sees fit.
    #[default]
    Auto,
    /// By pinning in place.
    Pin,
    /// By making the page exclusive to the device, which the kernel calls just so.
    Exclusive,
    /// By migrating the page to VRAM.
    Migrate,
    /// Not at all.
    Unprotected,
}

/// Where pages had better be.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum Location {
    /// Where they are.
    #[default]
    Anywhere,
    /// In system memory.
    System,
    /// In VRAM.
    Vram,
    /// In VRAM, where the CPU sees it.
    Aperture,
}

/// Everything that has been said about a piece of memory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Policy {
    /// How the GPU gets exclusive access.
    pub(crate) atomics: Atomics,
    /// Where the pages had better be.
    pub(crate) location: Location,
}

struct Piece {
    range: Range<usize>,
    policy: Policy,
}

/// The advice about an address space.
#[pin_data]
pub(crate) struct Advice {
    /// Sorted, not overlapping; what is not in it is the default.
    #[pin]
    pieces: Mutex<KVec<Piece>>,
}

impl Advice {
    /// None yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            pieces <- new_mutex!(KVec::new(), "Advice::pieces"),
        })
    }

    /// What has been said about `va`, and in which range about it the same holds.
    pub(crate) fn get(&self, va: usize) -> (Policy, Range<usize>) {
        let pieces = self.pieces.lock();
        let index = pieces.partition_point(|piece| piece.range.end <= va);
        match pieces.get(index) {
            Some(piece) if piece.range.contains(&va) => (piece.policy, piece.range.clone()),
            next => {
                let before = index.checked_sub(1).and_then(|index| pieces.get(index));
                let start = before.map_or(0, |piece| piece.range.end);
                let end = next.map_or(usize::MAX, |piece| piece.range.start);
                (Policy::default(), start..end)
            }
        }
    }

    /// Changes what holds in `range`.
    ///
    /// # Errors
    ///
    /// ENOSPC: too many pieces.
    pub(crate) fn change(&self, range: Range<usize>, change: impl Fn(&mut Policy)) -> Result {
        let mut pieces = self.pieces.lock();
        let mut new: KVec<Piece> = KVec::with_capacity(2 * pieces.len() + 3, GFP_KERNEL)?;
        let mut push = |range: Range<usize>, policy: Policy| match new.last_mut() {
            _ if range.is_empty() || policy == Policy::default() => Ok(()),
            Some(last) if last.range.end == range.start && last.policy == policy => {
                last.range.end = range.end;
                Ok(())
            }
            _ => new
                .push_within_capacity(Piece { range, policy })
                .map_err(|_| ENOMEM),
        };
        let changed = |mut policy: Policy| {
            change(&mut policy);
            policy
        };
        // Up to where `range` has been dealt with.
        let mut done = range.start;
        for piece in pieces.iter() {
            let (start, end) = (piece.range.start, piece.range.end);
            push(start..end.min(range.start), piece.policy)?;
            if end > range.start && done < range.end {
                let gap = done..start.clamp(done, range.end);
                done = end.clamp(gap.end, range.end);
                push(gap.clone(), changed(Policy::default()))?;
                push(gap.end..done, changed(piece.policy))?;
            }
            push(start.max(range.end)..end, piece.policy)?;
        }
        push(done..range.end, changed(Policy::default()))?;
        if new.len() > MAX_PIECES {
            return Err(ENOSPC);
        }
        *pieces = new;
        Ok(())
    }
}
