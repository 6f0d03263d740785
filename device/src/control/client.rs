// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The other end of the control socket: asks one thing.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::protocol::{Reply, VERSION};
use super::{Request, show};

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes in a reply. The state of a device with as much as it can have takes a tenth of that.
const MAX_REPLY: u64 = 4 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody is there.
    #[error("cannot connect to the control socket {}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or it took too long.
    #[error("no answer from the control socket {}", path.display())]
    Talk {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The answer is not one.
    #[error("the answer is not understood")]
    Json(#[source] serde_json::Error),
    /// The answer is of another version of the protocol.
    #[error("the answer is of version {0} of the protocol, not {VERSION}")]
    Version(u64),
    /// The answer is neither a result nor an error.
    #[error("the answer is empty")]
    Empty,
    /// It said no.
    #[error("refused: {0}")]
    Refused(String),
}

/// Asks the daemon that listens on `path`. What it answers, for people, or as the line of JSON that came.
pub fn ask(path: &Path, request: &Request, json: bool) -> Result<String, Error> {
    let stream = UnixStream::connect(path).map_err(|source| Error::Connect {
        path: path.into(),
        source,
    })?;
    let line = talk(&stream, request).map_err(|source| Error::Talk {
        path: path.into(),
        source,
    })?;
    let reply: Reply<Value> = serde_json::from_str(&line).map_err(Error::Json)?;
    if reply.version != VERSION {
        return Err(Error::Version(reply.version));
    }
    match (reply.result, reply.error) {
        (_, Some(error)) => Err(Error::Refused(error)),
        (Some(_), None) if json => Ok(line),
        (Some(result), None) => show::text(request, result).map_err(Error::Json),
        (None, None) => Err(Error::Empty),
    }
}

fn talk(mut stream: &UnixStream, request: &Request) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    BufReader::new(stream.take(MAX_REPLY)).read_line(&mut reply)?;
    if reply.ends_with('\n') {
        Ok(reply)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
