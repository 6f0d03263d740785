// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the commands do, on all kinds of memory that a process has.

use std::cell::UnsafeCell;
use std::hint::black_box;

use pinion_client::{AtomicWord, Command, Operation};
use pinion_tests::{Failure, Mapping};

use crate::support::{PASSED, TestResult, ensure_eq, execute_ok, open, tests};

tests! {
    copy_between_heap_stack_and_globals
    copy_of_any_length_and_alignment
    copy_of_overlapping_memory
    copy_of_many_pages
    fill_of_every_width
    atomic_operations_of_64_bits
    atomic_operations_of_32_bits
    atomic_compare_exchange
    atomic_repeats_go_round
    a_batch_runs_in_order
}

/// Numbers that look random, the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Memory that is neither on the heap nor on the stack.
struct Global(UnsafeCell<[u8; 10_000]>);

// SAFETY: Each test runs in a process of its own and uses it from one thread.
unsafe impl Sync for Global {}

static GLOBAL: Global = Global(UnsafeCell::new([7; 10_000]));

fn copy_between_heap_stack_and_globals() -> TestResult {
    let gpu = open()?;
    let source = Numbers(1).bytes(10_000);
    let stack = UnsafeCell::new([0_u8; 10_000]);
    let heap: Box<UnsafeCell<[u8; 10_000]>> = Box::new(UnsafeCell::new([0; 10_000]));
    let (on_stack, global, on_heap) = (
        stack.get().cast::<u8>(),
        GLOBAL.0.get().cast::<u8>(),
        heap.get().cast::<u8>(),
    );
    execute_ok(
        &gpu,
        &[
            Command::copy(source.as_ptr(), on_stack, 10_000),
            Command::copy(on_stack, global, 10_000),
            Command::copy(global, on_heap, 10_000),
        ],
    )?;
    for (name, place) in [("stack", on_stack), ("global", global), ("heap", on_heap)] {
        // SAFETY: The array is there, and the GPU is done with it.
        let found = unsafe { std::slice::from_raw_parts(black_box(place), 10_000) };
        ensure_eq!(found == source, true, "{name} holds what was copied");
    }
    PASSED
}

fn copy_of_any_length_and_alignment() -> TestResult {
    let gpu = open()?;
    let source = Mapping::anonymous(4)?;
    source.write(0, &Numbers(2).bytes(source.len()));
    let target = Mapping::anonymous(4)?;
    // Short, and across one or two page boundaries.
    for length in [1, 2, 3, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 9000] {
        for (from, to) in [(0, 0), (1, 0), (0, 1), (3, 5), (4090, 4095), (2048, 1)] {
            target.write(0, &vec![0xee; target.len()]);
            execute_ok(&gpu, &[Command::copy(source.at(from), target.at(to), length)])?;
            let mut expected = vec![0xee; target.len()];
            expected[to..to + length].copy_from_slice(&source.read(from, length));
            let same = target.read(0, target.len()) == expected;
            ensure_eq!(
                same,
                true,
                "{length} bytes from {from} to {to} arrived, and nothing else"
            );
        }
    }
    PASSED
}

fn copy_of_overlapping_memory() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(4)?;
    for (from, to, length) in [
        (0, 1, 9000),
        (1, 0, 9000),
        (0, 4096, 8192),
        (4096, 0, 8192),
        (5, 5, 5000),
        (0, 7, 64),
    ] {
        let mut expected = Numbers(3).bytes(memory.len());
        memory.write(0, &expected);
        execute_ok(&gpu, &[Command::copy(memory.at(from), memory.at(to), length)])?;
        expected.copy_within(from..from + length, to);
        let same = memory.read(0, memory.len()) == expected;
        ensure_eq!(
            same,
            true,
            "{length} bytes from {from} to {to} arrived as they were"
        );
    }
    PASSED
}

