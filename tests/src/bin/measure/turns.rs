// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taking turns: what is measured and what it is compared with follow each other, over and over, so that whatever else the
//! machine does hits both alike.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use pinion_tests::measurement::{Ratio, Row, Spread, Subject};

/// How much is to be measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount {
    /// Turns at least.
    turns: usize,
    /// For so long at least.
    period: Duration,
    /// And at most, unless that is less than three turns.
    limit: Duration,
    /// It is only to be seen whether it works.
    pub(crate) quick: bool,
}

impl Amount {
    /// Enough to say something, or a trial.
    pub(crate) fn new(quick: bool) -> Self {
        let (turns, period, limit) = if quick { (3, 0, 0) } else { (25, 3, 12) };
        Self {
            turns,
            period: Duration::from_secs(period),
            limit: Duration::from_secs(limit),
            quick,
        }
    }

    /// Numbers of turns, from 0.
    pub(crate) fn turns(self) -> impl Iterator<Item = usize> {
        let start = Instant::now();
        (0..).take_while(move |&turn| {
            let enough = turn >= self.turns && start.elapsed() >= self.period;
            let too_long = turn >= 3 && start.elapsed() >= self.limit;
            !(enough || (too_long && !self.quick))
        })
    }
}

/// Seconds that something took.
pub(crate) fn timed<T>(what: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = what();
    (start.elapsed().as_secs_f64(), result)
}

/// Seconds, turn by turn.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn push(&mut self, seconds: f64) {
        self.0.push(seconds);
    }

    /// The ratio to what was measured in the same turns.
    pub(crate) fn to(&self, other: &Self) -> Spread {
        Spread::of(
            self.0
                .iter()
                .zip(&other.0)
                .map(|(one, other)| one / other)
                .collect(),
        )
    }

    /// Turn by turn, this and the other together.
    pub(crate) fn with(&self, other: &Self) -> Self {
        Self(
            self.0
                .iter()
                .zip(&other.0)
                .map(|(one, other)| one + other)
                .collect(),
        )
    }

    fn nanoseconds(&self) -> f64 {
        Spread::of(self.0.clone()).median * 1e9
    }

    /// The row that compares this with another.
    pub(crate) fn row(&self, subject: Subject, name: &str, against: (&str, &Self)) -> Ratio {
        let (against, other) = against;
        Ratio {
            subject,
            name: name.to_owned(),
            against: against.to_owned(),
            ratio: self.to(other),
            nanoseconds: self.nanoseconds(),
            reference: other.nanoseconds(),
            speed: false,
            aim: None,
        }
    }
}

/// What is being measured, since when.
static NOW: Mutex<Option<(String, Instant)>> = Mutex::new(None);

/// Longest that may take.
const LIMIT: Duration = Duration::from_secs(90);

/// Says what is being measured from now on.
pub(crate) fn begin(what: &str) {
    eprintln!("measure: {what}");
    *NOW.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((what.to_owned(), Instant::now()));
}

/// Ends the program when something does not end: waits on both sides of a ratio are as short as they can be, and have no bounds
/// of their own.
pub(crate) fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = NOW
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .clone();
            if let Some((what, since)) = now {
                if since.elapsed() > pinion_tests::patiently(LIMIT) {
                    eprintln!("measure: FAILED: no end of '{what}' after {:?}", since.elapsed());
                    std::process::exit(1);
                }
            }
        }
    });
}

/// Prints a row.
pub(crate) fn print(row: &Row) -> Result<(), pinion_tests::Failure> {
    println!("{}", serde_json::to_string(row)?);
    Ok(())
}
