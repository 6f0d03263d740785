// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Frontends that do what they must not. Whatever they do, the next one is served, by a fresh device.

mod support;

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use pinion_abi as abi;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use support::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const OK: u32 = abi::STATUS_OK;
const VA: u64 = 0x7000_0000_0000;

// Numbers of vhost-user messages.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const SET_DEVICE_STATE_FD: u32 = 42;
const GET_SHMEM_CONFIG: u32 = 44;

/// A frontend that sends bytes.
struct Raw(UnixStream);

impl Raw {
    fn connect(daemon: &mut Daemon) -> Self {
        let stream = daemon.connect();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// A header that claims `size` bytes, then `body`.
    fn send_as(&self, request: u32, flags: u32, size: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = [request, flags, size].map(u32::to_le_bytes).concat();
        let bytes = [&header[..], body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // The daemon may have had enough of it already.
        let _ = sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
    }

    fn send(&self, request: u32, words: &[u64], fds: &[BorrowedFd<'_>]) {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send_as(request, 1, body.len() as u32, &body, fds);
    }

    /// Does what comes before queues are set up.
    fn negotiate(&self) {
        self.send(SET_OWNER, &[], &[]);
        self.send(GET_FEATURES, &[], &[]);
        self.send(SET_FEATURES, &[1 << 32 | 1 << 29 | 1 << 30], &[]);
        self.send(SET_PROTOCOL_FEATURES, &[0x0042_afff], &[]);
    }

    /// Sends nothing more, and waits for the daemon to close the connection.
    fn ends(mut self, what: &str) {
        let _ = self.0.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        if let Err(error) = self.0.read_to_end(&mut rest) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "waited {PATIENCE:?} for the end of the connection after {what}"
            );
        }
    }
}

fn memory(size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("robustness", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    file
}

/// The next frontend is served, and finds nothing of what was there.
fn next_one_is_served(daemon: &mut Daemon, after: &str) {
    let mut guest = Guest::connect(daemon, 1);
    assert_eq!(guest.create(0), OK, "after {after}");
    assert_eq!(
        guest.map(0, VA, &[ALL | FREE, ALL | abi::PTE_VRAM]),
        OK,
        "after {after}"
    );
    let work = [
        increments(VA, 2),
        increments(VA + 0x1000, 3),
        copy(VA + 8, VA + 0x1000, 8),
    ];
    assert_eq!(guest.run(0, 1, &work).status, OK, "after {after}");
    assert_eq!(guest.read::<u64>(FREE), 2, "after {after}");
    // VRAM was zero.
    assert_eq!(guest.read::<u64>(FREE + 8), 3, "after {after}");
}

/// Ends it; it has kept its log short.
fn ends_well(daemon: Daemon) {
    daemon.signal(rustix::process::Signal::TERM);
    let (status, said) = daemon.end();
    assert!(status.success(), "{status}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    assert!(said.lines().count() <= 10, "it said much: {said}");
}

#[test]
fn messages_that_are_none() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let fd = memory(4096);
    let fds = [fd.as_fd(); 40];
    type Bad = (&'static str, fn(&Raw, &[BorrowedFd<'_>]));
    let bad: &[Bad] = &[
        ("nothing", |_, _| {}),
        ("half a header", |raw, _| {
            let _ = rustix::io::write(&raw.0, &[1, 0, 0, 0, 1]);
        }),
        ("a body that does not come", |raw, _| {
            raw.send_as(SET_FEATURES, 1, 8, &[1, 2], &[]);
        }),
        ("four gigabytes that do not come", |raw, _| {
            raw.send_as(SET_FEATURES, 1, u32::MAX, &[0; 64], &[]);
        }),
        ("a body that is too long", |raw, _| {
            raw.send_as(SET_FEATURES, 1, 4096, &[0; 4096], &[]);
        }),
        ("a body where there is none", |raw, _| {
            raw.send(SET_OWNER, &[7], &[])
        }),
        ("no body", |raw, _| raw.send(SET_VRING_ADDR, &[], &[])),
        ("another version", |raw, _| {
            raw.send_as(GET_FEATURES, 2, 0, &[], &[])
        }),
        ("a reply", |raw, _| raw.send_as(GET_FEATURES, 5, 0, &[], &[])),
        ("all flags", |raw, _| {
            raw.send_as(GET_FEATURES, u32::MAX, 0, &[], &[]);
        }),
        ("message 0", |raw, _| raw.send(0, &[], &[])),
        ("message 10000", |raw, _| raw.send(10_000, &[1, 2, 3], &[])),
        ("descriptors with a message that has none", |raw, fds| {
            raw.send(GET_FEATURES, &[], &fds[..1]);
        }),
        ("forty descriptors", |raw, fds| {
            raw.send(SET_VRING_KICK, &[0], fds)
        }),
        ("no descriptor", |raw, _| raw.send(SET_VRING_KICK, &[0], &[])),
        ("features that were not offered", |raw, _| {
            raw.send(SET_FEATURES, &[u64::MAX], &[]);
        }),
        ("a frontend that claims twice", |raw, _| {
            raw.send(SET_OWNER, &[], &[]);
            raw.send(SET_OWNER, &[], &[]);
        }),
        ("a log of dirty pages", |raw, fds| {
            raw.send(SET_LOG_BASE, &[4096, 0], &fds[..1]);
        }),
        ("messages of features that were not negotiated", |raw, _| {
            raw.send(RESET_DEVICE, &[], &[]);
        }),
        ("device state", |raw, fds| {
            raw.send(SET_DEVICE_STATE_FD, &[0], &fds[..1]);
            raw.send(SET_DEVICE_STATE_FD, &[u64::MAX], &[]);
        }),
    ];
    for (what, act) in bad {
        let raw = Raw::connect(&mut daemon);
        act(&raw, &fds);
        raw.ends(what);
        next_one_is_served(&mut daemon, what);
    }
    ends_well(daemon);
}

