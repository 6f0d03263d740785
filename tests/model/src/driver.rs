// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver: faults of the GPU, and pages that come home.

use crate::scenario::{Access, Mechanism, Omission, Operation, PAGES, STAND_INS};
use crate::state::{
    Attempt, Entry, ExcludeStage, FetchStage, Handler, Home, HomeStage, PinStage, Pte, Reason, Stand, Work,
};
use crate::system::{Action, Machine, cell, context_of, handler};

impl Machine<'_> {
    fn process_of(&self, context: usize) -> usize {
        self.setup.contexts[context].process as usize
    }

    fn attempt(&mut self, task: usize, attempt: Attempt) -> bool {
        self.s.tasks[task].handler.attempt = attempt;
        true
    }

    /// Ends an attempt; `again` if the fault is not resolved.
    fn end_attempt(&mut self, task: usize, next: Attempt) -> bool {
        let process = self.process_of(context_of(task));
        let fault = self.s.tasks[task].handler.fault;
        if core::mem::take(&mut self.s.tasks[task].handler.has_mm) {
            self.s.processes[process].users -= 1;
        }
        self.s.tasks[task].handler = Handler {
            attempt: next,
            fault: if next == Attempt::Idle { 0 } else { fault },
            ..Handler::default()
        };
        true
    }

    /// The next step of a fault handler that is not in the middle of a migration.
    pub(crate) fn handle_faults(&mut self, task: usize) -> bool {
        let context = context_of(task);
        if context >= self.setup.contexts.len() {
            return false;
        }
        let process = self.process_of(context);
        let state = self.s.tasks[task].handler;
        let fault = self.s.faults[state.fault as usize];
        match state.attempt {
            Attempt::Idle => self.take_faults(task, context),
            Attempt::Pause => {
                let waits = self.setup.patient && !self.omits(Omission::Pause) && self.others_can_go_on(task);
                !waits && self.attempt(task, Attempt::Begin)
            }
            Attempt::Begin => {
                let window = &self.s.contexts[context].windows;
                let wanted = !self.s.contexts[context].closing && !self.s.lost;
                // The number can be that of another one already, which is still in the queue.
                let Some(fault) = fault.filter(|fault| fault.taken && wanted) else {
                    return self.end_attempt(task, Attempt::Idle);
                };
                if self.s.contexts[context].error || self.s.processes[process].users == 0 {
                    return self.attempt(task, Attempt::Cancel);
                }
                if window[self.window(fault.page as usize)].lock.is_some() {
                    return false;
                }
                self.s.processes[process].users += 1;
                let handler = &mut self.s.tasks[task].handler;
                handler.has_mm = true;
                handler.reading = Some(fault.page);
                handler.attempt = Attempt::Sequence;
                true
            }
            Attempt::Sequence => {
                let page = state.reading.map_or(0, usize::from);
                if self.s.contexts[context].windows[self.window(page)].active > 0 {
                    return false;
                }
                self.s.tasks[task].handler.stale_sequence = false;
                self.attempt(task, Attempt::Read)
            }
            Attempt::Read => match fault {
                Some(fault) => self.read(task, context, fault.page as usize, fault.access),
                None => self.end_attempt(task, Attempt::Idle),
            },
            Attempt::Again => self.end_attempt(task, Attempt::Pause),
            Attempt::Locked(frame) => {
                self.s.frames[frame as usize].lock.is_none() && self.end_attempt(task, Attempt::Begin)
            }
            Attempt::Commit(entry, stand) => self.commit(task, context, entry, stand),
            Attempt::Wait => {
                if !self.is_replayed(task) {
                    return false;
                }
                self.unlock_window(task, context);
                self.end_attempt(task, Attempt::Begin)
            }
            Attempt::Cancel => {
                if self.omits(Omission::Cancel) {
                    // Nobody will ever look at it again.
                    self.s.faults[state.fault as usize] = None;
                } else {
                    self.cancel(state.fault as usize);
                }
                self.end_attempt(task, Attempt::Idle)
            }
            Attempt::Release(page) => self.release(task, context, page as usize),
            Attempt::Leaving => self.finish_closing(task, context),
        }
    }

    fn take_faults(&mut self, task: usize, context: usize) -> bool {
        if self.may_finish_closing(context) {
            return self.attempt(task, Attempt::Release(0));
        }
        if self.s.lost || self.s.contexts[context].closing {
            return false;
        }
        // All that have come are taken; those that are left over from before come first.
        let mine = |fault: &crate::state::Fault| fault.context as usize == context;
        for fault in self.s.faults.iter_mut().flatten().filter(|fault| mine(fault)) {
            if !fault.taken {
                fault.taken = true;
                return true;
            }
        }
        let first = self
            .s
            .faults
            .iter()
            .position(|fault| fault.as_ref().is_some_and(mine));
        let Some(first) = first else {
            return false;
        };
        self.s.tasks[task].handler.fault = first as u8;
        self.attempt(task, Attempt::Begin)
    }

    /// Reads the CPU's page table, and decides.
    fn read(&mut self, task: usize, context: usize, page: usize, access: Access) -> bool {
        let process = self.process_of(context);
        let write = access > Access::Read;
        let memory = &self.s.processes[process];
        if memory.writer || memory.writers_waiting > 0 {
            return false;
        }
        let pte = memory.pages[page];
        match pte {
            Pte::None if !memory.areas[page] => self.attempt(task, Attempt::Cancel),
            Pte::None => self.fault_in(task, process, page, pte),
            Pte::Migrating { .. } => false,
            // For the CPU's fault handler; then again from the beginning.
            Pte::Exclusive { .. } => self.have_faulted_in(task, process, page, pte),
            Pte::Present { writable: false, .. } if write => self.have_faulted_in(task, process, page, pte),
            Pte::Present { frame, .. } if access == Access::Atomic => {
                if !self.read_lock(process) {
                    return false;
                }
                match self.setup.contexts[context].mechanism {
                    Mechanism::Pin => self.begin_pin(task, context, page, frame),
                    Mechanism::Exclusive => self.begin_exclude(task, context, page, frame),
                }
            }
            Pte::Present { frame, .. } => {
                let rights = access;
                self.attempt(task, Attempt::Commit(Entry { frame, rights }, None))
            }
            Pte::Stand { stand, writable } => {
                let this = self.s.stands[stand as usize];
                let mine = this.note.is_some_and(|note| note.0 as usize == context)
                    || self.omits(Omission::ContextCheck);
                let allowed = writable || !write || self.omits(Omission::WritableCheck);
                let Some(frame) = this.data.filter(|_| mine && allowed) else {
                    return this.data.is_some() && self.have_faulted_in(task, process, page, pte);
                };
                let rights = if writable || write {
                    Access::Atomic
                } else {
                    Access::Read
                };
                self.attempt(task, Attempt::Commit(Entry { frame, rights }, Some(stand)))
            }
        }
    }

    /// Has the CPU's fault handler see to a page, and begins again afterwards.
    fn have_faulted_in(&mut self, task: usize, process: usize, page: usize, pte: Pte) -> bool {
        self.fault_in(task, process, page, pte) && self.attempt(task, Attempt::Again)
    }

    /// Whether a thread can take a step, or another handler that has not been too late itself.
    fn others_can_go_on(&self, task: usize) -> bool {
        let handlers = (0..self.setup.contexts.len()).map(handler);
        let handlers =
            handlers.filter(|other| *other != task && self.s.tasks[*other].handler.attempt != Attempt::Pause);
        (0..self.setup.threads.len()).chain(handlers).any(|other| {
            let mut copy = Machine {
                setup: self.setup,
                s: self.s,
            };
            copy.step(Action::Task(other as u8))
        })
    }

    // What is in a window.

    /// Whether what has been read may be put into the mirror.
    fn is_stale(&self, task: usize) -> bool {
        let state = self.s.tasks[task].handler;
        (state.stale_sequence && !self.omits(Omission::SequenceCheck))
            || (state.stale_revocations && !self.omits(Omission::RevocationCount))
    }

    /// The page that is read, and the one whose window has the lock for it.
    fn window_of(&self, task: usize) -> (usize, usize) {
        let page = self.s.tasks[task].handler.reading.map_or(0, usize::from);
        (self.window(page), page)
    }

    fn unlock_window(&mut self, task: usize, context: usize) {
        let (window, _) = self.window_of(task);
        self.s.contexts[context].windows[window].lock = None;
    }

    /// MAP and REPLAY, of what the entry is good for, with the window locked.
    fn map_and_replay(&mut self, task: usize, context: usize, entry: Entry) {
        let (window, page) = self.window_of(task);
        self.s.contexts[context].windows[window].lock = Some(task as u8);
        self.s.contexts[context].windows[page].mapped = true;
        self.map(context, page, entry);
        for number in 0..self.s.faults.len() {
            let good = self.s.faults[number].is_some_and(|fault| {
                fault.context as usize == context
                    && fault.page as usize == page
                    && fault.taken
                    && entry.rights >= fault.access
            });
            if good {
                self.replay(task, number);
            }
        }
    }

    /// Maps what has been read without moving it.
    fn commit(&mut self, task: usize, context: usize, entry: Entry, stand: Option<u8>) -> bool {
        let (window, page) = self.window_of(task);
        if self.s.contexts[context].windows[window].lock.is_some() {
            return false;
        }
        if self.is_stale(task) {
            return self.end_attempt(task, Attempt::Pause);
        }
        if let Some(stand) = stand.filter(|_| !self.omits(Omission::Update)) {
            // A migration home, of which this window knows nothing, may have come first.
            let this = &mut self.s.stands[stand as usize];
            let mine = this.note.is_some_and(|note| note.0 as usize == context)
                || self.setup.omission == Some(Omission::ContextCheck);
            if this.data != Some(entry.frame) || !mine {
                return self.end_attempt(task, Attempt::Pause);
            }
            this.note = Some((context as u8, page as u8));
        }
        // What the GPU may do already it may go on doing.
        let old = self.s.contexts[context].table[page];
        let rights = old.map_or(entry.rights, |old| old.rights.max(entry.rights));
        self.map_and_replay(task, context, Entry { rights, ..entry });
        self.attempt(task, Attempt::Wait)
    }

    // Pinning.

    /// Whom a migration of this context need not tell.
    fn is_ours(&self, context: usize, other: usize) -> bool {
        if self.omits(Omission::OwnerException) {
            false
        } else if self.omits(Omission::OwnerOfAddressSpace) {
            self.setup.contexts[other].device == self.setup.contexts[context].device
        } else {
            other == context
        }
    }

    fn begin_pin(&mut self, task: usize, context: usize, page: usize, frame: u8) -> bool {
        let process = self.process_of(context);
        self.s.tasks[task].work = Work::Pin {
            frame,
            stand: 0,
            stage: PinStage::Unmap,
        };
        let cells = self.mirrors(process, page, |other| self.is_ours(context, other));
        self.tell(task, cells, Reason::Kernel);
        true
    }

    /// The next step of pinning a page.
    pub(crate) fn pin(&mut self, task: usize, frame: u8, stand: u8, stage: PinStage) -> bool {
        let context = context_of(task);
        let process = self.process_of(context);
        let (window, page) = self.window_of(task);
        let early = self.omits(Omission::FinishBeforeReplay);
        let next = |this: &mut Self, stage| {
            this.s.tasks[task].work = Work::Pin { frame, stand, stage };
            true
        };
        let number = task as u8;
        match stage {
            PinStage::Unmap => {
                let Pte::Present { frame, writable } = self.s.processes[process].pages[page] else {
                    return self.give_up_pin(task, Attempt::Pause);
                };
                if self.s.frames[frame as usize].lock.is_some() {
                    return self.give_up_pin(task, Attempt::Locked(frame));
                }
                if self.setup.fresh_revocations {
                    self.s.tasks[task].handler.stale_revocations = false;
                }
                self.s.frames[frame as usize].lock = Some(number);
                self.s.processes[process].pages[page] = Pte::Migrating {
                    task: number,
                    writable,
                };
                self.s.tasks[task].work = Work::Pin {
                    frame,
                    stand,
                    stage: PinStage::Others,
                };
                true
            }
            PinStage::Others => {
                let leads = |pte| match pte {
                    Pte::Present {
                        frame: this,
                        writable,
                    } if this == frame => Some(writable),
                    _ => None,
                };
                self.unmap_elsewhere(task, leads) || next(self, PinStage::Advance)
            }
            PinStage::Advance => {
                let stand = self.s.stands.iter().position(|stand| !stand.used);
                let stand = stand.expect("no scenario pins more pages than there are stand-ins");
                debug_assert!(stand < STAND_INS);
                self.s.stands[stand] = Stand {
                    used: true,
                    lock: Some(number),
                    data: Some(frame),
                    note: Some((context as u8, page as u8)),
                    device: self.setup.contexts[context].device,
                    vram: false,
                    frame,
                };
                self.s.tasks[task].work = Work::Pin {
                    frame,
                    stand: stand as u8,
                    stage: if early { PinStage::Finish } else { PinStage::Commit },
                };
                true
            }
            PinStage::Commit => {
                if self.s.contexts[context].windows[window].lock.is_some() {
                    return false;
                }
                if self.is_stale(task) {
                    // It is pinned all the same; the next attempt finds it so.
                    return if early {
                        self.s.tasks[task].work = Work::None;
                        self.end_attempt(task, Attempt::Pause)
                    } else {
                        next(self, PinStage::Finish)
                    };
                }
                let rights = Access::Atomic;
                self.map_and_replay(task, context, Entry { frame, rights });
                next(self, PinStage::Wait)
            }
            PinStage::Wait => {
                if !self.is_replayed(task) {
                    return false;
                }
                self.unlock_window(task, context);
                if early {
                    self.s.tasks[task].work = Work::None;
                    return self.end_attempt(task, Attempt::Begin);
                }
                next(self, PinStage::Finish)
            }
            PinStage::Finish => {
                self.finish_migration(task, |writable| Pte::Stand { stand, writable });
                self.s.frames[frame as usize].lock = None;
                self.s.stands[stand as usize].lock = None;
                self.put_stand(stand);
                self.end_change(task);
                self.read_unlock(process);
                if early {
                    return next(self, PinStage::Commit);
                }
                self.s.tasks[task].work = Work::None;
                self.end_attempt(task, self.after_attempt(task))
            }
        }
    }

    /// What comes after an attempt: a pause, if the fault is still there.
    fn after_attempt(&self, task: usize) -> Attempt {
        match self.s.faults[self.s.tasks[task].handler.fault as usize] {
            Some(fault) if fault.taken => Attempt::Pause,
            _ => Attempt::Begin,
        }
    }

    /// The page cannot be pinned as things are.
    fn give_up_pin(&mut self, task: usize, next: Attempt) -> bool {
        let process = self.process_of(context_of(task));
        self.s.tasks[task].work = Work::None;
        self.end_change(task);
        self.read_unlock(process);
        self.end_attempt(task, next)
    }

    // VRAM.

    /// Begins to move a page to VRAM.
    pub(crate) fn begin_fetch(&mut self, task: usize, context: usize, page: usize) -> bool {
        let process = self.process_of(context);
        let Pte::Present { frame, .. } = self.s.processes[process].pages[page] else {
            // There is nothing to be moved.
            self.s.tasks[task].at += 1;
            return true;
        };
        if !self.read_lock(process) {
            return false;
        }
        let stage = FetchStage::Unmap;
        self.s.tasks[task].work = Work::Fetch { frame, stage };
        let cells = self.mirrors(process, page, |other| self.is_ours(context, other));
        self.tell(task, cells, Reason::Kernel);
        true
    }

    /// The next step of moving a page to VRAM. What comes of it the GPU gets by its next fault.
    pub(crate) fn fetch(&mut self, task: usize, frame: u8, stage: FetchStage) -> bool {
        let at = self.s.tasks[task].at as usize;
        let Operation::Prefetch(context, place) = self.setup.threads[task].program[at] else {
            return false;
        };
        let (process, page) = (self.process_of(context as usize), place as usize);
        match stage {
            FetchStage::Unmap => {
                let Pte::Present { frame, writable } = self.s.processes[process].pages[page] else {
                    return self.end_fetch(task, process);
                };
                if self.s.frames[frame as usize].lock.is_some() {
                    return self.end_fetch(task, process);
                }
                let number = task as u8;
                self.s.frames[frame as usize].lock = Some(number);
                self.s.processes[process].pages[page] = Pte::Migrating {
                    task: number,
                    writable,
                };
                let stage = FetchStage::Others;
                self.s.tasks[task].work = Work::Fetch { frame, stage };
                true
            }
            FetchStage::Others => {
                let leads = |pte| match pte {
                    Pte::Present {
                        frame: this,
                        writable,
                    } if this == frame => Some(writable),
                    _ => None,
                };
                if self.unmap_elsewhere(task, leads) {
                    return true;
                }
                let stage = FetchStage::Copy;
                self.s.tasks[task].work = Work::Fetch { frame, stage };
                // Our own migration is not reported to us.
                if !self.omits(Omission::RevokeBeforeCopy) {
                    self.tell(task, cell(context as usize, page), Reason::Revocation);
                }
                true
            }
            FetchStage::Copy => {
                let stand = self.s.stands.iter().position(|stand| !stand.used);
                let stand = stand.expect("no scenario moves more pages than there are stand-ins");
                let copy = self.allocate(self.s.frames[frame as usize].value);
                self.s.stands[stand] = Stand {
                    used: true,
                    lock: None,
                    data: Some(copy),
                    note: Some((context, place)),
                    device: self.setup.contexts[context as usize].device,
                    vram: true,
                    frame: copy,
                };
                let stand = stand as u8;
                self.finish_migration(task, |writable| Pte::Stand { stand, writable });
                self.s.frames[frame as usize].lock = None;
                self.put_frame(frame);
                self.put_stand(stand);
                self.end_fetch(task, process)
            }
        }
    }

    fn end_fetch(&mut self, task: usize, process: usize) -> bool {
        self.s.tasks[task].work = Work::None;
        self.s.tasks[task].at += 1;
        self.end_change(task);
        self.read_unlock(process);
        true
    }

    // Exclusive access as the kernel has it.

    fn begin_exclude(&mut self, task: usize, context: usize, page: usize, frame: u8) -> bool {
        let process = self.process_of(context);
        if self.s.frames[frame as usize].lock.is_some() {
            return self.give_up_pin(task, Attempt::Locked(frame));
        }
        self.s.frames[frame as usize].lock = Some(task as u8);
        let stage = ExcludeStage::Replace;
        self.s.tasks[task].work = Work::Exclude { frame, stage };
        let cells = self.mirrors(process, page, |other| self.is_ours(context, other));
        self.tell(task, cells, Reason::Kernel);
        true
    }

    /// The next step of making a page exclusive.
    pub(crate) fn exclude(&mut self, task: usize, frame: u8, stage: ExcludeStage) -> bool {
        let context = context_of(task);
        let process = self.process_of(context);
        let (window, page) = self.window_of(task);
        let next = |this: &mut Self, stage| {
            this.s.tasks[task].work = Work::Exclude { frame, stage };
            true
        };
        let early = self.omits(Omission::ExclusiveLock);
        match stage {
            ExcludeStage::Replace => {
                let found = self.s.processes[process].pages[page];
                let same = Pte::Present {
                    frame,
                    writable: true,
                };
                if found == same {
                    self.s.processes[process].pages[page] = Pte::Exclusive { frame };
                }
                self.end_change(task);
                if found != same {
                    return next(self, ExcludeStage::Finish);
                }
                if early {
                    self.s.frames[frame as usize].lock = None;
                }
                next(self, ExcludeStage::Commit)
            }
            ExcludeStage::Commit => {
                if self.s.contexts[context].windows[window].lock.is_some() {
                    return false;
                }
                if self.is_stale(task) {
                    return next(self, ExcludeStage::Finish);
                }
                let rights = Access::Atomic;
                self.map_and_replay(task, context, Entry { frame, rights });
                next(self, ExcludeStage::Wait)
            }
            ExcludeStage::Wait => {
                if !self.is_replayed(task) {
                    return false;
                }
                self.unlock_window(task, context);
                next(self, ExcludeStage::Finish)
            }
            ExcludeStage::Finish => {
                if !early {
                    self.s.frames[frame as usize].lock = None;
                    self.put_frame(frame);
                }
                self.s.tasks[task].work = Work::None;
                self.end_change(task);
                self.read_unlock(process);
                self.end_attempt(task, self.after_attempt(task))
            }
        }
    }

    // The way home.

    /// Begins to bring home what `stand` stands for, with mmap_lock held. Says whether that is possible now.
    pub(crate) fn begin_home(&mut self, task: usize, process: usize, page: usize, stand: u8) -> bool {
        let this = &mut self.s.stands[stand as usize];
        if this.lock.is_some() {
            return false;
        }
        this.lock = Some(task as u8);
        let device = this.device;
        let home = Home {
            process: process as u8,
            page: page as u8,
            stand,
            data: None,
            note: None,
        };
        self.s.tasks[task].work = Work::Home(home, HomeStage::Unmap);
        // The owner is the device: all of its address spaces know by the table what to do.
        let ours = |other: usize| {
            self.setup.contexts[other].device == device && !self.omits(Omission::OwnerException)
        };
        let cells = self.mirrors(process, page, ours);
        self.tell(task, cells, Reason::Kernel);
        true
    }

    /// The next step of bringing a page home.
    pub(crate) fn come_home(&mut self, task: usize, home: Home, stage: HomeStage) -> bool {
        let (process, page) = (home.process as usize, home.page as usize);
        let number = task as u8;
        match stage {
            HomeStage::Unmap => {
                let found = self.s.processes[process].pages[page];
                let Pte::Stand { stand, writable } = found else {
                    return self.end_home(task, home);
                };
                if stand != home.stand {
                    return self.end_home(task, home);
                }
                self.s.processes[process].pages[page] = Pte::Migrating {
                    task: number,
                    writable,
                };
                self.s.tasks[task].work = Work::Home(home, HomeStage::Others);
                true
            }
            HomeStage::Others => {
                let leads = |pte| match pte {
                    Pte::Stand { stand, writable } if stand == home.stand => Some(writable),
                    _ => None,
                };
                if !self.unmap_elsewhere(task, leads) {
                    self.s.tasks[task].work = Work::Home(home, HomeStage::Take);
                }
                true
            }
            HomeStage::Take => {
                let stays = self.omits(Omission::Take) || self.omits(Omission::TakeBeforeRevoke);
                let this = &mut self.s.stands[home.stand as usize];
                let data = if stays { this.data } else { this.data.take() };
                let note = this.note;
                if let Some((context, _)) = note {
                    self.s.contexts[context as usize].leaving += 1;
                }
                let home = Home { data, note, ..home };
                self.s.tasks[task].work = Work::Home(home, HomeStage::GiveBack);
                let late = self.omits(Omission::RevokeBeforeGiveBack) || self.omits(Omission::Revoke);
                if !late {
                    self.revoke(task, home);
                }
                true
            }
            HomeStage::GiveBack => {
                let Some(frame) = home.data else {
                    return self.end_home(task, home);
                };
                // What is in VRAM is copied; the page there is freed in the end.
                let frame = match self.s.stands[home.stand as usize].vram {
                    true => self.allocate(self.s.frames[frame as usize].value),
                    false => frame,
                };
                self.finish_migration(task, |writable| Pte::Present { frame, writable });
                self.put_frame(frame);
                if self.omits(Omission::TakeBeforeRevoke) {
                    self.s.stands[home.stand as usize].data = None;
                }
                if self.omits(Omission::RevokeBeforeGiveBack) {
                    self.s.tasks[task].work = Work::Home(home, HomeStage::Late);
                    self.revoke(task, home);
                    return true;
                }
                self.end_home(task, home)
            }
            HomeStage::Late => self.end_home(task, home),
        }
    }

    /// Has the GPU's mapping revoked, where the table has said that it is.
    fn revoke(&mut self, task: usize, home: Home) {
        if let Some((context, page)) = home.note {
            self.tell(task, cell(context as usize, page as usize), Reason::Revocation);
        }
    }

    /// The page cannot be given back, though its mapping has been revoked: all is as before.
    pub(crate) fn fail_to_come_home(&mut self, task: usize) -> bool {
        let Work::Home(home, HomeStage::GiveBack) = self.s.tasks[task].work else {
            return false;
        };
        if self.s.tasks[task].notice.is_some() || self.s.failures == 0 || home.data.is_none() {
            return false;
        }
        self.s.failures -= 1;
        let stand = home.stand;
        if !self.omits(Omission::PutBack) {
            self.s.stands[stand as usize].data = home.data;
        }
        self.finish_migration(task, |writable| Pte::Stand { stand, writable });
        self.end_home(task, home)
    }

    fn end_home(&mut self, task: usize, home: Home) -> bool {
        self.s.tasks[task].work = Work::None;
        self.s.stands[home.stand as usize].lock = None;
        self.put_stand(home.stand);
        if let Some(frame) = home.data {
            self.put_frame(frame);
        }
        if let Some((context, _)) = home.note {
            self.s.contexts[context as usize].leaving -= 1;
        }
        self.end_change(task);
        self.read_unlock(home.process as usize);
        true
    }

    // Closing.

    /// Brings home what is at `page`, then goes on to the next.
    fn release(&mut self, task: usize, context: usize, page: usize) -> bool {
        let process = self.process_of(context);
        if !self.s.tasks[task].handler.has_mm {
            if self.s.processes[process].users == 0 {
                return self.attempt(task, Attempt::Leaving);
            }
            self.s.processes[process].users += 1;
            self.s.tasks[task].handler.has_mm = true;
            return true;
        }
        if page == PAGES {
            return self.end_attempt(task, Attempt::Leaving);
        }
        if !self.read_lock(process) {
            return false;
        }
        self.s.tasks[task].handler.attempt = Attempt::Release(page as u8 + 1);
        let begun = match self.s.processes[process].pages[page] {
            Pte::Stand { stand, .. }
                if self.s.stands[stand as usize]
                    .note
                    .is_some_and(|note| note.0 as usize == context) =>
            {
                self.begin_home(task, process, page, stand)
            }
            _ => false,
        };
        // What others work on at the moment is waited for afterwards.
        if !begun {
            self.read_unlock(process);
        }
        true
    }

    /// Waits for pages that are on their way home, then forgets the context.
    fn finish_closing(&mut self, task: usize, context: usize) -> bool {
        let state = &self.s.contexts[context];
        if state.leaving > 0 && !self.omits(Omission::CloseLeaving) {
            return false;
        }
        // Removing a notifier waits for whoever calls it.
        if state
            .windows
            .iter()
            .any(|window| window.lock.is_some() || window.active > 0)
        {
            return false;
        }
        for stand in &mut self.s.stands {
            if stand.data.is_some() && stand.note.is_some_and(|note| note.0 as usize == context) {
                stand.note = None;
            }
        }
        self.s.contexts[context].closed = true;
        self.end_attempt(task, Attempt::Idle)
    }
}
