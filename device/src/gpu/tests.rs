// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The core as a whole, against plain memory: no queue, no socket, no guest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pinion_abi::{self as abi, PAGE_SIZE, VA_END};
use vm_memory::{Bytes, VolatileMemory};
use zerocopy::IntoBytes;

use super::event::EventLog;
use super::memory::{PlainMemory, SystemMemory};
use super::*;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
const VRAM: u64 = 4 << 20;
const MEMORY: u64 = 4 << 20;
const VA: u64 = 0x1234_5000_0000;
const OK: u32 = abi::STATUS_OK;
const RW: u64 = abi::PTE_VALID | abi::PTE_READ | abi::PTE_WRITE;
const ALL: u64 = RW | abi::PTE_ATOMIC;

/// The submissions of a ring, and how many were taken before.
#[derive(Default)]
struct Work {
    waiting: VecDeque<(u64, Vec<u8>)>,
    taken: u64,
}

/// Work waits in queues, answers go into channels.
struct TestHost {
    rings: Vec<Mutex<Work>>,
    completions: Sender<(u16, u64, abi::Completion)>,
    replays: Sender<(u64, u64)>,
    events: Sender<()>,
}

impl Host for TestHost {
    type Ticket = u64;

    fn next(&self, ring: u16, bytes: &mut Vec<u8>) -> Option<(u64, u64)> {
        let mut ring = self.rings[usize::from(ring)].lock();
        let (ticket, work) = ring.waiting.pop_front()?;
        bytes.extend_from_slice(&work);
        ring.taken += 1;
        Some((ticket, ring.taken - 1))
    }
    fn position(&self, ring: u16) -> u64 {
        let ring = self.rings[usize::from(ring)].lock();
        ring.taken + ring.waiting.len() as u64
    }
    fn busy(&self, _ring: u16) {}
    fn idle(&self, ring: u16) -> bool {
        !self.rings[usize::from(ring)].lock().waiting.is_empty()
    }
    // A test that has seen enough no longer listens.
    fn complete(&self, ring: u16, ticket: u64, completion: abi::Completion) {
        let _ = self.completions.send((ring, ticket, completion));
    }
    fn announce(&self, _ring: u16) {}
    fn replayed(&self, ticket: u64, through: u64) {
        let _ = self.replays.send((ticket, through));
    }
    fn events(&self) {
        let _ = self.events.send(());
    }
}

/// A device, and what comes out of it.
struct Rig {
    gpu: Gpu<TestHost>,
    host: Arc<TestHost>,
    log: Arc<EventLog>,
    memory: Arc<PlainMemory>,
    completions: Receiver<(u16, u64, abi::Completion)>,
    replays: Receiver<(u64, u64)>,
    events: Receiver<()>,
    tickets: u64,
}

impl Rig {
    fn new(rings: u16) -> Self {
        Self::with(rings, &[])
    }

    fn with(rings: u16, inject: &[&str]) -> Self {
        let (completions_in, completions) = channel();
        let (replays_in, replays) = channel();
        let (events_in, events) = channel();
        let host = Arc::new(TestHost {
            rings: (0..rings).map(|_| Mutex::default()).collect(),
            completions: completions_in,
            replays: replays_in,
            events: events_in,
        });
        let log = Arc::new(EventLog::default());
        let settings = Settings {
            vram: VRAM,
            rings,
            engines: rings,
            ..Settings::default()
        };
        let inject: Vec<_> = inject.iter().map(|text| text.parse().unwrap()).collect();
        let injector = Arc::new(Injector::new(&inject));
        let gpu = Gpu::start(&settings, host.clone(), log.clone(), injector).unwrap();
        let memory = Arc::new(PlainMemory::new(MEMORY as usize).unwrap());
        gpu.set_memory(memory.clone());
        Self {
            gpu,
            host,
            log,
            memory,
            completions,
            replays,
            events,
            tickets: 0,
        }
    }

    fn control(&mut self, request: &[u8]) -> u32 {
        match self.gpu.control(request, 0) {
            Answer::Now(_, response) => response.status,
            Answer::Later => panic!("this is answered later"),
        }
    }

    fn simple(&mut self, opcode: u16, context: u32) -> u32 {
        self.control(
            abi::RequestHeader {
                opcode,
                flags: 0,
                context,
            }
            .as_bytes(),
        )
    }

