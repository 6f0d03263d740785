// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The interface between the Pinion device and its driver, written down once.
//!
//! `wire.rs` is the whole of it. The device crate depends on this crate; the kernel module compiles
//! the very same file (`#[path]`), so the two sides cannot drift apart. It therefore uses nothing but
//! `core` and `zerocopy`, which both sides have.

#![no_std]

mod wire;

pub use wire::*;
