// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Batches of commands on memory that is lent to them.

use std::marker::PhantomData;

use crate::{AtomicWord, Command, Compare, Memory, Operation, Plain, Source, Word};

/// Commands that run one after the other, and that touch only memory which was lent for `'m`.
///
/// [`Gpu::run`](crate::Gpu::run) and [`Gpu::scope`](crate::Gpu::scope) take it. A batch can be run as often as one likes.
///
/// ```
/// use pinion_client::{Batch, Memory, Operation};
///
/// let source = [1.5_f32; 1000];
/// let mut destination = [0.0_f32; 1000];
/// let mut total = 0_u64;
///
/// let mut batch = Batch::new();
/// batch
///     .copy(&source[..], &mut destination[..])
///     .atomic(Operation::Add, &mut total, 1);
/// # assert_eq!(batch.commands().len(), 2);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Batch<'m> {
    commands: Vec<Command>,
    borrow: PhantomData<Memory<'m, u8>>,
}

impl<'m> Batch<'m> {
    /// One without commands.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The commands.
    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// Adds a command.
    ///
    /// # Safety
    ///
    /// It must not touch memory other than what is lent for `'m`, and must write only to what nobody else accesses.
    pub unsafe fn push(&mut self, command: Command) -> &mut Self {
        self.commands.push(command);
        self
    }

    /// Copies `source` to `destination`; they may overlap.
    ///
    /// # Panics
    ///
    /// If they are not of the same length.
    #[track_caller]
    pub fn copy<T: Plain>(
        &mut self,
        source: impl Into<Source<'m, T>>,
        destination: impl Into<Memory<'m, T>>,
    ) -> &mut Self {
        let (source, destination) = (source.into(), destination.into());
        assert_eq!(source.len(), destination.len(), "elements to be copied");
        let bytes = source.len() * size_of::<T>();
        self.commands.push(Command::copy(
            source.as_ptr().cast(),
            destination.as_ptr().cast(),
            bytes,
        ));
        self
    }

    /// Stores `value` in every element.
    pub fn fill<T: Word + Plain>(&mut self, destination: impl Into<Memory<'m, T>>, value: T) -> &mut Self {
        let destination = destination.into();
        self.commands
            .push(Command::fill(destination.as_ptr(), destination.len(), value));
        self
    }

    /// Does an atomic operation on every element.
    pub fn atomic<T: AtomicWord + Plain>(
        &mut self,
        operation: Operation,
        target: impl Into<Memory<'m, T>>,
        operand: T,
    ) -> &mut Self {
        let target = target.into();
        let count = u32::try_from(target.len()).unwrap_or(u32::MAX);
        self.atomic_times(operation, target, operand, count)
    }

    /// Does that many atomic operations, one on each element, going round as often as it takes.
    pub fn atomic_times<T: AtomicWord + Plain>(
        &mut self,
        operation: Operation,
        target: impl Into<Memory<'m, T>>,
        operand: T,
        times: u32,
    ) -> &mut Self {
        let target = target.into();
        let span = u32::try_from(target.len()).unwrap_or(u32::MAX);
        if span > 0 && times > 0 {
            let command = Command::atomic(operation, target.as_ptr(), operand)
                .repeat(times)
                .stride(size_of::<T>() as u32)
                .span(span);
            self.commands.push(command);
        }
        self
    }

    /// Does an atomic operation on `target`, and stores what it found there at `found`.
    ///
    /// # Panics
    ///
    /// Unless both have one element.
    #[track_caller]
    pub fn fetch<T: AtomicWord + Plain>(
        &mut self,
        operation: Operation,
        target: impl Into<Memory<'m, T>>,
        operand: T,
        found: impl Into<Memory<'m, T>>,
    ) -> &mut Self {
        let (target, found) = (one(target.into()), one(found.into()));
        self.commands
            .push(Command::atomic(operation, target, operand).write_back(found));
        self
    }

