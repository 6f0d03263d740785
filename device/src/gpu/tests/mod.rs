// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The core as a whole, against plain memory: no queue, no socket, no guest.
//!
//! Here is what the tests have in common: a host that keeps work in queues, and a [`Rig`] with a device in it. Nothing
//! waits without a limit, and what it waited for is in the message when the limit is reached.

mod chase;
mod commands;
mod contexts;
mod counting;
mod engines;
mod faults;
mod indirect;
mod injections;
mod large;
mod prefetch;
mod promise;
mod waiting;
mod watchdog;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pinion_abi::{self as abi, LARGE_PAGE_SIZE, PAGE_SIZE, VA_END};
use vm_memory::{Bytes, VolatileMemory};
use zerocopy::IntoBytes;

use super::event::EventLog;
use super::memory::{PlainMemory, SystemMemory};
use super::state::Activity;
use super::*;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
const VRAM: u64 = 16 << 20;
const MEMORY: u64 = 16 << 20;
const VA: u64 = 0x1234_5000_0000;
const OK: u32 = abi::STATUS_OK;
const READ: u64 = abi::PTE_VALID | abi::PTE_READ;
const RW: u64 = READ | abi::PTE_WRITE;
const ALL: u64 = RW | abi::PTE_ATOMIC;

const _: () = assert!(VA % LARGE_PAGE_SIZE == 0);

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

/// Waits until `condition` holds, for `what`.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::yield_now();
    }
}

/// A device, and what comes out of it.
struct Rig {
    gpu: Gpu<TestHost>,
    host: Arc<TestHost>,
    log: Arc<EventLog>,
    injector: Arc<Injector>,
    memory: Arc<PlainMemory>,
    completions: Receiver<(u16, u64, abi::Completion)>,
    /// Completions that came before the one that was waited for.
    early: HashMap<u64, abi::Completion>,
    replays: Receiver<(u64, u64)>,
    events: Receiver<()>,
    tickets: u64,
}

impl Rig {
    /// A device whose rings have an engine each.
    fn new(rings: u16) -> Self {
        Self::with(rings, &[])
    }

    /// A device whose rings have an engine each, with defects.
    fn with(rings: u16, inject: &[&str]) -> Self {
        Self::build(settings(rings, rings), inject)
    }

    fn build(settings: Settings, inject: &[&str]) -> Self {
        let (completions_in, completions) = channel();
        let (replays_in, replays) = channel();
        let (events_in, events) = channel();
        let host = Arc::new(TestHost {
            rings: (0..settings.rings).map(|_| Mutex::default()).collect(),
            completions: completions_in,
            replays: replays_in,
            events: events_in,
        });
        let log = Arc::new(EventLog::default());
        let inject: Vec<_> = inject.iter().map(|text| text.parse().unwrap()).collect();
        let injector = Arc::new(Injector::new(&inject));
        let gpu = Gpu::start(&settings, host.clone(), log.clone(), injector.clone()).unwrap();
        let memory = Arc::new(PlainMemory::new(MEMORY as usize).unwrap());
        gpu.set_memory(memory.clone());
        Self {
            gpu,
            host,
            log,
            injector,
            memory,
            completions,
            early: HashMap::new(),
            replays,
            events,
            tickets: 0,
        }
    }

    fn request(&mut self, request: &[u8]) -> abi::Response {
        match self.gpu.control(request, 0) {
            Answer::Now(_, response) => response,
            Answer::Later => panic!("this is answered later"),
        }
    }

    fn control(&mut self, request: &[u8]) -> u32 {
        self.request(request).status
    }

    fn simple(&mut self, opcode: u16, context: u32) -> u32 {
        self.control(head(opcode, 0, context).as_bytes())
    }

    fn create(&mut self, context: u32) {
        assert_eq!(self.simple(abi::REQUEST_CONTEXT_CREATE, context), OK);
    }

    /// A MAP; the status.
    fn try_map(&mut self, context: u32, va: u64, entries: &[u64], flags: u16) -> u32 {
        let map = abi::MapRequest {
            header: head(abi::REQUEST_MAP, flags, context),
            va,
            count: entries.len() as u32,
            reserved: 0,
        };
        self.control(&[map.as_bytes(), entries.as_bytes()].concat())
    }

    fn map(&mut self, context: u32, va: u64, entries: &[u64]) {
        assert_eq!(self.try_map(context, va, entries, 0), OK);
    }

