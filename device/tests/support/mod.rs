// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A small frontend and driver: what QEMU and the guest would do, without either.
//!
//! It offers what a driver needs, in the driver's words: make a chain available, kick, wait for the
//! used ring. Every wait has an end, and says what it waited for.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "shared by several test programs, none of which uses all of it"
)]

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use pinion_abi as abi;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running daemon.
pub struct Daemon {
    pub child: Child,
    pub socket: PathBuf,
    /// Where the control socket is, for tests that have one.
    pub control: PathBuf,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// In its sandbox, as all but a few are.
    pub fn start(arguments: &[&str]) -> Self {
        Self::spawn(|command, _| {
            command.arg("--sandbox").args(arguments);
        })
    }

    pub fn without_sandbox(arguments: &[&str]) -> Self {
        Self::spawn(|command, _| {
            command.args(arguments);
        })
    }

    /// With a control socket too.
    pub fn with_control(arguments: &[&str]) -> Self {
        let mut daemon = Self::spawn(|command, control| {
            command.arg("--sandbox").args(arguments);
            command.arg("--control-path").arg(control);
        });
        connect(&daemon.control, &mut daemon.child);
        daemon
    }

    fn spawn(add: impl FnOnce(&mut Command, &Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let control = directory.path().join("control");
        let mut command = Command::new(env!("CARGO_BIN_EXE_pinion-device"));
        command.arg("--socket-path").arg(&socket);
        add(&mut command, &control);
        if !command.get_args().any(|argument| argument == "--vram") {
            command.args(["--vram", "64M"]);
        }
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        Self {
            child,
            socket,
            control,
            directory,
        }
    }

    /// Sends a line to the control socket. What is answered.
    pub fn ask(&self, line: &str) -> serde_json::Value {
        use std::io::{BufRead, Write};
        let mut stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        std::io::BufReader::new(stream)
            .read_line(&mut answer)
            .unwrap_or_else(|error| panic!("waited {PATIENCE:?} for the answer to {line}: {error}"));
        serde_json::from_str(&answer).unwrap()
    }

    /// `pinion-device ctl`: its exit status, and what it said on its standard output and error.
    pub fn ctl(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_pinion-device"))
            .arg("ctl")
            .arg(&self.control)
            .args(arguments)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// Connects; the daemon may need a moment until it listens.
    pub fn connect(&mut self) -> UnixStream {
        connect(&self.socket, &mut self.child)
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end. Its exit status and what it said.
    pub fn end(mut self) -> (std::process::ExitStatus, String) {
        let status = wait_for_exit(&mut self.child);
        let mut said = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        (status, said)
    }

    /// Ends it as one should, and checks that it ends well, having said nothing.
    pub fn terminate(self) {
        self.terminate_saying(&[]);
    }

    /// The same, but it has said this: a line for each, and no more.
    pub fn terminate_saying(self, expected: &[&str]) {
        self.signal(rustix::process::Signal::TERM);
        let socket = self.socket.clone();
        let (status, said) = self.end();
        assert!(status.success(), "the daemon ended with {status}, saying: {said}");
        let lines: Vec<_> = said.lines().collect();
        let matches = lines.len() == expected.len()
            && expected
                .iter()
                .zip(&lines)
                .all(|(part, line)| line.contains(part));
        assert!(matches, "the daemon said {lines:#?}, not {expected:?}");
        assert!(!socket.exists(), "the daemon left its socket behind");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After Daemon::end there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tries until `attempt` succeeds.
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn wait_for_exit(child: &mut Child) -> std::process::ExitStatus {
    until("the daemon to end", || child.try_wait().unwrap())
}

pub fn connect(socket: &Path, child: &mut Child) -> UnixStream {
    until("the daemon to listen", || {
        if let Some(status) = child.try_wait().unwrap() {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("the daemon ended with {status}, saying: {said}");
        }
        UnixStream::connect(socket).ok()
    })
}

/// Descriptors of a queue. Those in the upper half are left to tests that write them themselves.
pub const QUEUE_SIZE: u16 = 128;
/// Size of guest memory; the queues and their buffers are in the lower half.
pub const MEMORY: u64 = 64 << 20;
/// First address that tests may use.
pub const FREE: u64 = MEMORY / 2;
const QUEUE_AREA: u64 = 4 << 20;
const READ_AREA: u64 = 32 << 10;
const WRITE_AREA: u64 = 128;
const BUFFERS: u64 = 64 << 10;

/// A split virtqueue from the driver's side.
pub struct Virtqueue {
    memory: GuestMemoryMmap,
    index: u16,
    base: u64,
    call: EventFd,
    notified: Epoll,
    kick: EventFd,
    free: Vec<u16>,
    available: u16,
    seen: u16,
    used: std::collections::HashMap<u16, u32>,
    /// How often the other side was kicked.
    pub kicks: u64,
}

/// One chain that is not back yet.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    head: u16,
    readable: bool,
}

impl Virtqueue {
    fn new(memory: &GuestMemoryMmap, index: u16) -> Self {
        let base = u64::from(index) * QUEUE_AREA;
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        let notified = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        notified
            .ctl(ControlOperation::Add, call.as_raw_fd(), event)
            .unwrap();
        let queue = Self {
            memory: memory.clone(),
            index,
            base,
            call,
            notified,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            // Two descriptors for each chain.
            free: (0..QUEUE_SIZE / 4).map(|n| 2 * n).collect(),
            available: 0,
            seen: 0,
            used: Default::default(),
            kicks: 0,
        };
        memory.write_slice(&[0; 16 << 10], GuestAddress(base)).unwrap();
        queue
    }

    fn descriptors(&self) -> u64 {
        self.base
    }
    fn driver_area(&self) -> u64 {
        self.base + 0x2000
    }
    fn device_area(&self) -> u64 {
        self.base + 0x3000
    }
    fn read_area(&self, head: u16) -> u64 {
        self.base + BUFFERS + u64::from(head / 2) * READ_AREA
    }
    fn write_area(&self, head: u16) -> u64 {
        self.base + BUFFERS + u64::from(QUEUE_SIZE / 2) * READ_AREA + u64::from(head) * WRITE_AREA
    }
    fn load16(&self, address: u64) -> u16 {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .unwrap()
    }
    fn store16(&self, address: u64, value: u16) {
        self.memory
            .store(value, GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    /// Writes one descriptor of the table.
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.descriptors() + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available, without a kick.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % QUEUE_SIZE);
        self.store16(self.driver_area() + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.store16(self.driver_area() + 2, self.available);
    }

    /// Puts any number into the available index.
    pub fn set_available_index(&mut self, index: u16) {
        self.store16(self.driver_area() + 2, index);
    }

    /// Makes a chain of `request` and `room` writable bytes available, without a kick.
    pub fn add(&mut self, request: &[u8], room: u32) -> Token {
        let head = self.free.pop().expect("a free descriptor");
        let readable = !request.is_empty();
        self.memory
            .write_slice(&[0xee; WRITE_AREA as usize], GuestAddress(self.write_area(head)))
            .unwrap();
        let second = if readable { head + 1 } else { head };
        if readable {
            self.memory
                .write_slice(request, GuestAddress(self.read_area(head)))
                .unwrap();
            let flags = u16::from(room > 0);
            self.describe(head, self.read_area(head), request.len() as u32, flags, second);
        }
        if room > 0 || !readable {
            self.describe(second, self.write_area(head), room, 2, 0);
        }
        self.offer(head);
        Token { head, readable }
    }

    /// Kicks if the device wants to be.
    pub fn kick(&mut self, since: u16) {
        fence(Ordering::SeqCst);
        let event = self.load16(self.device_area() + 4 + 8 * u64::from(QUEUE_SIZE));
        let now = self.available;
        // As in the virtio specification.
        if now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(since) {
            self.kick_anyway();
        }
    }

    pub fn kick_anyway(&mut self) {
        self.kicks += 1;
        self.kick.write(1).unwrap();
    }

    /// [`Virtqueue::add`] and kick.
    pub fn send(&mut self, request: &[u8], room: u32) -> Token {
        let since = self.available;
        let token = self.add(request, room);
        self.kick(since);
        token
    }

    /// What the device is kicked with.
    pub fn kicker(&self) -> EventFd {
        self.kick.try_clone().unwrap()
    }

    /// Where the available and the used index are.
    pub fn indices(&self) -> (u64, u64) {
        (self.driver_area() + 2, self.device_area() + 2)
    }

    /// Whether the device has notified the driver since this was asked for, or waited for, last.
    pub fn was_notified(&self) -> bool {
        self.call.read().is_ok()
    }

    fn collect(&mut self) {
        while self.load16(self.device_area() + 2) != self.seen {
            let at = self.device_area() + 4 + 8 * u64::from(self.seen % QUEUE_SIZE);
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            self.used.insert(head as u16, length);
            self.seen = self.seen.wrapping_add(1);
        }
    }

    /// Whether a chain has come back.
    pub fn is_done(&mut self, token: Token) -> bool {
        self.collect();
        self.used.contains_key(&token.head)
    }

    /// How many chains came back so far.
    pub fn came_back(&mut self) -> u16 {
        self.collect();
        self.seen
    }

    /// Waits until something new comes back, by the device's notification.
    pub fn wait_for_more(&mut self, what: &str, deadline: Instant) {
        // Ask for a notification of the next one, and look again before sleeping.
        self.store16(self.driver_area() + 4 + 2 * u64::from(QUEUE_SIZE), self.seen);
        fence(Ordering::SeqCst);
        if self.load16(self.device_area() + 2) != self.seen {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(
            !left.is_zero(),
            "waited {PATIENCE:?} for {what} (queue {})",
            self.index
        );
        let mut events = [EpollEvent::default()];
        self.notified
            .wait(left.as_millis() as i32 + 1, &mut events)
            .unwrap();
        // There may be nothing to read after a time-out.
        let _ = self.call.read();
    }

    /// Waits for a chain: how many bytes were written, and the first of them as `T`.
    pub fn wait<T: FromBytes>(&mut self, token: Token, what: &str) -> (u32, T) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.collect();
            if let Some(length) = self.used.remove(&token.head) {
                self.free.push(token.head);
                let mut bytes = vec![0; size_of::<T>()];
                self.memory
                    .read_slice(&mut bytes, GuestAddress(self.write_area(token.head)))
                    .unwrap();
                return (length, T::read_from_bytes(&bytes).ok().unwrap());
            }
            self.wait_for_more(what, deadline);
        }
    }
}

/// A connected frontend with a driver in its guest.
pub struct Guest {
    pub frontend: Frontend,
    pub memory: GuestMemoryMmap,
    pub queues: Vec<Virtqueue>,
    events: Vec<Token>,
    pub features: u64,
}

impl Guest {
    /// Negotiates and starts the queues, with a buffer for each possible event.
    pub fn connect(daemon: &mut Daemon, rings: u16) -> Self {
        Self::on(daemon.connect(), rings)
    }

    pub fn on(stream: UnixStream, rings: u16) -> Self {
        let mut guest = Self::negotiate(stream, rings);
        guest.start_queues(rings);
        guest.post_event_buffers(8);
        guest
    }

    /// Negotiates, and sets up memory, but no queues.
    pub fn negotiate(stream: UnixStream, rings: u16) -> Self {
        let count = u64::from(abi::QUEUE_FIRST_RING + rings);
        let mut frontend = Frontend::from_stream(stream, count);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        frontend.set_features(features).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        }
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, MEMORY).unwrap();
        let file = FileOffset::new(std::fs::File::from(file), 0);
        let ranges = [(GuestAddress(0), MEMORY as usize, Some(file))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let guest = Self {
            frontend,
            memory,
            queues: Vec::new(),
            events: Vec::new(),
            features,
        };
        guest.frontend.set_mem_table(&guest.regions()).unwrap();
        guest
    }

    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: self.host_address(region.start_addr().0),
                mmap_offset: 0,
                mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
            })
            .collect()
    }

