// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Contexts: an address space each, and whether work in it may go on.
//!
//! ```text
//!   created ──> alive ──(its work failed, or was cancelled)──> in error
//!                 └───────────────(destroy, reset)──────────────┴──> destroyed
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::{Mutex, RwLock};

use super::page_table::{Budget, PageTable};
use super::status::Error;

/// Number of contexts; their ids are below it.
pub const MAX_CONTEXTS: u32 = 1024;

const ALIVE: u8 = 0;
const IN_ERROR: u8 = 1;
const DESTROYED: u8 = 2;

/// A context.
#[derive(Debug)]
pub struct Context {
    id: u32,
    /// Its page table.
    pub table: RwLock<PageTable>,
    state: AtomicU8,
    /// For each ring, the position of the first submission that can be meant for this context and
    /// not for an earlier one of the same number.
    born: Vec<u64>,
}

impl Context {
    /// A context on its own, with an empty page table.
    pub fn new(id: u32, budget: Arc<Budget>, born: Vec<u64>) -> Arc<Self> {
        let table = RwLock::new(PageTable::new(budget));
        Arc::new(Self {
            id,
            table,
            state: AtomicU8::new(ALIVE),
            born,
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether the submission at `position` of `ring` was made when the context was there.
    pub fn is_meant_by(&self, ring: u16, position: u64) -> bool {
        self.born
            .get(usize::from(ring))
            .is_none_or(|&first| position >= first)
    }

    /// Whether work in it may go on.
    pub fn check(&self) -> Result<(), Error> {
        // Acquire pairs with the release of whoever ended it.
        match self.state.load(Ordering::Acquire) {
            ALIVE => Ok(()),
            IN_ERROR => Err(Error::ContextError),
            _ => Err(Error::NoContext),
        }
    }

    /// Puts it into error. Says whether it was alive.
    pub fn fail(&self) -> bool {
        self.state
            .compare_exchange(ALIVE, IN_ERROR, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Ends it for good.
    pub fn destroy(&self) {
        self.state.store(DESTROYED, Ordering::Release);
    }
}

/// The contexts that exist.
#[derive(Debug)]
pub struct Contexts {
    map: Mutex<HashMap<u32, Arc<Context>>>,
    budget: Arc<Budget>,
}

impl Contexts {
    /// None at first. Page tables take their nodes from `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            map: Mutex::default(),
            budget,
        }
    }

    /// Makes one.
    pub fn create(&self, id: u32, born: Vec<u64>) -> Result<(), Error> {
        if id >= MAX_CONTEXTS {
            return Err(Error::Invalid);
        }
        match self.map.lock().entry(id) {
            std::collections::hash_map::Entry::Occupied(_) => Err(Error::ContextExists),
            std::collections::hash_map::Entry::Vacant(slot) => {
                slot.insert(Context::new(id, self.budget.clone(), born));
                Ok(())
            }
        }
    }

    /// Finds one.
    pub fn get(&self, id: u32) -> Result<Arc<Context>, Error> {
        self.map.lock().get(&id).cloned().ok_or(Error::NoContext)
    }

    /// All of them, by number.
    pub fn all(&self) -> Vec<Arc<Context>> {
        let mut all: Vec<_> = self.map.lock().values().cloned().collect();
        all.sort_unstable_by_key(|context| context.id());
        all
    }

    /// Takes one out, destroyed.
    pub fn remove(&self, id: u32) -> Result<Arc<Context>, Error> {
        let context = self.map.lock().remove(&id).ok_or(Error::NoContext)?;
        context.destroy();
        Ok(context)
    }

    /// Takes all out, destroyed.
    pub fn remove_all(&self) {
        for (_, context) in self.map.lock().drain() {
            context.destroy();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn life_of_a_context() {
        let contexts = Contexts::new(Budget::new(10));
        assert_eq!(contexts.create(MAX_CONTEXTS, vec![]), Err(Error::Invalid));
        contexts.create(3, vec![5]).unwrap();
        assert_eq!(contexts.create(3, vec![]), Err(Error::ContextExists));
        let context = contexts.get(3).unwrap();
        assert!(context.is_meant_by(0, 5) && !context.is_meant_by(0, 4));
        assert_eq!(context.check(), Ok(()));
        assert!(context.fail());
        assert!(!context.fail());
        assert_eq!(context.check(), Err(Error::ContextError));
        contexts.remove(3).unwrap();
        assert_eq!(context.check(), Err(Error::NoContext));
        assert!(!context.fail());
        assert_eq!(context.check(), Err(Error::NoContext));
        assert_eq!(contexts.remove(3).unwrap_err(), Error::NoContext);
    }
}
