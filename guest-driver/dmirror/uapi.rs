// SPDX-License-Identifier: GPL-2.0-only

//! The interface of the kernel's HMM test module, `lib/test_hmm_uapi.h`. Where the kernel's source is at hand, the compiler
//! compares this file with it.

use kernel::{ioctl::_IOWR, prelude::*};
use zerocopy_derive::{Immutable, KnownLayout};

/// `struct hmm_dmirror_cmd`: the argument of all commands.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Command {
    /// Where in the process's memory the device is to do it: a page boundary.
    pub(super) addr: u64,
    /// Where data that the device has read goes, and data that it writes comes from.
    pub(super) ptr: u64,
    /// How many pages. For FLAGS: the flags.
    pub(super) npages: u64,
    /// Pages that were copied. Written by the driver.
    pub(super) cpages: u64,
    /// Faults of the device. Written by the driver.
    pub(super) faults: u64,
}

const fn number(number: u32) -> u32 {
    _IOWR::<Command>('H' as u32, number)
}

/// `HMM_DMIRROR_READ`: the device reads `addr` and stores it at `ptr`.
pub(super) const READ: u32 = number(0);
/// `HMM_DMIRROR_WRITE`: the device reads `ptr` and stores it at `addr`.
pub(super) const WRITE: u32 = number(1);
/// `HMM_DMIRROR_MIGRATE_TO_DEV`: moves pages to the device, which then reads them and stores them at `ptr`.
pub(super) const MIGRATE_TO_DEV: u32 = number(2);
/// `HMM_DMIRROR_MIGRATE_TO_SYS`: moves pages home.
pub(super) const MIGRATE_TO_SYS: u32 = number(3);
/// `HMM_DMIRROR_SNAPSHOT`: stores what the CPU's page table says at `ptr`, a byte for each page.
pub(super) const SNAPSHOT: u32 = number(4);
/// `HMM_DMIRROR_EXCLUSIVE`: gives the device exclusive access; it then reads the pages and stores them at `ptr`.
pub(super) const EXCLUSIVE: u32 = number(5);
/// `HMM_DMIRROR_CHECK_EXCLUSIVE`: EPERM if the device has exclusive access to any of the pages.
pub(super) const CHECK_EXCLUSIVE: u32 = number(6);
/// `HMM_DMIRROR_RELEASE`: brings everything home that is in the device's memory.
pub(super) const RELEASE: u32 = number(7);
/// `HMM_DMIRROR_FLAGS`: sets flags of the open file.
pub(super) const FLAGS: u32 = number(8);
/// `HMM_DMIRROR_READ_UNLOCKED`: READ, where resolving a fault may take mmap_lock to be let go.
pub(super) const READ_UNLOCKED: u32 = number(9);

/// `HMM_DMIRROR_FLAG_FAIL_ALLOC`: the next allocation of memory to migrate to fails.
pub(super) const FLAG_FAIL_ALLOC: u64 = 1 << 0;

/// `HMM_DMIRROR_PROT_ERROR`: nothing that can be read.
pub(super) const PROT_ERROR: u8 = 0xff;
/// `HMM_DMIRROR_PROT_NONE`: nothing is there.
pub(super) const PROT_NONE: u8 = 0x00;
/// `HMM_DMIRROR_PROT_READ`: may be read.
pub(super) const PROT_READ: u8 = 0x01;
/// `HMM_DMIRROR_PROT_WRITE`: may be read and written.
pub(super) const PROT_WRITE: u8 = 0x02;
/// `HMM_DMIRROR_PROT_PMD`: part of 2 MiB that are mapped as one.
pub(super) const PROT_PMD: u8 = 0x04;
/// `HMM_DMIRROR_PROT_PUD`: part of 1 GiB that is mapped as one.
pub(super) const PROT_PUD: u8 = 0x08;
/// `HMM_DMIRROR_PROT_ZERO`: the page of zeros.
pub(super) const PROT_ZERO: u8 = 0x10;
/// `HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL`: a device-private page of this device.
pub(super) const PROT_DEV_PRIVATE_LOCAL: u8 = 0x20;
/// `HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL`: a device-coherent page of this device.
pub(super) const PROT_DEV_COHERENT_LOCAL: u8 = 0x40;
/// `HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE`: a device-coherent page of another device.
pub(super) const PROT_DEV_COHERENT_REMOTE: u8 = 0x50;

#[cfg(has_test_hmm_uapi)]
mod agreement {
    use super::*;
    use crate::bindings as c;
    use core::mem::{offset_of, size_of};

    macro_rules! agree {
        ($($name:ident = $value:expr;)*) => { $(const _: () = assert!(c::$name as u64 == $value as u64);)* };
    }

    macro_rules! same_place {
        ($($field:ident)*) => {
            $(const _: () = assert!(offset_of!(c::hmm_dmirror_cmd, $field) == offset_of!(Command, $field));)*
        };
    }

    const _: () = assert!(size_of::<c::hmm_dmirror_cmd>() == size_of::<Command>());
    same_place! { addr ptr npages cpages faults }
    agree! {
        PINION_DMIRROR_READ = READ;
        PINION_DMIRROR_WRITE = WRITE;
        PINION_DMIRROR_MIGRATE_TO_DEV = MIGRATE_TO_DEV;
        PINION_DMIRROR_MIGRATE_TO_SYS = MIGRATE_TO_SYS;
        PINION_DMIRROR_SNAPSHOT = SNAPSHOT;
        PINION_DMIRROR_EXCLUSIVE = EXCLUSIVE;
        PINION_DMIRROR_CHECK_EXCLUSIVE = CHECK_EXCLUSIVE;
        PINION_DMIRROR_RELEASE = RELEASE;
        PINION_DMIRROR_FLAGS = FLAGS;
        PINION_DMIRROR_READ_UNLOCKED = READ_UNLOCKED;
        PINION_DMIRROR_FLAG_FAIL_ALLOC = FLAG_FAIL_ALLOC;
        HMM_DMIRROR_PROT_ERROR = PROT_ERROR;
        HMM_DMIRROR_PROT_NONE = PROT_NONE;
        HMM_DMIRROR_PROT_READ = PROT_READ;
        HMM_DMIRROR_PROT_WRITE = PROT_WRITE;
        HMM_DMIRROR_PROT_PMD = PROT_PMD;
        HMM_DMIRROR_PROT_PUD = PROT_PUD;
        HMM_DMIRROR_PROT_ZERO = PROT_ZERO;
        HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL = PROT_DEV_PRIVATE_LOCAL;
        HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL = PROT_DEV_COHERENT_LOCAL;
        HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE = PROT_DEV_COHERENT_REMOTE;
    }
}
