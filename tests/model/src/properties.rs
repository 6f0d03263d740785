// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What must hold in every state.

use crate::scenario::{Access, Scenario};
use crate::state::{Activity, Entry, HomeStage, PinStage, Pte, State, Work};

/// While the GPU has ATOMIC on a page, neither a CPU nor another context has any access to it.
pub const EXCLUSIVE: &str = "the GPU is alone where it has ATOMIC";
/// No increment is lost.
pub const NO_LOST_UPDATE: &str = "no increment is lost";
/// Nothing leads to a page that is free.
pub const NO_FREED_PAGE: &str = "nothing leads to a freed page";
/// A page has one owner.
pub const ONE_OWNER: &str = "a page has exactly one owner";
/// What the GPU maps, remembers or uses is what the process has there.
pub const NOTHING_STALE: &str = "the GPU has what the process has";
/// An access that has been granted is done before anybody takes the page away.
pub const GRANT_IS_KEPT: &str = "a granted access is done";
/// Nobody revokes mappings of a context of which the number may be used again.
pub const CONTEXT_IS_KNOWN: &str = "nothing of a closed context is revoked";
/// All work comes to its end: nobody waits for ever.
pub const ALL_ENDS: &str = "all work ends";
/// Nobody tries again and again. Not a property of a state: see [`crate::check`].
pub const NO_LIVELOCK: &str = "nobody tries for ever";

/// What the GPU can use, with or without looking at the page table: context, page, and the translation.
fn translations<'a>(
    setup: &'a Scenario,
    state: &'a State,
) -> impl Iterator<Item = (usize, usize, Entry)> + 'a {
    let tables = state.contexts.iter().enumerate().flat_map(|(context, state)| {
        let entries = state.table.iter().enumerate();
        entries.filter_map(move |(page, entry)| Some((context, page, (*entry)?)))
    });
    let rings = setup.rings.iter().zip(&state.rings);
    let remembered = rings.clone().flat_map(|(setup, ring)| {
        let entries = ring.buffer.iter().enumerate();
        entries.filter_map(move |(page, entry)| Some((setup.context as usize, page, (*entry)?)))
    });
    let used = rings.filter_map(|(setup, ring)| match ring.activity {
        Activity::Busy { frame, .. } => {
            let (rights, page) = *setup.program.get(ring.at as usize)?;
            Some((setup.context as usize, page as usize, Entry { frame, rights }))
        }
        _ => None,
    });
    // A device that has been reset touches nothing, whatever it was in the middle of.
    tables.chain(remembered).chain(used).filter(|_| !state.stopped)
}

/// See [`EXCLUSIVE`].
#[must_use]
pub fn exclusive(setup: &Scenario, state: &State) -> bool {
    translations(setup, state).all(|(context, _, entry)| {
        let present = |pte: &Pte| matches!(pte, Pte::Present { frame, .. } if *frame == entry.frame);
        let cpu = state
            .processes
            .iter()
            .any(|process| process.pages.iter().any(present));
        let others =
            || translations(setup, state).any(|other| other.0 != context && other.2.frame == entry.frame);
        entry.rights < Access::Atomic || !(cpu || others())
    })
}

/// See [`NO_LOST_UPDATE`].
#[must_use]
pub fn no_lost_update(state: &State) -> bool {
    state.processes.iter().enumerate().all(|(number, process)| {
        process
            .expected
            .iter()
            .enumerate()
            .all(|(page, expected)| match state.resolve(number, page) {
                Some((frame, _)) => state.frames[frame as usize].value == *expected,
                None => true,
            })
    })
}

/// See [`NO_FREED_PAGE`].
#[must_use]
pub fn no_freed_page(setup: &Scenario, state: &State) -> bool {
    let used = |frame: u8| state.frames[frame as usize].used;
    let leads_to_used = |pte: &Pte| match *pte {
        Pte::Present { frame, .. } | Pte::Exclusive { frame } => used(frame),
        Pte::Stand { stand, .. } => state.stands[stand as usize].used,
        Pte::None | Pte::Migrating { .. } => true,
    };
    translations(setup, state).all(|(_, _, entry)| used(entry.frame))
        && state
            .processes
            .iter()
            .all(|process| process.pages.iter().all(leads_to_used))
}

/// See [`ONE_OWNER`].
#[must_use]
pub fn one_owner(state: &State) -> bool {
    state.frames.iter().enumerate().all(|(number, frame)| {
        let number = number as u8;
        let leads = |pte: &Pte| match *pte {
            Pte::Present { frame, .. } | Pte::Exclusive { frame } => frame == number,
            _ => false,
        };
        let mapped = state
            .processes
            .iter()
            .any(|process| process.pages.iter().any(leads));
        // Whoever has unmapped a page that is the system's, or has locked one that is being unmapped, has a reference.
        let kept = state.tasks.iter().any(|task| match task.work {
            Work::Pin { frame, stage, .. } => {
                frame == number && matches!(stage, PinStage::Others | PinStage::Advance)
            }
            Work::Fetch { frame, .. } => frame == number,
            Work::Relocate { frame, .. } | Work::Exclude { frame, .. } | Work::Restore { frame, .. } => {
                frame == number
            }
            _ => false,
        });
        let stands = state
            .stands
            .iter()
            .filter(|stand| stand.used && stand.data == Some(number))
            .count();
        let travellers = state.tasks.iter().filter(|task| match task.work {
            Work::Home(home, HomeStage::GiveBack) => home.data == Some(number),
            _ => false,
        });
        let drivers = stands + travellers.count();
        if frame.used {
            usize::from(mapped) + drivers == 1 || (!mapped && drivers == 0 && kept)
        } else {
            !mapped && drivers == 0
        }
    })
}

/// See [`NOTHING_STALE`].
#[must_use]
pub fn nothing_stale(setup: &Scenario, state: &State) -> bool {
    translations(setup, state).all(|(context, page, entry)| {
        let process = setup.contexts[context].process as usize;
        state.resolve(process, page).is_some_and(|(frame, writable)| {
            frame == entry.frame && (writable || entry.rights == Access::Read)
        })
    })
}
