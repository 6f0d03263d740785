// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A listening socket in the file system, which goes away with us.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else uses it.
    #[error("{} is in use: another program listens on it", .0.display())]
    InUse(PathBuf),
    /// There is something else.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("cannot listen on {}", path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening socket; its file is removed on drop.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode number of the file.
    identity: (u64, u64),
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

impl SocketFile {
    /// Listens on `path`. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Bind {
            path: path.into(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Self::remove_dead(path)?;
                UnixListener::bind(path).map_err(fail)?
            }
            other => other.map_err(fail)?,
        };
        let identity = identity(path).map_err(fail)?;
        Ok(Self {
            listener,
            path: path.into(),
            identity,
        })
    }

    fn remove_dead(path: &Path) -> Result<(), Error> {
        let fail = |source| Error::Bind {
            path: path.into(),
            source,
        };
        let file = std::fs::symlink_metadata(path).map_err(fail)?;
        if !file.file_type().is_socket() {
            return Err(Error::NotASocket(path.into()));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(fail)
            }
            Ok(_) => Err(Error::InUse(path.into())),
            Err(source) => Err(fail(source)),
        }
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Only if it is still ours: somebody may have replaced it.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            if let Err(error) = std::fs::remove_file(&self.path) {
                log::warn!("cannot remove {}: {error}", self.path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_sockets_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let socket = SocketFile::bind(&path).unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(Error::InUse(_))));
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(Error::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let nowhere = directory.path().join("none/socket");
        assert!(matches!(SocketFile::bind(&nowhere), Err(Error::Bind { .. })));
    }

    #[test]
    fn a_successor_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = SocketFile::bind(&path).unwrap();
        // The old inode stays in use, so that its number is not given to the new file.
        std::fs::rename(&path, directory.path().join("old")).unwrap();
        let successor = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(successor);
    }
}
