// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a process goes through whose GPU is lost. The harness kills the device when this says "ready".

mod pinned;
mod vram;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use pinion_tests::Failure;

/// Longest time that anything may take when there is no device.
fn bound() -> Duration {
    pinion_tests::patiently(Duration::from_secs(30))
}

/// Has the device killed. There is no telling when, only that it is soon.
fn ready() -> Result<(), Failure> {
    println!("ready");
    Ok(std::io::stdout().flush()?)
}

fn main() -> ExitCode {
    let name = std::env::args().nth(1);
    let result = match name.as_deref() {
        Some("pinned") => pinned::run(),
        Some("vram") => vram::resting(false),
        Some("unbound") => vram::resting(true),
        Some("moving") => vram::moving(),
        Some("evicting") => vram::evicting(),
        _ => Err("which? pinned, vram, unbound, moving, evicting".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device-loss: FAILED: {}", pinion_tests::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
