// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An open GPU.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{
    Atomics, Batch, Command, Completion, Error, Fence, Location, PAGE_SIZE, Page, Result, Statistics,
    Submission, Submit, Submitted, fence, uapi,
};

/// An open GPU, with an address space of its own.
///
/// All methods can be called by many threads at a time. Only the process that opened it can use it: a child
/// gets `EPERM`. When it is dropped, work that is still queued ends.
///
/// Its descriptor can be polled: it is readable when work has ended since [`ended`](Self::ended) was last called.
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Bytes of it that the CPU can access too.
    pub aperture_size: u64,
    /// Most submissions of a [`Gpu`] that have not ended.
    pub max_submissions: u32,
    /// Most commands in these.
    pub max_commands: u32,
    /// How the GPU can get exclusive access to pages.
    pub atomics: Vec<Atomics>,
    /// Where pages can be.
    pub locations: Vec<Location>,
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
    /// The driver may refuse.
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
            aperture_size: raw.aperture_size,
            max_submissions: raw.max_submissions,
            max_commands: raw.max_commands,
            atomics: Atomics::ALL
                .into_iter()
                .filter(|how| raw.atomics & 1 << *how as u32 != 0)
                .collect(),
            locations: Location::ALL
                .into_iter()
                .filter(|place| raw.locations & 1 << *place as u32 != 0)
                .collect(),
        })
    }

    /// Has a batch done, on a ring, and waits for it.
    ///
    /// A signal does not end this. Nor does anything else but the end of the work, since the GPU has its memory until then;
    /// the device ends work that takes too long.
    ///
    /// # Errors
    ///
    /// As for [`submit`](Self::submit). That work has failed is not an error here.
    pub fn run(&self, ring: u32, batch: &Batch<'_>) -> Result<Completion> {
        // SAFETY: The memory is borrowed by the batch, which lives until the work has ended.
        let work = unsafe { self.submit(ring, batch.commands()) }?;
        match self.wait_for_end(work) {
            Some(completion) => completion,
            None => Err(self.forgotten(work)),
        }
    }

    /// Waits until a submission has ended, or can have nothing to do with this process. There is nothing if how it
    /// ended is not known any more.
    pub(crate) fn wait_for_end(&self, work: Submission) -> Option<Result<Completion>> {
        loop {
            match self.wait_raw(&[work], uapi::WAIT_ANY, -1) {
                Ok(entries) => match Completion::from_raw(&entries[0]) {
                    Ok(Some(completion)) => return Some(Ok(completion)),
                    Ok(None) => {}
                    Err(error) => return Some(Err(error)),
                },
                Err(error) => match error.errno() {
                    Some(libc::EINTR | libc::ENOMEM) => {}
                    Some(libc::ESTALE) => return None,
                    // In a child process: its memory is another, which the GPU does not know.
                    Some(libc::EPERM) => return Some(Err(error)),
                    // The GPU may have memory that the caller is about to use.
                    _ => std::process::abort(),
                },
            }
        }
    }

    fn forgotten(&self, work: Submission) -> Error {
        Error::Request {
            request: <uapi::Wait as uapi::Argument>::NAME,
            what: describe(&[work]),
            source: std::io::Error::from_raw_os_error(libc::ESTALE),
        }
    }

    /// Queues a batch of commands on a ring. They run later, and in order. See [`Submit`] for more than that.
    ///
    /// # Errors
    ///
    /// The driver refuses a ring that is not there, an empty batch, one that is longer than
    /// [`Info::max_batch`], and commands that it does not know. Commands that are malformed are found by the device: see
    /// [`Completion::status`]. If too much is queued already then this waits, and may be ended by a signal (`EINTR`);
    /// or not, if the file is set to `O_NONBLOCK` (`EAGAIN`).
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
    /// Addresses at which there is no memory are no concern: the work ends with [`Status::Fault`](crate::Status::Fault).
    pub unsafe fn submit(&self, ring: u32, commands: &[Command]) -> Result<Submission> {
        // SAFETY: Passed on to the caller.
        Ok(unsafe { self.send(&Submit::new(ring), commands) }?.work)
    }

    /// # Safety
    ///
    /// As for [`submit`](Self::submit).
    pub(crate) unsafe fn send(&self, submit: &Submit<'_>, commands: &[Command]) -> Result<Submitted> {
        let count = u32::try_from(commands.len()).unwrap_or(u32::MAX);
        let ring = submit.ring();
        let mut raw = submit.argument();
        raw.count = count;
        raw.commands = commands.as_ptr().addr() as u64;
        // SAFETY: There are that many commands and fences at these addresses. The caller answers for what they do.
        unsafe { self.request(&mut raw, || format!("{count} commands on ring {ring}")) }?;
        let fence = (raw.flags & uapi::SUBMIT_FENCE != 0).then(|| {
            // SAFETY: The driver has just made it, for us.
            Fence::from(unsafe { OwnedFd::from_raw_fd(raw.fence) })
        });
        Ok(Submitted {
            work: Submission {
                ring,
                sequence: raw.sequence,
            },
            fence,
        })
    }

    /// Waits until a submission, and with it all before it on that ring, has ended.
    ///
    /// # Errors
    ///
    /// `ETIMEDOUT` when the time is over (see [`Error::is_timeout`]), `EINTR` when a signal came first. Both leave
    /// the work as it is. That work has failed is not an error here.
    pub fn wait(&self, work: Submission, timeout: Duration) -> Result<Completion> {
        let entries = self.wait_raw(&[work], 0, nanoseconds(timeout))?;
        Completion::from_raw(&entries[0])?.ok_or_else(|| self.forgotten(work))
    }

    /// Waits until all these have ended; says how, in the same order.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn wait_all(&self, works: &[Submission], timeout: Duration) -> Result<Vec<Completion>> {
        let entries = self.wait_raw(works, 0, nanoseconds(timeout))?;
        let ended = entries.iter().zip(works);
        ended
            .map(|(entry, work)| Completion::from_raw(entry)?.ok_or_else(|| self.forgotten(*work)))
            .collect()
    }

    /// Waits until any of these has ended; says how those that have, in the same order.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn wait_any(&self, works: &[Submission], timeout: Duration) -> Result<Vec<Option<Completion>>> {
        let entries = self.wait_raw(works, uapi::WAIT_ANY, nanoseconds(timeout))?;
        entries.iter().map(Completion::from_raw).collect()
    }

    fn wait_raw(&self, works: &[Submission], flags: u32, timeout_ns: i64) -> Result<Vec<uapi::WaitEntry>> {
        let mut entries: Vec<_> = works
            .iter()
            .map(|work| uapi::WaitEntry {
                ring: work.ring,
                sequence: work.sequence,
                ..Default::default()
            })
            .collect();
        let mut raw = uapi::Wait {
            flags,
            entries: entries.as_mut_ptr().addr() as u64,
            count: u32::try_from(entries.len()).unwrap_or(u32::MAX),
            timeout_ns,
            ..uapi::Argument::new()
        };
        let what = || match u64::try_from(timeout_ns) {
            Ok(timeout) => format!("{}, {:?} at most", describe(works), Duration::from_nanos(timeout)),
            Err(_) => describe(works),
        };
        // SAFETY: There are that many entries at that address.
        unsafe { self.request(&mut raw, what) }?;
        Ok(entries)
    }

    /// How many submissions have ended since this was last called. Waits for one if there is none, for that long at most;
    /// if there is none even then, returns zero.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device is lost, and nothing more will come.
    pub fn ended(&self, timeout: Duration) -> Result<u64> {
        let failed = |source| Error::Request {
            request: "read",
            what: format!("work that has ended, {timeout:?} at most"),
            source,
        };
        if !fence::wait_readable(self.as_fd(), timeout).map_err(failed)? {
            return Ok(0);
        }
        let mut count = [0; 8];
        (&self.file).read_exact(&mut count).map_err(failed)?;
        Ok(u64::from_ne_bytes(count))
    }

    /// Says how the GPU is to get exclusive access to the pages from `start`, which is page-aligned, for
    /// `length` bytes, a multiple of the page size.
    ///
    /// # Errors
    ///
    /// The driver refuses a range that is not aligned, or not in the address space; `EOPNOTSUPP` if it cannot do that
    /// ([`Info::atomics`]).
    pub fn advise_atomics<T>(&self, start: *const T, length: usize, how: Atomics) -> Result<()> {
        self.advise(
            start,
            length,
            uapi::ADVISE_ATOMICS,
            how as u32,
            &format!("{how:?}"),
        )
    }

    /// Says where the pages from `start`, which is page-aligned, for `length` bytes, a multiple of the page size, had better
    /// be.
    ///
    /// # Errors
    ///
    /// As for [`advise_atomics`](Self::advise_atomics) ([`Info::locations`]).
    pub fn advise_location<T>(&self, start: *const T, length: usize, place: Location) -> Result<()> {
        self.advise(
            start,
            length,
            uapi::ADVISE_LOCATION,
            place as u32,
            &format!("{place:?}"),
        )
    }

    fn advise<T>(&self, start: *const T, length: usize, advice: u32, value: u32, what: &str) -> Result<()> {
        let mut raw = uapi::Advise {
            address: start.addr() as u64,
            length: length as u64,
            advice,
            value,
            ..uapi::Argument::new()
        };
        // SAFETY: The driver does not access the range.
        unsafe { self.request(&mut raw, || format!("{what} for {length:#x} bytes at {start:p}")) }
    }

    /// Brings the pages from `start`, which is page-aligned, for `length` bytes, a multiple of the page size, to a place;
    /// in VRAM they are mapped for the GPU as well. What cannot be brought there stays where it is.
    ///
    /// # Errors
    ///
    /// As for [`advise_location`](Self::advise_location).
    pub fn prefetch<T>(&self, start: *const T, length: usize, place: Location) -> Result<()> {
        let mut raw = uapi::Prefetch {
            address: start.addr() as u64,
            length: length as u64,
            location: place as u32,
            ..uapi::Argument::new()
        };
        // SAFETY: What is in the range stays as it is.
        unsafe {
            self.request(&mut raw, || {
                format!("{length:#x} bytes at {start:p} to {place:?}")
            })
        }
    }

    /// Says that what is in the pages of `memory` is not needed any more: each reads as what it was, or as zeroes, until it is
    /// written again. Pages that are not wholly within are left alone.
    ///
    /// # Errors
    ///
    /// The driver may refuse.
    pub fn discard<T: crate::Plain>(&self, memory: &mut [T]) -> Result<()> {
        let range = memory.as_mut_ptr_range();
        let address = range.start.addr().next_multiple_of(PAGE_SIZE);
        let length = (range.end.addr() / PAGE_SIZE * PAGE_SIZE).saturating_sub(address);
        if length == 0 {
            return Ok(());
        }
        let mut raw = uapi::Discard {
            address: address as u64,
            length: length as u64,
            ..uapi::Argument::new()
        };
        // SAFETY: The memory is borrowed exclusively, and whatever is in it is valid.
        unsafe { self.request(&mut raw, || format!("{length:#x} bytes at {address:#x}")) }
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

/// A time for the driver, for which too long is for ever.
fn nanoseconds(timeout: Duration) -> i64 {
    i64::try_from(timeout.as_nanos()).unwrap_or(-1)
}

fn describe(works: &[Submission]) -> String {
    match works {
        [work] => format!("submission {} on ring {}", work.sequence, work.ring),
        _ => format!("{} submissions", works.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
