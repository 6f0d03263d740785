// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The core by itself: no queue, no socket. Memory is one plain block.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinion_abi::{self as abi, LARGE_PAGE_SIZE, PAGE_SIZE};
use pinion_device::gpu::access::{Tally, Window};
use pinion_device::gpu::context::Contexts;
use pinion_device::gpu::event::EventLog;
use pinion_device::gpu::inject::Injector;
use pinion_device::gpu::memory::{PlainMemory, SystemMemory};
use pinion_device::gpu::page_table::{Budget, MAX_NODES};
use pinion_device::gpu::tlb::Tlb;
use pinion_device::gpu::vram::Vram;
use pinion_device::gpu::{Answer, Gpu, Host, Settings};
use zerocopy::IntoBytes;

use super::support::{ALL, copy, submission};
use super::{Aim, Pair};

const MIB: u64 = 1 << 20;
/// Most commands in a submission.
const BATCH: u64 = 1024;

/// Submissions wait in a queue; of completions only the number matters.
#[derive(Default)]
struct Plain {
    work: Mutex<Work>,
    done: Condvar,
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<Arc<Vec<u8>>>,
    taken: u64,
    completed: u64,
}

impl Host for Plain {
    type Ticket = ();

    fn next(&self, _ring: u16, bytes: &mut Vec<u8>) -> Option<((), u64)> {
        let mut work = self.work.lock();
        let submission = work.waiting.pop_front()?;
        bytes.extend_from_slice(&submission);
        work.taken += 1;
        Some(((), work.taken - 1))
    }
    fn position(&self, _ring: u16) -> u64 {
        let work = self.work.lock();
        work.taken + work.waiting.len() as u64
    }
    fn busy(&self, _ring: u16) {}
    fn idle(&self, _ring: u16) -> bool {
        !self.work.lock().waiting.is_empty()
    }
    fn complete(&self, _ring: u16, (): (), completion: abi::Completion) {
        assert_eq!(completion.status, abi::STATUS_OK, "{completion:?}");
        let mut work = self.work.lock();
        work.completed += 1;
        if work.waiting.is_empty() && work.completed == work.taken {
            self.done.notify_one();
        }
    }
    fn announce(&self, _ring: u16) {}
    fn replayed(&self, (): (), _through: u64) {}
    fn events(&self) {}
}

/// A device with a block of memory, mapped from address zero on in context zero.
pub struct Core {
    gpu: Gpu<Plain>,
    host: Arc<Plain>,
    memory: Arc<PlainMemory>,
}

impl Core {
    /// With `size` bytes of memory in small or large pages, all of which are there.
    pub fn new(size: u64, large: bool) -> Self {
        let host = Arc::new(Plain::default());
        let log = Arc::new(EventLog::default());
        let gpu = Gpu::start(&Settings::default(), host.clone(), log, Arc::default()).unwrap();
        let memory = Arc::new(PlainMemory::new(size as usize).unwrap());
        for page in (0..size).step_by(PAGE_SIZE as usize) {
            memory.slice(page, 1).unwrap().copy_from(&[1_u8]);
        }
        gpu.set_memory(memory.clone());
        let core = Self { gpu, host, memory };
        core.request(header(abi::REQUEST_CONTEXT_CREATE).as_bytes());
        let page = if large { LARGE_PAGE_SIZE } else { PAGE_SIZE };
        let addresses: Vec<_> = (0..size).step_by(page as usize).collect();
        for addresses in addresses.chunks(512) {
            let entries: Vec<_> = addresses.iter().map(|address| ALL | address).collect();
            let map = abi::MapRequest {
                header: abi::RequestHeader {
                    flags: if large { abi::MAP_LARGE } else { 0 },
                    ..header(abi::REQUEST_MAP)
                },
                va: addresses[0],
                count: entries.len() as u32,
                reserved: 0,
            };
            core.request(&[map.as_bytes(), entries.as_bytes()].concat());
        }
        core
    }

    fn request(&self, request: &[u8]) {
        let answer = self.gpu.control(request, ());
        assert!(matches!(answer, Answer::Now((), response) if response.status == abi::STATUS_OK));
    }

    fn begin(&self, submissions: impl IntoIterator<Item = Arc<Vec<u8>>>) {
        self.host.work.lock().waiting.extend(submissions);
        self.gpu.attend(0);
    }

    fn wait(&self) {
        let mut work = self.host.work.lock();
        while !work.waiting.is_empty() || work.completed != work.taken {
            self.host.done.wait(&mut work);
        }
    }

    /// How much of the processors' time `submissions` take from the doorbell until all are complete.
    fn run(&self, submissions: impl IntoIterator<Item = Arc<Vec<u8>>>) -> Duration {
        let start = processor_time();
        self.begin(submissions);
        self.wait();
        processor_time().saturating_sub(start)
    }

