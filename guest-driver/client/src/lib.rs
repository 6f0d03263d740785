// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An interface to `/dev/pinionN`, the Pinion virtual GPU.
//!
//! A [`Gpu`] is one address space of the GPU. It mirrors that of the process that opened it: a pointer
//! means the same to both, and there is no memory to allocate, to register or to copy. Work is a [`Batch`] of
//! commands, which the GPU does while it borrows the memory that they touch:
//!
//! ```no_run
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use pinion_client::{Batch, Gpu, Operation};
//!
//! let gpu = Gpu::open("/dev/pinion0")?;
//! let counter = AtomicU64::new(0);
//! let numbers = [7_u32; 1000];
//! let mut copy = [0_u32; 1000];
//!
//! let mut batch = Batch::new();
//! batch
//!     .atomic_times(Operation::Add, &counter, 1, 100)
//!     .copy(&numbers[..], &mut copy[..]);
//! assert!(gpu.run(0, &batch)?.is_ok());
//! assert_eq!(counter.load(Ordering::Relaxed), 100);
//! assert_eq!(copy, numbers);
//! # Ok::<_, pinion_client::Error>(())
//! ```
//!
//! | to | use |
//! |---|---|
//! | have work done and wait for it | [`Gpu::run`] |
//! | go on meanwhile | [`Gpu::scope`] |
//! | work on memory that is not borrowed, or is at any address | [`Gpu::submit`], [`Submit`], [`Command`] (`unsafe`) |
//! | wait | [`Gpu::wait`], [`Gpu::wait_all`], [`Gpu::wait_any`], [`Fence`], an eventfd, [`Gpu::ended`] |
//! | have work wait for other work | [`Submit::after`], [`Submit::after_fence`] |
//! | say where memory had better be | [`Gpu::advise_location`], [`Gpu::prefetch`], [`Gpu::discard`] |
//! | say how the GPU gets a page to itself | [`Gpu::advise_atomics`] |
//! | see where memory is, and what has happened | [`Gpu::query`], [`Gpu::statistics`] |
//!
//! # What is safe
//!
//! The GPU reads and writes memory of the process behind the compiler's back, while the process runs. [`Batch`] sees to
//! it by borrowing, as a thread in [`std::thread::scope`] would. Where that is too narrow, [`Gpu::submit`] takes any
//! command; it is unsafe, and says what must hold.

mod batch;
mod command;
mod device;
mod error;
mod fence;
mod gpu;
mod memory;
mod page;
mod scope;
mod statistics;
pub mod uapi;
mod work;

pub use batch::Batch;
pub use command::{AtomicWord, Command, Compare, Operation, Word};
pub use device::Device;
pub use error::{Error, Result};
pub use fence::Fence;
pub use gpu::{Gpu, Info, PinMethod};
pub use memory::{Memory, Plain, Source};
pub use page::{Atomics, Location, Page, PageState, Rights};
pub use scope::Scope;
pub use statistics::Statistics;
pub use uapi::ChaseResult;
pub use work::{Completion, Status, Submission, Submit, Submitted};

/// Size of a page of the GPU in bytes.
pub const PAGE_SIZE: usize = 4096;
