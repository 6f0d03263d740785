// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the core needs of memory that is not its own.

use vm_memory::{VolatileMemory, VolatileSlice};

/// The memory that system page table entries lead to.
///
/// An object of this trait is one fixed map. When the map changes, the core is given a new object
/// ([`super::Gpu::set_memory`]) and no access goes through the old one any more.
pub trait SystemMemory: Send + Sync {
    /// The `length` bytes at `address`, if all of them exist.
    fn slice(&self, address: u64, length: usize) -> Option<VolatileSlice<'_>>;
}

/// No memory at all: every access is a bus error.
#[derive(Debug, Default)]
pub struct NoMemory;

impl SystemMemory for NoMemory {
    fn slice(&self, _address: u64, _length: usize) -> Option<VolatileSlice<'_>> {
        None
    }
}

/// One block of memory that begins at address zero; for tests and tools.
#[derive(Debug)]
pub struct PlainMemory(vm_memory::MmapRegion);

impl PlainMemory {
    /// A zeroed block of `length` bytes.
    pub fn new(length: usize) -> std::io::Result<Self> {
        vm_memory::MmapRegion::new(length)
            .map(Self)
            .map_err(std::io::Error::other)
    }
}

impl SystemMemory for PlainMemory {
    fn slice(&self, address: u64, length: usize) -> Option<VolatileSlice<'_>> {
        self.0.get_slice(usize::try_from(address).ok()?, length).ok()
    }
}
