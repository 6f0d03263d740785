// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A vring of the library, with what a frontend may put into it checked.
//!
//! The library reads and writes the descriptors that a frontend hands over as they are. One that blocks would
//! stop a thread for as long as the frontend likes, so none does. And a size that is no power of two is taken
//! by the library for no size at all, and the queue would be used with the one that it had.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;

use super::queues::Memory;
use crate::rate_limit::warn_limited;

type Inner = VringMutex<Memory>;

/// A vring.
#[derive(Clone)]
pub struct Vring {
    inner: Inner,
    /// The last size that was asked for is none that a queue can have.
    bad_size: Arc<AtomicBool>,
}

/// Whatever is at the other end, nothing waits for it.
fn without_waiting(file: Option<File>) -> Option<File> {
    let file = file?;
    let set = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK));
    if let Err(error) = set {
        warn_limited!("the frontend's descriptor for a queue cannot be used: {error}");
        return None;
    }
    Some(file)
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <Inner as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <Inner as VringStateMutGuard<'a, Memory>>::G;
}

/// Tells the driver of used chains. An event that is still there from before is as good as another one.
pub(super) fn signal(vring: &VringState<Memory>) -> io::Result<()> {
    match vring.signal_used_queue() {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Self {
            inner: Inner::new(memory, max_queue_size)?,
            bad_size: Arc::default(),
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, head: u16, length: u32) -> Result<(), Error> {
        self.inner.add_used(head, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        signal(&self.inner.get_ref())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        if self.bad_size.load(Ordering::Relaxed) {
            return Err(Error::InvalidSize);
        }
        self.inner.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.inner.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, number: u16) {
        self.bad_size.store(!number.is_power_of_two(), Ordering::Relaxed);
        self.inner.set_queue_size(number);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(without_waiting(file));
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.inner.read_kick() {
            // Somebody else has read it, or it was a kick of before the queue was set up anew.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(self.inner.get_ref().is_enabled()),
            Err(error) => {
                // The library ends the queue's thread, silently.
                warn_limited!("a queue is given up: its kicks cannot be read: {error}");
                Err(error)
            }
            other => other,
        }
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(without_waiting(file));
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
