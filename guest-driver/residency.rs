// SPDX-License-Identifier: GPL-2.0-only

//! Where pages are, and how those that are pinned come home.
//!
//! A pinned page is represented by a device-private page, which knows in which context and at which address
//! the GPU maps it. Coming home always goes the same way: unmap and lock the stand-in (so that nobody pins or
//! faults meanwhile), revoke the GPU's mapping, give the very same page back.

use crate::{
    gpu::{Contexts, Gpu},
    hmm::{
        memory::{DevicePage, FaultedPage, Handler, Outcome, PrivateMemory},
        migrate::{self, Destination, Unmapped},
    },
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
    time::{delay::fsleep, Delta},
};

/// By whom and where a pinned page is mapped.
#[derive(Clone, Copy, Default)]
pub(crate) struct Mapped {
    /// The context.
    pub(crate) context: u32,
    /// The virtual address.
    pub(crate) va: usize,
}

/// What device-private memory knows of the driver.
pub(crate) struct Residency {
    contexts: Arc<Contexts>,
}

/// The page was in use by somebody else.
struct Busy;

impl Residency {
    /// Pages of the address spaces in `contexts`.
    pub(crate) fn new(contexts: Arc<Contexts>) -> Self {
        Self { contexts }
    }

    /// Gives back the page for which the unmapped `page` stands in.
    fn bring_home(
        memory: &PrivateMemory<Self>,
        page: DevicePage,
        unmapped: Unmapped<'_>,
    ) -> Result<(), Busy> {
        let Some((_, mapped)) = memory.get(page) else { return Err(Busy) };
        let space = memory.handler().contexts.get(mapped.context);
        if let Some(space) = &space {
            space.revoke(mapped.va);
        }
        // The page is locked: nobody else takes it.
        let Some(pinned) = memory.take(page) else { return Err(Busy) };
        match unmapped.migrate(Destination::Unpin(pinned)).finish_unpin() {
            Ok(()) => {
                if let Some(space) = &space {
                    space.statistics().unpins.add(1, Relaxed);
                }
                Ok(())
            }
            Err(pinned) => {
                memory.set(page, pinned, mapped);
                Err(Busy)
            }
        }
    }

    /// Brings home every pinned page of `context`, which the device does not access any more.
    pub(crate) fn evict(gpu: &Gpu, context: u32) {
        Self::evict_if(gpu, |mapped| mapped.context == context);
    }

    /// Brings home every pinned page. The device does not access memory any more, and nothing is being pinned.
    pub(crate) fn evict_all(gpu: &Gpu) {
        Self::evict_if(gpu, |_| true);
    }

    fn evict_if(gpu: &Gpu, select: impl Fn(&Mapped) -> bool) {
        let memory = gpu.memory();
        // A page can be in use by a CPU fault or by somebody who walks over it, for a moment.
        for attempt in 0u32.. {
            let mut left = 0usize;
            memory.for_each(&select, |page| {
                let Ok(unmapped) = migrate::setup_device_page(page) else {
                    left += 1;
                    return;
                };
                // Only now can it not become another address space's page.
                if memory.get(page).is_some_and(|(_, mapped)| select(&mapped))
                    && Self::bring_home(memory, page, unmapped).is_err()
                {
                    left += 1;
                }
            });
            if left == 0 {
                return;
            }
            if attempt == 1000 {
                dev_warn!(gpu.device(), "{} pinned pages are in use by others and do not come home\n", left);
            }
            fsleep(Delta::from_micros(1000));
        }
    }
}

impl Handler for Residency {
    type PageData = Mapped;

    fn migrate_to_ram(memory: &PrivateMemory<Self>, fault: &FaultedPage<'_>) -> Outcome {
        match migrate::setup_fault(fault) {
            Ok(unmapped) => {
                // A page that could not be given back is pinned as before; the CPU tries again.
                let _ = Self::bring_home(memory, fault.page(), unmapped);
                Outcome::Done
            }
            Err(error) if error == EBUSY => Outcome::Done,
            Err(error) if error == ENOMEM => Outcome::OutOfMemory,
            Err(_) => Outcome::Lost,
        }
    }
}
