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

/// Version of the interface.
pub(crate) const VERSION: u32 = 1;

/// `PINION_PIN_METHOD_*`.
pub(crate) const PIN_METHOD_MIGRATE_PFN: u32 = 1;
/// See above.
pub(crate) const PIN_METHOD_TAKEOVER: u32 = 2;

/// `PINION_STATUS_*`; the others are those of the device.
pub(crate) const STATUS_FAULT: u32 = 9;
/// See above.
pub(crate) const STATUS_DEVICE_LOST: u32 = 0x100;
/// See above.
pub(crate) const STATUS_NOT_EXCLUSIVE: u32 = 0x101;
/// See above.
pub(crate) const STATUS_NO_MEMORY: u32 = 0x102;

/// `PINION_ADVISE_ATOMICS`.
pub(crate) const ADVISE_ATOMICS: u32 = 1;
/// `PINION_ATOMICS_PIN`.
pub(crate) const ATOMICS_PIN: u32 = 0;
/// `PINION_ATOMICS_UNPROTECTED`.
pub(crate) const ATOMICS_UNPROTECTED: u32 = 1;

/// `PINION_QUERY_MAX`.
pub(crate) const QUERY_MAX: u64 = 512;
/// `PINION_PAGE_CPU`.
pub(crate) const PAGE_CPU: u32 = 0;
/// `PINION_PAGE_MIRRORED`.
pub(crate) const PAGE_MIRRORED: u32 = 1;
/// `PINION_PAGE_PINNED`.
pub(crate) const PAGE_PINNED: u32 = 3;

/// A structure of the interface: starts with its size and its flags.
pub(crate) trait Structure: FromBytes + IntoBytes + zerocopy::Immutable + Sized {
    /// What version 1 had.
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
    Info = 32 {
        size: u32 = 0, flags: u32 = 4, version: u32 = 8, rings: u32 = 12, max_batch: u32 = 16,
        pin_method: u32 = 20, vram_size: u64 = 24,
    }
    /// `struct pinion_submit`.
    Submit = 32 {
        size: u32 = 0, flags: u32 = 4, ring: u32 = 8, count: u32 = 12, commands: u64 = 16, sequence: u64 = 24,
    }
    /// `struct pinion_wait`.
    Wait = 56 {
        size: u32 = 0, flags: u32 = 4, ring: u32 = 8, status: u32 = 12, sequence: u64 = 16, timeout_ns: u64 = 24,
        fault_address: u64 = 32, executed: u32 = 40, reserved: u32 = 44, repeats: u64 = 48,
    }
    /// `struct pinion_advise`.
    Advise = 32 {
        size: u32 = 0, flags: u32 = 4, address: u64 = 8, length: u64 = 16, advice: u32 = 24, value: u32 = 28,
    }
    /// `struct pinion_query`.
    Query = 32 {
        size: u32 = 0, flags: u32 = 4, address: u64 = 8, count: u64 = 16, pages: u64 = 24,
    }
    /// `struct pinion_page`.
    Page = 16 {
        state: u32 = 0, rights: u32 = 4, pfn: u64 = 8,
    }
}

/// Has the compiler compare this file, and what the device's interface shares with it, with the C header.
macro_rules! agree {
    ($($name:ident = $value:expr;)*) => { $(const _: () = assert!(c::$name as u64 == $value as u64);)* };
}

agree! {
    PINION_IOCTL_BASE = IOCTL_BASE;
    PINION_PIN_METHOD_MIGRATE_PFN = PIN_METHOD_MIGRATE_PFN;
    PINION_PIN_METHOD_TAKEOVER = PIN_METHOD_TAKEOVER;
    PINION_STATUS_OK = abi::STATUS_OK;
    PINION_STATUS_INVALID = abi::STATUS_INVALID;
    PINION_STATUS_UNSUPPORTED = abi::STATUS_UNSUPPORTED;
    PINION_STATUS_BAD_ADDRESS = abi::STATUS_BAD_ADDRESS;
    PINION_STATUS_BUS_ERROR = abi::STATUS_BUS_ERROR;
    PINION_STATUS_CONTEXT_ERROR = abi::STATUS_CONTEXT_ERROR;
    PINION_STATUS_FAULT = STATUS_FAULT;
    PINION_STATUS_DEVICE_LOST = STATUS_DEVICE_LOST;
    PINION_STATUS_NOT_EXCLUSIVE = STATUS_NOT_EXCLUSIVE;
    PINION_STATUS_NO_MEMORY = STATUS_NO_MEMORY;
    PINION_ADVISE_ATOMICS = ADVISE_ATOMICS;
    PINION_ATOMICS_PIN = ATOMICS_PIN;
    PINION_ATOMICS_UNPROTECTED = ATOMICS_UNPROTECTED;
    PINION_QUERY_MAX = QUERY_MAX;
    PINION_PAGE_CPU = PAGE_CPU;
    PINION_PAGE_MIRRORED = PAGE_MIRRORED;
    PINION_PAGE_PINNED = PAGE_PINNED;
    PINION_RIGHT_READ = abi::PTE_READ >> 1;
    PINION_RIGHT_WRITE = abi::PTE_WRITE >> 1;
    PINION_RIGHT_ATOMIC = abi::PTE_ATOMIC >> 1;
    PINION_MAX_QUEUES = abi::QUEUE_FIRST_RING + abi::MAX_RINGS;
}
const _: () = {
    assert!(size_of::<c::pinion_info>() == size_of::<Info>());
    assert!(size_of::<c::pinion_submit>() == size_of::<Submit>());
    assert!(size_of::<c::pinion_wait>() == size_of::<Wait>());
    assert!(size_of::<c::pinion_advise>() == size_of::<Advise>());
    assert!(size_of::<c::pinion_query>() == size_of::<Query>());
    assert!(size_of::<c::pinion_page>() == size_of::<Page>());
    assert!(size_of::<c::pinion_command>() == size_of::<abi::Command>());
};

impl Structure for Info {}
impl Structure for Submit {}
impl Structure for Wait {}
impl Structure for Advise {}
impl Structure for Query {}

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
