// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who does the work of an engine: its own thread, or whoever rings a doorbell.

use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::sync::{Arc, thread};

use super::check::{DEADLOCK, finds, holds};
use super::rig::{ALL, CONTEXT, OK, Rig, VA, fill, increments};

/// Everything that is submitted is done, whoever does it.
fn busy(rig: &Rig, mapped: bool) {
    if mapped {
        rig.map(CONTEXT, VA, ALL);
    }
    for (ring, sequence) in [(0, 1), (1, 2), (1, 3), (0, 4)] {
        rig.submit(ring, sequence, &[fill(VA, sequence, sequence)]);
    }
    if !mapped {
        rig.repair(&[1, 2, 3, 4], |_| ALL, |_, _| ());
    }
    for sequence in 1..=4 {
        assert_eq!(rig.completion(sequence).status, OK);
        assert_eq!(rig.memory.load(0, sequence as usize), sequence);
    }
}

#[test]
fn no_doorbell_is_lost() {
    let model = || busy(&Rig::new(2, 1), true);
    holds(model);
    holds(|| busy(&Rig::new(2, 2), true));
    holds(|| busy(&Rig::new(2, 1), false));
    finds(Sabotage::RingsUnheard, &[DEADLOCK], model);
    finds(Sabotage::LeavesSilently, &[DEADLOCK], model);
    finds(Sabotage::IgnoresIdle, &[DEADLOCK], model);
}

/// The one who is to let a stopped device go on rings doorbells before, and the device is stopped meanwhile.
fn resume(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    for ring in 0..2 {
        assert!(rig.put(ring, u64::from(ring) + 1, &[increments(VA, ring.into(), 2)]));
    }
    let other = rig.clone();
    let other = thread::spawn(move || {
        other.gpu().pause();
        other.memory.revoke_all();
        (0..2).for_each(|word| other.memory.increment(0, word));
        other.memory.grant_all();
    });
    (0..2).for_each(|ring| rig.gpu().attend(ring));
    other.join().expect("it does not wait for us");
    rig.gpu().resume();
    for sequence in 1..=2 {
        assert_eq!(rig.completion(sequence).status, OK);
    }
    for word in 0..2 {
        assert_eq!(rig.memory.load(0, word), 3, "an increment was lost");
    }
}

#[test]
fn a_doorbell_returns_while_the_device_is_stopped() {
    let model = || resume(&Rig::new(2, 2));
    holds(model);
    holds(|| resume(&Rig::new(2, 1)));
    finds(Sabotage::WaitsBorrowed, &[DEADLOCK], model);
    finds(Sabotage::ResumesSilently, &[DEADLOCK], model);
    finds(Sabotage::SkipsEngine, &["taken away", "lost"], model);
}