fn copy_of_many_pages() -> TestResult {
    let gpu = open()?;
    let (source, target) = (Mapping::anonymous(300)?, Mapping::anonymous(300)?);
    let bytes = Numbers(4).bytes(source.len());
    source.write(0, &bytes);
    // The target has not been touched yet.
    execute_ok(
        &gpu,
        &[Command::copy(source.as_ptr(), target.as_ptr(), source.len())],
    )?;
    ensure_eq!(target.read(0, target.len()) == bytes, true, "all bytes arrived");
    PASSED
}

fn fill_of_every_width() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(3)?;
    let start = memory.at(4096 - 64);
    let check = |command: Command, pattern: &[u8], length: usize| -> Result<(), Failure> {
        memory.write(0, &vec![0x11; memory.len()]);
        execute_ok(&gpu, &[command])?;
        let mut expected = vec![0x11; memory.len()];
        for (index, byte) in expected[4096 - 64..][..length].iter_mut().enumerate() {
            *byte = pattern[index % pattern.len()];
        }
        ensure_eq!(
            memory.read(0, memory.len()) == expected,
            true,
            "{command:x?} did that and nothing else"
        );
        Ok(())
    };
    check(Command::fill(start, 777, 0xabu8), &[0xab], 777)?;
    check(
        Command::fill(start.cast(), 777, 0xabcdu16),
        &0xabcdu16.to_le_bytes(),
        777 * 2,
    )?;
    check(
        Command::fill(start.cast(), 777, 0x89ab_cdefu32),
        &0x89ab_cdefu32.to_le_bytes(),
        777 * 4,
    )?;
    check(
        Command::fill(start.cast(), 777, 0x0123_4567_89ab_cdefu64),
        &0x0123_4567_89ab_cdefu64.to_le_bytes(),
        777 * 8,
    )?;
    PASSED
}

/// What the atomic operations do.
macro_rules! model {
    ($name:ident, $unsigned:ty, $signed:ty) => {
        fn $name(operation: Operation, found: $unsigned, operand: $unsigned) -> $unsigned {
            match operation {
                Operation::Add => found.wrapping_add(operand),
                Operation::And => found & operand,
                Operation::Or => found | operand,
                Operation::Xor => found ^ operand,
                Operation::MinUnsigned => found.min(operand),
                Operation::MaxUnsigned => found.max(operand),
                Operation::MinSigned => (found as $signed).min(operand as $signed) as $unsigned,
                Operation::MaxSigned => (found as $signed).max(operand as $signed) as $unsigned,
                Operation::Exchange | Operation::Store => operand,
                Operation::Load => found,
            }
        }
    };
}

model!(model_64, u64, i64);
model!(model_32, u32, i32);

const OPERATIONS: [Operation; 9] = [
    Operation::Add,
    Operation::And,
    Operation::Or,
    Operation::Xor,
    Operation::MinUnsigned,
    Operation::MaxUnsigned,
    Operation::MinSigned,
    Operation::MaxSigned,
    Operation::Exchange,
];

/// Does all operations on interesting and on random numbers, and compares with `model`.
fn atomic_operations<T>(convert: fn(u64) -> T, model: fn(Operation, T, T) -> T) -> TestResult
where
    T: AtomicWord + PartialEq + std::fmt::LowerHex + std::fmt::Debug,
{
    let gpu = open()?;
    let memory = Mapping::anonymous(1)?;
    let old = Mapping::anonymous(1)?;
    let target = memory.at(64).cast::<T>();
    let mut numbers = Numbers(5);
    let mut interesting = vec![0, 1, u64::MAX, 1 << 31, 1 << 63, (1 << 31) - 1, (1 << 63) - 1];
    interesting.extend((0..4).map(|_| numbers.next()));
    for operation in OPERATIONS {
        for &found in &interesting {
            let (found, operand) = (
                convert(found),
                convert(interesting[numbers.next() as usize % interesting.len()]),
            );
            let untouched = numbers.bytes(4096);
            memory.write(0, &untouched);
            // SAFETY: It is in the mapping, aligned, and the GPU is idle.
            unsafe { target.write_volatile(found) };
            let command = Command::atomic(operation, target, operand).write_back(old.as_ptr().cast::<T>());
            execute_ok(&gpu, &[command])?;
            // SAFETY: As above.
            let result = unsafe { target.read_volatile() };
            ensure_eq!(
                result,
                model(operation, found, operand),
                "{operation:?} of {found:x} and {operand:x}"
            );
            // SAFETY: As above.
            let written = unsafe { old.as_ptr().cast::<T>().read_volatile() };
            ensure_eq!(written, found, "what {operation:?} found");
            let around = [
                memory.read(0, 64),
                memory.read(64 + size_of::<T>(), 4032 - size_of::<T>()),
            ]
            .concat();
            let expected = [&untouched[..64], &untouched[64 + size_of::<T>()..]].concat();
            ensure_eq!(around == expected, true, "{operation:?} left the rest alone");
        }
    }
    PASSED
}

