// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Contexts: an address space each, and whether work in it may go on.
//!
//! ```text
//!                 ┌──────────────────(context reset)───────────────┐
//!   created ──> alive ──(its work failed, hung, or was cancelled)──> in error
//!                 └───────────────(destroyed, device reset)──────────┴──> gone
//! ```

use std::collections::HashMap;

use pinion_abi as abi;

use super::page_table::{Budget, PageTable};
use super::status::Error;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, RwLock};

/// Number of contexts; their ids are below it.
pub const MAX_CONTEXTS: u32 = 1024;

/// States: alive, gone, or the status with which it went into error.
const ALIVE: u32 = abi::STATUS_OK;
const DESTROYED: u32 = u32::MAX;
/// It has gone with the device's reset.
const RESET: u32 = u32::MAX - 1;

/// A context.
#[derive(Debug)]
pub struct Context {
    id: u32,
    /// Its page table.
    pub table: RwLock<PageTable>,
    state: AtomicU32,
    /// For each ring, the position of the first submission that can be meant for this context and
    /// not for an earlier one of the same number.
    born: Vec<u64>,
    /// For each ring, the position of the first submission behind the last reset of the context.
    reset: Vec<AtomicU64>,
    /// Whether accesses are counted.
    counting: AtomicBool,
}

impl Context {
    /// A context on its own, with an empty page table.
    pub fn new(id: u32, budget: Arc<Budget>, born: Vec<u64>) -> Arc<Self> {
        let table = RwLock::new(PageTable::new(budget));
        Arc::new(Self {
            id,
            table,
            state: AtomicU32::new(ALIVE),
            reset: born.iter().map(|_| AtomicU64::new(0)).collect(),
            born,
            counting: AtomicBool::new(false),
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

    /// Whether the submission at `position` of `ring` may go on.
    pub fn check(&self, ring: u16, position: u64) -> Result<(), Error> {
        // The state first: a reset takes the context out of error after it has said which work it ends.
        // Acquire pairs with the release of whoever changed it.
        let state = self.state.load(Ordering::Acquire);
        let reset = self.reset.get(usize::from(ring));
        let reset = reset.is_some_and(|first| position < first.load(Ordering::Acquire));
        match state {
            DESTROYED => Err(Error::NoContext),
            RESET => Err(Error::Reset),
            _ if reset => Err(Error::Reset),
            ALIVE => Ok(()),
            _ => Err(Error::ContextError),
        }
    }

    /// OK, or the status with which it went into error.
    pub fn status(&self) -> u32 {
        match self.state.load(Ordering::Acquire) {
            DESTROYED | RESET => abi::STATUS_NO_CONTEXT,
            status => status,
        }
    }

    /// Puts it into error. Says whether it was alive.
    pub fn fail(&self, error: Error) -> bool {
        self.state
            .compare_exchange(ALIVE, error.code(), Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Has the submissions in front of these positions end, and takes it out of error.
    pub fn reset(&self, positions: &[u64]) {
        for (first, &position) in self.reset.iter().zip(positions) {
            first.fetch_max(position, Ordering::AcqRel);
        }
        let alive = |state| (state != DESTROYED && state != RESET).then_some(ALIVE);
        // Fails if the context has gone.
        let _ = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, alive);
    }

    /// Ends it for good.
    fn end(&self, state: u32) {
        self.state.store(state, Ordering::Release);
    }

    /// Whether accesses are counted.
    pub fn is_counting(&self) -> bool {
        self.counting.load(Ordering::Relaxed)
    }

    /// From now on accesses are counted, or not.
    pub fn set_counting(&self, counting: bool) {
        self.counting.store(counting, Ordering::Relaxed);
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

    /// Takes one out, destroyed.
    pub fn remove(&self, id: u32) -> Result<Arc<Context>, Error> {
        let context = self.map.lock().remove(&id).ok_or(Error::NoContext)?;
        context.end(DESTROYED);
        Ok(context)
    }

    /// Takes all out, because the device is reset.
    pub fn remove_all(&self) {
        for (_, context) in self.map.lock().drain() {
            context.end(RESET);
        }
    }

    /// All that exist, by number.
    pub fn list(&self) -> Vec<Arc<Context>> {
        let mut list: Vec<_> = self.map.lock().values().cloned().collect();
        list.sort_by_key(|context| context.id());
        list
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
        assert_eq!(context.check(0, 5), Ok(()));
        assert!(context.fail(Error::Bus));
        assert!(!context.fail(Error::Hung));
        assert_eq!(context.check(0, 5), Err(Error::ContextError));
        assert_eq!(context.status(), abi::STATUS_BUS_ERROR);
        context.reset(&[9]);
        assert_eq!(context.check(0, 8), Err(Error::Reset));
        assert_eq!(context.check(0, 9), Ok(()));
        assert_eq!(context.status(), abi::STATUS_OK);
        contexts.remove(3).unwrap();
        assert_eq!(context.check(0, 9), Err(Error::NoContext));
        assert!(!context.fail(Error::Bus));
        assert_eq!(contexts.remove(3).unwrap_err(), Error::NoContext);
        context.reset(&[9]);
        assert_eq!(context.check(0, 9), Err(Error::NoContext));
        contexts.create(4, vec![0]).unwrap();
        let context = contexts.get(4).unwrap();
        contexts.remove_all();
        assert_eq!(context.check(0, 0), Err(Error::Reset));
        assert_eq!(contexts.get(4).unwrap_err(), Error::NoContext);
    }
}
