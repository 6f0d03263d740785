// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pinion, a virtual GPU: a vhost-user device.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use pinion_device::cli::{Arguments, Command};
use pinion_device::{daemon, transport};

fn main() -> ExitCode {
    if cfg!(feature = "model") {
        eprintln!("pinion-device: this was built with the feature 'model', for tests only");
        return ExitCode::FAILURE;
    }
    // The library logs at the guest's bidding what is logged here once; RUST_LOG brings it back.
    let quiet = "warn,virtio_queue=off,vhost_user_backend=error";
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(quiet)).init();
    match Command::from(Arguments::parse()) {
        Command::PrintCapabilities => {
            println!("{}", transport::capabilities());
            ExitCode::SUCCESS
        }
        Command::Serve(config) => match daemon::run(&config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprint!("pinion-device: {error}");
                let mut cause = error.source();
                while let Some(error) = cause {
                    eprint!(": {error}");
                    cause = error.source();
                }
                eprintln!();
                ExitCode::FAILURE
            }
        },
    }
}
