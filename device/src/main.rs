// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pinion, a virtual GPU: a vhost-user device.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use pinion_device::cli::Command;
use pinion_device::{control, daemon, transport};

fn main() -> ExitCode {
    if cfg!(feature = "model") {
        eprintln!("pinion-device: this was built with the feature 'model', for tests only");
        return ExitCode::FAILURE;
    }
    // The library logs at the guest's bidding what is logged here once; RUST_LOG brings it back.
    let quiet = "warn,virtio_queue=off,vhost_user_backend=error";
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(quiet)).init();
    let arguments: Vec<_> = std::env::args_os().collect();
    let result = match Command::parse(&arguments) {
        Ok(Command::PrintCapabilities) => print(&format!("{}\n", transport::capabilities())),
        Ok(Command::Ask(ctl)) => control::client::ask(&ctl.path, &ctl.request(), ctl.json)
            .map_err(Box::from)
            .and_then(|answer| print(&answer)),
        Ok(Command::Serve(config)) => daemon::run(&config).map_err(Box::from),
        Err(error) => error.exit(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

/// To standard output, where nobody may listen any more.
fn print(text: &str) -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Says what went wrong, and why, in one line.
fn complain(error: &dyn Error) {
    let mut line = format!("pinion-device: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(&format!(": {error}"));
        cause = error.source();
    }
    eprintln!("{line}");
}
