// SPDX-License-Identifier: GPL-2.0-only

//! Waiting with a bound: completions and semaphores that time out, and a work queue that can be flushed.
//!
//! The `kernel` crate's `Completion` waits for ever, and its `CondVar` times out only for interruptible
//! waits; a driver whose device may die at any time needs neither.
//!
//! C headers: `include/linux/completion.h`, `include/linux/semaphore.h`, `include/linux/workqueue.h`.

use crate::bindings as c;
use core::{
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};
use kernel::{
    bindings,
    prelude::*,
    time::{msecs_to_jiffies, Msecs},
    types::Opaque,
    workqueue::Queue,
};

/// A completion that can be waited for with a timeout, and used again.
#[pin_data]
pub(crate) struct Completion {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: `struct completion` is made to be shared between threads and has no affinity to one.
unsafe impl Send for Completion {}
// SAFETY: As above; all operations lock its own wait queue.
unsafe impl Sync for Completion {}

impl Completion {
    /// A completion that has not happened yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writing a `struct completion`, and stays where it is.
            inner <- Opaque::ffi_init(|slot| unsafe { c::pinion_init_completion(slot) }),
        })
    }

    /// Makes it pending again. Nobody may be waiting for it.
    pub(crate) fn reset(&self) {
        // SAFETY: `inner` was initialised by `new`.
        unsafe { c::pinion_reinit_completion(self.inner.get()) };
    }

    /// Lets one waiter pass. May be called from interrupt handlers.
    pub(crate) fn complete(&self) {
        // SAFETY: `inner` was initialised by `new`.
        unsafe { bindings::complete(self.inner.get()) };
    }

    /// Lets all waiters pass, now and from now on.
    pub(crate) fn complete_all(&self) {
        // SAFETY: `inner` was initialised by `new`.
        unsafe { bindings::complete_all(self.inner.get()) };
    }

    /// Waits uninterruptibly for at most `timeout` milliseconds.
    ///
    /// # Errors
    ///
    /// ETIMEDOUT.
    pub(crate) fn wait(&self, timeout: Msecs) -> Result {
        // SAFETY: `inner` was initialised by `new`.
        match unsafe { bindings::wait_for_completion_timeout(self.inner.get(), msecs_to_jiffies(timeout)) } {
            0 => Err(ETIMEDOUT),
            _ => Ok(()),
        }
    }
}

/// A counting semaphore.
#[pin_data]
pub(crate) struct Semaphore {
    #[pin]
    inner: Opaque<c::semaphore>,
}

// SAFETY: `struct semaphore` is made to be shared between threads and has no affinity to one.
unsafe impl Send for Semaphore {}
// SAFETY: As above; all operations take its own lock.
unsafe impl Sync for Semaphore {}

impl Semaphore {
    /// A semaphore of which `count` units are available.
    pub(crate) fn new(count: usize) -> impl PinInit<Self> {
        let count = count.try_into().unwrap_or(i32::MAX);
        pin_init!(Self {
            // SAFETY: `slot` is valid for writing a `struct semaphore`, and stays where it is.
            inner <- Opaque::ffi_init(|slot| unsafe { c::pinion_sema_init(slot, count) }),
        })
    }

    /// Takes one unit, waiting uninterruptibly for at most `timeout` milliseconds.
    ///
    /// # Errors
    ///
    /// ETIMEDOUT.
    pub(crate) fn down(&self, timeout: Msecs) -> Result {
        let jiffies = msecs_to_jiffies(timeout);
        // SAFETY: `inner` was initialised by `new`.
        let status = unsafe { c::down_timeout(self.inner.get(), jiffies.try_into().unwrap_or(isize::MAX)) };
        match status {
            0 => Ok(()),
            _ => Err(ETIMEDOUT),
        }
    }

    /// Gives one unit back. May be called from interrupt handlers.
    pub(crate) fn up(&self) {
        // SAFETY: `inner` was initialised by `new`.
        unsafe { c::up(self.inner.get()) };
    }
}

/// The module's work queue, while a [`ModuleQueue`] exists.
static QUEUE: AtomicPtr<bindings::workqueue_struct> = AtomicPtr::new(ptr::null_mut());

/// The module's own work queue: what runs on it is done before the module's text goes away.
///
/// There is one, and it belongs to the module rather than to a device, so that work can hold the last
/// reference to a device and drop it.
///
/// # Invariants
///
/// `QUEUE` is a valid work queue while this exists.
pub(crate) struct ModuleQueue(());

impl ModuleQueue {
    /// Allocates it. To be called once, when the module is loaded.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: No preconditions.
        let queue = unsafe { c::pinion_alloc_workqueue() };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        // INVARIANT: Just allocated.
        QUEUE.store(queue, Ordering::Release);
        Ok(Self(()))
    }

    /// The queue, unless the module is being loaded or unloaded.
    pub(crate) fn get() -> Option<&'static Queue> {
        let queue = QUEUE.load(Ordering::Acquire);
        // SAFETY: By the type invariant. The `ModuleQueue` is dropped after everything that may call this is
        // gone: it is the last field of the module.
        (!queue.is_null()).then(|| unsafe { Queue::from_raw(queue) })
    }

    /// Waits until everything that is queued now has run.
    pub(crate) fn flush() {
        let queue = QUEUE.load(Ordering::Acquire);
        if !queue.is_null() {
            // SAFETY: As in `get`.
            unsafe { bindings::__flush_workqueue(queue) };
        }
    }
}

impl Drop for ModuleQueue {
    fn drop(&mut self) {
        let queue = QUEUE.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: Valid by the type invariant, and nobody gets it any more. This waits for what is still running.
        unsafe { bindings::destroy_workqueue(queue) };
    }
}
