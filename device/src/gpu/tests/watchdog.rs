// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The watchdog: what hangs is ended, and nothing else.

use super::*;

/// Long enough that a busy host does not take a processor away for as long, in the middle of work that is to be done.
const LIMIT: Duration = Duration::from_millis(120);

fn watched(rings: u16, engines: u16) -> Rig {
    let settings = Settings {
        watchdog: Some(LIMIT),
        ..settings(rings, engines)
    };
    let mut rig = Rig::build(settings, &[]);
    for context in 0..2 {
        rig.create(context);
        rig.map(
            context,
            VA,
            &[ALL | abi::PTE_VRAM | (u64::from(context) * PAGE_SIZE), ALL],
        );
    }
    rig
}

/// The next event says that context 0 hung in submission `sequence` of `ring`.
fn expect_hung(rig: &mut Rig, ring: u16, sequence: u64) {
    let event = rig.event();
    assert_eq!((event.kind, event.ring), (abi::EVENT_CONTEXT_ERROR, ring));
    assert_eq!((event.context, event.sequence), (0, sequence));
    assert_eq!((event.status, event.fault), (abi::STATUS_HUNG, 0));
    assert_eq!(rig.context_status(0), abi::STATUS_HUNG);
}

#[test]
fn waits_that_never_end_are_ended() {
    for (number, command) in [semaphore_wait(VA, 1), fence_wait(1, 1 << 40)]
        .into_iter()
        .enumerate()
    {
        let mut rig = watched(3, 1);
        let also = rig.submit(1, 0, &[increments(VA + 8 * PAGE_SIZE, 1)]);
        rig.fault();
        let sequence = rig.submit(0, 0, &[nop(), timestamp(VA + PAGE_SIZE), command, nop()]);
        // Another context is served meanwhile, and afterwards.
        assert_eq!(rig.run_on(2, 1, &[increments(VA, 10)]).status, OK);
        let done = rig.finish(sequence);
        assert_eq!(
            (done.status, done.executed, done.fault_va),
            (abi::STATUS_HUNG, 2, 0)
        );
        let waited = Duration::from_nanos(done.time - rig.load(0));
        assert!(waited >= LIMIT, "case {number}: ended after {waited:?}");
        // The rest of the context goes with it, and only that.
        assert_eq!(rig.finish(also).status, abi::STATUS_CONTEXT_ERROR);
        expect_hung(&mut rig, 0, sequence);
        assert_eq!(rig.run_on(2, 1, &[increments(VA, 10)]).status, OK);
        assert_eq!(rig.context_status(1), OK);
        assert_eq!((rig.statistic("hangs"), rig.statistic("context_errors")), (1, 1));
        assert!(rig.log.is_empty());
        assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
        assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
    }
}

#[test]
fn a_ring_that_waits_long_looks_less_often() {
    let mut rig = watched(1, 1);
    let sequence = rig.submit(0, 0, &[semaphore_wait(VA, 1)]);
    assert_eq!(rig.finish(sequence).status, abi::STATUS_HUNG);
    // Every half millisecond in the end; every few microseconds it would be thousands.
    let slices = rig.statistic("slices");
    assert!(slices < 400, "it has looked {slices} times in {LIMIT:?}");
}

#[test]
fn work_that_takes_too_long_is_ended() {
    let mut rig = watched(2, 1);
    let sequence = rig.submit(0, 0, &[increments(VA, 5), increments(VA, u32::MAX)]);
    let others = rig.submit(1, 1, &[increments(VA, 2000)]);
    assert_eq!(rig.finish(others).status, OK);
    let done = rig.finish(sequence);
    assert_eq!(
        (done.status, done.executed, done.fault_va),
        (abi::STATUS_HUNG, 1, 0)
    );
    // What was done is said exactly.
    assert_eq!(rig.vram_load(0), done.repeats + 5);
    expect_hung(&mut rig, 0, sequence);
    assert_eq!(rig.vram_load(PAGE_SIZE), 2000);
}

#[test]
fn a_stall_on_a_fault_may_take_any_time() {
    let mut rig = watched(2, 2);
    let stalled = rig.submit(0, 1, &[increments(VA + 8 * PAGE_SIZE, 1)]);
    let fault = rig.fault();
    // Another context hangs meanwhile, twice: that is how long it takes.
    for _ in 0..2 {
        let done = rig.run_on(1, 0, &[semaphore_wait(VA, 1)]);
        assert_eq!(done.status, abi::STATUS_HUNG);
        expect_hung(&mut rig, 1, done.sequence);
        assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    }
    rig.map(1, VA + 8 * PAGE_SIZE, &[ALL | abi::PTE_VRAM | (9 * PAGE_SIZE)]);
    assert_eq!(rig.replay(1, fault.fault), Ok(1));
    assert_eq!(rig.finish(stalled).status, OK);
    assert_eq!(rig.context_status(1), OK);
}

#[test]
fn the_time_of_a_pause_does_not_count() {
    let mut rig = watched(2, 2);
    let semaphore = rig.submit(0, 0, &[semaphore_wait(VA, 1)]);
    rig.until_activity(0, Activity::Waiting);
    // Ring 1 has to be in the middle of something, too.
    let running = rig.submit(1, 1, &[increments(VA, 20_000)]);
    rig.gpu.pause();
    // It is time itself that has to pass.
    std::thread::sleep(2 * LIMIT);
    rig.vram_write(0, &1_u64.to_le_bytes());
    rig.gpu.resume();
    assert_eq!(rig.finish(semaphore).status, OK);
    assert_eq!(rig.finish(running).status, OK);
}

#[test]
fn many_short_submissions_are_no_long_one() {
    let mut rig = watched(1, 1);
    let begin = Instant::now();
    let mut count = 0;
    until("more work than the limit allows in one submission", || {
        assert_eq!(rig.run(0, &[increments(VA, 1000)]).status, OK);
        count += 1000;
        begin.elapsed() > 2 * LIMIT
    });
    assert_eq!(rig.vram_load(0), count);
}
