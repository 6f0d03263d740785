// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The deliberate defects: each does what it says, and only that.

use super::*;

#[test]
fn a_lost_fault_is_lost() {
    let mut rig = Rig::with(1, &["lost-fault"]);
    rig.create(0);
    let told: Vec<u64> = (1..=8)
        .filter(|&number| {
            rig.submit(0, 0, &[increments(VA + number * PAGE_SIZE, 1)]);
            // The host hears of it, whether there is a record or not.
            rig.events.recv_timeout(PATIENCE).expect("a fault");
            let told = rig.log.take().is_some();
            rig.map(0, VA + number * PAGE_SIZE, &[ALL]);
            assert_eq!(rig.replay(0, number), Ok(1));
            assert_eq!(rig.completion().status, OK);
            told
        })
        .collect();
    assert_eq!(told, [1, 2, 3, 5, 6, 7]);
}

/// A device of two rings and two contexts, with a page of VRAM each at [`VA`], and one of system memory behind it.
fn rig_with(inject: &[&str]) -> Rig {
    let mut rig = Rig::with(2, inject);
    for context in 0..2 {
        rig.create(context);
        let at = u64::from(context) * 2 * PAGE_SIZE;
        rig.map(context, VA, &[ALL | abi::PTE_VRAM | at, ALL | at]);
    }
    rig
}

#[test]
fn an_invalidation_that_does_nothing() {
    let mut rig = rig_with(&["stale-tlb:after=1,every=2,count=1"]);
    let entry = |rig: &mut Rig, page| rig.query(abi::QUERY_ENTRY, 0, 0, VA + page * PAGE_SIZE);
    rig.map(0, VA, &[ALL, ALL | PAGE_SIZE, ALL | (2 * PAGE_SIZE)]);
    let left: Vec<bool> = (0..3)
        .map(|page| {
            let place = VA + page * PAGE_SIZE;
            assert_eq!(rig.run(0, &[increments(place, 1)]).status, OK);
            rig.invalidate(0, place, PAGE_SIZE, abi::INVALIDATE_CLEAR);
            entry(&mut rig, page) != 0
        })
        .collect();
    assert_eq!(left, [false, true, false]);
    // Even if the page table is changed otherwise, the translation is still there.
    rig.map(0, VA + PAGE_SIZE, &[0]);
    assert_eq!(rig.run(0, &[increments(VA + PAGE_SIZE, 1)]).status, OK);
    assert_eq!(rig.load(PAGE_SIZE), 2);
    rig.invalidate(0, 0, VA_END, 0);
    rig.submit(0, 0, &[increments(VA + PAGE_SIZE, 1)]);
    assert_eq!(rig.fault().va, VA + PAGE_SIZE);
    // Forgetting everything can go wrong just as well.
    let mut rig = rig_with(&["stale-tlb"]);
    assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
    rig.map(0, VA, &[0]);
    rig.invalidate(0, 0, 0, abi::INVALIDATE_EVERYTHING);
    assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
    assert_eq!(rig.vram_load(0), 2);
}

#[test]
fn a_fault_that_is_reported_twice() {
    let mut rig = rig_with(&["duplicate-fault:after=1,every=1,count=1"]);
    for (page, times) in [(8, 1), (9, 2), (10, 1)] {
        let place = VA + page * PAGE_SIZE;
        let sequence = rig.submit(0, 0, &[increments(place, 1)]);
        let fault = rig.fault();
        for _ in 1..times {
            assert_eq!(rig.fault().as_bytes(), fault.as_bytes());
        }
        assert!(rig.log.is_empty());
        rig.map(0, place, &[ALL]);
        assert_eq!(rig.replay(0, fault.fault), Ok(1));
        assert_eq!(rig.replay(0, fault.fault), Err(abi::STATUS_NO_FAULT));
        assert_eq!(rig.finish(sequence).status, OK);
    }
    assert_eq!(rig.statistic("faults"), 3);
}

#[test]
fn a_completion_that_comes_before_the_work_is_done() {
    let mut rig = rig_with(&["early-fence:after=1,every=1,count=1"]);
    let work = |value| [semaphore_wait(VA + PAGE_SIZE + 64, value), increments(VA, 1)];
    rig.store(PAGE_SIZE + 64, 1);
    // The page of context 0 is at system address zero.
    rig.store(64, 1);
    assert_eq!(rig.run(0, &work(1)).status, OK);
    let done = rig.run(0, &work(2));
    assert_eq!(
        (done.status, done.executed, done.timeline),
        (OK, 2, done.sequence)
    );
    rig.until_activity(0, Activity::Waiting);
    assert_eq!(rig.vram_load(0), 1, "nothing of it has been done");
    let third = rig.submit(0, 0, &work(3));
    rig.store(64, 2);
    until("the work to be done", || rig.vram_load(0) == 2);
    assert!(!rig.has_completion(), "it has been completed already");
    rig.store(64, 3);
    assert_eq!(rig.finish(third).status, OK);
    assert_eq!(rig.vram_load(0), 3);
}

