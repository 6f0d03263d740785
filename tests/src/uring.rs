// SPDX-License-Identifier: Apache-2.0 OR MIT

//! As much of io_uring as it takes to have the kernel hold memory for long, and use it (`io_uring_register(2)`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

const REGISTER_BUFFERS: u32 = 0;
const ENTER_GETEVENTS: u32 = 1;
const OFFSET_SQ_RING: i64 = 0;
const OFFSET_CQ_RING: i64 = 0x800_0000;
const OFFSET_SQES: i64 = 0x1000_0000;
const OP_WRITE_FIXED: u8 = 5;

/// `struct io_sqring_offsets`, and `struct io_cqring_offsets` with other names.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Offsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    /// CQ: overflow.
    flags: u32,
    /// CQ: where the entries are.
    dropped: u32,
    /// SQ: where the array is.
    array: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Parameters {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq: Offsets,
    cq: Offsets,
}

/// `struct io_uring_sqe`, as far as it is needed.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Submission {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    descriptor: i32,
    offset: u64,
    address: u64,
    length: u32,
    rw_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    file_index: i32,
    rest: [u64; 2],
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

const _: () = assert!(size_of::<Parameters>() == 120 && size_of::<Submission>() == 64);

/// Part of a ring that is shared with the kernel.
struct Shared {
    start: *mut u8,
    length: usize,
}

impl Shared {
    fn new(ring: &OwnedFd, length: usize, offset: i64) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let descriptor = ring.as_raw_fd();
        // SAFETY: It replaces nothing.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                descriptor,
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    /// What is at an offset that the kernel has told.
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset % align_of::<T>() == 0 && offset + size_of::<T>() <= self.length);
        // SAFETY: It is within the mapping.
        unsafe { self.start.add(offset) }.cast()
    }

    fn number(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: It is within the mapping, aligned, and shared with the kernel as an atomic number.
        unsafe { AtomicU32::from_ptr(self.at(offset as usize)) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: It is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// A ring for one request at a time.
pub struct Uring {
    ring: OwnedFd,
    parameters: Parameters,
    sq: Shared,
    cq: Shared,
    entries: Shared,
    buffer: (*mut u8, usize),
}

impl Uring {
    /// A new one.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn new() -> io::Result<Self> {
        let mut parameters = Parameters::default();
        // SAFETY: The parameters are valid, and as long as the kernel expects.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut parameters) };
        if ring < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: It is new, and nobody else's.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        let sq = (parameters.sq.array + parameters.sq_entries * 4) as usize;
        let cq = parameters.cq.dropped as usize + parameters.cq_entries as usize * size_of::<Completion>();
        Ok(Self {
            sq: Shared::new(&ring, sq, OFFSET_SQ_RING)?,
            cq: Shared::new(&ring, cq, OFFSET_CQ_RING)?,
            entries: Shared::new(
                &ring,
                parameters.sq_entries as usize * size_of::<Submission>(),
                OFFSET_SQES,
            )?,
            ring,
            parameters,
            buffer: (ptr::null_mut(), 0),
        })
    }

    /// Has the kernel pin memory for as long as the ring is there.
    ///
    /// # Errors
    ///
    /// What the system says.
    ///
    /// # Safety
    ///
    /// The memory must be there, and may be accessed by others, until the ring is dropped.
    pub unsafe fn register(&mut self, start: *mut u8, length: usize) -> io::Result<()> {
        let vector = libc::iovec {
            iov_base: start.cast(),
            iov_len: length,
        };
        // SAFETY: One vector is there. The caller answers for the memory.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.ring.as_raw_fd(),
                REGISTER_BUFFERS,
                &raw const vector,
                1,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        self.buffer = (start, length);
        Ok(())
    }

    /// Writes the first `length` bytes of the registered memory to a file, as they are in the pages that the kernel holds, and waits
    /// for it.
    ///
    /// # Errors
    ///
    /// What the system says, or that less was written.
    pub fn write_fixed(&mut self, file: &File, offset: u64, length: usize) -> io::Result<()> {
        let (start, size) = self.buffer;
        assert!(length <= size, "{length} bytes of {size} that are registered");
        let entry = Submission {
            opcode: OP_WRITE_FIXED,
            descriptor: file.as_raw_fd(),
            offset,
            address: start.addr() as u64,
            length: length as u32,
            ..Submission::default()
        };
        let tail = self.sq.number(self.parameters.sq.tail);
        let index =
            tail.load(Ordering::Relaxed) & self.sq.number(self.parameters.sq.mask).load(Ordering::Relaxed);
        let slot = self
            .entries
            .at::<Submission>(index as usize * size_of::<Submission>());
        // SAFETY: The kernel does not look at an entry before it is told of it.
        unsafe { slot.write(entry) };
        self.sq
            .number(self.parameters.sq.array + index * 4)
            .store(index, Ordering::Relaxed);
        tail.fetch_add(1, Ordering::Release);
        // SAFETY: One entry is there; no signal mask.
        let entered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.ring.as_raw_fd(),
                1,
                1,
                ENTER_GETEVENTS,
                ptr::null::<u8>(),
                0,
            )
        };
        if entered != 1 {
            return Err(io::Error::last_os_error());
        }
        let head = self.cq.number(self.parameters.cq.head);
        if head.load(Ordering::Relaxed) == self.cq.number(self.parameters.cq.tail).load(Ordering::Acquire) {
            return Err(io::Error::other("no completion"));
        }
        let index =
            head.load(Ordering::Relaxed) & self.cq.number(self.parameters.cq.mask).load(Ordering::Relaxed);
        let place = self.parameters.cq.dropped as usize + index as usize * size_of::<Completion>();
        // SAFETY: The kernel has written it, and does not change it before it is told that it was read.
        let completion = unsafe { self.cq.at::<Completion>(place).read() };
        head.fetch_add(1, Ordering::Release);
        match usize::try_from(completion.result) {
            Err(_) => Err(io::Error::from_raw_os_error(-completion.result)),
            Ok(written) if written != length => Err(io::Error::other(format!("{written} of {length} bytes"))),
            Ok(_) => Ok(()),
        }
    }
}
