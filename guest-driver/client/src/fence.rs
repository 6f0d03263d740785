// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends of work as file descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The end of a submission, as a file descriptor.
///
/// It can be waited for, together with others by `poll`, `epoll` and what is built upon them; it can be passed to another
/// process; and work of any file on any device can be made to wait for it ([`Submit::after_fence`](crate::Submit::after_fence)).
#[derive(Debug)]
pub struct Fence(OwnedFd);

impl Fence {
    /// Has it passed?
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn has_passed(&self) -> io::Result<bool> {
        self.wait(Duration::ZERO)
    }

    /// Waits until it has passed; returns whether it has by the time.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        wait_readable(self.as_fd(), timeout)
    }
}

impl From<OwnedFd> for Fence {
    /// Of a descriptor that was passed on. Whether it is one of a fence shows when it is used.
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl From<Fence> for OwnedFd {
    fn from(fence: Fence) -> Self {
        fence.0
    }
}

impl AsFd for Fence {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until a descriptor is readable; returns whether it is by the time.
pub(crate) fn wait_readable(descriptor: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let left = deadline.map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut poll = libc::pollfd {
            fd: descriptor.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: There is one structure.
        match unsafe { libc::poll(&raw mut poll, 1, left) } {
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            0 => return Ok(false),
            _ if poll.revents & libc::POLLIN != 0 => return Ok(true),
            _ => return Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }
}
