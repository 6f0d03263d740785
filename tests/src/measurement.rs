// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the program `measure` has found, a JSON object for each line. It is taken in a guest, and shown and looked at on the host.

use serde::{Deserialize, Serialize};

/// Something that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Row {
    /// Compared with something else in time.
    Ratio(Ratio),
    /// Counted.
    Count(Count),
    /// A way to hand pages to the GPU and back.
    Handover(Handover),
    /// Both sides at work.
    Contention(Contention),
    /// Where this was measured. It comes last.
    Machine(Machine),
}

/// A median, and the bounds of the half of all values that are around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The first quartile.
    pub low: f64,
    /// The third quartile.
    pub high: f64,
}

impl Spread {
    /// That of these values; of none, zero.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = (values.len().saturating_sub(1) as f64 * part).round() as usize;
            values.get(place).copied().unwrap_or(0.0)
        };
        Self {
            median: at(0.5),
            low: at(0.25),
            high: at(0.75),
        }
    }

    /// That of the reciprocals.
    #[must_use]
    pub fn inverse(self) -> Self {
        Self {
            median: 1.0 / self.median,
            low: 1.0 / self.high,
            high: 1.0 / self.low,
        }
    }
}

/// The part of the page that a row is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// Pages that move to VRAM and home.
    Migration,
    /// Faults of the GPU.
    Faults,
    /// Submissions.
    Submission,
    /// Changes of the CPU's page table.
    Notifier,
    /// Exclusive access.
    Exclusive,
}

/// Something compared with something else in time, the two taking turns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// What it is about.
    pub subject: Subject,
    /// What is measured.
    pub name: String,
    /// With what it is compared.
    pub against: String,
    /// Its time to that of the other, in neighbouring turns.
    pub ratio: Spread,
    /// Nanoseconds that it takes, the median.
    pub nanoseconds: f64,
    /// Nanoseconds that the other takes, the median.
    pub reference: f64,
    /// Whether it is the speed that is of interest, and not the time.
    pub speed: bool,
    /// The ratio in time is to be this at most.
    pub aim: Option<f64>,
}

impl Ratio {
    /// Whether it is as it was meant to be, if anything was meant.
    #[must_use]
    pub fn is_met(&self) -> Option<bool> {
        self.aim.map(|aim| self.ratio.median <= aim)
    }
}

/// What crossed the bus: counted by the driver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Count {
    /// What it is about.
    pub subject: Subject,
    /// What was done.
    pub name: String,
    /// How often the driver asked something of the device and waited, each time it was done.
    pub round_trips: f64,
    /// Faults that the device reported, each time it was done.
    pub faults: f64,
    /// There are to be this many round trips at most.
    pub aim: Option<f64>,
}

impl Count {
    /// Whether it is as it was meant to be, if anything was meant.
    #[must_use]
    pub fn is_met(&self) -> Option<bool> {
        self.aim.map(|aim| self.round_trips <= aim)
    }
}

/// A way to hand pages to the GPU and back. Times are those for one page, as multiples of a minor page fault of a CPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Handover {
    /// `pin`, `exclusive`, `migrate`.
    pub mechanism: String,
    /// How many pages.
    pub pages: usize,
    /// Whether they were one folio to begin with.
    pub folio: bool,
    /// Until an atomic operation of the GPU on each is done.
    pub acquire: Spread,
    /// Until the CPU has touched each.
    pub release: Spread,
    /// The same, when it is asked for as one operation beforehand. None: there is no such operation.
    pub release_at_once: Option<Spread>,
    /// Bytes that were copied, there and back.
    pub moved: u64,
    /// Round trips for the first.
    pub acquire_trips: f64,
    /// For the second.
    pub release_trips: f64,
    /// For the third.
    pub release_at_once_trips: Option<f64>,
    /// Faults of the GPU for the first.
    pub faults: f64,
}

/// A CPU thread and the GPU increment, and some of the thread's increments are on the GPU's page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contention {
    /// `pin`, `exclusive`, `migrate`.
    pub mechanism: String,
    /// Percent of the thread's increments that are on the GPU's page.
    pub percent: u32,
    /// Increments of the thread for each that it makes when neither is in the other's way.
    pub cpu: f64,
    /// Increments of the GPU, likewise.
    pub gpu: f64,
    /// Increments of the thread in a second.
    pub cpu_rate: f64,
    /// Increments of the GPU in a second.
    pub gpu_rate: f64,
    /// Pages that were handed to the GPU in a second.
    pub handovers: f64,
}

/// Where this was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Processors of the guest.
    pub processors: usize,
    /// Its kernel.
    pub kernel: String,
    /// `migrate_pfn_pin` or `takeover`.
    pub pin_method: String,
    /// Whether it is emulated.
    pub emulated: bool,
    /// Whether this was only a trial of whether it works.
    pub quick: bool,
}

/// Reads the rows.
///
/// # Errors
///
/// Something else than rows is there, or they do not end with that of the machine.
pub fn parse(text: &str) -> Result<Vec<Row>, crate::Failure> {
    let rows = text
        .lines()
        .map(|line| serde_json::from_str(line).map_err(|error| format!("{line:?}: {error}").into()))
        .collect::<Result<Vec<Row>, crate::Failure>>()?;
    match rows.last() {
        Some(Row::Machine(_)) => Ok(rows),
        _ => Err("the measurements have ended early".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_the_middle_half() {
        let spread = Spread::of(vec![5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!((spread.low, spread.median, spread.high), (2.0, 3.0, 4.0));
        let inverse = spread.inverse();
        assert_eq!((inverse.low, inverse.high), (0.25, 0.5));
    }

    #[test]
    fn rows_that_end_early_are_refused() {
        let count = Row::Count(Count {
            subject: Subject::Migration,
            name: "a".to_owned(),
            round_trips: 3.0,
            faults: 0.0,
            aim: Some(3.0),
        });
        let line = serde_json::to_string(&count).unwrap();
        assert!(parse(&line).is_err());
        let machine = Row::Machine(Machine {
            processors: 2,
            kernel: "7".to_owned(),
            pin_method: "takeover".to_owned(),
            emulated: true,
            quick: true,
        });
        let both = format!("{line}\n{}\n", serde_json::to_string(&machine).unwrap());
        assert_eq!(parse(&both).unwrap(), [count, machine]);
    }
}