    fn map_large(&mut self, context: u32, va: u64, entries: &[u64]) {
        assert_eq!(self.try_map(context, va, entries, abi::MAP_LARGE), OK);
    }

    fn replay_begin(&mut self, context: u32, fault: u64, ticket: u64) -> Result<(), u32> {
        let header = head(abi::REQUEST_REPLAY, 0, context);
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
        let header = head(abi::REQUEST_CANCEL, 0, context);
        self.control(abi::FaultRequest { header, fault }.as_bytes())
    }

    fn try_query(&mut self, what: u32, context: u32, index: u32, va: u64) -> Result<u64, u32> {
        let header = head(abi::REQUEST_QUERY, 0, context);
        let query = abi::QueryRequest {
            header,
            what,
            index,
            va,
        };
        match self.request(query.as_bytes()) {
            abi::Response {
                status: OK, value, ..
            } => Ok(value),
            response => Err(response.status),
        }
    }

    fn query(&mut self, what: u32, context: u32, index: u32, va: u64) -> u64 {
        self.try_query(what, context, index, va).unwrap()
    }

    fn timeline(&mut self, ring: u16) -> u64 {
        self.query(abi::QUERY_TIMELINE, 0, ring.into(), 0)
    }

    fn time(&mut self) -> u64 {
        self.query(abi::QUERY_TIME, 0, 0, 0)
    }

    /// OK, or why the context is in error.
    fn context_status(&mut self, context: u32) -> u32 {
        self.query(abi::QUERY_CONTEXT, context, 0, 0) as u32
    }

    fn invalidate(&self, context: u32, va: u64, length: u64, flags: u16) {
        let header = head(abi::REQUEST_INVALIDATE, flags, context);
        let response = self
            .gpu
            .invalidate(abi::InvalidateRequest { header, va, length }.as_bytes());
        assert_eq!(response.status, OK);
    }

    /// Takes the whole address space of a context away.
    fn clear(&self, context: u32) {
        self.invalidate(context, 0, VA_END, abi::INVALIDATE_CLEAR);
    }

    fn submit(&mut self, ring: u16, context: u32, commands: &[abi::Command]) -> u64 {
        self.tickets += 1;
        let sequence = self.tickets;
        self.submit_as(sequence, ring, context, commands);
        sequence
    }

    fn submit_as(&mut self, sequence: u64, ring: u16, context: u32, commands: &[abi::Command]) {
        let header = submission(context, commands.len(), sequence, 0);
        let bytes = [header.as_bytes(), commands.as_bytes()].concat();
        self.submit_bytes(ring, sequence, bytes);
    }

