// SPDX-License-Identifier: Apache-2.0 OR MIT

//! CHASE: linked lists.

use super::*;

/// Where the value and the pointer are in a node.
const VALUE: u32 = 16;
const NEXT: u32 = 8;
/// Where results go, and the page behind it.
const RESULT: u64 = VA + 40 * PAGE_SIZE;

fn chase(head: u64, most: u32) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_CHASE,
        repeat: most,
        address: head,
        source: RESULT,
        stride: VALUE,
        span: NEXT,
        ..Default::default()
    }
}

/// A device with context 0: 32 scattered system pages at [`VA`], eight pages of VRAM behind them, and a page for results.
fn rig_with_pages() -> Rig {
    let mut rig = Rig::new(1);
    rig.create(0);
    for page in 0..32 {
        let va = VA + page * PAGE_SIZE;
        rig.map(0, va, &[READ | scattered(va)]);
    }
    for page in 32..40 {
        rig.map(
            0,
            VA + page * PAGE_SIZE,
            &[READ | abi::PTE_VRAM | (page * PAGE_SIZE)],
        );
    }
    rig.map(0, RESULT, &[RW | scattered(RESULT)]);
    rig
}

/// Stores a number where the device will see it at `va`.
fn put(rig: &Rig, va: u64, number: u64) {
    if (va - VA) / PAGE_SIZE < 32 {
        rig.store(scattered(va & !0xfff) + (va & 0xfff), number);
    } else {
        rig.vram_write(va - VA, &number.to_le_bytes());
    }
}

fn node(rig: &Rig, va: u64, value: u64, next: u64) {
    put(rig, va + u64::from(VALUE), value);
    put(rig, va + u64::from(NEXT), next);
}

/// Pointer, sum, and nodes visited.
fn result(rig: &Rig) -> (u64, u64, u64) {
    let at = scattered(RESULT);
    (rig.load(at), rig.load(at + 8), rig.load(at + 16))
}

#[test]
fn lists_are_followed_over_pages_and_memories() {
    let mut rig = rig_with_pages();
    // Ends of pages, so that a value lies on another page than its pointer.
    let place = |index: u64| VA + (index * 11 % 38 + 1) * PAGE_SIZE - 8 * (1 + index % 3);
    for index in 0..38 {
        let next = if index < 37 { place(index + 1) } else { 0 };
        node(&rig, place(index), 1 << index, next);
    }
    let done = rig.run(0, &[chase(place(0), 1000)]);
    assert_eq!((done.status, done.executed), (OK, 1), "{done:x?}");
    assert_eq!(result(&rig), (0, (1 << 38) - 1, 38));
    // No more nodes than asked for: the pointer is that of the next.
    assert_eq!(rig.run(0, &[chase(place(5), 3)]).status, OK);
    assert_eq!(result(&rig), (place(8), 0b1110_0000, 3));
}

#[test]
fn no_list_at_all_has_no_nodes() {
    let mut rig = rig_with_pages();
    rig.write(scattered(RESULT), &[0xff; 32]);
    assert_eq!(rig.run(0, &[chase(0, 7)]).status, OK);
    assert_eq!(result(&rig), (0, 0, 0));
    assert_eq!(rig.load(scattered(RESULT) + 24), u64::MAX);
}

#[test]
fn cycles_end_at_the_limit_and_sums_wrap() {
    let mut rig = rig_with_pages();
    let (a, b) = (VA + 64, VA + 33 * PAGE_SIZE);
    node(&rig, a, u64::MAX, b);
    node(&rig, b, 3, a);
    assert_eq!(rig.run(0, &[chase(a, 10_001)]).status, OK);
    assert_eq!(result(&rig), (b, 5000 * 3 - 5001, 10_001));
    node(&rig, a, 1, a);
    assert_eq!(rig.run(0, &[chase(a, 1)]).status, OK);
    assert_eq!(result(&rig), (a, 1, 1));
}

#[test]
fn nodes_that_are_missing_fault_one_after_the_other() {
    let mut rig = rig_with_pages();
    let place = |index: u64| VA + index * 3 * PAGE_SIZE + 128;
    for index in 0..10 {
        node(
            &rig,
            place(index),
            index,
            if index < 9 { place(index + 1) } else { 0 },
        );
    }
    rig.clear(0);
    rig.submit(0, 0, &[chase(place(0), 100)]);
    let mut pages = Vec::new();
    let done = rig.one_page_at_a_time(0, |page| {
        pages.push((page - VA) / PAGE_SIZE);
        RW | scattered(page)
    });
    assert_eq!(done.status, OK);
    // Each page is loaded from once for the value and once for the pointer, and once they are there both get through.
    assert_eq!(
        pages.len(),
        pages.iter().collect::<std::collections::HashSet<_>>().len()
    );
    assert_eq!(result(&rig), (0, 45, 10));
}

