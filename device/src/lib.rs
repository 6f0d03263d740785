// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pinion, a virtual GPU: a vhost-user device.
//!
//! `main` turns the command line into a [`cli::Config`], [`daemon`] serves one frontend after the other
//! with it, [`transport`] is the vhost-user side of a connection, and [`gpu`] the device itself, whose locks and
//! threads are those of [`sync`]. Beside them [`control`] answers whoever asks how the device is, and [`sandbox`]
//! takes away what is not needed.

pub mod cli;
pub mod control;
pub mod daemon;
pub mod gpu;
mod quantity;
pub mod rate_limit;
mod relay;
pub mod sandbox;
pub mod socket;
pub mod sync;
pub mod transport;