#[test]
fn messages_that_ask_for_what_cannot_be() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let file = memory(1 << 20);
    let fd = file.as_fd();
    const BASE: u64 = 0x7fff_0000_0000;
    const NUMBER: u64 = 1 << 32;
    type Bad = (&'static str, fn(&Raw, BorrowedFd<'_>));
    let bad: &[Bad] = &[
        ("no memory at all", |raw, _| raw.send(SET_MEM_TABLE, &[0], &[])),
        ("fewer descriptors than regions", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[2, 0, 4096, BASE, 0, 4096, 4096, BASE, 0], &[fd]);
        }),
        ("more descriptors than regions", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 4096, BASE, 0], &[fd, fd]);
        }),
        ("a count of regions that is not true", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[u64::from(u32::MAX), 0, 4096, BASE, 0], &[fd]);
        }),
        ("a region beyond its file", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 2 << 20, BASE, 0], &[fd]);
        }),
        ("an offset beyond the file", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 4096, BASE, 1 << 40], &[fd]);
        }),
        ("a region beyond all addresses", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, u64::MAX - 100, 4096, BASE, 0], &[fd]);
        }),
        ("regions that overlap", |raw, fd| {
            raw.send(
                SET_MEM_TABLE,
                &[2, 0, 8192, BASE, 0, 4096, 8192, BASE + 8192, 0],
                &[fd, fd],
            );
        }),
        ("a region of nothing", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 0, BASE, 0], &[fd]);
        }),
        ("memory that is a socket", |raw, _| {
            let (one, _other) = UnixStream::pair().unwrap();
            raw.send(SET_MEM_TABLE, &[1, 0, 4096, BASE, 0], &[one.as_fd()]);
        }),
        ("a slot that overlaps", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 8192, BASE, 0], &[fd]);
            raw.send(ADD_MEM_REG, &[0, 4096, 8192, BASE + 8192, 0], &[fd]);
        }),
        ("a slot that is not there", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 8192, BASE, 0], &[fd]);
            raw.send(REM_MEM_REG, &[0, 0, 4096, BASE, 0], &[]);
        }),
        ("a slot without a descriptor", |raw, _| {
            raw.send(ADD_MEM_REG, &[0, 0, 4096, BASE, 0], &[]);
        }),
        ("a slot of everything", |raw, fd| {
            raw.send(ADD_MEM_REG, &[0, 0, u64::MAX, BASE, 0], &[fd]);
        }),
        ("a queue that is not there", |raw, _| {
            raw.send(SET_VRING_NUM, &[200 | (NUMBER * 128)], &[]);
        }),
        ("an endless queue", |raw, _| {
            raw.send(SET_VRING_NUM, &[NUMBER * 65_536], &[])
        }),
        ("a queue of nothing", |raw, _| raw.send(SET_VRING_NUM, &[0], &[])),
        ("a queue whose size is no power of two", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 1 << 20, BASE, 0], &[fd]);
            raw.send(SET_VRING_NUM, &[NUMBER * 100], &[]);
            raw.send(SET_VRING_ADDR, &[0, BASE, BASE + 0x2000, BASE + 0x1000, 0], &[]);
            // What comes behind it is not looked at any more.
            raw.send(GET_FEATURES, &[], &[]);
        }),
        ("a queue outside of memory", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 1 << 20, BASE, 0], &[fd]);
            raw.send(SET_VRING_ADDR, &[0, 0x1000, 0x2000, 0x3000, 0], &[]);
        }),
        ("a queue before there is memory", |raw, _| {
            raw.send(SET_VRING_ADDR, &[0, BASE, BASE + 0x2000, BASE + 0x1000, 0], &[]);
        }),
        ("a crooked queue", |raw, fd| {
            raw.send(SET_MEM_TABLE, &[1, 0, 1 << 20, BASE, 0], &[fd]);
            raw.send(
                SET_VRING_ADDR,
                &[0, BASE + 3, BASE + 0x2001, BASE + 0x1001, 0],
                &[],
            );
        }),
        ("a queue that is neither on nor off", |raw, _| {
            raw.send(SET_VRING_ENABLE, &[NUMBER * 2], &[]);
        }),
        ("the base of a queue that is not there", |raw, _| {
            raw.send(GET_VRING_BASE, &[99], &[]);
        }),
        ("a kick that is a file", |raw, fd| {
            raw.send(SET_VRING_ENABLE, &[NUMBER], &[]);
            raw.send(SET_VRING_KICK, &[0], &[fd]);
        }),
        ("configuration space beyond its end", |raw, _| {
            // Offset and size, then flags, and no payload.
            raw.send_as(GET_CONFIG, 1, 12, &[0xff; 12], &[]);
        }),
        ("configuration space written", |raw, _| {
            raw.send_as(SET_CONFIG, 1, 16, &[0; 16], &[]);
        }),
        ("buffers in flight", |raw, _| {
            raw.send(GET_INFLIGHT_FD, &[0, 0, 0], &[])
        }),
        ("a backend channel that is a file", |raw, fd| {
            raw.send(SET_BACKEND_REQ_FD, &[], &[fd]);
        }),
        ("a backend channel that is none", |raw, _| {
            raw.send(SET_BACKEND_REQ_FD, &[], &[]);
        }),
        ("shared memory, asked for with rubbish", |raw, _| {
            raw.send(GET_SHMEM_CONFIG, &[1, 2, 3], &[]);
        }),
        ("a queue that begins anywhere", |raw, _| {
            raw.send(SET_VRING_BASE, &[NUMBER * 0xffff_ffff], &[]);
        }),
    ];
    for (what, act) in bad {
        let raw = Raw::connect(&mut daemon);
        raw.negotiate();
        act(&raw, fd);
        raw.ends(what);
        next_one_is_served(&mut daemon, what);
    }
    ends_well(daemon);
}

