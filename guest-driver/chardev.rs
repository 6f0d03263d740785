// SPDX-License-Identifier: GPL-2.0-only

//! A misc device whose open function knows which device was opened.
//!
//! The `kernel` crate's `MiscDeviceRegistration` has neither data of its own nor a mode, and its files cannot be
//! polled; this adds these around the same file operations.
//!
//! C header: `include/linux/miscdevice.h`.

use crate::bindings as c;
use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    fs::{File, Kiocb},
    miscdevice::{MiscDevice, MiscDeviceOptions, MiscDeviceRegistration},
    prelude::*,
    str::CString,
    sync::poll::PollTable,
    types::{ForeignOwnable, Opaque},
};

/// A file on which `poll` works.
pub(crate) trait Poll: MiscDevice {
    /// Registers the caller with what it may wait for, and says what is ready: `POLLIN` and so on.
    fn poll(device: <Self::Ptr as ForeignOwnable>::Borrowed<'_>, file: &File, table: PollTable<'_>) -> u32;
}

/// The `kernel` crate's file operations of a misc device, and `poll`.
struct Operations<T: Poll>(PhantomData<T>);

impl<T: Poll> Operations<T> {
    const TABLE: bindings::file_operations = bindings::file_operations {
        poll: Some(Self::poll),
        // SAFETY: The `kernel` crate makes this a pointer to a constant.
        ..unsafe { *MiscDeviceOptions { name: c"" }.into_raw::<T>().fops }
    };

    /// # Safety
    ///
    /// To be called by the kernel, with a file whose private data is a `T::Ptr`.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table,
    ) -> bindings::__poll_t {
        // SAFETY: The kernel does not release the file while it polls.
        let device = unsafe { <T::Ptr as ForeignOwnable>::borrow((*file).private_data) };
        // SAFETY: The file is valid during the call, and nobody relies on its position.
        let file = unsafe { File::from_raw_file(file) };
        // SAFETY: Null, or valid during the call.
        let table = unsafe { PollTable::from_raw(table) };
        T::poll(device, file, table)
    }
}

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
    _file: PhantomData<T>,
}

// SAFETY: Registration and deregistration may be done from any thread.
unsafe impl<T: MiscDevice, D: Send + Sync> Send for CharDevice<T, D> {}
// SAFETY: As above; `data` is `Sync`.
unsafe impl<T: MiscDevice, D: Send + Sync> Sync for CharDevice<T, D> {}

impl<T: Poll, D: Send + Sync> CharDevice<T, D> {
    /// As [`Self::new`], for files on which `poll` works.
    pub(crate) fn with_poll(name: CString, mode: u16, data: D) -> impl PinInit<Self, Error> {
        Self::register(name, mode, data, Some(&Operations::<T>::TABLE))
    }
}

impl<T: MiscDevice, D: Send + Sync> CharDevice<T, D> {
    /// Registers `/dev/NAME`, a node with permissions `mode`, which is opened as a `T`.
    pub(crate) fn new(name: CString, mode: u16, data: D) -> impl PinInit<Self, Error> {
        Self::register(name, mode, data, None)
    }

    /// `operations` are those of `T`, with others that it has besides.
    fn register(
        name: CString,
        mode: u16,
        data: D,
        operations: Option<&'static bindings::file_operations>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            data,
            name,
            _file: PhantomData,
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut device = MiscDeviceOptions { name: c"pinion" }.into_raw::<T>();
                if let Some(operations) = operations {
                    device.fops = operations;
                }
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

/// Whether somebody who reads from or writes to a file does not want to wait.
pub(crate) fn is_nonblocking<T: ForeignOwnable>(kiocb: &Kiocb<'_, T>) -> bool {
    // SAFETY: The request, and its file, are valid as long as the reference. The flags may change at any time.
    let (flags, file_flags) = unsafe {
        let kiocb = kiocb.as_raw();
        (
            (*kiocb).ki_flags,
            (&raw const (*(*kiocb).ki_filp).f_flags).read_volatile(),
        )
    };
    flags & c::PINION_IOCB_NOWAIT != 0 || file_flags & kernel::fs::file::flags::O_NONBLOCK != 0
}

/// Whether limits of resources do not hold for the calling process (CAP_SYS_RESOURCE).
pub(crate) fn caller_may_exceed_limits() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::capable(bindings::CAP_SYS_RESOURCE as c_int) }
}

/// Whether the calling process has CAP_SYS_ADMIN.
pub(crate) fn caller_is_administrator() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as c_int) }
}