    fn create(&mut self, context: u32) {
        assert_eq!(self.simple(abi::REQUEST_CONTEXT_CREATE, context), OK);
    }

    fn map(&mut self, context: u32, va: u64, entries: &[u64]) {
        let header = abi::RequestHeader {
            opcode: abi::REQUEST_MAP,
            flags: 0,
            context,
        };
        let map = abi::MapRequest {
            header,
            va,
            count: entries.len() as u32,
            reserved: 0,
        };
        assert_eq!(self.control(&[map.as_bytes(), entries.as_bytes()].concat()), OK);
    }

    fn replay_begin(&mut self, context: u32, fault: u64, ticket: u64) -> Result<(), u32> {
        let header = abi::RequestHeader {
            opcode: abi::REQUEST_REPLAY,
            flags: 0,
            context,
        };
        match self
            .gpu
            .control(abi::FaultRequest { header, fault }.as_bytes(), ticket)
        {
            Answer::Later => Ok(()),
            Answer::Now(_, response) => Err(response.status),
        }
    }

    fn replay_end(&mut self) -> (u64, u64) {
        self.replays.recv_timeout(PATIENCE).expect("REPLAY to complete")
    }

    fn replay(&mut self, context: u32, fault: u64) -> Result<u64, u32> {
        self.replay_begin(context, fault, 99)?;
        Ok(self.replay_end().1)
    }

    fn cancel(&mut self, context: u32, fault: u64) -> u32 {
        let header = abi::RequestHeader {
            opcode: abi::REQUEST_CANCEL,
            flags: 0,
            context,
        };
        self.control(abi::FaultRequest { header, fault }.as_bytes())
    }

    fn invalidate(&self, context: u32, va: u64, length: u64, flags: u16) {
        let header = abi::RequestHeader {
            opcode: abi::REQUEST_INVALIDATE,
            flags,
            context,
        };
        let response = self
            .gpu
            .invalidate(abi::InvalidateRequest { header, va, length }.as_bytes());
        assert_eq!(response.status, OK);
    }

    fn submit(&mut self, ring: u16, context: u32, commands: &[abi::Command]) -> u64 {
        self.tickets += 1;
        let sequence = self.tickets;
        let count = commands.len() as u32;
        let header = abi::SubmitHeader {
            context,
            count,
            sequence,
            flags: 0,
            reserved: 0,
        };
        let bytes = [header.as_bytes(), commands.as_bytes()].concat();
        self.submit_bytes(ring, sequence, bytes);
        sequence
    }

    fn submit_bytes(&self, ring: u16, sequence: u64, bytes: Vec<u8>) {
        self.host.rings[usize::from(ring)]
            .lock()
            .waiting
            .push_back((sequence, bytes));
        self.gpu.doorbell(ring);
    }

    fn completion(&mut self) -> abi::Completion {
        let (_, ticket, completion) = self.completions.recv_timeout(PATIENCE).expect("a completion");
        assert_eq!(ticket, completion.sequence);
        completion
    }

    fn run(&mut self, context: u32, commands: &[abi::Command]) -> abi::Completion {
        let sequence = self.submit(0, context, commands);
        let completion = self.completion();
        assert_eq!(completion.sequence, sequence);
        completion
    }

    /// Waits for an event.
    fn event(&mut self) -> abi::EventRecord {
        let start = Instant::now();
        loop {
            if let Some(record) = self.log.take() {
                return record;
            }
            let left = PATIENCE.saturating_sub(start.elapsed());
            self.events.recv_timeout(left).expect("an event");
        }
    }

    fn load(&self, address: u64) -> u64 {
        let slice = self.memory.slice(address, 8).unwrap();
        slice
            .get_atomic_ref::<std::sync::atomic::AtomicU64>(0)
            .unwrap()
            .load(Ordering::SeqCst)
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .slice(address, length)
            .unwrap()
            .read_slice(&mut bytes, 0)
            .unwrap();
        bytes
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .slice(address, bytes.len())
            .unwrap()
            .write_slice(bytes, 0)
            .unwrap();
    }

