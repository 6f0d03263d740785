// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Rings and engines: who is served when.

use super::*;

/// Contexts with a VRAM page of their own each, at [`VA`].
fn with_pages(rig: &mut Rig, contexts: u32) {
    for context in 0..contexts {
        rig.create(context);
        rig.map(
            context,
            VA,
            &[ALL | abi::PTE_VRAM | (u64::from(context) * PAGE_SIZE)],
        );
    }
}

/// Where ring `ring` counts, if every context has a page of its own.
fn place(ring: u16) -> u64 {
    VA + 8 * u64::from(ring)
}

#[test]
fn rings_that_wait_keep_nobody_from_anything() {
    const RINGS: u16 = 7;
    let mut rig = Rig::build(settings(RINGS, 2), &[]);
    rig.create(0);
    rig.map(0, VA, &[RW]);
    let waits: Vec<u64> = (0..RINGS - 1)
        .map(|ring| rig.submit(ring, 0, &[semaphore_wait(place(ring), 1)]))
        .collect();
    for ring in 0..RINGS - 1 {
        rig.until_activity(ring, Activity::Waiting);
    }
    // Six wait at once, on two engines; the last ring runs nevertheless.
    assert_eq!(rig.run_on(RINGS - 1, 0, &[nop()]).status, OK);
    for ring in (0..RINGS - 1).rev() {
        rig.store(8 * u64::from(ring), 1);
        let done = rig.completion();
        assert_eq!(
            (done.sequence, done.status),
            (waits[usize::from(ring)], OK),
            "only what was waited for has happened"
        );
    }
}

#[test]
fn rings_that_are_busy_or_stalled_keep_nobody_from_anything() {
    let mut rig = Rig::build(settings(5, 1), &[]);
    with_pages(&mut rig, 2);
    for ring in 0..3 {
        rig.submit(ring, 0, &[increments(place(ring), u32::MAX)]);
    }
    rig.submit(3, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.fault();
    // Both of the busy context and of another one.
    assert_eq!(rig.run_on(4, 0, &[nop()]).status, OK);
    assert_eq!(rig.run_on(4, 1, &[increments(VA, 1000)]).status, OK);
    assert_eq!(rig.vram_load(PAGE_SIZE), 1000);
    let rings = rig.gpu.state().rings;
    let engines: Vec<u16> = rings.iter().map(|ring| ring.engine).collect();
    assert_eq!(engines, [0; 5]);
    // All three go on.
    for ring in 0..3 {
        let before = rig.vram_load(8 * ring);
        until("every busy ring to go on", || rig.vram_load(8 * ring) != before);
    }
}

#[test]
fn each_ring_is_in_order_however_many_there_are() {
    const RINGS: u16 = 16;
    const EACH: u64 = 20;
    for engines in [1, 3, 16] {
        let mut rig = Rig::build(settings(RINGS, engines), &[]);
        with_pages(&mut rig, 3);
        let mut random = Random(u64::from(engines) + 5);
        let mut submitted = vec![Vec::new(); RINGS.into()];
        for _ in 0..EACH {
            for ring in 0..RINGS {
                let context = random.below(3) as u32;
                let work = increments(place(ring), 1 + random.below(3000) as u32);
                submitted[usize::from(ring)].push(rig.submit(ring, context, &[work]));
            }
        }
        let mut completed = vec![Vec::new(); RINGS.into()];
        for _ in 0..EACH * u64::from(RINGS) {
            let (ring, _, done) = rig.completions.recv_timeout(PATIENCE).expect("a completion");
            assert_eq!(done.status, OK);
            completed[usize::from(ring)].push(done.sequence);
        }
        assert_eq!(submitted, completed, "with {engines} engines");
    }
}

/// Lets four rings of one engine count without end until they have counted for a while, the rings of each
/// context given by `contexts`. What each ring has counted meanwhile.
fn race(contexts: [u32; 4]) -> [u64; 4] {
    let mut rig = Rig::build(settings(4, 1), &[]);
    with_pages(&mut rig, 4);
    for (ring, context) in (0..).zip(contexts) {
        rig.submit(ring, context, &[increments(place(ring), u32::MAX)]);
    }
    let counts = |rig: &Rig| {
        let mut ring = 0;
        contexts.map(|context| {
            let count = rig.vram_load(u64::from(context) * PAGE_SIZE + 8 * ring);
            ring += 1;
            count
        })
    };
    until("all rings to begin", || {
        counts(&rig).iter().all(|&count| count > 0)
    });
    let before = counts(&rig);
    let slices = rig.statistic("slices");
    // Enough turns that one more or less does not count.
    until("the engine to take many turns", || {
        rig.statistic("slices") > slices + 800
    });
    let after = counts(&rig);
    let mut ring = 0;
    before.map(|before| {
        ring += 1;
        after[ring - 1] - before
    })
}

#[test]
fn a_context_with_many_rings_gets_no_more_than_one_with_one() {
    let [a, b, c, alone] = race([0, 0, 0, 1]);
    let share = alone as f64 / (a + b + c + alone) as f64;
    // By rings it would be a quarter.
    assert!((0.38..0.62).contains(&share), "{share} of the work was done");
}

#[test]
fn rings_of_one_context_take_turns() {
    let counts = race([0, 0, 0, 0]);
    let sum: u64 = counts.iter().sum();
    for count in counts {
        let share = count as f64 / sum as f64;
        assert!((0.15..0.35).contains(&share), "{counts:?}");
    }
}

#[test]
fn time_that_a_context_did_not_use_is_not_saved_up() {
    let mut rig = Rig::build(settings(2, 1), &[]);
    with_pages(&mut rig, 2);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    let slices = rig.statistic("slices");
    until("one context to work alone for long", || {
        rig.statistic("slices") > slices + 400
    });
    // The other comes late; the first goes on nevertheless.
    rig.submit(1, 1, &[increments(VA, u32::MAX)]);
    until("the other to begin", || rig.vram_load(PAGE_SIZE) > 0);
    let slices = rig.statistic("slices");
    let before = rig.vram_load(0);
    until("both to work", || rig.statistic("slices") > slices + 20);
    assert_ne!(
        rig.vram_load(0),
        before,
        "it has to make up for what it had before"
    );
}
