// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The whole device behind a vhost-user frontend that says, and a driver that writes, whatever it likes.
//!
//! What has to hold: nothing panics, and when the frontend goes everything of the connection comes to its end.
//!
//! The frontend writes its messages itself: one that checks them would not send the interesting ones. Of memory it
//! tells the truth: a file that is shorter than what is mapped of it ends every process that touches the rest.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use arbitrary::Unstructured;
use pinion_abi as abi;
use pinion_device::gpu::Settings;
use pinion_device::transport::Backend;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;

use crate::shape::{self, MEMORY, Odds};

const RINGS: u16 = 2;
const QUEUES: u16 = abi::QUEUE_FIRST_RING + RINGS;
/// Descriptors of a queue.
const SIZE: u16 = 64;
/// The queues, one after the other, and what they take.
const QUEUE_AREA: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Buffers, one for each descriptor of each queue.
const BUFFERS: u64 = 0x10_0000;
const BUFFER: u64 = 0x1800;
/// Where the frontend has the memory.
const USER: u64 = 0x10_0000_0000;
const MAX_STEPS: usize = 120;

/// Messages of vhost-user, and a bit of their flags.
mod message {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_OWNER: u32 = 3;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const GET_QUEUE_NUM: u32 = 17;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const GET_CONFIG: u32 = 24;
    pub(super) const RESET_DEVICE: u32 = 34;
    pub(super) const ADD_MEM_REG: u32 = 37;
    pub(super) const REM_MEM_REG: u32 = 38;
    pub(super) const VERSION: u32 = 1;
    pub(super) const NEED_REPLY: u32 = 8;
}

/// Features: version 1, event index, and the protocol's.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 30;
/// Protocol features: queues, replies, configuration, reset, memory slots.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15;

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap_or_else(|error| panic!("{error}"))
}

/// The device, as the daemon sets it up for one connection.
struct Device {
    daemon: VhostUserDaemon<Arc<Backend>>,
    backend: Arc<Backend>,
    stop: OwnedFd,
}

/// A socket to connect to, for the life of the process.
fn socket() -> &'static (tempfile::TempDir, UnixListener) {
    static SOCKET: OnceLock<(tempfile::TempDir, UnixListener)> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let listener =
            UnixListener::bind(directory.path().join("socket")).unwrap_or_else(|error| panic!("{error}"));
        (directory, listener)
    })
}

impl Device {
    fn start(settings: Settings) -> (Self, UnixStream) {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Backend::new(settings, Arc::default(), memory.clone());
        let backend = Arc::new(backend.unwrap_or_else(|error| panic!("{error}")));
        let stop_event = backend.stop_event();
        let stop = new_eventfd();
        let mut daemon = VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory)
            .unwrap_or_else(|error| panic!("{error}"));
        for worker in daemon.get_epoll_handlers() {
            worker
                .register_listener(stop.as_raw_fd(), EventSet::IN, stop_event)
                .unwrap_or_else(|error| panic!("{error}"));
        }
        let (directory, listener) = socket();
        let stream =
            UnixStream::connect(directory.path().join("socket")).unwrap_or_else(|error| panic!("{error}"));
        let listener = listener.try_clone().unwrap_or_else(|error| panic!("{error}"));
        daemon
            .start(&mut Listener::from(listener))
            .unwrap_or_else(|error| panic!("{error}"));
        let device = Self {
            daemon,
            backend,
            stop,
        };
        (device, stream)
    }

    /// The frontend has gone.
    fn end(mut self) {
        // However the connection has ended.
        let _ = self.daemon.wait();
        self.backend.close();
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }
}

/// A frontend, and the driver in its guest.
struct Guest {
    stream: UnixStream,
    memory: GuestMemoryMmap,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    available: Vec<u16>,
    faults: u64,
}

