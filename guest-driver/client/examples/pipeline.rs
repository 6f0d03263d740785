// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two stages on different rings, the second after the first, while the program waits for whichever is done.

use std::time::Duration;

use pinion_client::{Batch, Gpu, Memory, Operation, Submit};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = Gpu::open("/dev/pinion0")?;
    let last_ring = gpu.info()?.rings - 1;
    let mut buffers = vec![vec![0_u64; 4096]; 8];
    let mut sums = vec![0_u64; 8];
    let places = Memory::from(&mut sums[..]);

    let mut stages = Vec::new();
    for (index, buffer) in buffers.iter_mut().enumerate() {
        let memory = Memory::from(&mut buffer[..]);
        let (mut fill, mut last) = (Batch::new(), Batch::new());
        fill.fill(memory, index as u64).atomic(Operation::Add, memory, 1);
        last.copy(memory.at(4095), places.at(index));
        stages.push((fill, last));
    }
    gpu.scope(|scope| {
        for (fill, last) in &stages {
            let first = scope.submit(0, fill)?;
            scope.send(&Submit::new(last_ring).after(first), last)?;
        }
        // Each stage of each buffer.
        let mut ended = 0;
        while ended < 16 {
            ended += gpu.ended(Duration::from_secs(10))?;
            println!("{ended} of 16 have ended");
        }
        pinion_client::Result::Ok(())
    })?;
    println!("{sums:?}");
    if sums != [1, 2, 3, 4, 5, 6, 7, 8] {
        return Err("a stage did not wait for the one before".into());
    }
    Ok(())
}
