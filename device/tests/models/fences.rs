// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Completions, timelines and semaphores. Time stands still, so whoever waits for a number has to be told.

use pinion_abi::{self as abi, PAGE_SIZE};
use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::sync::{Arc, thread};

use super::check::{DEADLOCK, fails, finds, holds};
use super::rig::{ALL, CONTEXT, OK, Rig, VA, copy, fill, increments};

const SEEN_EARLY: &[&str] = &["seen before"];

/// Advances the timeline of the ring.
fn fence(value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_FENCE,
        operand: value,
        ..Default::default()
    }
}

/// Waits for the timeline of `ring`.
fn fence_wait(ring: u32, value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_FENCE_WAIT,
        operand: value,
        span: ring,
        ..Default::default()
    }
}

/// Stores a number that others may wait for.
fn signal(va: u64, value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_SEMAPHORE_SIGNAL,
        width: 8,
        address: va,
        operand: value,
        ..Default::default()
    }
}

/// Waits until the number at `va` is `value` at least.
fn wait(va: u64, value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_SEMAPHORE_WAIT,
        operation: abi::COMPARE_GREATER_EQUAL,
        width: 8,
        address: va,
        operand: value,
        compare: u64::MAX,
        ..Default::default()
    }
}

/// A device with two pages: data at [`VA`], numbers to wait for behind it.
fn rig(rings: u16, engines: u16, defect: Option<&str>) -> Arc<Rig> {
    let rig = Rig::with(rings, engines, defect);
    rig.map(CONTEXT, VA, ALL);
    rig.map(CONTEXT, VA + PAGE_SIZE, ALL | PAGE_SIZE);
    rig
}

const NUMBER: u64 = VA + PAGE_SIZE;

/// What `first` has stored before it says so is there for `second`, which has waited for that.
fn hand_over(rig: &Rig, told: &[abi::Command], waits: abi::Command) {
    let first: Vec<_> = [&[fill(VA, 0, 5)], told].concat();
    // The waiting ring is at work first, so that an engine that serves both has to leave it.
    rig.submit(1, 21, &[waits, copy(VA, VA + 8)]);
    rig.submit(0, 11, &first);
    handed_over(rig);
}

/// The same, but the device is stopped at first: then the engines' own threads do the work.
fn hand_over_stopped(rig: &Rig, told: &[abi::Command], waits: abi::Command) {
    let first: Vec<_> = [&[fill(VA, 0, 5)], told].concat();
    rig.gpu().pause();
    rig.submit(1, 21, &[waits, copy(VA, VA + 8)]);
    rig.submit(0, 11, &first);
    rig.gpu().resume();
    handed_over(rig);
}

fn handed_over(rig: &Rig) {
    assert_eq!(rig.completion(21).status, OK);
    assert_eq!(rig.memory.load(0, 1), 5, "a fence was seen before the data");
    assert_eq!(rig.completion(11).status, OK);
}

#[test]
fn a_ring_waits_for_the_completion_of_another() {
    let model = || hand_over(&rig(2, 2, None), &[], fence_wait(0, 11));
    holds(model);
    holds(|| hand_over(&rig(2, 1, None), &[], fence_wait(0, 11)));
    finds(Sabotage::AdvancesFirst, SEEN_EARLY, model);
    finds(Sabotage::PokesFirst, &[DEADLOCK], model);
    let stopped = || hand_over_stopped(&rig(2, 2, None), &[], fence_wait(0, 11));
    holds(stopped);
    finds(Sabotage::WaitsUnseen, &[DEADLOCK], stopped);
}

#[test]
fn a_ring_waits_for_a_fence() {
    let model = || {
        hand_over(
            &rig(2, 2, None),
            &[fence(3), abi::Command::default()],
            fence_wait(0, 3),
        )
    };
    holds(model);
    holds(|| hand_over(&rig(2, 1, None), &[fence(3)], fence_wait(0, 3)));
    fails("early-fence", SEEN_EARLY, || {
        hand_over(
            &rig(2, 2, Some("early-fence:after=0")),
            &[fence(3)],
            fence_wait(0, 3),
        );
    });
}