    /// Repairs faults with what `entry` says until a submission completes; between repairs, `meddle`.
    fn drive(
        &mut self,
        context: u32,
        mut entry: impl FnMut(u64) -> u64,
        mut meddle: impl FnMut(&mut Self),
    ) -> abi::Completion {
        let start = Instant::now();
        loop {
            if let Ok((_, _, completion)) = self.completions.try_recv() {
                return completion;
            }
            if let Some(record) = self.log.take() {
                assert_eq!(record.kind, abi::EVENT_FAULT, "{record:?}");
                let page = record.va & !(PAGE_SIZE - 1);
                let entry = entry(page);
                self.map(context, page, &[entry]);
                let through = self.replay(context, record.fault).unwrap();
                assert!(through <= 2);
            }
            meddle(self);
            assert!(
                start.elapsed() < PATIENCE,
                "waited {PATIENCE:?} for a submission that faults"
            );
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn increments(va: u64, repeat: u32) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_ATOMIC,
        operation: abi::ATOMIC_ADD,
        width: 8,
        repeat,
        address: va,
        operand: 1,
        ..Default::default()
    }
}

fn copy(destination: u64, source: u64, length: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_COPY,
        address: destination,
        source,
        length,
        ..Default::default()
    }
}

/// Pages in an order of their own, so that neighbours in virtual memory are none in system memory.
fn scattered(va: u64) -> u64 {
    let page = (va - VA) / PAGE_SIZE;
    (page * 7 % 64) * PAGE_SIZE
}

#[test]
fn commands_do_what_they_say() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL, ALL | PAGE_SIZE, ALL | abi::PTE_VRAM]);
    let fill = abi::Command {
        opcode: abi::COMMAND_FILL,
        width: 4,
        address: VA + 4092,
        length: 12,
        operand: 0xdead_beef,
        ..Default::default()
    };
    let exchange = abi::Command {
        operation: abi::ATOMIC_EXCHANGE,
        operand: 42,
        flags: abi::COMMAND_WRITE_BACK,
        source: VA + 16,
        ..increments(VA, 1)
    };
    let spread = abi::Command {
        width: 4,
        stride: 12,
        span: 3,
        ..increments(VA + 64, 7)
    };
    let done = rig.run(
        0,
        &[increments(VA, 5), exchange, fill, spread, abi::Command::default()],
    );
    assert_eq!((done.status, done.executed), (OK, 5));
    assert_eq!((rig.load(0), rig.load(16)), (42, 5));
    assert_eq!(
        rig.bytes(4088, 20)[4..16],
        0xdead_beef_u32.to_le_bytes().repeat(3)
    );
    let counts: Vec<u8> = (0..4).map(|n| rig.bytes(64 + 12 * n, 1)[0]).collect();
    assert_eq!(counts, [3, 2, 2, 0]);
    // Through VRAM and back.
    let done = rig.run(
        0,
        &[
            copy(VA + 2 * PAGE_SIZE + 1, VA, 8),
            copy(VA + 200, VA + 2 * PAGE_SIZE + 1, 8),
        ],
    );
    assert_eq!(done.status, OK);
    assert_eq!(rig.load(200), 42);
    // Nothing at all is fine too.
    assert_eq!(rig.run(0, &[copy(5, 7, 0)]).status, OK);
}

#[test]
fn rights_are_checked_one_by_one() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let valid = abi::PTE_VALID;
    let cases = [
        (copy(VA + 8, VA, 8), 0, abi::REASON_NOT_PRESENT, abi::ACCESS_READ),
        (
            copy(VA + 8, VA, 8),
            valid | abi::PTE_WRITE,
            abi::REASON_READ,
            abi::ACCESS_READ,
        ),
        (
            copy(VA + 8, VA, 8),
            valid | abi::PTE_READ,
            abi::REASON_WRITE,
            abi::ACCESS_WRITE,
        ),
        (increments(VA, 1), RW, abi::REASON_ATOMIC, 7),
        (
            increments(VA, 1),
            valid | abi::PTE_ATOMIC | abi::PTE_READ,
            abi::REASON_WRITE,
            7,
        ),
        (increments(VA, 1), valid | abi::PTE_ATOMIC, abi::REASON_READ, 7),
    ];
    for (command, entry, reason, access) in cases {
        rig.invalidate(0, 0, VA_END, abi::INVALIDATE_CLEAR);
        rig.map(0, VA, &[entry]);
        rig.submit(0, 0, &[command]);
        let fault = rig.event();
        assert_eq!((fault.reason, fault.access), (reason, access), "{command:?}");
        // More rights where there were some need no invalidation.
        rig.map(0, VA, &[ALL]);
        assert_eq!(rig.replay(0, fault.fault), Ok(1));
        assert_eq!(rig.completion().status, OK);
    }
}

