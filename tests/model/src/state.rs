// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A state of the whole system.

use crate::scenario::{Access, CONTEXTS, FRAMES, PAGES, PROCESSES, RINGS, STAND_INS, THREADS};

/// Who can wait, and hold locks: threads, then a fault handler for each context, then the end of each process's memory.
pub const TASKS: usize = THREADS + CONTEXTS + PROCESSES;

/// An entry of a CPU's page table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Pte {
    /// Nothing.
    #[default]
    None,
    /// The CPU can use the frame.
    Present {
        /// Which.
        frame: u8,
        /// Whether it may write.
        writable: bool,
    },
    /// A device-private page.
    Stand {
        /// Which.
        stand: u8,
        /// Whether the process may write.
        writable: bool,
    },
    /// A migration entry: whoever finds it waits for that task.
    Migrating {
        /// Who.
        task: u8,
        /// Whether the process may write.
        writable: bool,
    },
    /// A device-exclusive entry.
    Exclusive {
        /// Of which frame.
        frame: u8,
    },
}

/// The memory of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Process {
    /// It has come into being.
    pub exists: bool,
    /// `mm_users`.
    pub users: u8,
    /// Its memory is gone.
    pub torn_down: bool,
    /// Who holds mmap_lock for reading.
    pub readers: u8,
    /// Somebody holds mmap_lock for writing.
    pub writer: bool,
    /// How many wait for that; no reader gets past them.
    pub writers_waiting: u8,
    /// The page table.
    pub pages: [Pte; PAGES],
    /// Whether there is a mapping.
    pub areas: [bool; PAGES],
    /// How many increments each page has seen.
    pub expected: [u8; PAGES],
}

/// A page frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Frame {
    /// It is not free.
    pub used: bool,
    /// The counter in it.
    pub value: u8,
    /// Who has locked it.
    pub lock: Option<u8>,
}

/// A device-private page that stands in for a frame, and the driver's table about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stand {
    /// It is not free.
    pub used: bool,
    /// Who has locked it.
    pub lock: Option<u8>,
    /// The frame that the table says it stands for.
    pub data: Option<u8>,
    /// Context and page at which the table says that it is mapped.
    pub note: Option<(u8, u8)>,
    /// Whose it is.
    pub device: u8,
    /// The frame is one of VRAM: it is copied when it goes home.
    pub vram: bool,
    /// What it really stands for. Nothing in the protocol may look at this.
    pub frame: u8,
}

/// An entry of a GPU's page table, or a translation of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Where it leads.
    pub frame: u8,
    /// What may be done.
    pub rights: Access,
}

/// A part of the mirror of a context: one page of it, with a notifier (of its own, or a common one; then the lock of
/// the first is used).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Window {
    /// Who has locked its state.
    pub lock: Option<u8>,
    /// How many invalidations are under way.
    pub active: u8,
    /// The GPU may have something mapped.
    pub mapped: bool,
}

/// An address space on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Context {
    /// The device knows it.
    pub alive: bool,
    /// Its work ends with an error.
    pub error: bool,
    /// The file has been closed.
    pub closing: bool,
    /// The device has said that it has forgotten it.
    pub destroyed: bool,
    /// The driver has forgotten it.
    pub closed: bool,
    /// Pages that are on their way home.
    pub leaving: u8,
    /// The page table on the device.
    pub table: [Option<Entry>; PAGES],
    /// The mirror.
    pub windows: [Window; PAGES],
}

/// A fault that has been recorded and not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// In which context.
    pub context: u8,
    /// At which page.
    pub page: u8,
    /// What was wanted.
    pub access: Access,
    /// The rings that wait for it, as bits.
    pub rings: u8,
    /// The driver has taken it from the event queue.
    pub taken: bool,
}

/// What a ring does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activity {
    /// It is about to begin an access, or has nothing left.
    #[default]
    Ready,
    /// An access is in flight, through a translation.
    Busy {
        /// To which frame.
        frame: u8,
        /// What has been loaded.
        loaded: u8,
        /// The task that waits for the answer to the REPLAY that this is due to.
        replay: Option<u8>,
    },
    /// It waits for a fault.
    Stalled(u8),
    /// It is to try again; that task waits for the answer.
    Retry(u8),
    /// Its work has been ended.
    Ended,
}

/// A ring and its engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ring {
    /// How many accesses are done.
    pub at: u8,
    /// What it does.
    pub activity: Activity,
    /// The translations it remembers.
    pub buffer: [Option<Entry>; PAGES],
}

/// Why mirrors are told of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The kernel says that the page table will change. What was read before is stale, and nobody begins to read.
    Kernel,
    /// The driver takes the page away itself. What was read before is stale.
    Revocation,
}

/// Mirrors are being told of a change, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Notice {
    /// Those that do not know yet: bit `context * PAGES + page`.
    pub cells: u8,
    /// INVALIDATE has been sent to the first of them.
    pub waiting: bool,
    /// Why.
    pub reason: Reason,
}

/// A page on its way home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Home {
    /// Of which process.
    pub process: u8,
    /// Which page.
    pub page: u8,
    /// What stands in for it.
    pub stand: u8,
    /// The frame, once it has been taken out of the table.
    pub data: Option<u8>,
    /// Where it was mapped then.
    pub note: Option<(u8, u8)>,
}

