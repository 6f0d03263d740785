// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Semaphores, timelines and fences, and the time.

use super::*;

/// A device with two rings, and context 0 with one page of system memory and one of VRAM.
fn rig_with_pages(engines: u16) -> Rig {
    let mut rig = Rig::build(settings(2, engines), &[]);
    rig.create(0);
    rig.map(0, VA, &[ALL, ALL | abi::PTE_VRAM]);
    rig
}

#[test]
fn semaphores_compare_as_they_say() {
    type Holds = fn(u64, u64) -> bool;
    let comparisons: [(u8, Holds); 6] = [
        (abi::COMPARE_EQUAL, |value, operand| value == operand),
        (abi::COMPARE_NOT_EQUAL, |value, operand| value != operand),
        (abi::COMPARE_LESS, |value, operand| value < operand),
        (abi::COMPARE_LESS_EQUAL, |value, operand| value <= operand),
        (abi::COMPARE_GREATER, |value, operand| value > operand),
        (abi::COMPARE_GREATER_EQUAL, |value, operand| value >= operand),
    ];
    let mut rig = rig_with_pages(2);
    for (operation, holds) in comparisons {
        for width in [4, 8_u8] {
            // The highest bit: the comparison is unsigned.
            let top = 1_u64 << (8 * width - 1);
            for value in [top - 1, top, top + 1] {
                let mask = top | (top - 1);
                // What is next to a number of four bytes, and what is outside the mask, does not matter.
                let (operand, mask) = (top & !0xf0, mask & !0xf0);
                let number = value | 0x50;
                let neighbour = if width == 4 { 0xffff_ffff << 32 } else { 0 };
                rig.store(64, number | neighbour);
                let wait = abi::Command {
                    operation,
                    width,
                    compare: mask,
                    ..semaphore_wait(VA + 64, operand)
                };
                let sequence = rig.submit(0, 0, &[wait]);
                if !holds(number & mask, operand) {
                    rig.until_activity(0, Activity::Waiting);
                    assert!(!rig.has_completion(), "{wait:?} on {number:x}");
                    let good = [operand - 16, operand, operand + 1];
                    let good = good.into_iter().find(|good| holds(good & mask, operand));
                    rig.store(64, good.unwrap() | neighbour);
                }
                assert_eq!(rig.finish(sequence).status, OK);
            }
        }
    }
}

#[test]
fn semaphores_store_their_width_and_no_more() {
    let mut rig = rig_with_pages(1);
    rig.store(8, u64::MAX);
    let signal = abi::Command {
        width: 4,
        ..semaphore_signal(VA + 12, 7)
    };
    assert_eq!(
        rig.run(0, &[signal, semaphore_signal(VA + 16, 1 << 40)]).status,
        OK
    );
    assert_eq!((rig.load(8), rig.load(16)), ((7 << 32) | 0xffff_ffff, 1 << 40));
}

#[test]
fn what_was_done_before_a_signal_is_there_for_who_waits() {
    for engines in [1, 2] {
        for semaphore in [VA + 4000, VA + PAGE_SIZE + 4000] {
            let mut rig = rig_with_pages(engines);
            let data = VA + PAGE_SIZE + 8;
            for round in 1..=100 {
                let waiter = rig.submit(
                    0,
                    0,
                    &[semaphore_wait(semaphore, round), copy(VA + 8, data, 1000)],
                );
                let signal = [fill(data, 1000, 8, round), semaphore_signal(semaphore, round)];
                let signaller = rig.submit(1, 0, &signal);
                assert_eq!(
                    (rig.finish(waiter).status, rig.finish(signaller).status),
                    (OK, OK)
                );
                assert_eq!((rig.load(8), rig.load(1000)), (round, round));
            }
        }
    }
}

#[test]
fn a_semaphore_can_be_stored_by_any_command() {
    let mut rig = rig_with_pages(1);
    let place = VA + PAGE_SIZE + 64;
    let exchange = abi::Command {
        operation: abi::ATOMIC_EXCHANGE,
        operand: 3,
        ..increments(place, 1)
    };
    let number = semaphore_signal(VA + 128, 2);
    for (value, commands) in [
        (1, vec![fill(place, 8, 8, 1)]),
        (2, vec![number, copy(place, VA + 128, 8)]),
        (3, vec![exchange]),
        (77, vec![fence_to(77, place)]),
    ] {
        let wait = rig.submit(0, 0, &[semaphore_wait(place, value)]);
        rig.until_activity(0, Activity::Waiting);
        assert_eq!(rig.run_on(1, 0, &commands).status, OK);
        assert_eq!(rig.finish(wait).status, OK);
    }
}

