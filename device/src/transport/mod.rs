// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The vhost-user side of one connection: negotiation, virtqueues, and when the device is reset.
//!
//! | file | subject |
//! |---|---|
//! | `backend.rs` | what `vhost-user-backend` asks of a device; stop, resume, reset |
//! | `queues.rs` | the virtqueues, as the core sees them |
//! | `vring.rs` | what a frontend may put into a vring |
//! | `aperture.rs` | VRAM where the guest's processors see it |
//! | `chain.rs` | descriptor chains |
//! | `memory.rs` | guest memory, as the core sees it |
//!
//! One worker thread of the library serves each queue: control and invalidation are carried out on
//! theirs, the event queue's fills buffers, and a ring's begins with the work of the engine.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod aperture;
mod backend;
mod chain;
mod memory;
mod queues;
mod vring;

pub use backend::{Backend, capabilities};
