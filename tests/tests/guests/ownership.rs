// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ownership matrix: `docs/ownership.md` says what comes of each cell, and here it is tried.
//!
//! `PINION_UPDATE_OWNERSHIP=1 cargo test -p pinion-tests --test guests ownership_matrix` writes the tables anew. What must be so
//! whatever the tables say (the data, above all) is checked in the guest.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use pinion_tests::matrix::{EVENTS, End, Event, Line, Size, State};

use super::{Ended, Guest, devices_of};

/// A guest with all that events can want.
const OPTIONS: &[&str] = &[
    "--memory",
    "2G",
    "--devices",
    "2",
    "--disk",
    "128M",
    "--disk",
    "128M",
    "--oom-is-fine",
    "--timeout",
    "600",
];

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ownership.md")
}

/// The lines of the guest program.
fn lines(ended: &Ended) -> Vec<Line> {
    ended
        .stdout()
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

/// Has the devices of a `qemu-scripts/run` reset themselves at the next submission.
fn reset(run: u32, control: &Path) {
    let devices = devices_of(run);
    let program = format!("/proc/{}/exe", devices.first().expect("a device"));
    let output = Command::new(program)
        .arg("ctl")
        .arg(control)
        .args(["inject", "reset-midway:after=0,every=1,count=1"])
        .output()
        .expect("pinion-device ctl");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Tries all cells on a kernel.
fn fill_in(kernel: &'static str) -> Vec<Line> {
    let usual = Guest {
        kernel,
        options: OPTIONS,
    };
    let ended = usual.run(&["ownership"]);
    let mut found = lines(&ended);
    let errors = |lines: &[Line]| -> Vec<String> {
        let errors = lines.iter().filter_map(|line| match &line.end {
            End::Error(error) => Some(format!(
                "{} {}: {error}",
                line.event,
                column(line.state, line.size)
            )),
            _ => None,
        });
        errors.collect()
    };
    assert!(
        errors(&found).is_empty(),
        "{}\n{}",
        errors(&found).join("\n"),
        ended.everything()
    );
    ended.must_succeed();

    // A path for a socket is not to be long.
    let control = std::env::temp_dir().join(format!("pinion-ownership-{}", std::process::id()));
    let path: &'static str = control.to_str().expect("a plain path").to_owned().leak();
    let options = vec!["--device-option", "--control-path", "--device-option", path];
    let resetting = Guest {
        kernel,
        options: options.leak(),
    };
    let ended = resetting.run_and(&["ownership", "--reset"], |run| reset(run, &control));
    let more = lines(&ended);
    assert!(
        errors(&more).is_empty(),
        "{}\n{}",
        errors(&more).join("\n"),
        ended.everything()
    );
    ended.must_succeed();
    found.extend(more);
    found
}

fn column(state: State, size: Size) -> String {
    format!("{} {}", state.name(), size.name())
}

/// All states in both sizes, in the order of the table's columns.
fn columns() -> impl Iterator<Item = (State, Size)> {
    State::ALL
        .into_iter()
        .flat_map(|state| Size::ALL.map(|size| (state, size)))
}

/// The row of an event. Reasons for blanks are added to `reasons`.
fn row(event: &Event, lines: &[Line], reasons: &mut Vec<String>) -> String {
    let mut row = format!("| {} |", event.title);
    for (state, size) in columns() {
        let mut cells = lines
            .iter()
            .filter(|line| line.event == event.name && line.state == state && line.size == size);
        let cell = cells
            .next()
            .unwrap_or_else(|| panic!("{} {}: not tried", event.name, column(state, size)));
        assert!(
            cells.next().is_none(),
            "{} {}: tried twice",
            event.name,
            column(state, size)
        );
        let text = match &cell.end {
            End::Result(state) => state.clone(),
            End::Blank(reason) => {
                assert!(!reason.is_empty(), "{} is blank without a reason", event.name);
                let number = reasons.iter().position(|other| other == reason);
                let number = number.unwrap_or_else(|| {
                    reasons.push(reason.clone());
                    reasons.len() - 1
                });
                format!("— [{}]", number + 1)
            }
            End::Error(error) => panic!("{error}"),
        };
        assert!(!text.is_empty(), "{} {}: blank", event.name, column(state, size));
        write!(row, " {text} |").expect("a string");
    }
    row
}

/// The table of a kernel.
fn table(lines: &[Line]) -> String {
    let mut text = String::from("| |");
    for (state, size) in columns() {
        write!(text, " {} |", column(state, size)).expect("a string");
    }
    text += "\n|---|---|---|---|---|---|---|---|---|---|---|\n";
    let mut reasons = Vec::new();
    for event in EVENTS {
        text += &row(event, lines, &mut reasons);
        text.push('\n');
    }
    for (number, reason) in (1..).zip(&reasons) {
        write!(text, "\n[{number}] {reason}\n").expect("a string");
    }
    text
}

/// What each event must do.
fn rules() -> String {
    let rule = |event: &Event| format!("- **{}**: {}\n", event.title, event.must);
    EVENTS.iter().map(rule).collect()
}

/// The part of the document between the marks of that name, and where it is.
fn part<'a>(document: &'a str, name: &str) -> (usize, &'a str) {
    let begin = format!("<!-- begin {name} -->\n");
    let start = document
        .find(&begin)
        .unwrap_or_else(|| panic!("there is no mark {begin:?} in docs/ownership.md"))
        + begin.len();
    let length = document[start..]
        .find(&format!("<!-- end {name} -->"))
        .unwrap_or_else(|| panic!("the part {name} of docs/ownership.md has no end"));
    (start, &document[start..start + length])
}

/// Lines of which the two differ, as `diff` would show them.
fn difference(there: &str, found: &str) -> String {
    let mut text = String::new();
    for line in there
        .lines()
        .filter(|line| !found.lines().any(|other| other == *line))
    {
        writeln!(text, "- {line}").expect("a string");
    }
    for line in found
        .lines()
        .filter(|line| !there.lines().any(|other| other == *line))
    {
        writeln!(text, "+ {line}").expect("a string");
    }
    text
}

/// The document must have this in that part, or gets it if that is wanted.
#[track_caller]
fn must_say(name: &str, found: &str) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let path = document();
    let text = fs::read_to_string(&path).expect("docs/ownership.md");
    let (start, there) = part(&text, name);
    if there == found {
        return;
    }
    if std::env::var_os("PINION_UPDATE_OWNERSHIP").is_some() {
        let text = format!("{}{found}{}", &text[..start], &text[start + there.len()..]);
        fs::write(&path, text).expect("docs/ownership.md");
        return;
    }
    panic!(
        "docs/ownership.md, part {name}, says something else than what was found (PINION_UPDATE_OWNERSHIP=1 writes it):\n{}",
        difference(there, found)
    );
}

/// Every cell comes out as `docs/ownership.md` says.
pub(super) fn matrix(kernel: &'static str) {
    let found = fill_in(kernel);
    assert_eq!(
        found.len(),
        EVENTS.len() * State::ALL.len() * Size::ALL.len(),
        "cells"
    );
    must_say(kernel, &table(&found));
}

#[test]
fn the_rules_are_in_the_document() {
    must_say("events", &rules());
}

#[test]
fn a_difference_is_shown_by_lines() {
    assert_eq!(difference("a\nb\nc\n", "a\nd\nc\n"), "- b\n+ d\n");
}