#[test]
fn copies_are_as_if_read_before_the_first_store() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let mut random = Random(1);
    let pages = 24;
    let size = pages * PAGE_SIZE;
    for round in 0..150 {
        let mut model: Vec<u8> = (0..size).map(|_| random.below(256) as u8).collect();
        for page in 0..pages {
            let from = (page * PAGE_SIZE) as usize;
            rig.write(
                scattered(VA + page * PAGE_SIZE),
                &model[from..from + PAGE_SIZE as usize],
            );
        }
        let length =
            [random.below(100), random.below(9000), random.below(size / 2)][random.below(3) as usize];
        let source = random.below(size - length);
        let near = [1, 8, 4095, 4096, 4097][random.below(5) as usize];
        let destination = match random.below(3) {
            0 => (source + near).min(size - length),
            1 => source.saturating_sub(near),
            _ => random.below(size - length),
        };
        // All pages are taken away again and again, so every chunk is interrupted somewhere.
        rig.submit(0, 0, &[copy(VA + destination, VA + source, length)]);
        let meddle = |rig: &mut Rig| rig.invalidate(0, 0, VA_END, abi::INVALIDATE_CLEAR);
        let done = rig.drive(0, |page| RW | scattered(page), meddle);
        assert_eq!(done.status, OK);
        model.copy_within(source as usize..(source + length) as usize, destination as usize);
        for page in 0..pages {
            let from = (page * PAGE_SIZE) as usize;
            let found = rig.bytes(scattered(VA + page * PAGE_SIZE), PAGE_SIZE as usize);
            assert!(
                found == model[from..from + PAGE_SIZE as usize],
                "round {round}, page {page}: {length} bytes from {source} to {destination}"
            );
        }
    }
}

#[test]
fn interrupted_atomics_lose_nothing_and_do_nothing_twice() {
    let mut rig = Rig::new(1);
    rig.create(0);
    // Places in eight pages in turn, which come and go.
    let stride = PAGE_SIZE as u32 + 8;
    let command = abi::Command {
        stride,
        span: 8,
        flags: abi::COMMAND_WRITE_BACK,
        source: VA + 20 * PAGE_SIZE,
        ..increments(VA, 80_000)
    };
    rig.submit(0, 0, &[command]);
    let mut random = Random(7);
    let done = rig.drive(
        0,
        |page| ALL | scattered(page),
        |rig| {
            let page = random.below(21);
            rig.invalidate(0, VA + page * PAGE_SIZE, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        },
    );
    assert_eq!((done.status, done.executed), (OK, 1));
    for n in 0..8 {
        let va = VA + n * u64::from(stride);
        assert_eq!(
            rig.load(scattered(va & !0xfff) + (va & 0xfff)),
            10_000,
            "place {n}"
        );
    }
    assert_eq!(rig.load(scattered(VA + 20 * PAGE_SIZE)), 9_999);
}

#[test]
fn a_fill_that_is_interrupted() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let fill = abi::Command {
        opcode: abi::COMMAND_FILL,
        width: 8,
        address: VA + 8,
        length: 5 * PAGE_SIZE,
        operand: 0x0102_0304_0506_0708,
        ..Default::default()
    };
    rig.submit(0, 0, &[fill]);
    let meddle = |rig: &mut Rig| rig.invalidate(0, 0, VA_END, abi::INVALIDATE_CLEAR);
    assert_eq!(rig.drive(0, |page| RW | scattered(page), meddle).status, OK);
    for n in 0..=5 * PAGE_SIZE / 8 + 1 {
        let va = VA + 8 * n;
        let expect = if n == 0 || n == 5 * PAGE_SIZE / 8 + 1 {
            0
        } else {
            0x0102_0304_0506_0708
        };
        assert_eq!(rig.load(scattered(va & !0xfff) + (va & 0xfff)), expect, "{n}");
    }
}

