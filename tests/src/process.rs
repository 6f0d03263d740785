// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Child processes that share the parent's memory as of the fork.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
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
    pub fn wait(mut self, timeout: Duration) -> io::Result<i32> {
        let deadline = Instant::now() + timeout;
        let mut status = 0;
        loop {
            // SAFETY: The status is a valid place.
            match unsafe { libc::waitpid(self.pid, &raw mut status, libc::WNOHANG) } {
                0 if Instant::now() > deadline => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("child {} has not ended within {timeout:?}", self.pid),
                    ));
                }
                0 => std::thread::sleep(Duration::from_millis(2)),
                -1 => return Err(io::Error::last_os_error()),
                _ => break,
            }
        }
        self.reaped = true;
        Ok(if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            -libc::WTERMSIG(status)
        })
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
