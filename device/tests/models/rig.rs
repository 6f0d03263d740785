// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device, all of it but the transport, and what is around it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pinion_abi::{self as abi, PAGE_SIZE};
use pinion_device::gpu::event::EventLog;
use pinion_device::gpu::inject::Injector;
use pinion_device::gpu::memory::{PlainMemory, SystemMemory};
use pinion_device::gpu::sabotage::sabotage;
use pinion_device::gpu::{Answer, Gpu, Host, Settings, vram};
use pinion_device::sync::{Arc, Condvar, Mutex, point};
use vm_memory::{VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

pub(crate) const OK: u32 = abi::STATUS_OK;
pub(crate) const RW: u64 = abi::PTE_VALID | abi::PTE_READ | abi::PTE_WRITE;
pub(crate) const ALL: u64 = RW | abi::PTE_ATOMIC;
pub(crate) const VRAM: u64 = ALL | abi::PTE_VRAM;
/// The context that most models use, and an address in it.
pub(crate) const CONTEXT: u32 = 7;
pub(crate) const VA: u64 = 0x1234_5000_0000;
/// System memory.
const FRAMES: usize = 4;

/// System memory that knows which of its pages the engines may not touch.
pub(crate) struct ModelMemory {
    bytes: PlainMemory,
    /// What the processor does goes past the checker, so that a model does not grow by it.
    revoked: [AtomicBool; FRAMES],
    accesses: [AtomicU64; FRAMES],
}

impl ModelMemory {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: PlainMemory::new(FRAMES * PAGE_SIZE as usize).expect("memory"),
            revoked: Default::default(),
            accesses: Default::default(),
        })
    }

    /// From now on no engine may touch the page; the promise has been made.
    pub(crate) fn revoke(&self, frame: usize) {
        self.revoked[frame].store(true, Ordering::SeqCst);
    }

    pub(crate) fn revoke_all(&self) {
        (0..FRAMES).for_each(|frame| self.revoke(frame));
    }

    /// Engines may touch it again.
    pub(crate) fn grant(&self, frame: usize) {
        self.revoked[frame].store(false, Ordering::SeqCst);
    }

    pub(crate) fn grant_all(&self) {
        (0..FRAMES).for_each(|frame| self.grant(frame));
    }

    /// How often engines went for the page.
    pub(crate) fn accesses(&self, frame: usize) -> u64 {
        self.accesses[frame].load(Ordering::SeqCst)
    }

    fn word(&self, frame: usize, index: usize) -> VolatileSlice<'_> {
        let address = frame as u64 * PAGE_SIZE + index as u64 * 8;
        self.bytes.slice(address, 8).expect("memory")
    }

    /// The processor loads a word of a page.
    pub(crate) fn load(&self, frame: usize, index: usize) -> u64 {
        let word = self.word(frame, index);
        let word = word.get_atomic_ref::<AtomicU64>(0).expect("a word");
        word.load(Ordering::SeqCst)
    }

    /// The processor stores one.
    pub(crate) fn store(&self, frame: usize, index: usize, value: u64) {
        let word = self.word(frame, index);
        let word = word.get_atomic_ref::<AtomicU64>(0).expect("a word");
        word.store(value, Ordering::SeqCst);
    }

    /// The processor adds one, as slowly as it can.
    pub(crate) fn increment(&self, frame: usize, index: usize) {
        let value = self.load(frame, index);
        point();
        self.store(frame, index, value + 1);
    }
}

impl SystemMemory for ModelMemory {
    fn slice(&self, address: u64, length: usize) -> Option<VolatileSlice<'_>> {
        let slice = self.bytes.slice(address, length)?;
        let frame = (address / PAGE_SIZE) as usize;
        // Between the translation and the access is when one would have to be there for the promise to be broken.
        point();
        let revoked = self.revoked[frame].load(Ordering::SeqCst);
        assert!(!revoked, "an access went to a page that was taken away");
        self.accesses[frame].fetch_add(1, Ordering::SeqCst);
        Some(slice)
    }
}

/// The driver's side of a ring.
#[derive(Default)]
struct Ring {
    waiting: VecDeque<(u64, Vec<u8>)>,
    taken: u64,
    /// The device does not want to hear of submissions.
    quiet: bool,
    /// Completions that the driver was not told of yet.
    silent: Vec<abi::Completion>,
}

