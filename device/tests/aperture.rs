// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The aperture, with a real frontend at the other end of the backend channel.

mod support;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use parking_lot::Mutex;
use pinion_abi as abi;
use support::*;
use vhost::vhost_user::message::VhostUserMMap;
use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler};
use zerocopy::IntoBytes;

const OK: u32 = abi::STATUS_OK;
const VA: u64 = 0x7000_0000_0000;
const SIZE: u64 = 1 << 20;

/// What the device asks the frontend for.
#[derive(Debug)]
enum Asked {
    Map(VhostUserMMap, File),
    Unmap(VhostUserMMap),
}

struct Handler {
    asked: Sender<Asked>,
    verdict: Mutex<Receiver<bool>>,
}

impl Handler {
    fn ask(&self, asked: Asked) -> HandlerResult<u64> {
        // When the test is over nobody is there any more.
        let verdict = self.asked.send(asked).is_ok().then(|| self.verdict.lock().recv());
        match verdict {
            Some(Ok(true)) => Ok(0),
            _ => Err(io::Error::other("no")),
        }
    }
}

impl VhostUserFrontendReqHandler for Handler {
    fn shmem_map(&self, request: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::options().read(true).write(true).open(path)?;
        self.ask(Asked::Map(*request, file))
    }

    fn shmem_unmap(&self, request: &VhostUserMMap) -> HandlerResult<u64> {
        self.ask(Asked::Unmap(*request))
    }
}

/// The frontend's end of the channel.
struct Frontend {
    asked: Receiver<Asked>,
    verdict: Sender<bool>,
}

impl Frontend {
    /// Hands the daemon a channel.
    fn attach(guest: &mut Guest) -> Self {
        let (asked_by, asked) = channel();
        let (verdict, verdicts) = channel();
        let handler = Handler {
            asked: asked_by,
            verdict: Mutex::new(verdicts),
        };
        let mut handler = FrontendReqHandler::new(Arc::new(handler)).unwrap();
        handler.set_reply_ack_flag(true);
        guest
            .frontend
            .set_backend_request_fd(&handler.get_tx_raw_fd())
            .unwrap();
        // It keeps the other end open itself, and so never ends.
        std::thread::spawn(move || {
            loop {
                let _ = handler.handle_request();
            }
        });
        Self { asked, verdict }
    }

    fn next(&self) -> Asked {
        self.asked
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("waited {PATIENCE:?} for a request to the frontend"))
    }

    /// Waits for SHMEM_MAP, without answering it.
    fn map(&self) -> File {
        match self.next() {
            Asked::Map(request, file) => {
                let VhostUserMMap {
                    shmid,
                    fd_offset,
                    shm_offset,
                    len,
                    flags,
                    ..
                } = request;
                assert_eq!((shmid, fd_offset, shm_offset, len, flags), (0, 0, 0, SIZE, 1));
                file
            }
            other => panic!("{other:?}"),
        }
    }

    fn answer(&self, verdict: bool) {
        self.verdict.send(verdict).unwrap();
    }

    fn asks_nothing(&self) -> bool {
        self.asked.try_recv().is_err()
    }
}

fn start(daemon: &mut Daemon) -> (Guest, Frontend) {
    let mut guest = Guest::negotiate(daemon.connect(), 1);
    let frontend = Frontend::attach(&mut guest);
    guest.start_queues(1);
    guest.post_event_buffers(2);
    (guest, frontend)
}

fn ping() -> abi::RequestHeader {
    abi::RequestHeader {
        opcode: abi::REQUEST_PING,
        flags: 0,
        context: 0,
    }
}

#[test]
fn engines_and_processors_see_the_same_memory() {
    use std::os::unix::fs::FileExt;
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let (mut guest, frontend) = start(&mut daemon);
    let regions = guest.frontend.get_shmem_config().unwrap();
    assert_eq!((regions.nregions, regions.memory_sizes[0]), (1, SIZE));
    // QEMU crashes if there are slots too.
    assert!(guest.frontend.get_max_mem_slots().is_err());
    let config = guest.config();
    assert_eq!(
        (config.features, config.aperture_size),
        (abi::FEATURE_APERTURE, SIZE)
    );

    let file = frontend.map();
    frontend.answer(true);
    assert_eq!(guest.create(0), OK);
    assert_eq!(guest.map(0, VA, &[RW | abi::PTE_VRAM | 0x5000, RW | FREE]), OK);
    // The processor's stores are seen by a COPY ...
    file.write_all_at(b"from the processor", 0x5010).unwrap();
    assert_eq!(guest.run(0, 1, &[copy(VA + 0x1000, VA + 0x10, 18)]).status, OK);
    assert_eq!(&guest.read::<[u8; 18]>(FREE), b"from the processor");
    // ... and the engine's by the processor.
    let fill = abi::Command {
        opcode: abi::COMMAND_FILL,
        width: 4,
        address: VA + 0x100,
        length: 64,
        operand: 0x6665_6564,
        ..Default::default()
    };
    assert_eq!(guest.run(0, 2, &[fill]).status, OK);
    let mut bytes = [0; 72];
    file.read_exact_at(&mut bytes, 0x50fc).unwrap();
    assert_eq!(bytes[..8], *b"\0\0\0\0deef");
    assert_eq!(bytes[64..], *b"deef\0\0\0\0");
    assert!(frontend.asks_nothing());
    daemon.terminate();
}

