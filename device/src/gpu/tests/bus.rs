// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slow bus. It is never faster than it says; that it is no slower than that either shows now and then, when the
//! host has time.

use super::*;

const LENGTH: u64 = 256 << 10;
const MEBIBYTE: u64 = 1 << 20;

/// Context 0 with large pages: two of system memory, two of VRAM.
fn rig_with_bus(latency: Duration, bandwidth: Option<u64>) -> Rig {
    let settings = Settings {
        latency,
        bandwidth: bandwidth.map(|bytes| NonZeroU64::new(bytes).unwrap()),
        ..settings(2, 2)
    };
    let mut rig = Rig::build(settings, &[]);
    rig.create(0);
    let vram = ALL | abi::PTE_VRAM;
    rig.map_large(0, VA, &[ALL, ALL | LARGE_PAGE_SIZE, vram, vram | LARGE_PAGE_SIZE]);
    rig
}

const SYSTEM: u64 = VA;
const DEVICE: u64 = VA + 2 * LARGE_PAGE_SIZE;

/// How long commands take, in device time.
fn takes(rig: &mut Rig, commands: &[abi::Command]) -> Duration {
    let before = rig.time();
    let done = rig.run(0, commands);
    assert_eq!(done.status, OK);
    Duration::from_nanos(done.time - before)
}

/// Waits until commands take less than `limit`.
fn until_it_takes_less(rig: &mut Rig, commands: &[abi::Command], limit: Duration) {
    let what = format!("{commands:?} to take less than {limit:?}");
    until(&what, || takes(rig, commands) < limit);
}

#[test]
fn bandwidth_is_what_it_is() {
    let full = 32 * MEBIBYTE;
    // Both ways, so twice as much.
    let nominal = |bandwidth: u64| Duration::from_nanos(2 * LENGTH * 1_000_000_000 / bandwidth);
    // A host that is late may catch up for a moment.
    let slack = Duration::from_millis(2);
    let over_the_bus = copy(SYSTEM, SYSTEM + LARGE_PAGE_SIZE, LENGTH);
    let mut fast = rig_with_bus(Duration::ZERO, Some(full));
    let mut slow = rig_with_bus(Duration::ZERO, Some(full / 2));
    for _ in 0..3 {
        assert!(takes(&mut fast, &[over_the_bus]) + slack >= nominal(full));
        assert!(takes(&mut slow, &[over_the_bus]) + slack >= nominal(full / 2));
    }
    until_it_takes_less(&mut fast, &[over_the_bus], nominal(full / 2) - slack);
    // One way only, and not at all.
    let one_way = copy(DEVICE, SYSTEM, LENGTH);
    until_it_takes_less(&mut slow, &[one_way], nominal(full / 2) - slack);
    assert!(takes(&mut slow, &[one_way]) + slack >= nominal(full));
    let not_at_all = [
        copy(DEVICE, DEVICE + LARGE_PAGE_SIZE, LENGTH),
        fill(DEVICE, LENGTH, 8, 1),
    ];
    until_it_takes_less(&mut slow, &not_at_all, nominal(full) / 2);
    until_it_takes_less(
        &mut rig_with_bus(Duration::ZERO, None),
        &[over_the_bus],
        nominal(full) / 2,
    );
}

#[test]
fn bandwidth_is_shared_by_all_engines() {
    let bandwidth = 32 * MEBIBYTE;
    let mut rig = rig_with_bus(Duration::ZERO, Some(bandwidth));
    let before = rig.time();
    let both = [0, 1].map(|ring| {
        let at = u64::from(ring) * MEBIBYTE;
        rig.submit(
            ring,
            0,
            &[copy(SYSTEM + at, SYSTEM + LARGE_PAGE_SIZE + at, LENGTH)],
        )
    });
    let last = both
        .map(|sequence| rig.finish(sequence).time)
        .into_iter()
        .max()
        .unwrap();
    let nominal = 4 * LENGTH * 1_000_000_000 / bandwidth;
    assert!(last - before + 2_000_000 >= nominal);
}

