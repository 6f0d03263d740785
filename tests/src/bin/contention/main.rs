// SPDX-License-Identifier: Apache-2.0 OR MIT

//! CPU threads and the GPU increment the same counters, in ordinary memory of this process. Nothing may get lost.
//!
//! A CPU thread increments with an atomic instruction. The GPU's increment is a load and then a store, since
//! its bus has no atomics. (Its rings do not lose each other's.) So increments get lost unless the GPU has a page for itself while it works on it. That
//! is done in several ways, a row of the table for each, and in one row not at all, to show that this
//! program would notice.

mod job;
mod report;
mod residence;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use pinion_client::{Atomics, Statistics};
use pinion_tests::Failure;

use crate::residence::Residence;

/// CPU threads and the GPU increment the same counters. Fails when a protected row loses an increment, when the
/// unprotected row loses none, or when a side does not get on.
#[derive(Debug, Parser)]
struct Options {
    /// The rows of the table; all of them, if not given
    #[arg(long = "mode", value_enum)]
    modes: Vec<Mode>,
    /// CPU threads
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: u8,
    /// Pages that the counters are spread over
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=512))]
    pages: u16,
    /// Counters in each page
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    counters: u16,
    /// Increments in each command; there is one command per page in a batch
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Batches that the GPU has queued at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..))]
    in_flight: u8,
    /// Milliseconds of work for each row
    #[arg(long, value_name = "MS", default_value_t = 750)]
    duration: u64,
    /// The first command ring to use
    #[arg(long, default_value_t = 0)]
    ring: u32,
    /// Command rings to use
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    rings: u32,
    /// Fail if one side makes less than this part of all increments of a protected row, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=50))]
    least_share: u8,
    /// The GPU
    #[arg(long, default_value = pinion_tests::DEVICE)]
    device: PathBuf,
    /// One JSON object per line instead of tables
    #[arg(long)]
    json: bool,
}

/// How the GPU's increments are protected from those of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Not at all: the page is mapped by both sides
    Unprotected,
    /// The page is pinned in place for the GPU
    Pin,
    /// The page stays the process's, which cannot access it (`make_device_exclusive`)
    Exclusive,
    /// The page moves to VRAM
    Migrate,
    /// As the driver chooses
    Auto,
}

impl Mode {
    /// The rows, if nothing else is asked for. What `auto` chooses is one of them.
    const TABLE: [Self; 4] = [Self::Unprotected, Self::Pin, Self::Exclusive, Self::Migrate];
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Pin => "pin",
            Self::Exclusive => "exclusive",
            Self::Migrate => "migrate",
            Self::Auto => "auto",
        }
    }

    fn advice(self) -> Atomics {
        match self {
            Self::Unprotected => Atomics::Unprotected,
            Self::Pin => Atomics::Pin,
            Self::Exclusive => Atomics::Exclusive,
            Self::Migrate => Atomics::Migrate,
            Self::Auto => Atomics::Auto,
        }
    }

    /// How many pages the GPU has got to itself, and how many of them were taken back by the CPU.
    fn handed_over(self, statistics: &Statistics) -> (u64, u64) {
        match self {
            Self::Unprotected => (0, 0),
            Self::Pin => (statistics.pins, statistics.unpins),
            // The kernel takes such a page back by itself, and tells the driver only to forget it.
            Self::Exclusive => (statistics.exclusives, statistics.invalidations),
            Self::Migrate => (statistics.to_vram, statistics.from_vram),
            Self::Auto => (
                statistics.pins + statistics.to_vram,
                statistics.unpins + statistics.from_vram,
            ),
        }
    }

    /// Must nothing get lost?
    fn protects(self) -> bool {
        self != Self::Unprotected
    }
}

fn run(options: &Options) -> Result<Vec<String>, Failure> {
    let modes = if options.modes.is_empty() {
        &Mode::TABLE[..]
    } else {
        &options.modes
    };
    let settings = job::Settings {
        device: &options.device,
        ring: options.ring,
        rings: options.rings,
        least_share: options.least_share,
        threads: options.threads.into(),
        pages: options.pages.into(),
        counters: options.counters.into(),
        repeat: options.repeat,
        in_flight: options.in_flight.into(),
        duration: Duration::from_millis(options.duration),
    };
    let mut complaints = Vec::new();

    let mut table = report::Table::new(options.json);
    for &mode in modes {
        let row = job::run(&settings, mode)?;
        table.print(&row);
        complaints.extend(row.complaints());
    }

    if modes.contains(&Mode::Pin) {
        let residences = residence::watch(&settings)?;
        report::residences(&residences, options.json);
        complaints.extend(residences.iter().flat_map(Residence::complaints));
    }
    Ok(complaints)
}

fn main() -> ExitCode {
    let complaints = run(&Options::parse())
        .unwrap_or_else(|error| vec![format!("it could not be run: {}", pinion_tests::chain(&*error))]);
    for complaint in &complaints {
        eprintln!("contention: FAILED: {complaint}");
    }
    if complaints.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
