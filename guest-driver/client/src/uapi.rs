// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The structures and numbers of `guest-driver/uapi/pinion.h`, as they are.
//!
//! The header is the reference and says what everything means; `tests/header.rs` compares the two. The
//! rest of the crate is the pleasant way to use this. It is public for programs that need to send what
//! the rest would not, such as tests of the driver.

#![allow(missing_docs)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// The character that all request numbers share.
pub const IOCTL_BASE: u8 = 0xb9;

pub const VERSION: u32 = 3;

/// `struct pinion_info`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    pub size: u32,
    pub flags: u32,
    pub version: u32,
    pub rings: u32,
    pub max_batch: u32,
    pub pin_method: u32,
    pub vram_size: u64,
    pub max_submissions: u32,
    pub max_commands: u32,
    pub atomics: u32,
    pub locations: u32,
    pub aperture_size: u64,
}

pub const PIN_METHOD_MIGRATE_PFN: u32 = 1;
pub const PIN_METHOD_TAKEOVER: u32 = 2;

/// `struct pinion_command`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    pub opcode: u8,
    pub operation: u8,
    pub width: u8,
    pub flags: u8,
    pub repeat: u32,
    pub address: u64,
    pub source: u64,
    pub length: u64,
    pub operand: u64,
    pub compare: u64,
    pub stride: u32,
    pub span: u32,
    pub reserved: u64,
}

pub const COMMAND_NOP: u8 = 0;
pub const COMMAND_COPY: u8 = 1;
pub const COMMAND_FILL: u8 = 2;
pub const COMMAND_ATOMIC: u8 = 3;
pub const COMMAND_SEMAPHORE_WAIT: u8 = 4;
pub const COMMAND_SEMAPHORE_SIGNAL: u8 = 5;
pub const COMMAND_TIMESTAMP: u8 = 6;
pub const COMMAND_PREFETCH: u8 = 9;
pub const COMMAND_CHASE: u8 = 10;

pub const COMMAND_WRITE_BACK: u8 = 1 << 0;
pub const COMMAND_WRITE_BACK_ALL: u8 = 1 << 1;

pub const ATOMIC_ADD: u8 = 0;
pub const ATOMIC_AND: u8 = 1;
pub const ATOMIC_OR: u8 = 2;
pub const ATOMIC_XOR: u8 = 3;
pub const ATOMIC_MIN_UNSIGNED: u8 = 4;
pub const ATOMIC_MAX_UNSIGNED: u8 = 5;
pub const ATOMIC_MIN_SIGNED: u8 = 6;
pub const ATOMIC_MAX_SIGNED: u8 = 7;
pub const ATOMIC_EXCHANGE: u8 = 8;
pub const ATOMIC_COMPARE_EXCHANGE: u8 = 9;
pub const ATOMIC_LOAD: u8 = 10;
pub const ATOMIC_STORE: u8 = 11;

pub const COMPARE_EQUAL: u8 = 0;
pub const COMPARE_NOT_EQUAL: u8 = 1;
pub const COMPARE_LESS: u8 = 2;
pub const COMPARE_LESS_EQUAL: u8 = 3;
pub const COMPARE_GREATER: u8 = 4;
pub const COMPARE_GREATER_EQUAL: u8 = 5;

pub const ACCESS_READ: u8 = 1 << 0;
pub const ACCESS_WRITE: u8 = 1 << 1;
pub const ACCESS_ATOMIC: u8 = 1 << 2;

/// `struct pinion_chase_result`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChaseResult {
    pub pointer: u64,
    pub sum: u64,
    pub visited: u64,
}

/// `struct pinion_fence`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Fence {
    pub kind: u32,
    pub id: u32,
    pub sequence: u64,
}

pub const FENCE_SEQUENCE: u32 = 0;
pub const FENCE_DESCRIPTOR: u32 = 1;

/// `struct pinion_submit`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Submit {
    pub size: u32,
    pub flags: u32,
    pub ring: u32,
    pub count: u32,
    pub commands: u64,
    pub fences: u64,
    pub fence_count: u32,
    pub eventfd: i32,
    pub fence: i32,
    pub reserved: u32,
    pub sequence: u64,
}

pub const SUBMIT_EVENTFD: u32 = 1 << 0;
pub const SUBMIT_FENCE: u32 = 1 << 1;

pub const MAX_FENCES: u32 = 64;

/// `struct pinion_wait_entry`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct WaitEntry {
    pub ring: u32,
    pub status: u32,
    pub sequence: u64,
    pub fault_address: u64,
    pub repeats: u64,
    pub executed: u32,
    pub reserved: u32,
}

/// `struct pinion_wait`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait {
    pub size: u32,
    pub flags: u32,
    pub entries: u64,
    pub count: u32,
    pub ended: u32,
    pub timeout_ns: i64,
}

pub const WAIT_ANY: u32 = 1 << 0;
pub const WAIT_ABSOLUTE: u32 = 1 << 1;

