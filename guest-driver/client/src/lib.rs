// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A small interface to `/dev/pinionN`, the Pinion virtual GPU.
//!
//! A [`Gpu`] is one address space of the GPU. It mirrors that of the process that opened it: a pointer
//! means the same to both, and there is no memory to allocate, to register or to copy. Work is a batch of
//! [`Command`]s; it is [submitted](Gpu::submit) and later [waited for](Gpu::wait).
//!
//! ```no_run
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use std::time::Duration;
//! use pinion_client::{Command, Gpu};
//!
//! let gpu = Gpu::open("/dev/pinion0")?;
//! let counter = AtomicU64::new(0);
//! // SAFETY: The counter is an atomic, and outlives the wait below.
//! let work = unsafe { gpu.submit(0, &[Command::atomic_add(counter.as_ptr(), 1).repeat(100)])? };
//! counter.fetch_add(1, Ordering::Relaxed);
//! assert!(gpu.wait(work, Duration::from_secs(1))?.is_ok());
//! assert_eq!(counter.load(Ordering::Relaxed), 101);
//! # Ok::<_, pinion_client::Error>(())
//! ```
//!
//! # What is safe
//!
//! The GPU reads and writes memory of the process behind the compiler's back, while the process runs. That cannot be
//! checked here, so [`Gpu::submit`] is unsafe, and says what must hold. It is the only unsafe function
//! outside [`uapi`].

mod command;
mod error;
pub mod uapi;

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use command::{AtomicWord, Command, Operation, Word};
pub use error::{Error, Result};

/// Size of a page of the GPU in bytes.
pub const PAGE_SIZE: usize = 4096;

/// An open GPU, with an address space of its own.
///
/// All methods can be called by many threads at a time. Only the process that opened it can use it: a child
/// gets `EPERM`. When it is dropped, work that is still queued ends.
#[derive(Debug)]
pub struct Gpu {
    file: File,
}

/// How the driver keeps a page pinned in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinMethod {
    /// Through `MIGRATE_PFN_PIN` and `MIGRATE_PFN_UNPIN`, which the kernel has.
    MigratePfn,
    /// By taking over the reference to the page, on a kernel without them.
    Takeover,
}

/// What a device and its driver can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Version of the interface.
    pub version: u32,
    /// Number of command rings.
    pub rings: u32,
    /// Most commands in one submission.
    pub max_batch: u32,
    /// How pages are pinned.
    pub pin_method: PinMethod,
    /// Bytes of device memory.
    pub vram_size: u64,
}

/// Work that has been submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Submission {
    /// The ring that it is on.
    pub ring: u32,
    /// Its number on that ring, from 1. Work on a ring ends in the order of these.
    pub sequence: u64,
}

/// How work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// All of it was done.
    Ok,
    /// The device found a command malformed.
    Invalid,
    /// The device does not know a command or an operation.
    Unsupported,
    /// An address is outside the address space.
    BadAddress,
    /// A page table entry led nowhere: an error of the driver.
    BusError,
    /// Earlier work of the same [`Gpu`] has failed.
    ContextError,
    /// The process could not have made the access either.
    Fault,
    /// The device has gone, or does not answer.
    DeviceLost,
    /// The GPU cannot get the exclusive access that an atomic operation needs: the memory is file-backed or shared, or
    /// somebody else has pinned it.
    NotExclusive,
    /// There is no memory for the page, or for what the driver and the device have to remember of it.
    NoMemory,
}

/// The end of a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[must_use]
pub struct Completion {
    /// How it ended.
    pub status: Status,
    /// If it failed: how many commands were executed to their end.
    pub executed: u32,
    /// Where the command after them failed, or zero.
    pub fault_address: u64,
    /// How many repeats of it were done.
    pub repeats: u64,
}

impl Completion {
    /// Was all of it done?
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.status == Status::Ok
    }
}

/// How the GPU gets exclusive access to a page of system memory for its atomic operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Atomics {
    /// The page is pinned in place, and the CPU gets it back when it touches it. This is the default.
    Pin = uapi::ATOMICS_PIN,
    /// Not at all: updates get lost when the CPU updates the same memory. For demonstration.
    Unprotected = uapi::ATOMICS_UNPROTECTED,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// The GPU does not know it.
    Cpu,
    /// The CPU and the GPU may both access it.
    Mirrored,
    /// It is pinned in place for the GPU; the CPU cannot access it.
    Pinned,
}

/// What the GPU may do with a page at the moment without asking the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rights {
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Atomic operations.
    pub atomic: bool,
}

/// The GPU's view of a page of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page {
    /// Where it is.
    pub state: PageState,
    /// What the GPU may do with it.
    pub rights: Rights,
    /// The page frame number of the pinned page, for a caller with CAP_SYS_ADMIN.
    pub pfn: Option<u64>,
}

/// What has happened since a [`Gpu`] was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Faults that the device has reported.
    pub faults: u64,
    /// Pages that were pinned.
    pub pins: u64,
    /// Pinned pages that were given back.
    pub unpins: u64,
    /// Pages that were mapped for the GPU without being pinned.
    pub mirrors: u64,
    /// Invalidations that the device was asked for.
    pub invalidations: u64,
    /// Submissions.
    pub submissions: u64,
}

