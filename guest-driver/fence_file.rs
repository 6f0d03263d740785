// SPDX-License-Identifier: GPL-2.0-only

//! Fences as file descriptors, which programs can poll, pass on, and have work of another file or device wait for.
//!
//! C header: `include/linux/anon_inodes.h`.

use crate::{bindings as c, ring::Fence};
use core::ptr;
use kernel::{
    bindings,
    error::from_err_ptr,
    fs::{File, LocalFile},
    module::this_module,
    prelude::*,
    sync::{aref::ARef, poll::PollTable, Arc, ArcBorrow, SetOnce},
    types::ForeignOwnable,
};

/// The file operations of fences. There is nothing to be read; what a fence is good for is waiting.
struct Operations(bindings::file_operations);

// SAFETY: Nobody writes to it, and what it points to lives as long as the module.
unsafe impl Sync for Operations {}

/// A static, since its address is what tells that a file is a fence.
static OPERATIONS: Operations = Operations(bindings::file_operations {
    owner: this_module::<crate::LocalModule>().as_ptr(),
    release: Some(release),
    poll: Some(poll),
    ..pin_init::zeroed()
});

/// What is behind such a file. Nobody else has the file before the fence is there.
type Private = Arc<SetOnce<Fence>>;

/// A file for a fence that is still to come: whatever can fail has been done.
pub(crate) struct FenceFile {
    file: ARef<File>,
    fence: Private,
}

impl FenceFile {
    /// Makes the file.
    pub(crate) fn new() -> Result<Self> {
        let fence = Arc::new(SetOnce::new(), GFP_KERNEL)?;
        let file = new(fence.clone())?;
        Ok(Self { file, fence })
    }

    /// The file, which stands for `fence` from now on.
    pub(crate) fn of(self, fence: Fence) -> ARef<File> {
        self.fence.populate(fence);
        self.file
    }
}

fn new(private: Private) -> Result<ARef<File>> {
    let private = private.into_foreign();
    // SAFETY: The operations live as long as the module, to which the file takes a reference; they take the private
    // data for what it is.
    let file = unsafe {
        c::anon_inode_getfile(
            c"[pinion-fence]".as_char_ptr(),
            &raw const OPERATIONS.0,
            private,
            bindings::O_RDONLY as c_int,
        )
    };
    match from_err_ptr(file).and_then(|file| ptr::NonNull::new(file).ok_or(ENOMEM)) {
        // SAFETY: The file is new, and this is the one reference to it. Nobody is using its position. `File` is
        // transparent.
        Ok(file) => Ok(unsafe { ARef::from_raw(file.cast::<File>()) }),
        Err(error) => {
            // SAFETY: There is no file that would own it.
            drop(unsafe { Private::from_foreign(private) });
            Err(error)
        }
    }
}

/// The fence behind a descriptor of the current process.
///
/// # Errors
///
/// EBADF: no descriptor. EINVAL: not one of a fence.
pub(crate) fn get(descriptor: u32) -> Result<Fence> {
    let file = LocalFile::fget(descriptor)?;
    // SAFETY: The file is valid, and its operations never change.
    let operations = unsafe { (*file.as_ptr()).f_op };
    if !ptr::eq(operations, &raw const OPERATIONS.0) {
        return Err(EINVAL);
    }
    // SAFETY: A file with these operations was made by `new`, and is not released while we have a reference to it.
    let fence: ArcBorrow<'_, SetOnce<Fence>> = unsafe { Arc::borrow((*file.as_ptr()).private_data) };
    fence.as_ref().cloned().ok_or(EINVAL)
}

/// # Safety
///
/// To be called by the kernel, with a file that was made by `new`, once.
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `new` has put it there, and nobody uses it any more.
    drop(unsafe { Private::from_foreign((*file).private_data) });
    0
}

/// # Safety
///
/// To be called by the kernel, with a file that was made by `new`.
unsafe extern "C" fn poll(file: *mut bindings::file, table: *mut bindings::poll_table) -> bindings::__poll_t {
    // SAFETY: `new` has put it there, and it stays until `release`.
    let fence: ArcBorrow<'_, SetOnce<Fence>> = unsafe { Arc::borrow((*file).private_data) };
    // SAFETY: The kernel has a reference to the file, whose position nobody uses.
    let file = unsafe { File::from_raw_file(file) };
    // SAFETY: Null, or valid during the call.
    let table = unsafe { PollTable::from_raw(table) };
    fence
        .as_ref()
        .map_or(0, |fence| fence.timeline.poll(fence.sequence, file, table))
}
