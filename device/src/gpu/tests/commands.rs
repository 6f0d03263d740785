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

/// Has two rings do the same `command` at `va`, at the same time.
fn both_increment(rig: &mut Rig, va: u64, command: impl Fn(u64) -> abi::Command) {
    let sequences = [0, 1].map(|ring| rig.submit(ring, 0, &[command(va)]));
    for sequence in sequences {
        assert_eq!(rig.finish(sequence).status, OK);
    }
}

#[test]
fn rings_do_not_lose_each_others_updates() {
    const ROUNDS: u64 = 8;
    const COUNT: u32 = 200_000;
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.map(0, VA, &[ALL | abi::PTE_VRAM, ALL]);
    for round in 1..=ROUNDS {
        for va in [VA, VA + PAGE_SIZE] {
            both_increment(&mut rig, va, |va| increments(va, COUNT));
        }
        let expected = round * 2 * u64::from(COUNT);
        assert_eq!(rig.vram_load(0), expected);
        assert_eq!(rig.load(0), expected, "an update of system memory was lost");
    }
    // Over several lines, of either width, each with what it finds written back elsewhere.
    let spread = |va| abi::Command {
        width: 4,
        stride: 36,
        span: 64,
        flags: abi::COMMAND_WRITE_BACK,
        source: va + 3072,
        ..increments(va, 64 * 2000)
    };
    rig.write(0, &[0; 4096]);
    both_increment(&mut rig, VA + PAGE_SIZE, spread);
    for place in 0..64 {
        let bytes = rig.bytes(36 * place, 4);
        assert_eq!(bytes, 4000_u32.to_le_bytes(), "place {place}");
    }
}

#[test]
fn what_a_processor_stores_meanwhile_is_lost() {
    const COUNT: u32 = 400_000;
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    let memory = rig.memory.clone();
    let (mut gpu, mut cpu) = (0, 0);
    let start = Instant::now();
    while rig.load(0) == gpu + cpu {
        assert!(
            start.elapsed() < PATIENCE,
            "no update was lost in {gpu} unprotected ones"
        );
        let before = rig.load(0);
        let sequence = rig.submit(0, 0, &[increments(VA, COUNT)]);
        let slice = memory.slice(0, 8).unwrap();
        let place = slice.get_atomic_ref::<AtomicU64>(0).unwrap();
        // Until it is over, so that the two are there at the same time.
        while !rig.has_completion() {
            place.fetch_add(1, Ordering::SeqCst);
            cpu += 1;
        }
        assert_eq!(rig.finish(sequence).status, OK);
        gpu += u64::from(COUNT);
        assert!(rig.load(0) >= before);
    }
}

/// An INVALIDATE waits for operations of other engines, but not until the bus is done with them.
#[test]
fn invalidate_does_not_wait_for_turns_on_a_slow_bus() {
    const LATENCY: Duration = Duration::from_secs(2);
    const RINGS: u16 = 4;
    let slow = Settings {
        latency: LATENCY,
        ..settings(RINGS, RINGS)
    };
    let mut rig = Rig::build(slow, &[]);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    for ring in 0..RINGS {
        rig.submit(ring, 0, &[increments(VA, u32::MAX)]);
    }
    until("all rings to come forward", || rig.load(0) > u64::from(RINGS));
    for round in 0..20 {
        let start = Instant::now();
        rig.invalidate(0, VA, PAGE_SIZE, 0);
        let took = start.elapsed();
        assert!(took < LATENCY, "round {round}: INVALIDATE took {took:?}");
    }
}

#[test]
fn loads_and_stores_need_one_right_each() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let valid = abi::PTE_VALID;
    let load = abi::Command {
        operation: abi::ATOMIC_LOAD,
        operand: 0,
        flags: abi::COMMAND_WRITE_BACK,
        source: VA + PAGE_SIZE,
        ..increments(VA, 1)
    };
    let store = abi::Command {
        operation: abi::ATOMIC_STORE,
        operand: 77,
        ..load
    };
    for target in [0, abi::PTE_VRAM] {
        for (command, right, access, reason) in [
            (load, abi::PTE_READ, abi::ACCESS_READ, abi::REASON_READ),
            (store, abi::PTE_WRITE, abi::ACCESS_WRITE, abi::REASON_WRITE),
        ] {
            rig.clear(0);
            rig.store(PAGE_SIZE, 5);
            let others = (READ | abi::PTE_WRITE | abi::PTE_ATOMIC) & !right;
            rig.map(0, VA, &[others | target, RW | PAGE_SIZE]);
            let sequence = rig.submit(0, 0, &[command]);
            let fault = rig.fault();
            assert_eq!((fault.access, fault.reason), (access, reason));
            rig.clear(0);
            rig.map(0, VA, &[valid | right | target, RW | PAGE_SIZE]);
            assert_eq!(rig.replay(0, fault.fault), Ok(1));
            assert_eq!(rig.finish(sequence).status, OK);
        }
        // A STORE does not look at what was there.
        assert_eq!(rig.load(PAGE_SIZE), 0);
    }
    assert_eq!((rig.load(0), rig.vram_load(0)), (77, 77));
    // A LOAD does.
    rig.clear(0);
    rig.map(0, VA, &[READ, RW | PAGE_SIZE]);
    assert_eq!(rig.run(0, &[load]).status, OK);
    assert_eq!((rig.load(0), rig.load(PAGE_SIZE)), (77, 77));
}

