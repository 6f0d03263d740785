// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Access counters.

use super::*;

const REGION: u64 = LARGE_PAGE_SIZE;
const BOTH: u32 = abi::COUNT_SYSTEM | abi::COUNT_VRAM;

impl Rig {
    fn count(&mut self, context: u32, va: u64, regions: u64, threshold: u64, targets: u32) -> u32 {
        let request = abi::CountRequest {
            header: head(abi::REQUEST_COUNT, 0, context),
            va,
            length: regions * REGION,
            threshold,
            targets,
            reserved: 0,
        };
        self.control(request.as_bytes())
    }

    fn counted(&mut self, va: u64) -> u64 {
        self.query(abi::QUERY_COUNT, 0, 0, va)
    }
}

/// Context 0 with two regions: the first in system memory, the second in VRAM.
fn rig_with_regions() -> Rig {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.map_large(0, VA, &[ALL]);
    rig.map(
        0,
        VA + REGION,
        &[ALL | abi::PTE_VRAM, ALL | abi::PTE_VRAM | PAGE_SIZE],
    );
    rig
}

#[test]
fn operations_count_one_each_and_other_accesses_page_by_page() {
    let mut rig = rig_with_regions();
    assert_eq!(rig.count(0, VA, 2, u64::MAX, BOTH), OK);
    assert_eq!(
        rig.run(0, &[increments(VA, 1000), increments(VA + REGION, 10)])
            .status,
        OK
    );
    assert_eq!((rig.counted(VA), rig.counted(VA + REGION + 5)), (1000, 10));
    // Two pages of VRAM, stored to once each.
    assert_eq!(rig.run(0, &[fill(VA + REGION, 2 * PAGE_SIZE, 8, 0)]).status, OK);
    assert_eq!(rig.counted(VA + REGION), 12);
    let loads = [copy(VA + 64, VA, 8), semaphore_wait(VA, 1000), timestamp(VA)];
    assert_eq!(rig.run(0, &loads).status, OK);
    assert_eq!(rig.counted(VA), 1004);
    assert!(rig.log.is_empty());
}

#[test]
fn only_what_was_asked_for_is_counted() {
    let mut rig = rig_with_regions();
    rig.create(1);
    rig.map_large(1, VA, &[ALL]);
    assert_eq!(rig.count(0, VA, 2, u64::MAX, abi::COUNT_VRAM), OK);
    let work = [increments(VA, 7), increments(VA + REGION, 7)];
    assert_eq!(rig.run(0, &work).status, OK);
    assert_eq!((rig.counted(VA), rig.counted(VA + REGION)), (0, 7));
    assert_eq!(rig.count(0, VA, 2, u64::MAX, abi::COUNT_SYSTEM), OK);
    assert_eq!(rig.run(0, &work).status, OK);
    assert_eq!((rig.counted(VA), rig.counted(VA + REGION)), (7, 0));
    // The same addresses of another context are other places.
    assert_eq!(rig.run(1, &[increments(VA, 5)]).status, OK);
    assert_eq!(rig.query(abi::QUERY_COUNT, 1, 0, VA), 0);
    assert_eq!(rig.counted(VA), 7);
    // And nothing is counted any more when that is asked for.
    assert_eq!(rig.count(0, VA, 1, 0, 0), OK);
    assert_eq!(rig.run(0, &work).status, OK);
    assert_eq!((rig.counted(VA), rig.counted(VA + REGION)), (0, 0));
}

#[test]
fn many_regions_are_told_apart() {
    const REGIONS: u64 = 200;
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map_large(0, VA, &[ALL | abi::PTE_VRAM; REGIONS as usize]);
    assert_eq!(rig.count(0, VA, REGIONS, u64::MAX, BOTH), OK);
    let command = abi::Command {
        stride: REGION as u32,
        span: REGIONS as u32,
        ..increments(VA, 10 * REGIONS as u32)
    };
    assert_eq!(rig.run(0, &[command]).status, OK);
    let counts: Vec<u64> = (0..REGIONS).map(|n| rig.counted(VA + n * REGION)).collect();
    assert_eq!(counts, [10; REGIONS as usize]);
}

