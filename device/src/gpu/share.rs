// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How much of an engine's time each context has had.

use std::time::Duration;

/// Contexts that are told apart. Those beyond count as new ones each time; an engine has at most 16 rings, so there are
/// never more that want it at the same time.
const MAX_KNOWN: usize = 64;

/// The time that contexts have had, in nanoseconds, beyond a common floor.
#[derive(Debug, Default)]
pub(super) struct Shares {
    used: Vec<(u32, u64)>,
    /// What the context that was served last had had. Who comes back later has had no less: time that was
    /// not used is not saved up.
    floor: u64,
    turns: u64,
}

impl Shares {
    /// What a context has had.
    pub(super) fn used(&self, context: u32) -> u64 {
        let known = self.used.iter().find(|(of, _)| *of == context);
        known.map_or(self.floor, |(_, used)| (*used).max(self.floor))
    }

    /// A context that has had `used` is served.
    pub(super) fn chosen(&mut self, used: u64) {
        self.floor = self.floor.max(used);
    }

    /// A number that grows with every slice.
    pub(super) fn turn(&mut self) -> u64 {
        self.turns = self.turns.wrapping_add(1);
        self.turns
    }

    /// A context has had `time` more.
    pub(super) fn charge(&mut self, context: u32, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let used = self.used(context).saturating_add(time);
        if let Some(entry) = self.used.iter_mut().find(|(of, _)| *of == context) {
            entry.1 = used;
            return;
        }
        let floor = self.floor;
        if self.used.len() >= MAX_KNOWN {
            self.used.retain(|(_, used)| *used > floor);
        }
        if self.used.len() < MAX_KNOWN {
            self.used.push((context, used));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_was_not_used_is_not_saved_up() {
        let mut shares = Shares::default();
        shares.charge(1, Duration::from_nanos(500));
        assert_eq!((shares.used(1), shares.used(2)), (500, 0));
        shares.chosen(400);
        shares.charge(2, Duration::from_nanos(50));
        assert_eq!((shares.used(1), shares.used(2), shares.used(3)), (500, 450, 400));
    }

    #[test]
    fn is_bounded() {
        let mut shares = Shares::default();
        for context in 0..1000 {
            shares.chosen(u64::from(context) * 10);
            shares.charge(context, Duration::from_nanos(1));
        }
        assert!(shares.used.len() <= MAX_KNOWN);
        assert_eq!(shares.used(999), 9991);
    }
}