/// Lets two rings stall on the same page, and waits until both do.
fn two_on_one_page(rig: &mut Rig) -> abi::EventRecord {
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 10)]);
    let mut fault = rig.event();
    rig.submit(1, 0, &[increments(VA + 8, 10)]);
    // The second joins without an event; replays without a repair show when it has.
    let start = Instant::now();
    loop {
        assert_eq!(rig.replay(0, fault.fault), Ok(0));
        let next = rig.event();
        assert!(next.fault > fault.fault);
        fault = next;
        let stalled = rig.gpu.shared.faults.stalled_on(fault.fault);
        if stalled == 2 && rig.log.is_empty() {
            return fault;
        }
        // One may have begun a fault of its own before the other joined it.
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for a second ring to join a fault"
        );
    }
}

#[test]
fn equal_faults_are_one() {
    let mut rig = Rig::new(2);
    let fault = two_on_one_page(&mut rig);
    rig.map(0, VA, &[ALL]);
    assert_eq!(rig.replay(0, fault.fault), Ok(2));
    assert_eq!(rig.completion().status, OK);
    assert_eq!(rig.completion().status, OK);
    assert_eq!((rig.load(0), rig.load(8)), (10, 10));
    assert!(rig.log.is_empty());
}

#[test]
fn other_pages_rights_and_contexts_are_other_faults() {
    let mut rig = Rig::new(4);
    rig.create(0);
    rig.create(1);
    rig.submit(0, 0, &[increments(VA, 1)]);
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.submit(2, 1, &[increments(VA, 1)]);
    rig.submit(3, 0, &[copy(VA, VA, 1)]);
    let faults: std::collections::HashSet<u64> = (0..4).map(|_| rig.event().fault).collect();
    assert_eq!(faults.len(), 4);
}

#[test]
fn cancel_ends_a_context_and_no_other() {
    let mut rig = Rig::new(3);
    rig.create(0);
    rig.create(1);
    rig.submit(0, 0, &[abi::Command::default(), increments(VA, 1)]);
    let cancelled = rig.event();
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.event();
    rig.submit(2, 1, &[increments(VA, 1)]);
    let other = rig.event();
    assert_eq!(rig.cancel(1, cancelled.fault), abi::STATUS_NO_FAULT);
    assert_eq!(rig.cancel(0, cancelled.fault + 100), abi::STATUS_NO_FAULT);
    assert_eq!(rig.cancel(0, cancelled.fault), OK);
    assert_eq!(rig.cancel(0, cancelled.fault), abi::STATUS_NO_FAULT);
    let mut ended = [rig.completion(), rig.completion()];
    ended.sort_by_key(|completion| completion.sequence);
    assert_eq!(
        (ended[0].status, ended[0].executed),
        (abi::STATUS_FAULT_CANCELLED, 1)
    );
    assert_eq!(ended[0].fault_va, VA);
    assert_eq!(
        (ended[1].status, ended[1].executed),
        (abi::STATUS_CONTEXT_ERROR, 0)
    );
    let event = rig.event();
    assert_eq!((event.kind, event.context), (abi::EVENT_CONTEXT_ERROR, 0));
    assert_eq!(
        (event.status, event.fault),
        (abi::STATUS_FAULT_CANCELLED, cancelled.fault)
    );
    assert_eq!(
        rig.run(0, &[abi::Command::default()]).status,
        abi::STATUS_CONTEXT_ERROR
    );
    rig.map(1, VA, &[ALL]);
    assert_eq!(rig.replay(1, other.fault), Ok(1));
    assert_eq!(rig.completion().status, OK);
    // Made anew it works again.
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
    rig.create(0);
    assert_eq!(rig.run(0, &[abi::Command::default()]).status, OK);
}

#[test]
fn whatever_ends_a_stall_completes_its_replay() {
    // The device is stopped, so the retry waits; then the context goes.
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.event();
    rig.map(0, VA, &[ALL]);
    rig.gpu.pause();
    rig.replay_begin(0, fault.fault, 5).unwrap();
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
    assert_eq!(rig.replay_end(), (5, 0));
    assert_eq!(rig.completion().status, abi::STATUS_NO_CONTEXT);
    assert_eq!(rig.load(0), 0);

    // It hits a bus error.
    rig.gpu.resume();
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.event();
    rig.map(0, VA, &[ALL | MEMORY]);
    assert_eq!(rig.replay(0, fault.fault), Ok(0));
    let done = rig.completion();
    assert_eq!((done.status, done.fault_va), (abi::STATUS_BUS_ERROR, VA));
    assert_eq!(rig.event().kind, abi::EVENT_CONTEXT_ERROR);
}