#[test]
fn a_threshold_is_told_once_until_it_is_set_again() {
    let mut rig = rig_with_regions();
    for targets in [abi::COUNT_SYSTEM, BOTH] {
        assert_eq!(rig.count(0, VA, 2, 100, targets), OK);
        assert_eq!(rig.run(0, &[increments(VA, 99)]).status, OK);
        assert!(rig.log.is_empty());
        let before = rig.statistic("access_counts");
        assert_eq!(rig.run_on(1, 0, &[increments(VA, 500)]).status, OK);
        let event = rig.event();
        assert_eq!((event.kind, event.ring), (abi::EVENT_ACCESS_COUNT, 1));
        assert_eq!((event.context, event.va), (0, VA));
        assert!((100..=599).contains(&event.length), "{event:?}");
        assert_eq!(rig.run(0, &[increments(VA, 500)]).status, OK);
        assert!(rig.log.is_empty());
        assert_eq!(rig.counted(VA), 1099, "it goes on counting");
        assert_eq!(rig.statistic("access_counts"), before + 1);
    }
    // The other region has one of its own.
    assert_eq!(rig.run(0, &[increments(VA + REGION, 100)]).status, OK);
    assert_eq!(rig.event().va, VA + REGION);
}

#[test]
fn a_driver_that_takes_no_events_cannot_make_them_pile_up() {
    let mut rig = rig_with_regions();
    for _ in 0..50 {
        assert_eq!(rig.count(0, VA, 1, 1, BOTH), OK);
        assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
    }
    assert_eq!(rig.log.len(), 1);
    // The one that is there is of the newest counter.
    assert_eq!(rig.count(0, VA, 1, 5, BOTH), OK);
    assert!(rig.log.is_empty(), "the counter that it was about has gone");
    assert_eq!(rig.run(0, &[increments(VA, 5)]).status, OK);
    assert_eq!(rig.event().length, 5);
}

#[test]
fn counters_are_limited_and_given_back() {
    let mut rig = Rig::new(1);
    let limit = u64::from(counters::MAX_COUNTERS);
    for context in 0..2 {
        rig.create(context);
    }
    assert_eq!(rig.count(0, 0, limit + 1, 1, BOTH), abi::STATUS_LIMIT);
    assert_eq!(rig.count(0, 0, limit, 1, BOTH), OK);
    assert_eq!(rig.count(1, 0, 1, 1, BOTH), abi::STATUS_LIMIT);
    assert_eq!(rig.count(0, 0, limit, 9, BOTH), OK);
    // Ended over the whole address space at once; gone with their context, and with the device.
    assert_eq!(rig.count(0, 0, VA_END / REGION, 0, 0), OK);
    assert_eq!(rig.count(1, 0, limit, 1, BOTH), OK);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 1), OK);
    assert_eq!(rig.count(0, 0, limit, 1, BOTH), OK);
    assert_eq!(rig.simple(abi::REQUEST_DEVICE_RESET, 0), OK);
    rig.create(1);
    assert_eq!(rig.count(1, 0, limit, 1, BOTH), OK);
    for (va, regions, threshold, targets, status) in [
        (PAGE_SIZE, 1, 1, BOTH, abi::STATUS_INVALID),
        (0, 1, 1, 4, abi::STATUS_INVALID),
        (0, 1, 0, BOTH, abi::STATUS_INVALID),
        (0, 1, 1, 0, abi::STATUS_INVALID),
        (VA_END, 1, 1, BOTH, abi::STATUS_BAD_ADDRESS),
    ] {
        assert_eq!(rig.count(1, va, regions, threshold, targets), status);
    }
    assert_eq!(rig.count(0, 0, 1, 1, BOTH), abi::STATUS_NO_CONTEXT);
}

#[test]
fn counters_and_what_they_had_to_say_survive_a_context_reset() {
    let mut rig = rig_with_regions();
    assert_eq!(rig.count(0, VA, 1, 10, BOTH), OK);
    assert_eq!(rig.run(0, &[increments(VA, 10)]).status, OK);
    assert_eq!(rig.log.len(), 1);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    assert_eq!(rig.counted(VA), 10);
    assert_eq!(rig.event().kind, abi::EVENT_ACCESS_COUNT);
}
