// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The invalidation promise, and what else says that no access is in flight any more.
//!
//! Whoever has taken a page away marks it in the [`ModelMemory`], which does not let an engine touch it then; and
//! he changes what is in it by a load and a store, so that a store of an engine in between, or one of his between the load
//! and the store of an engine, shows in the sum.

use pinion_abi::{self as abi, ACCESS_READ, PAGE_SIZE, VA_END};
use pinion_device::gpu::access::{Tally, Window};
use pinion_device::gpu::context::Context;
use pinion_device::gpu::gate::Gate;
use pinion_device::gpu::inject::Injector;
use pinion_device::gpu::page_table::{Budget, Translation};
use pinion_device::gpu::sabotage::Sabotage;
use pinion_device::gpu::vram::{self, Vram};
use pinion_device::sync::{Arc, thread};
use vm_memory::VolatileMemory;

use super::check::{DEADLOCK, fails, finds, holds, holds_always};
use super::rig::{ALL, CONTEXT, ModelMemory, OK, RW, Rig, VA, VRAM, fill, increments};

const TAKEN: &[&str] = &["taken away", "lost"];

/// Has both rings add to words of their own in the page at [`VA`], twice each.
fn submit_increments(rig: &Rig) -> [u64; 4] {
    for (ring, sequence) in [(0, 1), (1, 2), (0, 3), (1, 4)] {
        rig.submit(ring, sequence, &[increments(VA, ring.into(), 2)]);
    }
    [1, 2, 3, 4]
}

/// INVALIDATE with CLEAR: the page is the processor's until it is mapped again.
fn clear(rig: &Arc<Rig>) {
    rig.map(CONTEXT, VA, ALL);
    let work = submit_increments(rig);
    rig.invalidate(VA, PAGE_SIZE, abi::INVALIDATE_CLEAR);
    rig.memory.revoke(0);
    (0..2).for_each(|word| rig.memory.increment(0, word));
    rig.memory.grant(0);
    rig.repair(&work, |_| ALL, |_, _| ());
    for word in 0..2 {
        assert_eq!(rig.memory.load(0, word), 5, "an increment was lost");
    }
}

/// MAP of another page, and INVALIDATE, of the page or of everything: the old page is the processor's.
fn remap(rig: &Arc<Rig>, flags: u16) {
    rig.map(CONTEXT, VA, ALL);
    let work = submit_increments(rig);
    rig.map(CONTEXT, VA, ALL | PAGE_SIZE);
    let length = if flags == 0 { PAGE_SIZE } else { 0 };
    let va = if flags == 0 { VA } else { 0 };
    rig.invalidate(va, length, flags);
    rig.memory.revoke(0);
    (0..2).for_each(|word| rig.memory.increment(0, word));
    for sequence in work {
        assert_eq!(rig.completion(sequence).status, OK);
    }
    for word in 0..2 {
        let sum = rig.memory.load(0, word) + rig.memory.load(1, word);
        assert_eq!(sum, 5, "an increment was lost");
    }
}

#[test]
fn invalidate_with_clear() {
    let model = || clear(&Rig::new(2, 2));
    holds(model);
    holds(|| clear(&Rig::new(2, 1)));
    finds(Sabotage::SkipsEngine, TAKEN, model);
    finds(Sabotage::ClearsLate, TAKEN, model);
    fails("stale-tlb", TAKEN, || clear(&Rig::with(2, 2, Some("stale-tlb"))));
}

#[test]
fn invalidate_after_map() {
    let model = || remap(&Rig::new(2, 2), 0);
    holds(model);
    finds(Sabotage::SkipsEngine, TAKEN, model);
    fails("stale-tlb", TAKEN, || {
        remap(&Rig::with(2, 2, Some("stale-tlb")), 0)
    });
}

#[test]
fn invalidate_everything() {
    let model = || remap(&Rig::new(2, 2), abi::INVALIDATE_EVERYTHING);
    holds(model);
    finds(Sabotage::SkipsEngine, TAKEN, model);
}

/// Work of a context that ends, which is there (`mapped`), or stalls. All of it completes, and none of it goes on.
fn end(rig: &Arc<Rig>, opcode: u16, mapped: bool) {
    if mapped {
        rig.map(CONTEXT, VA, ALL);
    }
    let (context, status) = match opcode {
        abi::REQUEST_CONTEXT_DESTROY => (CONTEXT, abi::STATUS_NO_CONTEXT),
        abi::REQUEST_CONTEXT_RESET => (CONTEXT, abi::STATUS_RESET),
        _ => (0, abi::STATUS_RESET),
    };
    let work = submit_increments(rig);
    rig.simple(opcode, context);
    rig.memory.revoke_all();
    for sequence in work {
        let completion = rig.completion(sequence);
        let known = completion.status == status || (mapped && completion.status == OK);
        assert!(known, "{completion:?}");
    }
    assert!(rig.log.is_empty(), "what has ended is talked about");
}

