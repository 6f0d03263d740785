// SPDX-License-Identifier: Apache-2.0 OR MIT

//! For `cargo fuzz`: see [`pinion_fuzz`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pinion_fuzz::run("control", data));
