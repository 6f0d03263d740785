// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A step of the protocol is left out, and the model notices: this proves that it could.

use pinion_model::check::{check, livelock};
use pinion_model::properties::{
    ALL_ENDS, CONTEXT_IS_KNOWN, EXCLUSIVE, GRANT_IS_KEPT, NO_FREED_PAGE, NO_LIVELOCK, NO_LOST_UPDATE,
    NOTHING_STALE, ONE_OWNER,
};
use pinion_model::scenario::Access::{Atomic, Read, Write};
use pinion_model::scenario::Operation::{Add, Close, Discard, Fork, Move, Prefetch, Relocate, Unmap};
use pinion_model::scenario::{Mechanism, Omission, Scenario};
use pinion_model::trace::render;

/// With the step all is well, and without it this does not hold.
fn breaks(scenario: &Scenario, omission: Omission, expected: &[&str]) {
    let without = scenario.clone().without(omission);
    let report = check(scenario);
    assert!(
        report.violated.is_empty(),
        "{omission:?}: with the step: {report}"
    );
    if expected == [NO_LIVELOCK] {
        assert!(
            livelock(scenario).is_ok(),
            "{omission:?}: with the step there is a livelock"
        );
        let report = check(&without);
        assert!(report.violated.is_empty(), "{omission:?}: {report}");
        let endless = livelock(&without).expect_err("a run that never ends");
        println!("| {omission:?} | {NO_LIVELOCK} | {} |", endless.run.len());
        println!("{}", render(&without, &endless.run[endless.back..]));
        return;
    }
    let report = check(&without);
    let Some((name, run)) = report.violated.iter().find(|(name, _)| expected.contains(name)) else {
        panic!("{omission:?}: not {expected:?}: {report}");
    };
    println!("| {omission:?} | {name} | {} |", run.len());
    println!("{}", render(&without, run));
}

/// A CPU and a GPU that count.
fn contention() -> Scenario {
    Scenario::new("contention")
        .thread(0, &[Add(0), Add(0)])
        .ring(0, &[(Atomic, 0); 2])
}

/// A page that the GPU reads goes.
fn mirrored() -> Scenario {
    Scenario::new("mirrored")
        .thread(0, &[Discard(0)])
        .ring(0, &[(Read, 0); 2])
}

#[test]
fn invalidate_is_not_waited_for() {
    breaks(&contention(), Omission::InvalidateWait, &[EXCLUSIVE]);
}

#[test]
fn invalidate_leaves_the_buffers() {
    breaks(&contention(), Omission::InvalidateBuffers, &[EXCLUSIVE]);
}

#[test]
fn invalidate_leaves_the_table() {
    breaks(&contention(), Omission::InvalidateTable, &[EXCLUSIVE]);
}

#[test]
fn invalidate_waits_for_stalled_accesses() {
    let scenario = Scenario::new("stalled")
        .thread(0, &[Unmap(0)])
        .ring(0, &[(Read, 0), (Atomic, 0)]);
    breaks(&scenario, Omission::InvalidateWaitsForStalled, &[ALL_ENDS]);
}

#[test]
fn notifier_does_nothing() {
    breaks(&mirrored(), Omission::Notifier, &[NO_FREED_PAGE, NOTHING_STALE]);
}

#[test]
fn migration_finishes_before_replay() {
    breaks(
        &contention().fresh_revocations(),
        Omission::FinishBeforeReplay,
        &[NO_LIVELOCK],
    );
}

#[test]
fn replay_is_not_waited_for() {
    breaks(&contention(), Omission::ReplayWait, &[GRANT_IS_KEPT]);
}

#[test]
fn replay_is_not_sent() {
    breaks(&contention(), Omission::Replay, &[NO_LIVELOCK]);
}

#[test]
fn fault_is_not_cancelled() {
    let scenario = Scenario::new("no memory")
        .thread(0, &[Unmap(0)])
        .ring(0, &[(Atomic, 0)]);
    breaks(&scenario, Omission::Cancel, &[ALL_ENDS]);
}

#[test]
fn sequence_is_not_checked() {
    let scenario = Scenario::new("relocated")
        .thread(0, &[Relocate(0)])
        .ring(0, &[(Write, 0)]);
    breaks(
        &scenario,
        Omission::SequenceCheck,
        &[NO_FREED_PAGE, NOTHING_STALE],
    );
}

#[test]
fn revocations_are_not_counted() {
    let scenario = Scenario::new("prefetched")
        .thread(0, &[Prefetch(0, 0)])
        .ring(0, &[(Write, 0)]);
    breaks(
        &scenario,
        Omission::RevocationCount,
        &[NO_FREED_PAGE, NOTHING_STALE],
    );
}

#[test]
fn own_migrations_are_reported() {
    breaks(
        &contention().fresh_revocations(),
        Omission::OwnerException,
        &[NO_LIVELOCK],
    );
}

