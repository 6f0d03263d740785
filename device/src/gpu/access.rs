// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How engines reach memory: through translations, each checked, none kept.

use pinion_abi::{
    ACCESS_READ, ACCESS_WRITE, COUNT_SYSTEM, COUNT_VRAM, LARGE_PAGE_SIZE, PAGE_SIZE, PTE_POISONED, PTE_VALID,
    PTE_VRAM, REASON_ATOMIC, REASON_BAD_ADDRESS, REASON_NOT_PRESENT, REASON_POISONED, REASON_READ,
    REASON_WRITE, VA_END,
};
use vm_memory::VolatileSlice;

use super::context::Context;
use super::inject::{Defect, Injector};
use super::memory::SystemMemory;
use super::page_table::Translation;
use super::tlb::Tlb;
use super::vram::Vram;

/// The part of an address that is inside a page.
pub const OFFSET_MASK: u64 = PAGE_SIZE - 1;

/// An access for which there is no good enough page table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessFault {
    /// Where.
    pub va: u64,
    /// From there on, how many bytes the command will access like this, one after the other.
    pub length: u64,
    /// `ACCESS_*`: what it would have done.
    pub access: u8,
    /// `ACCESS_*`: what of that it may not.
    pub lacking: u8,
    /// `REASON_*`.
    pub reason: u8,
}

/// Why a command cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It may be possible later.
    Fault(AccessFault),
    /// The translation of this address leads to memory that does not exist.
    Bus(u64),
}

/// What an engine has done since it last said so.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes copied.
    pub copied: u64,
    /// Bytes filled.
    pub filled: u64,
    /// Operations of ATOMICs.
    pub operations: u64,
    /// Bytes of system memory loaded and stored.
    pub bus: u64,
    /// Accesses by region, for the context whose accesses are counted: (start of the region, `COUNT_*`, number). A
    /// region can be there more than once.
    pub accesses: Vec<(u64, u32, u64)>,
}

impl Tally {
    /// How many entries back a region is looked for. Not found there it gets another entry: a stay inside the gate is
    /// too short for more than some hundreds.
    const RECENT: usize = 4;

    fn access(&mut self, va: u64, target: u32) {
        let region = va & !(LARGE_PAGE_SIZE - 1);
        let same = |entry: &&mut (u64, u32, u64)| entry.0 == region && entry.1 == target;
        if let Some(entry) = self.accesses.iter_mut().rev().take(Self::RECENT).find(same) {
            entry.2 = entry.2.saturating_add(1);
        } else {
            self.accesses.push((region, target, 1));
        }
    }
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
    /// Deliberate defects.
    pub injector: &'a Injector,
    /// What is done.
    pub tally: &'a mut Tally,
    /// Whether accesses are counted.
    pub counting: bool,
}

/// What of `access` a valid entry does not allow.
fn lacking(pte: u64, access: u8) -> u8 {
    // PTE_READ, PTE_WRITE and PTE_ATOMIC are in the order of ACCESS_*, one bit further up.
    access & !((pte >> 1) as u8)
}

impl<'a> Window<'a> {
    /// A translation of `va` that allows `access`. `length` is what the fault says if there is none.
    pub fn translate(&mut self, va: u64, access: u8, length: u64) -> Result<Translation, Trouble> {
        let enough = |found: &Translation| found.pte & PTE_POISONED == 0 && lacking(found.pte, access) == 0;
        let remembered = self.tlb.get(self.context.id(), va).filter(enough);
        let found = match remembered {
            Some(found) => found,
            None => {
                let found = self.context.table.read().get(va);
                match found.filter(enough) {
                    Some(found) => {
                        self.tlb.put(self.context.id(), va, found);
                        found
                    }
                    None => return Err(refusal(found, va, access, length)),
                }
            }
        };
        if found.pte & PTE_VRAM != 0 {
            self.check_poison(found, va, access, length)?;
        }
        if self.counting {
            let target = if found.pte & PTE_VRAM != 0 {
                COUNT_VRAM
            } else {
                COUNT_SYSTEM
            };
            self.tally.access(va, target);
        }
        Ok(found)
    }

