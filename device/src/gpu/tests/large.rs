// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages of 2 MiB.

use super::*;

const LARGE: u64 = LARGE_PAGE_SIZE;
/// One byte more than the device moves at once, and not a multiple of anything.
const ODD: u64 = (64 << 10) + 1;

/// What is in `QUERY_ENTRY` for a large page.
const IS_LARGE: u64 = 1 << 63;

fn pattern(length: u64, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    (0..length).map(|_| random.below(256) as u8).collect()
}

fn entry(rig: &mut Rig, va: u64) -> u64 {
    rig.query(abi::QUERY_ENTRY, 0, 0, va)
}

#[test]
fn commands_work_on_them() {
    let mut rig = Rig::new(1);
    rig.create(0);
    // Two that follow each other in virtual memory only, and one of VRAM.
    let vram = ALL | abi::PTE_VRAM;
    rig.map_large(0, VA, &[ALL | (2 * LARGE), ALL | LARGE, vram | LARGE]);
    let near_end = LARGE - ODD / 2;
    let data = pattern(ODD, 3);
    rig.write(2 * LARGE + near_end, &data[..(LARGE - near_end) as usize]);
    rig.write(LARGE, &data[(LARGE - near_end) as usize..]);
    // Across the border of two, to VRAM and back, to other offsets.
    let done = rig.run(
        0,
        &[
            copy(VA + 2 * LARGE + 777, VA + near_end, ODD),
            copy(VA + 99, VA + 2 * LARGE + 777, ODD),
            fill(VA + LARGE - 4096, 8192, 4, 0x0102_0304),
            increments(VA + LARGE - 8, 3),
            abi::Command {
                stride: LARGE as u32,
                ..increments(VA + 512, 3)
            },
        ],
    );
    assert_eq!((done.status, done.executed), (OK, 5));
    assert_eq!(rig.bytes(2 * LARGE + 99, ODD as usize)[2000..], data[2000..]);
    assert_eq!(rig.load(3 * LARGE - 8), 0x0102_0304_0102_0304 + 3);
    assert_eq!(rig.load(LARGE + 4088), 0x0102_0304_0102_0304);
    let before = u64::from_le_bytes(data[413..421].try_into().unwrap());
    assert_eq!(rig.load(2 * LARGE + 512), before + 1);
    assert_eq!(entry(&mut rig, VA + 5), IS_LARGE | ALL | (2 * LARGE));
    assert_eq!(entry(&mut rig, VA + 3 * LARGE - 1), IS_LARGE | vram | LARGE);
    assert_eq!(entry(&mut rig, VA + 3 * LARGE), 0);
}

#[test]
fn overlapping_copies_inside_one() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map_large(0, VA, &[RW | LARGE]);
    let length = 300_000_u64;
    for (source, destination) in [(1000, 1001), (1001, 1000), (0, 70_000), (70_000, 3), (5000, 5000)] {
        let mut model = pattern(length + 80_000, source + 1);
        rig.write(LARGE, &model);
        assert_eq!(
            rig.run(0, &[copy(VA + destination, VA + source, length)]).status,
            OK
        );
        model.copy_within(source as usize..(source + length) as usize, destination as usize);
        assert!(
            rig.bytes(LARGE, model.len()) == model,
            "{source} to {destination}"
        );
    }
}

#[test]
fn sizes_mix() {
    let mut rig = Rig::new(1);
    rig.create(0);
    // Small pages, a large one, small ones again: one range to the engines.
    for page in 0..4 {
        let small = |number: u64| RW | (number * PAGE_SIZE);
        rig.map(0, VA + LARGE - (4 - page) * PAGE_SIZE, &[small(3 + 7 * page)]);
        rig.map(0, VA + 2 * LARGE + page * PAGE_SIZE, &[small(5 + 7 * page)]);
    }
    rig.map_large(0, VA + LARGE, &[RW | LARGE]);
    rig.map_large(0, VA + 8 * LARGE, &[RW | (4 * LARGE), RW | (5 * LARGE)]);
    let length = LARGE + 6 * PAGE_SIZE + 1234;
    let begin = VA + LARGE - 3 * PAGE_SIZE - 567;
    let data = pattern(length, 9);
    rig.write(4 * LARGE + 11, &data);
    rig.submit(
        0,
        0,
        &[
            copy(begin, VA + 8 * LARGE + 11, length),
            fill(VA + 8 * LARGE, 2 * LARGE, 8, 0),
            copy(VA + 8 * LARGE + 22, begin, length),
        ],
    );
    assert_eq!(rig.completion().status, OK);
    assert!(rig.bytes(4 * LARGE + 22, data.len()) == data);
    assert_eq!(rig.bytes(4 * LARGE, 22), [0; 22]);
    // The last of the small pages before, as the CPU sees it.
    let offset = 2 * PAGE_SIZE + 567;
    assert_eq!(
        rig.bytes((3 + 21) * PAGE_SIZE, 4096),
        data[offset as usize..][..4096]
    );
}