#[test]
fn destroy() {
    let mapped = || end(&Rig::new(2, 2), abi::REQUEST_CONTEXT_DESTROY, true);
    let stalled = || end(&Rig::new(2, 2), abi::REQUEST_CONTEXT_DESTROY, false);
    holds(mapped);
    holds(stalled);
    holds(|| end(&Rig::new(2, 1), abi::REQUEST_CONTEXT_DESTROY, false));
    finds(Sabotage::DestroysLate, TAKEN, mapped);
    finds(Sabotage::StallsUnchecked, &[DEADLOCK], stalled);
}

#[test]
fn context_reset() {
    let mapped = || end(&Rig::new(2, 2), abi::REQUEST_CONTEXT_RESET, true);
    let stalled = || end(&Rig::new(2, 2), abi::REQUEST_CONTEXT_RESET, false);
    holds(mapped);
    holds(stalled);
    finds(Sabotage::EndsOutside, TAKEN, mapped);
    finds(Sabotage::StallsUnchecked, &[DEADLOCK], stalled);
}

#[test]
fn device_reset() {
    let mapped = || end(&Rig::new(2, 2), abi::REQUEST_DEVICE_RESET, true);
    let stalled = || end(&Rig::new(2, 2), abi::REQUEST_DEVICE_RESET, false);
    holds(mapped);
    holds(stalled);
    finds(Sabotage::StallsUnchecked, &[DEADLOCK], stalled);
}

/// A context is reset while its work fails: the context is alive afterwards, and what comes after runs.
#[test]
fn context_reset_while_work_fails() {
    fn model(rings: u16) {
        let rig = Rig::new(rings, rings);
        rig.map(CONTEXT, VA, ALL);
        // There is no such memory.
        rig.map(CONTEXT, VA + PAGE_SIZE, ALL | (1 << 40));
        for ring in 0..rings {
            rig.submit(ring, u64::from(ring) + 1, &[fill(VA + PAGE_SIZE, 0, 1)]);
        }
        rig.simple(abi::REQUEST_CONTEXT_RESET, CONTEXT);
        rig.submit(0, 3, &[fill(VA, 0, 1)]);
        assert_eq!(rig.completion(3).status, OK, "the context was taken out of error");
        for sequence in 1..=rings {
            assert_ne!(rig.completion(sequence.into()).status, OK);
        }
        assert_eq!(rig.status(CONTEXT), OK);
    }
    holds(|| model(2));
    holds(|| model(1));
    let words = ["taken out of error"];
    finds(Sabotage::FailsAfterReset, &words, || model(2));
    finds(Sabotage::ResetsUnlocked, &words, || model(1));
}

/// VRAM is zero after a reset, whatever was on its way.
#[test]
fn device_reset_clears_vram() {
    let model = || {
        let rig = Rig::new(2, 2);
        rig.map(CONTEXT, VA, VRAM);
        rig.submit(0, 1, &[fill(VA, 0, 1)]);
        rig.submit(1, 2, &[fill(VA, 1, 1)]);
        rig.simple(abi::REQUEST_DEVICE_RESET, 0);
        for sequence in [1, 2] {
            let status = rig.completion(sequence).status;
            assert!(status == OK || status == abi::STATUS_RESET, "{status}");
        }
        let page = rig.gpu().vram().slice(0, 16).expect("VRAM");
        for word in [0, 8] {
            let word = page.get_ref::<u64>(word).expect("a word").load();
            assert_eq!(word, 0, "something was left in VRAM");
        }
    };
    holds(model);
    finds(Sabotage::ClearsVramEarly, &["left in VRAM"], model);
}

#[test]
fn new_memory() {
    let model = || {
        let rig = Rig::new(2, 2);
        rig.map(CONTEXT, VA, ALL);
        let work = submit_increments(&rig);
        let memory = ModelMemory::new();
        rig.gpu().set_memory(memory.clone());
        rig.memory.revoke_all();
        for sequence in work {
            assert_eq!(rig.completion(sequence).status, OK);
        }
        for word in 0..2 {
            let sum = rig.memory.load(0, word) + memory.load(0, word);
            assert_eq!(sum, 4, "an increment was lost");
        }
    };
    holds(model);
    finds(Sabotage::SkipsEngine, TAKEN, model);
}

