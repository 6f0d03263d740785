// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The protocol as it is: nothing goes wrong, whatever the order, and every run ends.

use pinion_model::check::{check, livelock};
use pinion_model::scenario::Access::{Atomic, Read, Write};
use pinion_model::scenario::Mechanism::Exclusive;
use pinion_model::scenario::Operation::{Add, Close, Discard, Exit, Fork, Move, Prefetch, Relocate, Unmap};
use pinion_model::scenario::Scenario;
use pinion_model::trace::render;

/// Both without what the driver forgives when it pins, which is stricter, and with it.
fn holds(scenario: &Scenario) {
    holds_as_it_is(scenario);
    holds_as_it_is(&scenario.clone().fresh_revocations());
}

fn holds_as_it_is(scenario: &Scenario) {
    let start = std::time::Instant::now();
    let report = check(scenario);
    println!(
        "| {} | {} | {} | ({:?})",
        scenario.name,
        report.states,
        report.depth,
        start.elapsed()
    );
    if let Some((name, run)) = report.violated.first() {
        panic!("{}: not so: {name}\n{}", scenario.name, render(scenario, run));
    }
    if let Err(endless) = livelock(&scenario.clone().patient()) {
        let round = render(scenario, &endless.run[endless.back..]);
        panic!("{}: a run that never ends\n{round}", scenario.name);
    }
}

#[test]
fn one_thread_one_ring() {
    holds(
        &Scenario::new("one thread, one ring")
            .thread(0, &[Add(0), Add(0)])
            .ring(0, &[(Atomic, 0); 2]),
    );
}

#[test]
fn two_threads_one_ring() {
    let scenario = Scenario::new("two threads, one ring")
        .thread(0, &[Add(0); 3])
        .thread(0, &[Add(0); 3]);
    holds(&scenario.ring(0, &[(Atomic, 0); 4]));
}

#[test]
fn two_rings() {
    let scenario = Scenario::new("two threads, two rings")
        .thread(0, &[Add(0); 3])
        .thread(0, &[Add(0); 2]);
    holds(
        &scenario
            .ring(0, &[(Atomic, 0); 3])
            .ring(0, &[(Write, 0), (Atomic, 0)]),
    );
}

#[test]
fn two_address_spaces() {
    let scenario = Scenario::new("two address spaces")
        .thread(0, &[Add(0); 2])
        .thread(0, &[Discard(0)])
        .context(0, 0);
    holds(
        &scenario
            .ring(0, &[(Atomic, 0); 2])
            .ring(1, &[(Read, 0), (Atomic, 0)]),
    );
}

#[test]
fn two_devices() {
    let scenario = Scenario::new("two GPUs").thread(0, &[Add(0); 2]).context(0, 1);
    holds(&scenario.ring(0, &[(Atomic, 0); 2]).ring(1, &[(Atomic, 0); 2]));
}

#[test]
fn mirrors() {
    let scenario = Scenario::new("mirrored, relocated")
        .thread(0, &[Add(0), Add(0)])
        .thread(0, &[Relocate(0)]);
    holds(&scenario.ring(0, &[(Read, 0), (Write, 0)]).ring(0, &[(Atomic, 0)]));
}

#[test]
fn discard() {
    let scenario = Scenario::new("discarded")
        .thread(0, &[Discard(0), Add(0)])
        .thread(0, &[Add(0), Add(0)]);
    holds(&scenario.ring(0, &[(Atomic, 0); 2]));
}

#[test]
fn unmap() {
    let scenario = Scenario::new("unmapped")
        .thread(0, &[Add(0), Unmap(0)])
        .thread(0, &[Add(0)]);
    holds(&scenario.ring(0, &[(Read, 0), (Atomic, 0)]));
}

#[test]
fn moved() {
    for (name, shared) in [("moved", false), ("moved within a window", true)] {
        let mut scenario = Scenario::new(name).thread(0, &[Move(0, 1), Add(1)]).failures(1);
        scenario.shared_window = shared;
        holds(&scenario.ring(0, &[(Atomic, 0)]).ring(0, &[(Atomic, 1)]));
    }
}

#[test]
fn forked() {
    let scenario = Scenario::new("forked")
        .thread(0, &[Add(0), Fork, Add(0)])
        .thread(1, &[Add(0), Add(0)]);
    holds(&scenario.ring(0, &[(Atomic, 0), (Read, 0), (Atomic, 0)]));
}

