// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Serves one frontend after the other, each with a fresh device, until it is told to end.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::{socket_acceptconn, socket_domain};
use signal_hook::consts::{SIGINT, SIGTERM};
use vhost::vhost_user::Error as VhostUserError;
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error as BackendError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::cli::{Config, Source};
use crate::control::{Server, Subject};
use crate::gpu::inject::Injector;
use crate::gpu::{Settings, StartError};
use crate::rate_limit::warn_limited;
use crate::relay;
use crate::sandbox;
use crate::socket::{self, SocketFile};
use crate::transport::Backend;

/// Why the daemon could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// The file descriptor is not a socket.
    #[error("file descriptor {fd} is not a Unix socket that is connected or listens")]
    Fd {
        /// Which.
        fd: RawFd,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The device could not be made.
    #[error(transparent)]
    Device(#[from] StartError),
    /// The vhost-user side of it could not be made.
    // The library's error is no `std::error::Error`, so it cannot be a source.
    #[error("cannot start the vhost-user backend: {0}")]
    Backend(BackendError),
    /// The sandbox could not be entered.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// Something the system should have given.
    #[error("cannot {what}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System {
        what,
        source: source.into(),
    }
}

/// How the daemon is told to end.
struct End {
    asked: AtomicBool,
    /// Becomes readable then.
    event: OwnedFd,
    /// The connection that is being served.
    connection: Mutex<Option<ShutdownHandle>>,
}

impl End {
    /// From now on SIGTERM and SIGINT ask the daemon to end; the second one does not ask.
    fn on_signals() -> Result<Arc<Self>, Error> {
        let event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(system("make an eventfd"))?;
        let end = Arc::new(Self {
            asked: AtomicBool::new(false),
            event,
            connection: Mutex::new(None),
        });
        let mut signals =
            signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).map_err(system("handle signals"))?;
        let asker = end.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for _ in &mut signals {
                    if asker.is_asked() {
                        std::process::exit(1);
                    }
                    asker.ask();
                }
            })
            .map_err(system("start a thread for signals"))?;
        Ok(end)
    }

    fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Err(error) = rustix::io::write(&self.event, &1_u64.to_ne_bytes()) {
            log::error!("cannot wake the daemon: {error}");
        }
        if let Some(connection) = &*self.connection.lock() {
            connection.shutdown();
        }
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Sets the connection that is to be shut down at the end, at once if that was asked for already.
    fn shuts_down(&self, connection: Option<ShutdownHandle>) {
        let mut current = self.connection.lock();
        *current = connection;
        if let (true, Some(connection)) = (self.is_asked(), &*current) {
            connection.shutdown();
        }
    }

    /// Waits for a moment, or until the end is asked for.
    fn pause(&self) -> Result<(), Error> {
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        match poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&moment)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(system("wait")(error)),
        }
    }

    /// Waits for a connection. False: the end was asked for.
    fn wait_for_connection(&self, listener: &UnixListener) -> Result<bool, Error> {
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.event, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(system("wait for a connection")(error)),
            }
            let [connected, _] = fds;
            if self.is_asked() {
                return Ok(false);
            }
            if !connected.revents().is_empty() {
                return Ok(true);
            }
        }
    }
}

/// What every connection is made with.
struct Common<'a> {
    end: &'a End,
    settings: &'a Settings,
    subject: &'a Subject,
}

/// Runs until the end is asked for, or until the one connection that was given is over.
pub fn run(config: &Config) -> Result<(), Error> {
    // Before anything else is opened.
    let given = match &config.source {
        Source::Path(_) => None,
        Source::Fd(fd) => Some(given(*fd)?),
    };
    // First, so that no socket stays behind.
    let end = End::on_signals()?;
    let subject = Subject::new(Arc::new(Injector::new(&config.inject)));
    let common = Common {
        end: &end,
        settings: &config.settings,
        subject: &subject,
    };
    let _control = match &config.control {
        Some(path) => Some(Server::start(path, subject.clone())?),
        None => None,
    };
    match (&config.source, given) {
        (Source::Path(path), _) => {
            let file = SocketFile::bind(path)?;
            sandboxed(config)?;
            common.serve_all(file.listener())
        }
        (Source::Fd(_), Some(socket))
            if socket_acceptconn(&socket).map_err(system("look at the socket"))? =>
        {
            sandboxed(config)?;
            common.serve_all(&UnixListener::from(socket))
        }
        (Source::Fd(_), Some(socket)) => {
            let relay = Relay::start(UnixStream::from(socket))?;
            sandboxed(config)?;
            common.serve_given(relay)
        }
        (Source::Fd(_), None) => Ok(()),
    }
}

/// Everything that is needed from outside is there.
fn sandboxed(config: &Config) -> Result<(), Error> {
    if config.sandbox {
        sandbox::enter()?;
        log::info!("in the sandbox");
    }
    Ok(())
}

