// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the device has done since its frontend connected.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    #[inline]
    pub fn count(&self) {
        self.add(1);
    }

    /// Counts `number`.
    #[inline]
    pub fn add(&self, number: u64) {
        if number > 0 {
            self.0.fetch_add(number, Ordering::Relaxed);
        }
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! statistics {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Counters of the device; they wrap, and are not reset with the device.
        #[derive(Debug, Default)]
        pub struct Statistics {
            $($(#[doc = $doc])+ pub $name: Counter,)+
        }

        impl Statistics {
            /// All counters, by name.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)+]
            }
        }
    };
}

statistics! {
    /// Requests of the control queue.
    requests,
    /// INVALIDATEs.
    invalidations,
    /// Requests that were refused.
    requests_refused,
    /// Page table entries that MAP has written.
    entries_written,
    /// Submissions that have ended.
    submissions,
    /// Submissions that ended with another status than OK.
    submissions_failed,
    /// Commands that were executed to their end.
    commands,
    /// Bytes that were copied.
    bytes_copied,
    /// Bytes that were filled.
    bytes_filled,
    /// Operations of ATOMICs.
    atomic_operations,
    /// Bytes that went over the bus: system memory loaded and stored by engines.
    bus_bytes,
    /// Translations that were found in a TLB.
    tlb_hits,
    /// Translations that were looked up in the page table.
    tlb_misses,
    /// Translations that had to make room for others in a TLB.
    tlb_evictions,
    /// Faults that were reported.
    faults,
    /// Accesses that joined a fault that was there.
    faults_joined,
    /// REPLAYs.
    replays,
    /// Accesses that got through when they were replayed.
    replays_through,
    /// CANCELs.
    cancels,
    /// Contexts that went into error.
    context_errors,
    /// Contexts that the watchdog has ended.
    hangs,
    /// PREFETCHes that found something missing.
    prefetches,
    /// Counters of regions that reached their threshold.
    access_counts,
    /// Times that an engine took up a ring's work.
    slices,
    /// Resets of the device.
    resets,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_names() {
        let statistics = Statistics::default();
        statistics.faults.count();
        statistics.bytes_copied.add(5);
        let list = statistics.list();
        assert!(list.contains(&("faults", 1)) && list.contains(&("bytes_copied", 5)));
        assert_eq!(list.iter().map(|(_, count)| count).sum::<u64>(), 6);
    }
}