/// What has come out of the device.
#[derive(Default)]
pub(crate) struct Outcome {
    rings: Vec<Ring>,
    /// By ring, in the order in which they came.
    pub(crate) completions: Vec<(u16, abi::Completion)>,
    /// Tickets of REPLAYs, and how many accesses got through.
    pub(crate) replayed: Vec<(u64, u64)>,
    /// How often the driver was told that there are events.
    pub(crate) bells: u64,
}

impl Outcome {
    /// The completion of a submission.
    pub(crate) fn completion(&self, sequence: u64) -> Option<abi::Completion> {
        let mut found = self
            .completions
            .iter()
            .filter(|(_, completion)| completion.sequence == sequence);
        let first = found.next().map(|(_, completion)| *completion);
        assert!(found.next().is_none(), "submission {sequence} completed twice");
        first
    }

    /// The answer to a REPLAY.
    pub(crate) fn answer(&self, ticket: u64) -> Option<u64> {
        let mut found = self.replayed.iter().filter(|(of, _)| *of == ticket);
        let first = found.next().map(|(_, through)| *through);
        assert!(found.next().is_none(), "REPLAY {ticket} was answered twice");
        first
    }
}

/// A host whose driver sleeps until it is told that there is something to see.
pub(crate) struct ModelHost {
    outcome: Mutex<Outcome>,
    told: Condvar,
}

impl ModelHost {
    fn tell(&self, what: impl FnOnce(&mut Outcome)) {
        what(&mut self.outcome.lock());
        self.told.notify_all();
    }

    /// Sleeps until `what` is there.
    pub(crate) fn wait<R>(&self, mut what: impl FnMut(&Outcome) -> Option<R>) -> R {
        let mut outcome = self.outcome.lock();
        loop {
            if let Some(result) = what(&outcome) {
                return result;
            }
            self.told.wait(&mut outcome);
        }
    }

    /// Looks without sleeping.
    pub(crate) fn look<R>(&self, what: impl FnOnce(&Outcome) -> R) -> R {
        what(&self.outcome.lock())
    }
}

impl Host for ModelHost {
    type Ticket = u64;

    fn next(&self, ring: u16, bytes: &mut Vec<u8>) -> Option<(u64, u64)> {
        let mut outcome = self.outcome.lock();
        let ring = &mut outcome.rings[usize::from(ring)];
        let (ticket, work) = ring.waiting.pop_front()?;
        bytes.extend_from_slice(&work);
        ring.taken += 1;
        Some((ticket, ring.taken - 1))
    }

    fn position(&self, ring: u16) -> u64 {
        let outcome = self.outcome.lock();
        let ring = &outcome.rings[usize::from(ring)];
        ring.taken + ring.waiting.len() as u64
    }

    fn busy(&self, ring: u16) {
        self.outcome.lock().rings[usize::from(ring)].quiet = true;
    }

    fn idle(&self, ring: u16) -> bool {
        self.announce(ring);
        let mut outcome = self.outcome.lock();
        let ring = &mut outcome.rings[usize::from(ring)];
        ring.quiet = false;
        !ring.waiting.is_empty()
    }

    fn complete(&self, ring: u16, ticket: u64, completion: abi::Completion) {
        assert_eq!(ticket, completion.sequence);
        let mut outcome = self.outcome.lock();
        outcome.rings[usize::from(ring)].silent.push(completion);
    }

    fn announce(&self, ring: u16) {
        self.tell(|outcome| {
            let new = std::mem::take(&mut outcome.rings[usize::from(ring)].silent);
            outcome
                .completions
                .extend(new.into_iter().map(|completion| (ring, completion)));
        });
    }

    fn replayed(&self, ticket: u64, through: u64) {
        self.tell(|outcome| outcome.replayed.push((ticket, through)));
    }

    fn events(&self) {
        self.tell(|outcome| outcome.bells += 1);
    }
}

/// A device. After a failure it is left as it is: its engines do not run any more.
struct Device(Option<Gpu<ModelHost>>);

impl Drop for Device {
    fn drop(&mut self) {
        let gpu = self.0.take();
        if std::thread::panicking() {
            std::mem::forget(gpu);
        }
    }
}

/// A device and what is around it.
pub(crate) struct Rig {
    device: Device,
    pub(crate) host: Arc<ModelHost>,
    pub(crate) log: Arc<EventLog>,
    pub(crate) memory: Arc<ModelMemory>,
}

impl Rig {
    /// So many rings, so many engines; with [`CONTEXT`].
    pub(crate) fn new(rings: u16, engines: u16) -> Arc<Self> {
        Self::with(rings, engines, None)
    }

