// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Serves one frontend after the other, each with a fresh device, until it is told to end.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::sockopt::{socket_acceptconn, socket_domain};
use signal_hook::consts::{SIGINT, SIGTERM};
use vhost::vhost_user::Error as VhostUserError;
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error as BackendError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::cli::{Config, Source};
use crate::gpu::inject::Injector;
use crate::gpu::{Settings, StartError};
use crate::relay;
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

/// Runs until the end is asked for, or until the one connection that was given is over.
pub fn run(config: &Config) -> Result<(), Error> {
    let injector = Arc::new(Injector::new(&config.inject));
    let settings = (&config.settings, &injector);
    match &config.source {
        Source::Path(path) => {
            // First, so that the socket does not stay behind.
            let end = End::on_signals()?;
            let file = SocketFile::bind(path)?;
            serve_all(&end, settings, file.listener())
        }
        Source::Fd(fd) => {
            let socket = given(*fd)?;
            let end = End::on_signals()?;
            if socket_acceptconn(&socket).map_err(system("look at the socket"))? {
                serve_all(&end, settings, &UnixListener::from(socket))
            } else {
                serve_given(&end, settings, UnixStream::from(socket))
            }
        }
    }
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

fn serve_all(end: &End, settings: (&Settings, &Arc<Injector>), listener: &UnixListener) -> Result<(), Error> {
    loop {
        let connection = Connection::prepare(settings)?;
        if !end.wait_for_connection(listener)? {
            return Ok(());
        }
        connection.serve(end, listener)?;
        if end.is_asked() {
            return Ok(());
        }
    }
}

/// Serves a frontend that is connected already. The library wants to accept connections itself, so it
/// gets one from a socket of our own, and a thread hands everything over.
fn serve_given(end: &End, settings: (&Settings, &Arc<Injector>), frontend: UnixStream) -> Result<(), Error> {
    let connection = Connection::prepare(settings)?;
    let directory = tempfile::tempdir().map_err(system("make a temporary directory"))?;
    let file = SocketFile::bind(&directory.path().join("relay"))?;
    let inner = UnixStream::connect(file.path()).map_err(system("connect to the relay's socket"))?;
    let thread = {
        let (frontend, inner) = (
            frontend.try_clone().map_err(system("duplicate the connection"))?,
            inner.try_clone().map_err(system("duplicate the connection"))?,
        );
        std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || relay::run(&frontend, &inner))
            .map_err(system("start the relay"))?
    };
    let result = connection.serve(end, file.listener());
    // Both may be shut down already.
    let _ = frontend.shutdown(Shutdown::Both);
    let _ = inner.shutdown(Shutdown::Both);
    if thread.join().is_err() {
        log::error!("the relay panicked");
    }
    result
}

/// A device that waits for its frontend.
struct Connection {
    daemon: VhostUserDaemon<Arc<Backend>>,
    /// Ends the worker threads of the library.
    stop: OwnedFd,
}

impl Connection {
    fn prepare(settings: (&Settings, &Arc<Injector>)) -> Result<Self, Error> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(*settings.0, settings.1.clone(), memory.clone())?);
        let stop_event = backend.stop_event();
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(system("make an eventfd"))?;
        let daemon = VhostUserDaemon::new("vhost-user".into(), backend, memory).map_err(Error::Backend)?;
        let connection = Self { daemon, stop };
        for worker in connection.daemon.get_epoll_handlers() {
            worker
                .register_listener(connection.stop.as_raw_fd(), EventSet::IN, stop_event)
                .map_err(system("watch an eventfd"))?;
        }
        Ok(connection)
    }

    /// Accepts the frontend, which is there, and serves it until it goes or the end is asked for.
    fn serve(mut self, end: &End, listener: &UnixListener) -> Result<(), Error> {
        let listener = listener.try_clone().map_err(system("duplicate the socket"))?;
        self.daemon
            .start(&mut Listener::from(listener))
            .map_err(Error::Backend)?;
        log::info!("a frontend has connected");
        end.shuts_down(self.daemon.shutdown_handle());
        let result = self.daemon.wait();
        end.shuts_down(None);
        match result {
            Ok(())
            | Err(BackendError::HandleRequest(
                VhostUserError::Disconnected | VhostUserError::PartialMessage,
            )) => log::info!("the frontend has gone"),
            Err(error) => log::warn!("the connection to the frontend is given up: {error}"),
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The library joins its threads next; this is what they end upon.
        if let Err(error) = rustix::io::write(self.stop.as_fd(), &1_u64.to_ne_bytes()) {
            log::error!("cannot stop the worker threads: {error}");
        }
    }
}
