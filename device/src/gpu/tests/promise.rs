// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The invalidation promise.

use super::*;

/// Engines hammer a page that is taken from them again and again, and get another one. Whether each
/// time, once INVALIDATE had completed, nothing changed in either any more.
fn promise_is_kept(inject: &[&str]) -> bool {
    const RINGS: u16 = 2;
    const TURNS: u32 = 100;
    let mut rig = Rig::with(RINGS, inject);
    rig.create(0);
    for ring in 0..RINGS {
        rig.submit(ring, 0, &[increments(VA + 8 * u64::from(ring), u32::MAX)]);
    }
    let moves = |rig: &Rig| {
        [0, 8, PAGE_SIZE, PAGE_SIZE + 8]
            .iter()
            .fold(0, |sum: u64, &place| sum.wrapping_add(rig.load(place)))
    };
    let start = Instant::now();
    for turn in 0..TURNS {
        let before = moves(&rig);
        rig.map(0, VA, &[ALL | (u64::from(turn & 1) * PAGE_SIZE)]);
        while moves(&rig) == before {
            while let Some(record) = rig.log.take() {
                rig.replay(0, record.fault).unwrap();
            }
            // An event, or a moment for the engines.
            let _ = rig.events.recv_timeout(Duration::from_millis(1));
            assert!(
                start.elapsed() < PATIENCE,
                "waited {PATIENCE:?} for {TURNS} turns, saw {turn}"
            );
        }
        rig.invalidate(0, VA, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        let taken = moves(&rig);
        // Look for a while, and out of the engines' way: on a busy machine they get no processor as long
        // as this thread keeps its own.
        for _ in 0..200 {
            if moves(&rig) != taken {
                return false;
            }
        }
        for _ in 0..3 {
            std::thread::sleep(Duration::from_micros(300));
            if moves(&rig) != taken {
                return false;
            }
        }
    }
    true
}

#[test]
fn the_invalidation_promise_is_kept() {
    assert!(promise_is_kept(&[]));
}

#[test]
fn the_test_of_the_promise_can_fail() {
    assert!(!promise_is_kept(&["stale-tlb"]));
}

#[test]
fn invalidations_and_engines_do_not_starve_each_other() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    let start = Instant::now();
    while rig.load(0) == 0 {
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for the engine to begin"
        );
    }
    // Without a pause between them. The gate is fair: an engine that has waited long enough to sleep is
    // handed it, and the invalidator waits for one chunk.
    let (mut invalidations, mut advanced) = (0, 0);
    let mut last = rig.load(0);
    while invalidations < 2000 || advanced < 100 {
        rig.invalidate(0, VA, PAGE_SIZE, 0);
        invalidations += 1;
        let now = rig.load(0);
        advanced += u32::from(now != last);
        last = now;
        assert!(
            start.elapsed() < PATIENCE,
            "in {PATIENCE:?}, {invalidations} invalidations and {advanced} advances of the engine"
        );
    }
}
