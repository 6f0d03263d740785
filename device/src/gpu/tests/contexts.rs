// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Contexts and resets; what stops, and what goes on.

use super::*;

#[test]
fn nothing_moves_after_destroy_pause_or_reset() {
    let mut rig = Rig::new(1);
    for (name, stop) in [
        ("pause", (|rig| rig.gpu.pause()) as fn(&mut Rig)),
        ("destroy", |rig| {
            assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK)
        }),
        ("reset", |rig| rig.gpu.reset()),
    ] {
        rig.create(0);
        rig.map(0, VA, &[ALL]);
        let before = rig.load(0);
        rig.submit(0, 0, &[increments(VA, u32::MAX)]);
        let start = Instant::now();
        while rig.load(0) == before {
            assert!(
                start.elapsed() < PATIENCE,
                "waited {PATIENCE:?} for the engine to begin"
            );
        }
        stop(&mut rig);
        let stopped = rig.load(0);
        for _ in 0..2000 {
            assert_eq!(rig.load(0), stopped, "after {name}");
        }
        if name == "pause" {
            rig.gpu.resume();
            while rig.load(0) == stopped {
                assert!(
                    start.elapsed() < PATIENCE,
                    "waited {PATIENCE:?} for the engine to go on"
                );
            }
            assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
        }
        let expect = if name == "reset" {
            abi::STATUS_RESET
        } else {
            abi::STATUS_NO_CONTEXT
        };
        assert_eq!(rig.completion().status, expect);
    }
}

#[test]
fn a_reset_forgets_stalls_replays_and_events() {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.event();
    rig.map(0, VA, &[ALL | abi::PTE_VRAM]);
    rig.submit(1, 0, &[increments(VA, 5)]);
    assert_eq!(rig.completion().status, OK);
    rig.gpu.reset();
    assert_eq!(rig.replay(0, fault.fault), Err(abi::STATUS_NO_FAULT));
    rig.create(0);
    assert!(rig.log.is_empty());
    rig.map(0, VA, &[ALL | abi::PTE_VRAM, ALL]);
    // Ring 0 has given up what it was stalled on, and VRAM is zero again.
    assert_eq!(
        rig.run(0, &[increments(VA, 1), copy(VA + PAGE_SIZE, VA, 8)])
            .status,
        OK
    );
    assert_eq!(rig.load(0), 1);
}

#[test]
fn ends_with_stalled_busy_and_paused_engines() {
    let mut rig = Rig::new(3);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.event();
    let start = Instant::now();
    drop(rig);
    assert!(start.elapsed() < PATIENCE);
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    rig.gpu.pause();
    drop(rig);
}

/// Waits until a number in VRAM has changed.
fn until_moving(rig: &Rig, offset: u64) {
    let before = rig.vram_load(offset);
    until("the engine to work", || rig.vram_load(offset) != before);
}

/// Context 0 stalled on ring 0, waiting on ring 1, working on ring 2 and queued behind all three; context 1
/// working on ring 3. What is queued would store at [`VA`].
fn busy_everywhere() -> (Rig, Vec<u64>, abi::EventRecord) {
    let mut rig = Rig::build(settings(4, 2), &[]);
    for context in 0..2 {
        rig.create(context);
        let at = u64::from(context) * PAGE_SIZE;
        rig.map(context, VA, &[ALL | abi::PTE_VRAM | at]);
    }
    rig.submit(3, 1, &[increments(VA, u32::MAX)]);
    let work = [
        increments(VA + 8 * PAGE_SIZE, 1),
        semaphore_wait(VA + 16, 1),
        increments(VA + 8, u32::MAX),
    ];
    let mut sequences = Vec::new();
    for (ring, command) in (0..).zip(work) {
        sequences.push(rig.submit(ring, 0, &[nop(), command]));
        sequences.push(rig.submit(ring, 0, &[increments(VA, 1)]));
    }
    let fault = rig.fault();
    rig.until_activity(1, Activity::Waiting);
    until_moving(&rig, 8);
    (rig, sequences, fault)
}

#[test]
fn a_context_reset_ends_all_work_and_keeps_the_pages() {
    let (mut rig, sequences, fault) = busy_everywhere();
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    // No access is in flight any more.
    let stopped = rig.vram_load(8);
    for sequence in &sequences {
        let done = rig.finish(*sequence);
        assert_eq!(done.status, abi::STATUS_RESET);
        assert_eq!(done.executed, if sequence % 2 == 0 { 1 } else { 0 });
    }
    assert_eq!((rig.vram_load(8), rig.vram_load(0)), (stopped, 0));
    assert_eq!(rig.replay(0, fault.fault), Err(abi::STATUS_NO_FAULT));
    // The context is there, with its pages, and so is the other one with its work.
    assert_eq!(rig.context_status(0), OK);
    assert_eq!(rig.query(abi::QUERY_ENTRY, 0, 0, VA), ALL | abi::PTE_VRAM);
    for ring in 0..3 {
        assert_eq!(rig.run_on(ring, 0, &[increments(VA, 1)]).status, OK);
    }
    assert_eq!(rig.vram_load(0), 3);
    until_moving(&rig, PAGE_SIZE);
    assert!(rig.log.is_empty());
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 2), abi::STATUS_NO_CONTEXT);
}

