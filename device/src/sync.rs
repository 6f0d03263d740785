// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Locks, atomics, threads and the time, as the core of the device uses them.
//!
//! In the program they are those of `parking_lot` and the standard library, by other names. With the feature `model`
//! they are those of a checker, under which `tests/models` runs the very same core through many schedules; nothing
//! else works then.
//!
//! Counters that are only looked at (`gpu/statistics.rs`), the switches of deliberate defects (`gpu/inject.rs`) and what
//! is done to the memory of guests go past this: a checker that could switch threads at each of them would spend
//! its time on schedules that differ in nothing that matters.

#[cfg(feature = "model")]
mod model;

#[cfg(feature = "model")]
pub use model::{Condvar, Mutex, MutexGuard, RwLock, atomic, now, point, thread};

#[cfg(not(feature = "model"))]
pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
#[cfg(not(feature = "model"))]
pub use std::{sync::atomic, thread, time::Instant};

// Nothing is decided by the count of references, so there is nothing in it to be checked.
pub use std::sync::Arc;

#[cfg(feature = "model")]
pub use std::time::Instant;

/// The time.
#[cfg(not(feature = "model"))]
#[inline]
pub fn now() -> Instant {
    Instant::now()
}

/// A moment at which somebody else may well get in between, which a checker should know of.
#[cfg(not(feature = "model"))]
#[inline(always)]
pub fn point() {}