#[test]
fn every_number_takes_its_time_there_and_back() {
    const TIMES: u32 = 8;
    let one_way = Duration::from_millis(1);
    let nominal = 2 * one_way * TIMES;
    let signals = |place: u64| vec![semaphore_signal(place, 3); TIMES as usize];
    let mut rig = rig_with_bus(one_way, None);
    let mut slower = rig_with_bus(2 * one_way, None);
    assert!(takes(&mut rig, &signals(SYSTEM)) >= nominal);
    assert!(takes(&mut slower, &signals(SYSTEM)) >= 2 * nominal);
    until_it_takes_less(&mut rig, &signals(SYSTEM), 2 * nominal);
    until_it_takes_less(&mut slower, &signals(DEVICE), nominal);
    // The same for atomic operations: each is a load, and then a store.
    assert!(takes(&mut rig, &[increments(SYSTEM + 64, TIMES)]) >= nominal);
    assert_eq!(rig.load(64), u64::from(TIMES));
    until_it_takes_less(&mut slower, &[increments(DEVICE + 64, TIMES)], nominal);
}

#[test]
fn what_is_on_the_bus_keeps_nobody_waiting() {
    let forever = Duration::from_secs(1 << 20);
    for (latency, bandwidth) in [(forever, None), (Duration::ZERO, Some(1))] {
        for (opcode, status) in [
            (abi::REQUEST_CONTEXT_DESTROY, abi::STATUS_NO_CONTEXT),
            (abi::REQUEST_CONTEXT_RESET, abi::STATUS_RESET),
            (abi::REQUEST_DEVICE_RESET, abi::STATUS_RESET),
        ] {
            let settings = Settings {
                latency,
                bandwidth: bandwidth.and_then(NonZeroU64::new),
                ..settings(2, 1)
            };
            let mut rig = Rig::build(settings, &[]);
            rig.create(0);
            rig.map_large(0, SYSTEM, &[ALL]);
            rig.map_large(0, DEVICE, &[ALL | abi::PTE_VRAM]);
            let sequence = rig.submit(0, 0, &[copy(DEVICE, SYSTEM, LENGTH), semaphore_signal(SYSTEM, 1)]);
            rig.until_activity(0, Activity::Crossing);
            // On the same engine, and an INVALIDATE.
            assert_eq!(rig.run_on(1, 0, &[fill(DEVICE, LENGTH, 8, 1)]).status, OK);
            rig.clear(0);
            assert!(!rig.has_completion());
            // However long it would have taken, it ends with its context.
            assert_eq!(rig.simple(opcode, 0), OK);
            assert_eq!(rig.finish(sequence).status, status);
        }
    }
}

#[test]
fn an_invalidation_waits_for_no_number_on_the_bus() {
    let mut rig = rig_with_bus(Duration::from_secs(1), None);
    rig.submit(0, 0, &[increments(SYSTEM, 100)]);
    let start = Instant::now();
    until("the first operation", || {
        rig.gpu.state().rings[0].activity == Activity::Running
    });
    std::thread::sleep(Duration::from_millis(20));
    rig.invalidate(0, SYSTEM, PAGE_SIZE, 0);
    assert_eq!(rig.simple(abi::REQUEST_CONTEXT_DESTROY, 0), OK);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "they took {took:?}");
}

#[test]
fn a_reset_frees_the_bus() {
    let mut rig = rig_with_bus(Duration::ZERO, Some(LENGTH / 64));
    rig.submit(0, 0, &[copy(DEVICE, SYSTEM, LENGTH)]);
    rig.until_activity(0, Activity::Crossing);
    assert_eq!(rig.simple(abi::REQUEST_DEVICE_RESET, 0), OK);
    rig.completion();
    rig.create(0);
    rig.map(0, SYSTEM, &[ALL]);
    let took = takes(&mut rig, &[fill(SYSTEM, 8, 8, 1)]);
    assert!(took < Duration::from_secs(8), "it took {took:?}");
}
