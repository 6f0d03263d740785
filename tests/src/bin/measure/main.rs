// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long the driver takes for what it does, compared with what a CPU takes for something like it, in one boot of a guest.
//!
//! `measure take` is for the guest, and prints what it finds for programs. `measure show` is for the host: it reads
//! that, prints it for people, and puts it into the documentation. `qemu-scripts/measure` does the one and then the other.

mod bus;
mod chart;
mod contended;
mod handover;
mod latency;
mod memory;
mod migration;
mod notifier;
mod page;
mod peer;
mod turns;

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, ValueEnum};
use pinion_client::{Gpu, PinMethod};
use pinion_tests::measurement::{self, Machine, Row};
use pinion_tests::{DEVICE, Failure};

use crate::bus::Bus;
use crate::peer::{Echo, Keeper, Plain};
use crate::turns::Amount;

/// Measures the driver in a guest, and shows what was found.
#[derive(Debug, Parser)]
enum Options {
    /// Measure. Prints a JSON object for each row
    Take(Take),
    /// Read such rows from the standard input, and print them as they are shown in the documentation
    Show(Show),
}

#[derive(Debug, Args)]
struct Take {
    /// The parts to be measured; all of them, if not given
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Only see whether it works: the numbers say nothing
    #[arg(long)]
    quick: bool,
    /// The GPU
    #[arg(long, default_value = DEVICE)]
    device: PathBuf,
}

#[derive(Debug, Args)]
struct Show {
    /// Put it between the marks of a page, and the chart beside that page
    #[arg(long, value_name = "PAGE")]
    write: Option<PathBuf>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Pages that move to VRAM and home
    Migration,
    /// Faults of the GPU
    Faults,
    /// Submissions
    Submission,
    /// Changes of the CPU's page table
    Notifier,
    /// Exclusive access
    Exclusive,
    /// Exclusive access under contention
    Contention,
}

impl Part {
    fn measure(self, bench: &mut Bench) -> Result<(), Failure> {
        match self {
            Self::Migration => migration::measure(bench),
            Self::Faults => latency::faults(bench),
            Self::Submission => latency::submissions(bench),
            Self::Notifier => notifier::measure(bench),
            Self::Exclusive => handover::measure(bench),
            Self::Contention => contended::measure(bench),
        }
    }
}

/// What it takes to measure.
struct Bench {
    device: PathBuf,
    amount: Amount,
    bus: Bus,
    echo: Echo,
    plain: Plain,
    keeper: Keeper,
}

impl Bench {
    fn open(&self) -> Result<Gpu, Failure> {
        Ok(Gpu::open(&self.device)?)
    }
}

fn take(options: &Take) -> Result<(), Failure> {
    turns::begin("the beginning");
    let mut bench = Bench {
        // They are forked, so they come before threads, and before a GPU is opened.
        echo: Echo::new()?,
        plain: Plain::new()?,
        keeper: Keeper::new()?,
        device: options.device.clone(),
        amount: Amount::new(options.quick),
        bus: Bus::of(&options.device)?,
    };
    turns::watch();
    let parts = if options.parts.is_empty() {
        Part::value_variants()
    } else {
        &options.parts
    };
    for part in parts {
        part.measure(&mut bench)?;
    }
    let pin_method = match bench.open()?.info()?.pin_method {
        PinMethod::MigratePfn => "migrate_pfn_pin",
        PinMethod::Takeover => "takeover",
    };
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    turns::print(&Row::Machine(Machine {
        processors: std::thread::available_parallelism()?.get(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        pin_method: pin_method.to_owned(),
        emulated: processor.contains("TCG"),
        quick: options.quick,
    }))
}

fn show(options: &Show) -> Result<(), Failure> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let rows = measurement::parse(&text)?;
    let shown = page::show(&rows);
    match &options.write {
        None => print!("{shown}"),
        Some(page) => write(page, &rows, &shown)?,
    }
    Ok(())
}

fn write(page: &Path, rows: &[Row], shown: &str) -> Result<(), Failure> {
    let failed = |path: &Path, error: std::io::Error| Failure::from(format!("{}: {error}", path.display()));
    if rows
        .iter()
        .any(|row| matches!(row, Row::Machine(machine) if machine.quick))
    {
        return Err("these are numbers of a quick run, which say nothing".into());
    }
    let old = fs::read_to_string(page).map_err(|error| failed(page, error))?;
    let new = page::replace(&old, shown).ok_or_else(|| format!("{} has no marks", page.display()))?;
    let picture = page.with_file_name(page::CHART);
    fs::write(&picture, chart::draw(rows)).map_err(|error| failed(&picture, error))?;
    fs::write(page, new).map_err(|error| failed(page, error))
}

fn main() -> ExitCode {
    let result = match Options::parse() {
        Options::Take(options) => take(&options),
        Options::Show(options) => show(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("measure: FAILED: {}", pinion_tests::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
