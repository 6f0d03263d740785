// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The core, driven by arbitrary requests, submissions and events, in any order and without regard to what it says.
//!
//! What has to hold: nothing panics; every submission completes once, at the latest when the device is reset; every REPLAY
//! that is to be answered later is answered once.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::Unstructured;
use parking_lot::{Condvar, Mutex};
use pinion_abi as abi;
use pinion_device::gpu::event::EventLog;
use pinion_device::gpu::inject::{Defect, Injection, Injector};
use pinion_device::gpu::memory::PlainMemory;
use pinion_device::gpu::{Answer, Gpu, Host, Settings};
use zerocopy::IntoBytes;

use crate::shape::{self, MEMORY, Odds};

/// How long the device may take to get to an end.
const PATIENCE: Duration = Duration::from_secs(20);
const MAX_STEPS: usize = 200;

/// Submissions with their tickets, and how many were taken before.
type Ring = (VecDeque<(u64, Vec<u8>)>, u64);

#[derive(Default)]
struct Lists {
    rings: Vec<Ring>,
    /// Submissions that have not completed.
    submitted: HashSet<u64>,
    /// REPLAYs that have not been answered.
    replays: HashSet<u64>,
}

#[derive(Default)]
struct Fake {
    lists: Mutex<Lists>,
    changed: Condvar,
}

impl Host for Fake {
    type Ticket = u64;

    fn next(&self, ring: u16, bytes: &mut Vec<u8>) -> Option<(u64, u64)> {
        let (waiting, taken) = &mut self.lists.lock().rings[usize::from(ring)];
        let (ticket, submission) = waiting.pop_front()?;
        bytes.extend_from_slice(&submission);
        *taken += 1;
        Some((ticket, *taken - 1))
    }
    fn position(&self, ring: u16) -> u64 {
        let (waiting, taken) = &self.lists.lock().rings[usize::from(ring)];
        taken + waiting.len() as u64
    }
    fn busy(&self, _ring: u16) {}
    fn idle(&self, ring: u16) -> bool {
        !self.lists.lock().rings[usize::from(ring)].0.is_empty()
    }
    fn complete(&self, _ring: u16, ticket: u64, _completion: abi::Completion) {
        assert!(
            self.lists.lock().submitted.remove(&ticket),
            "submission {ticket} completes twice"
        );
        self.changed.notify_all();
    }
    fn announce(&self, _ring: u16) {}
    fn replayed(&self, ticket: u64, _through: u64) {
        assert!(
            self.lists.lock().replays.remove(&ticket),
            "REPLAY {ticket} is answered twice"
        );
        self.changed.notify_all();
    }
    fn events(&self) {}
}

struct Rig {
    gpu: Gpu<Fake>,
    host: Arc<Fake>,
    log: Arc<EventLog>,
    injector: Arc<Injector>,
    memory: Arc<PlainMemory>,
    rings: u16,
    tickets: u64,
    /// The last fault that was reported.
    faults: u64,
    paused: bool,
    /// Completions may be lost, because that was asked for.
    lossy: bool,
}

impl Rig {
    fn new(u: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let rings = u.int_in_range(1..=4)?;
        let settings = Settings {
            vram: MEMORY,
            rings,
            engines: u.int_in_range(1..=rings)?,
            watchdog: u.ratio(1, 2)?.then_some(Duration::from_millis(5)),
            ..Settings::default()
        };
        let host = Arc::new(Fake::default());
        host.lists.lock().rings = (0..rings).map(|_| Default::default()).collect();
        let log = Arc::new(EventLog::default());
        let injector = Arc::new(Injector::default());
        let gpu = Gpu::start(&settings, host.clone(), log.clone(), injector.clone())
            .unwrap_or_else(|error| panic!("{error}"));
        let memory = Arc::new(PlainMemory::new(MEMORY as usize).unwrap_or_else(|error| panic!("{error}")));
        gpu.set_memory(memory.clone());
        Ok(Self {
            gpu,
            host,
            log,
            injector,
            memory,
            rings,
            tickets: 0,
            faults: 0,
            paused: false,
            lossy: false,
        })
    }

