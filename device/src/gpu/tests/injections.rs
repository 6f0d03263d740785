// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The deliberate defects: each does what it says, and only that.

use super::*;

#[test]
fn a_lost_fault_is_lost() {
    let mut rig = Rig::with(1, &["lost-fault"]);
    rig.create(0);
    let told: Vec<u64> = (1..=8)
        .filter(|&number| {
            rig.submit(0, 0, &[increments(VA + number * PAGE_SIZE, 1)]);
            // The host hears of it, whether there is a record or not.
            rig.events.recv_timeout(PATIENCE).expect("a fault");
            let told = rig.log.take().is_some();
            rig.map(0, VA + number * PAGE_SIZE, &[ALL]);
            assert_eq!(rig.replay(0, number), Ok(1));
            assert_eq!(rig.completion().status, OK);
            told
        })
        .collect();
    assert_eq!(told, [1, 2, 3, 5, 6, 7]);
}
