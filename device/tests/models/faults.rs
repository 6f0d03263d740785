// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Faults: stalls, REPLAY, CANCEL, and whatever else ends a stall.

use pinion_abi::{self as abi, PAGE_SIZE};
use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::sync::Arc;

use super::check::{DEADLOCK, fails, finds, holds};
use super::rig::{ALL, CONTEXT, OK, Rig, VA, increments};

/// A driver that takes the page away again as soon as a REPLAY is answered still sees the work come forward.
fn progress(rig: &Arc<Rig>, rings: u16) {
    let work: Vec<u64> = (1..=rings.into()).collect();
    for ring in 0..rings {
        // The second word is on a page of its own, so each submission stalls more than once.
        let commands = [
            increments(VA, ring.into(), 1),
            increments(VA + PAGE_SIZE, ring.into(), 1),
        ];
        rig.submit(ring, u64::from(ring) + 1, &commands);
    }
    let mut last = [0; 2];
    let mut replays = 0;
    let frame = |page: u64| usize::from(page != VA);
    rig.repair(
        &work,
        |page| {
            rig.memory.grant(frame(page));
            last[frame(page)] = rig.memory.accesses(frame(page));
            ALL | (page - VA)
        },
        |record, through| {
            let page = record.va & !(PAGE_SIZE - 1);
            let frame = frame(page);
            // Whoever waited has gone for the page before the answer came.
            assert!(through >= 1, "a REPLAY of a page that is there is in vain");
            assert!(
                rig.memory.accesses(frame) >= through,
                "a REPLAY was answered before it was tried"
            );
            rig.invalidate(page, PAGE_SIZE, abi::INVALIDATE_CLEAR);
            rig.memory.revoke(frame);
            replays += 1;
        },
    );
    assert!(
        replays <= 2 * u64::from(rings),
        "{replays} REPLAYs for {rings} rings"
    );
    for ring in 0..rings {
        assert_eq!(rig.completion(u64::from(ring) + 1).status, OK);
        for frame in 0..2 {
            assert_eq!(rig.memory.load(frame, ring.into()), 1);
        }
    }
}

#[test]
fn replay_lets_work_come_forward() {
    let model = || progress(&Rig::new(2, 2), 2);
    holds(model);
    holds(|| progress(&Rig::new(2, 1), 2));
    let early = ["before it was tried", "taken away", "in vain"];
    finds(Sabotage::ReportsEarly, &early, model);
    finds(Sabotage::JoinsReplay, &[DEADLOCK], model);
    finds(Sabotage::WakesFirst, &[DEADLOCK], model);
    finds(Sabotage::TellsFirst, &[DEADLOCK], model);
    finds(Sabotage::RingsFirst, &[DEADLOCK], model);
    fails("lost-fault", &[DEADLOCK], || {
        progress(&Rig::with(2, 2, Some("lost-fault:after=0")), 2)
    });
}

/// Two rings stall on the same page. Says the number of the one fault that this is.
fn stall_both(rig: &Rig) -> u64 {
    rig.submit(0, 1, &[increments(VA, 0, 1)]);
    rig.submit(1, 2, &[increments(VA, 1, 1)]);
    let fault = rig.event();
    assert_eq!((fault.kind, fault.va & !(PAGE_SIZE - 1)), (abi::EVENT_FAULT, VA));
    rig.when_told(|| rig.stalled(fault.fault) == 2);
    assert!(
        rig.log.is_empty(),
        "what has joined a fault is not reported again"
    );
    fault.fault
}

/// A REPLAY is answered when all who wait have been retried, once each, whether there is a page or not.
#[test]
fn replay_waits_for_all() {
    let repaired = || {
        let rig = Rig::new(2, 2);
        let fault = stall_both(&rig);
        rig.map(CONTEXT, VA, ALL);
        assert_eq!(
            rig.replay(CONTEXT, fault),
            Some(2),
            "both have waited, and get through"
        );
        assert_eq!(rig.memory.accesses(0), 2, "answered before both were tried");
        rig.memory.revoke(0);
        for sequence in [1, 2] {
            assert_eq!(rig.completion(sequence).status, OK);
        }
        assert_eq!(
            rig.replay(CONTEXT, fault),
            None,
            "there is no such fault any more"
        );
    };
    holds(repaired);
    let words = ["both have waited", "both were tried"];
    finds(Sabotage::RepliesToFirst, &words, repaired);
    finds(Sabotage::ReportsEarly, &words, repaired);
    fails("duplicate-fault", &["not reported again"], || {
        stall_both(&Rig::with(2, 2, Some("duplicate-fault")));
    });
    let in_vain = || {
        let rig = Rig::new(2, 2);
        let fault = stall_both(&rig);
        assert_eq!(rig.replay(CONTEXT, fault), Some(0), "there is no page");
        // Both have been retried, so both wait again by now.
        let again = rig.event();
        assert!(again.fault > fault, "a number was used twice");
        assert_eq!(rig.stalled(again.fault), 2, "answered before both were tried");
        rig.map(CONTEXT, VA, ALL);
        assert_eq!(rig.replay(CONTEXT, again.fault), Some(2), "both have waited");
        for sequence in [1, 2] {
            assert_eq!(rig.completion(sequence).status, OK);
        }
    };
    holds(in_vain);
    finds(Sabotage::RepliesToFirst, &words, in_vain);
    finds(Sabotage::JoinsReplay, &[DEADLOCK], in_vain);
}