#[test]
fn the_page_of_a_semaphore_can_come_and_go() {
    let mut rig = rig_with_pages(1);
    let place = VA + 4 * PAGE_SIZE + 16;
    let sequence = rig.submit(0, 0, &[nop(), semaphore_wait(place, 5)]);
    for round in 0..3 {
        let fault = rig.fault();
        assert_eq!((fault.va, fault.access), (place, abi::ACCESS_READ));
        assert_eq!((fault.reason, fault.length), (abi::REASON_NOT_PRESENT, 8));
        rig.map(0, VA + 4 * PAGE_SIZE, &[READ | (round * PAGE_SIZE)]);
        // It has looked, and that is all that the REPLAY asked for.
        assert_eq!(rig.replay(0, fault.fault), Ok(1));
        rig.until_activity(0, Activity::Waiting);
        assert_eq!(rig.run_on(1, 0, &[nop()]).status, OK);
        if round < 2 {
            // What it had translated is of no use any more: it needs the right each time.
            rig.invalidate(0, place & !0xfff, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        }
    }
    rig.store(2 * PAGE_SIZE + 16, 5);
    assert_eq!(rig.finish(sequence).status, OK);
    // Taken away while somebody waits, and given up.
    let sequence = rig.submit(0, 0, &[semaphore_wait(place, 6)]);
    rig.until_activity(0, Activity::Waiting);
    rig.invalidate(0, place & !0xfff, PAGE_SIZE, abi::INVALIDATE_CLEAR);
    let fault = rig.fault();
    assert_eq!(rig.cancel(0, fault.fault), OK);
    let done = rig.finish(sequence);
    assert_eq!((done.status, done.fault_va), (abi::STATUS_FAULT_CANCELLED, place));
}

#[test]
fn waits_need_read_and_signals_write() {
    let mut rig = rig_with_pages(1);
    for (command, entry, access, reason) in [
        (
            semaphore_wait(VA, 0),
            abi::PTE_VALID | abi::PTE_WRITE,
            abi::ACCESS_READ,
            abi::REASON_READ,
        ),
        (
            semaphore_signal(VA, 0),
            READ,
            abi::ACCESS_WRITE,
            abi::REASON_WRITE,
        ),
        (timestamp(VA), READ, abi::ACCESS_WRITE, abi::REASON_WRITE),
        (fence_to(1, VA), READ, abi::ACCESS_WRITE, abi::REASON_WRITE),
    ] {
        rig.clear(0);
        rig.map(0, VA, &[entry]);
        let sequence = rig.submit(0, 0, &[command]);
        let fault = rig.fault();
        assert_eq!((fault.access, fault.reason), (access, reason), "{command:?}");
        rig.clear(0);
        rig.map(0, VA, &[abi::PTE_VALID | u64::from(access) << 1]);
        assert_eq!(rig.replay(0, fault.fault), Ok(1), "{command:?}");
        assert_eq!(rig.finish(sequence).status, OK);
    }
}

#[test]
fn a_timeline_is_the_highest_sequence_that_has_ended() {
    let mut rig = rig_with_pages(2);
    let mut timelines = Vec::new();
    for (sequence, context) in [(5, 0), (3, 0), (9, 0), (8, 0), (12, 77)] {
        rig.submit_as(sequence, 0, context, &[nop()]);
        timelines.push((rig.finish(sequence).timeline, rig.timeline(0)));
    }
    // However it ended: context 77 does not exist.
    assert_eq!(timelines, [(5, 5), (5, 5), (9, 9), (9, 9), (12, 12)]);
    let bad = abi::Command { opcode: 99, ..nop() };
    rig.submit_as(20, 0, 0, &[bad]);
    let done = rig.finish(20);
    assert_eq!((done.status, done.timeline), (abi::STATUS_UNSUPPORTED, 20));
    assert_eq!(rig.timeline(1), 0);
    assert_eq!(
        rig.try_query(abi::QUERY_TIMELINE, 0, 2, 0),
        Err(abi::STATUS_INVALID)
    );
}

#[test]
fn fences_advance_the_timeline_and_never_take_it_back() {
    let mut rig = rig_with_pages(2);
    rig.submit_as(
        10,
        0,
        0,
        &[
            fence_to(100, VA),
            fence_to(50, VA + 8),
            fence(200),
            fence_to(0, VA + 16),
        ],
    );
    let done = rig.finish(10);
    assert_eq!((done.status, done.executed, done.timeline), (OK, 4, 200));
    assert_eq!((rig.load(0), rig.load(8), rig.load(16)), (100, 100, 200));
    assert_eq!((rig.timeline(0), rig.timeline(1)), (200, 0));
    rig.submit_as(11, 0, 0, &[nop()]);
    assert_eq!(rig.finish(11).timeline, 200);
    // It goes on whatever is reset.
    assert_eq!(rig.simple(abi::REQUEST_DEVICE_RESET, 0), OK);
    assert_eq!(rig.timeline(0), 200);
}

#[test]
fn a_fence_is_passed_before_its_submission_ends() {
    let mut rig = rig_with_pages(1);
    let sequence = rig.submit(
        0,
        0,
        &[fill(VA, 8, 8, 6), fence(1000), semaphore_wait(VA + 64, 1)],
    );
    assert_eq!(rig.run_on(1, 0, &[fence_wait(0, 1000)]).status, OK);
    assert_eq!((rig.timeline(0), rig.load(0)), (1000, 6));
    assert!(!rig.has_completion());
    rig.store(64, 1);
    assert_eq!(rig.finish(sequence).timeline, 1000);
}

#[test]
fn a_fence_whose_write_back_faults_is_passed_once() {
    let mut rig = rig_with_pages(2);
    let place = VA + 9 * PAGE_SIZE;
    let sequence = rig.submit(0, 0, &[fence_to(500, place)]);
    let fault = rig.fault();
    assert_eq!(
        (fault.va, fault.access, fault.length),
        (place, abi::ACCESS_WRITE, 8)
    );
    assert_eq!(rig.timeline(0), 500);
    rig.map(0, place, &[RW | PAGE_SIZE]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.finish(sequence).timeline, 500);
    assert_eq!(rig.load(PAGE_SIZE), 500);
}

#[test]
fn fences_are_waited_for_across_rings() {
    for engines in [1, 2] {
        let mut rig = rig_with_pages(engines);
        // Until a submission has ended.
        let running = rig.submit(1, 0, &[semaphore_wait(VA + 8, 1)]);
        let waiting = rig.submit(0, 0, &[fence_wait(1, running), copy(VA + 16, VA + 8, 8)]);
        rig.until_activity(0, Activity::Waiting);
        assert!(!rig.has_completion());
        rig.store(8, 1);
        assert_eq!((rig.finish(running).status, rig.finish(waiting).status), (OK, OK));
        assert_eq!(rig.load(16), 1);
        // What has been reached is not waited for; nor is zero.
        let own = rig.timeline(0);
        let passed = [fence_wait(1, running), fence_wait(0, own), fence_wait(0, 0)];
        assert_eq!(rig.run(0, &passed).status, OK);
        // A chain through both rings and back.
        let first = rig.submit(0, 0, &[fence_wait(1, 1001), fence(2000)]);
        let second = rig.submit(1, 0, &[fence(1001), fence_wait(0, 2000), fence(1002)]);
        assert_eq!((rig.finish(first).status, rig.finish(second).status), (OK, OK));
        assert_eq!((rig.timeline(0), rig.timeline(1)), (2000, 1002));
    }
}

#[test]
fn the_time_goes_forward_everywhere() {
    let mut rig = rig_with_pages(2);
    let mut last = rig.time();
    for _ in 0..50 {
        let done = rig.run(0, &[timestamp(VA), nop(), timestamp(VA + PAGE_SIZE + 8)]);
        let now = rig.time();
        let seen = [last, rig.load(0), rig.vram_load(8), done.time, now];
        assert!(seen.is_sorted() && last > 0, "{seen:?}");
        last = now;
    }
    rig.gpu.reset();
    assert!(rig.time() >= last, "a reset does not take the time back");
}