impl Guest {
    fn new(stream: UnixStream) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)
            .unwrap_or_else(|error| panic!("{error}"));
        rustix::fs::ftruncate(&file, MEMORY).unwrap_or_else(|error| panic!("{error}"));
        let file = FileOffset::new(std::fs::File::from(file), 0);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(file))])
                .unwrap_or_else(|error| panic!("{error}"));
        // A device that takes what is said for the rest of something else does not answer.
        let timeout = Some(Duration::from_millis(20));
        stream
            .set_read_timeout(timeout)
            .unwrap_or_else(|error| panic!("{error}"));
        stream
            .set_write_timeout(timeout)
            .unwrap_or_else(|error| panic!("{error}"));
        Self {
            stream,
            memory,
            kicks: (0..QUEUES).map(|_| new_eventfd()).collect(),
            calls: (0..QUEUES).map(|_| new_eventfd()).collect(),
            available: vec![0; usize::from(QUEUES)],
            faults: 4,
        }
    }

    /// Sends a message; if the device has hung up, nothing happens.
    fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = [request, flags, body.len() as u32].map(u32::to_le_bytes).concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        let _ = sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL);
        self.drain();
    }

    fn say(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(request, message::VERSION, body, fds);
    }

    /// Reads what there is.
    fn drain(&self) {
        let mut bytes = [0; 512];
        while rustix::net::recv(&self.stream, &mut bytes[..], rustix::net::RecvFlags::DONTWAIT)
            .is_ok_and(|(count, _)| count > 0)
        {}
    }

    /// Waits until everything that was said has been heard, if it still listens.
    fn catch_up(&mut self) {
        self.drain();
        self.say(message::GET_QUEUE_NUM, &[], &[]);
        let mut answer = [0; 20];
        let _ = self.stream.read_exact(&mut answer);
    }

    fn memory_file(&self) -> BorrowedFd<'_> {
        let region = self.memory.iter().next().and_then(|region| region.file_offset());
        region.map_or_else(|| self.stream.as_fd(), |file| file.file().as_fd())
    }

    /// A region of the memory table; the memory is cut into pieces so that there can be several.
    fn region(&self, index: u64) -> Vec<u8> {
        let size = MEMORY / 4;
        [index * size, size, USER + index * size, index * size]
            .map(u64::to_le_bytes)
            .concat()
    }

    fn set_memory(&self, count: u64) {
        let mut body = [count as u32, 0].map(u32::to_le_bytes).concat();
        (0..count).for_each(|index| body.extend(self.region(index)));
        let files = vec![self.memory_file(); count as usize];
        self.say(message::SET_MEM_TABLE, &body, &files);
    }

    fn state(&self, request: u32, queue: u16, number: u32) {
        let body = [u32::from(queue), number].map(u32::to_le_bytes).concat();
        self.say(request, &body, &[]);
    }

    fn set_addresses(&self, queue: u16, shift: u64) {
        let base = USER + u64::from(queue) * QUEUE_AREA + shift;
        let mut body = [u32::from(queue), 0].map(u32::to_le_bytes).concat();
        body.extend(
            [base, base + USED, base + AVAILABLE, 0]
                .map(u64::to_le_bytes)
                .concat(),
        );
        self.say(message::SET_VRING_ADDR, &body, &[]);
    }

    fn start_queue(&self, queue: u16, base: u32) {
        let index = usize::from(queue);
        self.state(message::SET_VRING_NUM, queue, SIZE.into());
        self.set_addresses(queue, 0);
        self.state(message::SET_VRING_BASE, queue, base);
        let body = u64::from(queue).to_le_bytes();
        self.say(message::SET_VRING_CALL, &body, &[self.calls[index].as_fd()]);
        self.say(message::SET_VRING_KICK, &body, &[self.kicks[index].as_fd()]);
        self.state(message::SET_VRING_ENABLE, queue, 1);
    }

    /// As every frontend does.
    fn set_up(&mut self) {
        self.say(message::SET_OWNER, &[], &[]);
        self.say(message::GET_FEATURES, &[], &[]);
        self.say(message::SET_FEATURES, &FEATURES.to_le_bytes(), &[]);
        self.say(message::SET_PROTOCOL_FEATURES, &PROTOCOL.to_le_bytes(), &[]);
        self.set_memory(4);
        (0..QUEUES).for_each(|queue| self.start_queue(queue, 0));
        self.catch_up();
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // What is outside goes nowhere.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    fn describe(&self, queue: u16, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = u64::from(queue) * QUEUE_AREA + 16 * u64::from(index);
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    fn offer(&mut self, queue: u16, head: u16) {
        let available = &mut self.available[usize::from(queue)];
        let area = u64::from(queue) * QUEUE_AREA + AVAILABLE;
        let slot = area + 4 + 2 * u64::from(*available % SIZE);
        *available = available.wrapping_add(1);
        let index = available.to_le_bytes();
        self.put(slot, &head.to_le_bytes());
        self.put(area + 2, &index);
    }

    fn kick(&self, queue: u16) {
        let _ = rustix::io::write(&self.kicks[usize::from(queue)], &1_u64.to_ne_bytes());
    }

    /// A chain as it should be.
    fn chain(&mut self, queue: u16, bytes: &[u8], room: u32) {
        let head = self.available[usize::from(queue)] % (SIZE / 2) * 2;
        let buffer = BUFFERS + (u64::from(queue) * u64::from(SIZE) + u64::from(head)) * BUFFER;
        let bytes = &bytes[..bytes.len().min(BUFFER as usize)];
        self.put(buffer, bytes);
        if bytes.is_empty() {
            self.describe(queue, head, buffer, room, 2, 0);
        } else {
            self.describe(queue, head, buffer, bytes.len() as u32, 1, head + 1);
            self.describe(queue, head + 1, buffer + BUFFER, room, 2, 0);
        }
        self.offer(queue, head);
        self.kick(queue);
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let queue = u.int_in_range(0..=QUEUES - 1)?;
        match u
            .arbitrary::<Odds>()?
            .of(&[60, 50, 15, 15, 15, 15, 10, 10, 15, 20, 10])
        {
            0 => {
                let request = shape::request(u, self.faults)?;
                self.chain(abi::QUEUE_CONTROL, &request, size_of::<abi::Response>() as u32);
            }
            1 => {
                let ring = abi::QUEUE_FIRST_RING + queue % RINGS;
                let submission = shape::submission(u, u64::from(self.available[usize::from(ring)]))?;
                self.chain(ring, &submission, size_of::<abi::Completion>() as u32);
            }
            2 => {
                let request = shape::invalidation(u)?;
                self.chain(abi::QUEUE_INVALIDATE, &request, size_of::<abi::Response>() as u32);
            }
            3 => self.chain(abi::QUEUE_EVENT, &[], size_of::<abi::EventRecord>() as u32),
            4 => {
                let index = u.int_in_range(0..=SIZE - 1)?;
                let address = if u.arbitrary()? {
                    u.arbitrary()?
                } else {
                    BUFFERS.wrapping_add(shape::length(u)?)
                };
                let next = u.int_in_range(0..=SIZE)?;
                self.describe(
                    queue,
                    index,
                    address,
                    u.arbitrary()?,
                    u.arbitrary::<u16>()? & 7,
                    next,
                );
                if u.arbitrary()? {
                    self.offer(queue, index);
                    self.kick(queue);
                }
            }
            5 => {
                let index = if u.arbitrary()? {
                    u.arbitrary()?
                } else {
                    self.available[usize::from(queue)].wrapping_add(u.int_in_range(0..=SIZE)?)
                };
                self.available[usize::from(queue)] = index;
                self.put(
                    u64::from(queue) * QUEUE_AREA + AVAILABLE + 2,
                    &index.to_le_bytes(),
                );
                self.kick(queue);
            }
            6 => self.kick(queue),
            7 => {
                let at = u.int_in_range(0..=u64::from(QUEUES) * QUEUE_AREA)?;
                let bytes = u.arbitrary::<&[u8]>()?;
                self.put(at, bytes);
            }
            8 => {
                let request = u.int_in_range(0..=50)?;
                let flags = if u.ratio(1, 4)? {
                    u.arbitrary()?
                } else {
                    message::VERSION | message::NEED_REPLY
                };
                let body = u.arbitrary::<&[u8]>()?;
                let fds: Vec<_> = (0..u.int_in_range(0..=3)?).map(|_| new_eventfd()).collect();
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                self.send(request, flags, body, &fds);
            }
            9 => self.good_message(u, queue)?,
            _ => std::thread::sleep(Duration::from_micros(u.int_in_range(0..=300)?)),
        }
        Ok(())
    }

    fn good_message(&mut self, u: &mut Unstructured<'_>, queue: u16) -> arbitrary::Result<()> {
        match u.int_in_range(0..=12)? {
            0 => self.state(message::SET_VRING_ENABLE, queue, u.int_in_range(0..=1)?),
            1 => self.state(message::GET_VRING_BASE, queue, 0),
            2 => self.state(message::SET_VRING_BASE, queue, u.arbitrary::<u16>()?.into()),
            3 => self.state(message::SET_VRING_NUM, queue, u.int_in_range(0..=1025)?),
            4 => self.set_addresses(queue, u.arbitrary::<u32>()?.into()),
            5 => self.start_queue(queue, u32::from(self.available[usize::from(queue)])),
            6 => self.set_memory(u.int_in_range(0..=4)?),
            7 | 8 => {
                // A 64-bit padding, then the region.
                let region = [vec![0; 8], self.region(u.int_in_range(0..=3)?)].concat();
                let request = if u.arbitrary()? {
                    message::ADD_MEM_REG
                } else {
                    message::REM_MEM_REG
                };
                self.say(request, &region, &[self.memory_file()]);
            }
            9 => self.say(message::RESET_DEVICE, &[], &[]),
            10 => {
                let (offset, size): (u32, u8) = u.arbitrary()?;
                let mut body = [offset, u32::from(size), 0].map(u32::to_le_bytes).concat();
                body.resize(body.len() + usize::from(size), 0);
                self.say(message::GET_CONFIG, &body, &[]);
            }
            11 => {
                // As a driver that is loaded again.
                for queue in 0..QUEUES {
                    self.state(message::SET_VRING_ENABLE, queue, 0);
                    self.state(message::GET_VRING_BASE, queue, 0);
                }
                self.put(0, &vec![0; usize::from(QUEUES) * QUEUE_AREA as usize]);
                self.available.fill(0);
                (0..QUEUES).for_each(|queue| self.start_queue(queue, 0));
            }
            _ => self.catch_up(),
        }
        Ok(())
    }
}

/// Does what `data` says.
pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(kind) = u.arbitrary::<u8>() else { return };
    let settings = Settings {
        vram: MEMORY,
        rings: RINGS,
        engines: 1 + u16::from(kind & 1),
        watchdog: (kind & 2 != 0).then_some(Duration::from_millis(5)),
        ..Settings::default()
    };
    let (device, stream) = Device::start(settings);
    let mut guest = Guest::new(stream);
    if kind & 0x1c != 0 {
        guest.set_up();
    }
    for _ in 0..MAX_STEPS {
        if u.is_empty() || guest.step(&mut u).is_err() {
            break;
        }
    }
    if kind & 0x20 != 0 {
        guest.catch_up();
    }
    drop(guest);
    device.end();
}
