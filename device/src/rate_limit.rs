// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Messages that somebody else can provoke, and who must not fill the log with them.
//!
//! Of each kind one message gets through in [`INTERVAL`]; the next one that does says how many did not.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How often a message of one kind is logged at most.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// When a message was logged, and how many were not.
#[derive(Debug)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

/// Limits the messages of one kind.
#[derive(Debug)]
pub struct RateLimit {
    state: Mutex<State>,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl RateLimit {
    /// The first message gets through.
    pub const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                last: None,
                suppressed: 0,
            }),
        }
    }

    /// Whether a message gets through now, and how many of them did not since the last one that did.
    pub fn admit(&self) -> Option<Suppressed> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<Suppressed> {
        let mut state = self.state.lock();
        let early = state
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < INTERVAL);
        if early {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(Suppressed(std::mem::take(&mut state.suppressed)))
    }
}

/// How many messages were not logged; shows as what is to be put behind the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suppressed(pub u64);

impl std::fmt::Display for Suppressed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            number => write!(formatter, " (and {number} more of this kind)"),
        }
    }
}

/// `log::warn!`, at most once in [`INTERVAL`]: for each place where it stands, or for each [`RateLimit`] that is
/// given with `limit = …;` before the message.
#[macro_export]
macro_rules! warn_limited {
    (limit = $limit:expr; $($message:tt)+) => {
        if let Some(suppressed) = $limit.admit() {
            log::warn!("{}{suppressed}", format_args!($($message)+));
        }
    };
    ($($message:tt)+) => {{
        static LIMIT: $crate::rate_limit::RateLimit = $crate::rate_limit::RateLimit::new();
        $crate::warn_limited!(limit = LIMIT; $($message)+);
    }};
}

pub use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_gets_through_and_the_next_says_how_many_did_not() {
        let limit = RateLimit::new();
        let start = Instant::now();
        assert_eq!(limit.admit_at(start), Some(Suppressed(0)));
        for millisecond in 0..1000 {
            assert_eq!(limit.admit_at(start + Duration::from_millis(millisecond)), None);
        }
        assert_eq!(limit.admit_at(start + INTERVAL), Some(Suppressed(1000)));
        assert_eq!(limit.admit_at(start + INTERVAL), None);
        assert_eq!(limit.admit_at(start + 2 * INTERVAL), Some(Suppressed(1)));
        assert_eq!(limit.admit_at(start + 3 * INTERVAL), Some(Suppressed(0)));
    }

    #[test]
    fn what_is_put_behind_a_message() {
        assert_eq!(Suppressed(0).to_string(), "");
        assert_eq!(Suppressed(7).to_string(), " (and 7 more of this kind)");
    }
}
