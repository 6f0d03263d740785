// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Promises that are broken on purpose, so that the models in `tests/models` can show that they would notice.
//!
//! Unlike the defects of `inject.rs`, which drivers are tested with, these do not exist in the program: there
//! [`sabotaged`] is the constant false.

/// A way to break a promise. Each is a mistake that is easily made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// What is done in all gates is not done in the last one.
    SkipsEngine,
    /// INVALIDATE with CLEAR goes through the gates before it clears the page table.
    ClearsLate,
    /// DESTROY says that the context is gone after it has gone through the gates.
    DestroysLate,
    /// Work is ended without a way through the gates.
    EndsOutside,
    /// Engines that were paused are not told to go on.
    ResumesSilently,
    /// A reset of the device clears VRAM before it goes through the gates.
    ClearsVramEarly,
    /// The retry of a REPLAY is reported before it is made.
    ReportsEarly,
    /// The retry of a REPLAY is not reported if its submission ends.
    ForgetsRetry,
    /// A REPLAY completes when the first of those that wait has been retried.
    RepliesToFirst,
    /// An access that stalls joins a fault that is being replayed.
    JoinsReplay,
    /// A stall does not look whether its context has ended meanwhile.
    StallsUnchecked,
    /// A REPLAY rings the bell before the stall has ended.
    WakesFirst,
    /// The driver is told of an event before it is in the log.
    TellsFirst,
    /// The bell rings before it says for whom.
    RingsFirst,
    /// Who attends to a ring and finds the engine at work does not wake its thread.
    RingsUnheard,
    /// Who leaves work to the engine's thread does not say so.
    LeavesSilently,
    /// Who works on a borrowed thread waits there until the device goes on.
    WaitsBorrowed,
    /// An engine whose ring is empty does not ask once more.
    IgnoresIdle,
    /// The engines are told to look before they are told to end.
    EndsLate,
    /// The timeline advances before the work is done.
    AdvancesFirst,
    /// Rings that wait for the timeline are told before it advances.
    PokesFirst,
    /// A ring that looks for a number does not say that it waits before it has looked for the last time.
    WaitsUnseen,
    /// Rings that wait for a number are told when the command that changes it is done, not when it changes it.
    SignalsAtEnd,
    /// Work that was reset puts its context into error.
    FailsAfterReset,
    /// A context is reset while its work may be about to fail.
    ResetsUnlocked,
    /// The event log is looked at and taken from in two steps.
    TakesInSteps,
    /// Atomic operations on system memory take no turns.
    SkipsAtomicUnit,
    /// A turn of the atomic unit is kept until the next one is there.
    KeepsTurn,
}

/// Whether a promise is broken: never.
#[cfg(not(feature = "model"))]
#[inline(always)]
pub(super) const fn sabotaged(_: Sabotage) -> bool {
    false
}

#[cfg(feature = "model")]
pub use switch::sabotage;
#[cfg(feature = "model")]
pub(super) use switch::sabotaged;

#[cfg(feature = "model")]
mod switch {
    use std::cell::Cell;

    use super::Sabotage;

    std::thread_local! {
        // The threads of a model are all on the one thread that runs it.
        static CHOSEN: Cell<Option<Sabotage>> = const { Cell::new(None) };
    }

    /// Breaks a promise in what this thread runs from now on, or keeps them all. Says what was chosen before.
    pub fn sabotage(chosen: Option<Sabotage>) -> Option<Sabotage> {
        CHOSEN.replace(chosen)
    }

    /// Whether this promise is broken.
    pub(in crate::gpu) fn sabotaged(sabotage: Sabotage) -> bool {
        CHOSEN.get() == Some(sabotage)
    }
}
