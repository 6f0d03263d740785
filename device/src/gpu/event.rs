// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The events that the driver has not been told of yet.
//!
//! A record waits here until there is a buffer for it. The log is bounded without ever dropping one
//! that matters: a ring has at most one fault, a context goes into error at most once, the counter of a region
//! (of which there is a bounded number) reaches its threshold once, and the records of faults, contexts and counters
//! that are gone are gone too.

use std::collections::VecDeque;

use pinion_abi::{EVENT_ACCESS_COUNT, EVENT_DEVICE_RESET, EVENT_FAULT, EVENT_PREFETCH, EventRecord};

use super::sabotage::{Sabotage, sabotaged};
use super::statistics::Counter;
use crate::sync::Mutex;

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
        if sabotaged(Sabotage::TakesInSteps) {
            let first = self.records.lock().front().copied();
            if first.is_some() {
                self.records.lock().pop_front();
            }
            return first;
        }
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
        // That of a reset of the device is of no context, though it says zero.
        self.records
            .lock()
            .retain(|record| record.context != context || record.kind == EVENT_DEVICE_RESET);
    }

    /// Drops the hints of work that has ended, of one context or of all.
    pub fn forget_hints(&self, context: Option<u32>) {
        self.records.lock().retain(|record| {
            record.kind != EVENT_PREFETCH || context.is_some_and(|context| record.context != context)
        });
    }

    /// Drops the records of work of a context that has ended. Its counters stay, and what they have to tell.
    pub fn forget_work(&self, context: u32) {
        self.records.lock().retain(|record| {
            record.context != context || matches!(record.kind, EVENT_DEVICE_RESET | EVENT_ACCESS_COUNT)
        });
    }

    /// Drops the records of counters that are no longer there: those of regions of a context that begin in `va..end`.
    pub fn forget_counts(&self, context: u32, va: u64, end: u64) {
        self.records.lock().retain(|record| {
            record.kind != EVENT_ACCESS_COUNT || record.context != context || !(va..end).contains(&record.va)
        });
    }

    /// Drops all records.
    pub fn clear(&self) {
        self.records.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_are_forgotten_and_nothing_else() {
        let log = EventLog::default();
        let record = |kind, context| EventRecord {
            kind,
            context,
            ..EventRecord::default()
        };
        for context in [1, 2] {
            log.hint(record(EVENT_PREFETCH, context));
            log.push(record(EVENT_FAULT, context));
        }
        log.forget_hints(Some(1));
        assert_eq!(log.len(), 3);
        log.forget_hints(None);
        let left = [log.take(), log.take(), log.take()];
        assert_eq!(
            left.map(|record| record.map(|record| (record.kind, record.context))),
            [Some((EVENT_FAULT, 1)), Some((EVENT_FAULT, 2)), None]
        );
    }
}
