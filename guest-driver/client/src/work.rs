// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Submissions: what goes with them, and how they end.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::{Error, Fence, Result, uapi};

/// Work that has been submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Submission {
    /// The ring that it is on.
    pub ring: u32,
    /// Its number on that ring, from 1. Work on a ring ends in the order of these.
    pub sequence: u64,
}

/// Where work goes, what it waits for, and what is told of its end.
///
/// ```no_run
/// # use pinion_client::{Command, Gpu, Submit};
/// # let gpu = Gpu::open("/dev/pinion0")?;
/// // SAFETY: These touch no memory.
/// let (first, second) = unsafe {
///     let first = gpu.submit(0, &[Command::nop()])?;
///     let second = Submit::new(1).after(first).fence().send(&gpu, &[Command::nop()])?;
///     (first, second)
/// };
/// second.fence.unwrap().wait(std::time::Duration::from_secs(1)).unwrap();
/// # Ok::<_, pinion_client::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Submit<'a> {
    ring: u32,
    fences: Vec<uapi::Fence>,
    eventfd: Option<BorrowedFd<'a>>,
    wants_fence: bool,
    descriptors: std::marker::PhantomData<BorrowedFd<'a>>,
}

/// What has come of a [`Submit`].
#[derive(Debug)]
pub struct Submitted {
    /// The work.
    pub work: Submission,
    /// Its end, if that was asked for.
    pub fence: Option<Fence>,
}

impl<'a> Submit<'a> {
    /// Work for a ring.
    pub fn new(ring: u32) -> Self {
        Self {
            ring,
            fences: Vec::new(),
            eventfd: None,
            wants_fence: false,
            descriptors: std::marker::PhantomData,
        }
    }

    /// It begins when other work of the same [`Gpu`](crate::Gpu) has ended, however it ended.
    pub fn after(mut self, work: Submission) -> Self {
        self.fences.push(uapi::Fence {
            kind: uapi::FENCE_SEQUENCE,
            id: work.ring,
            sequence: work.sequence,
        });
        self
    }

    /// It begins when a fence has passed, which can be of another [`Gpu`](crate::Gpu), device or process.
    pub fn after_fence(mut self, fence: BorrowedFd<'a>) -> Self {
        self.fences.push(uapi::Fence {
            kind: uapi::FENCE_DESCRIPTOR,
            id: fence.as_raw_fd() as u32,
            sequence: 0,
        });
        self
    }

    /// When it has ended, 1 is added to an eventfd.
    pub fn notify(mut self, eventfd: BorrowedFd<'a>) -> Self {
        self.eventfd = Some(eventfd);
        self
    }

    /// A [`Fence`] is wanted.
    pub fn fence(mut self) -> Self {
        self.wants_fence = true;
        self
    }

    /// Queues a batch of commands with all this.
    ///
    /// # Errors
    ///
    /// As for [`Gpu::submit`](crate::Gpu::submit). Things to wait for that are not there, and an eventfd that is
    /// none, are refused.
    ///
    /// # Safety
    ///
    /// As for [`Gpu::submit`](crate::Gpu::submit).
    pub unsafe fn send(&self, gpu: &crate::Gpu, commands: &[crate::Command]) -> Result<Submitted> {
        // SAFETY: Passed on to the caller.
        unsafe { gpu.send(self, commands) }
    }

    pub(crate) fn ring(&self) -> u32 {
        self.ring
    }

    /// The argument of the request. It points to what this owns.
    pub(crate) fn argument(&self) -> uapi::Submit {
        let mut raw = uapi::Submit {
            ring: self.ring,
            fence_count: u32::try_from(self.fences.len()).unwrap_or(u32::MAX),
            ..uapi::Argument::new()
        };
        if !self.fences.is_empty() {
            raw.fences = self.fences.as_ptr().addr() as u64;
        }
        if let Some(eventfd) = self.eventfd {
            raw.flags |= uapi::SUBMIT_EVENTFD;
            raw.eventfd = eventfd.as_raw_fd();
        }
        if self.wants_fence {
            raw.flags |= uapi::SUBMIT_FENCE;
        }
        raw
    }
}

/// How work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
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
    /// The device was reset.
    Reset,
    /// It ran, or waited for a semaphore, for longer than the device lets it.
    Hung,
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

impl Completion {
    /// What an entry says; nothing if the submission has not ended.
    pub(crate) fn from_raw(raw: &uapi::WaitEntry) -> Result<Option<Self>> {
        let status = match raw.status {
            uapi::STATUS_PENDING => return Ok(None),
            uapi::STATUS_OK => Status::Ok,
            uapi::STATUS_INVALID => Status::Invalid,
            uapi::STATUS_UNSUPPORTED => Status::Unsupported,
            uapi::STATUS_BAD_ADDRESS => Status::BadAddress,
            uapi::STATUS_BUS_ERROR => Status::BusError,
            uapi::STATUS_CONTEXT_ERROR => Status::ContextError,
            uapi::STATUS_FAULT => Status::Fault,
            uapi::STATUS_RESET => Status::Reset,
            uapi::STATUS_HUNG => Status::Hung,
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
        Ok(Some(Self {
            status,
            executed: raw.executed,
            fault_address: raw.fault_address,
            repeats: raw.repeats,
        }))
    }
}