#[test]
fn one_that_is_partly_invalidated_goes_whole() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map_large(0, VA, &[ALL | LARGE, ALL | (2 * LARGE)]);
    assert_eq!(
        rig.run(0, &[increments(VA, 1), increments(VA + LARGE, 1)]).status,
        OK
    );
    rig.invalidate(0, VA + 9 * PAGE_SIZE, PAGE_SIZE, abi::INVALIDATE_CLEAR);
    assert_eq!(entry(&mut rig, VA), 0);
    assert_eq!(entry(&mut rig, VA + LARGE), IS_LARGE | ALL | (2 * LARGE));
    // Its other parts fault again; its neighbour does not.
    assert_eq!(rig.run(0, &[increments(VA + LARGE, 1)]).status, OK);
    rig.submit(0, 0, &[increments(VA + 100 * PAGE_SIZE, 1)]);
    let fault = rig.fault();
    assert_eq!(
        (fault.va, fault.reason),
        (VA + 100 * PAGE_SIZE, abi::REASON_NOT_PRESENT)
    );
    rig.map_large(0, VA, &[ALL | (3 * LARGE)]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.completion().status, OK);
    assert_eq!(rig.load(3 * LARGE + 100 * PAGE_SIZE), 1);
    // An INVALIDATE of a part without CLEAR makes what is remembered of all of it go.
    rig.map_large(0, VA, &[ALL | (4 * LARGE)]);
    rig.invalidate(0, VA + LARGE - PAGE_SIZE, PAGE_SIZE, 0);
    assert_eq!(rig.run(0, &[increments(VA, 1)]).status, OK);
    assert_eq!((rig.load(3 * LARGE), rig.load(4 * LARGE)), (0, 1));
}

#[test]
fn one_size_replaces_the_other() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let small = |number: u64| ALL | (number * PAGE_SIZE);
    rig.map(0, VA, &[small(1), small(2), small(3)]);
    let touch = |rig: &mut Rig| rig.run(0, &[increments(VA + PAGE_SIZE, 1)]).status;
    assert_eq!(touch(&mut rig), OK);
    assert_eq!(rig.load(2 * PAGE_SIZE), 1);
    // A large one in place of small ones.
    rig.map_large(0, VA, &[ALL | LARGE]);
    rig.invalidate(0, VA, LARGE, 0);
    assert_eq!(touch(&mut rig), OK);
    assert_eq!((rig.load(2 * PAGE_SIZE), rig.load(LARGE + PAGE_SIZE)), (1, 1));
    // A large one in place of a large one.
    rig.map_large(0, VA, &[ALL | (2 * LARGE)]);
    rig.invalidate(0, VA, LARGE, 0);
    assert_eq!(touch(&mut rig), OK);
    assert_eq!(
        (rig.load(LARGE + PAGE_SIZE), rig.load(2 * LARGE + PAGE_SIZE)),
        (1, 1)
    );
    // A small one in place of a large one, the rest of which goes.
    rig.map(0, VA + PAGE_SIZE, &[small(3)]);
    rig.invalidate(0, VA, LARGE, 0);
    assert_eq!(touch(&mut rig), OK);
    assert_eq!((rig.load(2 * LARGE + PAGE_SIZE), rig.load(3 * PAGE_SIZE)), (1, 1));
    let entries: Vec<u64> = (0..4)
        .map(|page| entry(&mut rig, VA + page * PAGE_SIZE))
        .collect();
    assert_eq!(entries, [0, small(3), 0, 0]);
    // Even by one that is not valid.
    rig.map_large(0, VA, &[ALL | LARGE]);
    rig.map(0, VA + 7 * PAGE_SIZE, &[0]);
    assert_eq!(entry(&mut rig, VA), 0);
    rig.map(0, VA, &[small(1)]);
    rig.map_large(0, VA, &[0]);
    assert_eq!(entry(&mut rig, VA), 0);
}