    fn host_address(&self, address: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(address)).unwrap() as u64
    }

    /// Starts all queues anew, as a driver does that has just been loaded.
    pub fn start_queues(&mut self, rings: u16) {
        self.events.clear();
        self.queues = (0..abi::QUEUE_FIRST_RING + rings)
            .map(|n| Virtqueue::new(&self.memory, n))
            .collect();
        self.restart_queues(|_| 0);
    }

    /// Starts all queues where they are, each at the index that `base` says.
    pub fn restart_queues(&mut self, base: impl Fn(usize) -> u16) {
        for (index, queue) in self.queues.iter().enumerate() {
            self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
            let config = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: self.host_address(queue.descriptors()),
                used_ring_addr: self.host_address(queue.device_area()),
                avail_ring_addr: self.host_address(queue.driver_area()),
                log_addr: None,
            };
            self.frontend.set_vring_base(index, base(index)).unwrap();
            self.frontend.set_vring_addr(index, &config).unwrap();
            self.frontend.set_vring_call(index, &queue.call).unwrap();
            self.frontend.set_vring_kick(index, &queue.kick).unwrap();
        }
        for index in 0..self.queues.len() {
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Stops all queues, as QEMU does when the driver resets the device or the machine is paused. Says
    /// where each stopped.
    pub fn stop_queues(&mut self) -> Vec<u16> {
        for index in 0..self.queues.len() {
            self.frontend.set_vring_enable(index, false).unwrap();
        }
        (0..self.queues.len())
            .map(|index| self.frontend.get_vring_base(index).unwrap() as u16)
            .collect()
    }

    pub fn post_event_buffers(&mut self, count: usize) {
        let queue = &mut self.queues[usize::from(abi::QUEUE_EVENT)];
        for _ in 0..count {
            self.events
                .push(queue.send(&[], size_of::<abi::EventRecord>() as u32));
        }
    }

    pub fn config(&mut self) -> abi::Config {
        let size = size_of::<abi::Config>();
        let (_, bytes) = self
            .frontend
            .get_config(0, size as u32, VhostUserConfigFlags::empty(), &vec![0; size])
            .unwrap();
        abi::Config::read_from_bytes(&bytes).unwrap()
    }

    /// The next event.
    pub fn event(&mut self) -> abi::EventRecord {
        let token = self.events.remove(0);
        let queue = &mut self.queues[usize::from(abi::QUEUE_EVENT)];
        let (length, record) = queue.wait(token, "an event");
        assert_eq!(length as usize, size_of::<abi::EventRecord>());
        self.post_event_buffers(1);
        record
    }

    pub fn has_event(&mut self) -> bool {
        let token = self.events[0];
        self.queues[usize::from(abi::QUEUE_EVENT)].is_done(token)
    }

    pub fn control_send(&mut self, request: &[u8]) -> Token {
        let room = size_of::<abi::Response>() as u32;
        self.queues[usize::from(abi::QUEUE_CONTROL)].send(request, room)
    }

    pub fn control_wait(&mut self, token: Token, what: &str) -> abi::Response {
        let (length, response) = self.queues[usize::from(abi::QUEUE_CONTROL)].wait(token, what);
        assert_eq!(length as usize, size_of::<abi::Response>(), "{what}");
        response
    }

    /// Sends a request and waits for its status.
    pub fn control(&mut self, request: &[u8]) -> u32 {
        let token = self.control_send(request);
        self.control_wait(token, "the response to a request").status
    }

    pub fn simple(&mut self, opcode: u16, context: u32) -> u32 {
        self.control(
            abi::RequestHeader {
                opcode,
                flags: 0,
                context,
            }
            .as_bytes(),
        )
    }

    pub fn create(&mut self, context: u32) -> u32 {
        self.simple(abi::REQUEST_CONTEXT_CREATE, context)
    }

    pub fn map(&mut self, context: u32, va: u64, entries: &[u64]) -> u32 {
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
        self.control(&[map.as_bytes(), entries.as_bytes()].concat())
    }

    pub fn fault_request(opcode: u16, context: u32, fault: u64) -> abi::FaultRequest {
        abi::FaultRequest {
            header: abi::RequestHeader {
                opcode,
                flags: 0,
                context,
            },
            fault,
        }
    }

    /// REPLAY: how many accesses got through.
    pub fn replay(&mut self, context: u32, fault: u64) -> Result<u64, u32> {
        let token = self.control_send(Self::fault_request(abi::REQUEST_REPLAY, context, fault).as_bytes());
        let response = self.control_wait(token, "the response to REPLAY");
        if response.status == abi::STATUS_OK {
            Ok(response.value)
        } else {
            Err(response.status)
        }
    }

    pub fn cancel(&mut self, context: u32, fault: u64) -> u32 {
        self.control(Self::fault_request(abi::REQUEST_CANCEL, context, fault).as_bytes())
    }

    pub fn invalidate(&mut self, context: u32, va: u64, length: u64, flags: u16) -> u32 {
        let header = abi::RequestHeader {
            opcode: abi::REQUEST_INVALIDATE,
            flags,
            context,
        };
        let request = abi::InvalidateRequest { header, va, length };
        let queue = &mut self.queues[usize::from(abi::QUEUE_INVALIDATE)];
        let token = queue.send(request.as_bytes(), size_of::<abi::Response>() as u32);
        let (_, response): (_, abi::Response) = queue.wait(token, "the response to INVALIDATE");
        response.status
    }

    pub fn submit(&mut self, ring: u16, context: u32, sequence: u64, commands: &[abi::Command]) -> Token {
        let bytes = submission(context, sequence, commands);
        let queue = &mut self.queues[usize::from(abi::QUEUE_FIRST_RING + ring)];
        queue.send(&bytes, size_of::<abi::Completion>() as u32)
    }

    pub fn is_complete(&mut self, ring: u16, token: Token) -> bool {
        self.queues[usize::from(abi::QUEUE_FIRST_RING + ring)].is_done(token)
    }

    pub fn completion(&mut self, ring: u16, token: Token) -> abi::Completion {
        let queue = &mut self.queues[usize::from(abi::QUEUE_FIRST_RING + ring)];
        let (length, completion) = queue.wait(token, "a completion");
        assert_eq!(length as usize, size_of::<abi::Completion>());
        completion
    }

    pub fn run(&mut self, context: u32, sequence: u64, commands: &[abi::Command]) -> abi::Completion {
        let token = self.submit(0, context, sequence, commands);
        self.completion(0, token)
    }

    pub fn read<T: FromBytes + FromZeros + IntoBytes>(&self, address: u64) -> T {
        let mut value = T::new_zeroed();
        self.memory
            .read_slice(value.as_mut_bytes(), GuestAddress(address))
            .unwrap();
        value
    }

    pub fn write<T: IntoBytes + Immutable>(&self, address: u64, value: &T) {
        self.memory
            .write_slice(value.as_bytes(), GuestAddress(address))
            .unwrap();
    }
}

pub fn submission(context: u32, sequence: u64, commands: &[abi::Command]) -> Vec<u8> {
    let count = commands.len() as u32;
    let header = abi::SubmitHeader {
        context,
        count,
        sequence,
        flags: 0,
        reserved: 0,
    };
    [header.as_bytes(), commands.as_bytes()].concat()
}

/// READ, WRITE and ATOMIC, to a system page.
pub const ALL: u64 = abi::PTE_VALID | abi::PTE_READ | abi::PTE_WRITE | abi::PTE_ATOMIC;
/// READ and WRITE, to a system page.
pub const RW: u64 = abi::PTE_VALID | abi::PTE_READ | abi::PTE_WRITE;

/// `repeat` increments of the 64-bit number at `va`.
pub fn increments(va: u64, repeat: u32) -> abi::Command {
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

pub fn copy(destination: u64, source: u64, length: u64) -> abi::Command {
    abi::Command {
        opcode: abi::COMMAND_COPY,
        address: destination,
        source,
        length,
        ..Default::default()
    }
}
