// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The statistics count what they say.

use super::*;

/// Does something, and checks by how much each counter grows; those that are not named stay. What an engine adds at
/// the end of a turn may come a little later.
fn counts(rig: &mut Rig, expected: &[(&str, u64)], action: impl FnOnce(&mut Rig)) {
    // These depend on how the engines take turns, and have tests of their own.
    let varies = |name: &str| name == "slices" || name.starts_with("tlb");
    let before = rig.gpu.statistics().list();
    action(rig);
    for (name, grown) in expected {
        let old = before
            .iter()
            .find(|(other, _)| other == name)
            .expect("a statistic")
            .1;
        until(&format!("{name} to grow by {grown}"), || {
            rig.statistic(name) >= old + grown
        });
    }
    for (name, old) in before {
        let grown = expected
            .iter()
            .find(|(other, _)| *other == name)
            .map_or(0, |(_, grown)| *grown);
        if !varies(name) {
            assert_eq!(rig.statistic(name) - old, grown, "{name}, when {expected:?}");
        }
    }
}

#[test]
fn requests_and_entries() {
    let mut rig = Rig::new(1);
    counts(&mut rig, &[("requests", 2)], |rig| {
        rig.create(0);
        rig.timeline(0);
    });
    counts(&mut rig, &[("requests", 2), ("entries_written", 4)], |rig| {
        rig.map(0, VA, &[ALL, 0, RW]);
        rig.map_large(0, VA + LARGE_PAGE_SIZE, &[RW]);
    });
    counts(&mut rig, &[("invalidations", 2)], |rig| {
        rig.clear(0);
        rig.invalidate(0, 0, 0, 0);
    });
    let refused = [
        ("requests", 4),
        ("requests_refused", 4),
        ("status_context_exists", 1),
        ("status_unsupported", 1),
        ("status_invalid", 1),
        ("status_no_fault", 1),
    ];
    counts(&mut rig, &refused, |rig| {
        rig.simple(abi::REQUEST_CONTEXT_CREATE, 0);
        rig.simple(99, 0);
        rig.try_map(0, VA + 1, &[RW], 0);
        rig.replay_begin(0, 77, 0).unwrap_err();
    });
    let refused = [
        ("invalidations", 1),
        ("requests_refused", 1),
        ("status_invalid", 1),
    ];
    counts(&mut rig, &refused, |rig| {
        rig.gpu.invalidate(&[]);
    });
    counts(&mut rig, &[("requests", 1), ("resets", 1)], |rig| {
        rig.simple(abi::REQUEST_DEVICE_RESET, 0);
    });
}

#[test]
fn submissions_commands_and_bytes() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL, ALL | abi::PTE_VRAM, ALL | PAGE_SIZE]);
    let (system, vram) = (VA, VA + PAGE_SIZE);
    let done = |commands| [("submissions", 1), ("commands", commands)];
    counts(&mut rig, &done(3), |rig| {
        rig.run(0, &[nop(), fence(1), fence_wait(0, 1)]);
    });
    let cases: &[(abi::Command, &[(&str, u64)])] = &[
        (
            copy(vram, system, 100),
            &[("bytes_copied", 100), ("bus_bytes", 100)],
        ),
        (copy(vram, vram + 200, 100), &[("bytes_copied", 100)]),
        (
            copy(system, VA + 2 * PAGE_SIZE, 50),
            &[("bytes_copied", 50), ("bus_bytes", 100)],
        ),
        (fill(system, 64, 8, 1), &[("bytes_filled", 64), ("bus_bytes", 64)]),
        (fill(vram, 64, 8, 1), &[("bytes_filled", 64)]),
        // A load and a store each.
        (
            increments(system, 10),
            &[("atomic_operations", 10), ("bus_bytes", 160)],
        ),
        (increments(vram, 10), &[("atomic_operations", 10)]),
        (
            abi::Command {
                operation: abi::ATOMIC_LOAD,
                operand: 0,
                width: 4,
                ..increments(system, 10)
            },
            &[("atomic_operations", 10), ("bus_bytes", 40)],
        ),
        (
            abi::Command {
                operation: abi::ATOMIC_STORE,
                ..increments(system, 10)
            },
            &[("atomic_operations", 10), ("bus_bytes", 80)],
        ),
        (timestamp(system), &[("bus_bytes", 8)]),
        (semaphore_signal(vram, 1), &[]),
        (semaphore_signal(system, 1), &[("bus_bytes", 8)]),
        (semaphore_wait(system, 1), &[("bus_bytes", 8)]),
    ];
    for (command, expected) in cases {
        let expected = [&done(1), *expected].concat();
        counts(&mut rig, &expected, |rig| {
            assert_eq!(rig.run(0, &[*command]).status, OK)
        });
    }
    let failed = [
        ("submissions", 2),
        ("submissions_failed", 2),
        ("status_invalid", 1),
        ("status_no_context", 1),
    ];
    counts(&mut rig, &failed, |rig| {
        rig.run(0, &[nop(), fence_wait(9, 9)]);
        rig.run(7, &[nop()]);
    });
}

