// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Work for the GPU, as tests have it done.

use std::time::Duration;

use pinion_client::{Command, Completion, Gpu, Status, Submission};

use crate::{Failure, Mapping, ensure_eq, patiently};

/// Time for work that takes none to speak of.
#[must_use]
pub fn soon() -> Duration {
    patiently(Duration::from_secs(30))
}

/// Queues commands.
///
/// # Errors
///
/// What the driver says.
pub fn submit_on(gpu: &Gpu, ring: u32, commands: &[Command]) -> pinion_client::Result<Submission> {
    // SAFETY: Tests have the GPU work on memory that they access through raw pointers and atomics, and keep it until
    // the work is done, or unmap it on purpose while nothing else of this process can be mapped there.
    unsafe { gpu.submit(ring, commands) }
}

/// Queues commands on ring 0.
///
/// # Errors
///
/// What the driver says.
pub fn submit(gpu: &Gpu, commands: &[Command]) -> Result<Submission, Failure> {
    Ok(submit_on(gpu, 0, commands)?)
}

/// Has commands executed, however they end.
///
/// # Errors
///
/// What the driver says, or that it takes too long.
pub fn execute(gpu: &Gpu, commands: &[Command]) -> Result<Completion, Failure> {
    Ok(gpu.wait(submit(gpu, commands)?, soon())?)
}

/// Has commands executed, which must succeed.
///
/// # Errors
///
/// As for [`execute`], or how they ended.
pub fn execute_ok(gpu: &Gpu, commands: &[Command]) -> Result<(), Failure> {
    let completion = execute(gpu, commands)?;
    ensure_eq!(completion.status, Status::Ok, "{completion:x?}");
    Ok(())
}

/// Adds to the number at the start of a page. Exclusive access is what it takes.
pub fn add(memory: &Mapping, operand: u64) -> Command {
    Command::atomic_add(memory.as_ptr().cast::<u64>(), operand)
}
