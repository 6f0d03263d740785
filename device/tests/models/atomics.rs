// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Atomic operations of several engines on system memory: the atomic unit.

use pinion_abi::{self as abi, PAGE_SIZE};
use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::sync::Arc;

use super::check::{DEADLOCK, finds, holds};
use super::rig::{ALL, CONTEXT, OK, Rig, VA, increments};

const LOST: &[&str] = &["was lost"];
/// Words from one line to the next.
const LINE: u64 = 8;

/// Two rings increment the same word, in a page that one of them knows by another address.
fn same_word(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    rig.map(CONTEXT, VA + PAGE_SIZE, ALL);
    rig.submit(0, 1, &[increments(VA, 0, 2)]);
    rig.submit(1, 2, &[increments(VA + PAGE_SIZE, 0, 2)]);
    for sequence in [1, 2] {
        assert_eq!(rig.completion(sequence).status, OK);
    }
    assert_eq!(rig.memory.load(0, 0), 4, "an increment was lost");
}

#[test]
fn engines_keep_each_others_updates() {
    let model = || same_word(&Rig::new(2, 2));
    holds(model);
    // One engine needs no unit.
    holds(|| same_word(&Rig::new(2, 1)));
    finds(Sabotage::SkipsAtomicUnit, LOST, model);
}

/// Two rings go over the same two lines, in turn, twice: so each is behind the other at some time.
fn two_lines(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    for ring in 0..2 {
        let command = abi::Command {
            stride: (LINE * 8) as u32,
            span: 2,
            ..increments(VA, 0, 4)
        };
        rig.submit(ring, u64::from(ring) + 1, &[command]);
    }
    for sequence in [1, 2] {
        assert_eq!(rig.completion(sequence).status, OK);
    }
    for word in [0, LINE] {
        assert_eq!(rig.memory.load(0, word as usize), 4, "an increment was lost");
    }
}

#[test]
fn turns_are_not_kept_for_the_next() {
    let model = || two_lines(&Rig::new(2, 2));
    holds(model);
    finds(Sabotage::KeepsTurn, &[DEADLOCK], model);
    finds(Sabotage::SkipsAtomicUnit, LOST, model);
}

/// The page is taken away in the middle, so that a ring stalls between two operations, and is counted on by the processor.
fn taken_away(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    rig.submit(0, 1, &[increments(VA, 0, 2)]);
    rig.submit(1, 2, &[increments(VA, 0, 2)]);
    rig.invalidate(VA, PAGE_SIZE, abi::INVALIDATE_CLEAR);
    rig.memory.revoke(0);
    rig.memory.increment(0, 0);
    rig.memory.grant(0);
    rig.repair(&[1, 2], |_| ALL, |_, _| ());
    for sequence in [1, 2] {
        assert_eq!(rig.completion(sequence).status, OK);
    }
    assert_eq!(rig.memory.load(0, 0), 5, "an increment was lost");
}

#[test]
fn no_turn_is_kept_over_a_fault() {
    let model = || taken_away(&Rig::new(2, 2));
    holds(model);
    finds(Sabotage::SkipsAtomicUnit, LOST, model);
}

/// What a ring signals is not undone by what another one adds.
fn signalled(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    let signal = abi::Command {
        opcode: abi::COMMAND_SEMAPHORE_SIGNAL,
        width: 8,
        address: VA,
        operand: 100,
        ..Default::default()
    };
    rig.submit(0, 1, &[increments(VA, 0, 2)]);
    rig.submit(1, 2, &[signal]);
    for sequence in [1, 2] {
        assert_eq!(rig.completion(sequence).status, OK);
    }
    let found = rig.memory.load(0, 0);
    assert!((100..=102).contains(&found), "the signal was lost: {found}");
}

#[test]
fn a_signal_is_not_lost() {
    let model = || signalled(&Rig::new(2, 2));
    holds(model);
    finds(Sabotage::SkipsAtomicUnit, LOST, model);
}