#[test]
fn faults_and_how_they_end() {
    let mut rig = Rig::new(2);
    rig.create(0);
    counts(&mut rig, &[("faults", 1)], |rig| {
        rig.submit(0, 0, &[increments(VA, 1)]);
        rig.fault();
    });
    counts(&mut rig, &[("faults_joined", 1)], |rig| {
        rig.submit(1, 0, &[increments(VA + 8, 1)]);
        until("a second ring to join", || rig.statistic("faults_joined") > 0);
    });
    let replayed = [
        ("requests", 2),
        ("entries_written", 1),
        ("replays", 1),
        ("replays_through", 2),
        ("submissions", 2),
        ("commands", 2),
        ("atomic_operations", 2),
        ("bus_bytes", 32),
    ];
    counts(&mut rig, &replayed, |rig| {
        rig.map(0, VA, &[ALL]);
        rig.replay(0, 1).unwrap();
        rig.completion();
        rig.completion();
    });
    counts(
        &mut rig,
        &[("faults", 2), ("requests", 1), ("replays", 1)],
        |rig| {
            rig.submit(0, 0, &[nop(), increments(VA + PAGE_SIZE, 1)]);
            let fault = rig.fault();
            assert_eq!(rig.replay(0, fault.fault), Ok(0));
            rig.fault();
        },
    );
    let cancelled = [
        ("requests", 1),
        ("cancels", 1),
        ("context_errors", 1),
        ("submissions", 1),
        ("submissions_failed", 1),
        ("status_fault_cancelled", 1),
        ("commands", 1),
    ];
    counts(&mut rig, &cancelled, |rig| {
        rig.cancel(0, 3);
        rig.completion();
    });
}

#[test]
fn translations() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let pages = 700;
    rig.map(0, VA, &[RW; 512]);
    rig.map(0, VA + 512 * PAGE_SIZE, &[RW; 512]);
    let tlb = |rig: &Rig| ["tlb_hits", "tlb_misses", "tlb_evictions"].map(|name| rig.statistic(name));
    let until_counted = |rig: &Rig, expected: [u64; 3]| {
        until(&format!("hits, misses and evictions to be {expected:?}"), || {
            tlb(rig) == expected
        });
    };
    // One translation, for as many commands as there are.
    assert_eq!(rig.run(0, &[fill(VA, 8, 8, 1); 100]).status, OK);
    until_counted(&rig, [99, 1, 0]);
    rig.invalidate(0, VA, PAGE_SIZE, 0);
    assert_eq!(rig.run(0, &[fill(VA, 8, 8, 1); 100]).status, OK);
    until_counted(&rig, [198, 2, 0]);
    // What is not remembered is looked up; what does not fit is forgotten.
    assert_eq!(rig.run(0, &[fill(VA, pages * PAGE_SIZE, 8, 1)]).status, OK);
    let room = tlb::Tlb::CAPACITY as u64;
    until_counted(&rig, [199, 1 + pages, pages - room]);
}