#[test]
fn what_is_malformed_is_refused() {
    let mut rig = Rig::new(1);
    rig.create(0);
    for (va, entries, flags, status) in [
        (VA + PAGE_SIZE, vec![0], abi::MAP_LARGE, abi::STATUS_INVALID),
        (VA, vec![RW | PAGE_SIZE], abi::MAP_LARGE, abi::STATUS_INVALID),
        (
            VA,
            vec![RW | LARGE, RW | (LARGE / 2)],
            abi::MAP_LARGE,
            abi::STATUS_INVALID,
        ),
        (
            VA_END - LARGE,
            vec![RW; 2],
            abi::MAP_LARGE,
            abi::STATUS_BAD_ADDRESS,
        ),
        (VA, vec![RW], 2, abi::STATUS_INVALID),
        (VA, vec![RW | (1 << 6)], 0, abi::STATUS_INVALID),
        (VA, vec![RW | (1 << 63)], 0, abi::STATUS_INVALID),
    ] {
        assert_eq!(rig.try_map(0, va, &entries, flags), status, "{va:x} {entries:x?}");
        assert_eq!(entry(&mut rig, VA), 0, "nothing was changed");
    }
    // Whatever is not valid means nothing.
    rig.map_large(0, VA, &[u64::MAX - 1]);
    rig.map_large(0, VA_END - LARGE, &[RW]);
    assert_eq!(entry(&mut rig, VA_END - 1), IS_LARGE | RW);
}

#[test]
fn memory_may_end_inside_one() {
    let mut rig = Rig::build(
        Settings {
            vram: 3 << 20,
            ..settings(1, 1)
        },
        &[],
    );
    rig.create(0);
    rig.map_large(0, VA, &[RW | abi::PTE_VRAM, RW | abi::PTE_VRAM | LARGE]);
    // As far as there is memory, it can be used.
    let end = 3 << 20;
    assert_eq!(rig.run(0, &[fill(VA, end, 8, 7)]).status, OK);
    assert_eq!(rig.vram_load(end - 8), 7);
    assert_eq!(rig.run(0, &[copy(VA + 4096, VA, end - 4096)]).status, OK);
    let done = rig.run(0, &[copy(VA + 1, VA, end)]);
    assert_eq!(done.status, abi::STATUS_BUS_ERROR);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    let done = rig.run(0, &[copy(VA + end - 100_000, VA, 100_001)]);
    assert_eq!((done.status, done.fault_va), (abi::STATUS_BUS_ERROR, VA + end));
}

#[test]
fn hints_reach_beyond_them() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map_large(0, VA, &[RW]);
    let sequence = rig.submit(0, 0, &[copy(VA + LARGE, VA, LARGE)]);
    let fault = rig.fault();
    assert_eq!((fault.va, fault.length), (VA + LARGE, LARGE));
    rig.map_large(0, VA + LARGE, &[RW | LARGE]);
    assert_eq!(rig.replay(0, fault.fault), Ok(1));
    assert_eq!(rig.finish(sequence).status, OK);
    assert_eq!(rig.statistic("faults"), 1);
}

#[test]
fn what_is_lost_in_one_is_a_small_page() {
    let mut rig = Rig::with(1, &["ecc-poison:after=0,every=1,count=1"]);
    rig.create(0);
    let vram = RW | abi::PTE_VRAM;
    rig.map_large(0, VA, &[vram, vram | LARGE]);
    let lost = VA + 3 * PAGE_SIZE;
    let sequence = rig.submit(0, 0, &[fill(lost + 64, 8, 8, 1)]);
    let fault = rig.fault();
    assert_eq!((fault.reason, fault.va), (abi::REASON_POISONED, lost + 64));
    // Whatever is around it is well: a copy gets that far, and no further.
    assert_eq!(rig.cancel(0, fault.fault), OK);
    assert_eq!(rig.finish(sequence).status, abi::STATUS_FAULT_CANCELLED);
    rig.event();
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    let around = [
        fill(VA, 3 * PAGE_SIZE, 8, 7),
        fill(lost + PAGE_SIZE, PAGE_SIZE, 8, 8),
    ];
    assert_eq!(rig.run(0, &around).status, OK);
    for (command, va, access) in [
        (copy(VA + LARGE, VA, 16 * PAGE_SIZE), lost, abi::ACCESS_READ),
        (copy(VA, VA + LARGE, 16 * PAGE_SIZE), lost, abi::ACCESS_WRITE),
    ] {
        let sequence = rig.submit(0, 0, &[command]);
        let fault = rig.fault();
        assert_eq!((fault.reason, fault.va), (abi::REASON_POISONED, va));
        assert_eq!(fault.access, access);
        assert_eq!(rig.cancel(0, fault.fault), OK);
        assert_eq!(rig.finish(sequence).status, abi::STATUS_FAULT_CANCELLED);
        rig.event();
        assert_eq!(rig.simple(abi::REQUEST_CONTEXT_RESET, 0), OK);
    }
    assert_eq!(rig.vram_load(LARGE + 3 * PAGE_SIZE - 8), 7);
    assert_eq!(rig.vram_load(LARGE + 3 * PAGE_SIZE), 0);
}
