// SPDX-License-Identifier: Apache-2.0 OR MIT

//! GPU commands.

use crate::uapi;

mod sealed {
    pub trait Sealed: Copy {
        /// All bits of the type.
        const ONES: u64;

        fn bits(self) -> u64;
    }
}

/// An integer that FILL can write.
pub trait Word: sealed::Sealed {}

/// An integer that the GPU can do atomic operations on.
pub trait AtomicWord: Word {}

macro_rules! words {
    ($($type:ty as $unsigned:ty: $($trait:ident)*;)*) => { $(
        impl sealed::Sealed for $type {
            const ONES: u64 = <$unsigned>::MAX as u64;

            fn bits(self) -> u64 {
                u64::from(self as $unsigned)
            }
        }
        $(impl $trait for $type {})*
    )* };
}

words! {
    u8 as u8: Word;
    u16 as u16: Word;
    u32 as u32: Word AtomicWord;
    u64 as u64: Word AtomicWord;
    i8 as u8: Word;
    i16 as u16: Word;
    i32 as u32: Word AtomicWord;
    i64 as u64: Word AtomicWord;
}

/// What an atomic operation stores, given what it finds at `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// `*p + operand`, wrapping.
    Add = uapi::ATOMIC_ADD,
    /// `*p & operand`.
    And = uapi::ATOMIC_AND,
    /// `*p | operand`.
    Or = uapi::ATOMIC_OR,
    /// `*p ^ operand`.
    Xor = uapi::ATOMIC_XOR,
    /// The smaller of the two as unsigned numbers.
    MinUnsigned = uapi::ATOMIC_MIN_UNSIGNED,
    /// The larger of the two as unsigned numbers.
    MaxUnsigned = uapi::ATOMIC_MAX_UNSIGNED,
    /// The smaller of the two as signed numbers.
    MinSigned = uapi::ATOMIC_MIN_SIGNED,
    /// The larger of the two as signed numbers.
    MaxSigned = uapi::ATOMIC_MAX_SIGNED,
    /// `operand`.
    Exchange = uapi::ATOMIC_EXCHANGE,
    /// `*p`: a load, which needs no exclusive access. Of use with [`Command::write_back`].
    Load = uapi::ATOMIC_LOAD,
    /// `operand`, without looking what is there: a store, which needs no exclusive access.
    Store = uapi::ATOMIC_STORE,
}

/// How a number must be, compared with another, as unsigned numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Compare {
    /// The same.
    Equal = uapi::COMPARE_EQUAL,
    /// Another.
    NotEqual = uapi::COMPARE_NOT_EQUAL,
    /// Less.
    Less = uapi::COMPARE_LESS,
    /// Less, or the same.
    LessOrEqual = uapi::COMPARE_LESS_EQUAL,
    /// More.
    Greater = uapi::COMPARE_GREATER,
    /// More, or the same.
    GreaterOrEqual = uapi::COMPARE_GREATER_EQUAL,
}

/// A command for the GPU.
///
/// Making one is safe, whatever the pointers are: nothing happens before it is submitted.
///
/// ```
/// use pinion_client::Command;
///
/// let mut counters = [0_u64; 8];
/// // A thousand increments, which go round the eight counters.
/// let command = Command::atomic_add(counters.as_mut_ptr(), 1).repeat(1000).stride(8).span(8);
/// assert_eq!(command.as_raw().repeat, 1000);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
#[must_use]
pub struct Command(uapi::Command);

