// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The gate of an engine: where the invalidation promise is kept.
//!
//! > When INVALIDATE(context, range) has completed, no engine access through an older translation is
//! > in flight or will start.
//!
//! An engine touches memory only between [`Gate::enter`] and [`Gate::leave`], and there only through
//! translations that it looks up between the same two: in the TLB, which lives inside the gate, or in
//! the page table. It carries none out, so a stalled engine, which waits outside, holds none.
//!
//! INVALIDATE first clears the page table, if asked to, and then goes through the gate of every engine
//! and removes the range from the TLB inside. While it is inside the engine is not: an access that was
//! in flight has ended. Whatever the engine does afterwards finds no older translation in the TLB, and
//! a walk finds the page table as it was when INVALIDATE went through, or newer. What an older walk
//! found was put into the TLB, if anywhere, under the same stay inside, hence before the removal.
//!
//! Both leave fairly: the gate goes to whoever has waited longest. An engine stays inside for some microseconds,
//! and if somebody waits, for no more than one piece of its work, so INVALIDATE waits for microseconds; and since
//! it does that one piece in any case, an engine among a storm of invalidations comes forward too.

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::memory::{NoMemory, SystemMemory};
use super::tlb::Tlb;

/// What an engine uses inside its gate.
pub struct Inside {
    /// Its translations.
    pub tlb: Tlb,
    /// System memory.
    pub memory: Arc<dyn SystemMemory>,
    /// The device is stopped: the engine must not touch memory.
    pub paused: bool,
}

/// The gate of one engine.
pub struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
    /// How many others want to go in.
    wanted: AtomicU32,
}

impl Default for Gate {
    fn default() -> Self {
        let inside = Inside {
            tlb: Tlb::default(),
            memory: Arc::new(NoMemory),
            paused: false,
        };
        Self {
            inside: Mutex::new(inside),
            changed: Condvar::new(),
            wanted: AtomicU32::new(0),
        }
    }
}

impl Gate {
    /// For the engine: waits until nobody else is inside, and goes in.
    pub fn enter(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock()
    }

    /// For the engine: whether somebody waits for it to go out. Only a hint, which keeps nothing safe.
    #[inline]
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// For all but the engine.
    fn interrupt(&self) -> MutexGuard<'_, Inside> {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        let inside = self.inside.lock();
        self.wanted.fetch_sub(1, Ordering::Relaxed);
        inside
    }

    /// Goes out and lets the next in.
    pub fn leave(inside: MutexGuard<'_, Inside>) {
        MutexGuard::unlock_fair(inside);
    }

    /// Goes in for `action` and out again.
    pub fn with<R>(&self, action: impl FnOnce(&mut Inside) -> R) -> R {
        let mut inside = self.interrupt();
        let result = action(&mut inside);
        Self::leave(inside);
        result
    }

    /// For the engine: lets others in until [`Gate::notify`].
    pub fn wait(&self, inside: &mut MutexGuard<'_, Inside>) {
        self.changed.wait(inside);
    }

    /// Wakes an engine in [`Gate::wait`], so that it looks again whether it may go on.
    pub fn notify(&self) {
        // Inside, so that an engine cannot miss it between its look and its wait.
        let inside = self.interrupt();
        self.changed.notify_all();
        Self::leave(inside);
    }
}
