// SPDX-License-Identifier: GPL-2.0-only

//! Where pages are, and how those that are pinned come home.
//!
//! A pinned page is represented by a device-private page, which knows in which context and at which address
//! the GPU maps it. Coming home always goes the same way: unmap and lock the stand-in (so that nobody pins or
//! faults meanwhile), revoke the GPU's mapping, give the very same page back.

use crate::{
    address_space::AddressSpace,
    gpu::{Contexts, Gpu},
    hmm::{
        memory::{DevicePage, FaultedPage, Handler, Outcome, PrivateMemory},
        migrate::{self, Unmapped},
    },
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
    time::{delay::fsleep, Delta},
};

/// How long to wait before trying again to bring home a page that others use.
const PAUSE: Delta = Delta::from_millis(1);
/// Tries after which to say that something is in the way.
const PATIENCE: u32 = 5000;

/// By whom and where a pinned page is mapped.
#[derive(Clone, Copy, Default)]
pub(crate) struct Mapped {
    /// The context.
    pub(crate) context: u32,
    /// The virtual address.
    pub(crate) va: usize,
}

impl Mapped {
    /// A page that no context maps any more.
    const NOWHERE: Self = Self {
        context: u32::MAX,
        va: 0,
    };
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
    ///
    /// While this runs, the page is counted as on its way, for whoever waits until none is left.
    fn bring_home(
        memory: &PrivateMemory<Self>,
        page: DevicePage,
        unmapped: Unmapped<'_>,
    ) -> Result<(), Busy> {
        let (_, found) = memory.get(page).ok_or(Busy)?;
        let _on_its_way = memory.handler().contexts.leave(found.context);
        // First taken, then revoked: whoever is about to map the page elsewhere (after mremap) either has said
        // so already, and is found here, or finds that it is gone. The page is locked, so nobody else takes it.
        let (pinned, mapped) = memory.take(page).ok_or(Busy)?;
        let statistics = memory.handler().contexts.get(mapped.context).map(|space| {
            space.revoke(mapped.va);
            space.statistics().clone()
        });
        if !unmapped.unpin(pinned, |pinned| memory.set(page, pinned, mapped)) {
            return Err(Busy);
        }
        if let Some(statistics) = statistics {
            statistics.unpins.add(1, Relaxed);
        }
        Ok(())
    }

    /// Brings home the pinned pages of `space`, which the device does not access any more, as far as its process
    /// can reach them. The others (moved by mremap, inaccessible, or shared with a child that has outlived the
    /// process) belong to nobody from now on, and come home when a CPU touches them.
    pub(crate) fn release(gpu: &Gpu, space: &AddressSpace) {
        let memory = gpu.memory();
        let mine = |mapped: &Mapped| mapped.context == space.context();
        memory.for_each(mine, |page| {
            if let Some((_, mapped)) = memory.get(page) {
                space.recall(mapped.va);
            }
        });
        // After this nobody revokes a mapping of that context, whose number will be used again.
        // A page is on its way for as long as revoking it takes, which is bounded.
        while gpu.contexts().leaving(space.context()) > 0 {
            fsleep(PAUSE);
        }
        memory.for_each(mine, |page| {
            if let Some((pfn, _)) = memory.get(page) {
                memory.update(page, pfn, mine, Mapped::NOWHERE);
            }
        });
    }

    /// Brings home every pinned page. The device does not access memory any more, and nothing is being pinned.
    /// There is no giving up: the struct pages that stand in for them are about to go away.
    pub(crate) fn evict_all(gpu: &Gpu) {
        let memory = gpu.memory();
        memory.for_each(
            |_| true,
            |page| {
                let mapped = memory.get(page).map(|(_, mapped)| mapped);
                if let Some(space) = mapped.and_then(|mapped| gpu.contexts().get(mapped.context)) {
                    space.recall(mapped.map_or(0, |mapped| mapped.va));
                }
            },
        );
        let mut round = 0u32;
        loop {
            let left = Self::evict_once(gpu) + gpu.contexts().all_leaving();
            if left == 0 {
                return;
            }
            round = round.wrapping_add(1);
            if round % PATIENCE == 0 {
                dev_warn!(gpu.device(), "waiting for {} pinned pages to come home\n", left);
            }
            fsleep(PAUSE);
        }
    }

    /// Brings home every pinned page; returns how many are in use by others for the moment (a CPU fault, somebody
    /// who walks over them).
    fn evict_once(gpu: &Gpu) -> usize {
        let memory = gpu.memory();
        let mut left = 0;
        memory.for_each(
            |_| true,
            |page| {
                let home = migrate::setup_device_page(page)
                    .is_ok_and(|unmapped| Self::bring_home(memory, page, unmapped).is_ok());
                left += usize::from(!home);
            },
        );
        left
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