impl Statistics {
    /// Reads the statistics from the text of an fdinfo file. What it does not know it skips.
    fn parse(text: &str) -> Self {
        let mut statistics = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.strip_prefix("pinion-").and_then(|rest| rest.split_once(':'))
            else {
                continue;
            };
            let field = match name {
                "faults" => &mut statistics.faults,
                "pins" => &mut statistics.pins,
                "unpins" => &mut statistics.unpins,
                "mirrors" => &mut statistics.mirrors,
                "invalidations" => &mut statistics.invalidations,
                "submissions" => &mut statistics.submissions,
                _ => continue,
            };
            if let Ok(value) = value.trim().parse() {
                *field = value;
            }
        }
        statistics
    }
}

impl Gpu {
    /// Opens a GPU, usually `/dev/pinion0`.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], with what the system says.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Self { file }),
            Err(source) => Err(Error::Open {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// What the device and the driver can do.
    ///
    /// # Errors
    ///
    /// The driver may refuse, for example because another process has opened the file.
    pub fn info(&self) -> Result<Info> {
        let mut raw: uapi::Info = uapi::Argument::new();
        // SAFETY: It points to nothing.
        unsafe { self.request(&mut raw, String::new) }?;
        Ok(Info {
            version: raw.version,
            rings: raw.rings,
            max_batch: raw.max_batch,
            pin_method: match raw.pin_method {
                uapi::PIN_METHOD_MIGRATE_PFN => PinMethod::MigratePfn,
                uapi::PIN_METHOD_TAKEOVER => PinMethod::Takeover,
                value => {
                    return Err(Error::Unknown {
                        what: "pin method",
                        value,
                    });
                }
            },
            vram_size: raw.vram_size,
        })
    }

    /// Queues a batch of commands on a ring. They run later, and in order.
    ///
    /// # Errors
    ///
    /// The driver refuses a ring that is not there, an empty batch, and one that is longer than
    /// [`Info::max_batch`]. Commands that are malformed are found by the device: see
    /// [`Completion::status`].
    ///
    /// # Safety
    ///
    /// From this call until [`wait`](Self::wait) has told of the end of the work, or the [`Gpu`] was closed, the GPU
    /// reads and writes memory as the commands say, as if another thread of the process did. So:
    ///
    /// - Memory that the GPU writes to must be the caller's to write to. It must not be covered by a reference other
    ///   than to an atomic or to an `UnsafeCell`, and must not be freed.
    /// - Memory that the GPU reads must not change at the same time unless it is accessed with
    ///   atomic or volatile operations.
    ///
    /// Addresses at which there is no memory are no concern: the work ends with [`Status::Fault`].
    pub unsafe fn submit(&self, ring: u32, commands: &[Command]) -> Result<Submission> {
        let count = u32::try_from(commands.len()).unwrap_or(u32::MAX);
        let mut raw = uapi::Submit {
            ring,
            count,
            commands: commands.as_ptr().addr() as u64,
            ..uapi::Argument::new()
        };
        // SAFETY: There are that many commands at that address. The caller answers for what they do.
        unsafe { self.request(&mut raw, || format!("{count} commands on ring {ring}")) }?;
        Ok(Submission {
            ring,
            sequence: raw.sequence,
        })
    }

    /// Waits until a submission, and with it all before it on that ring, has ended.
    ///
    /// # Errors
    ///
    /// `ETIMEDOUT` when the time is over (see [`Error::is_timeout`]), `EINTR` when a signal came first. Both leave
    /// the work as it is. That work has failed is not an error here.
    pub fn wait(&self, work: Submission, timeout: Duration) -> Result<Completion> {
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let mut raw = uapi::Wait {
            ring: work.ring,
            sequence: work.sequence,
            timeout_ns,
            ..uapi::Argument::new()
        };
        let what = || {
            format!(
                "submission {} on ring {}, {timeout:?} at most",
                work.sequence, work.ring
            )
        };
        // SAFETY: It points to nothing.
        unsafe { self.request(&mut raw, what) }?;
        let status = match raw.status {
            uapi::STATUS_OK => Status::Ok,
            uapi::STATUS_INVALID => Status::Invalid,
            uapi::STATUS_UNSUPPORTED => Status::Unsupported,
            uapi::STATUS_BAD_ADDRESS => Status::BadAddress,
            uapi::STATUS_BUS_ERROR => Status::BusError,
            uapi::STATUS_CONTEXT_ERROR => Status::ContextError,
            uapi::STATUS_FAULT => Status::Fault,
            uapi::STATUS_DEVICE_LOST => Status::DeviceLost,
            uapi::STATUS_NOT_EXCLUSIVE => Status::NotExclusive,
            uapi::STATUS_NO_MEMORY => Status::NoMemory,
            value => {
                return Err(Error::Unknown {
                    what: "status",
                    value,
                });
            }
        };
        Ok(Completion {
            status,
            executed: raw.executed,
            fault_address: raw.fault_address,
            repeats: raw.repeats,
        })
    }

    /// Says how the GPU is to get exclusive access to the pages from `start`, which is page-aligned, for
    /// `length` bytes, a multiple of the page size.
    ///
    /// # Errors
    ///
    /// The driver refuses a range that is not aligned, or not in the address space.
    pub fn advise_atomics<T>(&self, start: *const T, length: usize, how: Atomics) -> Result<()> {
        let mut raw = uapi::Advise {
            address: start.addr() as u64,
            length: length as u64,
            advice: uapi::ADVISE_ATOMICS,
            value: how as u32,
            ..uapi::Argument::new()
        };
        // SAFETY: The driver does not access the range.
        unsafe { self.request(&mut raw, || format!("{how:?} for {length:#x} bytes at {start:p}")) }
    }

    /// The GPU's view of the pages that hold the `length` bytes from `start`.
    ///
    /// It may be out of date when the call returns. The pages of a long range are not looked at all at once.
    ///
    /// # Errors
    ///
    /// The driver refuses a range that is not in the address space.
    pub fn query<T>(&self, start: *const T, length: usize) -> Result<Vec<Page>> {
        let first = start.addr() / PAGE_SIZE;
        let end = start.addr().saturating_add(length).div_ceil(PAGE_SIZE);
        let mut raw = vec![uapi::Page::default(); end.saturating_sub(first)];
        for (index, part) in raw.chunks_mut(uapi::QUERY_MAX).enumerate() {
            let address = ((first + index * uapi::QUERY_MAX) * PAGE_SIZE) as u64;
            let count = part.len() as u64;
            let mut query = uapi::Query {
                address,
                count,
                pages: part.as_mut_ptr().addr() as u64,
                ..uapi::Argument::new()
            };
            // SAFETY: There is room for that many pages at that address.
            unsafe { self.request(&mut query, || format!("{count} pages at {address:#x}")) }?;
        }
        raw.iter().map(Page::from_raw).collect()
    }

    /// What has happened since this was opened.
    ///
    /// # Errors
    ///
    /// [`Error::Statistics`] if `/proc` cannot be read.
    pub fn statistics(&self) -> Result<Statistics> {
        let path = PathBuf::from(format!("/proc/self/fdinfo/{}", self.file.as_raw_fd()));
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Statistics::parse(&text)),
            Err(source) => Err(Error::Statistics { path, source }),
        }
    }