#[test]
fn a_node_and_a_result_across_a_border_need_only_one_page_at_a_time() {
    let mut rig = rig_with_pages();
    let place = VA + PAGE_SIZE - u64::from(VALUE);
    node(&rig, place, 7, place + 3 * PAGE_SIZE);
    node(&rig, place + 3 * PAGE_SIZE, 8, 0);
    for shift in [8, 16] {
        rig.clear(0);
        let command = abi::Command {
            source: VA + 20 * PAGE_SIZE - shift,
            ..chase(place, 100)
        };
        rig.submit(0, 0, &[command]);
        let done = rig.one_page_at_a_time(0, |page| RW | scattered(page));
        assert_eq!(done.status, OK);
        let found: Vec<u64> = (0..3)
            .map(|index| {
                let va = command.source + 8 * index;
                rig.load(scattered(va & !0xfff) + (va & 0xfff))
            })
            .collect();
        assert_eq!(found, [0, 15, 2]);
    }
}

#[test]
fn pointers_that_are_none_can_be_cancelled_or_mended() {
    let value = u64::from(VALUE);
    for (bad, at) in [
        (VA + 4, VA + 4 + value),
        (VA_END - value, VA_END),
        (VA_END, VA_END + value),
        (u64::MAX - 7, u64::MAX),
        (1, 1 + value),
    ] {
        let mut rig = rig_with_pages();
        let first = VA + 64;
        node(&rig, first, 5, bad);
        let sequence = rig.submit(0, 0, &[nop(), chase(first, 9), nop()]);
        let fault = rig.fault();
        assert_eq!(
            (fault.reason, fault.access),
            (abi::REASON_BAD_ADDRESS, abi::ACCESS_READ)
        );
        assert_eq!((fault.va, fault.sequence), (at, sequence), "{bad:x}");
        // A REPLAY alone does not help.
        assert_eq!(rig.replay(0, fault.fault), Ok(0));
        let again = rig.fault();
        assert_eq!((again.reason, again.va), (abi::REASON_BAD_ADDRESS, at));
        assert_ne!(again.fault, fault.fault);
        assert_eq!(rig.cancel(0, again.fault), OK);
        let done = rig.finish(sequence);
        assert_eq!((done.status, done.fault_va), (abi::STATUS_FAULT_CANCELLED, at));
        assert_eq!((done.executed, done.repeats), (1, 1), "one node was visited");
        assert_eq!(result(&rig), (0, 0, 0));
    }
    // The head itself.
    let mut rig = rig_with_pages();
    let sequence = rig.submit(0, 0, &[chase(u64::MAX, 1)]);
    let fault = rig.fault();
    assert_eq!(fault.reason, abi::REASON_BAD_ADDRESS);
    assert_eq!(rig.cancel(0, fault.fault), OK);
    assert_eq!(rig.finish(sequence).repeats, 0);
}

#[test]
fn a_list_can_lead_where_nobody_may_go() {
    let mut rig = rig_with_pages();
    let (first, second) = (VA + 64, VA + 50 * PAGE_SIZE);
    node(&rig, first, 5, second);
    rig.map(0, second, &[READ | MEMORY]);
    let done = rig.run(0, &[chase(first, 9)]);
    assert_eq!(
        (done.status, done.fault_va, done.repeats),
        (abi::STATUS_BUS_ERROR, second + u64::from(VALUE), 1)
    );
    assert_eq!(rig.event().kind, abi::EVENT_CONTEXT_ERROR);
}

#[test]
fn lists_need_read_and_results_write() {
    let mut rig = rig_with_pages();
    rig.clear(0);
    rig.map(0, VA, &[abi::PTE_VALID | abi::PTE_WRITE]);
    rig.map(0, RESULT, &[READ | scattered(RESULT)]);
    let sequence = rig.submit(0, 0, &[chase(VA, 9)]);
    let fault = rig.fault();
    assert_eq!((fault.reason, fault.access), (abi::REASON_READ, abi::ACCESS_READ));
    rig.map(0, VA, &[READ]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    let fault = rig.fault();
    assert_eq!((fault.reason, fault.va), (abi::REASON_WRITE, RESULT));
    assert_eq!(fault.length, 24, "all of the result is stored");
    rig.map(0, RESULT, &[RW | scattered(RESULT)]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.finish(sequence).status, OK);
}
