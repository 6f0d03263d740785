// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Engines whose work is begun by whoever has rung: nothing is left behind, and the invalidation promise is kept there too.

use pinion_abi::{self as abi, PAGE_SIZE};
use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::sync::{Arc, thread};

use super::check::{DEADLOCK, finds, holds};
use super::rig::{ALL, CONTEXT, OK, Rig, VA, increments};

/// Two rings, each attended to by a thread of its own.
fn attended(rig: &Arc<Rig>, mapped: bool) {
    if mapped {
        rig.map(CONTEXT, VA, ALL);
    }
    let other = rig.clone();
    let second = thread::spawn(move || other.submit_attended(1, 2, &[increments(VA, 1, 1)]));
    rig.submit_attended(0, 1, &[increments(VA, 0, 1)]);
    if mapped {
        for sequence in [1, 2] {
            assert_eq!(rig.completion(sequence).status, OK);
        }
    } else {
        rig.repair(&[1, 2], |_| ALL, |_, _| ());
    }
    second.join().expect("a thread that ends");
}

#[test]
fn nothing_is_left_behind() {
    for engines in [1, 2] {
        let model = move || attended(&Rig::new(2, engines), true);
        holds(model);
    }
    let one = || attended(&Rig::new(2, 1), true);
    finds(Sabotage::LeavesUnsaid, &[DEADLOCK], one);
    holds(|| attended(&Rig::new(2, 1), false));
}

/// INVALIDATE with CLEAR while somebody attends to a ring: the page is the processor's until it is mapped again.
fn clear(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    let other = rig.clone();
    let second = thread::spawn(move || other.submit_attended(0, 1, &[increments(VA, 0, 2)]));
    rig.invalidate(VA, PAGE_SIZE, abi::INVALIDATE_CLEAR);
    rig.memory.revoke(0);
    rig.memory.increment(0, 0);
    rig.memory.grant(0);
    rig.repair(&[1], |_| ALL, |_, _| ());
    second.join().expect("a thread that ends");
    assert_eq!(rig.memory.load(0, 0), 3, "an increment was lost");
}

#[test]
fn the_promise_is_kept() {
    let model = || clear(&Rig::new(1, 1));
    holds(model);
    finds(Sabotage::SkipsEngine, &["taken away", "lost"], model);
}
