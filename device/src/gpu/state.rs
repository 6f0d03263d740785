// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the device is doing, for people and tools to look at.
//!
//! It is put together part by part while the device goes on, so the parts need not be of the same moment.

use serde::{Deserialize, Serialize};

/// What the device is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The device as a whole.
    pub device: DeviceState,
    /// The contexts that exist, by number.
    pub contexts: Vec<ContextState>,
    /// All rings.
    pub rings: Vec<RingState>,
    /// Faults that have not been replayed or cancelled yet.
    pub faults: Vec<FaultState>,
    /// Events that there was no buffer for yet.
    pub pending_events: usize,
}

/// The device as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Size of VRAM in bytes.
    pub vram_size: u64,
    /// Bytes of VRAM that take up memory of the host.
    pub vram_used: u64,
    /// Device time in nanoseconds.
    pub time: u64,
}

/// A context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextState {
    /// Its number.
    pub id: u32,
    /// `STATUS_OK` if it is alive, else why it is in error.
    pub status: u32,
    /// Nodes of its page table.
    pub page_table_nodes: usize,
}

/// A ring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Its number.
    pub ring: u16,
    /// The engine that serves it.
    pub engine: u16,
    /// Its timeline.
    pub timeline: u64,
    /// How many submissions have been made.
    pub submitted: u64,
    /// What it is doing.
    pub activity: Activity,
}

/// What a ring is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// Nothing: there is no work.
    #[default]
    Idle,
    /// It has work, and runs it or is about to.
    Running,
    /// It waits for a semaphore or a fence.
    Waiting,
    /// What it has moved is still on the bus.
    Crossing,
    /// It is stalled on this fault, of [`State::faults`].
    Stalled {
        /// Its number.
        fault: u64,
        /// The page.
        va: u64,
        /// `REASON_*`.
        reason: u8,
    },
}

/// A fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultState {
    /// Its number.
    pub fault: u64,
    /// The context.
    pub context: u32,
    /// The page.
    pub va: u64,
    /// `REASON_*`.
    pub reason: u8,
    /// How many rings are stalled on it.
    pub stalled: usize,
    /// A REPLAY of it is under way.
    pub replaying: bool,
}
