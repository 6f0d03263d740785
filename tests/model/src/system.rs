// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who can take a step, and what all have in common: locks, mirrors that are told of changes, pages that become free.

use crate::scenario::{CONTEXTS, FRAMES, Omission, PAGES, PROCESSES, RINGS, STAND_INS, Scenario, THREADS};
use crate::state::{
    Activity, Context, Frame, HomeStage, Notice, Process, Pte, Reason, Ring, Stand, State, TASKS, Task, Work,
};

/// Somebody takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A task.
    Task(u8),
    /// A task whose migration home fails.
    Fail(u8),
    /// A ring.
    Ring(u8),
    /// The device stops answering.
    Lose,
    /// The driver has it reset.
    Reset,
}

/// The number of the fault handler of a context.
#[must_use]
pub fn handler(context: usize) -> usize {
    THREADS + context
}

/// The context of a fault handler.
#[must_use]
pub fn context_of(task: usize) -> usize {
    task - THREADS
}

/// The bit of a page of a context.
#[must_use]
pub fn cell(context: usize, page: usize) -> u8 {
    1 << (context * PAGES + page)
}

/// A state in which somebody takes a step.
pub struct Machine<'a> {
    /// What is to happen.
    pub setup: &'a Scenario,
    /// The state.
    pub s: State,
}

impl<'a> Machine<'a> {
    /// The state in which nothing has happened yet.
    #[must_use]
    pub fn initial(setup: &'a Scenario) -> State {
        let mut processes = [Process::default(); PROCESSES];
        processes[0].exists = true;
        processes[0].users = 1;
        let mut frames = [Frame::default(); FRAMES];
        let pages = 1 + usize::from(setup.two_pages);
        for (page, frame) in frames.iter_mut().enumerate().take(pages) {
            frame.used = true;
            processes[0].areas[page] = true;
            let frame = page as u8;
            processes[0].pages[page] = Pte::Present {
                frame,
                writable: true,
            };
        }
        let mut contexts = [Context::default(); CONTEXTS];
        for context in &mut contexts[..setup.contexts.len()] {
            context.alive = true;
        }
        State {
            processes,
            frames,
            stands: [Stand::default(); STAND_INS],
            contexts,
            faults: [None; RINGS],
            rings: [Ring::default(); RINGS],
            tasks: [Task::default(); TASKS],
            lost: false,
            stopped: false,
            failures: setup.failures,
            grant_broken: false,
            revoked_unknown: false,
        }
    }

    /// Everybody who could exist.
    #[must_use]
    pub fn everybody(setup: &Scenario) -> Vec<Action> {
        let threads = (0..setup.threads.len()).map(|task| Action::Task(task as u8));
        let handlers = (0..setup.contexts.len()).map(|context| Action::Task(handler(context) as u8));
        let ends = (0..PROCESSES).map(|process| Action::Task((THREADS + CONTEXTS + process) as u8));
        let rings = (0..setup.rings.len()).map(|ring| Action::Ring(ring as u8));
        let mut all: Vec<Action> = threads.chain(handlers).chain(ends).chain(rings).collect();
        if setup.failures > 0 {
            all.extend((0..TASKS).map(|task| Action::Fail(task as u8)));
        }
        if setup.loss {
            all.extend([Action::Lose, Action::Reset]);
        }
        all
    }

    /// Has somebody take a step. Says whether they can.
    pub fn step(&mut self, action: Action) -> bool {
        match action {
            Action::Task(task) => self.task(task as usize),
            Action::Fail(task) => self.fail_to_come_home(task as usize),
            Action::Ring(ring) => self.ring(ring as usize),
            Action::Lose => {
                let possible = !self.s.lost && !self.is_finished();
                self.s.lost = true;
                possible
            }
            Action::Reset => self.reset(),
        }
    }

    /// Whether that step is left out.
    #[must_use]
    pub fn omits(&self, omission: Omission) -> bool {
        self.setup.omission == Some(omission)
    }

    fn task(&mut self, task: usize) -> bool {
        if self.s.tasks[task].notice.is_some() {
            return self.tell_next(task);
        }
        match self.s.tasks[task].work {
            Work::None if task < THREADS => self.next_operation(task),
            Work::None if task < THREADS + CONTEXTS => self.handle_faults(task),
            Work::None => self.tear_down(task),
            Work::Home(home, stage) => self.come_home(task, home, stage),
            Work::Pin { frame, stand, stage } => self.pin(task, frame, stand, stage),
            Work::Exclude { frame, stage } => self.exclude(task, frame, stage),
            Work::Restore { process, page, frame } => self.restore(task, process, page, frame),
            Work::Copy { process, page } => self.copy(task, process, page),
            Work::Change => self.change(task),
            Work::WaitToWrite => self.wait_to_write(task),
            Work::Fetch { frame, stage } => self.fetch(task, frame, stage),
            Work::Relocate { frame, unmapped } => self.relocate(task, frame, unmapped),
        }
    }

