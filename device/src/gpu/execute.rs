// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Execution of one command in chunks, each short, each complete or not begun.
//!
//! An [`Execution`] knows how far it has come. A chunk that cannot translate an address changes nothing
//! beyond what it has counted as done, so the command goes on from exactly there when it is tried again.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pinion_abi::{
    ACCESS_ATOMIC, ACCESS_READ, ACCESS_WRITE, PAGE_SIZE, PTE_ADDRESS, PTE_VALID, PTE_VRAM, REASON_ATOMIC,
    REASON_NOT_PRESENT, REASON_READ, REASON_WRITE,
};
use vm_memory::{VolatileMemory, VolatileSlice};

use super::command::{Atomic, Command, Width};
use super::context::Context;
use super::memory::SystemMemory;
use super::tlb::Tlb;
use super::vram::Vram;

/// Most atomic operations in one chunk.
const OPERATIONS_PER_CHUNK: u32 = 64;
/// Length of [`bus`], in steps of one or two nanoseconds.
const BUS_STEPS: u32 = 24;
/// Most pieces of a COPY or FILL, each within a page, in one chunk.
const PIECES_PER_CHUNK: u32 = 4;
const PAGE: usize = PAGE_SIZE as usize;
const OFFSET_MASK: u64 = PAGE_SIZE - 1;

/// An access for which there is no good enough page table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessFault {
    /// Where.
    pub va: u64,
    /// `ACCESS_*`: what it would have done.
    pub access: u8,
    /// `ACCESS_*`: what of that it may not.
    pub lacking: u8,
    /// `REASON_*`.
    pub reason: u8,
}

/// Why a chunk could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It may be possible later.
    Fault(AccessFault),
    /// The translation of this address leads to memory that does not exist.
    Bus(u64),
}

/// Memory as one context sees it, for as long as an engine stays inside its gate.
pub struct Window<'a> {
    /// Whose page table.
    pub context: &'a Context,
    /// What the engine remembers of it.
    pub tlb: &'a mut Tlb,
    /// Where system entries lead to.
    pub memory: &'a dyn SystemMemory,
    /// Where VRAM entries lead to.
    pub vram: &'a Vram,
}

impl<'a> Window<'a> {
    /// An entry for the page of `va` that allows `access`.
    fn translate(&mut self, va: u64, access: u8) -> Result<u64, Trouble> {
        // PTE_READ, PTE_WRITE and PTE_ATOMIC are in the order of ACCESS_*, one bit further up.
        let rights = u64::from(access) << 1;
        let enough = |pte: u64| pte & (rights | PTE_VALID) == rights | PTE_VALID;
        if let Some(pte) = self.tlb.get(self.context.id(), va) {
            if enough(pte) {
                return Ok(pte);
            }
        }
        let pte = self.context.table.read().get(va);
        if enough(pte) {
            self.tlb.put(self.context.id(), va, pte);
            return Ok(pte);
        }
        let (reason, lacking) = if pte & PTE_VALID == 0 {
            (REASON_NOT_PRESENT, access)
        } else {
            let lacking = access & !((pte >> 1) as u8);
            let reason = match lacking {
                _ if lacking & ACCESS_READ != 0 => REASON_READ,
                _ if lacking & ACCESS_WRITE != 0 => REASON_WRITE,
                _ => REASON_ATOMIC,
            };
            (reason, lacking)
        };
        Err(Trouble::Fault(AccessFault {
            va,
            access,
            lacking,
            reason,
        }))
    }

    /// The `length` bytes at `va`, all of them in its page, which `pte` translates.
    fn slice(&self, pte: u64, va: u64, length: usize) -> Result<VolatileSlice<'a>, Trouble> {
        let address = (pte & PTE_ADDRESS) | (va & OFFSET_MASK);
        let slice = if pte & PTE_VRAM != 0 {
            self.vram.slice(address, length)
        } else {
            self.memory.slice(address, length)
        };
        slice.ok_or(Trouble::Bus(va))
    }
}

/// One page of an engine's own, for data on its way.
pub type Scratch = Box<[u8; PAGE]>;

/// A page of zeroes.
pub fn scratch() -> Scratch {
    Box::new([0; PAGE])
}

/// A command on its way.
#[derive(Debug)]
pub struct Execution {
    command: Command,
    /// Bytes stored, or operations done.
    done: u64,
    /// COPY: bytes that were loaded into the scratch page and not yet stored.
    loaded: usize,
    /// ATOMIC: what the last operation found.
    found: u64,
    /// Number of accesses that got through.
    moves: u64,
}