/// The file descriptor that was handed to this program.
fn given(fd: RawFd) -> Result<OwnedFd, Error> {
    let refuse = |source| Error::Fd { fd, source };
    if fd <= 2 {
        return Err(refuse(io::ErrorKind::InvalidInput.into()));
    }
    std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).map_err(refuse)?;
    // SAFETY: The descriptor is open, which was just checked, and nobody else owns it: this is called
    // once, before the program opens anything that it keeps, and the standard streams are excluded.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    match socket_domain(&socket) {
        Ok(rustix::net::AddressFamily::UNIX) => Ok(socket),
        Ok(_) => Err(refuse(io::ErrorKind::InvalidInput.into())),
        Err(error) => Err(refuse(error.into())),
    }
}

impl Common<'_> {
    fn serve_all(&self, listener: &UnixListener) -> Result<(), Error> {
        loop {
            let connection = Connection::prepare(self)?;
            if !self.end.wait_for_connection(listener)? {
                return Ok(());
            }
            if let Err(error) = connection.serve(self, listener) {
                // There may be no descriptor or no memory for it now; the frontend may have gone again.
                warn_limited!("a frontend could not be served: {error}");
                self.end.pause()?;
            }
            if self.end.is_asked() {
                return Ok(());
            }
        }
    }

    fn serve_given(&self, relay: Relay) -> Result<(), Error> {
        let connection = Connection::prepare(self)?;
        let result = connection.serve(self, &relay.listener);
        relay.end();
        result
    }
}

/// Stands between a frontend that is connected already and the library, which wants to accept connections itself:
/// it gets one from a socket of our own, and a thread hands everything over.
struct Relay {
    frontend: UnixStream,
    inner: UnixStream,
    /// The other end of `inner` waits here.
    listener: UnixListener,
    thread: JoinHandle<()>,
}

impl Relay {
    fn start(frontend: UnixStream) -> Result<Self, Error> {
        let directory = tempfile::tempdir().map_err(system("make a temporary directory"))?;
        let file = SocketFile::bind(&directory.path().join("relay"))?;
        let inner = UnixStream::connect(file.path()).map_err(system("connect to the relay's socket"))?;
        let listener = file.listener().try_clone();
        let listener = listener.map_err(system("duplicate the relay's socket"))?;
        let duplicate = |stream: &UnixStream| stream.try_clone().map_err(system("duplicate the connection"));
        let (one, other) = (duplicate(&frontend)?, duplicate(&inner)?);
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || relay::run(&one, &other))
            .map_err(system("start the relay"))?;
        Ok(Self {
            frontend,
            inner,
            listener,
            thread,
        })
    }

    fn end(self) {
        // Both may be shut down already.
        let _ = self.frontend.shutdown(Shutdown::Both);
        let _ = self.inner.shutdown(Shutdown::Both);
        if self.thread.join().is_err() {
            log::error!("the relay panicked");
        }
    }
}

/// A device that waits for its frontend.
struct Connection {
    daemon: VhostUserDaemon<Arc<Backend>>,
    backend: Arc<Backend>,
    /// Ends the worker threads of the library.
    stop: OwnedFd,
}

impl Connection {
    fn prepare(common: &Common<'_>) -> Result<Self, Error> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let injector = common.subject.injector().clone();
        let backend = Arc::new(Backend::new(*common.settings, injector, memory.clone())?);
        let stop_event = backend.stop_event();
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(system("make an eventfd"))?;
        let daemon =
            VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory).map_err(Error::Backend)?;
        let connection = Self {
            daemon,
            backend,
            stop,
        };
        for worker in connection.daemon.get_epoll_handlers() {
            worker
                .register_listener(connection.stop.as_raw_fd(), EventSet::IN, stop_event)
                .map_err(system("watch an eventfd"))?;
        }
        let device: Weak<Backend> = Arc::downgrade(&connection.backend);
        common.subject.waits(device);
        Ok(connection)
    }

    /// Accepts the frontend, which is there, and serves it until it goes or the end is asked for.
    fn serve(mut self, common: &Common<'_>, listener: &UnixListener) -> Result<(), Error> {
        let listener = listener.try_clone().map_err(system("duplicate the socket"))?;
        self.daemon
            .start(&mut Listener::from(listener))
            .map_err(Error::Backend)?;
        log::info!("a frontend has connected");
        common.subject.connected();
        common.end.shuts_down(self.daemon.shutdown_handle());
        let result = self.daemon.wait();
        common.end.shuts_down(None);
        common.subject.disconnected();
        match result {
            Ok(())
            | Err(BackendError::HandleRequest(
                VhostUserError::Disconnected | VhostUserError::PartialMessage,
            )) => log::info!("the frontend has gone"),
            Err(error) => warn_limited!("the connection to the frontend is given up: {error}"),
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The library joins its threads next; this is what they end upon.
        self.backend.close();
        if let Err(error) = rustix::io::write(self.stop.as_fd(), &1_u64.to_ne_bytes()) {
            log::error!("cannot stop the worker threads: {error}");
        }
    }
}
