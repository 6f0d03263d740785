// SPDX-License-Identifier: GPL-2.0-only

//! Event descriptors of programs (`eventfd(2)`), for the kernel to signal.
//!
//! C header: `include/linux/eventfd.h`.

use crate::bindings as c;
use core::ptr::NonNull;
use kernel::{error::from_err_ptr, prelude::*};

/// A reference to what is behind an event descriptor.
///
/// # Invariants
///
/// The pointer is valid, and this owns one reference.
pub(crate) struct EventFd(NonNull<c::eventfd_ctx>);

// SAFETY: A context is reference-counted, protects itself with a lock, and has no affinity to a thread.
unsafe impl Send for EventFd {}
// SAFETY: As above.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// The one behind a descriptor of the current process.
    ///
    /// # Errors
    ///
    /// EBADF: no descriptor. EINVAL: not one of an event.
    pub(crate) fn from_descriptor(descriptor: i32) -> Result<Self> {
        // SAFETY: No preconditions.
        let context = from_err_ptr(unsafe { c::eventfd_ctx_fdget(descriptor) })?;
        // INVARIANT: `eventfd_ctx_fdget` has taken a reference for us.
        NonNull::new(context).map(Self).ok_or(EINVAL)
    }

    /// Adds one to its counter. May be called in interrupts.
    pub(crate) fn signal(&self) {
        // SAFETY: The context is valid by the type invariant. This takes its lock with interrupts disabled.
        unsafe { c::eventfd_signal_mask(self.0.as_ptr(), 0) };
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariant. Freeing the context does not sleep.
        unsafe { c::eventfd_ctx_put(self.0.as_ptr()) };
    }
}
