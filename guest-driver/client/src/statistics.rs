// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a file's fdinfo says.

use std::time::Duration;

/// What has happened since a [`Gpu`](crate::Gpu) was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Tells open files of all devices apart.
    pub client: u64,
    /// Faults that the device has reported.
    pub faults: u64,
    /// Pages that were pinned.
    pub pins: u64,
    /// Pinned pages that were given back.
    pub unpins: u64,
    /// Pages that were mapped for the GPU without being pinned.
    pub mirrors: u64,
    /// Pages that were made exclusive to the device in place, by `make_device_exclusive`.
    pub exclusives: u64,
    /// Pages that were moved to VRAM.
    pub to_vram: u64,
    /// Pages that came home from VRAM.
    pub from_vram: u64,
    /// Those of them that had to make room for others.
    pub evictions: u64,
    /// Invalidations that the device was asked for.
    pub invalidations: u64,
    /// Submissions.
    pub submissions: u64,
    /// Commands in them.
    pub commands: u64,
    /// Submissions that have ended.
    pub completed: u64,
    /// Those of them that have failed.
    pub failed: u64,
    /// Submissions that have not ended.
    pub outstanding: u64,
    /// For how long each ring was busy with this work.
    pub busy: Vec<Duration>,
}

impl Statistics {
    /// Reads the statistics from the text of an fdinfo file. What it does not know it skips.
    pub(crate) fn parse(text: &str) -> Self {
        let mut statistics = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.strip_prefix("pinion-").and_then(|rest| rest.split_once(':'))
            else {
                continue;
            };
            if let Some(ring) = name.strip_prefix("engine-ring") {
                let nanoseconds = value
                    .trim()
                    .strip_suffix(" ns")
                    .and_then(|value| value.parse().ok());
                // They come in order.
                if let (Ok(ring), Some(nanoseconds)) = (ring.parse::<usize>(), nanoseconds) {
                    if ring == statistics.busy.len() {
                        statistics.busy.push(Duration::from_nanos(nanoseconds));
                    }
                }
                continue;
            }
            let field = match name {
                "client-id" => &mut statistics.client,
                "faults" => &mut statistics.faults,
                "pins" => &mut statistics.pins,
                "unpins" => &mut statistics.unpins,
                "mirrors" => &mut statistics.mirrors,
                "exclusives" => &mut statistics.exclusives,
                "to-vram" => &mut statistics.to_vram,
                "from-vram" => &mut statistics.from_vram,
                "evictions" => &mut statistics.evictions,
                "invalidations" => &mut statistics.invalidations,
                "submissions" => &mut statistics.submissions,
                "commands" => &mut statistics.commands,
                "completed" => &mut statistics.completed,
                "failed" => &mut statistics.failed,
                "outstanding" => &mut statistics.outstanding,
                _ => continue,
            };
            if let Ok(value) = value.trim().parse() {
                *field = value;
            }
        }
        statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_an_fdinfo_file() {
        let text = "pos:\t0\nflags:\t0100002\npinion-driver:\tpinion\npinion-client-id:\t5\npinion-faults:\t12\n\
                    pinion-pins:\t3\npinion-unpins:\t2\npinion-mirrors:\t5\npinion-exclusives:\t9\npinion-to-vram:\t8\n\
                    pinion-from-vram:\t6\npinion-evictions:\t1\npinion-invalidations:\t7\n\
                    pinion-submissions:\t4\npinion-commands:\t40\npinion-completed:\t3\npinion-failed:\t1\n\
                    pinion-outstanding:\t1\npinion-engine-ring0:\t1500 ns\npinion-engine-ring1:\t0 ns\npinion-later:\t9\n";
        let expected = Statistics {
            client: 5,
            faults: 12,
            pins: 3,
            unpins: 2,
            mirrors: 5,
            exclusives: 9,
            to_vram: 8,
            from_vram: 6,
            evictions: 1,
            invalidations: 7,
            submissions: 4,
            commands: 40,
            completed: 3,
            failed: 1,
            outstanding: 1,
            busy: vec![Duration::from_nanos(1500), Duration::ZERO],
        };
        assert_eq!(Statistics::parse(text), expected);
    }
}
