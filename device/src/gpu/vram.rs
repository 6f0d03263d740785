// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Device memory: a sealed, sparse memfd.

use std::collections::BTreeSet;
use std::fs::File;

use pinion_abi::PAGE_SIZE;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fstat, ftruncate, memfd_create,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Most pages that can have lost what was in them; no more fail then.
const MAX_POISONED: usize = 1 << 16;
/// Smallest VRAM that can be asked for.
pub const MIN_SIZE: u64 = 1 << 20;
/// Largest VRAM that can be asked for.
pub const MAX_SIZE: u64 = 1 << 40;

/// Device memory.
#[derive(Debug)]
pub struct Vram {
    file: File,
    region: MmapRegion,
    size: u64,
    poison: Poison,
}

/// Pages that have lost what was in them.
#[derive(Debug, Default)]
struct Poison {
    /// Looked at without the lock, for there are hardly ever any.
    any: AtomicBool,
    pages: Mutex<BTreeSet<u64>>,
}

/// VRAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is out of bounds.
    #[error("VRAM must be {MIN_SIZE} to {MAX_SIZE} bytes and a multiple of {PAGE_SIZE}, not {0}")]
    Size(u64),
    /// The file could not be made.
    #[error("cannot make {size} bytes of VRAM")]
    File {
        /// How much was asked for.
        size: u64,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file could not be mapped.
    #[error("cannot map {size} bytes of VRAM")]
    Map {
        /// How much was asked for.
        size: u64,
        /// Why not.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}

/// Whether `size` is one that VRAM can have.
pub const fn size_is_valid(size: u64) -> bool {
    size >= MIN_SIZE && size <= MAX_SIZE && size & (PAGE_SIZE - 1) == 0
}

impl Vram {
    /// Makes `size` bytes, all zero; none of them takes up memory until it is stored to.
    pub fn new(size: u64) -> Result<Self, Error> {
        let length = usize::try_from(size).map_err(|_| Error::Size(size))?;
        if !size_is_valid(size) {
            return Err(Error::Size(size));
        }
        let file = Self::make_file(size).map_err(|source| Error::File { size, source })?;
        let backing = file.try_clone().map_err(|source| Error::File { size, source })?;
        let region = MmapRegion::from_file(FileOffset::new(backing, 0), length)
            .map_err(|source| Error::Map { size, source })?;
        Ok(Self {
            file,
            region,
            size,
            poison: Poison::default(),
        })
    }

    fn make_file(size: u64) -> std::io::Result<File> {
        let fd = memfd_create("pinion-vram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, size)?;
        // Whoever gets the file later (an aperture maps it) cannot take memory away from under us.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(File::from(fd))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bytes of it take up memory of the host.
    pub fn used(&self) -> u64 {
        // In units of 512 bytes, whatever the file system.
        fstat(&self.file).map_or(0, |file| {
            u64::try_from(file.st_blocks).unwrap_or(0).saturating_mul(512)
        })
    }

    /// The file that it is, for others to map. It cannot be made smaller or larger.
    pub fn duplicate(&self) -> Result<File, Error> {
        self.file.try_clone().map_err(|source| Error::File {
            size: self.size,
            source,
        })
    }

    /// The `length` bytes at `offset`, if all of them exist.
    pub fn slice(&self, offset: u64, length: usize) -> Option<VolatileSlice<'_>> {
        self.region.get_slice(usize::try_from(offset).ok()?, length).ok()
    }

    /// Has the page at `offset` lose what is in it.
    pub fn poison(&self, offset: u64) {
        let mut pages = self.poison.pages.lock();
        if offset < self.size && pages.len() < MAX_POISONED {
            pages.insert(offset & !(PAGE_SIZE - 1));
            self.poison.any.store(true, Ordering::Relaxed);
        }
    }

    /// Whether any page has lost what was in it.
    #[inline]
    pub fn has_poison(&self) -> bool {
        self.poison.any.load(Ordering::Relaxed)
    }

    /// Whether the page at `offset` has lost what was in it.
    #[inline]
    pub fn is_poisoned(&self, offset: u64) -> bool {
        self.has_poison() && self.poison.pages.lock().contains(&(offset & !(PAGE_SIZE - 1)))
    }

    /// Makes all of it zero, heals it, and gives the memory behind it back.
    pub fn clear(&self) {
        self.poison.pages.lock().clear();
        self.poison.any.store(false, Ordering::Relaxed);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = fallocate(&self.file, flags, 0, self.size) {
            log::error!("cannot clear VRAM: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for size in [0, MIN_SIZE - 1, MIN_SIZE + 1, MAX_SIZE + PAGE_SIZE, u64::MAX] {
            assert!(matches!(Vram::new(size), Err(Error::Size(_))), "{size}");
        }
    }

    #[test]
    fn reads_back_what_was_stored_and_clears() {
        let vram = Vram::new(MIN_SIZE).unwrap();
        let slice = vram.slice(MIN_SIZE - 8, 8).unwrap();
        slice.write_obj(0x1122_3344_5566_7788_u64, 0).unwrap();
        assert_eq!(slice.read_obj::<u64>(0).unwrap(), 0x1122_3344_5566_7788);
        vram.clear();
        assert_eq!(slice.read_obj::<u64>(0).unwrap(), 0);
        assert!(vram.slice(MIN_SIZE - 7, 8).is_none());
        assert!(vram.slice(u64::MAX, 8).is_none());
        vram.poison(0x1fff);
        vram.poison(MIN_SIZE);
        let poisoned: Vec<_> = [0xfff, 0x1000, 0x2000, MIN_SIZE]
            .map(|at| vram.is_poisoned(at))
            .into();
        assert_eq!(poisoned, [false, true, false, false]);
        vram.clear();
        assert!(!vram.is_poisoned(0x1000));
    }

    #[test]
    fn a_terabyte_is_sparse() {
        let vram = Vram::new(MAX_SIZE).unwrap();
        vram.slice(MAX_SIZE - 8, 8).unwrap().write_obj(1_u64, 0).unwrap();
        let used = vram.used();
        assert!((8..=2 << 20).contains(&used), "{used} bytes are in use");
    }
}
