// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where the pages of a vector are, as the CPU and the GPU use it.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use pinion_client::{Batch, Gpu, Location, Memory, Operation, PAGE_SIZE, Page};

/// Pages of its own: advice is about whole pages, and other variables had better not be on them.
struct Pages {
    start: *mut u64,
    layout: Layout,
}

impl Pages {
    fn new(count: usize) -> Self {
        let layout = Layout::from_size_align(count * PAGE_SIZE, PAGE_SIZE).expect("a layout");
        // SAFETY: The size is not zero.
        let start: *mut u64 = unsafe { alloc_zeroed(layout) }.cast();
        assert!(!start.is_null(), "no memory");
        Self { start, layout }
    }

    fn numbers(&mut self) -> &mut [u64] {
        // SAFETY: It is zeroed memory of that length, borrowed from its owner.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size() / 8) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: It was allocated so.
        unsafe { dealloc(self.start.cast(), self.layout) };
    }
}

fn describe(when: &str, pages: &[Page]) {
    let states: Vec<_> = pages
        .iter()
        .map(|page| format!("{:?} ({} KiB)", page.state, page.page_size / 1024))
        .collect();
    println!("{when}: {}", states.join(", "));
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = Gpu::open("/dev/pinion0")?;
    let info = gpu.info()?;
    println!(
        "places: {:?}; exclusive access by: {:?}",
        info.locations, info.atomics
    );

    let mut pages = Pages::new(4);
    pages.numbers().fill(1);
    let (start, length) = (pages.start, 4 * PAGE_SIZE);
    describe("touched by the CPU", &gpu.query(start, length)?);

    let memory = Memory::from(pages.numbers());
    let mut batch = Batch::new();
    batch.copy(memory.part(0..512), memory.part(512..1024));
    assert!(gpu.run(0, &batch)?.is_ok(), "a copy");
    describe("after a copy by the GPU", &gpu.query(start, length)?);

    let mut batch = Batch::new();
    batch.atomic(Operation::Add, memory.at(0), 1);
    assert!(gpu.run(0, &batch)?.is_ok(), "an atomic operation");
    describe("after an atomic operation", &gpu.query(start, length)?);

    if info.locations.contains(&Location::Vram) {
        gpu.prefetch(start, length, Location::Vram)?;
        describe("after prefetching to VRAM", &gpu.query(start, length)?);
        gpu.prefetch(start, length, Location::System)?;
        describe("and back", &gpu.query(start, length)?);
    }

    let sum: u64 = pages.numbers().iter().sum();
    describe("read by the CPU", &gpu.query(start, length)?);
    println!("{:?}", gpu.statistics()?);
    if sum != 4 * 512 + 1 {
        return Err(format!("the sum is {sum}").into());
    }
    Ok(())
}