    /// # Safety
    ///
    /// As for [`uapi::ioctl`].
    unsafe fn request<T: uapi::Argument>(
        &self,
        argument: &mut T,
        what: impl FnOnce() -> String,
    ) -> Result<()> {
        // SAFETY: Passed on to the caller.
        unsafe { uapi::ioctl(self.as_fd(), argument) }.map_err(|source| Error::Request {
            request: T::NAME,
            what: what(),
            source,
        })
    }
}

impl AsFd for Gpu {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Page {
    fn from_raw(raw: &uapi::Page) -> Result<Self> {
        Ok(Self {
            state: match raw.state {
                uapi::PAGE_CPU => PageState::Cpu,
                uapi::PAGE_MIRRORED => PageState::Mirrored,
                uapi::PAGE_PINNED => PageState::Pinned,
                value => {
                    return Err(Error::Unknown {
                        what: "page state",
                        value,
                    });
                }
            },
            rights: Rights {
                read: raw.rights & uapi::RIGHT_READ != 0,
                write: raw.rights & uapi::RIGHT_WRITE != 0,
                atomic: raw.rights & uapi::RIGHT_ATOMIC != 0,
            },
            pfn: (raw.pfn != 0).then_some(raw.pfn),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_an_fdinfo_file() {
        let text = "pos:\t0\nflags:\t0100002\npinion-faults:\t12\npinion-pins:\t3\npinion-unpins:\t2\n\
                    pinion-mirrors:\t5\npinion-invalidations:\t7\npinion-submissions:\t4\npinion-later:\t9\n";
        let expected = Statistics {
            faults: 12,
            pins: 3,
            unpins: 2,
            mirrors: 5,
            invalidations: 7,
            submissions: 4,
        };
        assert_eq!(Statistics::parse(text), expected);
    }

    #[test]
    fn a_missing_device_is_named() {
        let error = Gpu::open("/nowhere/pinion0").unwrap_err();
        assert_eq!(error.to_string(), "cannot open /nowhere/pinion0");
        assert_eq!(error.errno(), Some(libc::ENOENT));
    }

    #[test]
    fn a_refused_request_says_what_was_asked_for() {
        let gpu = Gpu {
            file: File::open("/dev/null").unwrap(),
        };
        let error = gpu
            .wait(Submission { ring: 3, sequence: 4 }, Duration::from_millis(5))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "PINION_IOCTL_WAIT failed: submission 4 on ring 3, 5ms at most"
        );
        assert_eq!(error.errno(), Some(libc::ENOTTY));
    }
}
