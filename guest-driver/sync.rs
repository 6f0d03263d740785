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

    /// Takes one unit if there is one. May be called in atomic context.
    pub(crate) fn try_down(&self) -> bool {
        // SAFETY: `inner` was initialised by `new`.
        unsafe { c::down_trylock(self.inner.get()) == 0 }
    }

    /// Gives one unit back. May be called from interrupt handlers.
    pub(crate) fn up(&self) {
        // SAFETY: `inner` was initialised by `new`.
        unsafe { c::up(self.inner.get()) };
    }
}

/// The module's work queues, while a [`ModuleQueues`] exists.
static QUEUES: [AtomicPtr<bindings::workqueue_struct>; 3] = [const { AtomicPtr::new(ptr::null_mut()) }; 3];

/// What a work queue of the module is for.
#[derive(Clone, Copy)]
pub(crate) enum ModuleQueue {
    /// Events and faults, and what else moves pages: there can be many of them, they can take long, and they take locks of
    /// processes. Nothing in reclaim may wait for these.
    Faults = 0,
    /// The reset of a lost device, for which reclaim may be waiting: nothing here allocates memory, or waits for what does for
    /// longer than a bounded time.
    Loss = 1,
    /// Work that was held back and can go to a device, and looking after what devices have.
    Submissions = 2,
}

impl ModuleQueue {
    /// The queue, unless the module is being loaded or unloaded.
    pub(crate) fn get(self) -> Option<&'static Queue> {
        let queue = QUEUES[self as usize].load(Ordering::Acquire);
        // SAFETY: Valid by the type invariant of `ModuleQueues`, which is dropped after everything that may call
        // this is gone: it is the last field of the module.
        (!queue.is_null()).then(|| unsafe { Queue::from_raw(queue) })
    }

    /// Waits until everything that is queued now has run.
    pub(crate) fn flush(self) {
        let queue = QUEUES[self as usize].load(Ordering::Acquire);
        if !queue.is_null() {
            // SAFETY: As in `get`.
            unsafe { bindings::__flush_workqueue(queue) };
        }
    }
}

/// The module's own work queues: what runs on them is done before the module's text goes away.
///
/// They belong to the module rather than to a device, so that work can hold the last reference to a device and
/// drop it.
///
/// # Invariants
///
/// The pointers in `QUEUES` that are not null are valid work queues while this exists.
pub(crate) struct ModuleQueues(());

impl ModuleQueues {
    /// Allocates them. To be called once, when the module is loaded.
    pub(crate) fn new() -> Result<Self> {
        let this = Self(());
        for (reclaim, place) in [false, true, false].into_iter().zip(&QUEUES) {
            // SAFETY: No preconditions.
            let queue = unsafe { c::pinion_alloc_workqueue(reclaim) };
            if queue.is_null() {
                return Err(ENOMEM);
            }
            // INVARIANT: Just allocated.
            place.store(queue, Ordering::Release);
        }
        Ok(this)
    }
}

impl Drop for ModuleQueues {
    fn drop(&mut self) {
        for place in &QUEUES {
            let queue = place.swap(ptr::null_mut(), Ordering::AcqRel);
            if !queue.is_null() {
                // SAFETY: Valid by the type invariant, and nobody gets it any more. This waits for what runs.
                unsafe { bindings::destroy_workqueue(queue) };
            }
        }
    }
}