    /// Stores `new` at `target` if `expected` is there, and what it found at `found`.
    ///
    /// # Panics
    ///
    /// Unless both have one element.
    #[track_caller]
    pub fn compare_exchange<T: AtomicWord + Plain>(
        &mut self,
        target: impl Into<Memory<'m, T>>,
        expected: T,
        new: T,
        found: impl Into<Memory<'m, T>>,
    ) -> &mut Self {
        let (target, found) = (one(target.into()), one(found.into()));
        self.commands
            .push(Command::compare_exchange(target, expected, new).write_back(found));
        self
    }

    /// Goes on when the number at `target` compares as wanted to `number`.
    ///
    /// # Panics
    ///
    /// Unless it has one element.
    #[track_caller]
    pub fn semaphore_wait<T: AtomicWord + Plain>(
        &mut self,
        target: impl Into<Memory<'m, T>>,
        compare: Compare,
        number: T,
    ) -> &mut Self {
        self.commands
            .push(Command::semaphore_wait(one(target.into()), compare, number));
        self
    }

    /// Stores `number` at `target` when everything before is visible.
    ///
    /// # Panics
    ///
    /// Unless it has one element.
    #[track_caller]
    pub fn semaphore_signal<T: AtomicWord + Plain>(
        &mut self,
        target: impl Into<Memory<'m, T>>,
        number: T,
    ) -> &mut Self {
        self.commands
            .push(Command::semaphore_signal(one(target.into()), number));
        self
    }

    /// Stores the device time in nanoseconds.
    ///
    /// # Panics
    ///
    /// Unless there is one element.
    #[track_caller]
    pub fn timestamp(&mut self, destination: impl Into<Memory<'m, u64>>) -> &mut Self {
        self.commands.push(Command::timestamp(one(destination.into())));
        self
    }

    /// Has the driver bring what is going to be used to where the GPU can access it. A hint.
    pub fn prefetch<T: Plain>(&mut self, memory: impl Into<Source<'m, T>>) -> &mut Self {
        let memory = memory.into();
        self.commands.push(Command::prefetch(
            memory.as_ptr().cast(),
            memory.len() * size_of::<T>(),
        ));
        self
    }
}

/// The only element.
#[track_caller]
fn one<T>(memory: Memory<'_, T>) -> *mut T {
    assert_eq!(memory.len(), 1, "elements");
    memory.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_becomes_one_command() {
        let mut numbers = [0_u32; 10];
        let start = numbers.as_ptr().addr() as u64;
        let memory = Memory::from(&mut numbers[..]);
        let mut batch = Batch::new();
        batch
            .fill(memory.part(2..5), 9)
            .atomic(Operation::Add, memory, 1)
            .atomic_times(Operation::Add, memory.part(0..3), 1, 100)
            .copy(memory.part(0..2), memory.part(8..10));
        let raw: Vec<_> = batch.commands().iter().map(Command::as_raw).collect();
        assert_eq!((raw[0].address, raw[0].length, raw[0].width), (start + 8, 12, 4));
        assert_eq!((raw[1].repeat, raw[1].stride, raw[1].span), (10, 4, 10));
        assert_eq!((raw[2].repeat, raw[2].stride, raw[2].span), (100, 4, 3));
        assert_eq!(
            (raw[3].source, raw[3].address, raw[3].length),
            (start, start + 32, 8)
        );
    }

    #[test]
    fn nothing_to_do_is_no_command() {
        let mut nothing: [u64; 0] = [];
        let mut batch = Batch::new();
        batch.atomic(Operation::Add, &mut nothing[..], 1);
        assert!(batch.commands().is_empty());
    }

    #[test]
    #[should_panic(expected = "elements to be copied")]
    fn copies_are_of_one_length() {
        let (source, mut destination) = ([1_u8; 3], [0_u8; 4]);
        Batch::new().copy(&source[..], &mut destination[..]);
    }
}