#[test]
fn a_completion_that_never_comes() {
    let mut rig = rig_with(&["lost-completion:after=1,every=1,count=1"]);
    let sequences = [0; 3].map(|_| rig.submit(0, 0, &[increments(VA, 1)]));
    assert_eq!(rig.finish(sequences[2]).timeline, sequences[2]);
    assert_eq!(rig.finish(sequences[0]).timeline, sequences[0]);
    assert_eq!(rig.vram_load(0), 3, "it was done all the same");
    assert!(!rig.has_completion());
    assert_eq!(rig.statistic("submissions"), 3);
    // Whoever waits for the timeline sees it pass.
    assert_eq!(rig.run_on(1, 0, &[fence_wait(0, sequences[1])]).status, OK);
}

#[test]
fn an_access_to_the_wrong_page() {
    let mut rig = Rig::with(1, &["wrong-page:after=1,every=1,count=1"]);
    rig.create(0);
    rig.map(0, VA, &[RW | (4 * PAGE_SIZE)]);
    let stores: Vec<u64> = (1..=3)
        .map(|value| fill(VA + 8 * value, 8, 8, value))
        .map(|command| {
            assert_eq!(rig.run(0, &[command]).status, OK);
            command.operand
        })
        .collect();
    assert_eq!(stores, [1, 2, 3]);
    let page = |rig: &Rig, page: u64| [8, 16, 24].map(|at| rig.load(page * PAGE_SIZE + at));
    assert_eq!((page(&rig, 4), page(&rig, 5)), ([1, 0, 3], [0, 2, 0]));
    // Of a copy it is the source, or the destination.
    let mut rig = Rig::with(1, &["wrong-page:after=1,every=1,count=1"]);
    rig.create(0);
    rig.map(0, VA, &[RW | (4 * PAGE_SIZE), RW | (8 * PAGE_SIZE)]);
    rig.store(4 * PAGE_SIZE, 7);
    assert_eq!(rig.run(0, &[copy(VA + PAGE_SIZE, VA, 8)]).status, OK);
    assert_eq!((rig.load(8 * PAGE_SIZE), rig.load(9 * PAGE_SIZE)), (0, 7));
}

#[test]
fn a_copy_that_changes_a_byte() {
    let mut rig = Rig::with(1, &["corrupt-copy:after=1,every=1,count=1"]);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.store(0, 0x1122_3344_5566_7788);
    let commands = [
        fill(VA + 8, 8, 8, 9),
        copy(VA + 16, VA, 8),
        fill(VA + 24, 8, 8, 9),
        copy(VA + 32, VA, 8),
        copy(VA + 40, VA, 8),
    ];
    assert_eq!(rig.run(0, &commands).status, OK);
    let found = [8, 16, 24, 32, 40].map(|at| rig.load(at));
    let good = 0x1122_3344_5566_7788;
    assert_eq!(found, [9, good, 9, 0x1122_3344_5566_7777, good]);
}

#[test]
fn a_command_that_never_ends() {
    let mut rig = rig_with(&["hang-engine:after=3,every=1,count=1"]);
    assert_eq!(rig.run(0, &[increments(VA, 1), increments(VA, 1)]).executed, 2);
    let sequence = rig.submit(0, 0, &[increments(VA, 1), increments(VA, 1), increments(VA, 1)]);
    rig.until_activity(0, Activity::Waiting);
    assert_eq!(rig.vram_load(0), 3);
    assert_eq!(rig.run_on(1, 0, &[increments(VA + 8, 1)]).status, OK);
    assert_eq!(rig.run_on(1, 1, &[increments(VA, 1)]).status, OK);
    rig.clear(0);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    let done = rig.finish(sequence);
    assert_eq!((done.status, done.executed), (abi::STATUS_RESET, 1));
    rig.map(0, VA, &[ALL | abi::PTE_VRAM]);
    assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
}

