// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Commands, each by itself.

use super::*;

#[test]
fn commands_do_what_they_say() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL, ALL | PAGE_SIZE, ALL | abi::PTE_VRAM]);
    let fill = abi::Command {
        opcode: abi::COMMAND_FILL,
        width: 4,
        address: VA + 4092,
        length: 12,
        operand: 0xdead_beef,
        ..Default::default()
    };
    let exchange = abi::Command {
        operation: abi::ATOMIC_EXCHANGE,
        operand: 42,
        flags: abi::COMMAND_WRITE_BACK,
        source: VA + 16,
        ..increments(VA, 1)
    };
    let spread = abi::Command {
        width: 4,
        stride: 12,
        span: 3,
        ..increments(VA + 64, 7)
    };
    let done = rig.run(0, &[increments(VA, 5), exchange, fill, spread, nop()]);
    assert_eq!((done.status, done.executed), (OK, 5));
    assert_eq!((rig.load(0), rig.load(16)), (42, 5));
    assert_eq!(
        rig.bytes(4088, 20)[4..16],
        0xdead_beef_u32.to_le_bytes().repeat(3)
    );
    let counts: Vec<u8> = (0..4).map(|n| rig.bytes(64 + 12 * n, 1)[0]).collect();
    assert_eq!(counts, [3, 2, 2, 0]);
    // Through VRAM and back.
    let done = rig.run(
        0,
        &[
            copy(VA + 2 * PAGE_SIZE + 1, VA, 8),
            copy(VA + 200, VA + 2 * PAGE_SIZE + 1, 8),
        ],
    );
    assert_eq!(done.status, OK);
    assert_eq!(rig.load(200), 42);
    // Nothing at all is fine too.
    assert_eq!(rig.run(0, &[copy(5, 7, 0)]).status, OK);
}

#[test]
fn rights_are_checked_one_by_one() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let valid = abi::PTE_VALID;
    let cases = [
        (copy(VA + 8, VA, 8), 0, abi::REASON_NOT_PRESENT, abi::ACCESS_READ),
        (
            copy(VA + 8, VA, 8),
            valid | abi::PTE_WRITE,
            abi::REASON_READ,
            abi::ACCESS_READ,
        ),
        (
            copy(VA + 8, VA, 8),
            valid | abi::PTE_READ,
            abi::REASON_WRITE,
            abi::ACCESS_WRITE,
        ),
        (increments(VA, 1), RW, abi::REASON_ATOMIC, 7),
        (
            increments(VA, 1),
            valid | abi::PTE_ATOMIC | abi::PTE_READ,
            abi::REASON_WRITE,
            7,
        ),
        (increments(VA, 1), valid | abi::PTE_ATOMIC, abi::REASON_READ, 7),
    ];
    for (command, entry, reason, access) in cases {
        rig.invalidate(0, 0, VA_END, abi::INVALIDATE_CLEAR);
        rig.map(0, VA, &[entry]);
        rig.submit(0, 0, &[command]);
        let fault = rig.event();
        assert_eq!((fault.reason, fault.access), (reason, access), "{command:?}");
        // More rights where there were some need no invalidation.
        rig.map(0, VA, &[ALL]);
        assert_eq!(rig.replay(0, fault.fault), Ok(1));
        assert_eq!(rig.completion().status, OK);
    }
}

