// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon's end of the control socket.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::Subject;
use super::protocol::{self, Error, MAX_LINE};
use crate::rate_limit::warn_limited;
use crate::socket::{self, SocketFile};

/// Most clients at a time.
pub const MAX_CLIENTS: usize = 16;

/// A client.
struct Client {
    stream: UnixStream,
    /// What it sent and was not looked at, no more than a line and what one read adds.
    input: Vec<u8>,
    /// The rest of a line that was too long, up to its end, is on its way.
    skipping: bool,
    /// It sends nothing more.
    ended: bool,
    /// What it has not read yet of the answer to its last request.
    output: Vec<u8>,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            skipping: false,
            ended: false,
            output: Vec::new(),
        })
    }

    /// Whether there is something to do without waiting for the client.
    fn has_line(&self) -> bool {
        self.output.is_empty() && (self.input.contains(&b'\n') || self.input.len() > MAX_LINE || self.ended)
    }

    /// Takes the next line, if it is complete.
    fn line(&mut self) -> Option<Result<Vec<u8>, Error>> {
        let line = match self.input.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                line
            }
            // The last one may lack its end.
            None if self.ended && !self.input.is_empty() => std::mem::take(&mut self.input),
            None if self.input.len() > MAX_LINE => {
                self.input.clear();
                let first = !std::mem::replace(&mut self.skipping, true);
                return first.then_some(Err(Error::TooLong));
            }
            None => return None,
        };
        if std::mem::take(&mut self.skipping) {
            return self.line();
        }
        if line.len() > MAX_LINE {
            return Some(Err(Error::TooLong));
        }
        Some(Ok(line))
    }

    /// Does what can be done without waiting. Says whether the client stays.
    fn advance(&mut self, readable: bool, subject: &Subject) -> io::Result<bool> {
        if readable && self.input.len() <= MAX_LINE {
            let mut bytes = [0; MAX_LINE];
            match self.stream.read(&mut bytes) {
                Ok(0) => self.ended = true,
                Ok(count) => self
                    .input
                    .extend_from_slice(bytes.get(..count).unwrap_or_default()),
                Err(error) if patience(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.flush()?;
        if self.output.is_empty() {
            match self.line() {
                Some(Ok(line)) => self.output = protocol::answer(&line, subject),
                Some(Err(error)) => self.output = protocol::refusal(error),
                None if self.ended => return Ok(false),
                None => {}
            }
            self.flush()?;
        }
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if patience(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn wants(&self) -> PollFlags {
        if !self.output.is_empty() {
            PollFlags::OUT
        } else if self.ended {
            PollFlags::empty()
        } else {
            PollFlags::IN
        }
    }
}

/// Whether it may go better later.
fn patience(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// The control socket; it is closed, and its file removed, on drop.
pub struct Server {
    _file: SocketFile,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `path`, and answers requests about `subject`.
    pub fn start(path: &Path, subject: Arc<Subject>) -> Result<Self, socket::Error> {
        let file = SocketFile::bind(path)?;
        let fail = |source| socket::Error::Bind {
            path: path.into(),
            source,
        };
        let listener = file.listener().try_clone().map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = Arc::new(eventfd(0, flags).map_err(|error| fail(error.into()))?);
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || serve(&listener, &stopped, &subject))
            .map_err(fail)?;
        Ok(Self {
            _file: file,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()) {
            log::error!("cannot stop the control socket: {error}");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the control socket panicked");
        }
    }
}

fn serve(listener: &UnixListener, stop: &OwnedFd, subject: &Subject) {
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut fds = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        for client in &clients {
            fds.push(PollFd::new(&client.stream, client.wants()));
        }
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let busy = clients.iter().any(Client::has_line);
        match poll(&mut fds, busy.then_some(&at_once)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("the control socket is given up: cannot wait: {error}");
                return;
            }
        }
        let mut events = fds.iter().map(PollFd::revents);
        if events.next().is_none_or(|events| !events.is_empty()) {
            return;
        }
        let connects = events.next().is_some_and(|events| !events.is_empty());
        let events: Vec<PollFlags> = events.collect();
        drop(fds);
        let mut events = events.into_iter();
        clients.retain_mut(|client| {
            let events = events.next().unwrap_or(PollFlags::empty());
            // An error shows when it is read.
            let readable = client.wants() == PollFlags::IN && !events.is_empty();
            // Gone while it has not read everything: there is no one to write it for.
            if !readable && events.intersects(PollFlags::HUP | PollFlags::ERR) {
                return false;
            }
            client.advance(readable, subject).unwrap_or_else(|error| {
                log::debug!("a client of the control socket is given up: {error}");
                false
            })
        });
        if connects {
            accept(listener, &mut clients);
        }
    }
}

fn accept(listener: &UnixListener, clients: &mut Vec<Client>) {
    let client = match listener.accept() {
        Ok((stream, _)) => Client::new(stream),
        Err(error) if patience(&error) => return,
        Err(error) => Err(error),
    };
    match client {
        Ok(mut client) if clients.len() >= MAX_CLIENTS => {
            client.output = protocol::refusal(Error::TooMany(MAX_CLIENTS));
            // As much as goes without waiting, which is all of it.
            let _ = client.flush();
        }
        Ok(client) => clients.push(client),
        Err(error) => {
            warn_limited!("a client of the control socket could not be accepted: {error}");
            // It is still there, and there may be no descriptor for it for a while.
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::inject::Injector;
    use std::io::{BufRead, BufReader};
    use std::time::Duration;

    fn start() -> (tempfile::TempDir, std::path::PathBuf, Server) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let subject = Subject::new(Arc::new(Injector::default()));
        let server = Server::start(&path, subject).unwrap();
        (directory, path, server)
    }

    fn connect(path: &Path) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        BufReader::new(stream)
    }

    fn line(client: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        client
            .read_line(&mut line)
            .expect("a reply within twenty seconds");
        line
    }

    #[test]
    fn a_long_line_is_refused_and_the_connection_goes_on() {
        let (_directory, path, server) = start();
        let mut client = connect(&path);
        for length in [MAX_LINE + 1, 3 * MAX_LINE, 100_000] {
            let mut long = vec![b'x'; length];
            long.push(b'\n');
            client.get_mut().write_all(&long).unwrap();
            assert!(line(&mut client).contains("longer than 4096"), "{length}");
            // Nothing of it is left over.
            client
                .get_mut()
                .write_all(b"{\"command\":\"version\"}\n")
                .unwrap();
            assert!(line(&mut client).contains("\"program\""), "{length}");
        }
        // As long as it may be.
        let mut longest = b"{\"command\":\"version\"".to_vec();
        longest.resize(MAX_LINE - 1, b' ');
        longest.extend_from_slice(b"}\n");
        client.get_mut().write_all(&longest).unwrap();
        assert!(line(&mut client).contains("\"program\""));
        drop(server);
        assert!(!path.exists());
        assert_eq!(line(&mut client), "");
    }

    #[test]
    fn lines_come_in_pieces_or_many_at_a_time() {
        let (_directory, path, _server) = start();
        let mut client = connect(&path);
        for byte in b"{\"command\":\"version\"}\n" {
            client.get_mut().write_all(&[*byte]).unwrap();
        }
        assert!(line(&mut client).contains("\"program\""));
        let many = "{\"command\":\"help\"}\n".repeat(100) + "rubbish\n{\"command\":\"version\"}";
        client.get_mut().write_all(many.as_bytes()).unwrap();
        client.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
        for _ in 0..100 {
            assert!(line(&mut client).contains("commands"));
        }
        assert!(line(&mut client).contains("not JSON"));
        // The last one lacks its end.
        assert!(line(&mut client).contains("\"program\""));
        assert_eq!(line(&mut client), "");
    }

    #[test]
    fn who_does_not_read_keeps_nobody_waiting() {
        let (_directory, path, _server) = start();
        let slow = UnixStream::connect(&path).unwrap();
        slow.set_nonblocking(true).unwrap();
        // Until the server takes no more of it: it holds one answer, not all of them.
        let many = "{\"command\":\"help\"}\n".repeat(1000);
        let mut refused = 0;
        while refused < 100 {
            match (&slow).write(many.as_bytes()) {
                Ok(_) => refused = 0,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        let mut client = connect(&path);
        client
            .get_mut()
            .write_all(b"{\"command\":\"version\"}\n")
            .unwrap();
        assert!(line(&mut client).contains("\"program\""));
    }

    #[test]
    fn there_are_only_so_many_clients() {
        let (_directory, path, _server) = start();
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| connect(&path)).collect();
        for client in &mut clients {
            client
                .get_mut()
                .write_all(b"{\"command\":\"version\"}\n")
                .unwrap();
            assert!(line(client).contains("\"program\""));
        }
        let mut one_more = connect(&path);
        assert!(line(&mut one_more).contains("16 clients"));
        assert_eq!(line(&mut one_more), "");
        // When one goes there is room again.
        clients.pop();
        let start = std::time::Instant::now();
        loop {
            let mut next = connect(&path);
            // It may be refused as long as the server has not noticed.
            let _ = next.get_mut().write_all(b"{\"command\":\"version\"}\n");
            if line(&mut next).contains("\"program\"") {
                break;
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "waited for room for a client"
            );
        }
    }
}