impl Command {
    /// Does nothing.
    pub fn nop() -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_NOP,
            ..Default::default()
        })
    }

    /// Copies `length` bytes; source and destination may overlap.
    pub fn copy(source: *const u8, destination: *mut u8, length: usize) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_COPY,
            address: destination.addr() as u64,
            source: source.addr() as u64,
            length: length as u64,
            ..Default::default()
        })
    }

    /// Writes `value` to `count` places from `destination`.
    pub fn fill<T: Word>(destination: *mut T, count: usize, value: T) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_FILL,
            width: size_of::<T>() as u8,
            address: destination.addr() as u64,
            length: (count * size_of::<T>()) as u64,
            operand: value.bits(),
            ..Default::default()
        })
    }

    /// One atomic operation on `*target`. See [`repeat`](Self::repeat) for more than one.
    pub fn atomic<T: AtomicWord>(operation: Operation, target: *mut T, operand: T) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_ATOMIC,
            operation: operation as u8,
            width: size_of::<T>() as u8,
            repeat: 1,
            address: target.addr() as u64,
            operand: operand.bits(),
            ..Default::default()
        })
    }

    /// Adds `operand` to `*target`, wrapping.
    pub fn atomic_add<T: AtomicWord>(target: *mut T, operand: T) -> Self {
        Self::atomic(Operation::Add, target, operand)
    }

    /// Stores `new` at `*target` if it is `expected`.
    pub fn compare_exchange<T: AtomicWord>(target: *mut T, expected: T, new: T) -> Self {
        let mut command = Self::atomic(Operation::Exchange, target, new);
        command.0.operation = uapi::ATOMIC_COMPARE_EXCHANGE;
        command.0.compare = expected.bits();
        command
    }

    /// Waits until the number at `*target` compares to `number` as wanted. The ring waits with all that is behind; the
    /// device ends work that waits for too long.
    pub fn semaphore_wait<T: AtomicWord>(target: *const T, compare: Compare, number: T) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_SEMAPHORE_WAIT,
            operation: compare as u8,
            width: size_of::<T>() as u8,
            address: target.addr() as u64,
            operand: number.bits(),
            compare: T::ONES,
            ..Default::default()
        })
    }

    /// Stores `number` at `*target` when all that the ring did before is visible.
    pub fn semaphore_signal<T: AtomicWord>(target: *mut T, number: T) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_SEMAPHORE_SIGNAL,
            width: size_of::<T>() as u8,
            address: target.addr() as u64,
            operand: number.bits(),
            ..Default::default()
        })
    }

    /// Stores the device time, in nanoseconds since some moment, at `*destination`.
    pub fn timestamp(destination: *mut u64) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_TIMESTAMP,
            address: destination.addr() as u64,
            ..Default::default()
        })
    }

    /// Has the driver make `length` bytes ready to be read. A hint, which never fails and waits for nothing.
    pub fn prefetch(start: *const u8, length: usize) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_PREFETCH,
            operation: uapi::ACCESS_READ,
            address: start.addr() as u64,
            length: length as u64,
            ..Default::default()
        })
    }

    /// Follows a linked list from `*first`, at most `nodes` nodes: adds the 8 bytes that are `value` bytes into each node, and
    /// finds the next by the pointer that is `next` bytes into it.
    pub fn chase<T>(
        first: *const T,
        nodes: u32,
        next: usize,
        value: usize,
        result: *mut uapi::ChaseResult,
    ) -> Self {
        Self(uapi::Command {
            opcode: uapi::COMMAND_CHASE,
            repeat: nodes,
            address: first.addr() as u64,
            source: result.addr() as u64,
            stride: u32::try_from(value).unwrap_or(u32::MAX),
            span: u32::try_from(next).unwrap_or(u32::MAX),
            ..Default::default()
        })
    }

    /// Does the atomic operation that often. Number `i`, from zero, is `(i % span) * stride` bytes from the
    /// target.
    pub fn repeat(mut self, times: u32) -> Self {
        self.0.repeat = times;
        self
    }

    /// Distance of one repeat from the next in bytes. Zero, if not set: all are in the same place.
    pub fn stride(mut self, bytes: u32) -> Self {
        self.0.stride = bytes;
        self
    }

    /// Number of different places after which the repeats start over. As many as there are repeats, if not
    /// set.
    pub fn span(mut self, places: u32) -> Self {
        self.0.span = places;
        self
    }

    /// Writes the value that the last repeat of the atomic operation found to `*destination`.
    pub fn write_back<T: AtomicWord>(mut self, destination: *mut T) -> Self {
        self.0.flags |= uapi::COMMAND_WRITE_BACK;
        self.0.source = destination.addr() as u64;
        self
    }

    /// Writes the values that all repeats of the atomic operation found to `destination`, one after the other.
    pub fn write_back_all<T: AtomicWord>(mut self, destination: *mut T) -> Self {
        self.0.flags |= uapi::COMMAND_WRITE_BACK | uapi::COMMAND_WRITE_BACK_ALL;
        self.0.source = destination.addr() as u64;
        self
    }

    /// A command that is taken as it is.
    pub fn from_raw(command: uapi::Command) -> Self {
        Self(command)
    }

    /// The command as the driver gets it.
    #[must_use]
    pub fn as_raw(&self) -> &uapi::Command {
        &self.0
    }
}
