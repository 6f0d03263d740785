// SPDX-License-Identifier: GPL-2.0-only

//! The driver's own work on the device: moving pages between system memory and VRAM.
//!
//! It has a context of its own, in which everything can be addressed: system memory at the virtual address that is its
//! physical address, VRAM from [`VRAM_BASE`] on. What is used of that is mapped in large pages when it is first used,
//! 1 GiB at a time.
//!
//! And it has a ring of its own, the last one of the device. A ring that programs use may be stalled on a fault, and a
//! copy may be what the repair of that fault is waiting for.
//!
//! Locking: `CopyEngine::mapped` is held while pages are mapped, which allocates nothing.

use crate::{abi, gpu::Gpu, virtio::Channel};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, Mutex,
    },
};

/// Where VRAM begins in the driver's own address space.
const VRAM_BASE: u64 = 1 << 46;
/// Base-2 logarithm of what is mapped at a time.
const UNIT_SHIFT: u32 = 30;
/// Large pages of that.
const UNIT_PAGES: usize = 1 << (UNIT_SHIFT - abi::LARGE_PAGE_SHIFT as u32);
/// Most commands in a batch.
pub(crate) const MAX_BATCH: u32 = 256;
/// Batches that can be on the ring at a time.
pub(crate) const SLOTS: usize = 16;
/// Batches of one transfer that are on the ring at a time.
const BATCHES: usize = 4;

/// Where data is: an address in the driver's own address space.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location(u64);

impl Location {
    /// System memory at a physical address.
    pub(crate) fn system(address: u64) -> Self {
        Self(address)
    }

    /// VRAM, that many bytes from its beginning.
    pub(crate) fn vram(offset: u64) -> Self {
        Self(VRAM_BASE + offset)
    }

    /// What an entry that leads there has in it, besides its rights.
    fn entry(self) -> u64 {
        match self.0.checked_sub(VRAM_BASE) {
            Some(offset) => offset | abi::PTE_VRAM,
            None => self.0,
        }
    }
}

/// What is to be copied and cleared, neighbours joined.
pub(crate) struct Transfers(KVVec<abi::Command>);

impl Transfers {
    /// Nothing, with room for `count` operations.
    pub(crate) fn with_capacity(count: usize) -> Result<Self> {
        Ok(Self(KVVec::with_capacity(count, GFP_KERNEL)?))
    }

    /// Copies `length` bytes.
    pub(crate) fn copy(&mut self, from: Location, to: Location, length: u64) -> Result {
        self.push(abi::Command {
            opcode: abi::COMMAND_COPY,
            address: to.0,
            source: from.0,
            length,
            ..abi::Command::default()
        })
    }

    /// Fills `length` bytes with zeros.
    pub(crate) fn clear(&mut self, to: Location, length: u64) -> Result {
        self.fill(to, length, 0)
    }

    /// Fills `length` bytes with a number of eight.
    pub(crate) fn fill(&mut self, to: Location, length: u64, pattern: u64) -> Result {
        self.push(abi::Command {
            opcode: abi::COMMAND_FILL,
            width: 8,
            address: to.0,
            length,
            operand: pattern,
            ..abi::Command::default()
        })
    }

