// SPDX-License-Identifier: GPL-2.0-only

//! The work of an address space: how it gets to the rings, and how its end is waited for.

use crate::{
    abi,
    fence::{End, Found, Progress, Timeline, Waited, FOREVER},
    gpu::Gpu,
    ring::{Fence, Request},
};
use kernel::{
    prelude::*,
    sync::Arc,
    time::{msecs_to_jiffies, Jiffies, Msecs},
};

/// The work of an address space.
pub(crate) struct Submissions {
    gpu: Arc<Gpu>,
    context: u32,
    progress: Arc<Progress>,
    /// By ring.
    timelines: KVec<Arc<Timeline>>,
}

/// A submission of this address space that somebody waits for.
#[derive(Clone, Copy)]
pub(crate) struct Awaited {
    /// The ring.
    pub(crate) ring: u32,
    /// The number.
    pub(crate) sequence: u64,
    /// How it ended, once it has.
    pub(crate) end: Option<End>,
}

impl Submissions {
    /// The work of `context`: none yet.
    pub(crate) fn new(gpu: &Arc<Gpu>, context: u32, progress: &Arc<Progress>) -> Result<Arc<Self>> {
        let rings = gpu.limits().rings as usize;
        let mut timelines = KVec::with_capacity(rings, GFP_KERNEL)?;
        for _ in 0..rings {
            timelines.push(Timeline::new(progress)?, GFP_KERNEL)?;
        }
        let this = Self {
            gpu: gpu.clone(),
            context,
            progress: progress.clone(),
            timelines,
        };
        Ok(Arc::new(this, GFP_KERNEL)?)
    }

    /// A fault is about to be cancelled: sets what work that ends with it is reported as.
    pub(crate) fn set_cancelled(&self, status: u32) {
        self.progress.set_cancelled(status);
    }

    /// The timelines, by ring.
    pub(crate) fn timelines(&self) -> &[Arc<Timeline>] {
        &self.timelines
    }

    fn timeline(&self, ring: u32) -> Result<&Arc<Timeline>> {
        self.timelines.get(ring as usize).ok_or(EINVAL)
    }

    /// The fence of a submission that has been made.
    pub(crate) fn fence(&self, ring: u32, sequence: u64) -> Result<Fence> {
        let timeline = self.timeline(ring)?;
        match timeline.find(sequence) {
            Found::Nothing => Err(EINVAL),
            _ => Ok(Fence {
                timeline: timeline.clone(),
                sequence,
            }),
        }
    }

    /// Room for `count` commands, with their beginning.
    pub(crate) fn buffer(count: usize) -> Result<KVec<u8>> {
        let size = size_of::<abi::SubmitHeader>() + count * size_of::<abi::Command>();
        Ok(KVec::zeroed(size, GFP_KERNEL_ACCOUNT)?)
    }

    /// The part of a buffer that is for commands.
    pub(crate) fn commands(buffer: &mut [u8]) -> &mut [u8] {
        &mut buffer[size_of::<abi::SubmitHeader>()..]
    }

    /// Queues a request on `ring`; returns its number. If there is too much queued already then this waits, or not.
    ///
    /// # Errors
    ///
    /// EINVAL: no such ring. EAGAIN: the caller does not want to wait. ERESTARTSYS. ENODEV: the device is lost.
    pub(crate) fn submit(&self, ring: u32, request: Request, may_wait: bool) -> Result<u64> {
        let timeline = self.timeline(ring)?;
        let commands = request.commands;
        self.progress.admit(commands, may_wait)?;
        let submitted = if self.gpu.is_lost() {
            Err(ENODEV)
        } else {
            self.gpu
                .ring(ring)
                .and_then(|ring| ring.submit(self.context, timeline, request))
        };
        match submitted {
            Ok(_) => self.gpu.look_after_work(),
            Err(_) => self.progress.withdraw(commands),
        }
        submitted
    }

    /// Looks how the awaited submissions have ended; returns how many have.
    ///
    /// # Errors
    ///
    /// EINVAL: there is no such submission. ESTALE: how it ended is not known any more.
    pub(crate) fn look(&self, awaited: &mut [Awaited]) -> Result<usize> {
        let mut ended = 0;
        for one in awaited {
            one.end = match self.timeline(one.ring)?.find(one.sequence) {
                Found::Nothing => return Err(EINVAL),
                Found::Forgotten => return Err(ESTALE),
                Found::Pending => None,
                Found::Ended(end) => Some(end),
            };
            ended += usize::from(one.end.is_some());
        }
        Ok(ended)
    }

    /// Waits until all of the awaited submissions have ended, or any, for at most that many milliseconds, or for ever.
    pub(crate) fn wait(&self, awaited: &[Awaited], any: bool, timeout: Option<u64>) -> Waited {
        let jiffies = timeout.map_or(FOREVER, |timeout| {
            Msecs::try_from(timeout).map_or(FOREVER, msecs_to_jiffies)
        });
        match awaited {
            [one] => self.wait_for(one, jiffies),
            _ => {
                let has_passed = |one: &Awaited| match self.timeline(one.ring) {
                    Ok(timeline) => timeline.has_passed(one.sequence),
                    Err(_) => true,
                };
                self.progress.wait(jiffies, || {
                    if any {
                        awaited.iter().any(has_passed)
                    } else {
                        awaited.iter().all(has_passed)
                    }
                })
            }
        }
    }

    fn wait_for(&self, one: &Awaited, jiffies: Jiffies) -> Waited {
        match self.timeline(one.ring) {
            Ok(timeline) => timeline.wait(one.sequence, jiffies),
            Err(_) => Waited::Done,
        }
    }

    /// The device is lost, and all work has ended or is about to: nobody need wait for more.
    pub(crate) fn lose(&self) {
        self.progress.lose();
    }

    /// Ends what has not gone to the device. The context has ended, and with it what had.
    pub(crate) fn close(&self) {
        for ring in self.gpu.rings() {
            ring.forget(self.context);
        }
    }
}
