// SPDX-License-Identifier: GPL-2.0-only

//! Heterogeneous memory management: what a driver needs that lets a device share a process's memory.
//!
//! - [`notifier`]: hearing that a range of an address space changes, and the sequence protocol by which what
//!   was read from the CPU's page table is known to be still true;
//! - [`range`]: reading (and faulting in) a range of the CPU's page table;
//! - [`migrate`]: moving or pinning pages;
//! - [`exclusive`]: pages that a device has to itself while they stay where they are;
//! - [`pagemap`]: struct pages for memory of a device, private or coherent;
//! - [`memory`]: what is done with them: they take the place of pages which the device has. [`blocks`] allocates
//!   them.
//!
//! Kernel documentation: `Documentation/mm/hmm.rst`.

pub(crate) mod blocks;
pub(crate) mod exclusive;
pub(crate) mod memory;
pub(crate) mod migrate;
pub(crate) mod notifier;
pub(crate) mod page;
pub(crate) mod pagemap;
pub(crate) mod range;
