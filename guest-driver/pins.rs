// SPDX-License-Identifier: GPL-2.0-only

//! How many pages are pinned, and which of them go home for others.
//!
//! A pinned page is out of reach of the kernel: it can neither be swapped out nor moved. So there is a limit for each device (parameter
//! `pins`), and pins are no property: whoever needs another page gets it, and older ones go home for that; when
//! memory is short, the kernel asks for pins back ([`Shrink`]). A GPU that still needs such a page faults on it, and gets it again.
//!
//! Pins are given up in turn, as a clock's hand goes over the table of stand-ins: those that were given up last come last.
//!
//! Giving back takes locks of the process whose page it is, and waits for the bus. Neither can be done in reclaim, which
//! may hold those locks: so there nothing is done but to count, and to queue work. What the work finds locked it leaves.

use crate::{
    gpu::Gpu,
    hmm::{
        memory::{DeviceMemory, NewDevicePage},
        migrate::MAX_PAGES,
    },
    residency::{Residency, Which},
    shrinker::Shrink,
    sync::ModuleQueue,
    trace,
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
};

/// Pages that are given up at a time at least, so that not every new pin takes an old one's way home.
const BATCH: usize = 32;
/// How often others are tried if some cannot be given up now.
const ROUNDS: usize = 64;
/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// The pins of a device.
pub(crate) struct Pins {
    memory: Arc<DeviceMemory<Residency>>,
    limit: usize,
    /// Pages that the kernel has asked for and that have not been looked at yet.
    asked: Atomic<i64>,
    /// Pages that have gone home for others.
    given_up: Atomic<i64>,
    /// Pages that have gone home because the kernel had asked.
    returned: Atomic<i64>,
}

impl Pins {
    /// None yet, and never more than `limit` pages.
    pub(crate) fn new(memory: Arc<DeviceMemory<Residency>>, limit: usize) -> Self {
        Self {
            memory,
            limit: limit.max(1),
            asked: Atomic::new(0),
            given_up: Atomic::new(0),
            returned: Atomic::new(0),
        }
    }

    /// Most pages.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Pages that are pinned now.
    pub(crate) fn pinned(&self) -> usize {
        self.memory.pinned()
    }

    /// Pages that have gone home for others, and because the kernel had asked.
    pub(crate) fn given_back(&self) -> (i64, i64) {
        (self.given_up.load(Relaxed), self.returned.load(Relaxed))
    }

    /// Takes a free stand-in.
    ///
    /// # Errors
    ///
    /// ENOSPC: as many pages are pinned as may be.
    pub(crate) fn allocate(&self) -> Result<NewDevicePage> {
        self.memory.allocate_stand_in(self.limit)
    }

    /// By how many pages the limit would be exceeded with so many more. (More than the limit cannot be wanted.)
    fn excess(&self, pages: usize) -> usize {
        (self.pinned() + pages.min(self.limit)).saturating_sub(self.limit)
    }

    /// Whether there is room for so many, which somebody else may take.
    pub(crate) fn has_room(&self, pages: usize) -> bool {
        self.excess(pages) == 0
    }

    /// Makes room for so many, which somebody else may take.
    ///
    /// Takes locks of processes: none of any may be held.
    pub(crate) fn make_room(&self, gpu: &Gpu, pages: usize) {
        for _ in 0..ROUNDS {
            let over = self.excess(pages);
            if over == 0 {
                return;
            }
            let gone = self.give_up(gpu, over.max(BATCH));
            self.given_up.add(gone as i64, Relaxed);
        }
    }

    /// Gives back what the kernel has asked for.
    pub(crate) fn relieve(&self, gpu: &Gpu) {
        let asked = usize::try_from(self.asked.xchg(0, Relaxed)).unwrap_or(0);
        let mut left = asked.min(self.pinned());
        while left > 0 {
            let count = left.min(MAX_PAGES);
            let gone = self.give_up(gpu, count);
            self.returned.add(gone as i64, Relaxed);
            left -= count;
        }
    }

    /// Sends up to `count` pages home, as far as their processes can reach them and nobody is in the way. Returns how many have
    /// gone.
    fn give_up(&self, gpu: &Gpu, count: usize) -> usize {
        let Ok(mut pages) = KVec::with_capacity(count.min(MAX_PAGES), GFP_KERNEL) else {
            return 0;
        };
        self.memory.next_pinned(&mut pages);
        let Ok(runs) = Residency::runs(&self.memory, pages.iter().copied()) else {
            return 0;
        };
        let mut gone = 0;
        for (mapped, pages) in &runs {
            let Some(space) = gpu.contexts().get(mapped.context) else {
                continue;
            };
            let range = mapped.va..mapped.va + pages * PAGE_SIZE;
            let count = space.home(range, Which::Pins, false).unwrap_or(0);
            trace::evict(gpu.number(), mapped.context, mapped.va as u64, count as u64);
            gone += count;
        }
        gone
    }
}

/// Asks for the pins of a device back when memory is short.
pub(crate) struct Pressure(pub(crate) Arc<Gpu>);

impl Shrink for Pressure {
    fn count(&self) -> usize {
        let pins = self.0.pins();
        let asked = usize::try_from(pins.asked.load(Relaxed)).unwrap_or(0);
        pins.pinned().saturating_sub(asked)
    }

    fn ask(&self, count: usize) {
        self.0.pins().asked.add(count as i64, Relaxed);
        // Fails if it is queued already, which is as good.
        let _ = ModuleQueue::Faults
            .get()
            .map(|queue| queue.enqueue::<_, 4>(self.0.clone()));
    }
}