/// `repeat` additions to numbers of four bytes in three pages in turn, with all that they find written over several pages.
fn additions_that_tell_all(repeat: u32) -> abi::Command {
    abi::Command {
        width: 4,
        operand: 3,
        flags: abi::COMMAND_WRITE_BACK | abi::COMMAND_WRITE_BACK_ALL,
        stride: PAGE_SIZE as u32,
        span: 3,
        source: VA + 11 * PAGE_SIZE - 8,
        ..increments(VA + 16, repeat)
    }
}

/// What the operations of [`additions_that_tell_all`] have found, and where the numbers got to.
fn expect_all_told(rig: &Rig, command: &abi::Command, repeat: u32) {
    for index in 0..repeat {
        let va = command.source + 4 * u64::from(index);
        let found = rig.bytes(scattered(va & !0xfff) + (va & 0xfff), 4);
        let expected = index / 3 * 3;
        assert_eq!(found, expected.to_le_bytes(), "operation {index}");
    }
    let sums: u32 = (0..3)
        .map(|page| rig.load(scattered(VA + page * PAGE_SIZE) + 16) as u32)
        .sum();
    assert_eq!(sums, 3 * repeat);
}

#[test]
fn all_that_is_found_is_written_back_once_whatever_faults() {
    let repeat = 100;
    let command = additions_that_tell_all(repeat);
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.submit(0, 0, &[command]);
    let done = rig.one_page_at_a_time(0, |page| ALL | scattered(page));
    assert_eq!((done.status, done.executed), (OK, 1));
    expect_all_told(&rig, &command, repeat);

    // The same while pages come and go at any moment, and many more times.
    let repeat = 3000;
    let command = additions_that_tell_all(repeat);
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.submit(0, 0, &[command]);
    let mut random = Random(11);
    let done = rig.drive(
        0,
        |page| ALL | scattered(page),
        |rig| {
            let page = random.below(16);
            rig.invalidate(0, VA + page * PAGE_SIZE, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        },
    );
    assert_eq!(done.status, OK);
    expect_all_told(&rig, &command, repeat);
}

#[test]
fn what_was_done_is_said_exactly_when_a_write_back_is_given_up() {
    let mut rig = Rig::new(1);
    rig.create(0);
    for page in 0..3 {
        rig.map(
            0,
            VA + page * PAGE_SIZE,
            &[ALL | scattered(VA + page * PAGE_SIZE)],
        );
    }
    let command = additions_that_tell_all(50);
    let first = VA + 10 * PAGE_SIZE;
    rig.map(0, first, &[RW | scattered(first)]);
    let sequence = rig.submit(0, 0, &[nop(), command]);
    // The first two results fit on the page.
    let fault = rig.fault();
    assert_eq!((fault.va, fault.access), (VA + 11 * PAGE_SIZE, abi::ACCESS_WRITE));
    assert_eq!(fault.length, 4 * 48, "the rest of the results");
    assert_eq!(rig.cancel(0, fault.fault), OK);
    let done = rig.finish(sequence);
    assert_eq!(
        (done.executed, done.repeats),
        (1, 3),
        "one more was done than told of"
    );
    assert_eq!(done.fault_va, VA + 11 * PAGE_SIZE);
    let numbers = [0, 1, 2].map(|page| rig.load(scattered(VA + page * PAGE_SIZE) + 16));
    assert_eq!(numbers, [3, 3, 3]);
}

#[test]
fn bad_pages_end_a_command_where_they_begin() {
    // Where memory ends.
    let nowhere = VA + PAGE_SIZE;
    for (command, at) in [
        (fill(VA + 8, 8192, 8, 1), nowhere),
        (copy(nowhere + 5, VA, 10), nowhere + 5),
        (copy(VA, nowhere + 5, 10), nowhere + 5),
        (increments(nowhere + 64, 3), nowhere + 64),
        (semaphore_wait(nowhere + 8, 0), nowhere + 8),
        (semaphore_signal(nowhere + 8, 0), nowhere + 8),
        (timestamp(nowhere + 16), nowhere + 16),
        (fence_to(0, nowhere + 24), nowhere + 24),
    ] {
        for target in [0, abi::PTE_VRAM] {
            let mut rig = Rig::new(1);
            rig.create(0);
            rig.map(0, VA, &[ALL, ALL | target | MEMORY]);
            let done = rig.run(0, &[nop(), command]);
            assert_eq!(
                (done.status, done.executed, done.fault_va),
                (abi::STATUS_BUS_ERROR, 1, at),
                "{command:?}"
            );
            let event = rig.event();
            assert_eq!((event.kind, event.va), (abi::EVENT_CONTEXT_ERROR, at));
            assert_eq!(event.status, abi::STATUS_BUS_ERROR);
            assert_eq!(rig.context_status(0), abi::STATUS_BUS_ERROR);
        }
    }
}
