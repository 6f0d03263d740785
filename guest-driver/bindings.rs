// SPDX-License-Identifier: GPL-2.0-only

//! Generated bindings, in quarantine: only the abstractions (`hmm/`, `virtio`, `sync`, `chardev`) may use them,
//! and `uapi` compares itself with the C header.
//!
//! They complement `kernel::bindings`. `bindings_parameters` lists what is taken from which C header.

#![allow(
    clippy::all,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

include!(env!("PINION_BINDINGS"));
