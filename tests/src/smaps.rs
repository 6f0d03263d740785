// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the kernel counts for a mapping of the process (`/proc/PID/smaps`).

use crate::{Failure, Mapping};

/// A line of the mapping, in KiB. It must not have been joined with its neighbours.
///
/// # Errors
///
/// What the system says, or that there is no such mapping or line.
pub fn kilobytes(memory: &Mapping, name: &str) -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/self/smaps")?;
    let start = format!("{:x}-", memory.as_ptr().addr());
    let lines = text.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    let mut lines = lines.take_while(|line| !line.contains('-'));
    let line = lines
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .ok_or_else(|| format!("no {name}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
