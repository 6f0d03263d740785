// SPDX-License-Identifier: GPL-2.0-only

//! A misc device whose open function knows which device was opened.
//!
//! The `kernel` crate's `MiscDeviceRegistration` has neither data of its own nor a mode; this adds both around
//! the same file operations.
//!
//! C header: `include/linux/miscdevice.h`.

use kernel::{
    bindings,
    error::to_result,
    miscdevice::{MiscDevice, MiscDeviceOptions, MiscDeviceRegistration},
    prelude::*,
    str::CString,
    types::Opaque,
};

/// A registered character device with data of type `D`, opened as `T`.
///
/// # Invariants
///
/// `inner` is registered with the file operations of `T`, and is always part of a `CharDevice<T, D>`.
#[pin_data(PinnedDrop)]
pub(crate) struct CharDevice<T: MiscDevice, D: Send + Sync> {
    #[pin]
    inner: Opaque<bindings::miscdevice>,
    data: D,
    /// Used by `inner`.
    name: CString,
    _file: core::marker::PhantomData<T>,
}

// SAFETY: Registration and deregistration may be done from any thread.
unsafe impl<T: MiscDevice, D: Send + Sync> Send for CharDevice<T, D> {}
// SAFETY: As above; `data` is `Sync`.
unsafe impl<T: MiscDevice, D: Send + Sync> Sync for CharDevice<T, D> {}

impl<T: MiscDevice, D: Send + Sync> CharDevice<T, D> {
    /// Registers `/dev/NAME`, which files of the given mode are opened on.
    pub(crate) fn new(name: CString, mode: u16, data: D) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            data,
            name,
            _file: core::marker::PhantomData,
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut device = MiscDeviceOptions { name: c"pinion" }.into_raw::<T>();
                device.mode = mode;
                // SAFETY: `this.name` has been initialised above, and lives as long as the registration.
                device.name = unsafe { (*this.as_ptr()).name.as_char_ptr() };
                // SAFETY: `slot` is valid for writes, stays in place, and is deregistered in `drop`.
                to_result(unsafe {
                    slot.write(device);
                    bindings::misc_register(slot)
                })
            }),
        })
    }

    /// The data of the device that `device` stands for.
    ///
    /// # Safety
    ///
    /// `device` must be the one passed to `T::open`, and `T` be registered by `CharDevice<T, D>` only.
    pub(crate) unsafe fn data_of(device: &MiscDeviceRegistration<T>) -> &D {
        let inner = Opaque::cast_from(device.as_raw().cast_const());
        // SAFETY: By the contract and the type invariants, `device` is the field `inner` of a `CharDevice`,
        // which is not deregistered while `open` runs.
        unsafe { &(*kernel::container_of!(inner.cast_mut(), Self, inner)).data }
    }
}

#[pinned_drop]
impl<T: MiscDevice, D: Send + Sync> PinnedDrop for CharDevice<T, D> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered by the type invariant.
        unsafe { bindings::misc_deregister(self.inner.get()) };
    }
}

/// Whether the calling process has CAP_SYS_ADMIN.
pub(crate) fn caller_is_administrator() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as c_int) }
}