/// How a stall can end otherwise.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Cancel,
    Destroy,
    ContextReset,
    DeviceReset,
}

/// Rings stall, on pages of their own; while one fault is replayed, everything is ended. The REPLAY is answered, and all
/// work completes, once each.
fn end(rig: &Arc<Rig>, end: End, mapped: bool) {
    for ring in 0..2_u64 {
        let commands = [increments(VA + ring * PAGE_SIZE, ring, 1)];
        rig.submit(ring as u16, ring + 1, &commands);
        // Behind it on the ring, for the same end.
        rig.submit(ring as u16, ring + 11, &commands);
    }
    let faults = [rig.event(), rig.event()];
    if mapped {
        rig.map(CONTEXT, faults[0].va & !(PAGE_SIZE - 1), ALL);
    }
    assert!(rig.begin_replay(CONTEXT, faults[0].fault, 99));
    let expected = match end {
        End::Cancel => {
            assert_eq!(rig.cancel(CONTEXT, faults[1].fault), OK);
            assert_eq!(rig.cancel(CONTEXT, faults[1].fault), abi::STATUS_NO_FAULT);
            [abi::STATUS_FAULT_CANCELLED, abi::STATUS_CONTEXT_ERROR]
        }
        End::Destroy => {
            rig.simple(abi::REQUEST_CONTEXT_DESTROY, CONTEXT);
            [abi::STATUS_NO_CONTEXT; 2]
        }
        End::ContextReset => {
            rig.simple(abi::REQUEST_CONTEXT_RESET, CONTEXT);
            [abi::STATUS_RESET; 2]
        }
        End::DeviceReset => {
            rig.simple(abi::REQUEST_DEVICE_RESET, 0);
            [abi::STATUS_RESET; 2]
        }
    };
    if end != End::Cancel {
        rig.memory.revoke_all();
    }
    let through = rig.host.wait(|outcome| outcome.answer(99));
    assert!(through <= u64::from(mapped));
    for sequence in [1, 2, 11, 12] {
        let status = rig.completion(sequence).status;
        let known = expected.contains(&status) || (mapped && status == OK);
        assert!(known, "submission {sequence} ended with {status}");
    }
    let second = u64::from(faults[1].ring) + 1;
    assert_eq!(rig.completion(second).status, expected[0]);
    assert!(!rig.begin_replay(CONTEXT, faults[0].fault, 98));
    assert!(!rig.begin_replay(CONTEXT, faults[1].fault, 97));
    assert_eq!(rig.gpu().state().faults, []);
    // CANCEL alone is told, once.
    let told = rig.log.take().map(|record| (record.kind, record.fault));
    let expected = (end == End::Cancel).then_some((abi::EVENT_CONTEXT_ERROR, faults[1].fault));
    assert_eq!(told, expected);
    assert!(rig.log.is_empty());
}

#[test]
fn cancel_against_replay() {
    let model = || end(&Rig::new(2, 2), End::Cancel, true);
    holds(model);
    holds(|| end(&Rig::new(2, 2), End::Cancel, false));
    holds(|| end(&Rig::new(2, 1), End::Cancel, true));
    finds(Sabotage::ForgetsRetry, &[DEADLOCK], model);
}

#[test]
fn destroy_against_replay() {
    let model = || end(&Rig::new(2, 2), End::Destroy, true);
    holds(model);
    holds(|| end(&Rig::new(2, 2), End::Destroy, false));
    finds(Sabotage::ForgetsRetry, &[DEADLOCK], model);
}

#[test]
fn context_reset_against_replay() {
    let model = || end(&Rig::new(2, 2), End::ContextReset, true);
    holds(model);
    holds(|| end(&Rig::new(2, 2), End::ContextReset, false));
    finds(Sabotage::ForgetsRetry, &[DEADLOCK], model);
}

#[test]
fn device_reset_against_replay() {
    let model = || end(&Rig::new(2, 2), End::DeviceReset, true);
    holds(model);
    holds(|| end(&Rig::new(2, 2), End::DeviceReset, false));
    finds(Sabotage::ForgetsRetry, &[DEADLOCK], model);
}

/// The device ends, or is reset by its owner, whatever is going on in it.
#[test]
fn the_device_ends() {
    fn begin() -> Arc<Rig> {
        let rig = Rig::new(2, 2);
        rig.submit(0, 1, &[increments(VA, 0, 1)]);
        rig.submit(1, 2, &[increments(VA, 0, 1), increments(VA + PAGE_SIZE, 0, 1)]);
        rig
    }
    let ends = || drop(begin());
    holds(ends);
    holds(|| {
        let rig = begin();
        let fault = rig.event();
        rig.map(CONTEXT, VA, ALL);
        assert!(rig.begin_replay(CONTEXT, fault.fault, 99));
    });
    finds(Sabotage::EndsLate, &[DEADLOCK], ends);
    holds(|| {
        let rig = begin();
        rig.gpu().reset();
        rig.memory.revoke_all();
        assert_eq!(rig.gpu().state().faults, []);
        // It serves the next one.
        rig.memory.grant(0);
        rig.simple(abi::REQUEST_CONTEXT_CREATE, CONTEXT);
        rig.map(CONTEXT, VA, ALL);
        rig.submit(0, 3, &[increments(VA, 1, 1)]);
        assert_eq!(rig.completion(3).status, OK);
    });
}
