// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The core of the device under a checker that tries many schedules of its threads.
//!
//!     cargo test -p pinion-device --features model --test models
//!
//! What runs here is the core itself, with its engines: only the locks, atomics and threads under it, and the time, are the
//! checker's. Each model is followed by ways to break what it is about ([`Sabotage`], and defects that the program can
//! be given), each of which it has to notice.
//!
//! [`Sabotage`]: pinion_device::gpu::sabotage::Sabotage

mod atomics;
mod check;
mod doorbells;
mod events;
mod faults;
mod fences;
mod promise;
mod rig;