#[test]
fn a_page_of_vram_that_is_lost() {
    let mut rig = rig_with(&["ecc-poison:after=2,every=1,count=1"]);
    // System memory has nothing to do with it.
    assert_eq!(rig.run(0, &[increments(VA + PAGE_SIZE, 1); 3]).status, OK);
    assert_eq!(rig.run(0, &[fill(VA, 8, 8, 1), fill(VA, 8, 8, 2)]).status, OK);
    let sequence = rig.submit(0, 0, &[copy(VA + 24, VA, 8)]);
    let fault = rig.fault();
    assert_eq!((fault.va, fault.reason), (VA, abi::REASON_POISONED));
    assert_eq!((fault.access, fault.length), (abi::ACCESS_READ, 8));
    // Whatever entry leads there, and whoever it is.
    assert_eq!(rig.replay(0, fault.fault), Ok(0));
    let fault = rig.fault();
    assert_eq!(fault.reason, abi::REASON_POISONED);
    rig.map(1, VA + 7 * PAGE_SIZE, &[ALL | abi::PTE_VRAM]);
    let other = rig.submit(1, 1, &[semaphore_signal(VA + 7 * PAGE_SIZE, 9)]);
    let others = rig.fault();
    assert_eq!((others.context, others.reason), (1, abi::REASON_POISONED));
    // Other pages are well. One of them in its place is a repair.
    assert_eq!(rig.replay(1, others.fault), Ok(0));
    let others = rig.fault();
    rig.map(1, VA + 7 * PAGE_SIZE, &[ALL | abi::PTE_VRAM | (9 * PAGE_SIZE)]);
    rig.invalidate(1, VA + 7 * PAGE_SIZE, PAGE_SIZE, 0);
    assert_eq!(rig.replay(1, others.fault), Ok(1));
    assert_eq!(rig.finish(other).status, OK);
    assert_eq!(rig.vram_load(9 * PAGE_SIZE), 9);
    assert_eq!(rig.cancel(0, fault.fault), OK);
    assert_eq!(rig.finish(sequence).status, abi::STATUS_FAULT_CANCELLED);
    // A reset of the context does not heal it, one of the device does.
    rig.event();
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    rig.submit(0, 0, &[increments(VA, 1)]);
    assert_eq!(rig.fault().reason, abi::REASON_POISONED);
    assert_eq!(rig.simple(abi::REQUEST_DEVICE_RESET, 0), OK);
    rig.create(0);
    rig.map(0, VA, &[ALL | abi::PTE_VRAM]);
    assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
    assert_eq!(rig.vram_load(0), 1);
}

#[test]
fn a_device_that_resets_itself() {
    let mut rig = rig_with(&["reset-midway:after=2,every=1,count=1"]);
    assert_eq!(rig.run(0, &[increments(VA, 5)]).status, OK);
    let stalled = rig.submit(1, 1, &[increments(VA + 8 * PAGE_SIZE, 5)]);
    let fault = rig.fault();
    let timeline = rig.timeline(0);
    let (third, fourth) = (
        rig.submit(0, 0, &[increments(VA, 5)]),
        rig.submit(0, 0, &[increments(VA, 5)]),
    );
    let event = rig.event();
    let expected = abi::EventRecord {
        kind: abi::EVENT_DEVICE_RESET,
        ..Default::default()
    };
    assert_eq!(event.as_bytes(), expected.as_bytes());
    assert_eq!(rig.finish(stalled).status, abi::STATUS_RESET);
    let done = rig.finish(third);
    assert_eq!((done.status, done.executed), (abi::STATUS_RESET, 0));
    // The last one was there already, or it came when there were no contexts any more.
    assert!([abi::STATUS_RESET, abi::STATUS_NO_CONTEXT].contains(&rig.finish(fourth).status));
    assert_eq!(rig.vram_load(0), 0);
    assert_eq!(rig.replay(1, fault.fault), Err(abi::STATUS_NO_FAULT));
    for context in 0..2 {
        assert_eq!(
            rig.try_query(abi::QUERY_CONTEXT, context, 0, 0),
            Err(abi::STATUS_NO_CONTEXT)
        );
    }
    assert!(rig.log.is_empty());
    assert!(rig.timeline(0) > timeline);
    // It goes on, and counts faults from where it was.
    rig.create(1);
    rig.submit(1, 1, &[increments(VA, 1)]);
    assert!(rig.fault().fault > fault.fault);
    assert_eq!(rig.statistic("resets"), 1);
}

#[test]
fn the_news_of_a_reset_is_about_no_context() {
    let mut rig = rig_with(&["reset-midway:after=0,every=1,count=1"]);
    assert_eq!(rig.run(0, &[nop()]).status, abi::STATUS_RESET);
    // A driver that has not heard of it yet.
    rig.create(0);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
    assert_eq!(rig.event().kind, abi::EVENT_DEVICE_RESET);
}

#[test]
fn defects_are_switched_while_the_device_runs() {
    let mut rig = rig_with(&[]);
    let double = |rig: &mut Rig| {
        assert_eq!(rig.run(0, &[copy(VA + 8, VA + 16, 8)]).status, OK);
        rig.vram_load(8) & 0xff
    };
    assert_eq!(double(&mut rig), 0);
    rig.injector
        .switch_on("corrupt-copy:after=0,every=1,count=2".parse().unwrap());
    assert_eq!(
        (double(&mut rig), double(&mut rig), double(&mut rig)),
        (0xff, 0xff, 0)
    );
    rig.injector
        .switch_on("corrupt-copy:after=0,every=1".parse().unwrap());
    assert_eq!(double(&mut rig), 0xff);
    assert!(rig.injector.switch_off(Defect::CorruptCopy));
    assert_eq!(double(&mut rig), 0);
}
