// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The primitives of the checker, with the interface of `parking_lot`.
//!
//! Time stands still: what waits until later waits until somebody wakes it. So nothing in a model can lean on a timer,
//! and a wake-up that is lost is a deadlock, which the checker reports.

use std::ops::{Deref, DerefMut};
use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, Instant};

use shuttle::sync as checked;

pub use shuttle::sync::atomic;
pub use shuttle::thread;

/// The time, which is always the same.
pub fn now() -> Instant {
    static NOW: OnceLock<Instant> = OnceLock::new();
    *NOW.get_or_init(Instant::now)
}

/// Has the checker consider that another thread goes on here.
pub fn point() {
    // In no real time: a switch, and no hint that this thread has nothing to do.
    thread::sleep(Duration::ZERO);
}

/// A lock.
#[derive(Debug, Default)]
pub struct Mutex<T>(checked::Mutex<T>);

/// The right to what is behind a [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'a, T>(Option<checked::MutexGuard<'a, T>>);

impl<T> Mutex<T> {
    /// A lock that is open.
    pub const fn new(value: T) -> Self {
        Self(checked::Mutex::new(value))
    }

    /// Waits until it is open, and closes it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // A thread that panics ends the run, so nobody comes to see what it has left behind.
        MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl<T> MutexGuard<'_, T> {
    /// Opens the lock. Who is next is up to the checker.
    pub fn unlock_fair(guard: Self) {
        drop(guard);
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only a wait takes it away")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("only a wait takes it away")
    }
}

/// A lock for one writer or several readers.
#[derive(Debug, Default)]
pub struct RwLock<T>(checked::RwLock<T>);

impl<T> RwLock<T> {
    /// A lock that is open.
    pub const fn new(value: T) -> Self {
        Self(checked::RwLock::new(value))
    }

    /// Waits until there is no writer.
    pub fn read(&self) -> checked::RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is nobody else.
    pub fn write(&self) -> checked::RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something to wait for.
#[derive(Debug, Default)]
pub struct Condvar(checked::Condvar);

/// How a wait with a limit ended.
#[derive(Clone, Copy, Debug)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// Whether the time was over.
    pub fn timed_out(self) -> bool {
        self.0
    }
}

impl Condvar {
    /// Nobody waits.
    pub const fn new() -> Self {
        Self(checked::Condvar::new())
    }

    /// Waits to be notified.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        if let Some(held) = guard.0.take() {
            guard.0 = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Waits to be notified, unless `limit` has passed already: it will not pass meanwhile.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, limit: Instant) -> WaitTimeoutResult {
        let over = limit <= now();
        if !over {
            self.wait(guard);
        }
        WaitTimeoutResult(over)
    }

    /// Wakes one that waits.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all that wait.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}
