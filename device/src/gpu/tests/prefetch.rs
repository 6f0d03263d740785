// SPDX-License-Identifier: Apache-2.0 OR MIT

//! PREFETCH: hints, and nothing else.

use super::*;

#[test]
fn what_is_missing_is_said_from_the_first_page_to_the_last() {
    let mut rig = Rig::new(1);
    rig.create(0);
    // Pages 1, 2 and 5 are there, 5 for reading only.
    rig.map(0, VA + PAGE_SIZE, &[RW, RW, 0, 0, READ]);
    let read = abi::ACCESS_READ;
    let write = abi::ACCESS_WRITE;
    let page = |number: u64| VA + number * PAGE_SIZE;
    for (from, to, access, expect) in [
        (page(1), page(3), read, None),
        (page(1), page(3), write, None),
        (
            page(1),
            page(3),
            read | write | abi::ACCESS_ATOMIC,
            Some((page(1), page(3))),
        ),
        (page(0), page(6), read, Some((page(0), page(5)))),
        (page(1) + 5, page(4) + 5, read, Some((page(3), page(4) + 5))),
        (page(0) + 9, page(2), read, Some((page(0) + 9, page(1)))),
        (page(5), page(6), read, None),
        (page(5), page(6), write, Some((page(5), page(6)))),
        (page(1), page(6), write, Some((page(3), page(6)))),
        (page(3) + 1, page(3) + 2, read, Some((page(3) + 1, page(3) + 2))),
        (page(3), page(3), read, None),
    ] {
        let done = rig.run(0, &[nop(), prefetch(from, to - from, access), nop()]);
        assert_eq!((done.status, done.executed), (OK, 3));
        let event = rig.log.take();
        let found = event.map(|event| (event.va, event.va + event.length));
        assert_eq!(found, expect, "{from:x} to {to:x}, access {access}");
        if let Some(event) = event {
            assert_eq!((event.kind, event.context), (abi::EVENT_PREFETCH, 0));
            assert_eq!((event.sequence, event.access), (done.sequence, access));
            assert_eq!((event.fault, event.reason, event.status), (0, 0, 0));
        }
        assert!(rig.log.is_empty());
    }
    assert_eq!((rig.statistic("faults"), rig.statistic("prefetches")), (0, 7));
}

#[test]
fn nothing_at_all_and_everything_can_be_asked_for() {
    let mut rig = Rig::new(2);
    rig.create(0);
    // A gigabyte, of which nothing is there.
    let done = rig.run(0, &[prefetch(VA, abi::MAX_COMMAND_LENGTH, abi::ACCESS_READ)]);
    assert_eq!(done.status, OK);
    let event = rig.event();
    assert_eq!((event.va, event.length), (VA, abi::MAX_COMMAND_LENGTH));
    // Up to the end of the address space.
    let done = rig.run(0, &[prefetch(VA_END - 1, 1, abi::ACCESS_WRITE)]);
    assert_eq!(done.status, OK);
    assert_eq!(rig.event().va, VA_END - 1);
}

#[test]
fn leaves_no_trace() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[READ]);
    let ask = prefetch(VA, PAGE_SIZE, abi::ACCESS_READ);
    assert_eq!(rig.run(0, &[ask]).status, OK);
    assert!(rig.log.is_empty());
    // It looks at the page table, not at what is remembered of it.
    rig.map(0, VA, &[0]);
    assert_eq!(rig.run(0, &[ask]).status, OK);
    assert_eq!(rig.event().kind, abi::EVENT_PREFETCH);
}

#[test]
fn pages_that_are_lost_are_missing() {
    let mut rig = Rig::with(1, &["ecc-poison:after=0,every=1,count=1"]);
    rig.create(0);
    let vram = RW | abi::PTE_VRAM;
    rig.map(0, VA, &[vram | PAGE_SIZE, vram | abi::PTE_POISONED]);
    // The first access of all finds that the page is lost.
    rig.submit(0, 0, &[fill(VA, 8, 8, 1)]);
    let fault = rig.fault();
    assert_eq!(fault.reason, abi::REASON_POISONED);
    assert_eq!(rig.cancel(0, fault.fault), OK);
    assert_eq!(rig.completion().status, abi::STATUS_FAULT_CANCELLED);
    assert_eq!(rig.event().kind, abi::EVENT_CONTEXT_ERROR);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    for page in [VA, VA + PAGE_SIZE] {
        let done = rig.run(0, &[prefetch(page, PAGE_SIZE, abi::ACCESS_READ)]);
        assert_eq!(done.status, OK);
        let event = rig.log.take().expect("an event");
        assert_eq!((event.kind, event.va), (abi::EVENT_PREFETCH, page));
    }
}

#[test]
fn hints_are_bounded_and_push_nothing_out() {
    let mut rig = Rig::new(2);
    rig.create(0);
    let hints = vec![prefetch(VA, PAGE_SIZE, abi::ACCESS_READ); 1000];
    assert_eq!(rig.run(0, &hints).executed, 1000);
    assert_eq!(rig.log.len(), 256);
    assert_eq!(rig.log.dropped(), 744);
    // What must be said is said behind them.
    rig.submit(1, 0, &[increments(VA, 1)]);
    until("a fault behind the hints", || rig.log.len() == 257);
    let kinds: Vec<u16> = std::iter::from_fn(|| rig.log.take().map(|event| event.kind)).collect();
    assert!(kinds[..256].iter().all(|&kind| kind == abi::EVENT_PREFETCH));
    assert_eq!(kinds[256], abi::EVENT_FAULT);
    // There is room again.
    assert_eq!(rig.run(0, &hints[..1]).status, OK);
    assert_eq!(rig.log.len(), 1);
}
