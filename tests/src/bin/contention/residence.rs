// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where a page is before, during and after the GPU has it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::{Command, Gpu, Page, PageState};
use pinion_tests::pagemap::{self, Entry};
use pinion_tests::{Failure, Mapping};

use crate::job::Settings;

/// Most pages that are watched.
const WATCHED: usize = 4;

/// What was seen of one page.
#[derive(Debug)]
pub(crate) struct Residence {
    pub(crate) address: usize,
    /// Page frame number in the CPU's page table.
    pub(crate) before: u64,
    /// What the driver says while the GPU has the page.
    pub(crate) during: Page,
    /// What the CPU's page table says at that time.
    pub(crate) entry: Entry,
    /// Page frame number in the CPU's page table after the CPU has touched it.
    pub(crate) after: u64,
    /// What the GPU should have left there, and what the CPU has found.
    values: (u64, u64),
}

impl Residence {
    /// What is wrong with it.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut complain = |text: String| complaints.push(format!("page {:#x}: {text}", self.address));
        if self.during.state != PageState::Pinned || !self.during.rights.atomic {
            complain(format!("it is not pinned for the GPU: {:?}", self.during));
        }
        if self.entry != Entry::Absent {
            complain(format!(
                "the CPU has access while the GPU has it: {:?}",
                self.entry
            ));
        }
        if self.during.pfn != Some(self.before) || self.after != self.before {
            complain(format!(
                "the physical page has changed: {:#x}, then {:x?}, then {:#x}",
                self.before, self.during.pfn, self.after
            ));
        }
        if self.values.0 != self.values.1 {
            complain(format!(
                "it should hold {}, and holds {}",
                self.values.0, self.values.1
            ));
        }
        complaints
    }
}

/// Has the GPU pin some pages and takes them back.
pub(crate) fn watch(settings: &Settings<'_>) -> Result<Vec<Residence>, Failure> {
    let gpu = Gpu::open(settings.device)?;
    let memory = Mapping::anonymous(settings.pages.min(WATCHED))?;
    (0..memory.pages())
        .map(|page| {
            let address = memory.page(page);
            let counter = memory.atomic(address.addr() - memory.as_ptr().addr());
            let value = 40 + page as u64;
            counter.store(value, Ordering::Relaxed);
            let before = pagemap::pfn(address)?;

            // SAFETY: There are atomic references to the mapping only, and it is there until the GPU is done or closed.
            let work =
                unsafe { gpu.submit(settings.ring, &[Command::atomic_add(address.cast::<u64>(), 2)]) }?;
            let completion = gpu.wait(work, Duration::from_secs(10))?;
            if !completion.is_ok() {
                return Err(format!("the GPU's work failed: {completion:x?}").into());
            }
            let during = gpu.query(address, 1)?[0];
            let entry = pagemap::entry(address)?;

            let found = counter.load(Ordering::Relaxed);
            let after = pagemap::pfn(address)?;
            Ok(Residence {
                address: address.addr(),
                before,
                during,
                entry,
                after,
                values: (value + 2, found),
            })
        })
        .collect()
}