#[test]
fn a_replayed_access_makes_progress_even_if_the_page_is_taken_at_once() {
    let mut rig = Rig::new(1);
    rig.create(0);
    let mut faults = 0_u64;
    // Two pages that are never there at the same time.
    rig.submit(0, 0, &[copy(VA, VA + PAGE_SIZE, PAGE_SIZE), increments(VA, 200)]);
    let done = loop {
        if let Ok((_, _, completion)) = rig.completions.try_recv() {
            break completion;
        }
        let Some(record) = rig.log.take() else { continue };
        let page = record.va & !(PAGE_SIZE - 1);
        rig.map(0, page, &[ALL | scattered(page)]);
        assert_eq!(rig.replay(0, record.fault), Ok(1), "{record:?}");
        rig.invalidate(0, page, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        faults += 1;
        assert!(faults < 1000);
    };
    assert_eq!(done.status, OK);
    assert_eq!(rig.load(scattered(VA)), 200);
}

/// Engines hammer a page that is taken from them again and again, and get another one. Whether each
/// time, once INVALIDATE had completed, nothing changed in either any more.
fn promise_is_kept(inject: &[&str]) -> bool {
    const RINGS: u16 = 2;
    const TURNS: u32 = 100;
    let mut rig = Rig::with(RINGS, inject);
    rig.create(0);
    for ring in 0..RINGS {
        rig.submit(ring, 0, &[increments(VA + 8 * u64::from(ring), u32::MAX)]);
    }
    let moves = |rig: &Rig| {
        [0, 8, PAGE_SIZE, PAGE_SIZE + 8]
            .iter()
            .fold(0, |sum: u64, &place| sum.wrapping_add(rig.load(place)))
    };
    let start = Instant::now();
    for turn in 0..TURNS {
        let before = moves(&rig);
        rig.map(0, VA, &[ALL | (u64::from(turn & 1) * PAGE_SIZE)]);
        while moves(&rig) == before {
            while let Some(record) = rig.log.take() {
                rig.replay(0, record.fault).unwrap();
            }
            // An event, or a moment for the engines.
            let _ = rig.events.recv_timeout(Duration::from_millis(1));
            assert!(
                start.elapsed() < PATIENCE,
                "waited {PATIENCE:?} for {TURNS} turns, saw {turn}"
            );
        }
        rig.invalidate(0, VA, PAGE_SIZE, abi::INVALIDATE_CLEAR);
        let taken = moves(&rig);
        // Look for a while, and out of the engines' way: on a busy machine they get no processor as long
        // as this thread keeps its own.
        for _ in 0..200 {
            if moves(&rig) != taken {
                return false;
            }
        }
        for _ in 0..3 {
            std::thread::sleep(Duration::from_micros(300));
            if moves(&rig) != taken {
                return false;
            }
        }
    }
    true
}

#[test]
fn the_invalidation_promise_is_kept() {
    assert!(promise_is_kept(&[]));
}

#[test]
fn the_test_of_the_promise_can_fail() {
    assert!(!promise_is_kept(&["stale-tlb"]));
}

#[test]
fn invalidations_and_engines_do_not_starve_each_other() {
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    let start = Instant::now();
    while rig.load(0) == 0 {
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for the engine to begin"
        );
    }
    // Without a pause between them. The gate is fair: an engine that has waited long enough to sleep is
    // handed it, and the invalidator waits for one chunk.
    let (mut invalidations, mut advanced) = (0, 0);
    let mut last = rig.load(0);
    while invalidations < 2000 || advanced < 100 {
        rig.invalidate(0, VA, PAGE_SIZE, 0);
        invalidations += 1;
        let now = rig.load(0);
        advanced += u32::from(now != last);
        last = now;
        assert!(
            start.elapsed() < PATIENCE,
            "in {PATIENCE:?}, {invalidations} invalidations and {advanced} advances of the engine"
        );
    }
}