    // mmap_lock.

    /// Takes mmap_lock for reading, if that is possible now.
    pub fn read_lock(&mut self, process: usize) -> bool {
        let memory = &mut self.s.processes[process];
        let possible = !memory.writer && memory.writers_waiting == 0;
        memory.readers += u8::from(possible);
        possible
    }

    /// Gives it back.
    pub fn read_unlock(&mut self, process: usize) {
        self.s.processes[process].readers -= 1;
    }

    // Mirrors.

    /// The pages of contexts that mirror this page, but for contexts that need not be told.
    #[must_use]
    pub fn mirrors(&self, process: usize, page: usize, but: impl Fn(usize) -> bool) -> u8 {
        let mut cells = 0;
        for (number, context) in self.setup.contexts.iter().enumerate() {
            if context.process as usize == process && !self.s.contexts[number].closed && !but(number) {
                cells |= cell(number, page);
            }
        }
        cells
    }

    /// Begins to tell mirrors of a change.
    pub fn tell(&mut self, task: usize, cells: u8, reason: Reason) {
        if cells != 0 {
            self.s.tasks[task].notice = Some(Notice {
                cells,
                waiting: false,
                reason,
            });
        }
    }

    /// The page of a context whose window has the lock and the notifier for `page`.
    #[must_use]
    pub fn window(&self, page: usize) -> usize {
        if self.setup.shared_window { 0 } else { page }
    }

    /// Whoever reads there has to begin again.
    fn make_stale(&mut self, context: usize, page: usize, reason: Reason) {
        let window = self.window(page);
        let reading = self.s.tasks[handler(context)].handler.reading;
        if reading.is_some_and(|reading| self.window(reading as usize) == window) {
            let handler = &mut self.s.tasks[handler(context)].handler;
            match reason {
                Reason::Kernel => handler.stale_sequence = true,
                Reason::Revocation => handler.stale_revocations = true,
            }
        }
    }

    /// The next step of telling: the device is asked, or its answer has come.
    fn tell_next(&mut self, task: usize) -> bool {
        let Some(mut notice) = self.s.tasks[task].notice else {
            return false;
        };
        let bit = notice.cells.trailing_zeros() as usize;
        let (context, page) = (bit / PAGES, bit % PAGES);
        let window = self.window(page);
        if !notice.waiting {
            if self.s.contexts[context].windows[window].lock.is_some() {
                return false;
            }
            self.make_stale(context, page, notice.reason);
            if notice.reason == Reason::Kernel {
                self.s.tasks[task].active |= 1 << bit;
                self.s.contexts[context].windows[window].active += 1;
            } else if self.s.contexts[context].closed {
                self.s.revoked_unknown = true;
            }
            let told = !(notice.reason == Reason::Kernel && self.omits(Omission::Notifier));
            if self.s.contexts[context].windows[page].mapped && told {
                self.s.contexts[context].windows[window].lock = Some(task as u8);
                self.send_invalidate(context, page);
                notice.waiting = true;
                self.s.tasks[task].notice = Some(notice);
                return true;
            }
        } else {
            if !self.is_invalidated(context, page) {
                return false;
            }
            self.s.contexts[context].windows[page].mapped = false;
            self.s.contexts[context].windows[window].lock = None;
        }
        notice.cells &= notice.cells - 1;
        notice.waiting = false;
        self.s.tasks[task].notice = (notice.cells != 0).then_some(notice);
        true
    }

    /// The change is over: who wants to begin to read may.
    pub fn end_change(&mut self, task: usize) {
        let mut active = core::mem::take(&mut self.s.tasks[task].active);
        self.s.tasks[task].told = 0;
        while active != 0 {
            let bit = active.trailing_zeros() as usize;
            active &= active - 1;
            let window = self.window(bit % PAGES);
            self.s.contexts[bit / PAGES].windows[window].active -= 1;
        }
    }

    // Pages.

    /// A free frame, which is used from now on.
    pub fn allocate(&mut self, value: u8) -> u8 {
        let frame = self.s.frames.iter().position(|frame| !frame.used);
        let frame = frame.expect("the scenario needs no more frames than there are");
        self.s.frames[frame] = Frame {
            used: true,
            value,
            lock: None,
        };
        frame as u8
    }

    /// Frees a frame whatever leads to it: somebody has dropped what they think is the last reference.
    fn free(&mut self, frame: u8) {
        self.s.frames[frame as usize] = Frame::default();
    }