#[test]
fn pause_and_resume() {
    let model = || {
        let rig = Rig::new(2, 2);
        rig.map(CONTEXT, VA, ALL);
        let work = submit_increments(&rig);
        rig.gpu().pause();
        rig.memory.revoke_all();
        (0..2).for_each(|word| rig.memory.increment(0, word));
        rig.memory.grant_all();
        rig.gpu().resume();
        for sequence in work {
            assert_eq!(rig.completion(sequence).status, OK);
        }
        for word in 0..2 {
            assert_eq!(rig.memory.load(0, word), 5, "an increment was lost");
        }
    };
    holds(model);
    finds(Sabotage::SkipsEngine, TAKEN, model);
    finds(Sabotage::ResumesSilently, &[DEADLOCK], model);
}

/// What is ended while the device is paused ends then, and does not wait for the device.
#[test]
fn destroy_while_paused() {
    let model = || {
        let rig = Rig::new(2, 2);
        rig.map(CONTEXT, VA, ALL);
        rig.gpu().pause();
        rig.memory.revoke_all();
        let work = submit_increments(&rig);
        rig.simple(abi::REQUEST_CONTEXT_DESTROY, CONTEXT);
        for sequence in work {
            assert_eq!(rig.completion(sequence).status, abi::STATUS_NO_CONTEXT);
        }
    };
    holds(model);
    finds(Sabotage::EndsOutside, &[DEADLOCK], model);
}

// --- Small enough for every schedule -------------------------------------------------------------

/// A gate, and what a thread needs to be an engine behind it.
struct Small {
    gate: Gate,
    context: Arc<Context>,
    memory: Arc<ModelMemory>,
    vram: Vram,
    injector: Injector,
}

impl Small {
    fn new() -> Arc<Self> {
        let memory = ModelMemory::new();
        let context = Context::new(CONTEXT, Budget::new(10), vec![0]);
        drop(context.table.write().write(VA, &[RW], false).expect("an entry"));
        let this = Self {
            gate: Gate::default(),
            context,
            memory: memory.clone(),
            vram: Vram::new(vram::MIN_SIZE).expect("VRAM"),
            injector: Injector::default(),
        };
        this.gate.with(|inside| inside.memory = memory);
        Arc::new(this)
    }

    /// One stay: translates, unless that was done before, and goes for the page.
    fn stay(&self, known: Option<Translation>) -> Option<Translation> {
        let mut inside = self.gate.enter();
        let here = &mut *inside;
        let mut window = Window {
            context: &self.context,
            tlb: &mut here.tlb,
            memory: &*here.memory,
            vram: &self.vram,
            injector: &self.injector,
            tally: &mut Tally::default(),
            counting: false,
        };
        let found = known.or_else(|| window.translate(VA, ACCESS_READ, 8).ok());
        if let Some(found) = found {
            window.slice(found, VA, 8).expect("memory");
        }
        Gate::leave(inside);
        found
    }

    fn clear(&self) {
        let garbage = self.context.table.write().clear(0, VA_END);
        drop(garbage);
    }

    fn invalidate(&self) {
        self.gate
            .with(|inside| inside.tlb.invalidate(CONTEXT, VA, VA + PAGE_SIZE));
    }

    /// An engine that stays inside twice, against `revoke`.
    fn race(carries: bool, revoke: impl Fn(&Self)) {
        let small = Self::new();
        let there = small.clone();
        let engine = thread::spawn(move || {
            let found = there.stay(None);
            there.stay(found.filter(|_| carries));
        });
        revoke(&small);
        small.memory.revoke(0);
        engine.join().expect("an engine that ends");
    }
}

#[test]
fn every_schedule_of_one_engine_and_invalidate() {
    let clear = |small: &Small| {
        small.clear();
        small.invalidate();
    };
    let schedules = holds_always(move || Small::race(false, clear));
    println!("{schedules} schedules of CLEAR");
    let remap = |small: &Small| {
        drop(
            small
                .context
                .table
                .write()
                .write(VA, &[RW | PAGE_SIZE], false)
                .expect("an entry"),
        );
        small.invalidate();
    };
    let schedules = holds_always(move || Small::race(false, remap));
    println!("{schedules} schedules of MAP");
    fails("carried out", TAKEN, move || Small::race(true, clear));
    fails("cleared late", TAKEN, || {
        Small::race(false, |small| {
            small.invalidate();
            small.clear();
        });
    });
    fails("not invalidated", TAKEN, || Small::race(false, Small::clear));
    fails("not cleared", TAKEN, || Small::race(false, Small::invalidate));
}
