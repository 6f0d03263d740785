// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Processes that do without a GPU what is compared with what the GPU does.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use pinion_tests::process::{Child, pipe};
use pinion_tests::{Failure, Mapping};

use crate::notifier::{self, Change};

/// A child process that ends with this one.
fn fork(body: impl FnOnce() -> Result<(), Failure>) -> Result<Child, Failure> {
    let body = || {
        // SAFETY: It takes no pointers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        match body() {
            Ok(()) => 0,
            Err(error) => {
                eprintln!(
                    "measure: a process to compare with: {}",
                    pinion_tests::chain(&*error)
                );
                1
            }
        }
    };
    // SAFETY: They are forked before there are threads.
    Ok(unsafe { Child::fork(body) }?)
}

/// An eventfd.
#[derive(Debug)]
pub(crate) struct Event(File);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: It takes no pointers.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: It is new, and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }.into()))
    }

    pub(crate) fn signal(&self) -> io::Result<()> {
        (&self.0).write_all(&1_u64.to_ne_bytes())
    }

    /// Waits. (What bounds this is `turns::watch`.)
    pub(crate) fn wait(&self) -> io::Result<()> {
        (&self.0).read_exact(&mut [0; 8])
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A process that answers each event with another.
#[derive(Debug)]
pub(crate) struct Echo {
    there: Event,
    back: Event,
    _child: Child,
}

impl Echo {
    pub(crate) fn new() -> Result<Self, Failure> {
        let (there, back) = (Event::new()?, Event::new()?);
        let child = fork(|| {
            loop {
                there.wait()?;
                back.signal()?;
            }
        })?;
        Ok(Self {
            there,
            back,
            _child: child,
        })
    }

    pub(crate) fn round_trip(&self) -> io::Result<()> {
        self.there.signal()?;
        self.back.wait()
    }
}

/// A process that has never opened a GPU, and changes its page table when it is told to.
#[derive(Debug)]
pub(crate) struct Plain {
    orders: File,
    results: File,
    _child: Child,
}

impl Plain {
    pub(crate) fn new() -> Result<Self, Failure> {
        let ((mut order, orders), (results, mut result)) = (pipe()?, pipe()?);
        let child = fork(move || {
            let region = notifier::Region::new()?;
            let mut byte = [0];
            loop {
                order.read_exact(&mut byte)?;
                let change = Change::ALL.get(usize::from(byte[0])).ok_or("an unknown order")?;
                let seconds = region.change(*change)?;
                result.write_all(&seconds.to_ne_bytes())?;
            }
        })?;
        Ok(Self {
            orders,
            results,
            _child: child,
        })
    }

    /// Seconds that it has taken.
    pub(crate) fn change(&mut self, change: Change) -> io::Result<f64> {
        self.orders.write_all(&[change as u8])?;
        let mut seconds = [0; 8];
        self.results.read_exact(&mut seconds)?;
        Ok(f64::from_ne_bytes(seconds))
    }
}

/// A process that has a page for itself while it increments a number in it, as the GPU has: it takes away the right to write to it
/// from us, and gives it back when we write to it nevertheless. It does so through userfaultfd.
#[derive(Debug)]
pub(crate) struct Keeper {
    memory: Mapping,
    ask: Event,
    done: Event,
    count: u64,
    _child: Child,
}

impl Keeper {
    pub(crate) fn new() -> Result<Self, Failure> {
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let memory = Mapping::new(None, 1, libc::PROT_READ | libc::PROT_WRITE, shared)?;
        memory.atomic(0).store(0, Ordering::Relaxed);
        let (ask, done) = (Event::new()?, Event::new()?);
        let faults = userfault::Faults::of(&memory)?;
        let child = fork(|| {
            loop {
                match faults.next_or(&ask.0)? {
                    userfault::Next::Fault => faults.protect(&memory, false)?,
                    userfault::Next::Other => {
                        ask.wait()?;
                        faults.protect(&memory, true)?;
                        memory.atomic(0).fetch_add(1, Ordering::Relaxed);
                        done.signal()?;
                    }
                }
            }
        })?;
        Ok(Self {
            memory,
            ask,
            done,
            count: 0,
            _child: child,
        })
    }

    /// Has it increment the number, and then increments it.
    pub(crate) fn cycle(&mut self) -> Result<(), Failure> {
        self.ask.signal()?;
        self.done.wait()?;
        let found = self.memory.atomic(0).fetch_add(1, Ordering::Relaxed);
        self.count += 2;
        if found + 1 != self.count {
            return Err(format!("{} increments of {} with userfaultfd", found + 1, self.count).into());
        }
        Ok(())
    }
}

/// `Documentation/admin-guide/mm/userfaultfd.rst`, as far as it takes to protect a page from being written to.
mod userfault {
    use std::fs::File;
    use std::io::{self, Read as _};
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

    use pinion_client::PAGE_SIZE;
    use pinion_tests::{Failure, Mapping};

    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    const WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
    /// UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_HUGETLBFS_SHMEM.
    const FEATURES: u64 = 1 | 1 << 12;
    const MODE_WP: u64 = 2;
    const MESSAGE: usize = 32;

    /// The faults on a page.
    #[derive(Debug)]
    pub(super) struct Faults(File);

    /// What has come.
    pub(super) enum Next {
        Fault,
        Other,
    }

    impl Faults {
        /// Those of this process.
        pub(super) fn of(memory: &Mapping) -> Result<Self, Failure> {
            // It cannot be polled otherwise.
            let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
            // SAFETY: It takes no pointers.
            let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            if descriptor < 0 {
                return Err(format!("userfaultfd: {}", io::Error::last_os_error()).into());
            }
            // SAFETY: It is new, and nobody else's.
            let this = Self(unsafe { OwnedFd::from_raw_fd(descriptor as i32) }.into());
            // struct uffdio_api, struct uffdio_register
            this.request(API, &mut [0xaa, FEATURES, 0])?;
            let (start, length) = (memory.as_ptr().addr() as u64, memory.len() as u64);
            this.request(REGISTER, &mut [start, length, MODE_WP, 0])?;
            Ok(this)
        }

        /// Waits for a fault, or until something can be read from the other.
        pub(super) fn next_or(&self, other: &File) -> io::Result<Next> {
            let mut both = [self.0.as_raw_fd(), other.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: There are two. This process ends with its parent.
            if unsafe { libc::poll(both.as_mut_ptr(), 2, -1) } < 0 {
                return Err(io::Error::last_os_error());
            }
            if both[0].revents == 0 {
                return Ok(Next::Other);
            }
            (&self.0).read_exact(&mut [0; MESSAGE])?;
            Ok(Next::Fault)
        }

        /// Takes away the right to write to the page, or gives it back and lets go on who waits for that.
        pub(super) fn protect(&self, memory: &Mapping, protected: bool) -> Result<(), Failure> {
            // struct uffdio_writeprotect
            let start = memory.as_ptr().addr() as u64;
            self.request(WRITEPROTECT, &mut [start, PAGE_SIZE as u64, protected.into()])
        }

        fn request<const N: usize>(
            &self,
            request: libc::c_ulong,
            argument: &mut [u64; N],
        ) -> Result<(), Failure> {
            // SAFETY: The argument is as long as the request says, which has its size in it.
            if unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, argument.as_mut_ptr()) } != 0 {
                return Err(format!(
                    "userfaultfd, request {request:#x}: {}",
                    io::Error::last_os_error()
                )
                .into());
            }
            Ok(())
        }
    }
}
