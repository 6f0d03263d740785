// SPDX-License-Identifier: GPL-2.0-only

//! The structures of `uapi/pinion.h`, and how they are read from and written to user space.

use crate::{abi, bindings as c};
use core::mem::{offset_of, size_of};
use kernel::{
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};
use zerocopy_derive::{Immutable, KnownLayout};

/// `PINION_IOCTL_BASE`.
pub(crate) const IOCTL_BASE: u32 = 0xb9;
/// `PINION_IOCTL_INFO`.
pub(crate) const INFO: u32 = 0;
/// `PINION_IOCTL_SUBMIT`.
pub(crate) const SUBMIT: u32 = 1;
/// `PINION_IOCTL_WAIT`.
pub(crate) const WAIT: u32 = 2;
/// `PINION_IOCTL_ADVISE`.
pub(crate) const ADVISE: u32 = 3;
/// `PINION_IOCTL_QUERY`.
pub(crate) const QUERY: u32 = 4;
/// `PINION_IOCTL_PREFETCH`.
pub(crate) const PREFETCH: u32 = 5;
/// `PINION_IOCTL_DISCARD`.
pub(crate) const DISCARD: u32 = 6;

/// `PINION_VERSION`.
pub(crate) const VERSION: u32 = 3;

/// `PINION_PIN_METHOD_*`.
pub(crate) const PIN_METHOD_MIGRATE_PFN: u32 = 1;
/// See above.
pub(crate) const PIN_METHOD_TAKEOVER: u32 = 2;

/// `PINION_FENCE_*`.
pub(crate) const FENCE_SEQUENCE: u32 = 0;
/// See above.
pub(crate) const FENCE_DESCRIPTOR: u32 = 1;
/// `PINION_MAX_FENCES`.
pub(crate) const MAX_FENCES: u32 = 64;

/// `PINION_SUBMIT_*`.
pub(crate) const SUBMIT_EVENTFD: u32 = 1 << 0;
/// See above.
pub(crate) const SUBMIT_FENCE: u32 = 1 << 1;

/// `PINION_WAIT_*`.
pub(crate) const WAIT_ANY: u32 = 1 << 0;
/// See above.
pub(crate) const WAIT_ABSOLUTE: u32 = 1 << 1;

/// `PINION_STATUS_*`; the others are those of the device.
pub(crate) const STATUS_FAULT: u32 = 9;
/// See above.
pub(crate) const STATUS_DEVICE_LOST: u32 = 0x100;
/// See above.
pub(crate) const STATUS_NOT_EXCLUSIVE: u32 = 0x101;
/// See above.
pub(crate) const STATUS_NO_MEMORY: u32 = 0x102;
/// See above.
pub(crate) const STATUS_PENDING: u32 = 0x1ff;

/// `PINION_ADVISE_*`.
pub(crate) const ADVISE_ATOMICS: u32 = 1;
/// See above.
pub(crate) const ADVISE_LOCATION: u32 = 2;

/// `PINION_ATOMICS_*`.
pub(crate) const ATOMICS_AUTO: u32 = 0;
/// See above.
pub(crate) const ATOMICS_PIN: u32 = 1;
/// See above.
pub(crate) const ATOMICS_EXCLUSIVE: u32 = 2;
/// See above.
pub(crate) const ATOMICS_MIGRATE: u32 = 3;
/// See above.
pub(crate) const ATOMICS_UNPROTECTED: u32 = 4;

/// `PINION_LOCATION_*`.
pub(crate) const LOCATION_NONE: u32 = 0;
/// See above.
pub(crate) const LOCATION_SYSTEM: u32 = 1;
/// See above.
pub(crate) const LOCATION_VRAM: u32 = 2;
/// See above.
pub(crate) const LOCATION_APERTURE: u32 = 3;