    /// Submits `count` commands that are in memory at `va`.
    fn submit_indirect(&mut self, ring: u16, context: u32, va: u64, count: usize) -> u64 {
        self.tickets += 1;
        let header = submission(context, count, self.tickets, abi::SUBMIT_INDIRECT);
        let bytes = [header.as_bytes(), abi::Indirect { va }.as_bytes()].concat();
        self.submit_bytes(ring, self.tickets, bytes);
        self.tickets
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

    /// The completion of a submission, whatever others come before.
    fn finish(&mut self, sequence: u64) -> abi::Completion {
        loop {
            if let Some(completion) = self.early.remove(&sequence) {
                return completion;
            }
            let completion = self.completion();
            self.early.insert(completion.sequence, completion);
        }
    }

    /// Whether a completion has come that nobody has taken.
    fn has_completion(&mut self) -> bool {
        if let Ok((_, _, completion)) = self.completions.try_recv() {
            self.early.insert(completion.sequence, completion);
        }
        !self.early.is_empty()
    }

    fn run(&mut self, context: u32, commands: &[abi::Command]) -> abi::Completion {
        self.run_on(0, context, commands)
    }

    fn run_on(&mut self, ring: u16, context: u32, commands: &[abi::Command]) -> abi::Completion {
        let sequence = self.submit(ring, context, commands);
        self.finish(sequence)
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

    /// Waits for an event, which is a fault.
    fn fault(&mut self) -> abi::EventRecord {
        let event = self.event();
        assert_eq!(event.kind, abi::EVENT_FAULT, "{event:?}");
        event
    }

    /// Waits until a ring does this.
    fn until_activity(&self, ring: u16, activity: Activity) {
        let what = format!("ring {ring} to be {activity:?}");
        until(&what, || {
            self.gpu.state().rings[usize::from(ring)].activity == activity
        });
    }

    fn statistic(&self, name: &str) -> u64 {
        let list = self.gpu.statistics().list();
        let found = list.iter().find(|(other, _)| *other == name);
        found.expect("a statistic of this name").1
    }

    fn load(&self, address: u64) -> u64 {
        let slice = self.memory.slice(address, 8).unwrap();
        slice
            .get_atomic_ref::<AtomicU64>(0)
            .unwrap()
            .load(Ordering::SeqCst)
    }

    /// Stores a number like a CPU.
    fn store(&self, address: u64, value: u64) {
        let slice = self.memory.slice(address, 8).unwrap();
        let place = slice.get_atomic_ref::<AtomicU64>(0).unwrap();
        place.store(value, Ordering::SeqCst);
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

    fn vram_load(&self, offset: u64) -> u64 {
        let slice = self.gpu.vram().slice(offset, 8).unwrap();
        slice
            .get_atomic_ref::<AtomicU64>(0)
            .unwrap()
            .load(Ordering::SeqCst)
    }

    fn vram_write(&self, offset: u64, bytes: &[u8]) {
        self.gpu
            .vram()
            .slice(offset, bytes.len())
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

    /// Repairs one page after the other until a submission completes, and takes each away as soon as its REPLAY is
    /// answered: no two are ever there at the same time. Each REPLAY has to let the access through.
    fn one_page_at_a_time(&mut self, context: u32, mut entry: impl FnMut(u64) -> u64) -> abi::Completion {
        let mut faults = 0;
        let mut done = None;
        until("a submission that has one page at a time", || {
            done = self
                .completions
                .try_recv()
                .ok()
                .map(|(_, _, completion)| completion);
            if let Some(record) = self.log.take() {
                let page = record.va & !(PAGE_SIZE - 1);
                self.map(context, page, &[entry(page)]);
                assert_eq!(self.replay(context, record.fault), Ok(1), "{record:?}");
                self.invalidate(context, page, PAGE_SIZE, abi::INVALIDATE_CLEAR);
                faults += 1;
                assert!(faults < 1000, "it comes no further: {record:?}");
            }
            done.is_some()
        });
        done.unwrap()
    }
}

/// A device of this shape, like the default one otherwise.
fn settings(rings: u16, engines: u16) -> Settings {
    Settings {
        vram: VRAM,
        rings,
        engines,
        ..Settings::default()
    }
}

fn head(opcode: u16, flags: u16, context: u32) -> abi::RequestHeader {
    abi::RequestHeader {
        opcode,
        flags,
        context,
    }
}

fn submission(context: u32, count: usize, sequence: u64, flags: u32) -> abi::SubmitHeader {
    abi::SubmitHeader {
        context,
        count: count as u32,
        sequence,
        flags,
        reserved: 0,
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

fn nop() -> abi::Command {
    abi::Command::default()
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

fn fill(address: u64, length: u64, width: u8, operand: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_FILL,
        width,
        address,
        length,
        operand,
        ..Default::default()
    }
}

/// Waits until the eight bytes at `address` are equal to `operand`.
fn semaphore_wait(address: u64, operand: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_SEMAPHORE_WAIT,
        operation: abi::COMPARE_EQUAL,
        width: 8,
        address,
        operand,
        compare: u64::MAX,
        ..Default::default()
    }
}

fn semaphore_signal(address: u64, operand: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_SEMAPHORE_SIGNAL,
        width: 8,
        address,
        operand,
        ..Default::default()
    }
}

fn timestamp(address: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_TIMESTAMP,
        address,
        ..Default::default()
    }
}

fn fence(value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_FENCE,
        operand: value,
        ..Default::default()
    }
}

/// A FENCE that stores the timeline at `source`.
fn fence_to(value: u64, source: u64) -> abi::Command {
    abi::Command {
        flags: abi::COMMAND_WRITE_BACK,
        source,
        ..fence(value)
    }
}

fn fence_wait(ring: u16, value: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_FENCE_WAIT,
        operand: value,
        span: ring.into(),
        ..Default::default()
    }
}

fn prefetch(address: u64, length: u64, access: u8) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_PREFETCH,
        operation: access,
        address,
        length,
        ..Default::default()
    }
}

/// Pages in an order of their own, so that neighbours in virtual memory are none in system memory.
fn scattered(va: u64) -> u64 {
    let page = (va - VA) / PAGE_SIZE;
    (page * 7 % 64) * PAGE_SIZE
}
