// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is to happen in a model, and what is left out.

/// Pages of virtual memory of a process, at most.
pub const PAGES: usize = 2;
/// Processes, at most.
pub const PROCESSES: usize = 2;
/// Contexts, at most.
pub const CONTEXTS: usize = 2;
/// Rings, at most.
pub const RINGS: usize = 2;
/// Page frames of the system.
pub const FRAMES: usize = 4;
/// Device-private pages that can stand in for one.
pub const STAND_INS: usize = 3;
/// Threads of processes and of the kernel, at most.
pub const THREADS: usize = 4;

/// What a thread does next. A number is the index of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// An atomic increment.
    Add(u8),
    /// `madvise(MADV_DONTNEED)`: the page goes, under the read lock, and an access brings a new one.
    Discard(u8),
    /// `munmap`.
    Unmap(u8),
    /// `mremap`: from the one to the other.
    Move(u8, u8),
    /// `fork`: process 1 comes into being as a copy of this one.
    Fork,
    /// The kernel moves the page to another frame (compaction), on nobody's behalf.
    Relocate(u8),
    /// The process gives up its memory, when all its other threads are done.
    Exit,
    /// The driver moves the page to VRAM on behalf of a context, because the program asks for that: context, page.
    Prefetch(u8, u8),
    /// A file is closed: the address space of that context ends.
    Close(u8),
}

/// A kind of access of the GPU. Each includes those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Load, add one, store.
    Atomic,
}

/// How the GPU gets a page to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mechanism {
    /// The page is pinned in place and represented by a device-private page.
    Pin,
    /// `make_device_exclusive()`.
    Exclusive,
}

/// A thread.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Of which process.
    pub process: u8,
    /// What it does.
    pub program: Vec<Operation>,
}

/// An address space on a device.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Whose memory it is.
    pub process: u8,
    /// On which device.
    pub device: u8,
    /// How it gets pages to itself.
    pub mechanism: Mechanism,
}

/// A ring, with work of one context.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Whose work it is.
    pub context: u8,
    /// What it does.
    pub program: Vec<(Access, u8)>,
}

/// A step of the protocol that is left out or done at the wrong time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Omission {
    /// Nobody waits for the answer to INVALIDATE.
    InvalidateWait,
    /// INVALIDATE leaves the translation buffers as they are.
    InvalidateBuffers,
    /// INVALIDATE leaves the page table as it is.
    InvalidateTable,
    /// INVALIDATE waits for accesses that are stalled, too.
    InvalidateWaitsForStalled,
    /// The notifier does not tell the device of a change.
    Notifier,
    /// The migration is finished before MAP and REPLAY are sent.
    FinishBeforeReplay,
    /// Nobody waits for the answer to REPLAY.
    ReplayWait,
    /// REPLAY is not sent.
    Replay,
    /// A fault that cannot be resolved is not cancelled.
    Cancel,
    /// A mapping is made without a look at the kernel's sequence number.
    SequenceCheck,
    /// A mapping is made without a look at the number of revocations.
    RevocationCount,
    /// The driver hears of its own migrations like of anybody else's.
    OwnerException,
    /// Migrations are done in the name of the device, not of the address space.
    OwnerOfAddressSpace,
    /// The GPU's mapping is revoked when the page has been given back.
    RevokeBeforeGiveBack,
    /// The GPU's mapping is not revoked at all.
    Revoke,
    /// Where the page is mapped is looked up before it is taken out of the table, rather than with that.
    TakeBeforeRevoke,
    /// A mapping of the GPU's is not revoked before the page is copied to VRAM.
    RevokeBeforeCopy,
    /// A page that is given back stays in the table.
    Take,
    /// A stand-in that the GPU finds at another address is mapped there, and the table is not told.
    Update,
    /// A stand-in is mapped in a context that has not pinned it.
    ContextCheck,
    /// A stand-in is mapped for writing though the process may not write there.
    WritableCheck,
    /// A stand-in is freed, and the page that it stands for is not.
    FreeSource,
    /// A page that could not be given back is forgotten.
    PutBack,
    /// Whoever frees memory does not wait until a lost device has been reset.
    LossWait,
    /// The rest of closing does not wait until the device has forgotten the context.
    CloseDestroy,
    /// Closing does not wait for pages that are on their way home.
    CloseLeaving,
    /// The lock of an exclusive page is dropped before REPLAY.
    ExclusiveLock,
    /// Two rings can be in the middle of an atomic operation on the same page of the system.
    AtomicUnit,
    /// A handler that was too late tries again at once.
    Pause,
}