fn atomic_operations_of_64_bits() -> TestResult {
    atomic_operations::<u64>(|number| number, model_64)
}

fn atomic_operations_of_32_bits() -> TestResult {
    atomic_operations::<u32>(|number| number as u32 ^ (number >> 32) as u32, model_32)
}

fn atomic_compare_exchange() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(1)?;
    let old = Mapping::anonymous(1)?;
    let number = memory.atomic(8);
    number.store(5, std::sync::atomic::Ordering::Relaxed);
    let exchange = |expected: u64, new: u64| {
        Command::compare_exchange(memory.at(8).cast::<u64>(), expected, new)
            .write_back(old.as_ptr().cast::<u64>())
    };
    for (expected, new, result, found) in [
        (4, 9, 5, 5),
        (5, 9, 9, 5),
        (5, 1, 9, 9),
        (9, u64::MAX, u64::MAX, 9),
    ] {
        execute_ok(&gpu, &[exchange(expected, new)])?;
        ensure_eq!(
            number.load(std::sync::atomic::Ordering::Relaxed),
            result,
            "exchange of {expected} for {new}"
        );
        ensure_eq!(
            old.atomic(0).load(std::sync::atomic::Ordering::Relaxed),
            found,
            "what it found"
        );
    }
    PASSED
}

fn atomic_repeats_go_round() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(3)?;
    let number = |offset: usize| memory.atomic(offset).load(std::sync::atomic::Ordering::Relaxed);
    let add = || Command::atomic_add(memory.as_ptr().cast::<u64>(), 1);
    // The same place; each its own place; some places, over page boundaries, the last round not full.
    execute_ok(&gpu, &[add().repeat(1000)])?;
    ensure_eq!(number(0), 1000, "in one place");
    execute_ok(&gpu, &[add().repeat(100).stride(16)])?;
    for place in 0..100 {
        ensure_eq!(
            number(place * 16),
            if place == 0 { 1001 } else { 1 },
            "place {place} of 100"
        );
        ensure_eq!(number(place * 16 + 8), 0, "between the places");
    }
    memory.write(0, &vec![0; memory.len()]);
    execute_ok(&gpu, &[add().repeat(25).stride(1000).span(10)])?;
    for place in 0..10 {
        ensure_eq!(
            number(place * 1000),
            if place < 5 { 3 } else { 2 },
            "place {place} of 10"
        );
    }
    PASSED
}

fn a_batch_runs_in_order() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(2)?;
    let (first, second) = (memory.page(0).cast::<u64>(), memory.page(1).cast::<u64>());
    let mut commands = Vec::new();
    let mut expected = 0_u64;
    for step in 0..gpu.info()?.max_batch.min(60) as u64 / 3 {
        commands.push(Command::atomic(Operation::Xor, first, step * 77));
        commands.push(Command::copy(first.cast(), second.cast(), 8));
        commands.push(Command::atomic_add(first, 3));
        expected = (expected ^ (step * 77)).wrapping_add(3);
    }
    execute_ok(&gpu, &commands)?;
    ensure_eq!(
        memory.atomic(0).load(std::sync::atomic::Ordering::Relaxed),
        expected,
        "the result"
    );
    ensure_eq!(
        memory.atomic(4096).load(std::sync::atomic::Ordering::Relaxed),
        expected - 3,
        "the copy before it"
    );
    PASSED
}
