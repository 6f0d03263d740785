// SPDX-License-Identifier: GPL-2.0-only

//! Tracepoints. `pinion_trace.h` declares them; docs/driver.md lists them.
//!
//! One that is off costs a jump that is not taken. On a kernel without CONFIG_TRACEPOINTS there is nothing at all.
//!
//! C header: `include/linux/tracepoint.h`.

/// Declares functions for tracepoints of the same name. (`kernel::declare_trace!` knows those only that the `kernel`
/// crate has bindings for.)
macro_rules! tracepoints {
    ($($(#[$doc:meta])* $name:ident => $point:ident($($argument:ident: $type:ty),*);)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        #[allow(dead_code)]
        pub(crate) fn $name($($argument: $type),*) {
            #[cfg(CONFIG_TRACEPOINTS)]
            kernel::macros::paste! {
                // SAFETY: It is always sound to look at the key of a tracepoint, which is a static of this module.
                let wanted = unsafe {
                    kernel::jump_label::static_branch_unlikely!(
                        $crate::bindings::[<__tracepoint_ $point>],
                        kernel::bindings::tracepoint,
                        key
                    )
                };
                if wanted {
                    // SAFETY: These tracepoints take numbers, and can be called anywhere.
                    unsafe { $crate::bindings::[<rust_do_trace_ $point>]($($argument),*) };
                }
            }
            #[cfg(not(CONFIG_TRACEPOINTS))]
            let _ = ($($argument,)*);
        }
    )* };
}

tracepoints! {
    /// A fault of the GPU is about to be handled.
    fault => pinion_fault(gpu: u32, context: u32, ring: u32, va: u64, length: u64, access: u32, reason: u32);
    /// Pages were migrated to VRAM.
    migrate => pinion_migrate(gpu: u32, context: u32, va: u64, pages: u64);
    /// Pages came home from VRAM.
    migrate_home => pinion_migrate_home(gpu: u32, context: u32, va: u64, pages: u64);
    /// Pages came home from VRAM to make room for others.
    evict => pinion_evict(gpu: u32, context: u32, va: u64, pages: u64);
    /// The GPU's mapping of pages is gone.
    invalidate => pinion_invalidate(gpu: u32, context: u32, va: u64, pages: u64);
    /// Pages were pinned.
    pin => pinion_pin(gpu: u32, context: u32, va: u64, pages: u64);
    /// Pinned pages were given back.
    unpin => pinion_unpin(gpu: u32, context: u32, va: u64, pages: u64);
    /// A submission has gone to the device.
    submit => pinion_submit(gpu: u32, ring: u32, context: u32, sequence: u64, number: u64, commands: u32);
    /// A submission has ended.
    complete => pinion_complete(gpu: u32, ring: u32, context: u32, sequence: u64, number: u64, status: u32);
}
