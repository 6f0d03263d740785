// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Descriptor chains: reading the device-readable part, remembering the device-writable one.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A chain that the driver has made available and that has not been used yet.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// Its first descriptor, which names it in the used ring.
    pub(super) head: u16,
    /// The life of the device (see [`super::queues`]) in which it was taken.
    pub(super) epoch: u64,
    /// Where the answer goes: as many of the writable descriptors as the longest answer needs.
    writable: Vec<(GuestAddress, u32)>,
}

/// What is wrong with a chain.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("a descriptor leads outside of memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
    #[error("it is cut off: a descriptor index is out of range, or it loops")]
    CutOff,
    #[error("a readable descriptor follows a writable one")]
    Order,
    #[error("its writable part is too short for the answer: {0} bytes, not {1}")]
    NoRoom(u64, usize),
}

impl Ticket {
    /// Takes a chain apart: appends its readable part, but no more than `limit` bytes and one more if
    /// there is more, to `bytes`, and makes sure that it has room for an answer of `answer` bytes.
    ///
    /// Allocates no more than `answer` entries: descriptors of no length are skipped.
    pub(super) fn take<M>(
        chain: DescriptorChain<M>,
        epoch: u64,
        bytes: &mut Vec<u8>,
        limit: usize,
        answer: usize,
    ) -> (Self, Result<(), Error>)
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        let mut ticket = Self {
            head: chain.head_index(),
            epoch,
            writable: Vec::new(),
        };
        let memory = chain.memory().clone();
        let result = ticket.walk(chain, &memory, bytes, limit, answer);
        (ticket, result)
    }

    fn walk<M>(
        &mut self,
        chain: DescriptorChain<M>,
        memory: &GuestMemoryMmap,
        bytes: &mut Vec<u8>,
        limit: usize,
        answer: usize,
    ) -> Result<(), Error>
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        let mut room = 0_u64;
        let mut goes_on = true;
        let mut writing = false;
        for descriptor in chain {
            goes_on = descriptor.has_next();
            if descriptor.is_write_only() {
                writing = true;
                if descriptor.len() > 0 && room < answer as u64 {
                    self.writable.push((descriptor.addr(), descriptor.len()));
                    room = room.saturating_add(descriptor.len().into());
                }
                continue;
            }
            if writing {
                return Err(Error::Order);
            }
            let left = limit.saturating_add(1).saturating_sub(bytes.len());
            let old = bytes.len();
            bytes.resize(old.saturating_add(left.min(descriptor.len() as usize)), 0);
            if let Some(target) = bytes.get_mut(old..) {
                memory
                    .read_slice(target, descriptor.addr())
                    .map_err(Error::Memory)?;
            }
        }
        if goes_on {
            return Err(Error::CutOff);
        }
        if room < answer as u64 {
            return Err(Error::NoRoom(room, answer));
        }
        Ok(())
    }

    /// Writes the answer. Says how many bytes of it there was memory for.
    pub(super) fn answer(&self, memory: &GuestMemoryMmap, answer: &[u8]) -> u32 {
        let mut rest = answer;
        let mut written = 0_u32;
        for &(address, length) in &self.writable {
            let (now, later) = rest.split_at(rest.len().min(length as usize));
            if now.is_empty() || memory.write_slice(now, address).is_err() {
                break;
            }
            written = written.saturating_add(now.len() as u32);
            rest = later;
        }
        written
    }
}
