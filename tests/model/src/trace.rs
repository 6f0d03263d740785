// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs, for people to read.

use crate::scenario::{CONTEXTS, Operation, Scenario, THREADS};
use crate::state::{
    Activity, Attempt, Entry, ExcludeStage, FetchStage, HomeStage, PinStage, Pte, Reason, State, Work,
};
use crate::system::{Action, Machine};

/// What a handler does that is not too late.
const SENDS: &str = "commits, sends MAP and REPLAY";

fn who(setup: &Scenario, task: usize) -> String {
    if task < THREADS {
        let thread = &setup.threads[task];
        let kernel = |operation: &Operation| matches!(operation, Operation::Relocate(_));
        return match thread.program.iter().all(kernel) {
            true => "kernel".into(),
            false => format!("thread {task} of process {}", thread.process),
        };
    }
    match task - THREADS {
        context if context < CONTEXTS => format!("handler of context {context}"),
        end => format!("end of process {}", end - CONTEXTS),
    }
}

fn attempt(attempt: Attempt) -> &'static str {
    match attempt {
        Attempt::Idle => "looks for a fault",
        Attempt::Begin => "notes the number of revocations",
        Attempt::Sequence => "notes the sequence number",
        Attempt::Read => "reads the page table",
        Attempt::Pause => "pauses",
        Attempt::Again | Attempt::Locked(_) => "begins again",
        Attempt::Commit(..) => SENDS,
        Attempt::Wait => "has the answer to REPLAY",
        Attempt::Cancel => "cancels the fault",
        Attempt::Release(_) => "brings home what the context has",
        Attempt::Leaving => "forgets the context",
    }
}

fn operation(setup: &Scenario, state: &State, task: usize) -> Option<Operation> {
    let program = &setup.threads.get(task)?.program;
    program.get(state.tasks[task].at as usize).copied()
}

fn step(setup: &Scenario, state: &State, task: usize) -> String {
    let this = &state.tasks[task];
    if let Some(notice) = this.notice {
        let what = match notice.reason {
            Reason::Kernel => "notifier",
            Reason::Revocation => "revocation",
        };
        let how = match notice.waiting {
            false => "mirror is told",
            true => "INVALIDATE has been answered",
        };
        return format!("{what}: {how}");
    }
    let what = match this.work {
        Work::None if task < THREADS => {
            let program = &setup.threads[task].program;
            return program
                .get(this.at as usize)
                .map_or("ends".into(), |next| format!("{next:?}"));
        }
        Work::None if task < THREADS + CONTEXTS => attempt(this.handler.attempt),
        Work::None => "memory goes",
        Work::Home(_, stage) => match stage {
            HomeStage::Unmap => "home: unmaps",
            HomeStage::Others => "home: unmaps in other processes",
            HomeStage::Take => "home: takes the page out of the table",
            HomeStage::GiveBack => "home: gives the page back",
            HomeStage::Late => "home: ends",
        },
        Work::Pin { stage, .. } => match stage {
            PinStage::Unmap => "pin: unmaps",
            PinStage::Others => "pin: unmaps in other processes",
            PinStage::Advance => "pin: the stand-in takes its place",
            PinStage::Commit => "pin: commits, sends MAP and REPLAY",
            PinStage::Wait => "pin: has the answer to REPLAY",
            PinStage::Finish => "pin: finishes the migration",
        },
        Work::Exclude { stage, .. } => match stage {
            ExcludeStage::Replace => "exclusive: replaces the entry",
            ExcludeStage::Commit => "exclusive: commits, sends MAP and REPLAY",
            ExcludeStage::Wait => "exclusive: has the answer to REPLAY",
            ExcludeStage::Finish => "exclusive: unlocks",
        },
        Work::Restore { .. } => "makes the page its own again",
        Work::Copy { .. } => "copies a shared page",
        Work::Change if matches!(operation(setup, state, task), Some(Operation::Close(_))) => {
            "DESTROY, or its answer"
        }
        Work::Change => "changes the page table",
        Work::WaitToWrite => "gets mmap_lock for writing",
        Work::Fetch { stage, .. } => match stage {
            FetchStage::Unmap => "prefetch: unmaps",
            FetchStage::Others => "prefetch: unmaps in other processes",
            FetchStage::Copy => "prefetch: copies, finishes the migration",
        },
        Work::Relocate { unmapped, .. } => match unmapped {
            true => "copies and maps the page",
            false => "unmaps the page",
        },
    };
    what.into()
}

