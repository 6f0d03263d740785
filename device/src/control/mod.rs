// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control socket: statistics and state for whoever asks, and deliberate defects switched while the
//! device runs. `docs/control.md` is its specification.
//!
//! | file | subject |
//! |---|---|
//! | `protocol.rs` | requests and replies, and how they are read and written |
//! | `server.rs` | the daemon's end of the socket |
//! | `client.rs`, `show.rs` | `pinion-device ctl`, and what it prints |
//!
//! The daemon's end is one thread, which waits for nobody: what a client does not read stays in a buffer of
//! its own, and it gets no further answer until it has read that.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that fails may panic"
    )
)]

pub mod client;
mod protocol;
mod server;
mod show;

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

pub use protocol::{Injected, MAX_LINE, Request, VERSION};
pub use server::{MAX_CLIENTS, Server};

use crate::gpu::inject::Injector;
use crate::gpu::state::State;

/// A device that can be looked at.
pub trait Device: Send + Sync {
    /// What it has counted.
    fn statistics(&self) -> Vec<(&'static str, u64)>;
    /// What it is doing.
    fn state(&self) -> State;
}

/// How long somebody who asks may have to wait for the next device.
const BETWEEN_DEVICES: Duration = Duration::from_secs(1);

/// The device that is there now.
#[derive(Default)]
struct Current {
    device: Option<Weak<dyn Device>>,
    connected: bool,
    connections: u64,
}

/// What requests are about: the device that is there now, and what outlives it.
pub struct Subject {
    injector: Arc<Injector>,
    current: Mutex<Current>,
    changed: Condvar,
}

impl Subject {
    /// No device yet.
    pub fn new(injector: Arc<Injector>) -> Arc<Self> {
        Arc::new(Self {
            injector,
            current: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Answers one line, which is without its end; the answer has one.
    pub fn answer(&self, line: &[u8]) -> Vec<u8> {
        protocol::answer(line, self)
    }

    /// The deliberate defects.
    pub fn injector(&self) -> &Arc<Injector> {
        &self.injector
    }

    /// There is a new device, without a frontend.
    pub fn waits(&self, device: Weak<dyn Device>) {
        let mut current = self.current.lock();
        current.device = Some(device);
        current.connected = false;
        self.changed.notify_all();
    }

    /// A frontend has connected to it.
    pub fn connected(&self) {
        let mut current = self.current.lock();
        current.connected = true;
        current.connections = current.connections.saturating_add(1);
    }

    /// The frontend has gone.
    pub fn disconnected(&self) {
        self.current.lock().connected = false;
    }

    /// The device that is there, whether it has a frontend, and how many there have been. One device goes
    /// before the next one comes; who asks in between waits for that one.
    fn current(&self) -> Option<(Arc<dyn Device>, bool, u64)> {
        let deadline = Instant::now().checked_add(BETWEEN_DEVICES)?;
        let mut current = self.current.lock();
        loop {
            if let Some(device) = current.device.as_ref().and_then(Weak::upgrade) {
                return Some((device, current.connected, current.connections));
            }
            if self.changed.wait_until(&mut current, deadline).timed_out() {
                return None;
            }
        }
    }
}