/// `PINION_QUERY_MAX`.
pub(crate) const QUERY_MAX: u64 = 512;
/// `PINION_PAGE_*`.
pub(crate) const PAGE_CPU: u32 = 0;
/// See above.
pub(crate) const PAGE_MIRRORED: u32 = 1;
/// See above.
pub(crate) const PAGE_VRAM: u32 = 2;
/// See above.
pub(crate) const PAGE_PINNED: u32 = 3;
/// See above.
#[allow(dead_code)]
pub(crate) const PAGE_EXCLUSIVE: u32 = 4;
/// See above.
pub(crate) const PAGE_COHERENT: u32 = 5;

/// A structure of the interface: starts with its size and its flags.
pub(crate) trait Structure: FromBytes + IntoBytes + zerocopy::Immutable + Sized {
    /// What version 2 had.
    const MINIMUM: usize = size_of::<Self>();
    /// Flags that are known.
    const FLAGS: u32 = 0;
}

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty = $offset:literal,)* })*) => { $(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
        pub(crate) struct $name {
            $($(#[$field_doc])* pub(crate) $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == $size);
        $(const _: () = assert!(offset_of!($name, $field) == $offset);)*
    )* };
}

structures! {
    /// `struct pinion_info`.
    Info = 56 {
        size: u32 = 0, flags: u32 = 4, version: u32 = 8, rings: u32 = 12, max_batch: u32 = 16,
        pin_method: u32 = 20, vram_size: u64 = 24, max_submissions: u32 = 32, max_commands: u32 = 36, atomics: u32 = 40,
        locations: u32 = 44, aperture_size: u64 = 48,
    }
    /// `struct pinion_fence`.
    Fence = 16 {
        kind: u32 = 0, id: u32 = 4, sequence: u64 = 8,
    }
    /// `struct pinion_submit`.
    Submit = 56 {
        size: u32 = 0, flags: u32 = 4, ring: u32 = 8, count: u32 = 12, commands: u64 = 16, fences: u64 = 24,
        fence_count: u32 = 32, eventfd: i32 = 36, fence: i32 = 40, reserved: u32 = 44, sequence: u64 = 48,
    }
    /// `struct pinion_wait_entry`.
    WaitEntry = 40 {
        ring: u32 = 0, status: u32 = 4, sequence: u64 = 8, fault_address: u64 = 16, repeats: u64 = 24,
        executed: u32 = 32, reserved: u32 = 36,
    }
    /// `struct pinion_wait`.
    Wait = 32 {
        size: u32 = 0, flags: u32 = 4, entries: u64 = 8, count: u32 = 16, ended: u32 = 20, timeout_ns: i64 = 24,
    }
    /// `struct pinion_advise`.
    Advise = 32 {
        size: u32 = 0, flags: u32 = 4, address: u64 = 8, length: u64 = 16, advice: u32 = 24, value: u32 = 28,
    }
    /// `struct pinion_prefetch`.
    Prefetch = 32 {
        size: u32 = 0, flags: u32 = 4, address: u64 = 8, length: u64 = 16, location: u32 = 24, reserved: u32 = 28,
    }
    /// `struct pinion_discard`.
    Discard = 24 {
        size: u32 = 0, flags: u32 = 4, address: u64 = 8, length: u64 = 16,
    }
    /// `struct pinion_query`.
    Query = 32 {
        size: u32 = 0, flags: u32 = 4, address: u64 = 8, count: u64 = 16, pages: u64 = 24,
    }
    /// `struct pinion_page`.
    Page = 24 {
        state: u32 = 0, rights: u32 = 4, page_size: u32 = 8, reserved: u32 = 12, pfn: u64 = 16,
    }
}

/// Has the compiler compare this file, and what the device's interface shares with it, with the C header.
macro_rules! agree {
    ($($name:ident = $value:expr;)*) => { $(const _: () = assert!(c::$name as u64 == $value as u64);)* };
}

agree! {
    PINION_IOCTL_BASE = IOCTL_BASE;
    PINION_VERSION = VERSION;
    PINION_PIN_METHOD_MIGRATE_PFN = PIN_METHOD_MIGRATE_PFN;
    PINION_PIN_METHOD_TAKEOVER = PIN_METHOD_TAKEOVER;
    PINION_FENCE_SEQUENCE = FENCE_SEQUENCE;
    PINION_FENCE_DESCRIPTOR = FENCE_DESCRIPTOR;
    PINION_MAX_FENCES = MAX_FENCES;
    PINION_SUBMIT_EVENTFD = SUBMIT_EVENTFD;
    PINION_SUBMIT_FENCE = SUBMIT_FENCE;
    PINION_WAIT_ANY = WAIT_ANY;
    PINION_WAIT_ABSOLUTE = WAIT_ABSOLUTE;
    PINION_STATUS_OK = abi::STATUS_OK;
    PINION_STATUS_INVALID = abi::STATUS_INVALID;
    PINION_STATUS_UNSUPPORTED = abi::STATUS_UNSUPPORTED;
    PINION_STATUS_BAD_ADDRESS = abi::STATUS_BAD_ADDRESS;
    PINION_STATUS_BUS_ERROR = abi::STATUS_BUS_ERROR;
    PINION_STATUS_CONTEXT_ERROR = abi::STATUS_CONTEXT_ERROR;
    PINION_STATUS_FAULT = STATUS_FAULT;
    PINION_STATUS_RESET = abi::STATUS_RESET;
    PINION_STATUS_HUNG = abi::STATUS_HUNG;
    PINION_STATUS_DEVICE_LOST = STATUS_DEVICE_LOST;
    PINION_STATUS_NOT_EXCLUSIVE = STATUS_NOT_EXCLUSIVE;
    PINION_STATUS_NO_MEMORY = STATUS_NO_MEMORY;
    PINION_STATUS_PENDING = STATUS_PENDING;
    PINION_ADVISE_ATOMICS = ADVISE_ATOMICS;
    PINION_ADVISE_LOCATION = ADVISE_LOCATION;
    PINION_ATOMICS_AUTO = ATOMICS_AUTO;
    PINION_ATOMICS_PIN = ATOMICS_PIN;
    PINION_ATOMICS_EXCLUSIVE = ATOMICS_EXCLUSIVE;
    PINION_ATOMICS_MIGRATE = ATOMICS_MIGRATE;
    PINION_ATOMICS_UNPROTECTED = ATOMICS_UNPROTECTED;
    PINION_LOCATION_NONE = LOCATION_NONE;
    PINION_LOCATION_SYSTEM = LOCATION_SYSTEM;
    PINION_LOCATION_VRAM = LOCATION_VRAM;
    PINION_LOCATION_APERTURE = LOCATION_APERTURE;
    PINION_QUERY_MAX = QUERY_MAX;
    PINION_PAGE_CPU = PAGE_CPU;
    PINION_PAGE_MIRRORED = PAGE_MIRRORED;
    PINION_PAGE_VRAM = PAGE_VRAM;
    PINION_PAGE_PINNED = PAGE_PINNED;
    PINION_PAGE_EXCLUSIVE = PAGE_EXCLUSIVE;
    PINION_PAGE_COHERENT = PAGE_COHERENT;
    PINION_RIGHT_READ = abi::PTE_READ >> 1;
    PINION_RIGHT_WRITE = abi::PTE_WRITE >> 1;
    PINION_RIGHT_ATOMIC = abi::PTE_ATOMIC >> 1;
    PINION_COMMAND_NOP = abi::COMMAND_NOP;
    PINION_COMMAND_COPY = abi::COMMAND_COPY;
    PINION_COMMAND_FILL = abi::COMMAND_FILL;
    PINION_COMMAND_ATOMIC = abi::COMMAND_ATOMIC;
    PINION_COMMAND_SEMAPHORE_WAIT = abi::COMMAND_SEMAPHORE_WAIT;
    PINION_COMMAND_SEMAPHORE_SIGNAL = abi::COMMAND_SEMAPHORE_SIGNAL;
    PINION_COMMAND_TIMESTAMP = abi::COMMAND_TIMESTAMP;
    PINION_COMMAND_PREFETCH = abi::COMMAND_PREFETCH;
    PINION_COMMAND_CHASE = abi::COMMAND_CHASE;
    PINION_MAX_QUEUES = abi::QUEUE_FIRST_RING + abi::MAX_RINGS;
}
const _: () = {
    assert!(size_of::<c::pinion_info>() == size_of::<Info>());
    assert!(size_of::<c::pinion_fence>() == size_of::<Fence>());
    assert!(size_of::<c::pinion_submit>() == size_of::<Submit>());
    assert!(size_of::<c::pinion_wait_entry>() == size_of::<WaitEntry>());
    assert!(size_of::<c::pinion_wait>() == size_of::<Wait>());
    assert!(size_of::<c::pinion_advise>() == size_of::<Advise>());
    assert!(size_of::<c::pinion_prefetch>() == size_of::<Prefetch>());
    assert!(size_of::<c::pinion_discard>() == size_of::<Discard>());
    assert!(size_of::<c::pinion_query>() == size_of::<Query>());
    assert!(size_of::<c::pinion_page>() == size_of::<Page>());
    assert!(size_of::<c::pinion_command>() == size_of::<abi::Command>());
    assert!(size_of::<c::pinion_chase_result>() == size_of::<abi::ChaseResult>());
};

impl Structure for Info {
    const MINIMUM: usize = offset_of!(Info, aperture_size);
}
impl Structure for Submit {
    const FLAGS: u32 = SUBMIT_EVENTFD | SUBMIT_FENCE;
}
impl Structure for Wait {
    const FLAGS: u32 = WAIT_ANY | WAIT_ABSOLUTE;
}
impl Structure for Advise {}
impl Structure for Prefetch {}
impl Structure for Discard {}
impl Structure for Query {}

/// Whether a program may use a command of this kind. Others have an effect on what belongs to the driver (timelines of a
/// ring, which all files share), or are not known.
pub(crate) fn may_be_used(opcode: u8) -> bool {
    matches!(
        opcode,
        abi::COMMAND_NOP
            | abi::COMMAND_COPY
            | abi::COMMAND_FILL
            | abi::COMMAND_ATOMIC
            | abi::COMMAND_SEMAPHORE_WAIT
            | abi::COMMAND_SEMAPHORE_SIGNAL
            | abi::COMMAND_TIMESTAMP
            | abi::COMMAND_PREFETCH
            | abi::COMMAND_CHASE
    )
}

/// Largest structure that is accepted.
const MAXIMUM: usize = kernel::page::PAGE_SIZE;

/// Reads a structure whose first field says how long the caller thinks it is.
///
/// # Errors
///
/// EFAULT; EINVAL for a size that cannot be and for unknown flags; E2BIG if there is something in the part that
/// is not known here.
pub(crate) fn read<T: Structure>(arg: usize) -> Result<T> {
    let mut size = 0u32;
    UserSlice::new(UserPtr::from_addr(arg), size_of::<u32>())
        .reader()
        .read_slice(size.as_mut_bytes())?;
    let size = size as usize;
    if !(T::MINIMUM..=MAXIMUM).contains(&size) {
        return Err(EINVAL);
    }
    let mut value = T::new_zeroed();
    let known = size.min(size_of::<T>());
    let mut reader = UserSlice::new(UserPtr::from_addr(arg), size).reader();
    let bytes = value.as_mut_bytes();
    reader.read_slice(&mut bytes[..known])?;
    while !reader.is_empty() {
        let mut rest = [0u8; 64];
        let part = reader.len().min(rest.len());
        reader.read_slice(&mut rest[..part])?;
        if rest.iter().any(|byte| *byte != 0) {
            return Err(E2BIG);
        }
    }
    let flags = value
        .as_bytes()
        .get(4..8)
        .and_then(|bytes| u32::read_from_bytes(bytes).ok());
    if flags.is_none_or(|flags| flags & !T::FLAGS != 0) {
        return Err(EINVAL);
    }
    Ok(value)
}

/// Writes a structure back, as far as the caller, whose `size` it was, knows it.
pub(crate) fn write<T: Structure>(arg: usize, size: u32, value: &T) -> Result {
    let bytes = value.as_bytes();
    let known = bytes.len().min(size as usize);
    UserSlice::new(UserPtr::from_addr(arg), known)
        .writer()
        .write_slice(&bytes[..known])
}
