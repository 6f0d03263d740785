// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why a request or a submission was not carried out.

use pinion_abi as abi;

/// A status other than OK, with its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// [`abi::STATUS_INVALID`]
    #[error("malformed")]
    Invalid,
    /// [`abi::STATUS_UNSUPPORTED`]
    #[error("unknown opcode or operation")]
    Unsupported,
    /// [`abi::STATUS_NO_CONTEXT`]
    #[error("no such context")]
    NoContext,
    /// [`abi::STATUS_CONTEXT_EXISTS`]
    #[error("the context exists already")]
    ContextExists,
    /// [`abi::STATUS_LIMIT`]
    #[error("a limit of the device is reached")]
    Limit,
    /// [`abi::STATUS_BAD_ADDRESS`]
    #[error("outside the address space")]
    BadAddress,
    /// [`abi::STATUS_BUS_ERROR`]
    #[error("the page table leads to memory that does not exist")]
    Bus,
    /// [`abi::STATUS_CONTEXT_ERROR`]
    #[error("the context is in error because of earlier work")]
    ContextError,
    /// [`abi::STATUS_FAULT_CANCELLED`]
    #[error("the fault was cancelled")]
    FaultCancelled,
    /// [`abi::STATUS_NO_FAULT`]
    #[error("no such fault")]
    NoFault,
    /// [`abi::STATUS_RESET`]
    #[error("ended by a reset")]
    Reset,
    /// [`abi::STATUS_HUNG`]
    #[error("ended by the watchdog")]
    Hung,
}

impl Error {
    /// The number on the wire.
    pub const fn code(self) -> u32 {
        match self {
            Self::Invalid => abi::STATUS_INVALID,
            Self::Unsupported => abi::STATUS_UNSUPPORTED,
            Self::NoContext => abi::STATUS_NO_CONTEXT,
            Self::ContextExists => abi::STATUS_CONTEXT_EXISTS,
            Self::Limit => abi::STATUS_LIMIT,
            Self::BadAddress => abi::STATUS_BAD_ADDRESS,
            Self::Bus => abi::STATUS_BUS_ERROR,
            Self::ContextError => abi::STATUS_CONTEXT_ERROR,
            Self::FaultCancelled => abi::STATUS_FAULT_CANCELLED,
            Self::NoFault => abi::STATUS_NO_FAULT,
            Self::Reset => abi::STATUS_RESET,
            Self::Hung => abi::STATUS_HUNG,
        }
    }
}

/// The wire status of a result.
pub fn code<T>(result: &Result<T, Error>) -> u32 {
    match result {
        Ok(_) => abi::STATUS_OK,
        Err(error) => error.code(),
    }
}