    fn check_poison(&self, found: Translation, va: u64, access: u8, length: u64) -> Result<(), Trouble> {
        let address = found.address_of(va);
        if self.injector.strikes(Defect::EccPoison) {
            self.vram.poison(address);
        }
        if self.vram.is_poisoned(address) {
            return Err(Trouble::Fault(AccessFault {
                va,
                length,
                access,
                lacking: access,
                reason: REASON_POISONED,
            }));
        }
        Ok(())
    }

    /// Whether `va` can be accessed. Leaves no trace in the TLB.
    pub fn is_accessible(&self, va: u64, access: u8) -> bool {
        let found = self.context.table.read().get(va);
        found.is_some_and(|found| {
            let is_lost = found.pte & PTE_POISONED != 0
                || (found.pte & PTE_VRAM != 0 && self.vram.is_poisoned(found.address_of(va)));
            !is_lost && lacking(found.pte, access) == 0
        })
    }

    /// Up to `length` bytes at `va`, all of them in the page that `to` translates: fewer, but not beyond the end of a
    /// small page, where memory ends inside a large one, or may have been lost in it.
    pub fn slice(&self, to: Translation, va: u64, length: u64) -> Result<VolatileSlice<'a>, Trouble> {
        self.slice_at(to, to.address_of(va), length)
            .ok_or(Trouble::Bus(va))
    }

    fn slice_at(&self, to: Translation, address: u64, length: u64) -> Option<VolatileSlice<'a>> {
        let here = length.min(PAGE_SIZE.saturating_sub(address & OFFSET_MASK));
        let slice = |length: u64| {
            if to.pte & PTE_VRAM != 0 {
                self.vram.slice(address, length as usize)
            } else {
                self.memory.slice(address, length as usize)
            }
        };
        // What `translate` has found to be well is the small page at `address`.
        if to.pte & PTE_VRAM != 0 && self.vram.has_poison() {
            return slice(here);
        }
        slice(length).or_else(|| if here < length { slice(here) } else { None })
    }

    /// Like [`Window::slice`], with the deliberate defect that the page can be the wrong one.
    pub fn data(&self, to: Translation, va: u64, length: u64) -> Result<VolatileSlice<'a>, Trouble> {
        if self.injector.strikes(Defect::WrongPage) {
            let address = to.address_of(va) ^ PAGE_SIZE;
            let here = length.min(PAGE_SIZE.saturating_sub(address & OFFSET_MASK));
            return self.slice_at(to, address, here).ok_or(Trouble::Bus(va));
        }
        self.slice(to, va, length)
    }

    /// Counts bytes that went over the bus.
    pub fn crossed(&mut self, to: Translation, bytes: u64) {
        if to.pte & PTE_VRAM == 0 {
            self.tally.bus = self.tally.bus.saturating_add(bytes);
        }
    }

    /// Checks an address that was found in memory: `length` bytes there, aligned to eight.
    pub fn check_pointer(va: u64, length: u64) -> Result<(), Trouble> {
        let inside = va.checked_add(length).is_some_and(|end| end <= VA_END);
        if inside && va & 7 == 0 {
            return Ok(());
        }
        Err(Trouble::Fault(AccessFault {
            va,
            length,
            access: ACCESS_READ,
            lacking: ACCESS_READ,
            reason: REASON_BAD_ADDRESS,
        }))
    }
}

fn refusal(found: Option<Translation>, va: u64, access: u8, length: u64) -> Trouble {
    let (reason, lacking) = match found {
        None => (REASON_NOT_PRESENT, access),
        Some(found) if found.pte & PTE_VALID == 0 => (REASON_NOT_PRESENT, access),
        Some(found) if found.pte & PTE_POISONED != 0 => (REASON_POISONED, access),
        Some(found) => match lacking(found.pte, access) {
            lacking if lacking & ACCESS_READ != 0 => (REASON_READ, lacking),
            lacking if lacking & ACCESS_WRITE != 0 => (REASON_WRITE, lacking),
            lacking => (REASON_ATOMIC, lacking),
        },
    };
    Trouble::Fault(AccessFault {
        va,
        length: length.max(1),
        access,
        lacking,
        reason,
    })
}
