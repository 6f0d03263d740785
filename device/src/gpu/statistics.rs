// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the device has done since its frontend connected.

use std::sync::atomic::{AtomicU64, Ordering};

use super::status::Error;

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
    /// Requests and submissions that ended with INVALID.
    status_invalid,
    /// Requests and submissions that ended with UNSUPPORTED.
    status_unsupported,
    /// Requests and submissions that ended with NO_CONTEXT.
    status_no_context,
    /// Requests and submissions that ended with CONTEXT_EXISTS.
    status_context_exists,
    /// Requests and submissions that ended with LIMIT.
    status_limit,
    /// Requests and submissions that ended with BAD_ADDRESS.
    status_bad_address,
    /// Requests and submissions that ended with BUS_ERROR.
    status_bus_error,
    /// Requests and submissions that ended with CONTEXT_ERROR.
    status_context_error,
    /// Requests and submissions that ended with FAULT_CANCELLED.
    status_fault_cancelled,
    /// Requests and submissions that ended with NO_FAULT.
    status_no_fault,
    /// Requests and submissions that ended with RESET.
    status_reset,
    /// Requests and submissions that ended with HUNG.
    status_hung,
}

impl Statistics {
    /// The counter of requests and submissions that ended with `error`.
    pub fn status(&self, error: Error) -> &Counter {
        match error {
            Error::Invalid => &self.status_invalid,
            Error::Unsupported => &self.status_unsupported,
            Error::NoContext => &self.status_no_context,
            Error::ContextExists => &self.status_context_exists,
            Error::Limit => &self.status_limit,
            Error::BadAddress => &self.status_bad_address,
            Error::Bus => &self.status_bus_error,
            Error::ContextError => &self.status_context_error,
            Error::FaultCancelled => &self.status_fault_cancelled,
            Error::NoFault => &self.status_no_fault,
            Error::Reset => &self.status_reset,
            Error::Hung => &self.status_hung,
        }
    }
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