/// The library adds up the addresses of a slot unchecked, and panics in a debug build. That ends the connection, and
/// nothing else.
#[test]
fn a_slot_beyond_all_addresses() {
    let mut daemon = Daemon::start(&[]);
    let file = memory(1 << 20);
    for _ in 0..3 {
        let raw = Raw::connect(&mut daemon);
        raw.negotiate();
        let last = u64::MAX - 0xfff;
        raw.send(ADD_MEM_REG, &[0, 0, 8192, last, 0], &[file.as_fd()]);
        raw.send(SET_VRING_ADDR, &[0, last, last + 0x20, last + 0x40, 0], &[]);
        raw.ends("a slot beyond all addresses");
        next_one_is_served(&mut daemon, "a slot beyond all addresses");
    }
    daemon.signal(rustix::process::Signal::TERM);
    let (status, said) = daemon.end();
    assert!(status.success(), "{status}: {said}");
}

#[test]
fn kicks_before_there_is_anything_to_kick() {
    let mut daemon = Daemon::start(&[]);
    let guest = Guest::negotiate(daemon.connect(), 1);
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    kick.write(1).unwrap();
    // No size, no addresses; then enabled, and kicked again.
    for queue in 0..4 {
        guest.frontend.set_vring_kick(queue, &kick).unwrap();
        kick.write(1).unwrap();
    }
    let mut guest = guest;
    for queue in 0..4 {
        guest.frontend.set_vring_enable(queue, true).unwrap();
        kick.write(1).unwrap();
    }
    // Set up properly now, with kicks that came before each was enabled.
    guest.stop_queues();
    guest.start_queues(1);
    guest.post_event_buffers(1);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    guest.stop_queues();
    for queue in &mut guest.queues {
        queue.kick_anyway();
    }
    drop(guest);
    next_one_is_served(&mut daemon, "kicks too early");
    ends_well(daemon);
}