#[test]
fn the_first_request_is_answered_when_the_aperture_is_there() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let (mut guest, frontend) = start(&mut daemon);
    let first = guest.control_send(ping().as_bytes());
    frontend.map();
    // Only the control queue waits for it.
    assert_eq!(guest.invalidate(0, 0, 0, 0), abi::STATUS_NO_CONTEXT);
    assert!(!guest.queues[usize::from(abi::QUEUE_CONTROL)].is_done(first));
    // The frontend can do what it likes meanwhile: it may have to, before it answers.
    assert_eq!(guest.config().aperture_size, SIZE);
    frontend.answer(true);
    assert_eq!(guest.control_wait(first, "the first request").status, OK);
    daemon.terminate();
}

#[test]
fn it_is_mapped_again_after_a_reset_but_not_after_a_pause() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let (mut guest, frontend) = start(&mut daemon);
    let mapped = |frontend: &Frontend| {
        frontend.map();
        frontend.answer(true);
    };
    mapped(&frontend);
    assert_eq!(guest.create(1), OK);
    let bases = guest.stop_queues();
    guest.restart_queues(|queue| bases[queue]);
    assert_eq!(guest.create(1), abi::STATUS_CONTEXT_EXISTS);
    assert!(frontend.asks_nothing());

    for _ in 0..3 {
        guest.stop_queues();
        guest.start_queues(1);
        guest.post_event_buffers(2);
        mapped(&frontend);
        assert_eq!(guest.create(1), OK);
    }
    // By message too.
    use vhost::VhostBackend;
    guest.frontend.reset_device().unwrap();
    guest.frontend.set_features(guest.features).unwrap();
    guest.stop_queues();
    guest.start_queues(1);
    mapped(&frontend);
    assert_eq!(guest.create(1), OK);
    daemon.terminate();
}

#[test]
fn what_is_mapped_still_is_unmapped_first() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let (mut guest, frontend) = start(&mut daemon);
    frontend.map();
    frontend.answer(false);
    let Asked::Unmap(request) = frontend.next() else {
        panic!("no SHMEM_UNMAP")
    };
    assert_eq!({ request.len }, SIZE);
    frontend.answer(true);
    frontend.map();
    frontend.answer(true);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    daemon.terminate();
}

#[test]
fn a_frontend_that_refuses_is_served_all_the_same() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let (mut guest, frontend) = start(&mut daemon);
    frontend.map();
    frontend.answer(false);
    assert!(matches!(frontend.next(), Asked::Unmap(_)));
    frontend.answer(false);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    // And one that knows no such thing.
    drop(guest);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    daemon.signal(rustix::process::Signal::TERM);
    let (status, said) = daemon.end();
    assert!(status.success(), "{said}");
    assert!(
        said.lines().count() == 1 && said.contains("does not map the aperture"),
        "{said}"
    );
}

#[test]
fn a_frontend_that_never_answers_keeps_nobody() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let (mut guest, frontend) = start(&mut daemon);
    let first = guest.control_send(ping().as_bytes());
    frontend.map();
    // It goes, with the channel left open. The next one is served.
    drop(guest);
    let (mut guest, frontend) = start(&mut daemon);
    frontend.map();
    frontend.answer(true);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    drop(guest);
    // One is there, and silent, when the end is asked for.
    let (mut guest, frontend) = start(&mut daemon);
    guest.control_send(ping().as_bytes());
    frontend.map();
    let asked = Instant::now();
    daemon.terminate();
    assert!(asked.elapsed() < std::time::Duration::from_secs(4), "it waited");
    let _ = first;
}

/// Each that goes, with the channel left open, leaves a thread behind; but not without end.
#[test]
fn many_frontends_that_never_answer() {
    let mut daemon = Daemon::start(&["--aperture", "1M"]);
    let pid = daemon.child.id();
    let mut silent = Vec::new();
    for _ in 0..8 {
        let (mut guest, frontend) = start(&mut daemon);
        guest.control_send(ping().as_bytes());
        frontend.map();
        silent.push(frontend);
    }
    for _ in 0..5 {
        // Without an aperture, there is nothing to wait for.
        let (mut guest, frontend) = start(&mut daemon);
        assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
        assert!(frontend.asks_nothing());
    }
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let waiting = threads.filter(|thread| {
        let name = thread.as_ref().unwrap().path().join("comm");
        std::fs::read_to_string(name).is_ok_and(|name| name.trim() == "aperture")
    });
    assert_eq!(waiting.count(), 8);
    daemon.terminate_saying(&["there is no aperture: 8 frontends still owe an answer"]);
}

#[test]
fn without_the_option_there_is_none() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!((guest.config().features, guest.config().aperture_size), (0, 0));
    assert!(guest.frontend.get_shmem_config().is_err());
    daemon.terminate();
}