#[test]
fn a_ring_waits_for_a_semaphore() {
    let model = || hand_over(&rig(2, 2, None), &[signal(NUMBER, 1)], wait(NUMBER, 1));
    holds(model);
    holds(|| hand_over(&rig(2, 1, None), &[signal(NUMBER, 1)], wait(NUMBER, 1)));
    let stopped = || hand_over_stopped(&rig(2, 2, None), &[signal(NUMBER, 1)], wait(NUMBER, 1));
    holds(stopped);
    finds(Sabotage::WaitsUnseen, &[DEADLOCK], stopped);
}

#[test]
fn a_ring_waits_for_an_atomic_operation() {
    let model = || hand_over(&rig(2, 2, None), &[increments(NUMBER, 0, 2)], wait(NUMBER, 2));
    holds(model);
}

/// A FENCE advances the timeline before it stores it, which can fault: who waits for it does not wait for the repair.
#[test]
fn a_fence_that_faults_is_a_fence() {
    let model = || {
        let rig = rig(2, 2, None);
        let stuck = abi::Command {
            flags: abi::COMMAND_WRITE_BACK,
            source: VA + 2 * PAGE_SIZE,
            ..fence(3)
        };
        rig.submit(1, 21, &[fence_wait(0, 3)]);
        rig.submit(0, 11, &[stuck]);
        assert_eq!(rig.completion(21).status, OK);
        rig.repair(&[11], |_| ALL | (2 * PAGE_SIZE), |_, _| ());
        assert_eq!(rig.memory.load(2, 0), 3);
    };
    holds(model);
    finds(Sabotage::SignalsAtEnd, &[DEADLOCK], model);
}

/// A ring that waits for a number of its own context ends with it.
#[test]
fn who_waits_ends_with_its_context() {
    let model = || {
        let rig = rig(2, 2, None);
        rig.submit(0, 11, &[fence_wait(1, 1000)]);
        rig.submit(1, 21, &[wait(NUMBER, 1)]);
        rig.simple(abi::REQUEST_CONTEXT_DESTROY, CONTEXT);
        for sequence in [11, 21] {
            assert_eq!(rig.completion(sequence).status, abi::STATUS_NO_CONTEXT);
        }
    };
    holds(model);
}

/// Submissions of a ring complete in order, each once and after its work; who sees the timeline sees the work.
fn in_order(defect: Option<&str>) {
    let rig = rig(1, 1, defect);
    let watched = rig.clone();
    let watcher = thread::spawn(move || {
        let mut last = 0;
        for _ in 0..3 {
            let timeline = watched.timeline(0);
            assert!(timeline >= last, "the timeline went back");
            for sequence in 1..=timeline {
                let value = watched.memory.load(0, sequence as usize);
                assert_eq!(value, sequence, "a fence was seen before the data");
            }
            last = timeline;
        }
    });
    for sequence in 1..=3 {
        rig.submit(0, sequence, &[fill(VA, sequence, sequence)]);
    }
    for sequence in 1..=3 {
        let completion = rig.completion(sequence);
        assert_eq!((completion.status, completion.timeline), (OK, sequence));
        let value = rig.memory.load(0, sequence as usize);
        assert_eq!(value, sequence, "a completion was seen before the data");
    }
    let order = rig.host.look(|outcome| {
        let sequences = outcome
            .completions
            .iter()
            .map(|(_, completion)| completion.sequence);
        sequences.collect::<Vec<_>>()
    });
    assert_eq!(order, [1, 2, 3]);
    watcher.join().expect("a watcher that ends");
}

#[test]
fn completions_are_in_order() {
    let model = || in_order(None);
    holds(model);
    finds(Sabotage::AdvancesFirst, SEEN_EARLY, model);
    finds(Sabotage::IgnoresIdle, &[DEADLOCK], model);
    fails("early-fence", SEEN_EARLY, || {
        in_order(Some("early-fence:after=0"))
    });
    fails("lost-completion", &[DEADLOCK], || {
        in_order(Some("lost-completion:after=1"))
    });
}
