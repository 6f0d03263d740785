// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The part of the documentation that says what was found.

use std::fmt::Write as _;

use pinion_client::PAGE_SIZE;
use pinion_tests::measurement::{Contention, Count, Handover, Machine, Ratio, Row, Spread, Subject};

/// The picture that goes with it, beside the page.
pub(crate) const CHART: &str = "contention.svg";

const BEGIN: &str = "<!-- Written by qemu-scripts/measure: from here -->\n";
const END: &str = "<!-- to here: qemu-scripts/measure -->\n";

const SUBJECTS: [(Subject, &str); 5] = [
    (Subject::Migration, "Migration"),
    (Subject::Faults, "Faults of the GPU"),
    (Subject::Submission, "Submissions"),
    (Subject::Notifier, "Changes of the CPU's page table"),
    (Subject::Exclusive, "Exclusive access"),
];

/// Puts `text` between the marks of a page. None if it has no marks.
pub(crate) fn replace(page: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{text}{END}{after}"))
}

/// What was found, for people.
pub(crate) fn show(rows: &[Row]) -> String {
    let mut out = String::new();
    for (subject, title) in SUBJECTS {
        let ratios: Vec<_> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Ratio(ratio) if ratio.subject == subject => Some(ratio),
                _ => None,
            })
            .collect();
        let counts: Vec<_> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Count(count) if count.subject == subject => Some(count),
                _ => None,
            })
            .collect();
        let handovers: Vec<_> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Handover(row) if subject == Subject::Exclusive => Some(row),
                _ => None,
            })
            .collect();
        if ratios.is_empty() && counts.is_empty() && handovers.is_empty() {
            continue;
        }
        // Writing to a string does not fail.
        let _ = writeln!(out, "### {title}\n");
        show_handovers(&mut out, &handovers);
        show_ratios(&mut out, &ratios);
        show_counts(&mut out, &counts);
    }
    let contentions: Vec<_> = rows
        .iter()
        .filter_map(|row| match row {
            Row::Contention(row) => Some(row),
            _ => None,
        })
        .collect();
    show_contention(&mut out, &contentions);
    for row in rows {
        if let Row::Machine(machine) = row {
            out += &show_machine(machine);
        }
    }
    out
}

fn show_ratios(out: &mut String, rows: &[&Ratio]) {
    if rows.is_empty() {
        return;
    }
    out.push_str(
        "| the driver | takes | against | ratio (half of them are from, to) | aim | that takes |\n\
         |---|---|---|---|---|---|\n",
    );
    for row in rows {
        let ratio = if row.speed {
            format!("{} of its speed", spread(row.ratio.inverse()))
        } else {
            format!("{} times", spread(row.ratio))
        };
        let verdict = verdict(row.aim, row.is_met());
        let _ = writeln!(
            out,
            "| {} | {} | {} | {ratio} | {verdict} | {} |",
            row.name,
            pace(row, row.nanoseconds),
            row.against,
            pace(row, row.reference)
        );
    }
    out.push('\n');
}

fn show_counts(out: &mut String, rows: &[&Count]) {
    if rows.is_empty() {
        return;
    }
    out.push_str("| counted | round trips | faults of the GPU | aim |\n|---|---|---|---|\n");
    for row in rows {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} |",
            row.name,
            number(row.round_trips),
            number(row.faults),
            verdict(row.aim, row.is_met())
        );
    }
    out.push('\n');
}

fn show_handovers(out: &mut String, rows: &[&Handover]) {
    if rows.is_empty() {
        return;
    }
    out.push_str(
        "Times are per page, in minor page faults of a CPU. Round trips: to acquire all, to get all home by faults, to get all home in one operation.\n\n\
         | pages | | acquire | home by faults of the CPU | home in one operation | copied, there and back | round trips | faults of the GPU |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let at_once = row.release_at_once.map_or("-".to_owned(), spread);
        let at_once_trips = row.release_at_once_trips.map_or("-".to_owned(), number);
        let _ = writeln!(
            out,
            "| {}{} | {} | {} | {} | {at_once} | {} KiB | {}, {}, {at_once_trips} | {} |",
            row.pages,
            if row.folio { ", one folio" } else { "" },
            row.mechanism,
            spread(row.acquire),
            spread(row.release),
            row.moved >> 10,
            number(row.acquire_trips),
            number(row.release_trips),
            number(row.faults),
        );
    }
    out.push('\n');
}

