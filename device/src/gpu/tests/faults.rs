// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Faults, REPLAY and CANCEL.

use super::*;

/// Lets two rings stall on the same page, and waits until both do.
fn two_on_one_page(rig: &mut Rig) -> abi::EventRecord {
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 10)]);
    let mut fault = rig.event();
    rig.submit(1, 0, &[increments(VA + 8, 10)]);
    // The second joins without an event; replays without a repair show when it has.
    let start = Instant::now();
    loop {
        assert_eq!(rig.replay(0, fault.fault), Ok(0));
        let next = rig.event();
        assert!(next.fault > fault.fault);
        fault = next;
        let stalled = rig.gpu.shared.faults.stalled_on(fault.fault);
        if stalled == 2 && rig.log.is_empty() {
            return fault;
        }
        // One may have begun a fault of its own before the other joined it.
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for a second ring to join a fault"
        );
    }
}

#[test]
fn equal_faults_are_one() {
    let mut rig = Rig::new(2);
    let fault = two_on_one_page(&mut rig);
    rig.map(0, VA, &[ALL]);
    assert_eq!(rig.replay(0, fault.fault), Ok(2));
    assert_eq!(rig.completion().status, OK);
    assert_eq!(rig.completion().status, OK);
    assert_eq!((rig.load(0), rig.load(8)), (10, 10));
    assert!(rig.log.is_empty());
}

#[test]
fn other_pages_rights_and_contexts_are_other_faults() {
    let mut rig = Rig::new(4);
    rig.create(0);
    rig.create(1);
    rig.submit(0, 0, &[increments(VA, 1)]);
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.submit(2, 1, &[increments(VA, 1)]);
    rig.submit(3, 0, &[copy(VA, VA, 1)]);
    let faults: std::collections::HashSet<u64> = (0..4).map(|_| rig.event().fault).collect();
    assert_eq!(faults.len(), 4);
}

#[test]
fn cancel_ends_a_context_and_no_other() {
    let mut rig = Rig::new(3);
    rig.create(0);
    rig.create(1);
    rig.submit(0, 0, &[nop(), increments(VA, 1)]);
    let cancelled = rig.event();
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.event();
    rig.submit(2, 1, &[increments(VA, 1)]);
    let other = rig.event();
    assert_eq!(rig.cancel(1, cancelled.fault), abi::STATUS_NO_FAULT);
    assert_eq!(rig.cancel(0, cancelled.fault + 100), abi::STATUS_NO_FAULT);
    assert_eq!(rig.cancel(0, cancelled.fault), OK);
    assert_eq!(rig.cancel(0, cancelled.fault), abi::STATUS_NO_FAULT);
    let mut ended = [rig.completion(), rig.completion()];
    ended.sort_by_key(|completion| completion.sequence);
    assert_eq!(
        (ended[0].status, ended[0].executed),
        (abi::STATUS_FAULT_CANCELLED, 1)
    );
    assert_eq!(ended[0].fault_va, VA);
    assert_eq!(
        (ended[1].status, ended[1].executed),
        (abi::STATUS_CONTEXT_ERROR, 0)
    );
    let event = rig.event();
    assert_eq!((event.kind, event.context), (abi::EVENT_CONTEXT_ERROR, 0));
    assert_eq!(
        (event.status, event.fault),
        (abi::STATUS_FAULT_CANCELLED, cancelled.fault)
    );
    assert_eq!(rig.run(0, &[nop()]).status, abi::STATUS_CONTEXT_ERROR);
    rig.map(1, VA, &[ALL]);
    assert_eq!(rig.replay(1, other.fault), Ok(1));
    assert_eq!(rig.completion().status, OK);
    // Made anew it works again.
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
    rig.create(0);
    assert_eq!(rig.run(0, &[nop()]).status, OK);
}

#[test]
fn whatever_ends_a_stall_completes_its_replay() {
    // The device is stopped, so the retry waits; then the context goes.
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.event();
    rig.map(0, VA, &[ALL]);
    rig.gpu.pause();
    rig.replay_begin(0, fault.fault, 5).unwrap();
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
    assert_eq!(rig.replay_end(), (5, 0));
    assert_eq!(rig.completion().status, abi::STATUS_NO_CONTEXT);
    assert_eq!(rig.load(0), 0);

    // It hits a bus error.
    rig.gpu.resume();
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.event();
    rig.map(0, VA, &[ALL | MEMORY]);
    assert_eq!(rig.replay(0, fault.fault), Ok(0));
    let done = rig.completion();
    assert_eq!((done.status, done.fault_va), (abi::STATUS_BUS_ERROR, VA));
    assert_eq!(rig.event().kind, abi::EVENT_CONTEXT_ERROR);
}

#[test]
fn a_replayed_access_makes_progress_even_if_the_page_is_taken_at_once() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let mut faults = 0_u64;
    // Two pages that are never there at the same time.
    rig.submit(0, 0, &[copy(VA, VA + PAGE_SIZE, PAGE_SIZE), increments(VA, 200)]);
    let done = loop {
        if let Ok((_, _, completion)) = rig.completions.try_recv() {
            break completion;
        }
        let Some(record) = rig.log.take() else { continue };
        let page = record.va & !(PAGE_SIZE - 1);
        rig.map(0, page, &[ALL | scattered(page)]);
        assert_eq!(rig.replay(0, record.fault), Ok(1), "{record:?}");
        rig.invalidate(0, page, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        faults += 1;
        assert!(faults < 1000);
    };
    assert_eq!(done.status, OK);
    assert_eq!(rig.load(scattered(VA)), 200);
}

#[test]
fn what_the_driver_is_not_told_is_bounded() {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    // A driver that makes no room for events but guesses the numbers of faults.
    let start = Instant::now();
    let mut guess = 1;
    while guess < 500 {
        if rig.replay(0, guess) == Ok(0) {
            guess += 1;
        }
        assert!(rig.log.len() <= 2);
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for fault {guess}"
        );
    }
}
