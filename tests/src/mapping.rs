// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory for a GPU and CPU threads to work on.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use pinion_client::PAGE_SIZE;

/// A mapping, which is unmapped when this is dropped.
///
/// It is only ever accessed through raw pointers and atomics, so that the GPU may write to it at any time.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: It is nothing but an address range. Access is through atomics and volatile operations.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Anonymous private memory: that many pages, not populated.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn anonymous(pages: usize) -> io::Result<Self> {
        Self::new(
            None,
            pages,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        )
    }

    /// Memory with this protection and of this kind (`PROT_*`, `MAP_*`), at an address, which replaces what is there, or
    /// wherever there is room.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn new(address: Option<usize>, pages: usize, protection: i32, flags: i32) -> io::Result<Self> {
        Self::map(address, pages, protection, flags, -1)
    }

    /// The first pages of a file, to be read and written, shared or private (`MAP_*`).
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn of_file(file: impl AsFd, pages: usize, flags: i32) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        Self::map(None, pages, protection, flags, file.as_fd().as_raw_fd())
    }

    fn map(
        address: Option<usize>,
        pages: usize,
        protection: i32,
        flags: i32,
        file: RawFd,
    ) -> io::Result<Self> {
        let fixed = if address.is_some() {
            libc::MAP_FIXED_NOREPLACE
        } else {
            0
        };
        let address = ptr::without_provenance_mut(address.unwrap_or(0));
        let length = pages * PAGE_SIZE;
        // SAFETY: It replaces nothing.
        let start = unsafe { libc::mmap(address, length, protection, flags | fixed, file, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// A byte.
    ///
    /// # Panics
    ///
    /// If it is not in the mapping.
    #[must_use]
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(
            offset < self.length,
            "offset {offset:#x} in a mapping of {:#x} bytes",
            self.length
        );
        // SAFETY: The offset is within the mapping.
        unsafe { self.as_ptr().add(offset) }
    }

    /// The first byte of a page.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    #[must_use]
    pub fn page(&self, index: usize) -> *mut u8 {
        self.at(index * PAGE_SIZE)
    }

    /// The 64-bit number at a multiple of 8.
    ///
    /// # Panics
    ///
    /// If it is not in the mapping, or misaligned.
    #[must_use]
    pub fn atomic(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset + 8 <= self.length, "offset {offset:#x}");
        // SAFETY: It is aligned and within the mapping, and all access by the CPU is atomic or volatile.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: there is no empty mapping.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.length / PAGE_SIZE
    }

    /// Copies bytes out.
    ///
    /// # Panics
    ///
    /// If they are not in the mapping.
    #[must_use]
    pub fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(length <= self.length && offset <= self.length - length);
        (offset..offset + length)
            // SAFETY: It is within the mapping.
            .map(|offset| unsafe { self.at(offset).read_volatile() })
            .collect()
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// If there is no room.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.length && offset <= self.length - bytes.len());
        for (index, &byte) in bytes.iter().enumerate() {
            // SAFETY: It is within the mapping.
            unsafe { self.at(offset + index).write_volatile(byte) };
        }
    }

    /// Changes what the process may do with it (`PROT_*`).
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: What is lost is access that only the caller can miss.
        check(unsafe { libc::mprotect(self.as_ptr().cast(), self.length, protection) })
    }

    /// The 64-bit numbers in it.
    #[must_use]
    pub fn words(&self) -> Vec<u64> {
        let word = |offset| self.atomic(offset).load(Ordering::Relaxed);
        (0..self.length).step_by(8).map(word).collect()
    }

    /// Stores 64-bit numbers from the beginning on.
    ///
    /// # Panics
    ///
    /// If there is no room.
    pub fn set_words(&self, words: &[u64]) {
        for (index, word) in words.iter().enumerate() {
            self.atomic(index * 8).store(*word, Ordering::Relaxed);
        }
    }

    /// Gives advice (`MADV_*`) about all of it.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: The memory is accessed through raw pointers only: its content may change.
        check(unsafe { libc::madvise(self.as_ptr().cast(), self.length, advice) })
    }

    /// Moves it elsewhere.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn remap(&mut self) -> io::Result<()> {
        self.remap_to(Self::anonymous(self.pages())?)
    }

    /// Moves it to where `target` is, which it replaces.
    ///
    /// # Errors
    ///
    /// What the system says.
    ///
    /// # Panics
    ///
    /// Unless the two are of the same size.
    pub fn remap_to(&mut self, target: Self) -> io::Result<()> {
        assert_eq!(self.length, target.length, "bytes to be moved");
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, to) = (self.as_ptr().cast(), target.as_ptr().cast::<libc::c_void>());
        // SAFETY: The target is a mapping of the same size of our own, which nothing is in.
        let moved = unsafe { libc::mremap(from, self.length, self.length, flags, to) };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.start = target.start;
        std::mem::forget(target);
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: It is ours, and nobody has a reference to it any more.
        unsafe { libc::munmap(self.as_ptr().cast(), self.length) };
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
