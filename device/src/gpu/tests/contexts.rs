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
