// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device: rings, translations, faults, and what requests do to them.

use crate::scenario::{Access, Omission, PAGES, RINGS};
use crate::state::{Activity, Entry, Fault};
use crate::system::Machine;

impl Machine<'_> {
    /// The next step of a ring.
    pub(crate) fn ring(&mut self, number: usize) -> bool {
        let setup = &self.setup.rings[number];
        let context = setup.context as usize;
        let ring = self.s.rings[number];
        if self.s.stopped {
            return false;
        }
        match ring.activity {
            Activity::Ended | Activity::Stalled(_) => false,
            Activity::Busy { frame, loaded, .. } => {
                let (access, page) = setup.program[ring.at as usize];
                if access == Access::Atomic {
                    self.s.frames[frame as usize].value = loaded + 1;
                    let process = self.setup.contexts[context].process as usize;
                    self.s.processes[process].expected[page as usize] += 1;
                }
                self.s.rings[number].at += 1;
                let ended = self.s.contexts[context].error || !self.s.contexts[context].alive;
                let over = self.s.rings[number].at as usize == setup.program.len();
                self.s.rings[number].activity = match ended && !over {
                    true => Activity::Ended,
                    false => Activity::Ready,
                };
                true
            }
            Activity::Ready | Activity::Retry(_) => {
                let Some(&(access, page)) = setup.program.get(ring.at as usize) else {
                    return false;
                };
                if self.s.contexts[context].error || !self.s.contexts[context].alive {
                    self.s.rings[number].activity = Activity::Ended;
                    return true;
                }
                self.begin_access(number, context, access, page)
            }
        }
    }

    /// Begins an access, with what is remembered or with what the page table says; or stalls.
    fn begin_access(&mut self, number: usize, context: usize, access: Access, page: u8) -> bool {
        let place = page as usize;
        let enough = |entry: &Entry| entry.rights >= access;
        let remembered = self.s.rings[number].buffer[place].filter(enough);
        let found = remembered.or_else(|| self.s.contexts[context].table[place].filter(enough));
        let activity = self.s.rings[number].activity;
        if let Some(entry) = found {
            if access == Access::Atomic
                && !self.omits(Omission::AtomicUnit)
                && self.is_operated_on(entry.frame)
            {
                return false;
            }
            self.s.rings[number].buffer[place] = Some(entry);
            let replay = match activity {
                Activity::Retry(task) => Some(task),
                _ => None,
            };
            self.s.rings[number].activity = Activity::Busy {
                frame: entry.frame,
                loaded: self.s.frames[entry.frame as usize].value,
                replay,
            };
            return true;
        }
        // Whoever replays has just mapped it: somebody was faster.
        self.s.grant_broken |= matches!(activity, Activity::Retry(_)) && !self.s.lost;
        let same = |fault: &Option<Fault>| {
            fault.is_some_and(|fault| {
                (fault.context as usize, fault.page, fault.access) == (context, page, access)
            })
        };
        let joined = self.s.faults.iter().position(same);
        let fault = joined.unwrap_or(number);
        let mine = 1 << number;
        match &mut self.s.faults[fault] {
            Some(fault) => fault.rings |= mine,
            none => {
                *none = Some(Fault {
                    context: context as u8,
                    page,
                    access,
                    rings: mine,
                    taken: false,
                });
            }
        }
        self.s.rings[number].activity = Activity::Stalled(fault as u8);
        true
    }

    /// Whether a ring is in the middle of an atomic operation there.
    fn is_operated_on(&self, page: u8) -> bool {
        self.setup
            .rings
            .iter()
            .zip(&self.s.rings)
            .any(|(setup, ring)| match ring.activity {
                Activity::Busy { frame, .. } => {
                    frame == page
                        && setup
                            .program
                            .get(ring.at as usize)
                            .is_some_and(|next| next.0 == Access::Atomic)
                }
                _ => false,
            })
    }

    /// INVALIDATE with CLEAR is sent, and begins to take effect.
    pub(crate) fn send_invalidate(&mut self, context: usize, page: usize) {
        if self.s.lost {
            return;
        }
        if !self.omits(Omission::InvalidateTable) {
            self.s.contexts[context].table[page] = None;
        }
        if !self.omits(Omission::InvalidateBuffers) {
            for (setup, ring) in self.setup.rings.iter().zip(&mut self.s.rings) {
                if setup.context as usize == context {
                    ring.buffer[page] = None;
                }
            }
        }
    }

    /// Whether INVALIDATE has completed, or the driver knows that the device has been reset.
    pub(crate) fn is_invalidated(&self, context: usize, page: usize) -> bool {
        if self.s.lost {
            return self.s.stopped || self.omits(Omission::LossWait);
        }
        if self.omits(Omission::InvalidateWait) {
            return true;
        }
        let stalled_too = self.omits(Omission::InvalidateWaitsForStalled);
        self.setup.rings.iter().zip(&self.s.rings).all(|(setup, ring)| {
            let here = setup.context as usize == context
                && setup
                    .program
                    .get(ring.at as usize)
                    .is_some_and(|next| next.1 as usize == page);
            match ring.activity {
                Activity::Busy { .. } => !here,
                Activity::Stalled(_) | Activity::Retry(_) => !(here && stalled_too),
                _ => true,
            }
        })
    }

    /// MAP.
    pub(crate) fn map(&mut self, context: usize, page: usize, entry: Entry) {
        if !self.s.lost && self.s.contexts[context].alive {
            self.s.contexts[context].table[page] = Some(entry);
        }
    }

    /// REPLAY is sent on behalf of `task`: who is stalled on that fault will try again.
    pub(crate) fn replay(&mut self, task: usize, number: usize) {
        if self.s.lost || self.omits(Omission::Replay) {
            return;
        }
        if let Some(fault) = self.s.faults[number].take() {
            for (ring, state) in self.s.rings.iter_mut().enumerate() {
                if fault.rings & 1 << ring != 0 {
                    state.activity = Activity::Retry(task as u8);
                }
            }
        }
    }

    /// Whether all REPLAYs of `task` have been answered, or will not be.
    pub(crate) fn is_replayed(&self, task: usize) -> bool {
        let task = task as u8;
        let pending = |activity| match activity {
            Activity::Retry(of) => of == task,
            Activity::Busy { replay, .. } => replay == Some(task),
            _ => false,
        };
        self.s.lost
            || self.omits(Omission::ReplayWait)
            || !self.s.rings.iter().any(|ring| pending(ring.activity))
    }

    /// Ends the work of a context that is not in the middle of an access, and its faults.
    fn end_work(&mut self, context: usize) {
        for (setup, ring) in self.setup.rings.iter().zip(&mut self.s.rings) {
            let idle = !matches!(ring.activity, Activity::Busy { .. });
            if setup.context as usize == context && idle && (ring.at as usize) < setup.program.len() {
                ring.activity = Activity::Ended;
            }
        }
        for fault in &mut self.s.faults {
            if fault.is_some_and(|fault| fault.context as usize == context) {
                *fault = None;
            }
        }
    }

    /// CANCEL.
    pub(crate) fn cancel(&mut self, number: usize) {
        if let Some(fault) = self.s.faults[number].filter(|_| !self.s.lost) {
            self.s.contexts[fault.context as usize].error = true;
            self.end_work(fault.context as usize);
        }
    }

    /// CONTEXT_DESTROY is sent, and begins to take effect.
    pub(crate) fn send_destroy(&mut self, context: usize) {
        if self.s.lost {
            return;
        }
        self.s.contexts[context].alive = false;
        self.s.contexts[context].table = [None; PAGES];
        for (setup, ring) in self.setup.rings.iter().zip(&mut self.s.rings) {
            if setup.context as usize == context {
                ring.buffer = [None; PAGES];
            }
        }
        self.end_work(context);
    }

    /// Whether CONTEXT_DESTROY has completed, or the driver knows that the device has been reset.
    pub(crate) fn is_destroyed(&self, context: usize) -> bool {
        if self.s.lost {
            return self.s.stopped;
        }
        self.setup.rings.iter().zip(&self.s.rings).all(|(setup, ring)| {
            setup.context as usize != context || !matches!(ring.activity, Activity::Busy { .. })
        })
    }

    /// A lost device is reset: it touches nothing any more.
    pub(crate) fn reset(&mut self) -> bool {
        if !self.s.lost || self.s.stopped {
            return false;
        }
        self.s.stopped = true;
        for context in &mut self.s.contexts {
            context.alive = false;
            context.table = [None; PAGES];
        }
        for (setup, ring) in self.setup.rings.iter().zip(&mut self.s.rings) {
            ring.buffer = [None; PAGES];
            if (ring.at as usize) < setup.program.len() {
                ring.activity = Activity::Ended;
            }
        }
        self.s.faults = [None; RINGS];
        true
    }
}
