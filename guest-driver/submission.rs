// SPDX-License-Identifier: GPL-2.0-only

//! Work: how it gets to the rings, and how its end is waited for.

use crate::{
    abi,
    address_space::Statistics,
    fence::{End, Fence, Waited},
    gpu::Gpu,
    uapi,
    virtio::Answered,
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, Mutex,
    },
    time::Msecs,
};

/// Commands are waited for in slices of this; in between the device is asked whether it lives.
const SLICE: Msecs = 1000;

/// The work of an address space.
#[pin_data]
pub(crate) struct Submissions {
    gpu: Arc<Gpu>,
    context: u32,
    /// Number of the last submission, by ring.
    #[pin]
    submitting: Mutex<KVec<u64>>,
    fences: KVec<Arc<Fence>>,
    /// What a cancelled fault is reported as, by ring: `uapi::STATUS_*`.
    cancelled: KVec<Atomic<i32>>,
    statistics: Arc<Statistics>,
}

impl Submissions {
    /// The work of `context`: none yet.
    pub(crate) fn new(gpu: &Arc<Gpu>, context: u32, statistics: &Arc<Statistics>) -> Result<Arc<Self>> {
        let rings = gpu.limits().rings as usize;
        let mut fences = KVec::with_capacity(rings, GFP_KERNEL)?;
        let mut cancelled = KVec::with_capacity(rings, GFP_KERNEL)?;
        for _ in 0..rings {
            fences.push(Fence::new()?, GFP_KERNEL)?;
            cancelled.push(Atomic::new(uapi::STATUS_FAULT as i32), GFP_KERNEL)?;
        }
        let submitted = KVec::from_elem(0, rings, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                gpu: gpu.clone(),
                context,
                submitting <- new_mutex!(submitted, "Submissions::submitting"),
                fences,
                cancelled,
                statistics: statistics.clone(),
            }),
            GFP_KERNEL,
        )
    }

    /// A fault on `ring` is about to be cancelled: sets what work that ends with it is reported as.
    pub(crate) fn set_cancelled(&self, ring: u16, status: u32) {
        if let Some(cancelled) = self.cancelled.get(usize::from(ring)) {
            cancelled.store(status as i32, Relaxed);
        }
    }

    /// Queues `commands` on `ring`; returns the number of the submission.
    ///
    /// # Errors
    ///
    /// EINVAL: no such ring. EINTR: a signal came while the ring was full. ENODEV: the device is lost.
    pub(crate) fn submit(&self, ring: u32, commands: &[abi::Command]) -> Result<u64> {
        let channel = self.gpu.ring(ring)?;
        let fence = self.fences.get(ring as usize).ok_or(EINVAL)?;
        loop {
            if self.gpu.is_lost() {
                return Err(ENODEV);
            }
            // Held for the order of numbers to be that of the ring; given up while the ring is full.
            let mut submitting = self.submitting.lock();
            let last = submitting.get_mut(ring as usize).ok_or(EINVAL)?;
            let sequence = *last + 1;
            let header = abi::SubmitHeader {
                context: self.context,
                count: commands.len() as u32,
                sequence,
                flags: 0,
                reserved: 0,
            };
            let callback: Arc<dyn Answered> = fence.clone();
            let posted = channel.post(callback, sequence, 100, |output| {
                let (head, body) = output.split_at_mut(size_of::<abi::SubmitHeader>());
                head.copy_from_slice(header.as_bytes());
                let bytes = commands.as_bytes();
                body[..bytes.len()].copy_from_slice(bytes);
                head.len() + bytes.len()
            });
            match posted {
                Ok(()) => {
                    *last = sequence;
                    drop(submitting);
                    channel.kick();
                    self.statistics.submissions.add(1, Relaxed);
                    return Ok(sequence);
                }
                Err(error) if error == ETIMEDOUT => {
                    drop(submitting);
                    if kernel::current!().signal_pending() {
                        return Err(EINTR);
                    }
                    self.gpu.ping()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for submission `sequence` of `ring`, at most `timeout` milliseconds.
    ///
    /// # Errors
    ///
    /// EINVAL: there is no such submission. ESTALE: it is not known any more. ETIMEDOUT, EINTR.
    pub(crate) fn wait(&self, ring: u32, sequence: u64, timeout: u64) -> Result<End> {
        let fence = self.fences.get(ring as usize).ok_or(EINVAL)?;
        let submitted = self.submitting.lock().get(ring as usize).copied().unwrap_or(0);
        if sequence == 0 || sequence > submitted {
            return Err(EINVAL);
        }
        let mut remaining = timeout;
        loop {
            let slice = remaining.min(SLICE.into());
            match fence.wait(sequence, slice as Msecs) {
                Waited::Ended(mut end) => {
                    if end.status == abi::STATUS_FAULT_CANCELLED {
                        let status = self.cancelled.get(ring as usize);
                        end.status = status.map_or(uapi::STATUS_FAULT, |status| status.load(Relaxed) as u32);
                    }
                    return Ok(end);
                }
                Waited::Forgotten => return Err(ESTALE),
                Waited::Interrupted => return Err(EINTR),
                Waited::TimedOut => {
                    remaining -= slice;
                    if remaining == 0 {
                        return Err(ETIMEDOUT);
                    }
                    // If it does not live, then this ends all its work.
                    let _ = self.gpu.ping();
                }
            }
        }
    }
}
