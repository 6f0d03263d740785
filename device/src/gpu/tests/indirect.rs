// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Submissions whose commands are in memory.

use super::*;

/// Commands begin this far into the first page, so that the eighth lies across the border of two.
const OFFSET: u64 = PAGE_SIZE - 7 * 64 - 32;
const AT: u64 = VA + 16 * PAGE_SIZE + OFFSET;

/// Sixteen commands: number `i` adds `1 << i` to the number at [`VA`].
fn additions() -> Vec<abi::Command> {
    (0..16)
        .map(|i| abi::Command {
            operand: 1 << i,
            ..increments(VA, 1)
        })
        .collect()
}

/// A device with one page of data at [`VA`], at system address zero.
fn rig_with_data() -> Rig {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig
}

#[test]
fn commands_come_from_system_memory_and_from_vram() {
    let mut rig = rig_with_data();
    let bytes = additions().as_bytes().to_vec();
    rig.write(PAGE_SIZE + OFFSET, &bytes);
    rig.vram_write(5 * PAGE_SIZE + OFFSET, &bytes);
    for entries in [
        [READ | PAGE_SIZE, READ | (2 * PAGE_SIZE)],
        [
            READ | abi::PTE_VRAM | (5 * PAGE_SIZE),
            READ | abi::PTE_VRAM | (6 * PAGE_SIZE),
        ],
    ] {
        rig.store(0, 0);
        rig.clear(0);
        rig.map(0, VA, &[ALL]);
        rig.map(0, AT & !0xfff, &entries);
        let sequence = rig.submit_indirect(0, 0, AT, 16);
        let done = rig.finish(sequence);
        assert_eq!((done.status, done.executed, done.sequence), (OK, 16, sequence));
        assert_eq!(rig.load(0), 0xffff);
        // A part of them.
        let sequence = rig.submit_indirect(0, 0, AT + 8 * 64, 2);
        assert_eq!(rig.finish(sequence).executed, 2);
        assert_eq!(rig.load(0), 0xffff + 0x300);
    }
}

#[test]
fn the_largest_batch_fits() {
    let mut rig = rig_with_data();
    let count = command::MAX_BATCH as usize;
    rig.vram_write(LARGE_PAGE_SIZE, vec![increments(VA, 1); count].as_bytes());
    rig.map_large(
        0,
        VA + 2 * LARGE_PAGE_SIZE,
        &[READ | abi::PTE_VRAM | LARGE_PAGE_SIZE],
    );
    let sequence = rig.submit_indirect(0, 0, VA + 2 * LARGE_PAGE_SIZE, count);
    assert_eq!(rig.finish(sequence).executed as usize, count);
    assert_eq!(rig.load(0), count as u64);
    let sequence = rig.submit_indirect(0, 0, VA, count + 1);
    assert_eq!(rig.finish(sequence).status, abi::STATUS_INVALID);
}