impl Execution {
    /// Begins `command`. The scratch page is its own until it ends.
    pub fn new(command: Command, scratch: &mut Scratch) -> Self {
        if let Command::Fill { pattern, .. } = &command {
            for bytes in scratch.chunks_exact_mut(pattern.len()) {
                bytes.copy_from_slice(pattern);
            }
        }
        Self {
            command,
            done: 0,
            loaded: 0,
            found: 0,
            moves: 0,
        }
    }

    /// A number that grows with every access that gets through.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// ATOMIC: operations done.
    pub fn repeats(&self) -> u64 {
        if matches!(self.command, Command::Atomic(_)) {
            self.done
        } else {
            0
        }
    }

    /// Does the next chunk; says whether it was the last.
    pub fn chunk(&mut self, window: &mut Window<'_>, scratch: &mut Scratch) -> Result<bool, Trouble> {
        match self.command {
            Command::Nop => Ok(true),
            Command::Copy {
                destination,
                source,
                length,
            } => some_pieces(|| self.copy(window, scratch, destination, source, length)),
            Command::Fill { address, length, .. } => {
                some_pieces(|| self.fill(window, scratch, address, length))
            }
            Command::Atomic(atomic) => self.atomic(window, &atomic),
        }
    }

    fn moved(&mut self, done: u64) {
        self.done = self.done.wrapping_add(done);
        self.moves = self.moves.wrapping_add(1);
    }

    fn copy(
        &mut self,
        window: &mut Window<'_>,
        scratch: &mut Scratch,
        destination: u64,
        source: u64,
        length: u64,
    ) -> Result<bool, Trouble> {
        let left = length.saturating_sub(self.done);
        if left == 0 {
            return Ok(true);
        }
        // Where the source would be overwritten before it is read, begin at the end. A chunk is loaded
        // whole before it is stored and lies within one page on both sides.
        let (offset, size) = if destination.wrapping_sub(source) < length {
            let before_end =
                |address: u64| (address.wrapping_add(left).wrapping_sub(1) & OFFSET_MASK).wrapping_add(1);
            let size = left.min(before_end(source)).min(before_end(destination));
            (left.wrapping_sub(size), size)
        } else {
            let to_end = |address: u64| PAGE_SIZE.wrapping_sub(address.wrapping_add(self.done) & OFFSET_MASK);
            (self.done, left.min(to_end(source)).min(to_end(destination)))
        };
        let count = size as usize;
        let (source, destination) = (source.wrapping_add(offset), destination.wrapping_add(offset));
        let Some(buffer) = scratch.get_mut(..count) else {
            return Err(Trouble::Bus(source));
        };

        if self.loaded == 0 {
            let from = window.translate(source, ACCESS_READ)?;
            let from = window.slice(from, source, count)?;
            match window.translate(destination, ACCESS_WRITE) {
                Ok(to) => from.copy_to_volatile_slice(window.slice(to, destination, count)?),
                Err(trouble) => {
                    // The load counts, so that the two sides need not be present at the same time.
                    from.copy_to(buffer);
                    self.loaded = count;
                    self.moved(0);
                    return Err(trouble);
                }
            }
        } else {
            let to = window.translate(destination, ACCESS_WRITE)?;
            window.slice(to, destination, count)?.copy_from(buffer);
            self.loaded = 0;
        }
        self.moved(size);
        Ok(self.done >= length)
    }

    fn fill(
        &mut self,
        window: &mut Window<'_>,
        scratch: &mut Scratch,
        address: u64,
        length: u64,
    ) -> Result<bool, Trouble> {
        let left = length.saturating_sub(self.done);
        if left == 0 {
            return Ok(true);
        }
        // Address and length are aligned to the pattern, so every chunk begins with its first byte.
        let va = address.wrapping_add(self.done);
        let size = left.min(PAGE_SIZE.wrapping_sub(va & OFFSET_MASK));
        let Some(buffer) = scratch.get(..size as usize) else {
            return Err(Trouble::Bus(va));
        };
        let to = window.translate(va, ACCESS_WRITE)?;
        window.slice(to, va, buffer.len())?.copy_from(buffer);
        self.moved(size);
        Ok(self.done >= length)
    }

