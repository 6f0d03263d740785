// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The whole daemon, a process of its own, behind a real vhost-user frontend.

use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pinion_abi::{self as abi, LARGE_PAGE_SIZE};
use rustix::event::{EventfdFlags, eventfd};

use super::support::{ALL, Daemon, FREE, Guest, QUEUE_SIZE, copy, submission};
use super::{Aim, Pair};

/// A daemon and a guest with one context, in which 4 MiB from address zero on are mapped.
struct Machine {
    guest: Guest,
    // Behind the guest, so that it goes last.
    _daemon: Daemon,
}

impl Machine {
    fn new() -> Self {
        let mut daemon = Daemon::start(&["--rings", "1"]);
        let mut guest = Guest::connect(&mut daemon, 1);
        assert_eq!(guest.create(0), abi::STATUS_OK);
        for part in 0..2 {
            let pages = (0..512).map(|page| ALL | (FREE + part * LARGE_PAGE_SIZE + page * abi::PAGE_SIZE));
            let entries: Vec<_> = pages.collect();
            assert_eq!(guest.map(0, part * LARGE_PAGE_SIZE, &entries), abi::STATUS_OK);
        }
        Self {
            guest,
            _daemon: daemon,
        }
    }

    fn invalidate(&mut self) {
        assert_eq!(self.guest.invalidate(0, 0, LARGE_PAGE_SIZE, 0), abi::STATUS_OK);
    }
}

/// Two threads that wake each other, each through an eventfd of the other's.
struct PingPong {
    here: rustix::fd::OwnedFd,
    there: rustix::fd::OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl PingPong {
    fn new() -> Self {
        let here = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let there = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (to, from) = (here.try_clone().unwrap(), there.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            // The number says whether to go on.
            while receive(&from) == 1 {
                send(&to, 1);
            }
        });
        Self {
            here,
            there,
            thread: Some(thread),
        }
    }

    fn run(&self, count: u64) -> Duration {
        let start = Instant::now();
        for _ in 0..count {
            send(&self.there, 1);
            receive(&self.here);
        }
        start.elapsed()
    }
}

