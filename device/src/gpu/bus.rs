// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A bus that one can slow down.
//!
//! All engines share it. What is moved takes its time: a ring that has moved something goes on when the bus has
//! caught up with it, and meanwhile its engine can serve others.

use std::num::NonZeroU64;
use std::time::Duration;

use pinion_abi::PAGE_SIZE;

use crate::sync::{Instant, Mutex, now};

/// How far behind the bus may be without anybody waiting, so that late wake-ups of the host cost no bandwidth.
const SLACK: Duration = Duration::from_millis(1);

/// The bus between engines and system memory.
#[derive(Debug)]
pub struct Bus {
    latency: Duration,
    bandwidth: Option<NonZeroU64>,
    /// When it has moved all that it was given.
    free: Mutex<Instant>,
}

impl Bus {
    /// A bus that everything takes `latency` to cross, and `bandwidth` bytes cross in a second.
    pub fn new(latency: Duration, bandwidth: Option<NonZeroU64>) -> Self {
        Self {
            latency,
            bandwidth,
            free: Mutex::new(now().checked_sub(SLACK).unwrap_or_else(now)),
        }
    }

    /// How long something takes to get there and back.
    pub fn round_trip(&self) -> Duration {
        self.latency.saturating_mul(2)
    }

    /// Moves `bytes` over it. Says when that is done; none if there is nothing to wait for.
    pub fn moves(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let bandwidth = self.bandwidth?;
        if bytes == 0 {
            return None;
        }
        let nanoseconds = u128::from(bytes)
            .saturating_mul(1_000_000_000)
            .checked_div(bandwidth.get().into())
            .and_then(|nanoseconds| u64::try_from(nanoseconds).ok())
            .unwrap_or(u64::MAX);
        let mut free = self.free.lock();
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let done = (*free)
            .max(earliest)
            .checked_add(Duration::from_nanos(nanoseconds))?;
        *free = done;
        (done > now).then_some(done)
    }

    /// How much may be moved in one stay: no more than a millisecond's worth, or a page, since what was given to the bus
    /// goes over it even if its context has gone.
    pub fn stay(&self) -> u64 {
        self.bandwidth
            .map_or(u64::MAX, |bandwidth| (bandwidth.get() / 1000).max(PAGE_SIZE))
    }

    /// Forgets what it was given: the device is reset.
    pub fn clear(&self) {
        *self.free.lock() = now().checked_sub(SLACK).unwrap_or_else(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_bus_makes_nobody_wait() {
        let bus = Bus::new(Duration::ZERO, None);
        assert_eq!(bus.moves(1 << 40, Instant::now()), None);
        assert_eq!(bus.round_trip(), Duration::ZERO);
    }

    #[test]
    fn bandwidth_is_shared() {
        let bus = Bus::new(Duration::from_micros(3), NonZeroU64::new(1_000_000));
        assert_eq!(bus.round_trip(), Duration::from_micros(6));
        let start = Instant::now() + SLACK;
        // The slack is used up first.
        let first = bus.moves(101_000, start).unwrap();
        assert_eq!(first, start + Duration::from_millis(100));
        let second = bus.moves(50_000, start).unwrap();
        assert_eq!(second, first + Duration::from_millis(50));
        // When it has caught up, it starts again from there.
        let later = second + Duration::from_secs(1);
        assert_eq!(bus.moves(1000, later), None);
        assert_eq!(bus.moves(1000, later), Some(later + Duration::from_millis(1)));
        assert_eq!(bus.moves(0, later), None);
    }
}