fn pte(pte: Pte) -> String {
    let right = |writable| if writable { "" } else { ", read-only" };
    match pte {
        Pte::None => "nothing".into(),
        Pte::Present { frame, writable } => format!("frame {frame}{}", right(writable)),
        Pte::Stand { stand, writable } => format!("stand-in {stand}{}", right(writable)),
        Pte::Migrating { writable, .. } => format!("migration entry{}", right(writable)),
        Pte::Exclusive { frame } => format!("exclusive entry of frame {frame}"),
    }
}

fn entry(entry: Option<Entry>) -> String {
    entry.map_or("nothing".into(), |entry| {
        format!("frame {} {:?}", entry.frame, entry.rights)
    })
}

fn activity(activity: Activity) -> String {
    match activity {
        Activity::Ready => "access done".into(),
        Activity::Busy { frame, loaded, .. } => format!("access to frame {frame} begun, {loaded} loaded"),
        Activity::Stalled(_) => "stalls".into(),
        Activity::Retry(_) => "is to retry".into(),
        Activity::Ended => "its work is ended".into(),
    }
}

/// What changes by a step that others can see.
fn effects(before: &State, after: &State) -> Vec<String> {
    let mut all = Vec::new();
    for (number, (old, new)) in before.processes.iter().zip(&after.processes).enumerate() {
        for (page, (old, new)) in old.pages.iter().zip(&new.pages).enumerate() {
            if old != new {
                all.push(format!("process {number} page {page}: {}", pte(*new)));
            }
        }
    }
    for (number, (old, new)) in before.contexts.iter().zip(&after.contexts).enumerate() {
        for (page, (old, new)) in old.table.iter().zip(&new.table).enumerate() {
            if old != new {
                all.push(format!("GPU context {number} page {page}: {}", entry(*new)));
            }
        }
    }
    for (number, (old, new)) in before.rings.iter().zip(&after.rings).enumerate() {
        if old.activity != new.activity {
            all.push(format!("ring {number}: {}", activity(new.activity)));
        }
    }
    for (number, (old, new)) in before.frames.iter().zip(&after.frames).enumerate() {
        if old.used && !new.used {
            all.push(format!("frame {number} is freed"));
        } else if old.value != new.value {
            all.push(format!("frame {number} = {}", new.value));
        }
    }
    all
}

/// A run as lines of a table: who does what, and what changes.
#[must_use]
pub fn render(setup: &Scenario, run: &[(State, Action)]) -> String {
    let mut text = String::from("| | who | step | what changes |\n|---|---|---|---|\n");
    for (number, (state, action)) in run.iter().enumerate() {
        let mut machine = Machine { setup, s: *state };
        machine.step(*action);
        let (who, mut step) = match *action {
            Action::Task(task) => (who(setup, task as usize), step(setup, state, task as usize)),
            Action::Fail(task) => (
                who(setup, task as usize),
                "home: the page cannot be given back".into(),
            ),
            Action::Ring(ring) => (format!("ring {ring}"), "runs".into()),
            Action::Lose => ("device".into(), "stops answering".into()),
            Action::Reset => ("device".into(), "is reset".into()),
        };
        let effects = effects(state, &machine.s).join("; ");
        if effects.is_empty() && step.ends_with(SENDS) {
            step = step.replace(SENDS, "is too late");
        }
        text += &format!("| {} | {who} | {step} | {effects} |\n", number + 1);
    }
    text
}