    fn control(&mut self, request: &[u8]) {
        self.tickets += 1;
        self.host.lists.lock().replays.insert(self.tickets);
        if let Answer::Now(ticket, _) = self.gpu.control(request, self.tickets) {
            assert!(self.host.lists.lock().replays.remove(&ticket), "answered twice");
        }
    }

    fn submit(&mut self, ring: u16, submission: Vec<u8>) {
        self.tickets += 1;
        let mut lists = self.host.lists.lock();
        lists.submitted.insert(self.tickets);
        lists.rings[usize::from(ring)]
            .0
            .push_back((self.tickets, submission));
        drop(lists);
        self.gpu.attend(ring);
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match u.arbitrary::<Odds>()?.of(&[60, 80, 20, 40, 6, 4, 4, 4, 2, 6]) {
            0 => {
                let request = shape::request(u, self.faults + 1)?;
                self.control(&request);
            }
            1 => {
                let ring = u.int_in_range(0..=self.rings - 1)?;
                let submission = shape::submission(u, self.tickets + 1)?;
                self.submit(ring, submission);
            }
            2 => {
                let request = shape::invalidation(u)?;
                self.gpu.invalidate(&request);
            }
            3 => {
                while let Some(event) = self.log.take() {
                    self.faults = self.faults.max(event.fault);
                }
            }
            4 => std::thread::sleep(Duration::from_micros(u.int_in_range(0..=300)?)),
            5 => {
                self.paused = u.arbitrary()?;
                if self.paused {
                    self.gpu.pause();
                } else {
                    self.gpu.resume();
                }
            }
            6 => {
                let defect = *u.choose(&Defect::ALL)?;
                if u.ratio(1, 3)? {
                    self.injector.switch_off(defect);
                } else {
                    self.lossy |= defect == Defect::LostCompletion;
                    self.injector.switch_on(Injection {
                        defect,
                        after: u.int_in_range(0..=3)?,
                        every: u.int_in_range(1..=4)?,
                        count: u.int_in_range(0..=3)?,
                    });
                }
            }
            7 => {
                let state = self.gpu.state();
                assert_eq!(state.rings.len(), usize::from(self.rings));
                assert!(state.device.vram_used <= state.device.vram_size);
            }
            8 => self.gpu.set_memory(self.memory.clone()),
            _ => {
                // What a driver does that knows what it is about: repair, and replay.
                if let Some(event) = self.log.take() {
                    self.faults = self.faults.max(event.fault);
                    let header = abi::RequestHeader {
                        opcode: abi::REQUEST_MAP,
                        flags: 0,
                        context: event.context,
                    };
                    let map = abi::MapRequest {
                        header,
                        va: event.va & !(abi::PAGE_SIZE - 1),
                        count: 1,
                        reserved: 0,
                    };
                    self.control(&[map.as_bytes(), shape::entry(u)?.as_bytes()].concat());
                    let header = abi::RequestHeader {
                        opcode: abi::REQUEST_REPLAY,
                        ..header
                    };
                    let fault = event.fault;
                    self.control(abi::FaultRequest { header, fault }.as_bytes());
                }
            }
        }
        Ok(())
    }

    /// Everything comes to an end.
    fn finish(mut self) {
        self.gpu.resume();
        for defect in Defect::ALL {
            self.injector.switch_off(defect);
        }
        let header = abi::RequestHeader {
            opcode: abi::REQUEST_DEVICE_RESET,
            flags: 0,
            context: 0,
        };
        self.control(header.as_bytes());
        let deadline = Instant::now() + PATIENCE;
        let mut lists = self.host.lists.lock();
        while !lists.replays.is_empty() || !self.lossy && !lists.submitted.is_empty() {
            let late = self.host.changed.wait_until(&mut lists, deadline).timed_out();
            assert!(
                !late,
                "after a reset, unanswered: REPLAYs {:?}, submissions {:?}",
                lists.replays, lists.submitted
            );
        }
        drop(lists);
        assert_eq!(self.gpu.vram().used(), 0, "VRAM is not empty after a reset");
        let state = self.gpu.state();
        assert!(state.contexts.is_empty() && state.faults.is_empty());
    }
}

/// Does what `data` says.
pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(mut rig) = Rig::new(&mut u) else { return };
    for _ in 0..MAX_STEPS {
        if u.is_empty() || rig.step(&mut u).is_err() {
            break;
        }
    }
    rig.finish();
}
