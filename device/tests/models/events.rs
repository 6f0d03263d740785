// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The event log: what is put in comes out once, unless it was forgotten.

use pinion_abi::{EVENT_CONTEXT_ERROR, EVENT_FAULT, EventRecord};
use pinion_device::gpu::event::EventLog;
use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::sync::{Arc, Condvar, Mutex, thread};

use super::check::{DEADLOCK, finds, holds, holds_always};

fn fault(context: u32, fault: u64) -> EventRecord {
    EventRecord {
        kind: EVENT_FAULT,
        context,
        fault,
        ..Default::default()
    }
}

/// The log is filled by two, emptied by one who is told, and weeded by a fourth.
#[test]
fn nothing_is_lost() {
    let model = || {
        let log = Arc::new(EventLog::default());
        let bell = Arc::new((Mutex::new(0_u32), Condvar::default()));
        let writers = [1, 2].map(|context| {
            let (log, bell) = (log.clone(), bell.clone());
            thread::spawn(move || {
                for number in 0..2 {
                    log.push(fault(context, number));
                    // What is dropped when its fault is gone is not this.
                    log.push(fault(context, 50 + number));
                    *bell.0.lock() += 1;
                    bell.1.notify_all();
                }
            })
        });
        let weeded = log.clone();
        let weeder = thread::spawn(move || {
            weeded.forget_fault(50);
            weeded.forget_fault(51);
            weeded.forget_context(3);
        });
        let mut seen = Vec::new();
        let mut heard = 0;
        // As long as something is missing, it sleeps until it is told.
        while seen.iter().filter(|(_, fault)| *fault < 50).count() < 4 {
            if let Some(record) = log.take() {
                let record = (record.context, record.fault);
                assert!(!seen.contains(&record), "{record:?} came twice");
                seen.push(record);
                continue;
            }
            let mut count = bell.0.lock();
            while *count == heard {
                bell.1.wait(&mut count);
            }
            heard = *count;
        }
        for context in [1, 2] {
            let of = seen.iter().filter(|(of, fault)| *of == context && *fault < 50);
            let order: Vec<u64> = of.map(|(_, fault)| *fault).collect();
            assert_eq!(order, [0, 1], "out of order");
        }
        for writer in writers {
            writer.join().expect("a writer that ends");
        }
        weeder.join().expect("a weeder that ends");
    };
    holds(model);
    finds(
        Sabotage::TakesInSteps,
        &[DEADLOCK, "came twice", "out of order"],
        model,
    );
}

/// Small enough for every schedule.
#[test]
fn every_schedule_of_the_log() {
    let model = || {
        let log = Arc::new(EventLog::default());
        let writer = log.clone();
        let writer = thread::spawn(move || {
            writer.push(EventRecord {
                kind: EVENT_CONTEXT_ERROR,
                ..fault(1, 1)
            });
            writer.push(fault(1, 2));
        });
        let weeder = log.clone();
        let weeder = thread::spawn(move || weeder.forget_fault(1));
        let first = log.take();
        writer.join().expect("a writer that ends");
        weeder.join().expect("a weeder that ends");
        let rest = std::iter::from_fn(|| log.take());
        let all: Vec<u64> = first.into_iter().chain(rest).map(|record| record.fault).collect();
        assert_eq!(
            all,
            [1, 2],
            "the end of a fault does not concern the error of its context"
        );
    };
    println!("{} schedules", holds_always(model));
}