/// What a task is in the middle of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Work {
    /// Nothing.
    #[default]
    None,
    /// A page goes home: unmap, unmap in other processes, take, (revoke,) give back, (revoke too late).
    Home(Home, HomeStage),
    /// A page is pinned.
    Pin {
        /// Which frame.
        frame: u8,
        /// What stands in for it.
        stand: u8,
        /// How far it has got.
        stage: PinStage,
    },
    /// A page is made exclusive.
    Exclude {
        /// Which frame.
        frame: u8,
        /// How far that has got.
        stage: ExcludeStage,
    },
    /// A page stops being exclusive.
    Restore {
        /// Of which process.
        process: u8,
        /// Which page.
        page: u8,
        /// Which frame.
        frame: u8,
    },
    /// A page is copied because of a write to a shared one.
    Copy {
        /// Of which process.
        process: u8,
        /// Which page.
        page: u8,
    },
    /// An operation of a thread that has told the mirrors and now changes the page table.
    Change,
    /// An operation of a thread that waits for mmap_lock for writing.
    WaitToWrite,
    /// A page is moved to VRAM.
    Fetch {
        /// From where.
        frame: u8,
        /// How far that has got.
        stage: FetchStage,
    },
    /// The kernel moves a page: unmap.
    Relocate {
        /// From where.
        frame: u8,
        /// It is unmapped.
        unmapped: bool,
    },
}

/// How far a page on its way home has got: what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HomeStage {
    /// Replace the entry by a migration entry.
    Unmap,
    /// Replace those of other processes.
    Others,
    /// Take it out of the table, and begin to revoke the mapping.
    Take,
    /// Give it back and finish.
    GiveBack,
    /// All is done but for what was left out.
    Late,
}

/// How far moving a page to VRAM has got: what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FetchStage {
    /// Lock the page and replace the entry by a migration entry.
    Unmap,
    /// Replace those of other processes, then begin to revoke the GPU's mapping.
    Others,
    /// Copy, have the stand-in take its place, and finish.
    Copy,
}

/// How far pinning has got: what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinStage {
    /// Lock the page and replace the entry by a migration entry.
    Unmap,
    /// Replace those of other processes.
    Others,
    /// Have the stand-in take its place.
    Advance,
    /// Map and replay, if nothing has changed.
    Commit,
    /// Wait for the answer to REPLAY.
    Wait,
    /// Let the CPUs go on.
    Finish,
}

/// How far making a page exclusive has got: what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExcludeStage {
    /// Replace the entry.
    Replace,
    /// Map and replay, if nothing has changed.
    Commit,
    /// Wait for the answer to REPLAY.
    Wait,
    /// Unlock the page.
    Finish,
}

/// What the fault handler of a context does next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Attempt {
    /// Take faults from the queue, or close.
    #[default]
    Idle,
    /// Pause, since the last attempt came too late.
    Pause,
    /// Begin an attempt with the first fault: get hold of the process, note the number of revocations.
    Begin,
    /// Wait until no invalidation is under way, and note the kernel's sequence number.
    Sequence,
    /// Read the CPU's page table.
    Read,
    /// Begin again.
    Again,
    /// Wait for a page to be unlocked, then begin again.
    Locked(u8),
    /// Map what has been read without moving it.
    Commit(Entry, Option<u8>),
    /// Wait for the answer to REPLAY.
    Wait,
    /// Give the fault up.
    Cancel,
    /// Close: bring home what is at this page, and then the rest.
    Release(u8),
    /// Close: wait for pages on their way home.
    Leaving,
}

/// The fault handler of a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Handler {
    /// What comes next.
    pub attempt: Attempt,
    /// The fault that is handled.
    pub fault: u8,
    /// It keeps the process's memory.
    pub has_mm: bool,
    /// The page whose window has been begun to read.
    pub reading: Option<u8>,
    /// The kernel's sequence number has changed since.
    pub stale_sequence: bool,
    /// The number of revocations has changed since.
    pub stale_revocations: bool,
}

/// A thread, a fault handler, or the end of a process's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Task {
    /// How many operations are done.
    pub at: u8,
    /// What it is in the middle of.
    pub work: Work,
    /// Whom it is telling of that.
    pub notice: Option<Notice>,
    /// The mirrors that know, and do not know yet that it is over.
    pub active: u8,
    /// The processes in which a page is being unmapped that have been told.
    pub told: u8,
    /// As a fault handler.
    pub handler: Handler,
}

/// A state of the whole system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Processes.
    pub processes: [Process; PROCESSES],
    /// Page frames.
    pub frames: [Frame; FRAMES],
    /// Device-private pages.
    pub stands: [Stand; STAND_INS],
    /// Contexts.
    pub contexts: [Context; CONTEXTS],
    /// Faults; each has the number of the ring that found it.
    pub faults: [Option<Fault>; RINGS],
    /// Rings.
    pub rings: [Ring; RINGS],
    /// Tasks.
    pub tasks: [Task; TASKS],
    /// The device does not answer any more.
    pub lost: bool,
    /// It has been reset, and touches nothing any more.
    pub stopped: bool,
    /// Migrations home that may still fail.
    pub failures: u8,
    /// An access that had been granted was taken away before it was done.
    pub grant_broken: bool,
    /// Somebody has revoked a mapping in a context that nobody knows any more.
    pub revoked_unknown: bool,
}

impl State {
    /// The frame in which the data of a page is, and whether the process may write there, whatever the entry.
    #[must_use]
    pub fn resolve(&self, process: usize, page: usize) -> Option<(u8, bool)> {
        match self.processes[process].pages[page] {
            Pte::None => None,
            Pte::Present { frame, writable } => Some((frame, writable)),
            Pte::Exclusive { frame } => Some((frame, true)),
            Pte::Stand { stand, writable } => Some((self.stands[stand as usize].frame, writable)),
            Pte::Migrating { task, writable } => match self.tasks[task as usize].work {
                Work::Home(home, _) => Some((self.stands[home.stand as usize].frame, writable)),
                Work::Pin { frame, .. } | Work::Fetch { frame, .. } | Work::Relocate { frame, .. } => {
                    Some((frame, writable))
                }
                _ => None,
            },
        }
    }
}
