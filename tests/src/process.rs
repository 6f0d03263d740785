// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Child processes that share the parent's memory as of the fork.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// A pipe: the end to read from and the end to write to.
///
/// # Errors
///
/// What the system says.
pub fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: There is room for two.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: Both are new, and nobody else's.
    let ends = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    let [reader, writer] = ends.map(File::from);
    Ok((reader, writer))
}

/// Waits until there is something to read, or the other end is closed. Says whether so within that time.
///
/// # Errors
///
/// What the system says.
pub fn wait_readable(file: &File, timeout: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: One entry is there.
    match unsafe { libc::poll(&raw mut entry, 1, milliseconds) } {
        -1 => Err(io::Error::last_os_error()),
        ready => Ok(ready > 0),
    }
}

/// A child process. It is killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    reaped: bool,
}

impl Child {
    /// Forks. The child runs `body` and ends with the status that it returns.
    ///
    /// # Errors
    ///
    /// What the system says.
    ///
    /// # Safety
    ///
    /// The process must have a single thread.
    pub unsafe fn fork(body: impl FnOnce() -> i32) -> io::Result<Self> {
        // SAFETY: There is no other thread that could hold a lock.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
                // SAFETY: Nothing of the parent is to run in the child.
                unsafe { libc::_exit(status) }
            }
            pid => Ok(Self { pid, reaped: false }),
        }
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        if !self.reaped {
            // SAFETY: It is our child, and not reaped yet, so the number is still its own.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
    }

    /// Waits for its end: the exit status, or minus the signal that killed it.
    ///
    /// # Errors
    ///
    /// What the system says, or that it has not ended in time.
    pub fn wait(self, timeout: Duration) -> io::Result<i32> {
        self.wait_or_keep(timeout)?.map_err(|child| {
            let pid = child.pid;
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("child {pid} has not ended within {timeout:?}"),
            )
        })
    }

    /// The same; a child that has not ended in time is handed back.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn wait_or_keep(mut self, timeout: Duration) -> io::Result<Result<i32, Self>> {
        let deadline = Instant::now() + timeout;
        let mut status = 0;
        loop {
            // SAFETY: The status is a valid place.
            match unsafe { libc::waitpid(self.pid, &raw mut status, libc::WNOHANG) } {
                0 if Instant::now() > deadline => return Ok(Err(self)),
                0 => std::thread::sleep(Duration::from_millis(2)),
                -1 => return Err(io::Error::last_os_error()),
                _ => break,
            }
        }
        self.reaped = true;
        Ok(Ok(if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            -libc::WTERMSIG(status)
        }))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        if !self.reaped {
            // SAFETY: It is our child. A null status is allowed. It may be stuck in the kernel, so this does not wait.
            unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::WNOHANG) };
        }
    }
}
