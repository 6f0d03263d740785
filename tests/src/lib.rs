// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the guest programs share. `src/bin` has the programs, which run in a guest as root; `tests/` has the
//! harness, which runs on the host and boots guests for them.

use std::path::Path;
use std::time::Duration;

pub mod check;
pub mod mapping;
pub mod matrix;
pub mod measurement;
pub mod module;
pub mod pagemap;
pub mod process;
pub mod smaps;
pub mod uring;
pub mod work;

pub use mapping::Mapping;

/// What a guest program opens unless it is told otherwise.
pub const DEVICE: &str = "/dev/pinion0";

/// Any failure of a guest program, for a person to read.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// An error with all that caused it, on one line.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Whether the kernel checks every lock and every access, and is slow for it.
fn kernel_is_slow() -> bool {
    Path::new("/proc/lockdep_stats").exists()
}

/// A time within which something must have happened, made longer on a kernel that is slow.
#[must_use]
pub fn patiently(limit: Duration) -> Duration {
    limit * if kernel_is_slow() { 8 } else { 1 }
}

/// How often to do something that is done many times for good measure: a fourth of `times`, but twice at least, on a kernel that is
/// slow, since its checks find at the first time what others find by chance.
#[must_use]
pub fn repeatedly(times: usize) -> usize {
    if kernel_is_slow() {
        (times / 4).max(2).min(times)
    } else {
        times
    }
}