#[test]
fn nothing_moves_after_destroy_pause_or_reset() {
    let mut rig = Rig::new(1);
    for (name, stop) in [
        ("pause", (|rig| rig.gpu.pause()) as fn(&mut Rig)),
        ("destroy", |rig| {
            assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK)
        }),
        ("reset", |rig| rig.gpu.reset()),
    ] {
        rig.create(0);
        rig.map(0, VA, &[ALL]);
        let before = rig.load(0);
        rig.submit(0, 0, &[increments(VA, u32::MAX)]);
        let start = Instant::now();
        while rig.load(0) == before {
            assert!(
                start.elapsed() < PATIENCE,
                "waited {PATIENCE:?} for the engine to begin"
            );
        }
        stop(&mut rig);
        let stopped = rig.load(0);
        for _ in 0..2000 {
            assert_eq!(rig.load(0), stopped, "after {name}");
        }
        if name == "pause" {
            rig.gpu.resume();
            while rig.load(0) == stopped {
                assert!(
                    start.elapsed() < PATIENCE,
                    "waited {PATIENCE:?} for the engine to go on"
                );
            }
            assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
        }
        let expect = if name == "reset" {
            abi::STATUS_RESET
        } else {
            abi::STATUS_NO_CONTEXT
        };
        assert_eq!(rig.completion().status, expect);
    }
}

#[test]
fn a_reset_forgets_stalls_replays_and_events() {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    let fault = rig.event();
    rig.map(0, VA, &[ALL | abi::PTE_VRAM]);
    rig.submit(1, 0, &[increments(VA, 5)]);
    assert_eq!(rig.completion().status, OK);
    rig.gpu.reset();
    assert_eq!(rig.replay(0, fault.fault), Err(abi::STATUS_NO_FAULT));
    rig.create(0);
    assert!(rig.log.is_empty());
    rig.map(0, VA, &[ALL | abi::PTE_VRAM, ALL]);
    // Ring 0 has given up what it was stalled on, and VRAM is zero again.
    assert_eq!(
        rig.run(0, &[increments(VA, 1), copy(VA + PAGE_SIZE, VA, 8)])
            .status,
        OK
    );
    assert_eq!(rig.load(0), 1);
}

#[test]
fn vram_has_atomics_and_system_memory_has_none() {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.map(0, VA, &[ALL | abi::PTE_VRAM, ALL]);
    let mut total = 0_u64;
    let start = Instant::now();
    loop {
        for place in [VA, VA + PAGE_SIZE] {
            rig.submit(0, 0, &[increments(place, 400_000)]);
            rig.submit(1, 0, &[increments(place, 400_000)]);
            assert_eq!(rig.completion().status, OK);
            assert_eq!(rig.completion().status, OK);
        }
        total += 800_000;
        let vram = rig.gpu.vram().slice(0, 8).unwrap().read_obj::<u64>(0).unwrap();
        assert_eq!(vram, total);
        if rig.load(0) < total {
            break;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "no update was lost in {total} unprotected ones"
        );
    }
}

#[test]
fn what_the_driver_is_not_told_is_bounded() {
    let mut rig = Rig::new(2);
    rig.create(0);
    rig.submit(0, 0, &[increments(VA, 1)]);
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    // A driver that makes no room for events but guesses the numbers of faults.
    let start = Instant::now();
    let mut guess = 1;
    while guess < 500 {
        if rig.replay(0, guess) == Ok(0) {
            guess += 1;
        }
        assert!(rig.log.len() <= 2);
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for fault {guess}"
        );
    }
}

#[test]
fn a_lost_fault_is_lost() {
    let mut rig = Rig::with(1, &["lost-fault"]);
    rig.create(0);
    let told: Vec<u64> = (1..=8)
        .filter(|&number| {
            rig.submit(0, 0, &[increments(VA + number * PAGE_SIZE, 1)]);
            // The host hears of it, whether there is a record or not.
            rig.events.recv_timeout(PATIENCE).expect("a fault");
            let told = rig.log.take().is_some();
            rig.map(0, VA + number * PAGE_SIZE, &[ALL]);
            assert_eq!(rig.replay(0, number), Ok(1));
            assert_eq!(rig.completion().status, OK);
            told
        })
        .collect();
    assert_eq!(told, [1, 2, 3, 5, 6, 7]);
}

#[test]
fn ends_with_stalled_busy_and_paused_engines() {
    let mut rig = Rig::new(3);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    rig.submit(1, 0, &[increments(VA + PAGE_SIZE, 1)]);
    rig.event();
    let start = Instant::now();
    drop(rig);
    assert!(start.elapsed() < PATIENCE);
    let mut rig = Rig::new(1);
    rig.create(0);
    rig.map(0, VA, &[ALL]);
    rig.submit(0, 0, &[increments(VA, u32::MAX)]);
    rig.gpu.pause();
    drop(rig);
}