#[test]
fn forked_and_moved() {
    let scenario = Scenario::new("forked, moved")
        .thread(0, &[Fork, Move(0, 1)])
        .thread(1, &[Add(0)]);
    holds(&scenario.ring(0, &[(Atomic, 0)]).ring(0, &[(Read, 1)]));
}

#[test]
fn exit() {
    let scenario = Scenario::new("exit")
        .thread(0, &[Add(0)])
        .thread(0, &[Exit, Close(0)]);
    holds(&scenario.ring(0, &[(Atomic, 0); 2]).ring(0, &[(Read, 0)]));
}

#[test]
fn closed() {
    let scenario = Scenario::new("closed")
        .thread(0, &[Add(0), Discard(0)])
        .thread(0, &[Close(0)])
        .failures(1);
    holds(&scenario.ring(0, &[(Read, 0), (Atomic, 0)]));
}

#[test]
fn closed_with_child() {
    let scenario = Scenario::new("closed, child")
        .thread(0, &[Fork, Close(0)])
        .thread(1, &[Add(0)]);
    holds(&scenario.ring(0, &[(Atomic, 0); 2]));
}

#[test]
fn lost() {
    let scenario = Scenario::new("device lost")
        .thread(0, &[Add(0), Unmap(0)])
        .thread(0, &[Close(0)])
        .loss();
    holds(
        &scenario
            .ring(0, &[(Read, 0), (Atomic, 0)])
            .ring(0, &[(Atomic, 0)]),
    );
}

#[test]
fn exclusive() {
    let scenario = Scenario::new("exclusive")
        .thread(0, &[Add(0), Add(0)])
        .thread(0, &[Add(0), Discard(0)]);
    holds(&scenario.ring(0, &[(Atomic, 0); 2]).mechanism(Exclusive));
}

#[test]
fn exclusive_in_two_devices() {
    let scenario = Scenario::new("exclusive, two GPUs")
        .thread(0, &[Add(0)])
        .context(0, 1)
        .mechanism(Exclusive);
    holds(&scenario.ring(0, &[(Atomic, 0)]).ring(1, &[(Atomic, 0)]));
}

#[test]
fn two_pages() {
    let scenario = Scenario::new("two pages")
        .thread(0, &[Add(0), Add(1)])
        .two_pages()
        .shared_window();
    holds(
        &scenario
            .ring(0, &[(Atomic, 0), (Atomic, 1)])
            .ring(0, &[(Atomic, 1)]),
    );
}

#[test]
fn prefetched() {
    let scenario = Scenario::new("prefetched")
        .thread(0, &[Prefetch(0, 0), Add(0)])
        .thread(0, &[Add(0), Discard(0)]);
    holds(&scenario.ring(0, &[(Write, 0), (Atomic, 0)]).failures(1));
}

/// What [`Scenario::fresh_revocations`] gains: without any pauses no run with one context goes on for ever.
#[test]
fn pinning_that_forgives_earlier_revocations() {
    let one = || Scenario::new("forgiving").fresh_revocations();
    let scenarios = [
        one()
            .thread(0, &[Add(0); 3])
            .thread(0, &[Add(0), Discard(0)])
            .ring(0, &[(Atomic, 0); 3]),
        one()
            .thread(0, &[Add(0), Unmap(0)])
            .thread(0, &[Relocate(0)])
            .ring(0, &[(Read, 0), (Atomic, 0)]),
        one()
            .thread(0, &[Fork, Add(0)])
            .thread(1, &[Add(0)])
            .ring(0, &[(Atomic, 0); 2]),
        one()
            .thread(0, &[Move(0, 1), Add(1)])
            .ring(0, &[(Atomic, 0)])
            .ring(0, &[(Atomic, 1)]),
        one()
            .thread(0, &[Prefetch(0, 0), Add(0)])
            .thread(0, &[Discard(0)])
            .ring(0, &[(Write, 0), (Atomic, 0)]),
    ];
    for scenario in scenarios {
        let report = check(&scenario);
        assert!(report.violated.is_empty(), "{report}");
        if let Err(endless) = livelock(&scenario) {
            panic!("{}", render(&scenario, &endless.run[endless.back..]));
        }
    }
}
