// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Device time.

use crate::sync::{Instant, now};

/// Counts nanoseconds since the device was made.
#[derive(Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(now())
    }
}

impl Clock {
    /// The time; never zero, which stands for none.
    pub fn now(&self) -> u64 {
        u64::try_from(now().saturating_duration_since(self.0).as_nanos())
            .unwrap_or(u64::MAX)
            .max(1)
    }
}
