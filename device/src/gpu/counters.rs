// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How often the engines access which regions of 2 MiB, for a driver that wants to know what is worth moving.

use std::collections::BTreeMap;

use pinion_abi::{EVENT_ACCESS_COUNT, EventRecord, LARGE_PAGE_SIZE};

use super::event::EventLog;
use super::request::Count;
use super::status::Error;
use crate::sync::Mutex;

/// Most regions whose accesses are counted at a time.
pub const MAX_COUNTERS: u32 = 4096;

#[derive(Clone, Copy, Debug)]
struct Counter {
    count: u64,
    threshold: u64,
    targets: u32,
    /// The driver has been told.
    told: bool,
}

/// The regions that are counted, by context and start.
#[derive(Debug, Default)]
pub struct Counters(Mutex<BTreeMap<(u32, u64), Counter>>);

impl Counters {
    /// Sets, or removes, the counters of a range. Says whether the context has any then. What those that were there
    /// have put into `log` goes with them.
    pub fn set(&self, request: &Count, log: &EventLog) -> Result<bool, Error> {
        let Count {
            context,
            va,
            end,
            threshold,
            targets,
        } = *request;
        let mut counters = self.0.lock();
        if threshold > 0 {
            let regions = end.saturating_sub(va) / LARGE_PAGE_SIZE;
            let known = counters.range((context, va)..(context, end)).count();
            let others = counters.len().saturating_sub(known) as u64;
            if others.saturating_add(regions) > MAX_COUNTERS.into() {
                return Err(Error::Limit);
            }
        }
        // What is there, not what could be: a range may be the whole address space.
        let known: Vec<_> = counters
            .range((context, va)..(context, end))
            .map(|(&key, _)| key)
            .collect();
        for key in known {
            counters.remove(&key);
        }
        log.forget_counts(context, va, end);
        if threshold > 0 {
            for start in (va..end).step_by(LARGE_PAGE_SIZE as usize) {
                let counter = Counter {
                    count: 0,
                    threshold,
                    targets,
                    told: false,
                };
                counters.insert((context, start), counter);
            }
        }
        Ok(counters
            .range((context, 0)..=(context, u64::MAX))
            .next()
            .is_some())
    }

    /// The count of a region; zero if nobody counts.
    pub fn get(&self, context: u32, va: u64) -> u64 {
        let region = va & !(LARGE_PAGE_SIZE - 1);
        self.0
            .lock()
            .get(&(context, region))
            .map_or(0, |counter| counter.count)
    }

    /// Adds accesses. Says how many counters have reached their threshold by that; the log knows which.
    pub fn add(&self, context: u32, ring: u16, accesses: &[(u64, u32, u64)], log: &EventLog) -> u64 {
        let mut reached = 0_u64;
        let mut counters = self.0.lock();
        for &(region, target, number) in accesses {
            let Some(counter) = counters.get_mut(&(context, region)) else {
                continue;
            };
            if counter.targets & target == 0 {
                continue;
            }
            counter.count = counter.count.saturating_add(number);
            if counter.count >= counter.threshold && !counter.told {
                counter.told = true;
                reached = reached.saturating_add(1);
                log.push(EventRecord {
                    kind: EVENT_ACCESS_COUNT,
                    ring,
                    context,
                    va: region,
                    length: counter.count,
                    ..EventRecord::default()
                });
            }
        }
        reached
    }

    /// Removes the counters of a context that has gone.
    pub fn forget(&self, context: u32) {
        self.0.lock().retain(|&(of, _), _| of != context);
    }

    /// Removes all counters.
    pub fn clear(&self) {
        self.0.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_abi::{COUNT_SYSTEM, COUNT_VRAM, VA_END};

    const REGION: u64 = LARGE_PAGE_SIZE;

    fn count(context: u32, regions: std::ops::Range<u64>, threshold: u64) -> Count {
        Count {
            context,
            va: regions.start * REGION,
            end: regions.end * REGION,
            threshold,
            targets: if threshold == 0 { 0 } else { COUNT_SYSTEM },
        }
    }

    #[test]
    fn thresholds_are_told_once() {
        let counters = Counters::default();
        let log = EventLog::default();
        assert_eq!(counters.set(&count(1, 2..4, 10), &log), Ok(true));
        let add = |context, region, target, number| {
            counters.add(context, 0, &[(region * REGION, target, number)], &log)
        };
        assert_eq!(add(1, 2, COUNT_SYSTEM, 9), 0);
        assert_eq!(add(1, 2, COUNT_VRAM, 9), 0);
        assert_eq!(add(2, 2, COUNT_SYSTEM, 9), 0);
        assert_eq!(add(1, 4, COUNT_SYSTEM, 90), 0);
        assert!(log.is_empty());
        assert_eq!(add(1, 2, COUNT_SYSTEM, 2), 1);
        assert_eq!(add(1, 2, COUNT_SYSTEM, 2), 0);
        let event = log.take().unwrap();
        assert_eq!(
            (event.kind, event.context, event.va),
            (EVENT_ACCESS_COUNT, 1, 2 * REGION)
        );
        assert_eq!((event.length, log.len()), (11, 0));
        assert_eq!(counters.get(1, 2 * REGION + 5), 13);
        // Set anew it counts from zero, and tells again.
        assert_eq!(counters.set(&count(1, 2..3, 1), &log), Ok(true));
        assert_eq!(add(1, 2, COUNT_SYSTEM, 1), 1);
        assert_eq!(counters.set(&count(1, 0..VA_END / REGION, 0), &log), Ok(false));
        assert_eq!(counters.get(1, 2 * REGION), 0);
    }

    #[test]
    fn there_is_a_limit() {
        let counters = Counters::default();
        let log = EventLog::default();
        let limit = u64::from(MAX_COUNTERS);
        assert_eq!(counters.set(&count(0, 0..limit + 1, 1), &log), Err(Error::Limit));
        assert_eq!(counters.set(&count(0, 0..limit, 1), &log), Ok(true));
        assert_eq!(counters.set(&count(0, 5..limit, 2), &log), Ok(true));
        assert_eq!(counters.set(&count(1, 0..1, 1), &log), Err(Error::Limit));
        counters.forget(0);
        assert_eq!(counters.set(&count(1, 0..1, 1), &log), Ok(true));
        counters.clear();
        assert_eq!(counters.set(&count(0, 0..limit, 1), &log), Ok(true));
    }
}