/// What is to happen.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// Threads; the first ones are of processes, those that only relocate belong to the kernel.
    pub threads: Vec<Thread>,
    /// Contexts.
    pub contexts: Vec<Context>,
    /// Rings.
    pub rings: Vec<Ring>,
    /// The device can be lost at any time.
    pub loss: bool,
    /// How many times a migration home may fail.
    pub failures: u8,
    /// The pages share a notifier.
    pub shared_window: bool,
    /// Page 1 exists from the beginning.
    pub two_pages: bool,
    /// A handler that was too late tries again only when the others have got as far as they can: what its growing
    /// pauses come to after a few attempts.
    pub patient: bool,
    /// Pinning does not mind revocations that came before the page was unmapped and locked, as in the driver
    /// (`Sequence::forget_revocations`).
    pub fresh_revocations: bool,
    /// What is left out.
    pub omission: Option<Omission>,
}

impl Scenario {
    /// A scenario in which one process uses one page together with one context, by pinning; nothing happens yet.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let context = Context {
            process: 0,
            device: 0,
            mechanism: Mechanism::Pin,
        };
        Self {
            name,
            threads: Vec::new(),
            contexts: vec![context],
            rings: Vec::new(),
            loss: false,
            failures: 0,
            shared_window: false,
            two_pages: false,
            patient: false,
            fresh_revocations: false,
            omission: None,
        }
    }

    /// With another thread.
    #[must_use]
    pub fn thread(mut self, process: u8, program: &[Operation]) -> Self {
        let program = program.to_vec();
        self.threads.push(Thread { process, program });
        self
    }

    /// With another ring.
    #[must_use]
    pub fn ring(mut self, context: u8, program: &[(Access, u8)]) -> Self {
        let program = program.to_vec();
        self.rings.push(Ring { context, program });
        self
    }

    /// With another context.
    #[must_use]
    pub fn context(mut self, process: u8, device: u8) -> Self {
        let mechanism = self.contexts[0].mechanism;
        self.contexts.push(Context {
            process,
            device,
            mechanism,
        });
        self
    }

    /// With all contexts using that mechanism.
    #[must_use]
    pub fn mechanism(mut self, mechanism: Mechanism) -> Self {
        for context in &mut self.contexts {
            context.mechanism = mechanism;
        }
        self
    }

    /// With a device that can be lost.
    #[must_use]
    pub fn loss(mut self) -> Self {
        self.loss = true;
        self
    }

    /// With migrations home that can fail that many times.
    #[must_use]
    pub fn failures(mut self, failures: u8) -> Self {
        self.failures = failures;
        self
    }

    /// With both pages in one window.
    #[must_use]
    pub fn shared_window(mut self) -> Self {
        self.shared_window = true;
        self
    }

    /// With both pages there from the beginning.
    #[must_use]
    pub fn two_pages(mut self) -> Self {
        self.two_pages = true;
        self
    }

    /// With handlers that leave time to the threads when they have been too late.
    #[must_use]
    pub fn patient(mut self) -> Self {
        self.patient = true;
        self
    }

    /// With pinning that does not mind earlier revocations.
    #[must_use]
    pub fn fresh_revocations(mut self) -> Self {
        self.fresh_revocations = true;
        self
    }

    /// The same without that step.
    #[must_use]
    pub fn without(mut self, omission: Omission) -> Self {
        self.omission = Some(omission);
        self
    }
}
