// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The output, for people or for programs.

use pinion_tests::pagemap::Entry;

use crate::job::Row;
use crate::residence::Residence;

const HEADINGS: [&str; 11] = [
    "mode",
    "CPU increments",
    "GPU increments",
    "expected",
    "found",
    "lost",
    "GPU faults",
    "handed over",
    "taken back",
    "CPU inc/s",
    "GPU inc/s",
];

/// The table of rows, printed row by row.
#[derive(Debug)]
pub(crate) struct Table {
    json: bool,
}

impl Table {
    pub(crate) fn new(json: bool) -> Self {
        if !json {
            print_cells(HEADINGS.map(str::to_owned));
        }
        Self { json }
    }

    pub(crate) fn print(&mut self, row: &Row) {
        let (acquired, returned) = row.mode.handed_over(&row.statistics);
        let numbers = [
            row.cpu,
            row.gpu,
            row.expected(),
            row.found,
            row.lost,
            row.statistics.faults,
            acquired,
            returned,
            row.cpu_rate as u64,
            row.gpu_rate as u64,
        ];
        if self.json {
            let names = [
                "cpu_increments",
                "gpu_increments",
                "expected",
                "found",
                "lost",
                "gpu_faults",
                "handed_over",
                "taken_back",
                "cpu_rate",
                "gpu_rate",
            ];
            let fields: Vec<_> = names
                .iter()
                .zip(numbers)
                .map(|(name, number)| format!("\"{name}\":{number}"))
                .collect();
            println!(
                "{{\"mode\":\"{}\",{},\"gpu_share\":{:.1}}}",
                row.mode.name(),
                fields.join(","),
                row.gpu_share()
            );
        } else {
            let mut cells = vec![row.mode.name().to_owned()];
            cells.extend(numbers.map(grouped));
            print_cells(cells);
        }
    }
}

fn print_cells(cells: impl IntoIterator<Item = String>) {
    let mut line = String::new();
    for (index, (cell, heading)) in cells.into_iter().zip(HEADINGS).enumerate() {
        if index == 0 {
            line += &format!("{cell:<11}");
        } else {
            line += &format!("  {cell:>width$}", width = heading.len().max(11));
        }
    }
    println!("{line}");
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What was seen of the pages.
pub(crate) fn residences(residences: &[Residence], json: bool) {
    if !json {
        println!("\nThe physical page (page frame number) behind an address before, during and after a pin:");
        println!(
            "{:<18}  {:>10}  {:>10}  {:>10}  CPU's page table during the pin",
            "address", "before", "during", "after"
        );
    }
    for residence in residences {
        let Residence {
            address,
            before,
            during,
            entry,
            after,
            ..
        } = residence;
        if json {
            println!(
                "{{\"address\":{address},\"pfn_before\":{before},\"pfn_during\":{},\"pfn_after\":{after}}}",
                during.pfn.unwrap_or(0)
            );
        } else {
            let entry = match entry {
                Entry::None => "nothing".to_owned(),
                Entry::Present(pfn) => format!("page {pfn:#x}"),
                Entry::Absent => "no access, a fault brings it back".to_owned(),
            };
            let during = during.pfn.unwrap_or(0);
            println!("{address:<#18x}  {before:>#10x}  {during:>#10x}  {after:>#10x}  {entry}");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn digits_are_grouped() {
        assert_eq!(
            ["0", "999", "1,000", "1,234,567"],
            [0, 999, 1000, 1_234_567].map(super::grouped)[..]
        );
    }
}