pub const STATUS_OK: u32 = 0;
pub const STATUS_INVALID: u32 = 1;
pub const STATUS_UNSUPPORTED: u32 = 2;
pub const STATUS_BAD_ADDRESS: u32 = 6;
pub const STATUS_BUS_ERROR: u32 = 7;
pub const STATUS_CONTEXT_ERROR: u32 = 8;
pub const STATUS_FAULT: u32 = 9;
pub const STATUS_RESET: u32 = 11;
pub const STATUS_HUNG: u32 = 12;
pub const STATUS_DEVICE_LOST: u32 = 0x100;
pub const STATUS_NOT_EXCLUSIVE: u32 = 0x101;
pub const STATUS_NO_MEMORY: u32 = 0x102;
pub const STATUS_PENDING: u32 = 0x1ff;

/// `struct pinion_advise`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Advise {
    pub size: u32,
    pub flags: u32,
    pub address: u64,
    pub length: u64,
    pub advice: u32,
    pub value: u32,
}

pub const ADVISE_ATOMICS: u32 = 1;
pub const ADVISE_LOCATION: u32 = 2;

pub const ATOMICS_AUTO: u32 = 0;
pub const ATOMICS_PIN: u32 = 1;
pub const ATOMICS_EXCLUSIVE: u32 = 2;
pub const ATOMICS_MIGRATE: u32 = 3;
pub const ATOMICS_UNPROTECTED: u32 = 4;

pub const LOCATION_NONE: u32 = 0;
pub const LOCATION_SYSTEM: u32 = 1;
pub const LOCATION_VRAM: u32 = 2;
pub const LOCATION_APERTURE: u32 = 3;

/// `struct pinion_prefetch`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Prefetch {
    pub size: u32,
    pub flags: u32,
    pub address: u64,
    pub length: u64,
    pub location: u32,
    pub reserved: u32,
}

/// `struct pinion_discard`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard {
    pub size: u32,
    pub flags: u32,
    pub address: u64,
    pub length: u64,
}

/// `struct pinion_query`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    pub size: u32,
    pub flags: u32,
    pub address: u64,
    pub count: u64,
    pub pages: u64,
}

pub const QUERY_MAX: usize = 512;

/// `struct pinion_page`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Page {
    pub state: u32,
    pub rights: u32,
    pub page_size: u32,
    pub reserved: u32,
    pub pfn: u64,
}

pub const PAGE_CPU: u32 = 0;
pub const PAGE_MIRRORED: u32 = 1;
pub const PAGE_VRAM: u32 = 2;
pub const PAGE_PINNED: u32 = 3;
pub const PAGE_EXCLUSIVE: u32 = 4;
pub const PAGE_COHERENT: u32 = 5;

pub const RIGHT_READ: u32 = 1 << 0;
pub const RIGHT_WRITE: u32 = 1 << 1;
pub const RIGHT_ATOMIC: u32 = 1 << 2;

/// A structure that is the argument of a request.
///
/// # Safety
///
/// `NUMBER` must be a request number for which the driver reads and writes no more than a `Self` at the
/// address that it is given, and leaves there what is a valid `Self`. What the fields of the structure
/// point to is the caller's business.
pub unsafe trait Argument: Default {
    /// The request number.
    const NUMBER: u32;
    /// Its name, for messages.
    const NAME: &'static str;

    /// A zeroed structure with its `size` filled in.
    #[must_use]
    fn new() -> Self;
}

/// `_IOWR(PINION_IOCTL_BASE, number, T)`
const fn iowr<T>(number: u8) -> u32 {
    (3 << 30) | ((size_of::<T>() as u32) << 16) | ((IOCTL_BASE as u32) << 8) | number as u32
}

macro_rules! arguments {
    ($($type:ident = $number:literal, $name:literal;)*) => { $(
        // SAFETY: The number has the size of the structure in it, and that is all the driver touches. The
        // structure is made of integers.
        unsafe impl Argument for $type {
            const NUMBER: u32 = iowr::<$type>($number);
            const NAME: &'static str = $name;

            fn new() -> Self {
                Self { size: size_of::<Self>() as u32, ..Self::default() }
            }
        }
    )* };
}

arguments! {
    Info = 0x00, "PINION_IOCTL_INFO";
    Submit = 0x01, "PINION_IOCTL_SUBMIT";
    Wait = 0x02, "PINION_IOCTL_WAIT";
    Advise = 0x03, "PINION_IOCTL_ADVISE";
    Query = 0x04, "PINION_IOCTL_QUERY";
    Prefetch = 0x05, "PINION_IOCTL_PREFETCH";
    Discard = 0x06, "PINION_IOCTL_DISCARD";
}

/// Makes a request.
///
/// # Errors
///
/// What the system call returns.
///
/// # Safety
///
/// What the fields of the structure point to must be there, and must be writable where the request writes to
/// it. The rules of [`Gpu::submit`](crate::Gpu::submit) hold for [`Submit`].
pub unsafe fn ioctl<T: Argument>(file: BorrowedFd<'_>, argument: &mut T) -> io::Result<()> {
    let argument: *mut T = argument;
    // SAFETY: `Argument` promises that the driver touches the structure only, which is borrowed exclusively; the
    // caller answers for the rest.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), T::NUMBER as _, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