#[test]
fn a_context_reset_takes_a_context_out_of_error() {
    for what in ["cancel", "bus error"] {
        let mut rig = Rig::new(2);
        rig.create(0);
        rig.map(0, VA, &[ALL, ALL | MEMORY]);
        if what == "cancel" {
            rig.submit(0, 0, &[increments(VA + 8 * PAGE_SIZE, 1)]);
            let fault = rig.fault();
            assert_eq!(rig.cancel(0, fault.fault), OK);
        } else {
            rig.submit(0, 0, &[increments(VA + PAGE_SIZE, 1)]);
        }
        rig.completion();
        assert_ne!(rig.context_status(0), OK);
        assert_eq!(
            rig.run_on(1, 0, &[increments(VA, 1)]).status,
            abi::STATUS_CONTEXT_ERROR
        );
        assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
        // News of the error that was not delivered is none any more.
        assert!(rig.log.is_empty());
        assert_eq!(rig.context_status(0), OK);
        assert_eq!(rig.run_on(1, 0, &[increments(VA, 1)]).status, OK);
        assert_eq!(rig.load(0), 1);
        // It can go into error again, and says so again.
        rig.map(0, VA + 2 * PAGE_SIZE, &[ALL | MEMORY]);
        assert_eq!(
            rig.run(0, &[increments(VA + 2 * PAGE_SIZE, 1)]).status,
            abi::STATUS_BUS_ERROR
        );
        assert_eq!(rig.event().kind, abi::EVENT_CONTEXT_ERROR);
    }
}

#[test]
fn a_context_reset_completes_a_replay_that_is_under_way() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let sequence = rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.fault();
    rig.map(0, VA, &[ALL]);
    rig.gpu.pause();
    rig.replay_begin(0, fault.fault, 5).unwrap();
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    rig.gpu.resume();
    assert_eq!(rig.replay_end(), (5, 0));
    assert_eq!(rig.finish(sequence).status, abi::STATUS_RESET);
    assert_eq!(rig.load(0), 0);
}

#[test]
fn a_device_reset_ends_everything() {
    let (mut rig, sequences, fault) = busy_everywhere();
    let timelines: Vec<u64> = (0..4).map(|ring| rig.timeline(ring)).collect();
    assert_eq!(
        rig.control(head(abi::REQUEST_DEVICE_RESET, 0, 1).as_bytes()),
        abi::STATUS_INVALID
    );
    assert_eq!(rig.simple(abi::REQUEST_DEVICE_RESET, 0), OK);
    for offset in [0, 8, 16, PAGE_SIZE] {
        assert_eq!(rig.vram_load(offset), 0);
    }
    for sequence in sequences {
        assert_eq!(rig.finish(sequence).status, abi::STATUS_RESET);
    }
    // That of the other context, which came first of all.
    assert_eq!(rig.finish(1).status, abi::STATUS_RESET);
    for context in 0..2 {
        assert_eq!(
            rig.try_query(abi::QUERY_CONTEXT, context, 0, 0),
            Err(abi::STATUS_NO_CONTEXT)
        );
    }
    assert!(rig.log.is_empty());
    assert_eq!(rig.vram_load(PAGE_SIZE), 0, "nothing was in flight");
    // Timelines and fault numbers go on; page tables do not.
    for (ring, before) in (0..).zip(timelines) {
        assert!(rig.timeline(ring) >= before);
    }
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let next = rig.fault();
    assert_eq!(next.reason, abi::REASON_NOT_PRESENT);
    assert!(next.fault > fault.fault);
}

#[test]
fn queued_work_is_not_of_a_later_context_of_the_same_number() {
    for (opcode, status) in [
        (abi::REQUEST_CONTEXT_DESTROY, abi::STATUS_NO_CONTEXT),
        (abi::REQUEST_DEVICE_RESET, abi::STATUS_RESET),
    ] {
        let mut rig = Rig::new(1);
        rig.create(0);
        rig.map(0, VA, &[ALL]);
        let sequences = [
            rig.submit(0, 0, &[semaphore_wait(VA, 1)]),
            rig.submit(0, 0, &[increments(VA + 8, 1)]),
        ];
        rig.until_activity(0, Activity::Waiting);
        rig.gpu.pause();
        assert_eq!(rig.simple(opcode, 0), OK);
        rig.create(0);
        rig.map(0, VA, &[ALL]);
        rig.gpu.resume();
        for sequence in sequences {
            assert_eq!(rig.finish(sequence).status, status);
        }
        assert_eq!(rig.load(8), 0);
        assert_eq!(rig.run(0, &[increments(VA + 8, 1)]).status, OK);
    }
}

#[test]
fn there_can_be_as_many_contexts_as_the_device_says() {
    let config = Gpu::<TestHost>::config(&settings(4, 2));
    let contexts = config.max_contexts;
    assert!(contexts >= 1024);
    let mut rig = Rig::build(settings(4, 2), &[]);
    for context in 0..contexts {
        rig.create(context);
        let at = u64::from(context) * PAGE_SIZE;
        rig.map(context, VA, &[ALL | abi::PTE_VRAM | at]);
    }
    assert_eq!(
        rig.simple(abi::REQUEST_CONTEXT_CREATE, contexts),
        abi::STATUS_INVALID
    );
    // All of them work at the same time, and each for itself.
    let work = |rig: &mut Rig| {
        let sequences: Vec<u64> = (0..contexts)
            .map(|context| {
                let number = u64::from(context);
                let command = abi::Command {
                    operand: number + 1,
                    ..increments(VA + 8 * (number % 512), 2)
                };
                rig.submit((context % 4) as u16, context, &[command])
            })
            .collect();
        for sequence in sequences {
            assert_eq!(rig.finish(sequence).status, OK);
        }
    };
    work(&mut rig);
    work(&mut rig);
    for context in 0..u64::from(contexts) {
        let at = context * PAGE_SIZE + 8 * (context % 512);
        assert_eq!(rig.vram_load(at), 4 * (context + 1), "context {context}");
    }
    assert_eq!(rig.gpu.state().contexts.len(), contexts as usize);
    // One that ends makes room for one.
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 700), OK);
    rig.create(700);
}
