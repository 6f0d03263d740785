// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of the process that is lent to the GPU.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64};

/// A type of which every pattern of bits is a value, so that the GPU may leave anything there.
///
/// # Safety
///
/// That must be so, and there must be no padding.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($type:ty)*) => { $(
        // SAFETY: A number.
        unsafe impl Plain for $type {}
    )* };
}

plain! { u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64 }

// SAFETY: An array is nothing but its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Memory that the GPU may read and write, and that nobody else touches for `'m`.
///
/// It is made of a mutable slice once, and can then be used in as many commands as need be.
///
/// ```
/// use pinion_client::{Batch, Memory};
///
/// let mut numbers = [0_u64; 8];
/// let memory = Memory::from(&mut numbers[..]);
/// let mut batch = Batch::new();
/// batch
///     .fill(memory, 7)
///     .fill(memory.part(0..4), 1)
///     .copy(memory.part(0..2), memory.part(6..8));
/// assert_eq!(batch.commands().len(), 3);
/// ```
#[derive(Debug)]
pub struct Memory<'m, T> {
    start: *mut T,
    count: usize,
    borrow: PhantomData<&'m mut [T]>,
}

impl<T> Clone for Memory<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Memory<'_, T> {}

// SAFETY: It has no way to the memory but for the GPU, and stands for a mutable borrow of it.
unsafe impl<T: Send> Send for Memory<'_, T> {}
// SAFETY: As above.
unsafe impl<T: Send> Sync for Memory<'_, T> {}

impl<'m, T: Plain> From<&'m mut [T]> for Memory<'m, T> {
    fn from(slice: &'m mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            count: slice.len(),
            borrow: PhantomData,
        }
    }
}

impl<'m, T: Plain> From<&'m mut T> for Memory<'m, T> {
    fn from(place: &'m mut T) -> Self {
        Self::from(std::slice::from_mut(place))
    }
}

macro_rules! atomics {
    ($($atomic:ty as $type:ty;)*) => { $(
        impl<'m> From<&'m [$atomic]> for Memory<'m, $type> {
            /// The CPU may go on to use these, which are atomic. Whether the updates of both count depends on how the
            /// GPU gets exclusive access: see [`Atomics`](crate::Atomics).
            fn from(slice: &'m [$atomic]) -> Self {
                Self { start: slice.as_ptr().cast_mut().cast(), count: slice.len(), borrow: PhantomData }
            }
        }

        impl<'m> From<&'m $atomic> for Memory<'m, $type> {
            /// As for a slice.
            fn from(place: &'m $atomic) -> Self {
                Self::from(std::slice::from_ref(place))
            }
        }
    )* };
}

atomics! {
    AtomicU32 as u32;
    AtomicU64 as u64;
    AtomicI32 as i32;
    AtomicI64 as i64;
}

impl<T> Memory<'_, T> {
    /// Part of it.
    ///
    /// # Panics
    ///
    /// If the range is not within it.
    #[must_use]
    #[track_caller]
    pub fn part(self, range: std::ops::Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.count,
            "{range:?} of {} elements",
            self.count
        );
        Self {
            start: self.start.wrapping_add(range.start),
            count: range.end - range.start,
            borrow: PhantomData,
        }
    }

    /// One element.
    ///
    /// # Panics
    ///
    /// If there is none of that index.
    #[must_use]
    #[track_caller]
    pub fn at(self, index: usize) -> Self {
        self.part(index..index + 1)
    }

    /// Number of elements.
    #[must_use]
    pub fn len(self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The address of the first one.
    #[must_use]
    pub fn as_ptr(self) -> *mut T {
        self.start
    }
}

/// Memory that the GPU may read, and that nobody writes to for `'m`.
#[derive(Debug)]
pub struct Source<'m, T> {
    start: *const T,
    count: usize,
    borrow: PhantomData<&'m [T]>,
}

impl<T> Clone for Source<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Source<'_, T> {}

impl<T> Source<'_, T> {
    /// Number of elements.
    #[must_use]
    pub fn len(self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The address of the first one.
    #[must_use]
    pub fn as_ptr(self) -> *const T {
        self.start
    }
}

impl<'m, T: Plain> From<&'m [T]> for Source<'m, T> {
    fn from(slice: &'m [T]) -> Self {
        Self {
            start: slice.as_ptr(),
            count: slice.len(),
            borrow: PhantomData,
        }
    }
}

impl<'m, T: Plain> From<Memory<'m, T>> for Source<'m, T> {
    fn from(memory: Memory<'m, T>) -> Self {
        Self {
            start: memory.start,
            count: memory.count,
            borrow: PhantomData,
        }
    }
}
