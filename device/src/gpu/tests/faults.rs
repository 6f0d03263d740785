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

#[test]
fn a_fault_says_how_far_the_command_will_go_on() {
    let far = VA + 100 * PAGE_SIZE;
    let atomic = |stride: u64, span: u32, repeat: u32| abi::Command {
        stride: stride as u32,
        span,
        ..increments(far + 8, repeat)
    };
    let told = |flags: u8| abi::Command {
        flags,
        source: far,
        ..increments(VA, 1000)
    };
    for (command, length) in [
        (copy(VA, far + 3, 3 * PAGE_SIZE), 3 * PAGE_SIZE),
        (copy(far + 3, VA, 3 * PAGE_SIZE), 3 * PAGE_SIZE),
        (copy(far, VA, 1), 1),
        (fill(far, 9 * PAGE_SIZE, 8, 0), 9 * PAGE_SIZE),
        (atomic(8, 0, 1000), 8000),
        (atomic(8, 10, 1000), 80),
        (atomic(0, 0, 1000), 8),
        (atomic(PAGE_SIZE, 3, 9), 2 * PAGE_SIZE + 8),
        // Pages are left out.
        (atomic(2 * PAGE_SIZE, 3, 9), 8),
        (told(abi::COMMAND_WRITE_BACK), 8),
        (told(abi::COMMAND_WRITE_BACK | abi::COMMAND_WRITE_BACK_ALL), 8000),
        (semaphore_wait(far, 0), 8),
        (
            abi::Command {
                width: 4,
                ..semaphore_wait(far, 0)
            },
            4,
        ),
        (semaphore_signal(far, 0), 8),
        (timestamp(far), 8),
        (fence_to(0, far), 8),
    ] {
        let command = if command.width == 4 {
            abi::Command {
                compare: 0xffff_ffff,
                ..command
            }
        } else {
            command
        };
        let mut rig = Rig::new(1);
        rig.create(0);
        rig.map(0, VA, &[ALL; 16]);
        rig.submit(0, 0, &[command]);
        let fault = rig.fault();
        assert_eq!(fault.va & !0xfff, far);
        assert_eq!(fault.length, length, "{command:?}");
    }
}

#[test]
fn a_fault_in_the_middle_says_what_is_left() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL; 4]);
    for (command, at, length) in [
        (
            fill(VA + 8, 8 * PAGE_SIZE, 8, 0),
            VA + 4 * PAGE_SIZE,
            4 * PAGE_SIZE + 8,
        ),
        (
            copy(VA + 5, VA + 7, 6 * PAGE_SIZE),
            VA + 4 * PAGE_SIZE,
            2 * PAGE_SIZE + 7,
        ),
        (
            abi::Command {
                stride: 16,
                ..increments(VA, 2000)
            },
            VA + 4 * PAGE_SIZE,
            32_000 - 16 - 4 * PAGE_SIZE + 8,
        ),
    ] {
        let sequence = rig.submit(0, 0, &[command]);
        let fault = rig.fault();
        assert_eq!((fault.va, fault.length), (at, length), "{command:?}");
        assert_eq!(rig.cancel(0, fault.fault), OK);
        rig.finish(sequence);
        rig.event();
        assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    }
    // One who maps as much as the hint says has no other fault.
    let before = rig.statistic("faults");
    let sequence = rig.submit(0, 0, &[fill(VA + 8, 8 * PAGE_SIZE, 8, 0)]);
    let fault = rig.fault();
    let pages = (fault.va % PAGE_SIZE + fault.length).div_ceil(PAGE_SIZE);
    rig.map(0, fault.va, &vec![ALL; pages as usize]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.finish(sequence).status, OK);
    assert_eq!(rig.statistic("faults"), before + 1);
}

#[test]
fn pages_whose_content_is_lost_fault_whatever_is_done() {
    let mut rig = Rig::new(1);
    rig.create(0);
    for target in [0, abi::PTE_VRAM] {
        for command in [
            copy(VA + 4 * PAGE_SIZE, VA, 8),
            copy(VA, VA + 4 * PAGE_SIZE, 8),
            fill(VA, 8, 8, 0),
            increments(VA, 1),
            semaphore_wait(VA, 0),
            semaphore_signal(VA, 0),
        ] {
            rig.clear(0);
            rig.map(
                0,
                VA,
                &[ALL | target | abi::PTE_POISONED, 0, 0, 0, RW | (7 * PAGE_SIZE)],
            );
            let sequence = rig.submit(0, 0, &[command]);
            let fault = rig.fault();
            assert_eq!(
                (fault.reason, fault.va),
                (abi::REASON_POISONED, VA),
                "{command:?}"
            );
            assert_eq!(rig.replay(0, fault.fault), Ok(0));
            let fault = rig.fault();
            assert_eq!(fault.reason, abi::REASON_POISONED);
            // A page in its place needs an INVALIDATE only if somebody could remember the old one; nobody can.
            rig.map(0, VA, &[ALL | target]);
            rig.store(0, 0);
            rig.vram_write(0, &[0; 8]);
            assert_eq!(rig.replay(0, fault.fault), Ok(1));
            assert_eq!(rig.finish(sequence).status, OK);
        }
    }
    // Whatever else the entry says has to be well-formed.
    assert_eq!(
        rig.try_map(0, VA, &[abi::PTE_VALID | abi::PTE_POISONED | 1 << 60], 0),
        abi::STATUS_INVALID
    );
    // Without VALID it is no entry at all.
    rig.clear(0);
    rig.map(0, VA, &[abi::PTE_POISONED]);
    rig.submit(0, 0, &[fill(VA, 8, 8, 0)]);
    assert_eq!(rig.fault().reason, abi::REASON_NOT_PRESENT);
}
