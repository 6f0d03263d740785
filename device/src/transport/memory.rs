// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory, as the core sees it.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::gpu::memory::SystemMemory;

/// One memory table of the frontend.
pub(super) struct GuestMap(pub(super) Arc<GuestMemoryMmap>);

impl SystemMemory for GuestMap {
    fn slice(&self, address: u64, length: usize) -> Option<VolatileSlice<'_>> {
        self.0.get_slice(GuestAddress(address), length).ok()
    }
}
