// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The events that the driver has not been told of yet.
//!
//! A record waits here until there is a buffer for it. The log is bounded without ever dropping one
//! that matters: a ring has at most one fault, a context goes into error at most once, the counter of a region
//! (of which there is a bounded number) reaches its threshold once, and the records of faults and contexts that are gone are gone too.

use std::collections::VecDeque;

use parking_lot::Mutex;
use pinion_abi::{EVENT_FAULT, EVENT_PREFETCH, EventRecord};

use super::statistics::Counter;

/// Most hints that wait; more are dropped, as hints may be.
const MAX_HINTS: usize = 256;

/// Events in the order in which they happened.
#[derive(Debug, Default)]
pub struct EventLog {
    records: Mutex<VecDeque<EventRecord>>,
    dropped: Counter,
}

impl EventLog {
    /// Adds a record.
    pub fn push(&self, record: EventRecord) {
        self.records.lock().push_back(record);
    }

    /// Adds a record that may be dropped, unless there are many.
    pub fn hint(&self, record: EventRecord) {
        let mut records = self.records.lock();
        let hints = records
            .iter()
            .filter(|record| record.kind == EVENT_PREFETCH)
            .count();
        if hints < MAX_HINTS {
            records.push_back(record);
        } else {
            self.dropped.count();
        }
    }

    /// Hints that were dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped.get()
    }

    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.records.lock().is_empty()
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.records.lock().len()
    }

    /// Takes the oldest record.
    pub fn take(&self) -> Option<EventRecord> {
        self.records.lock().pop_front()
    }

    /// Drops the record of a fault that is no longer there.
    pub fn forget_fault(&self, fault: u64) {
        self.records
            .lock()
            .retain(|record| record.kind != EVENT_FAULT || record.fault != fault);
    }

    /// Drops the records of a context that is no longer there.
    pub fn forget_context(&self, context: u32) {
        self.records.lock().retain(|record| record.context != context);
    }

    /// Drops all records.
    pub fn clear(&self) {
        self.records.lock().clear();
    }
}
