// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The core of the device under a checker that tries many schedules of its threads.
//!
//!     cargo test -p pinion-device --features model --test models

use pinion_device::sync::{Arc, Mutex, thread};

/// The primitives are the checker's: it sees that this depends on who comes first.
#[test]
#[should_panic(expected = "came later")]
fn the_checker_sees_what_the_core_does() {
    let race = || {
        let place = Arc::new(Mutex::new("nobody"));
        let there = place.clone();
        let second = thread::spawn(move || *there.lock() = "second");
        *place.lock() = "first";
        second.join().expect("a thread that ends");
        let last = *place.lock();
        assert_eq!(last, "second", "the first came later");
    };
    shuttle::check_dfs(race, None);
}