#[test]
fn loading_stalls_like_any_other_access() {
    let mut rig = rig_with_data();
    rig.write(PAGE_SIZE + OFFSET, additions().as_bytes());
    let sequence = rig.submit_indirect(0, 0, AT, 16);
    let fault = rig.fault();
    assert_eq!(
        (fault.va, fault.access, fault.reason),
        (AT, abi::ACCESS_READ, abi::REASON_NOT_PRESENT)
    );
    assert_eq!((fault.length, fault.sequence, fault.context), (1024, sequence, 0));
    // Nothing has been executed yet, and others go on.
    assert_eq!(rig.run_on(1, 0, &[nop()]).status, OK);
    rig.map(0, AT & !0xfff, &[READ | PAGE_SIZE]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    let fault = rig.fault();
    let second = AT + PAGE_SIZE - OFFSET;
    assert_eq!(
        (fault.va, fault.length),
        (second, 1024 - (PAGE_SIZE - OFFSET)),
        "{fault:?}"
    );
    assert_eq!(rig.load(0), 0, "all are loaded before the first is run");
    // The first page may go: what was loaded is not loaded again.
    rig.invalidate(0, AT & !0xfff, PAGE_SIZE, abi::INVALIDATE_CLEAR);
    rig.map(0, second, &[abi::PTE_VALID | abi::PTE_WRITE | (2 * PAGE_SIZE)]);
    assert_eq!(rig.replay(0, fault.fault), Ok(0));
    let fault = rig.fault();
    assert_eq!((fault.va, fault.reason), (second, abi::REASON_READ));
    rig.map(0, second, &[RW | (2 * PAGE_SIZE)]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.finish(sequence).status, OK);
    assert_eq!(rig.load(0), 0xffff);
}

#[test]
fn loading_can_be_given_up() {
    let mut rig = rig_with_data();
    rig.write(PAGE_SIZE + OFFSET, additions().as_bytes());
    rig.map(0, AT & !0xfff, &[READ | PAGE_SIZE]);
    let sequence = rig.submit_indirect(0, 0, AT, 16);
    let fault = rig.fault();
    assert_eq!(rig.cancel(0, fault.fault), OK);
    let done = rig.finish(sequence);
    assert_eq!(
        (done.status, done.executed, done.fault_va),
        (abi::STATUS_FAULT_CANCELLED, 0, (AT & !0xfff) + PAGE_SIZE)
    );
    assert_eq!(rig.load(0), 0);
    // And it can lead to where there is no memory.
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    rig.map(0, (AT & !0xfff) + PAGE_SIZE, &[READ | MEMORY]);
    let sequence = rig.submit_indirect(0, 0, AT, 16);
    let done = rig.finish(sequence);
    assert_eq!(
        (done.status, done.fault_va),
        (abi::STATUS_BUS_ERROR, (AT & !0xfff) + PAGE_SIZE)
    );
    assert_eq!((done.executed, rig.load(0)), (0, 0));
}

#[test]
fn what_is_stored_after_loading_has_no_effect() {
    let mut rig = rig_with_data();
    rig.write(PAGE_SIZE + OFFSET, additions().as_bytes());
    rig.map(0, AT & !0xfff, &[READ | PAGE_SIZE]);
    let sequence = rig.submit_indirect(0, 0, AT, 16);
    let fault = rig.fault();
    // The first seven and a half have been loaded; a CPU stores something else, malformed, over them.
    rig.write(PAGE_SIZE + OFFSET, &[0xff; 7 * 64]);
    rig.map(0, fault.va, &[RW | (2 * PAGE_SIZE)]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.finish(sequence).status, OK);
    assert_eq!(rig.load(0), 0xffff);
    // Commands that store over those behind them.
    rig.store(0, 0);
    let mut commands = additions();
    commands[0] = fill(AT, 1024, 1, 0xee);
    rig.write(PAGE_SIZE + OFFSET, commands.as_bytes());
    rig.map(0, AT & !0xfff, &[RW | PAGE_SIZE]);
    let sequence = rig.submit_indirect(0, 0, AT, 16);
    assert_eq!(rig.finish(sequence).status, OK);
    assert_eq!(rig.load(0), 0xfffe);
    assert_eq!(rig.bytes(PAGE_SIZE + OFFSET, 1024), [0xee; 1024]);
}

#[test]
fn malformed_commands_in_memory_are_refused_as_a_whole() {
    let mut rig = rig_with_data();
    rig.map(0, AT & !0xfff, &[READ | PAGE_SIZE, READ | (2 * PAGE_SIZE)]);
    for (bad, status) in [
        (abi::Command { opcode: 200, ..nop() }, abi::STATUS_UNSUPPORTED),
        (abi::Command { reserved: 1, ..nop() }, abi::STATUS_INVALID),
        (copy(VA_END - 1, 0, 2), abi::STATUS_BAD_ADDRESS),
        (fence_wait(2, 0), abi::STATUS_INVALID),
    ] {
        let mut commands = additions();
        commands[15] = bad;
        rig.write(PAGE_SIZE + OFFSET, commands.as_bytes());
        let sequence = rig.submit_indirect(0, 0, AT, 16);
        let done = rig.finish(sequence);
        assert_eq!(
            (done.status, done.executed, done.fault_va),
            (status, 0, 0),
            "{bad:?}"
        );
        assert_eq!(rig.load(0), 0);
        // Nobody is in error.
        assert_eq!(rig.context_status(0), OK);
        let sequence = rig.submit_indirect(0, 0, AT, 15);
        assert_eq!(rig.finish(sequence).status, OK);
        rig.store(0, 0);
    }
}

#[test]
fn places_that_no_commands_can_be_at() {
    let mut rig = rig_with_data();
    for (va, count, status) in [
        (AT + 4, 1, abi::STATUS_INVALID),
        (VA_END - 64, 2, abi::STATUS_BAD_ADDRESS),
        (VA_END, 1, abi::STATUS_BAD_ADDRESS),
        (!7, 1, abi::STATUS_BAD_ADDRESS),
        (AT, 0, abi::STATUS_INVALID),
    ] {
        let sequence = rig.submit_indirect(0, 0, va, count);
        let done = rig.finish(sequence);
        assert_eq!((done.status, done.executed), (status, 0), "{va:x}");
    }
    // Commands behind the header as well as in memory.
    rig.tickets += 1;
    let header = submission(0, 1, rig.tickets, abi::SUBMIT_INDIRECT);
    let place = abi::Indirect { va: VA };
    let bytes = [header.as_bytes(), place.as_bytes(), nop().as_bytes()].concat();
    rig.submit_bytes(0, rig.tickets, bytes);
    assert_eq!(rig.finish(rig.tickets).status, abi::STATUS_INVALID);
    assert_eq!(rig.context_status(0), OK);
}

#[test]
fn work_that_is_loading_ends_with_its_context() {
    for (opcode, status) in [
        (abi::REQUEST_CONTEXT_DESTROY, abi::STATUS_NO_CONTEXT),
        (abi::REQUEST_CONTEXT_RESET, abi::STATUS_RESET),
        (abi::REQUEST_DEVICE_RESET, abi::STATUS_RESET),
    ] {
        let mut rig = rig_with_data();
        let sequence = rig.submit_indirect(0, 0, AT, 16);
        rig.fault();
        assert_eq!(rig.simple(opcode, 0), OK);
        let done = rig.finish(sequence);
        assert_eq!((done.status, done.executed), (status, 0));
    }
}