impl Drop for PingPong {
    fn drop(&mut self) {
        send(&self.there, 2);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn send(to: impl AsFd, number: u64) {
    rustix::io::write(to, &number.to_ne_bytes()).unwrap();
}

fn receive(from: impl AsFd) -> u64 {
    let mut number = [0; 8];
    rustix::io::read(from, &mut number).unwrap();
    u64::from_ne_bytes(number)
}

/// The way of a request to the device and back.
#[derive(Clone, Copy)]
enum Trip {
    Ping,
    Nop,
    Invalidate,
}

struct RoundTrip {
    machine: Machine,
    trip: Trip,
    bare: PingPong,
}

impl Pair for RoundTrip {
    fn name(&self) -> String {
        match self.trip {
            Trip::Ping => "round trip of a PING, kick to notification",
            Trip::Nop => "round trip of a submission of one NOP",
            Trip::Invalidate => "round trip of an INVALIDATE of 2 MiB",
        }
        .into()
    }
    fn against(&self) -> String {
        "two threads that wake each other through eventfds".into()
    }
    fn aim(&self) -> Aim {
        Aim::Time(1.5)
    }
    fn count(&self) -> u64 {
        512
    }
    fn device(&mut self, count: u64) -> Duration {
        let guest = &mut self.machine.guest;
        let start = Instant::now();
        for sequence in 0..count {
            match self.trip {
                Trip::Ping => assert_eq!(guest.simple(abi::REQUEST_PING, 0), abi::STATUS_OK),
                Trip::Nop => {
                    let done = guest.run(0, sequence, &[abi::Command::default()]);
                    assert_eq!(done.status, abi::STATUS_OK);
                }
                Trip::Invalidate => {
                    assert_eq!(guest.invalidate(0, 0, LARGE_PAGE_SIZE, 0), abi::STATUS_OK);
                }
            }
        }
        start.elapsed()
    }
    fn reference(&mut self, count: u64) -> Duration {
        self.bare.run(count)
    }
}

/// Commands that do nothing, many in each submission, as many submissions as there is room for; against one in each.
struct Nops(Machine);

impl Nops {
    const BATCH: u64 = 256;

    fn run(&mut self, count: u64, batch: u64) -> Duration {
        let bytes = submission(0, 0, &vec![abi::Command::default(); batch as usize]);
        let queue = &mut self.0.guest.queues[usize::from(abi::QUEUE_FIRST_RING)];
        let mut tokens = std::collections::VecDeque::new();
        let start = Instant::now();
        for _ in 0..count / batch {
            if tokens.len() as u16 == QUEUE_SIZE / 4 {
                let (_, done): (_, abi::Completion) = queue.wait(tokens.pop_front().unwrap(), "a NOP");
                assert_eq!(done.status, abi::STATUS_OK);
            }
            tokens.push_back(queue.send(&bytes, size_of::<abi::Completion>() as u32));
        }
        for token in tokens {
            let _: (_, abi::Completion) = queue.wait(token, "a NOP");
        }
        start.elapsed()
    }
}

impl Pair for Nops {
    fn name(&self) -> String {
        format!("NOP, {} in a submission, through a virtqueue", Self::BATCH)
    }
    fn against(&self) -> String {
        "one in a submission".into()
    }
    fn aim(&self) -> Aim {
        Aim::None
    }
    fn count(&self) -> u64 {
        8 * Self::BATCH
    }
    fn unit(&self) -> (&'static str, u64) {
        ("commands", 1)
    }
    fn device(&mut self, count: u64) -> Duration {
        // A multiple of the batch, whatever is asked for.
        let count = count.next_multiple_of(Self::BATCH);
        self.run(count, Self::BATCH)
    }
    fn reference(&mut self, count: u64) -> Duration {
        self.run(count, 1)
    }
}

/// INVALIDATE of 2 MiB while an engine copies; against the same while it has nothing to do.
struct Invalidations(Machine);

impl Pair for Invalidations {
    fn name(&self) -> String {
        "INVALIDATE of 2 MiB while an engine copies, through its virtqueue".into()
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
        let machine = &mut self.0;
        // Some milliseconds of work at a time, and before it is done the same once more.
        let work = vec![copy(LARGE_PAGE_SIZE, 0, LARGE_PAGE_SIZE); 128];
        let mut tokens = std::collections::VecDeque::new();
        let mut took = Duration::ZERO;
        for number in 0..count {
            while tokens.len() < 2 {
                tokens.push_back(machine.guest.submit(0, 0, number, &work));
            }
            let start = Instant::now();
            machine.invalidate();
            took += start.elapsed();
            while tokens
                .front()
                .is_some_and(|&token| machine.guest.is_complete(0, token))
            {
                if let Some(token) = tokens.pop_front() {
                    assert_eq!(machine.guest.completion(0, token).status, abi::STATUS_OK);
                }
            }
        }
        for token in tokens {
            machine.guest.completion(0, token);
        }
        took
    }
    fn reference(&mut self, count: u64) -> Duration {
        let start = Instant::now();
        (0..count).for_each(|_| self.0.invalidate());
        start.elapsed()
    }
}

/// All of them.
pub fn all() -> Vec<Box<dyn Fn() -> Box<dyn Pair>>> {
    let mut all: Vec<Box<dyn Fn() -> Box<dyn Pair>>> = Vec::new();
    for trip in [Trip::Ping, Trip::Nop, Trip::Invalidate] {
        all.push(Box::new(move || {
            Box::new(RoundTrip {
                machine: Machine::new(),
                trip,
                bare: PingPong::new(),
            })
        }));
    }
    all.push(Box::new(|| Box::new(Nops(Machine::new()))));
    all.push(Box::new(|| Box::new(Invalidations(Machine::new()))));
    all
}

/// Memory of the host, in KiB, that a daemon with a TiB of VRAM and nothing to do takes up: what is its own, and all of
/// what is resident, with the code that is mapped.
pub fn idle_memory() -> (u64, u64) {
    let mut daemon = Daemon::start(&["--vram", "1T"]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), abi::STATUS_OK);
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let number = |key: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (number("RssAnon:"), number("VmRSS:"))
}