    fn push(&mut self, new: abi::Command) -> Result {
        let copy = new.opcode == abi::COMMAND_COPY;
        if let Some(last) = self.0.last_mut() {
            let joins = last.opcode == new.opcode
                && last.operand == new.operand
                && last.address + last.length == new.address
                && (!copy || last.source + last.length == new.source);
            if joins {
                last.length += new.length;
                return Ok(());
            }
        }
        self.0.push(new, GFP_KERNEL)?;
        Ok(())
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The driver's own context and ring.
#[pin_data]
pub(crate) struct CopyEngine {
    context: u32,
    ring: Arc<Channel>,
    max_batch: usize,
    sequence: Atomic<i64>,
    #[pin]
    mapped: Mutex<Mapped>,
}

struct Mapped {
    /// Which units of the address space are mapped, as bits.
    units: KVVec<u64>,
    /// Entries of one unit.
    entries: KVec<u64>,
}

impl CopyEngine {
    /// One that works in `context`, which is yet to be created, and on `ring`.
    pub(crate) fn new(context: u32, ring: Arc<Channel>, max_batch: u32) -> Result<impl PinInit<Self>> {
        let units = 1usize << (u32::from(abi::VA_BITS) - UNIT_SHIFT);
        let mapped = Mapped {
            units: KVVec::from_elem(0, units / u64::BITS as usize, GFP_KERNEL)?,
            entries: KVec::with_capacity(UNIT_PAGES, GFP_KERNEL)?,
        };
        Ok(pin_init!(Self {
            context,
            ring,
            max_batch: max_batch as usize,
            sequence: Atomic::new(0),
            mapped <- new_mutex!(mapped, "CopyEngine::mapped"),
        }))
    }

    /// Its context.
    pub(crate) fn context(&self) -> u32 {
        self.context
    }

    /// Its ring.
    pub(crate) fn ring(&self) -> &Arc<Channel> {
        &self.ring
    }

    /// Has `length` bytes at `start` mapped.
    fn map(&self, gpu: &Arc<Gpu>, start: u64, length: u64) -> Result {
        let mut mapped = self.mapped.lock();
        for unit in start >> UNIT_SHIFT..=(start + length - 1) >> UNIT_SHIFT {
            let (word, bit) = ((unit / 64) as usize, 1 << (unit % 64));
            if mapped.units.get(word).ok_or(EINVAL)? & bit != 0 {
                continue;
            }
            let base = unit << UNIT_SHIFT;
            let first = Location(base).entry() | abi::PTE_VALID | abi::PTE_READ | abi::PTE_WRITE;
            mapped.entries.clear();
            for page in 0..UNIT_PAGES as u64 {
                let entry = first + page * abi::LARGE_PAGE_SIZE;
                mapped.entries.push_within_capacity(entry).map_err(|_| ENOMEM)?;
            }
            match gpu.map(self.context, base, &mapped.entries, true, &[]) {
                Err(error) if error == EOPNOTSUPP => self.map_small(gpu, base, first, &mut mapped.entries)?,
                other => other?,
            }
            mapped.units[word] |= bit;
        }
        Ok(())
    }

    /// Maps a unit in small pages, for a device that has no other.
    fn map_small(&self, gpu: &Arc<Gpu>, base: u64, first: u64, entries: &mut KVec<u64>) -> Result {
        for block in 0..UNIT_PAGES as u64 {
            let start = block * abi::LARGE_PAGE_SIZE;
            for (entry, page) in entries.iter_mut().zip(0..) {
                *entry = first + start + page * abi::PAGE_SIZE;
            }
            gpu.map(self.context, base + start, entries, false, &[])?;
        }
        Ok(())
    }

    /// Has everything mapped that `transfers` need.
    pub(crate) fn prepare(&self, gpu: &Arc<Gpu>, transfers: &Transfers) -> Result {
        transfers.0.iter().try_for_each(|command| {
            self.map(gpu, command.address, command.length)?;
            match command.opcode {
                abi::COMMAND_COPY => self.map(gpu, command.source, command.length),
                _ => Ok(()),
            }
        })
    }

    /// Carries out `transfers`. If this fails then not all has been done; it may still be until the device is reset.
    pub(crate) fn run(&self, gpu: &Arc<Gpu>, transfers: &Transfers) -> Result {
        let mut rest = &transfers.0[..];
        let mut result = Ok(());
        while !rest.is_empty() && result.is_ok() {
            let mut pending = [const { None }; BATCHES];
            for pending in &mut pending {
                let (batch, after) = rest.split_at(rest.len().min(self.max_batch));
                rest = after;
                if batch.is_empty() {
                    break;
                }
                let header = abi::SubmitHeader {
                    context: self.context,
                    count: batch.len() as u32,
                    sequence: self.sequence.fetch_add(1, Relaxed) as u64 + 1,
                    flags: 0,
                    reserved: 0,
                };
                *pending = Some(gpu.send_batch(&self.ring, &header, batch));
            }
            self.ring.kick();
            // All of them, whatever comes of the first: the pages are somebody's again when this returns.
            for pending in pending.into_iter().flatten() {
                result = result.and(pending.and_then(|pending| gpu.end_of_batch(pending)));
            }
        }
        result
    }
}