#[test]
fn owner_is_the_device() {
    let scenario = Scenario::new("two address spaces")
        .context(0, 0)
        .ring(0, &[(Atomic, 0)])
        .ring(1, &[(Read, 0)]);
    breaks(&scenario, Omission::OwnerOfAddressSpace, &[EXCLUSIVE]);
}

#[test]
fn page_is_given_back_before_the_revocation() {
    breaks(&contention(), Omission::RevokeBeforeGiveBack, &[EXCLUSIVE]);
}

#[test]
fn mapping_is_not_revoked() {
    breaks(&contention(), Omission::Revoke, &[EXCLUSIVE]);
}

/// A page that has been moved while the GPU had it.
fn moved() -> Scenario {
    Scenario::new("moved")
        .thread(0, &[Move(0, 1), Add(1)])
        .ring(0, &[(Atomic, 0)])
        .ring(0, &[(Atomic, 1)])
}

#[test]
fn page_is_taken_too_late() {
    breaks(&moved(), Omission::TakeBeforeRevoke, &[EXCLUSIVE]);
}

#[test]
fn page_is_not_taken() {
    breaks(&contention(), Omission::Take, &[ONE_OWNER]);
}

#[test]
fn new_address_is_not_noted() {
    breaks(&moved(), Omission::Update, &[EXCLUSIVE]);
}

#[test]
fn stand_in_of_another_context_is_mapped() {
    let scenario = Scenario::new("two address spaces")
        .context(0, 0)
        .ring(0, &[(Atomic, 0)])
        .ring(1, &[(Atomic, 0)]);
    breaks(&scenario, Omission::ContextCheck, &[EXCLUSIVE]);
}

#[test]
fn stand_in_is_mapped_for_writing_regardless() {
    let scenario = Scenario::new("forked")
        .thread(0, &[Fork])
        .thread(1, &[Add(0)])
        .ring(0, &[(Atomic, 0); 2]);
    breaks(&scenario, Omission::WritableCheck, &[NOTHING_STALE]);
}

#[test]
fn source_is_not_freed() {
    let scenario = Scenario::new("unmapped")
        .thread(0, &[Unmap(0)])
        .ring(0, &[(Atomic, 0)]);
    breaks(&scenario, Omission::FreeSource, &[ONE_OWNER]);
}

#[test]
fn page_is_not_put_back() {
    breaks(&contention().failures(1), Omission::PutBack, &[NO_LOST_UPDATE]);
}

#[test]
fn lost_device_is_not_waited_for() {
    breaks(
        &mirrored().loss(),
        Omission::LossWait,
        &[NO_FREED_PAGE, NOTHING_STALE],
    );
}

#[test]
fn closing_does_not_wait_for_the_device() {
    let scenario = Scenario::new("closed")
        .thread(0, &[Close(0)])
        .thread(0, &[Discard(0)]);
    breaks(
        &scenario.ring(0, &[(Read, 0); 2]),
        Omission::CloseDestroy,
        &[NO_FREED_PAGE, NOTHING_STALE],
    );
}

#[test]
fn closing_does_not_wait_for_pages_on_their_way() {
    let scenario = Scenario::new("closed")
        .thread(0, &[Close(0)])
        .thread(0, &[Add(0)])
        .ring(0, &[(Atomic, 0)]);
    breaks(&scenario, Omission::CloseLeaving, &[CONTEXT_IS_KNOWN]);
}

/// The lock of an exclusive page makes being late rare. What is right does not depend on it.
#[test]
fn exclusive_page_is_unlocked_early() {
    let scenario = contention()
        .mechanism(Mechanism::Exclusive)
        .without(Omission::ExclusiveLock);
    let report = check(&scenario);
    assert!(report.violated.is_empty(), "{report}");
    assert!(livelock(&scenario.patient()).is_ok());
}

#[test]
fn mapping_is_not_revoked_before_the_copy() {
    let scenario = Scenario::new("prefetched")
        .thread(0, &[Prefetch(0, 0)])
        .ring(0, &[(Write, 0); 2]);
    breaks(
        &scenario,
        Omission::RevokeBeforeCopy,
        &[NO_FREED_PAGE, NOTHING_STALE],
    );
}

#[test]
fn rings_are_not_atomic_to_each_other() {
    let scenario = Scenario::new("two rings")
        .ring(0, &[(Atomic, 0)])
        .ring(0, &[(Atomic, 0)]);
    breaks(&scenario, Omission::AtomicUnit, &[NO_LOST_UPDATE]);
}

#[test]
fn late_handler_does_not_pause() {
    let scenario = Scenario::new("one page")
        .thread(0, &[Add(0), Discard(0)])
        .thread(0, &[Add(0), Add(0)]);
    breaks(
        &scenario.ring(0, &[(Atomic, 0); 2]).patient(),
        Omission::Pause,
        &[NO_LIVELOCK],
    );
}
