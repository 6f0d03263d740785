// SPDX-License-Identifier: GPL-2.0-only

//! Shrinkers: what the kernel calls when memory is short.
//!
//! C header: `include/linux/shrinker.h`.

use crate::bindings as c;
use kernel::{ffi::c_ulong, prelude::*, sync::Arc};

/// What can give something back when memory is short.
///
/// Both run in reclaim, whatever the caller holds and whatever may not be waited for (GFP_NOFS, GFP_NOIO, no sleeping
/// on locks under which memory is allocated): they allocate nothing, and take no lock but leaves.
pub(crate) trait Shrink: Send + Sync + 'static {
    /// How many pages could be given back.
    fn count(&self) -> usize;

    /// Has up to `count` pages given back, some time soon.
    fn ask(&self, count: usize);
}

/// A registered shrinker.
///
/// # Invariants
///
/// `raw` is registered, and its data is `data`, until `drop`.
pub(crate) struct Shrinker<T: Shrink> {
    raw: *mut c::shrinker,
    _data: Arc<T>,
}

// SAFETY: The C structure has its own locking, and `T` may be used by several threads.
unsafe impl<T: Shrink> Send for Shrinker<T> {}
// SAFETY: As above.
unsafe impl<T: Shrink> Sync for Shrinker<T> {}

impl<T: Shrink> Shrinker<T> {
    /// Registers it under a name that shows in debugfs.
    pub(crate) fn new(name: &'static CStr, data: Arc<T>) -> Result<Self> {
        // SAFETY: The functions are of the right type and treat the data as what it is. It lives as long as this, which
        // keeps it; `drop` waits until neither runs.
        let raw = unsafe {
            c::pinion_shrinker_register(
                name.as_char_ptr(),
                Some(Self::count),
                Some(Self::scan),
                Arc::as_ptr(&data).cast_mut().cast(),
            )
        };
        if raw.is_null() {
            return Err(ENOMEM);
        }
        // INVARIANT: Just registered.
        Ok(Self { raw, _data: data })
    }

    /// # Safety
    ///
    /// `raw` must be a registered shrinker of this type.
    unsafe fn data<'a>(raw: *mut c::shrinker) -> &'a T {
        // SAFETY: By the contract and the type invariant.
        unsafe { &*c::pinion_shrinker_data(raw).cast() }
    }

    /// # Safety
    ///
    /// Called by the kernel with a shrinker of this type.
    unsafe extern "C" fn count(raw: *mut c::shrinker, _: *mut c::shrink_control) -> c_ulong {
        // SAFETY: By the contract.
        unsafe { Self::data(raw) }.count()
    }

    /// # Safety
    ///
    /// Called by the kernel with a shrinker of this type, and what it wants.
    unsafe extern "C" fn scan(raw: *mut c::shrinker, control: *mut c::shrink_control) -> c_ulong {
        // SAFETY: By the contract.
        unsafe { Self::data(raw).ask(c::pinion_shrink_wanted(control)) };
        // Nothing is free yet.
        0
    }
}

impl<T: Shrink> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the type invariant. This waits until it is not being called any more.
        unsafe { c::shrinker_free(self.raw) };
    }
}