    /// With a defect that the program itself can be given.
    pub(crate) fn with(rings: u16, engines: u16, defect: Option<&str>) -> Arc<Self> {
        let outcome = Outcome {
            rings: (0..rings).map(|_| Ring::default()).collect(),
            ..Outcome::default()
        };
        let host = Arc::new(ModelHost {
            outcome: Mutex::new(outcome),
            told: Condvar::default(),
        });
        let log = Arc::new(EventLog::default());
        let settings = Settings {
            vram: vram::MIN_SIZE,
            rings,
            engines,
            ..Settings::default()
        };
        let defects: Vec<_> = defect
            .iter()
            .map(|text| text.parse().expect("a defect"))
            .collect();
        let injector = Arc::new(Injector::new(&defects));
        // Promises are kept until the model begins.
        let chosen = sabotage(None);
        let gpu = Gpu::start(&settings, host.clone(), log.clone(), injector).expect("a device");
        let memory = ModelMemory::new();
        gpu.set_memory(memory.clone());
        let rig = Self {
            device: Device(Some(gpu)),
            host,
            log,
            memory,
        };
        rig.simple(abi::REQUEST_CONTEXT_CREATE, CONTEXT);
        sabotage(chosen);
        Arc::new(rig)
    }

    pub(crate) fn gpu(&self) -> &Gpu<ModelHost> {
        self.device.0.as_ref().expect("a device until it is dropped")
    }

    fn request(&self, request: &[u8]) -> abi::Response {
        match self.gpu().control(request, 0) {
            Answer::Now(_, response) => response,
            Answer::Later => panic!("this is answered later"),
        }
    }

    /// A request that has to go well.
    pub(crate) fn simple(&self, opcode: u16, context: u32) {
        let header = header(opcode, 0, context);
        assert_eq!(self.request(header.as_bytes()).status, OK);
    }

    /// MAP.
    pub(crate) fn map(&self, context: u32, va: u64, entry: u64) {
        let map = abi::MapRequest {
            header: header(abi::REQUEST_MAP, 0, context),
            va,
            count: 1,
            reserved: 0,
        };
        let response = self.request(&[map.as_bytes(), entry.as_bytes()].concat());
        assert_eq!(response.status, OK);
    }

    /// INVALIDATE.
    pub(crate) fn invalidate(&self, va: u64, length: u64, flags: u16) {
        let context = if flags == abi::INVALIDATE_EVERYTHING {
            0
        } else {
            CONTEXT
        };
        let request = abi::InvalidateRequest {
            header: header(abi::REQUEST_INVALIDATE, flags, context),
            va,
            length,
        };
        assert_eq!(self.gpu().invalidate(request.as_bytes()).status, OK);
    }

    /// CANCEL. Says the status.
    pub(crate) fn cancel(&self, context: u32, fault: u64) -> u32 {
        let header = header(abi::REQUEST_CANCEL, 0, context);
        self.request(abi::FaultRequest { header, fault }.as_bytes())
            .status
    }

    /// Begins a REPLAY. False: there is no such fault any more.
    pub(crate) fn begin_replay(&self, context: u32, fault: u64, ticket: u64) -> bool {
        let header = header(abi::REQUEST_REPLAY, 0, context);
        let request = abi::FaultRequest { header, fault };
        match self.gpu().control(request.as_bytes(), ticket) {
            Answer::Later => true,
            Answer::Now(_, response) => {
                assert_eq!(response.status, abi::STATUS_NO_FAULT);
                false
            }
        }
    }

    /// A REPLAY from beginning to end; how many got through.
    pub(crate) fn replay(&self, context: u32, fault: u64) -> Option<u64> {
        // The number of a fault is never used twice.
        self.begin_replay(context, fault, fault)
            .then(|| self.host.wait(|outcome| outcome.answer(fault)))
    }

    /// How far a ring says that it is.
    pub(crate) fn timeline(&self, ring: u16) -> u64 {
        let query = abi::QueryRequest {
            header: header(abi::REQUEST_QUERY, 0, 0),
            what: abi::QUERY_TIMELINE,
            index: ring.into(),
            va: 0,
        };
        self.request(query.as_bytes()).value
    }

    /// Why a context is in error.
    pub(crate) fn status(&self, context: u32) -> u32 {
        let query = abi::QueryRequest {
            header: header(abi::REQUEST_QUERY, 0, context),
            what: abi::QUERY_CONTEXT,
            index: 0,
            va: 0,
        };
        let response = self.request(query.as_bytes());
        assert_eq!(response.status, OK);
        response.value as u32
    }