    fn invalidate(&self, length: u64) {
        let request = abi::InvalidateRequest {
            header: header(abi::REQUEST_INVALIDATE),
            va: 0,
            length,
        };
        let response = self.gpu.invalidate(request.as_bytes());
        assert_eq!(response.status, abi::STATUS_OK);
    }

    /// Where the byte at `address` is.
    fn pointer(&self, address: u64) -> *mut u8 {
        self.memory
            .slice(address, PAGE_SIZE as usize)
            .unwrap()
            .ptr_guard_mut()
            .as_ptr()
    }
}

/// The time that processors have worked for this process.
///
/// Where one thread at a time works and none waits for anything, this is what passes on a quiet machine; and on a busy one it
/// leaves out what others take.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn header(opcode: u16) -> abi::RequestHeader {
    abi::RequestHeader {
        opcode,
        flags: 0,
        context: 0,
    }
}

/// `count` commands, which repeat `commands`, in as few submissions as there can be.
fn batches(commands: &[abi::Command], count: u64) -> Vec<Arc<Vec<u8>>> {
    let mut all = commands.iter().cycle().take(count as usize).copied();
    std::iter::from_fn(|| {
        let batch: Vec<_> = all.by_ref().take(BATCH as usize).collect();
        (!batch.is_empty()).then(|| Arc::new(submission(0, 0, &batch)))
    })
    .collect()
}

/// Copies of one size, against `ptr::copy_nonoverlapping`.
struct Copies {
    core: Core,
    what: String,
    aim: f64,
    length: u64,
    /// Destination and source.
    places: Vec<(u64, u64)>,
}

impl Copies {
    fn one(length: u64, large: bool) -> Self {
        let page = if large { "2 MiB" } else { "4 KiB" };
        Self {
            core: Core::new(2 * length, large),
            what: format!("copy of {} MiB, {page} pages", length / MIB),
            aim: 0.9,
            length,
            places: vec![(length, 0)],
        }
    }

    /// From each page of one half of the memory to a page of the other half, in no order.
    fn scattered(size: u64, large: bool) -> Self {
        let page = if large { "2 MiB" } else { "4 KiB" };
        let half = size / 2;
        let pages = half / PAGE_SIZE;
        // Odd, so that every page has its turn.
        let place = |number: u64, factor: u64| number * factor % pages * PAGE_SIZE;
        Self {
            core: Core::new(size, large),
            what: format!("scattered copies of 4 KiB over {} MiB, {page} pages", size / MIB),
            aim: 0.6,
            length: PAGE_SIZE,
            places: (0..pages)
                .map(|number| (half + place(number, 0x9e37_79b1), place(number, 0x85eb_ca6b)))
                .collect(),
        }
    }
}

impl Pair for Copies {
    fn name(&self) -> String {
        self.what.clone()
    }
    fn against(&self) -> String {
        "memcpy".into()
    }
    fn aim(&self) -> Aim {
        Aim::Speed(self.aim)
    }
    fn count(&self) -> u64 {
        (512 * MIB / self.length).clamp(2, 8 * BATCH)
    }
    fn unit(&self) -> (&'static str, u64) {
        ("B", self.length)
    }
    fn device(&mut self, count: u64) -> Duration {
        let copies = self
            .places
            .iter()
            .map(|&(destination, source)| copy(destination, source, self.length));
        let work = batches(&copies.collect::<Vec<_>>(), count);
        self.core.run(work)
    }
    fn reference(&mut self, count: u64) -> Duration {
        let places: Vec<_> = self
            .places
            .iter()
            .map(|&(destination, source)| (self.core.pointer(destination), self.core.pointer(source)))
            .collect();
        let length = self.length as usize;
        let start = processor_time();
        for &(destination, source) in places.iter().cycle().take(count as usize) {
            // SAFETY: both are that long and in the block of memory, in different halves of it, and the
            // device, the only other one that has it, has nothing to do.
            unsafe { std::ptr::copy_nonoverlapping(black_box(source), black_box(destination), length) };
        }
        processor_time().saturating_sub(start)
    }
}

/// Translations: those that the TLB has, and those that have to be looked up in the page table.
struct Translations {
    contexts: Contexts,
    vram: Vram,
    memory: PlainMemory,
    injector: Injector,
    tlb: Tlb,
    last: bool,
}

impl Translations {
    /// Pages in use: more than the TLB has room for.
    const MANY: u64 = 4096;
    /// Few enough that none displaces another.
    const FEW: u64 = 64;

    fn new(last: bool) -> Self {
        let contexts = Contexts::new(Budget::new(MAX_NODES));
        contexts.create(0, vec![0]).unwrap();
        // Every second page, so that none is in a block with others.
        let entries: Vec<_> = (0..Self::MANY).map(|page| ALL | (2 * page * PAGE_SIZE)).collect();
        let context = contexts.get(0).unwrap();
        let garbage = context.table.write().write(0, &entries, false).unwrap();
        drop(garbage);
        Self {
            contexts,
            vram: Vram::new(MIB).unwrap(),
            memory: PlainMemory::new(PAGE_SIZE as usize).unwrap(),
            injector: Injector::default(),
            tlb: Tlb::default(),
            last,
        }
    }

