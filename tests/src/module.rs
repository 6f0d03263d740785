// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver's module: how it is taken out of the kernel, and put in again.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// Where `qemu-scripts/run` puts it.
pub const FILE: &str = "/pinion/pinion.ko";

/// Takes the module out if nothing uses it.
///
/// # Errors
///
/// What the system says: EBUSY or EAGAIN if something does.
pub fn unload() -> io::Result<()> {
    // SAFETY: A valid name. Nothing is taken out that is in use.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, c"pinion".as_ptr(), libc::O_NONBLOCK) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Loads it.
///
/// # Errors
///
/// What the system says.
pub fn load(module: &File) -> io::Result<()> {
    // SAFETY: A valid file and no parameters.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