fn show_contention(out: &mut String, rows: &[&Contention]) {
    if rows.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "### Exclusive access under contention\n\n\
         ![Increments of the CPU and of the GPU by the share of the CPU's that are on the GPU's page]({CHART})\n\n\
         | | of the CPU's increments on the GPU's page | CPU | GPU | CPU, per second | GPU, per second | pages handed over, per second |\n\
         |---|---|---|---|---|---|---|\n"
    );
    for row in rows {
        let _ = writeln!(
            out,
            "| {} | {} % | {} | {} | {:.0} | {:.0} | {:.0} |",
            row.mechanism,
            row.percent,
            share(row.cpu),
            share(row.gpu),
            row.cpu_rate,
            row.gpu_rate,
            row.handovers
        );
    }
    out.push('\n');
}

fn show_machine(machine: &Machine) -> String {
    format!(
        "Measured in a guest with {} processors{}, Linux {}, pinning by `{}`.{}\n",
        machine.processors,
        if machine.emulated { " (emulated)" } else { "" },
        machine.kernel,
        machine.pin_method,
        if machine.quick {
            " A quick run: these numbers say nothing."
        } else {
            ""
        }
    )
}

fn verdict(aim: Option<f64>, met: Option<bool>) -> String {
    match (aim, met) {
        (Some(aim), Some(true)) => format!("at most {aim}: met"),
        (Some(aim), _) => format!("at most {aim}: **missed**"),
        _ => String::new(),
    }
}

/// A time; or, for what is one of many, how many there are in a second, too.
fn pace(row: &Ratio, nanoseconds: f64) -> String {
    if row.subject == Subject::Faults {
        return format!("{} ({:.0} a second)", time(nanoseconds), 1e9 / nanoseconds);
    }
    time(nanoseconds)
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n >= 1e6 => format!("{:.2} ms", n / 1e6),
        n if n >= 1e3 => format!("{:.2} µs", n / 1e3),
        n => format!("{n:.1} ns"),
    }
}

fn spread(spread: Spread) -> String {
    let figure = |value: f64| {
        if value >= 10.0 {
            format!("{value:.0}")
        } else {
            format!("{value:.2}")
        }
    };
    let Spread { median, low, high } = spread;
    format!("{} ({} to {})", figure(median), figure(low), figure(high))
}

fn share(value: f64) -> String {
    if value >= 0.01 {
        format!("{value:.2}")
    } else {
        format!("{value:.5}")
    }
}

/// A count, which is whole unless it is the mean of several.
fn number(count: f64) -> String {
    if count == count.round() {
        return format!("{count:.0}");
    }
    if (count * HUGE_PAGES).round() == 1.0 {
        return format!("1/{HUGE_PAGES}");
    }
    format!("{count:.2}")
}

/// Pages of 2 MiB.
const HUGE_PAGES: f64 = (2 << 20) as f64 / PAGE_SIZE as f64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_the_marks_is_replaced() {
        let page = format!("a\n{BEGIN}old\n{END}b\n");
        assert_eq!(replace(&page, "new\n"), Some(format!("a\n{BEGIN}new\n{END}b\n")));
        assert_eq!(replace("a\n", "new\n"), None);
    }

    #[test]
    fn the_page_has_the_marks() {
        let page = include_str!("../../../../docs/measurements.md");
        assert!(replace(page, "").is_some());
    }

    #[test]
    fn an_aim_that_is_missed_is_called_so() {
        let count = |round_trips| Count {
            subject: Subject::Migration,
            name: "there".to_owned(),
            round_trips,
            faults: 0.5,
            aim: Some(3.0),
        };
        let shown = |round_trips| show(&[Row::Count(count(round_trips))]);
        assert!(
            shown(3.0).contains("| there | 3 | 0.50 | at most 3: met |"),
            "{}",
            shown(3.0)
        );
        assert!(
            shown(4.0).contains("| there | 4 | 0.50 | at most 3: **missed** |"),
            "{}",
            shown(4.0)
        );
        let spread = Spread {
            median: 2.0,
            low: 1.0,
            high: 4.0,
        };
        let ratio = Ratio {
            subject: Subject::Exclusive,
            name: "pin".to_owned(),
            against: "migrate".to_owned(),
            ratio: spread,
            nanoseconds: 2500.0,
            reference: 5_000_000.0,
            speed: false,
            aim: Some(0.5),
        };
        let slow = show(&[Row::Ratio(ratio.clone())]);
        let line =
            "| pin | 2.50 µs | migrate | 2.00 (1.00 to 4.00) times | at most 0.5: **missed** | 5.00 ms |";
        assert!(slow.contains(line), "{slow}");
        let speed = show(&[Row::Ratio(Ratio {
            speed: true,
            aim: None,
            ..ratio
        })]);
        assert!(
            speed.contains("| 0.50 (0.25 to 1.00) of its speed |  |"),
            "{speed}"
        );
    }
}
