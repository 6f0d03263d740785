// SPDX-License-Identifier: GPL-2.0-only

//! What is known in advance of the GPU's accesses, and what of its faults is counted.
//!
//! A fault says how far the command that has stalled is going to go on. As a rule the driver maps no more of that than is in
//! one window, lest an access wait for gigabytes. Where somebody waits for the whole of it anyhow, one fault is
//! enough for all of it.

use crate::{abi, window::WINDOW_SIZE};
use core::ops::Range;
use kernel::{new_spinlock, prelude::*, sync::SpinLock};

struct State {
    range: Range<usize>,
    faults: u64,
}

/// The part of an address space that the GPU is about to access from one end to the other.
#[pin_data]
pub(crate) struct Observation {
    #[pin]
    state: SpinLock<State>,
}

impl Observation {
    /// Of nothing.
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- new_spinlock!(State { range: 0..0, faults: 0 }, "Observation::state"),
        })
    }

    /// All of `range` is going to be accessed: a fault there is good for all that is going to be accessed in it. Its faults are
    /// counted, from zero.
    pub(crate) fn begin(&self, range: Range<usize>) {
        *self.state.lock() = State { range, faults: 0 };
    }

    /// Ends it. Returns how many faults there were in the range.
    pub(crate) fn end(&self) -> u64 {
        let mut state = self.state.lock();
        state.range = 0..0;
        state.faults
    }

    /// Takes note of a fault.
    pub(super) fn count(&self, fault: &abi::EventRecord) {
        let mut state = self.state.lock();
        if state.range.contains(&(fault.va as usize)) {
            state.faults += 1;
        }
    }

    /// What of the range the stalled command is going to access behind the window that its fault is in.
    pub(super) fn ahead(&self, fault: &abi::EventRecord) -> Option<Range<usize>> {
        let va = fault.va as usize;
        let state = self.state.lock();
        if !state.range.contains(&va) {
            return None;
        }
        let end = va.saturating_add(fault.length as usize).min(state.range.end);
        let start = (va & !(WINDOW_SIZE - 1)) + WINDOW_SIZE;
        (start < end).then_some(start..end)
    }
}
