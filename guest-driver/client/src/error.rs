// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong.

use std::io;
use std::path::PathBuf;

/// The result of a request to the driver.
pub type Result<T> = std::result::Result<T, Error>;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The driver refused a request.
    #[error("{request} failed: {what}")]
    Request {
        /// The name of the request in `pinion.h`.
        request: &'static str,
        /// What was asked for.
        what: String,
        /// The error number.
        source: io::Error,
    },
    /// The statistics of the file could not be read.
    #[error("cannot read {}", path.display())]
    Statistics {
        /// The file below `/proc`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The driver answered with something that this crate does not know: the two do not fit together.
    #[error("the driver reports {what} {value}, which this version of the interface does not know")]
    Unknown {
        /// What kind of number it is.
        what: &'static str,
        /// The number.
        value: u32,
    },
}

impl Error {
    /// The system's error number, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { source, .. } | Self::Request { source, .. } | Self::Statistics { source, .. } => {
                source.raw_os_error()
            }
            Self::Unknown { .. } => None,
        }
    }

    /// Has the time that a wait was given run out?
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.errno() == Some(libc::ETIMEDOUT)
    }
}
