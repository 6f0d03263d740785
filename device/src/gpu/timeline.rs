// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The timelines of the rings: how far each has come.

use crate::sync::atomic::{AtomicU64, Ordering};

/// One number for each ring, which begins at zero and only grows.
#[derive(Debug)]
pub struct Timelines(Vec<AtomicU64>);

impl Timelines {
    /// For `rings` rings.
    pub fn new(rings: u16) -> Self {
        Self((0..rings).map(|_| AtomicU64::new(0)).collect())
    }

    /// How many rings there are.
    pub fn len(&self) -> u16 {
        // No more than `new` was given.
        self.0.len() as u16
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How far `ring` has come.
    pub fn get(&self, ring: u16) -> u64 {
        // Acquire: whoever sees the number sees what was done before.
        self.0
            .get(usize::from(ring))
            .map_or(0, |timeline| timeline.load(Ordering::Acquire))
    }

    /// Advances `ring` to `value`, or leaves it where it is if it has come further. Says where it is then.
    pub fn advance(&self, ring: u16, value: u64) -> u64 {
        self.0.get(usize::from(ring)).map_or(0, |timeline| {
            // Release: what was done before is visible to whoever sees the number.
            timeline.fetch_max(value, Ordering::AcqRel).max(value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_forward_only() {
        let timelines = Timelines::new(2);
        assert_eq!(timelines.advance(1, 5), 5);
        assert_eq!(timelines.advance(1, 3), 5);
        assert_eq!((timelines.get(0), timelines.get(1), timelines.get(2)), (0, 5, 0));
    }
}