    fn look_up(&mut self, pages: u64, count: u64) -> Duration {
        let context = self.contexts.get(0).unwrap();
        let mut tally = Tally::default();
        let mut window = Window {
            context: &context,
            tlb: &mut self.tlb,
            memory: &self.memory,
            vram: &self.vram,
            injector: &self.injector,
            tally: &mut tally,
            counting: false,
        };
        let mut one = |number: u64| {
            let va = number % pages * PAGE_SIZE;
            assert!(black_box(window.translate(black_box(va), abi::ACCESS_READ, 8)).is_ok());
        };
        (0..pages).for_each(&mut one);
        let start = Instant::now();
        (0..count).for_each(&mut one);
        start.elapsed()
    }
}

impl Pair for Translations {
    fn name(&self) -> String {
        let what = if self.last {
            "the page of the last access"
        } else {
            "another page"
        };
        format!("translation of {what}, in the TLB")
    }
    fn against(&self) -> String {
        "one that is in the page table only".into()
    }
    fn aim(&self) -> Aim {
        Aim::None
    }
    fn count(&self) -> u64 {
        1 << 16
    }
    fn device(&mut self, count: u64) -> Duration {
        let pages = if self.last { 1 } else { Self::FEW };
        self.look_up(pages, count)
    }
    fn reference(&mut self, count: u64) -> Duration {
        self.look_up(Self::MANY, count)
    }
}

/// Commands that do nothing, in batches of the largest size; against one in each submission.
struct Nops(Core);

impl Pair for Nops {
    fn name(&self) -> String {
        format!("NOP, {BATCH} in a submission, through the core")
    }
    fn against(&self) -> String {
        "one in a submission".into()
    }
    fn aim(&self) -> Aim {
        Aim::None
    }
    fn count(&self) -> u64 {
        32 * BATCH
    }
    fn unit(&self) -> (&'static str, u64) {
        ("commands", 1)
    }
    fn device(&mut self, count: u64) -> Duration {
        self.0.run(batches(&[abi::Command::default()], count))
    }
    fn reference(&mut self, count: u64) -> Duration {
        let one = Arc::new(submission(0, 0, &[abi::Command::default()]));
        self.0.run((0..count).map(|_| one.clone()))
    }
}

/// INVALIDATE of 2 MiB while an engine copies; against the same while it has nothing to do.
struct Invalidations(Core);

impl Pair for Invalidations {
    fn name(&self) -> String {
        "INVALIDATE of 2 MiB while an engine copies, in the core".into()
    }
    fn against(&self) -> String {
        "the same while it is idle".into()
    }
    fn aim(&self) -> Aim {
        Aim::None
    }
    fn count(&self) -> u64 {
        256
    }
    fn device(&mut self, count: u64) -> Duration {
        let stop = AtomicBool::new(false);
        let work = batches(&[copy(4 * MIB, 0, 4 * MIB)], 16);
        std::thread::scope(|scope| {
            let feeder = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    self.0.run(work.iter().cloned());
                }
            });
            std::thread::sleep(Duration::from_millis(2));
            let start = Instant::now();
            (0..count).for_each(|_| self.0.invalidate(LARGE_PAGE_SIZE));
            let took = start.elapsed();
            stop.store(true, Ordering::Relaxed);
            feeder.join().unwrap();
            took
        })
    }
    fn reference(&mut self, count: u64) -> Duration {
        let start = Instant::now();
        (0..count).for_each(|_| self.0.invalidate(LARGE_PAGE_SIZE));
        start.elapsed()
    }
}

/// All of them.
pub fn all() -> Vec<Box<dyn Fn() -> Box<dyn Pair>>> {
    let mut all: Vec<Box<dyn Fn() -> Box<dyn Pair>>> = Vec::new();
    for (length, large) in [(2, false), (2, true), (64, false), (64, true)] {
        all.push(Box::new(move || Box::new(Copies::one(length * MIB, large))));
    }
    for (size, large) in [(1, false), (32, false), (32, true)] {
        all.push(Box::new(move || {
            Box::new(Copies::scattered((size * MIB).max(LARGE_PAGE_SIZE), large))
        }));
    }
    all.push(Box::new(|| Box::new(Translations::new(true))));
    all.push(Box::new(|| Box::new(Translations::new(false))));
    all.push(Box::new(|| Box::new(Nops(Core::new(LARGE_PAGE_SIZE, false)))));
    all.push(Box::new(|| Box::new(Invalidations(Core::new(8 * MIB, false)))));
    all
}
