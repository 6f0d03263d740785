// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is measured: pairs of something the device does and something to compare it with.
//!
//! Both sides of a pair do the same amount of work on the same memory, so that the one can be run after
//! the other, over and over, and the ratio of the two says something even while the machine is busy with other things.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "shared by several programs, none of which uses all of it"
)]

pub mod core;
pub mod queue;
#[path = "../../tests/support/mod.rs"]
pub mod support;

use std::time::Duration;

/// Something that is measured, and what it is compared with.
pub trait Pair {
    /// What the device does, in a few words.
    fn name(&self) -> String;

    /// What that is compared with.
    fn against(&self) -> String;

    /// What is said of the two numbers.
    fn aim(&self) -> Aim;

    /// How often it is done at a time, so that it takes some milliseconds.
    fn count(&self) -> u64;

    /// What one of it is, and how many of those it has: bytes, commands.
    fn unit(&self) -> (&'static str, u64) {
        ("", 1)
    }

    /// How long the device takes for `count` of them.
    fn device(&mut self, count: u64) -> Duration;

    /// How long the other takes for `count` of them.
    fn reference(&mut self, count: u64) -> Duration;
}

/// What a pair is to show.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    /// At least this many times as fast as the other.
    Speed(f64),
    /// At most this many times the other's time.
    Time(f64),
    /// Nothing in particular: times the other's time.
    None,
}

/// All of them.
pub fn all() -> Vec<Box<dyn Fn() -> Box<dyn Pair>>> {
    let mut all = core::all();
    all.extend(queue::all());
    all
}