    fn atomic(&mut self, window: &mut Window<'_>, atomic: &Atomic) -> Result<bool, Trouble> {
        const ACCESS: u8 = ACCESS_READ | ACCESS_WRITE | ACCESS_ATOMIC;
        let mut page: Option<(u64, Page<'_>)> = None;
        for _ in 0..OPERATIONS_PER_CHUNK {
            if self.done >= u64::from(atomic.repeat) {
                break;
            }
            // Below `repeat`, which has 32 bits.
            let va = atomic.place(self.done as u32);
            let number = va & !OFFSET_MASK;
            let here = match &page {
                Some((of, here)) if *of == number => here,
                _ => {
                    let pte = window.translate(va, ACCESS)?;
                    let bytes = window.slice(pte, number, PAGE)?;
                    &page
                        .insert((
                            number,
                            Page {
                                bytes,
                                vram: pte & PTE_VRAM != 0,
                            },
                        ))
                        .1
                }
            };
            let offset = (va & OFFSET_MASK) as usize;
            self.found = here.operate(offset, atomic).ok_or(Trouble::Bus(va))?;
            self.moved(1);
        }
        if self.done < u64::from(atomic.repeat) {
            return Ok(false);
        }
        if let Some(va) = atomic.write_back {
            let to = window.translate(va, ACCESS_WRITE)?;
            let to = window.slice(to, va, atomic.width.bytes() as usize)?;
            store(&to, 0, atomic.width, self.found).ok_or(Trouble::Bus(va))?;
            self.moves = self.moves.wrapping_add(1);
        }
        Ok(true)
    }
}

/// Repeats `piece` until it says that it was the last one, but not too often.
fn some_pieces(mut piece: impl FnMut() -> Result<bool, Trouble>) -> Result<bool, Trouble> {
    for _ in 0..PIECES_PER_CHUNK {
        if piece()? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A page that atomic operations are done on.
struct Page<'a> {
    bytes: VolatileSlice<'a>,
    vram: bool,
}

impl Page<'_> {
    /// Does one operation at `offset` and says what it found; none if that is not in the page, or the
    /// memory behind the page is not aligned.
    fn operate(&self, offset: usize, atomic: &Atomic) -> Option<u64> {
        let Atomic {
            operation,
            operand,
            compare,
            ..
        } = *atomic;
        match atomic.width {
            Width::W4 => {
                let place = self.bytes.get_atomic_ref::<AtomicU32>(offset).ok()?;
                let apply = |old| operation.apply32(old, operand as u32, compare as u32);
                if self.vram {
                    let found =
                        place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(apply(old)));
                    found.ok().map(u64::from)
                } else {
                    // A load and a store, and whatever the CPUs do in between is lost: the bus has no
                    // atomics. This is what exclusive access is for.
                    let old = place.load(Ordering::Relaxed);
                    bus();
                    place.store(apply(old), Ordering::Relaxed);
                    Some(old.into())
                }
            }
            Width::W8 => {
                let place = self.bytes.get_atomic_ref::<AtomicU64>(offset).ok()?;
                let apply = |old| operation.apply64(old, operand, compare);
                if self.vram {
                    place
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(apply(old)))
                        .ok()
                } else {
                    let old = place.load(Ordering::Relaxed);
                    bus();
                    place.store(apply(old), Ordering::Relaxed);
                    Some(old)
                }
            }
        }
    }
}

/// The way of a number over the bus and back.
///
/// On a real bus it takes about a microsecond from the load until the store. Without any time between
/// the two a processor hardly ever gets in between, and a driver that forgets to ask for exclusive access
/// would get away with it. This takes some tens of nanoseconds: dependent work, not a pause instruction,
/// upon which a hypervisor may take the processor away.
fn bus() {
    let mut number = 1_u64;
    for _ in 0..BUS_STEPS {
        number = std::hint::black_box(number).rotate_left(1);
    }
    std::hint::black_box(number);
}

fn store(bytes: &VolatileSlice<'_>, offset: usize, width: Width, value: u64) -> Option<()> {
    match width {
        Width::W4 => bytes
            .get_atomic_ref::<AtomicU32>(offset)
            .ok()?
            .store(value as u32, Ordering::Relaxed),
        Width::W8 => bytes
            .get_atomic_ref::<AtomicU64>(offset)
            .ok()?
            .store(value, Ordering::Relaxed),
    }
    Some(())
}