#[test]
fn copies_are_as_if_read_before_the_first_store() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let mut random = Random(1);
    let pages = 24;
    let size = pages * PAGE_SIZE;
    for round in 0..150 {
        let mut model: Vec<u8> = (0..size).map(|_| random.below(256) as u8).collect();
        for page in 0..pages {
            let from = (page * PAGE_SIZE) as usize;
            rig.write(
                scattered(VA + page * PAGE_SIZE),
                &model[from..from + PAGE_SIZE as usize],
            );
        }
        let length =
            [random.below(100), random.below(9000), random.below(size / 2)][random.below(3) as usize];
        let source = random.below(size - length);
        let near = [1, 8, 4095, 4096, 4097][random.below(5) as usize];
        let destination = match random.below(3) {
            0 => (source + near).min(size - length),
            1 => source.saturating_sub(near),
            _ => random.below(size - length),
        };
        // All pages are taken away again and again, so every chunk is interrupted somewhere.
        rig.submit(0, 0, &[copy(VA + destination, VA + source, length)]);
        let meddle = |rig: &mut Rig| rig.invalidate(0, 0, VA_END, abi::INVALIDATE_CLEAR);
        let done = rig.drive(0, |page| RW | scattered(page), meddle);
        assert_eq!(done.status, OK);
        model.copy_within(source as usize..(source + length) as usize, destination as usize);
        for page in 0..pages {
            let from = (page * PAGE_SIZE) as usize;
            let found = rig.bytes(scattered(VA + page * PAGE_SIZE), PAGE_SIZE as usize);
            assert!(
                found == model[from..from + PAGE_SIZE as usize],
                "round {round}, page {page}: {length} bytes from {source} to {destination}"
            );
        }
    }
}

#[test]
fn interrupted_atomics_lose_nothing_and_do_nothing_twice() {
    let mut rig = Rig::new(1);
    rig.create(0);
    // Places in eight pages in turn, which come and go.
    let stride = PAGE_SIZE as u32 + 8;
    let command = abi::Command {
        stride,
        span: 8,
        flags: abi::COMMAND_WRITE_BACK,
        source: VA + 20 * PAGE_SIZE,
        ..increments(VA, 80_000)
    };
    rig.submit(0, 0, &[command]);
    let mut random = Random(7);
    let done = rig.drive(
        0,
        |page| ALL | scattered(page),
        |rig| {
            let page = random.below(21);
            rig.invalidate(0, VA + page * PAGE_SIZE, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        },
    );
    assert_eq!((done.status, done.executed), (OK, 1));
    for n in 0..8 {
        let va = VA + n * u64::from(stride);
        assert_eq!(
            rig.load(scattered(va & !0xfff) + (va & 0xfff)),
            10_000,
            "place {n}"
        );
    }
    assert_eq!(rig.load(scattered(VA + 20 * PAGE_SIZE)), 9_999);
}

#[test]
fn a_fill_that_is_interrupted() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let fill = abi::Command {
        opcode: abi::COMMAND_FILL,
        width: 8,
        address: VA + 8,
        length: 5 * PAGE_SIZE,
        operand: 0x0102_0304_0506_0708,
        ..Default::default()
    };
    rig.submit(0, 0, &[fill]);
    let meddle = |rig: &mut Rig| rig.invalidate(0, 0, VA_END, abi::INVALIDATE_CLEAR);
    assert_eq!(rig.drive(0, |page| RW | scattered(page), meddle).status, OK);
    for n in 0..=5 * PAGE_SIZE / 8 + 1 {
        let va = VA + 8 * n;
        let expect = if n == 0 || n == 5 * PAGE_SIZE / 8 + 1 {
            0
        } else {
            0x0102_0304_0506_0708
        };
        assert_eq!(rig.load(scattered(va & !0xfff) + (va & 0xfff)), expect, "{n}");
    }
}

#[test]
fn vram_has_atomics_and_system_memory_has_none() {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.map(0, VA, &[ALL | abi::PTE_VRAM, ALL]);
    let mut total = 0_u64;
    let start = Instant::now();
    loop {
        for place in [VA, VA + PAGE_SIZE] {
            rig.submit(0, 0, &[increments(place, 400_000)]);
            rig.submit(1, 0, &[increments(place, 400_000)]);
            assert_eq!(rig.completion().status, OK);
            assert_eq!(rig.completion().status, OK);
        }
        total += 800_000;
        let vram = rig.gpu.vram().slice(0, 8).unwrap().read_obj::<u64>(0).unwrap();
        assert_eq!(vram, total);
        if rig.load(0) < total {
            break;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "no update was lost in {total} unprotected ones"
        );
    }
}
