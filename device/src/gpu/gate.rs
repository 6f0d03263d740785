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
//! Both leave fairly: the gate goes to whoever has waited longest. An engine stays inside for one page
//! or a few dozen operations, so INVALIDATE waits for microseconds, and an engine among a storm of
//! invalidations gets its turn too.

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
        }
    }
}

impl Gate {
    /// Waits until nobody else is inside, and goes in.
    pub fn enter(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock()
    }

    /// Goes out and lets the next in.
    pub fn leave(inside: MutexGuard<'_, Inside>) {
        MutexGuard::unlock_fair(inside);
    }

    /// Goes in for `action` and out again.
    pub fn with<R>(&self, action: impl FnOnce(&mut Inside) -> R) -> R {
        let mut inside = self.enter();
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
        let inside = self.enter();
        self.changed.notify_all();
        Self::leave(inside);
    }
}