#[test]
fn a_kick_of_before_is_served_when_the_queue_is_enabled() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.create(0), OK);
    for queue in 0..4 {
        guest.frontend.set_vring_enable(queue, false).unwrap();
    }
    let work = guest.submit(0, 0, 1, &[abi::Command::default()]);
    assert_eq!(guest.config().magic, abi::MAGIC);
    assert!(!guest.is_complete(0, work));
    for queue in 0..4 {
        guest.frontend.set_vring_enable(queue, true).unwrap();
    }
    assert_eq!(guest.completion(0, work).status, OK);
    daemon.terminate();
}

#[test]
fn queues_that_lie_on_each_other_or_in_nothing() {
    let mut daemon = Daemon::start(&[]);
    // All parts of all queues in one place; tables that go beyond the end of memory.
    for base in [0, MEMORY - 4096, MEMORY - 16] {
        let mut guest = Guest::negotiate(daemon.connect(), 1);
        let host = guest.regions()[0].userspace_addr + base;
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut taken = true;
        for queue in 0..4 {
            let config = VringConfigData {
                queue_max_size: 1024,
                queue_size: 1024,
                flags: 0,
                desc_table_addr: host,
                used_ring_addr: host,
                avail_ring_addr: host,
                log_addr: None,
            };
            guest.write(base, &[0xff_u8; 16]);
            let frontend = &mut guest.frontend;
            // Some are refused, which ends the connection.
            taken = taken
                && frontend.set_vring_num(queue, 1024).is_ok()
                && frontend.set_vring_base(queue, 0).is_ok()
                && frontend.set_vring_addr(queue, &config).is_ok()
                && frontend.set_vring_call(queue, &kick).is_ok()
                && frontend.set_vring_kick(queue, &kick).is_ok()
                && frontend.set_vring_enable(queue, true).is_ok();
            kick.write(1).unwrap();
        }
        if taken {
            assert_eq!(guest.config().magic, abi::MAGIC);
        }
        drop(guest);
        next_one_is_served(&mut daemon, "queues in strange places");
    }
    ends_well(daemon);
}

/// Starts a queue at the index `base`, its available ring somewhere.
fn start_queue(guest: &mut Guest, queue: u16, base: u16, available: u64) {
    let index = usize::from(queue);
    let host = guest.regions()[0].userspace_addr;
    let area = host + u64::from(queue) * (4 << 20);
    let config = VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: QUEUE_SIZE,
        flags: 0,
        desc_table_addr: area,
        used_ring_addr: area + 0x3000,
        avail_ring_addr: host + available,
        log_addr: None,
    };
    let (kick, call) = (
        guest.queues[index].kicker(),
        guest.queues[index].call().try_clone(),
    );
    let frontend = &mut guest.frontend;
    frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
    frontend.set_vring_base(index, base).unwrap();
    frontend.set_vring_addr(index, &config).unwrap();
    frontend.set_vring_call(index, &call.unwrap()).unwrap();
    frontend.set_vring_kick(index, &kick).unwrap();
    frontend.set_vring_enable(index, true).unwrap();
}

