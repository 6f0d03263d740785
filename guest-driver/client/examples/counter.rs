// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The GPU and a thread of the CPU increment the same counter, which is an ordinary variable.

use std::sync::atomic::{AtomicU64, Ordering};

use pinion_client::{Batch, Gpu, Operation};

const INCREMENTS: u32 = 100_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = Gpu::open("/dev/pinion0")?;
    let counter = AtomicU64::new(0);
    let mut batch = Batch::new();
    batch.atomic_times(Operation::Add, &counter, 1, INCREMENTS);

    let completion = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..INCREMENTS {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        gpu.run(0, &batch)
    })?;

    let found = counter.load(Ordering::Relaxed);
    let statistics = gpu.statistics()?;
    println!(
        "{completion:?}: {found} increments; the page changed hands {} times",
        statistics.pins
    );
    if found != 2 * u64::from(INCREMENTS) || !completion.is_ok() {
        return Err("increments are lost".into());
    }
    Ok(())
}
