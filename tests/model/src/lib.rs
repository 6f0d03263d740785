// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A model of who owns a page, small enough to be checked exhaustively.
//!
//! The parts are those of the real thing, and take the same steps in the same order: threads of processes and what the
//! kernel does for them ([`kernel`]), the driver's handling of faults ([`driver`]), the device with its page table,
//! translation buffers and rings ([`device`]). Between any two steps of one, all others may take theirs. What must hold in
//! every state is in [`properties`]; [`scenario::Omission`] names steps that can be left out, so that it can be
//! shown that the model notices. `docs/ownership-model.md` says what is modelled, and what is not.

pub mod check;
pub mod device;
pub mod driver;
pub mod kernel;
pub mod properties;
pub mod scenario;
pub mod state;
pub mod system;
pub mod trace;
