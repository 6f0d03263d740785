// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The aperture: the beginning of VRAM, mapped by the frontend where the guest's processors see it.
//!
//! The device asks for that (SHMEM_MAP) and waits for the answer, without which nobody knows that the guest sees
//! VRAM and not nothing. The frontend answers only while it does not wait for the device in turn, so the
//! one who asks is a thread of its own, and the one who waits for it a worker of the control queue, which
//! answers the driver's first request when the aperture is there.
//!
//! A device reset takes the mapping away, hence:
//!
//! ```text
//!   not mapped ──(control queue begins)──> asking ──(the frontend answers)──> mapped
//!       ^                                                                       │
//!       └───────────────────────────────(reset)─────────────────────────────────┘
//! ```

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinion_abi::APERTURE_REGION;
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{Backend as Channel, VhostUserFrontendReqHandler};

use crate::rate_limit::warn_limited;

/// How long a driver's first request waits for the frontend.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most threads that wait for frontends, in the whole program. One that has gone, but keeps the channel open, keeps
/// its thread and the VRAM that it was to map.
const MAX_THREADS: usize = 8;
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// A place among the threads.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let more = |threads: usize| threads.checked_add(1).filter(|&threads| threads <= MAX_THREADS);
        THREADS
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()
            .map(|_| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct State {
    /// Where requests to the frontend go.
    channel: Option<Channel>,
    /// The life of the device for which the aperture is wanted, and for which it was asked for last; lives are
    /// counted from one.
    wanted: u64,
    asked: u64,
    life: u64,
    /// The thread waits for the frontend.
    busy: bool,
    closed: bool,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    vram: File,
    size: u64,
    state: Mutex<State>,
    changed: Condvar,
}

/// The aperture of one connection.
pub(super) struct Aperture(Arc<Shared>);

impl Aperture {
    /// The first `size` bytes of `vram`.
    pub(super) fn new(vram: File, size: u64) -> Self {
        let state = State {
            life: 1,
            ..State::default()
        };
        Self(Arc::new(Shared {
            vram,
            size,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }))
    }

    /// The shared memory regions of the device.
    pub(super) fn regions(&self) -> VhostUserShMemConfig {
        // The one region is number zero.
        const _: () = assert!(APERTURE_REGION == 0);
        VhostUserShMemConfig::new(1, &[self.0.size])
    }

    /// The frontend can be asked from now on.
    pub(super) fn set_channel(&self, channel: Channel) {
        let mut state = self.0.state.lock();
        state.channel = Some(channel);
        if state.thread.is_some() {
            return;
        }
        let Some(place) = Place::take() else {
            state.channel = None;
            warn_limited!("there is no aperture: {MAX_THREADS} frontends still owe an answer");
            return;
        };
        let shared = self.0.clone();
        let thread = std::thread::Builder::new()
            .name("aperture".into())
            .spawn(move || {
                shared.run();
                drop(place);
            });
        match thread {
            Ok(thread) => state.thread = Some(thread),
            Err(error) => {
                state.channel = None;
                warn_limited!("there is no aperture: cannot start a thread: {error}");
            }
        }
    }

    /// The driver is up: waits until the aperture is mapped, or it is known that it cannot be.
    pub(super) fn want(&self) {
        let shared = &*self.0;
        let mut state = shared.state.lock();
        // A frontend that knows no such thing has none to wait for.
        if state.channel.is_none() || state.wanted == state.life {
            return;
        }
        let life = state.life;
        state.wanted = life;
        shared.changed.notify_all();
        let deadline = Instant::now().checked_add(PATIENCE);
        while !state.closed && state.life == life && state.asked < life {
            let late =
                deadline.is_none_or(|deadline| shared.changed.wait_until(&mut state, deadline).timed_out());
            if late && state.asked < life {
                warn_limited!("the frontend does not map the aperture: no answer in {PATIENCE:?}");
                return;
            }
        }
    }

    /// The device is being reset: the frontend takes the mapping away.
    pub(super) fn forget(&self) {
        let mut state = self.0.state.lock();
        state.life = state.life.saturating_add(1);
        self.0.changed.notify_all();
    }

    /// Nobody waits for the aperture any more.
    pub(super) fn close(&self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        self.0.changed.notify_all();
        // If it waits for an answer it ends when the frontend gives one, or closes the channel.
        let thread = state.thread.take().filter(|_| !state.busy);
        drop(state);
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the aperture's thread panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let life = state.wanted;
            match &state.channel {
                Some(channel) if life > state.asked => {
                    let channel = channel.clone();
                    state.busy = true;
                    drop(state);
                    self.map(&channel);
                    state = self.state.lock();
                    state.busy = false;
                    state.asked = life;
                    self.changed.notify_all();
                }
                _ => self.changed.wait(&mut state),
            }
        }
    }

    fn map(&self, channel: &Channel) {
        let whole = VhostUserMMap {
            shmid: APERTURE_REGION,
            padding: [0; 7],
            fd_offset: 0,
            shm_offset: 0,
            len: self.size,
            flags: VhostUserMMapFlags::WRITABLE.bits(),
        };
        let map = || channel.shmem_map(&whole, &self.vram);
        // It may be mapped still: after a reset that the frontend knew nothing of.
        let result = map().or_else(|_| channel.shmem_unmap(&whole).and_then(|_| map()));
        match result {
            Ok(_) => log::info!("the aperture is mapped"),
            Err(error) => warn_limited!("the frontend does not map the aperture: {error}"),
        }
    }
}