/// The entry that comes next cannot be read, though the index says that there is one. Nobody is kept busy with it, and
/// above all not under a lock.
#[test]
fn available_rings_that_end_outside_of_memory() {
    let mut daemon = Daemon::start(&[]);
    let pid = rustix::process::Pid::from_child(&daemon.child);
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    // In ticks of a hundredth of a second.
    let spent = || -> u64 {
        let stat = std::fs::read_to_string(&stat).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    for queue in 0..4 {
        let mut guest = Guest::connect(&mut daemon, 1);
        assert_eq!(guest.create(0), OK);
        guest.frontend.get_vring_base(usize::from(queue)).unwrap();
        // Its flags, its index, two entries.
        guest.write(MEMORY - 8, &[0_u16, 3, 0, 0]);
        start_queue(&mut guest, queue, 2, MEMORY - 8);
        if queue != abi::QUEUE_CONTROL {
            // The device goes on when the control queue does.
            let base = guest.frontend.get_vring_base(0).unwrap() as u16;
            start_queue(&mut guest, abi::QUEUE_CONTROL, base, 0x2000);
        }
        guest.queues[usize::from(queue)].kick_anyway();
        if queue == abi::QUEUE_EVENT {
            // There is something to be told.
            guest.submit(0, 0, 1, &[increments(VA, 1)]);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        let before = spent();
        std::thread::sleep(std::time::Duration::from_millis(500));
        let ticks = spent() - before;
        assert!(ticks < 10, "queue {queue}: {ticks} ticks in half a second");
        drop(guest);
        next_one_is_served(&mut daemon, "an available ring that ends outside of memory");
    }
    ends_well(daemon);
}

#[test]
fn a_queue_of_a_size_that_none_can_have_is_refused() {
    let mut daemon = Daemon::start(&[]);
    for (size, refused) in [(100, true), (3, true), (64, false)] {
        let guest = Guest::negotiate(daemon.connect(), 1);
        let host = guest.regions()[0].userspace_addr;
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: host,
            used_ring_addr: host + 0x3000,
            avail_ring_addr: host + 0x2000,
            log_addr: None,
        };
        let frontend = &guest.frontend;
        let taken = frontend
            .set_vring_num(0, size)
            .and_then(|()| frontend.set_vring_addr(0, &config));
        assert_eq!(taken.is_err(), refused, "{size}");
    }
    next_one_is_served(&mut daemon, "sizes that none can have");
    ends_well(daemon);
}

#[test]
fn descriptors_that_block_keep_nobody() {
    let mut daemon = Daemon::start(&[]);
    // A counter that is full: a store to it would wait until somebody has read it.
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    let mut guest = Guest::connect(&mut daemon, 1);
    for queue in 0..4 {
        guest.frontend.set_vring_call(queue, &full).unwrap();
    }
    let ring = usize::from(abi::QUEUE_FIRST_RING);
    for n in 1..=3 {
        guest.queues[0].send(&[1], 16);
        guest.queues[ring].send(&[1], 48);
        until("the queues to be served", || {
            (guest.queues[0].came_back() == n && guest.queues[ring].came_back() == n).then_some(())
        });
    }
    drop(guest);
    next_one_is_served(&mut daemon, "a call that blocks");

    // A kick whose events somebody else takes, so that there is nothing when the daemon reads it.
    let (ours, theirs) = UnixStream::pair().unwrap();
    // SAFETY: The descriptor is that of the socket, which gives it up.
    let kick = unsafe { EventFd::from_raw_fd(theirs.into_raw_fd()) };
    let mut guest = Guest::connect(&mut daemon, 1);
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.frontend.set_vring_kick(0, &kick).unwrap();
    guest.frontend.set_vring_enable(0, true).unwrap();
    // Half a kick: the daemon waits for the rest of it, or does not.
    rustix::io::write(&ours, &[1, 2, 3]).unwrap();
    assert_eq!(guest.config().magic, abi::MAGIC);
    drop(guest);
    next_one_is_served(&mut daemon, "a kick that blocks");
    ends_well(daemon);
}

#[test]
fn frontends_that_vanish_midway() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let memory = memory(1 << 20);
    let kick = rustix::event::eventfd(1, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    const BASE: u64 = 0x7fff_0000_0000;
    const NUMBER: u64 = 1 << 32;
    // How far it gets, one message more each time.
    for steps in 0..=12 {
        let raw = Raw::connect(&mut daemon);
        let all: [&dyn Fn(); 12] = [
            &|| raw.negotiate(),
            &|| raw.send(SET_MEM_TABLE, &[1, 0, 1 << 20, BASE, 0], &[memory.as_fd()]),
            &|| raw.send(SET_VRING_NUM, &[NUMBER * 128], &[]),
            &|| raw.send(SET_VRING_BASE, &[0], &[]),
            &|| raw.send(SET_VRING_ADDR, &[0, BASE, BASE + 0x2000, BASE + 0x1000, 0], &[]),
            &|| raw.send(SET_VRING_CALL, &[0], &[kick.as_fd()]),
            &|| raw.send(SET_VRING_KICK, &[0], &[kick.as_fd()]),
            &|| raw.send(SET_VRING_ENABLE, &[NUMBER], &[]),
            &|| raw.send(REM_MEM_REG, &[0, 0, 1 << 20, BASE, 0], &[]),
            &|| raw.send(RESET_DEVICE, &[], &[]),
            &|| raw.send(GET_VRING_BASE, &[0], &[]),
            &|| raw.send_as(SET_FEATURES, 1, 8, &[1], &[]),
        ];
        for step in all.iter().take(steps) {
            step();
        }
        // Half of them wait for the daemon's answers, half go at once.
        if steps % 2 == 0 {
            drop(raw);
        } else {
            raw.ends("a frontend that vanished");
        }
        next_one_is_served(&mut daemon, &format!("{steps} steps"));
    }
    // With work under way.
    for _ in 0..5 {
        let mut guest = Guest::connect(&mut daemon, 1);
        assert_eq!(guest.create(0), OK);
        assert_eq!(guest.map(0, VA, &[ALL | FREE]), OK);
        guest.submit(0, 0, 1, &[increments(VA, u32::MAX)]);
        until("the engine to be at work", || {
            (guest.read::<u64>(FREE) > 1000).then_some(())
        });
        let memory = guest.memory.clone();
        drop(guest);
        next_one_is_served(&mut daemon, "a frontend with work under way");
        // Nothing of it goes on.
        use vm_memory::{Bytes, GuestAddress};
        let count = || memory.read_obj::<u64>(GuestAddress(FREE)).unwrap();
        let counted = count();
        assert!((0..1000).all(|_| count() == counted));
    }
    ends_well(daemon);
}

/// A driver that makes requests without end keeps the daemon from nothing, even when its frontend has been cut
/// off and it does not know.
#[test]
fn a_guest_that_never_pauses_does_not_keep_the_daemon_from_ending() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    // The available index runs away from the device's all the time; whatever it takes is a bad chain.
    struct Stop<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (memory, stop) = (guest.memory.clone(), &stop);
        let _stop = Stop(stop);
        for queue in [abi::QUEUE_CONTROL, abi::QUEUE_INVALIDATE, abi::QUEUE_FIRST_RING] {
            let indices = guest.queues[usize::from(queue)].indices();
            let kick = guest.queues[usize::from(queue)].kicker();
            let memory = memory.clone();
            scope.spawn(move || {
                use std::sync::atomic::Ordering;
                use vm_memory::{Bytes, GuestAddress};
                let (available, used) = indices;
                let mut last = 0;
                while !stop.load(Ordering::Relaxed) {
                    // As many as the queue can hold, as soon as one has been used.
                    let used: u16 = memory.load(GuestAddress(used), Ordering::Acquire).unwrap();
                    let next = used.wrapping_add(QUEUE_SIZE);
                    memory
                        .store(next, GuestAddress(available), Ordering::Release)
                        .unwrap();
                    // It may have gone to sleep.
                    if used == last {
                        kick.write(1).unwrap();
                    }
                    last = next;
                }
            });
        }
        until("chains to be taken", || {
            (guest.queues[0].came_back() > QUEUE_SIZE).then_some(())
        });
        // It is not asked to end by the frontend, which is still there.
        daemon.signal(rustix::process::Signal::TERM);
        let (status, said) = daemon.end();
        assert!(status.success(), "{said}");
        assert!(said.lines().count() <= 10, "it said much: {said}");
    });
}

#[test]
fn many_frontends_at_a_time_have_their_turns() {
    let mut daemon = Daemon::start(&[]);
    let first = Guest::connect(&mut daemon, 1);
    let others: Vec<_> = (0..5).map(|_| daemon.connect()).collect();
    drop(first);
    for stream in others {
        let mut guest = Guest::on(stream, 1);
        assert_eq!(guest.create(0), OK);
    }
    daemon.terminate();
}
