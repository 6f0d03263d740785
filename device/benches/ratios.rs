// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ratios: each pair of [`cases`] takes turns, many times, so that whatever else the machine does hits both alike.
//!
//! What is said is the median of the ratios of neighbouring turns, and within which bounds half of them are.
//!
//! `cargo bench -p pinion-device --bench ratios` prints the table; with `-- --write docs/measurements.md` it
//! also takes the place of the one on that page. With `-- WORD`, only pairs with that word in their name.

mod cases;

use std::fmt::Write;
use std::time::{Duration, Instant};

use cases::{Aim, Pair};

/// How long a pair is measured, and how often at least it takes turns.
const PERIOD: Duration = Duration::from_secs(4);
const TURNS: usize = 25;

const BEGIN: &str = "<!-- Written by the benchmark \"ratios\" of pinion-device: from here -->\n";
const END: &str = "<!-- to here -->\n";

/// What a pair has shown.
struct Outcome {
    /// Device to reference, in time.
    ratios: Vec<f64>,
    /// Seconds for one, of the device and of the reference.
    device: f64,
    reference: f64,
}

fn quantile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}

fn measure(pair: &mut dyn Pair, quick: bool) -> Outcome {
    let count = pair.count();
    let per = |took: Duration| took.as_secs_f64() / count as f64;
    // Warm.
    pair.device(count);
    pair.reference(count);
    let (mut devices, mut references, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let start = Instant::now();
    while ratios.is_empty() || !quick && (ratios.len() < TURNS || start.elapsed() < PERIOD) {
        // Who comes first gains or loses nothing over all.
        let (device, reference) = if ratios.len() % 2 == 0 {
            let device = pair.device(count);
            (device, pair.reference(count))
        } else {
            let reference = pair.reference(count);
            (pair.device(count), reference)
        };
        devices.push(per(device));
        references.push(per(reference));
        ratios.push(per(device) / per(reference));
    }
    for list in [&mut devices, &mut references, &mut ratios] {
        list.sort_by(f64::total_cmp);
    }
    Outcome {
        device: quantile(&devices, 0.5),
        reference: quantile(&references, 0.5),
        ratios,
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s if s >= 1e-6 => format!("{:.2} µs", s * 1e6),
        s => format!("{:.1} ns", s * 1e9),
    }
}

/// A line of the table.
fn line(pair: &dyn Pair, outcome: &Outcome) -> String {
    let at = |part| quantile(&outcome.ratios, part);
    let (ratio, aim) = match pair.aim() {
        Aim::Speed(least) => {
            let verdict = if 1.0 / at(0.5) >= least { "" } else { ", missed" };
            (
                format!(
                    "{:.2} of its speed ({:.2} to {:.2})",
                    1.0 / at(0.5),
                    1.0 / at(0.75),
                    1.0 / at(0.25)
                ),
                format!("at least {least}{verdict}"),
            )
        }
        Aim::Time(most) => {
            let verdict = if at(0.5) <= most { "" } else { ", missed" };
            (
                format!("{:.2} times ({:.2} to {:.2})", at(0.5), at(0.25), at(0.75)),
                format!("at most {most}{verdict}"),
            )
        }
        Aim::None => (
            format!("{:.2} times ({:.2} to {:.2})", at(0.5), at(0.25), at(0.75)),
            String::new(),
        ),
    };
    format!(
        "| {} | {} | {} | {ratio} | {aim} | {} |",
        pair.name(),
        time(outcome.device),
        pair.against(),
        time(outcome.reference)
    )
}

/// What the page says of the machine; without the name of it.
fn machine() -> String {
    let field = |file: &str, key: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key));
        let value = line.and_then(|line| line.split(':').nth(1));
        value.unwrap_or("unknown").trim().to_owned()
    };
    let flags = field("/proc/cpuinfo", "flags");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{}{}, {} processors, {} GiB of memory, Linux {}",
        field("/proc/cpuinfo", "model name"),
        if flags.split(' ').any(|flag| flag == "hypervisor") {
            " (a virtual machine)"
        } else {
            ""
        },
        std::thread::available_parallelism().map_or(0, usize::from),
        field("/proc/meminfo", "MemTotal")
            .split(' ')
            .next()
            .and_then(|kib| kib.parse::<u64>().ok())
            .map_or(0, |kib| (kib + (1 << 19)) >> 20),
        kernel.trim(),
    )
}

/// Puts `table` between the two marks of a page.
fn write_into(path: &str, table: &str) {
    let page = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (before, rest) = page.split_once(BEGIN).expect("the page has a mark");
    let (_, after) = rest.split_once(END).expect("the page has a second mark");
    std::fs::write(path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    // Without it this is a test of whether it works.
    let quick = !arguments.iter().any(|argument| argument == "--bench");
    let page = arguments
        .iter()
        .position(|argument| argument == "--write")
        .map(|at| arguments.get(at + 1).expect("--write PATH").clone());
    let word = arguments
        .iter()
        .find(|&argument| !argument.starts_with('-') && Some(argument) != page.as_ref());

    let mut table = String::from(
        "| the device | takes | against | ratio (half of them are from, to) | aim | that takes |\n\
         |---|---|---|---|---|---|\n",
    );
    print!("{table}");
    for make in cases::all() {
        let mut pair = make();
        if word.is_some_and(|word| !pair.name().contains(word.as_str())) {
            continue;
        }
        let outcome = measure(&mut *pair, quick);
        let line = line(&*pair, &outcome);
        println!("{line}");
        writeln!(table, "{line}").unwrap();
    }
    if word.is_none() {
        let (own, all) = cases::queue::idle_memory();
        let memory = format!(
            "\nAn idle daemon with 1 TiB of VRAM and one ring: {:.1} MiB of anonymous memory, {:.1} MiB resident.\n",
            own as f64 / 1024.0,
            all as f64 / 1024.0
        );
        print!("{memory}");
        table.push_str(&memory);
    }
    let machine = format!("\nMeasured on: {}.\n", machine());
    print!("{machine}");
    table.push_str(&machine);
    if let Some(page) = page {
        // Cargo runs benchmarks in the directory of their package.
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(page);
        write_into(page.to_str().expect("a path in UTF-8"), &table);
    }
}
