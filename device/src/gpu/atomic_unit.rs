// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The atomic unit: engines do not lose each other's updates of system memory.
//!
//! The bus has no atomic operations, so what a *processor* stores between an engine's load and its store is lost. What
//! another *engine* stores need not be: they are on the same side of the bus, and a GPU does its atomics in one place there. Here that
//! place is a set of locks, one of which is held from the load to the store of an operation. Which one is decided by the
//! physical address, since a page can be mapped in several contexts and at several addresses.
//!
//! A turn is taken inside the gate of the engine and given back there, too: it is carried neither out of the gate nor over a
//! fault. Nobody waits for anything while he has a turn, in particular not for another turn, so there is no cycle, and
//! whoever wants one, and INVALIDATE behind him at his gate, waits for one operation of each of the other engines at most: an engine
//! keeps its turn for the next operation on the same line only as long as nobody else wants it, and turns are given in the order
//! in which they were asked for.

use pinion_abi::PAGE_SIZE;

use super::sabotage::{Sabotage, sabotaged};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Mutex, MutexGuard};

/// What one lock is for: a cache line.
const LINE_SHIFT: u32 = 6;
/// Number of locks: a page's worth of lines, so that those of one page do not share any.
const STRIPES: usize = (PAGE_SIZE >> LINE_SHIFT) as usize;

/// The locks. Each on cache lines of its own, so that engines which have nothing to do with each other do not meet there.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe {
    lock: Mutex<()>,
    /// How many wait for it.
    wanted: AtomicU32,
}

/// Keeps the atomic operations of engines on system memory apart.
#[derive(Debug)]
pub struct AtomicUnit {
    /// None for a device with one engine.
    stripes: Box<[Stripe]>,
}

/// The right to load, and then store, on one line of system memory, among engines.
#[derive(Debug)]
pub struct Turn<'a> {
    line: u64,
    held: Option<(&'a Stripe, MutexGuard<'a, ()>)>,
}

impl AtomicUnit {
    /// One for so many engines. A single one has nobody to be kept apart from.
    pub fn new(engines: u16) -> Self {
        let count = if engines > 1 { STRIPES } else { 0 };
        Self {
            stripes: (0..count).map(|_| Stripe::default()).collect(),
        }
    }

    /// The turn for the guest physical `address`, which waits for others that have it. If `last` is for the same line then that
    /// goes on; if not, it is given back first.
    pub fn turn<'a>(&'a self, last: Option<Turn<'a>>, address: u64) -> Turn<'a> {
        let line = address >> LINE_SHIFT;
        let last = match last {
            Some(turn) if turn.line == line => return turn,
            // Kept until the next one is there: a mistake.
            other => other.filter(|_| sabotaged(Sabotage::KeepsTurn)),
        };
        let stripe = line
            .checked_rem(self.stripes.len() as u64)
            .and_then(|number| self.stripes.get(number as usize))
            .filter(|_| !sabotaged(Sabotage::SkipsAtomicUnit));
        let held = stripe.map(|stripe| (stripe, stripe.lock()));
        drop(last);
        Turn { line, held }
    }
}

impl Stripe {
    fn lock(&self) -> MutexGuard<'_, ()> {
        if let Some(guard) = self.lock.try_lock() {
            return guard;
        }
        self.wanted.fetch_add(1, Ordering::Relaxed);
        let guard = self.lock.lock();
        self.wanted.fetch_sub(1, Ordering::Relaxed);
        guard
    }
}

impl Turn<'_> {
    /// Whether somebody waits for it. Only a hint, which keeps nothing safe.
    #[inline]
    pub fn is_wanted(&self) -> bool {
        self.held
            .as_ref()
            .is_some_and(|(stripe, _)| stripe.wanted.load(Ordering::Relaxed) > 0)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some((_, guard)) = self.held.take() {
            MutexGuard::unlock_fair(guard);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: u64 = 1 << LINE_SHIFT;

    #[test]
    fn a_turn_is_for_a_line() {
        let unit = AtomicUnit::new(2);
        let first = unit.turn(None, 8);
        assert!(unit.stripes[0].lock.try_lock().is_none());
        let same = unit.turn(Some(first), LINE - 8);
        assert!(!same.is_wanted());
        let next = unit.turn(Some(same), LINE);
        assert!(unit.stripes[0].lock.try_lock().is_some(), "it was not given back");
        assert!(unit.stripes[1].lock.try_lock().is_none());
        drop(next);
        assert!(unit.stripes[1].lock.try_lock().is_some());
    }

    #[test]
    fn whoever_waits_is_seen() {
        let unit = AtomicUnit::new(2);
        let turn = unit.turn(None, 0);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| drop(unit.turn(None, 8)));
            // Bounded by the test's own limit: the other cannot end before.
            while !turn.is_wanted() {
                assert!(!other.is_finished(), "two have the same turn");
                std::thread::yield_now();
            }
            drop(turn);
        });
        assert_eq!(unit.stripes[0].wanted.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn one_engine_needs_none() {
        let unit = AtomicUnit::new(1);
        let turns = (unit.turn(None, 0), unit.turn(None, 0));
        assert!(!turns.0.is_wanted() && !turns.1.is_wanted());
    }
}
