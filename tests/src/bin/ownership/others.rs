// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Other processes that look into the memory.

use std::fs::File;
use std::io::{Read as _, Write as _};

use pinion_tests::process::{Child, pipe};
use pinion_tests::{Failure, Mapping, ensure_eq, patiently};

use crate::cell::{Body, Cell, Outcome, compare};

pub(crate) const EVENTS: &[(&str, Body)] = &[("process-vm-readv", process_vm_readv), ("ptrace", ptrace)];

/// A child that does something when it is told to.
pub(crate) struct Helper {
    child: Child,
    go: File,
}

impl Helper {
    /// Forks it. It has the memory as of now.
    pub(crate) fn new(body: impl FnOnce() -> Result<(), Failure>) -> Result<Self, Failure> {
        let (mut reader, writer) = pipe()?;
        let body = || {
            let done = reader
                .read_exact(&mut [0])
                .map_err(Failure::from)
                .and_then(|()| body());
            match done {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("in the child: {}", pinion_tests::chain(&*error));
                    1
                }
            }
        };
        // SAFETY: A cell has a process of its own, with one thread.
        let child = unsafe { Child::fork(body) }?;
        Ok(Self { child, go: writer })
    }

    /// Has it do that, which must succeed.
    pub(crate) fn act(mut self) -> Result<(), Failure> {
        self.go.write_all(&[1])?;
        let status = self.child.wait(patiently(std::time::Duration::from_secs(15)))?;
        ensure_eq!(status, 0, "status of the child");
        Ok(())
    }
}

/// What another process finds at an address of the process `pid`.
fn words_of(pid: i32, memory: &Mapping) -> Result<Vec<u64>, Failure> {
    let mut words = vec![0_u64; memory.len() / 8];
    let local = libc::iovec {
        iov_base: words.as_mut_ptr().cast(),
        iov_len: memory.len(),
    };
    let remote = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: memory.len(),
    };
    // SAFETY: There is room for that.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    ensure_eq!(
        read,
        memory.len() as isize,
        "bytes that process_vm_readv has read"
    );
    Ok(words)
}

fn process_vm_readv(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let memory = cell.memory()?;
    let pid = std::process::id() as i32;
    // Before the memory is in its state, which forking would change.
    let helper = Helper::new(|| compare(&words_of(pid, &memory)?, &cell.content(), "another process"))?;
    let subject = cell.enter_at(memory)?;
    helper.act()?;
    subject.finish()
}

/// A request of ptrace with two numbers, of which the system wants to know no more.
fn trace(request: libc::c_uint, pid: i32, address: usize, data: u64) -> std::io::Result<i64> {
    // SAFETY: None of the requests that are made writes to this process's memory.
    let result = unsafe { libc::ptrace(request, pid, address, data) };
    // A number that was read may be -1, but not one of those here.
    if result == -1 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(result)
}

/// Stops a process, looks at a number, changes it, and lets the process go on.
fn peek_and_poke(pid: i32, address: usize, expected: u64, new: u64) -> Result<(), Failure> {
    trace(libc::PTRACE_ATTACH, pid, 0, 0)?;
    let mut status = 0;
    // SAFETY: The status is a valid place.
    let stopped = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    ensure_eq!(stopped, pid, "who has stopped");
    let found = trace(libc::PTRACE_PEEKDATA, pid, address, 0)? as u64;
    trace(libc::PTRACE_POKEDATA, pid, address, new)?;
    trace(libc::PTRACE_DETACH, pid, 0, 0)?;
    ensure_eq!(found, expected, "what the tracer reads");
    Ok(())
}

fn ptrace(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let memory = cell.memory()?;
    let pid = std::process::id() as i32;
    let target = cell.pages() / 3 * 4096;
    let address = memory.at(target).addr();
    let content = cell.content();
    let helper = Helper::new(|| peek_and_poke(pid, address, content[target / 8], 4711))?;
    let mut subject = cell.enter_at(memory)?;
    helper.act()?;
    *subject.number() = 4711;
    subject.finish()
}