    /// Submits work, and rings if the device wants to hear of it.
    pub(crate) fn submit(&self, ring: u16, sequence: u64, commands: &[abi::Command]) {
        if self.enqueue(ring, sequence, commands) {
            self.gpu().doorbell(ring);
        }
    }

    /// Submits work, and attends to it if the device wants to hear of it.
    pub(crate) fn submit_attended(&self, ring: u16, sequence: u64, commands: &[abi::Command]) {
        if self.enqueue(ring, sequence, commands) {
            self.gpu().attend(ring);
        }
    }

    /// Says whether the device wants to hear of it.
    fn enqueue(&self, ring: u16, sequence: u64, commands: &[abi::Command]) -> bool {
        let header = abi::SubmitHeader {
            context: CONTEXT,
            count: commands.len() as u32,
            sequence,
            flags: 0,
            reserved: 0,
        };
        let bytes = [header.as_bytes(), commands.as_bytes()].concat();
        let mut outcome = self.host.outcome.lock();
        let ring = &mut outcome.rings[usize::from(ring)];
        ring.waiting.push_back((sequence, bytes));
        !ring.quiet
    }

    /// Sleeps until a submission has completed.
    pub(crate) fn completion(&self, sequence: u64) -> abi::Completion {
        self.host.wait(|outcome| outcome.completion(sequence))
    }

    /// Sleeps until there is an event, or until none is needed any more.
    pub(crate) fn event_unless(&self, enough: impl Fn(&Outcome) -> bool) -> Option<abi::EventRecord> {
        let mut bells = 0;
        loop {
            if let Some(record) = self.log.take() {
                return Some(record);
            }
            let over = self.host.wait(|outcome| {
                let over = enough(outcome);
                let news = outcome.bells > bells;
                bells = outcome.bells;
                (over || news).then_some(over)
            });
            if over {
                return None;
            }
        }
    }

    /// Sleeps until something is so that the driver is told of when it changes.
    pub(crate) fn when_told(&self, so: impl Fn() -> bool) {
        loop {
            let bells = self.host.look(|outcome| outcome.bells);
            if so() {
                return;
            }
            self.host.wait(|outcome| (outcome.bells > bells).then_some(()));
        }
    }

    /// How many rings are stalled on a fault.
    pub(crate) fn stalled(&self, fault: u64) -> usize {
        let state = self.gpu().state();
        let found = state.faults.iter().find(|known| known.fault == fault);
        found.map_or(0, |found| found.stalled)
    }

    /// Sleeps until there is an event.
    pub(crate) fn event(&self) -> abi::EventRecord {
        self.event_unless(|_| false).expect("it waits without end")
    }

    /// Repairs faults with what `entry` says until all these submissions have completed. After each REPLAY, `meddle`.
    pub(crate) fn repair(
        &self,
        sequences: &[u64],
        mut entry: impl FnMut(u64) -> u64,
        mut meddle: impl FnMut(&abi::EventRecord, u64),
    ) {
        let all = |outcome: &Outcome| {
            sequences
                .iter()
                .all(|&sequence| outcome.completion(sequence).is_some())
        };
        while let Some(record) = self.event_unless(all) {
            assert_eq!(record.kind, abi::EVENT_FAULT, "{record:?}");
            let page = record.va & !(PAGE_SIZE - 1);
            self.map(record.context, page, entry(page));
            let through = self.replay(record.context, record.fault);
            meddle(&record, through.expect("only we end faults"));
        }
    }
}

fn header(opcode: u16, flags: u16, context: u32) -> abi::RequestHeader {
    abi::RequestHeader {
        opcode,
        flags,
        context,
    }
}

/// `repeat` times one is added to word `index` of the page at `va`, by a load and a store.
pub(crate) fn increments(va: u64, index: u64, repeat: u32) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_ATOMIC,
        operation: abi::ATOMIC_ADD,
        width: 8,
        repeat,
        address: va + index * 8,
        operand: 1,
        ..Default::default()
    }
}

/// Stores `value` in word `index` of the page at `va`.
pub(crate) fn fill(va: u64, index: u64, value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_FILL,
        width: 8,
        address: va + index * 8,
        length: 8,
        operand: value,
        ..Default::default()
    }
}

/// Copies one word.
pub(crate) fn copy(from: u64, to: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_COPY,
        address: to,
        source: from,
        length: 8,
        ..Default::default()
    }
}
