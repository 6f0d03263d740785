// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Threads of processes, and what the kernel does for them.

use crate::scenario::{CONTEXTS, Omission, Operation, PAGES, THREADS};
use crate::state::{Process, Pte, Reason, Work};
use crate::system::Machine;

impl Machine<'_> {
    /// Begins the next operation of a thread, or does it if it is a single step.
    pub(crate) fn next_operation(&mut self, task: usize) -> bool {
        let thread = &self.setup.threads[task];
        let process = thread.process as usize;
        let Some(&operation) = thread.program.get(self.s.tasks[task].at as usize) else {
            return false;
        };
        if !self.s.processes[process].exists {
            return false;
        }
        match operation {
            Operation::Add(page) => self.add(task, process, page as usize),
            Operation::Discard(page) => {
                if !self.read_lock(process) {
                    return false;
                }
                self.s.tasks[task].work = Work::Change;
                self.tell(
                    task,
                    self.mirrors(process, page as usize, |_| false),
                    Reason::Kernel,
                );
                true
            }
            Operation::Unmap(_) | Operation::Move(..) | Operation::Fork => {
                self.s.processes[process].writers_waiting += 1;
                self.s.tasks[task].work = Work::WaitToWrite;
                true
            }
            Operation::Relocate(page) => {
                let Pte::Present { frame, .. } = self.s.processes[process].pages[page as usize] else {
                    // What is not the system's cannot be moved.
                    self.s.tasks[task].at += 1;
                    return true;
                };
                if self.s.frames[frame as usize].lock.is_some() {
                    return false;
                }
                self.s.frames[frame as usize].lock = Some(task as u8);
                let unmapped = false;
                self.s.tasks[task].work = Work::Relocate { frame, unmapped };
                true
            }
            Operation::Prefetch(context, page) => self.begin_fetch(task, context as usize, page as usize),
            Operation::Exit => {
                let setup = self.setup;
                let others = setup.threads.iter().zip(&self.s.tasks).enumerate();
                let mut others = others
                    .filter(|(other, (thread, _))| *other != task && thread.process as usize == process);
                if others.any(|(_, (thread, other))| (other.at as usize) < thread.program.len()) {
                    return false;
                }
                self.s.processes[process].users -= 1;
                self.s.tasks[task].at += 1;
                true
            }
            Operation::Close(context) => {
                let context = context as usize;
                self.s.contexts[context].closing = true;
                self.s.tasks[task].work = Work::Change;
                true
            }
        }
    }

    /// An atomic increment, or what the fault handler begins because of it.
    fn add(&mut self, task: usize, process: usize, page: usize) -> bool {
        match self.s.processes[process].pages[page] {
            Pte::Present {
                frame,
                writable: true,
            } => {
                self.s.frames[frame as usize].value += 1;
                self.s.processes[process].expected[page] += 1;
                self.s.tasks[task].at += 1;
                true
            }
            Pte::None if !self.s.processes[process].areas[page] => {
                // SIGSEGV.
                self.s.tasks[task].at = self.setup.threads[task].program.len() as u8;
                true
            }
            other => self.fault_in(task, process, page, other),
        }
    }

    /// Has the CPU's fault handler make a page writable. `pte` is what is there.
    pub(crate) fn fault_in(&mut self, task: usize, process: usize, page: usize, pte: Pte) -> bool {
        if matches!(pte, Pte::Migrating { .. }) || !self.read_lock(process) {
            return false;
        }
        let unlocked = match pte {
            Pte::None => {
                let frame = self.allocate(0);
                self.s.processes[process].pages[page] = Pte::Present {
                    frame,
                    writable: true,
                };
                self.read_unlock(process);
                return true;
            }
            Pte::Present { frame, .. } => self.begin_copy(task, process, page, frame),
            Pte::Stand { stand, .. } => self.begin_home(task, process, page, stand),
            Pte::Exclusive { frame } => {
                let lock = &mut self.s.frames[frame as usize].lock;
                let free = lock.is_none();
                if free {
                    *lock = Some(task as u8);
                    let (process, page) = (process as u8, page as u8);
                    self.s.tasks[task].work = Work::Restore { process, page, frame };
                    let cells = self.mirrors(process as usize, page as usize, |_| false);
                    self.tell(task, cells, Reason::Kernel);
                }
                free
            }
            Pte::Migrating { .. } => false,
        };
        if !unlocked {
            self.read_unlock(process);
        }
        unlocked
    }

    /// A write to a page that may only be read: others share it, or have.
    fn begin_copy(&mut self, task: usize, process: usize, page: usize, frame: u8) -> bool {
        if self.s.frames[frame as usize].lock.is_some() {
            return false;
        }
        let leads = |pte: &&Pte| matches!(pte, Pte::Present { frame: this, .. } if *this == frame);
        let count: usize = self
            .s
            .processes
            .iter()
            .map(|other| other.pages.iter().filter(leads).count())
            .sum();
        if count == 1 {
            self.s.processes[process].pages[page] = Pte::Present {
                frame,
                writable: true,
            };
            self.read_unlock(process);
            return true;
        }
        self.s.tasks[task].work = Work::Copy {
            process: process as u8,
            page: page as u8,
        };
        self.tell(task, self.mirrors(process, page, |_| false), Reason::Kernel);
        true
    }

    /// The mirrors know: the page is copied.
    pub(crate) fn copy(&mut self, task: usize, process: u8, page: u8) -> bool {
        let (process, page) = (process as usize, page as usize);
        if let Pte::Present {
            frame,
            writable: false,
        } = self.s.processes[process].pages[page]
        {
            let copy = self.allocate(self.s.frames[frame as usize].value);
            self.s.processes[process].pages[page] = Pte::Present {
                frame: copy,
                writable: true,
            };
            self.put_frame(frame);
        }
        self.end_change(task);
        self.read_unlock(process);
        self.s.tasks[task].work = Work::None;
        true
    }

    /// The mirrors know: the page stops being exclusive.
    pub(crate) fn restore(&mut self, task: usize, process: u8, page: u8, frame: u8) -> bool {
        let (process, page) = (process as usize, page as usize);
        if self.s.processes[process].pages[page] == (Pte::Exclusive { frame }) {
            self.s.processes[process].pages[page] = Pte::Present {
                frame,
                writable: true,
            };
        }
        self.s.frames[frame as usize].lock = None;
        self.put_frame(frame);
        self.end_change(task);
        self.read_unlock(process);
        self.s.tasks[task].work = Work::None;
        true
    }

    /// Gets mmap_lock for writing, and begins to tell the mirrors.
    pub(crate) fn wait_to_write(&mut self, task: usize) -> bool {
        let thread = &self.setup.threads[task];
        let process = thread.process as usize;
        let memory = &mut self.s.processes[process];
        if memory.readers > 0 || memory.writer {
            return false;
        }
        memory.writer = true;
        memory.writers_waiting -= 1;
        self.s.tasks[task].work = Work::Change;
        let cells = match thread.program[self.s.tasks[task].at as usize] {
            Operation::Unmap(page) | Operation::Move(page, _) => {
                self.mirrors(process, page as usize, |_| false)
            }
            _ => (0..PAGES)
                .map(|page| self.mirrors(process, page, |_| false))
                .fold(0, |all, some| all | some),
        };
        self.tell(task, cells, Reason::Kernel);
        true
    }

    /// The mirrors know: the page table changes.
    pub(crate) fn change(&mut self, task: usize) -> bool {
        let thread = &self.setup.threads[task];
        let process = thread.process as usize;
        match thread.program[self.s.tasks[task].at as usize] {
            Operation::Discard(page) => {
                self.zap(process, page as usize);
                self.read_unlock(process);
            }
            Operation::Unmap(page) => {
                self.zap(process, page as usize);
                self.s.processes[process].areas[page as usize] = false;
                self.s.processes[process].writer = false;
            }
            Operation::Move(from, to) => {
                let memory = &mut self.s.processes[process];
                memory.pages[to as usize] = core::mem::take(&mut memory.pages[from as usize]);
                memory.areas[to as usize] = core::mem::take(&mut memory.areas[from as usize]);
                memory.expected[to as usize] = core::mem::take(&mut memory.expected[from as usize]);
                memory.writer = false;
            }
            Operation::Fork => self.fork(process),
            Operation::Close(context) => return self.close(task, context as usize),
            _ => {}
        }
        self.end_change(task);
        self.s.tasks[task].work = Work::None;
        self.s.tasks[task].at += 1;
        true
    }

    /// The second process is a copy of the first, which must not write to what both have.
    fn fork(&mut self, process: usize) {
        for page in 0..PAGES {
            let shared = match self.s.processes[process].pages[page] {
                Pte::Present { frame, .. } | Pte::Exclusive { frame } => Pte::Present {
                    frame,
                    writable: false,
                },
                Pte::Stand { stand, .. } => Pte::Stand {
                    stand,
                    writable: false,
                },
                Pte::Migrating { task, .. } => Pte::Migrating {
                    task,
                    writable: false,
                },
                Pte::None => Pte::None,
            };
            self.s.processes[process].pages[page] = shared;
        }
        self.s.processes[process].writer = false;
        let parent = self.s.processes[process];
        self.s.processes[1] = Process {
            exists: true,
            users: 1,
            readers: 0,
            writers_waiting: 0,
            ..parent
        };
    }

    /// A file is closed: DESTROY, and then (or before it has been answered, if that is left out) the handler may do the rest.
    fn close(&mut self, task: usize, context: usize) -> bool {
        if self.s.contexts[context].destroyed {
            self.s.tasks[task].work = Work::None;
            self.s.tasks[task].at += 1;
            return true;
        }
        if self.s.contexts[context].alive && !self.s.lost {
            self.send_destroy(context);
            return true;
        }
        if !self.is_destroyed(context) {
            return false;
        }
        self.s.contexts[context].destroyed = true;
        true
    }

    /// Whether the rest of closing can be done.
    pub(crate) fn may_finish_closing(&self, context: usize) -> bool {
        let context = &self.s.contexts[context];
        context.closing && !context.closed && (context.destroyed || self.omits(Omission::CloseDestroy))
    }

    /// The last user of a process's memory is gone.
    pub(crate) fn tear_down(&mut self, task: usize) -> bool {
        let process = task - THREADS - CONTEXTS;
        let memory = self.s.processes[process];
        if !memory.exists || memory.users > 0 || memory.torn_down {
            return false;
        }
        if self.s.tasks[task].at == 0 {
            self.s.tasks[task].at = 1;
            let cells = (0..PAGES).map(|page| self.mirrors(process, page, |_| false));
            let cells = cells.fold(0, |all, some| all | some);
            self.tell(task, cells, Reason::Kernel);
            return true;
        }
        for page in 0..PAGES {
            self.zap(process, page);
            self.s.processes[process].areas[page] = false;
        }
        self.end_change(task);
        self.s.processes[process].torn_down = true;
        true
    }

    /// The kernel moves a page to another frame: unmapped wherever it is, copied, mapped again.
    pub(crate) fn relocate(&mut self, task: usize, frame: u8, unmapped: bool) -> bool {
        let leads = |pte| match pte {
            Pte::Present {
                frame: this,
                writable,
            } if this == frame => Some(writable),
            _ => None,
        };
        if !unmapped && self.unmap_elsewhere(task, leads) {
            return true;
        }
        if !unmapped {
            self.s.tasks[task].work = Work::Relocate {
                frame,
                unmapped: true,
            };
            return true;
        }
        let target = self.allocate(self.s.frames[frame as usize].value);
        self.finish_migration(task, |writable| Pte::Present {
            frame: target,
            writable,
        });
        self.s.tasks[task].work = Work::None;
        self.s.frames[frame as usize].lock = None;
        self.put_frame(frame);
        self.put_frame(target);
        self.end_change(task);
        self.s.tasks[task].at += 1;
        true
    }

    /// Replaces the migration entries of a task.
    pub(crate) fn finish_migration(&mut self, task: usize, new: impl Fn(bool) -> Pte) {
        self.replace(|pte| match pte {
            Pte::Migrating { task: of, writable } if of as usize == task => Some(new(writable)),
            _ => None,
        });
    }
}