    /// A mapping of that frame, or its lock, has gone: frees it if that was all.
    pub fn put_frame(&mut self, frame: u8) {
        let leads = |pte: &Pte| matches!(pte, Pte::Present { frame: this, .. } | Pte::Exclusive { frame: this } if *this == frame);
        let mapped = self
            .s
            .processes
            .iter()
            .any(|process| process.pages.iter().any(leads));
        let taken = |task: &Task| matches!(task.work, Work::Home(home, HomeStage::GiveBack) if home.data == Some(frame));
        let owned =
            self.s.stands.iter().any(|stand| stand.data == Some(frame)) || self.s.tasks.iter().any(taken);
        if !mapped && !owned && self.s.frames[frame as usize].lock.is_none() {
            self.free(frame);
        }
    }

    /// A mapping of that stand-in, or its lock, has gone: frees it if that was all, and with it what it stands for.
    pub fn put_stand(&mut self, stand: u8) {
        let leads = |pte: &Pte| matches!(pte, Pte::Stand { stand: this, .. } if *this == stand);
        let mapped = self
            .s
            .processes
            .iter()
            .any(|process| process.pages.iter().any(leads));
        let this = &mut self.s.stands[stand as usize];
        if mapped || this.lock.is_some() {
            return;
        }
        let data = this.data;
        *this = Stand::default();
        if let Some(frame) = data.filter(|_| !self.omits(Omission::FreeSource)) {
            self.free(frame);
        }
    }

    /// Takes away what `process` has at `page`.
    pub fn zap(&mut self, process: usize, page: usize) {
        self.s.processes[process].expected[page] = 0;
        match core::mem::take(&mut self.s.processes[process].pages[page]) {
            Pte::Present { frame, .. } | Pte::Exclusive { frame } => self.put_frame(frame),
            Pte::Stand { stand, .. } => self.put_stand(stand),
            // Whoever migrates it has a reference.
            Pte::None | Pte::Migrating { .. } => {}
        }
    }

    /// Replaces all entries that are `from` (in the eyes of which only the kind of right differs) by others.
    pub fn replace(&mut self, from: impl Fn(Pte) -> Option<Pte>) {
        for process in &mut self.s.processes {
            for pte in &mut process.pages {
                if let Some(new) = from(*pte) {
                    *pte = new;
                }
            }
        }
    }

    /// Unmaps something that is locked in the next process (but `first`) that maps it, after it has been told. Says whether
    /// that took a step. `leads` says whether that is what an entry leads to, and with what right.
    pub fn unmap_elsewhere(&mut self, task: usize, leads: impl Fn(Pte) -> Option<bool>) -> bool {
        for process in 0..PROCESSES {
            for page in 0..PAGES {
                let Some(writable) = leads(self.s.processes[process].pages[page]) else {
                    continue;
                };
                let bit = 1 << (process * PAGES + page);
                let cells = self.mirrors(process, page, |_| false);
                if self.s.tasks[task].told & bit == 0 && cells != 0 {
                    self.s.tasks[task].told |= bit;
                    self.tell(task, cells, Reason::Kernel);
                } else {
                    let task = task as u8;
                    self.s.processes[process].pages[page] = Pte::Migrating { task, writable };
                }
                return true;
            }
        }
        false
    }

    // The end.

    /// Whether all work is done, and nothing is left behind.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let threads = self.setup.threads.iter().zip(&self.s.tasks);
        let mut threads = threads.map(|(thread, task)| task.at as usize >= thread.program.len());
        let mut rings = self.setup.rings.iter().zip(&self.s.rings).map(|(setup, ring)| {
            let context = &self.s.contexts[setup.context as usize];
            match ring.activity {
                Activity::Ready => ring.at as usize >= setup.program.len() || context.error,
                Activity::Ended => context.error || context.closing || self.s.lost,
                _ => false,
            }
        });
        let quiet = |task: &Task| {
            task.work == Work::None
                && task.notice.is_none()
                && task.active == 0
                && task.handler.attempt == crate::state::Attempt::Idle
                && !task.handler.has_mm
        };
        let unlocked = self.s.frames.iter().all(|frame| frame.lock.is_none())
            && self.s.stands.iter().all(|stand| stand.lock.is_none());
        let memory = |process: &Process| {
            process.readers == 0
                && !process.writer
                && (process.users > 0 || !process.exists || process.torn_down)
        };
        let context = |context: &Context| context.leaving == 0 && (!context.closing || context.closed);
        threads.all(|done| done)
            && rings.all(|done| done)
            && unlocked
            && self.s.tasks.iter().all(quiet)
            && self.s.processes.iter().all(memory)
            && self.s.contexts.iter().all(context)
            && (!self.s.lost || self.s.stopped)
    }
}
