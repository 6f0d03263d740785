// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A reference model of the device: what submissions do to memory and timelines, and how they end.
//!
//! It is to be obviously correct, so it is as simple as it can be. A context is one flat array of bytes, with a note
//! for each page of who may do what with it. There are no page tables, no TLB, no engines, no pieces: commands are
//! interpreted byte by byte, one after the other. Faults do not exist: pages that may be accessed are there, and an
//! access that may not be made is the end.
//!
//! How far a command has come that fails in the middle is left open by the specification in one case: a COPY of
//! ranges that overlap may begin at either end. The model begins where the device does.

use std::collections::BTreeMap;

use pinion_abi::{self as abi, PAGE_SIZE, VA_END};
use zerocopy::FromBytes;

use crate::gpu::command::Command;
use crate::gpu::operation::{Atomic, Operation, Width, WriteBack};
use crate::gpu::status::Error;

/// First address of what a context has; what it has is [`SPACE`] bytes. Whatever is elsewhere does not exist.
pub(super) const BASE: u64 = 0x7654_0000_0000;
pub(super) const SPACE: u64 = 2 * abi::LARGE_PAGE_SIZE;
pub(super) const PAGES: usize = (SPACE / PAGE_SIZE) as usize;

/// Who may do what with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Nothing may be done with it.
    Forbidden,
    /// What was in it is lost.
    Poisoned,
    /// Its entry leads to where there is no memory.
    Nowhere,
    /// It may be loaded from.
    Read,
    /// It may be loaded from and stored to.
    Write,
    /// Everything may be done with it.
    All,
}

impl Class {
    /// `ACCESS_*` bits of what may be done.
    pub(super) fn allowed(self) -> u8 {
        match self {
            Self::Forbidden | Self::Poisoned => 0,
            Self::Read => abi::ACCESS_READ,
            Self::Write => abi::ACCESS_READ | abi::ACCESS_WRITE,
            Self::All | Self::Nowhere => 7,
        }
    }
}

/// Why a command does not go on, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Cancelled(u64),
    Bus(u64),
}

/// What a completion has to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) status: u32,
    pub(super) executed: u32,
    pub(super) fault_va: u64,
    pub(super) repeats: u64,
    pub(super) timeline: u64,
}

/// A context.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) bytes: Vec<u8>,
    pub(super) pages: Vec<Class>,
    /// OK, or why it is in error.
    pub(super) status: u32,
}

impl Context {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; SPACE as usize],
            pages: vec![Class::Forbidden; PAGES],
            status: abi::STATUS_OK,
        }
    }

    /// Whether `access` may be made to the byte at `va`.
    fn check(&self, va: u64, access: u8) -> Result<(), Stop> {
        if !(BASE..BASE + SPACE).contains(&va) {
            return Err(Stop::Cancelled(va));
        }
        let class = self.pages[((va - BASE) / PAGE_SIZE) as usize];
        match class {
            _ if access & !class.allowed() != 0 => Err(Stop::Cancelled(va)),
            Class::Nowhere => Err(Stop::Bus(va)),
            _ => Ok(()),
        }
    }

    pub(super) fn load_byte(&self, va: u64) -> u8 {
        self.bytes[(va - BASE) as usize]
    }

    pub(super) fn store_byte(&mut self, va: u64, byte: u8) {
        self.bytes[(va - BASE) as usize] = byte;
    }

    /// The number at `va`, which has been checked.
    pub(super) fn load(&self, va: u64, width: Width) -> u64 {
        (0..width.bytes()).fold(0, |number, index| {
            number | u64::from(self.load_byte(va + index)) << (8 * index)
        })
    }

    pub(super) fn store(&mut self, va: u64, width: Width, number: u64) {
        for index in 0..width.bytes() {
            self.store_byte(va + index, (number >> (8 * index)) as u8);
        }
    }

    fn copy(&mut self, destination: u64, source: u64, length: u64) -> Result<(), Stop> {
        let here = |va: u64| (BASE..BASE + SPACE).contains(&va);
        let old: Vec<u8> = (0..length)
            .map(|index| source + index)
            .map(|va| if here(va) { self.load_byte(va) } else { 0 })
            .collect();
        let both = |this: &Self, index: u64| {
            this.check(source + index, abi::ACCESS_READ)?;
            this.check(destination + index, abi::ACCESS_WRITE)
        };
        if destination < source || destination >= source + length {
            for index in 0..length {
                both(self, index)?;
                self.store_byte(destination + index, old[index as usize]);
            }
            return Ok(());
        }
        for index in (0..length).rev() {
            if both(self, index).is_err() {
                // What fails is all that is on the same two pages.
                let same = |index: u64| {
                    let inside = |va: u64| va % PAGE_SIZE != 0;
                    index > 0 && inside(source + index) && inside(destination + index)
                };
                let mut first = index;
                while same(first) {
                    first -= 1;
                }
                return both(self, first);
            }
            self.store_byte(destination + index, old[index as usize]);
        }
        Ok(())
    }

    /// Says with an error how many repeats were done.
    fn atomic(&mut self, atomic: &Atomic) -> Result<(), (Stop, u64)> {
        for index in 0..atomic.repeat {
            let done = u64::from(index);
            let va = atomic.address + u64::from(index % atomic.span) * u64::from(atomic.stride);
            let access = match atomic.operation {
                Operation::Load => abi::ACCESS_READ,
                Operation::Store => abi::ACCESS_WRITE,
                _ => 7,
            };
            self.check(va, access).map_err(|stop| (stop, done))?;
            let old = self.load(va, atomic.width);
            self.store(va, atomic.width, apply(atomic, old));
            let found = match atomic.operation {
                Operation::Store => 0,
                _ => old,
            };
            let place = match atomic.write_back {
                Some(WriteBack::All(place)) => place + done * atomic.width.bytes(),
                Some(WriteBack::Last(place)) if index == atomic.repeat - 1 => place,
                _ => continue,
            };
            self.check(place, abi::ACCESS_WRITE)
                .map_err(|stop| (stop, done + 1))?;
            self.store(place, atomic.width, found);
        }
        Ok(())
    }

    /// Says with an error how many nodes were visited.
    fn chase(&mut self, head: u64, most: u32, offsets: [u32; 2], result: u64) -> Result<(), (Stop, u64)> {
        let (mut pointer, mut sum, mut visited) = (head, 0_u64, 0);
        while pointer != 0 && visited < u64::from(most) {
            let stop = |stop| (stop, visited);
            let places = offsets.map(|offset| pointer.saturating_add(offset.into()));
            for va in places {
                if va > VA_END - 8 || va % 8 != 0 {
                    return Err((Stop::Cancelled(va), visited));
                }
            }
            self.check(places[0], abi::ACCESS_READ).map_err(stop)?;
            sum = sum.wrapping_add(self.load(places[0], Width::W8));
            self.check(places[1], abi::ACCESS_READ).map_err(stop)?;
            pointer = self.load(places[1], Width::W8);
            visited += 1;
        }
        for (index, number) in (0..).zip([pointer, sum, visited]) {
            let va = result + 8 * index;
            self.check(va, abi::ACCESS_WRITE)
                .map_err(|stop| (stop, visited))?;
            self.store(va, Width::W8, number);
        }
        Ok(())
    }

    fn store_checked(&mut self, va: u64, width: Width, number: u64) -> Result<(), (Stop, u64)> {
        self.check(va, abi::ACCESS_WRITE).map_err(|stop| (stop, 0))?;
        self.store(va, width, number);
        Ok(())
    }

    /// What the device loads when commands are in memory.
    fn load_commands(&self, va: u64, count: u64) -> Result<Vec<u8>, Stop> {
        (va..va + 64 * count)
            .map(|va| {
                self.check(va, abi::ACCESS_READ)?;
                Ok(self.load_byte(va))
            })
            .collect()
    }
}

/// What an operation makes of a number.
fn apply(atomic: &Atomic, old: u64) -> u64 {
    let Atomic { operand, compare, .. } = *atomic;
    let signed = |number: u64| match atomic.width {
        Width::W4 => i64::from(number as u32 as i32),
        Width::W8 => number as i64,
    };
    let new = match atomic.operation {
        Operation::Add => old.wrapping_add(operand),
        Operation::And => old & operand,
        Operation::Or => old | operand,
        Operation::Xor => old ^ operand,
        Operation::MinUnsigned => old.min(operand),
        Operation::MaxUnsigned => old.max(operand),
        Operation::MinSigned if signed(operand) < signed(old) => operand,
        Operation::MaxSigned if signed(operand) > signed(old) => operand,
        Operation::MinSigned | Operation::MaxSigned | Operation::Load => old,
        Operation::Exchange | Operation::Store => operand,
        Operation::CompareExchange if old == compare => operand,
        Operation::CompareExchange => old,
    };
    match atomic.width {
        Width::W4 => new & 0xffff_ffff,
        Width::W8 => new,
    }
}

/// Where the commands of a submission are.
pub(super) enum Source<'a> {
    Inline(&'a [abi::Command]),
    Memory { va: u64, count: u64 },
}

/// All contexts that exist, and the timelines of all rings.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) contexts: BTreeMap<u32, Context>,
    pub(super) timelines: Vec<u64>,
}

impl Model {
    pub(super) fn new(rings: u16) -> Self {
        Self {
            contexts: BTreeMap::new(),
            timelines: vec![0; rings.into()],
        }
    }

    /// Does what a submission does, and says how it ends.
    pub(super) fn submit(&mut self, ring: usize, id: u32, sequence: u64, source: &Source<'_>) -> Expected {
        let mut expected = self.submit_untimed(ring, id, source);
        let timeline = &mut self.timelines[ring];
        *timeline = (*timeline).max(sequence);
        expected.timeline = *timeline;
        expected
    }

    fn submit_untimed(&mut self, ring: usize, id: u32, source: &Source<'_>) -> Expected {
        let refused = |status| Expected {
            status,
            ..Expected::default()
        };
        let rings = self.timelines.len() as u16;
        let decode = |raw: &abi::Command| Command::decode(raw, rings).map_err(Error::code);
        let mut commands = Vec::new();
        if let Source::Inline(raw) = source {
            match raw.iter().map(decode).collect() {
                Ok(decoded) => commands = decoded,
                Err(status) => return refused(status),
            }
        }
        let Some(context) = self.contexts.get_mut(&id) else {
            return refused(abi::STATUS_NO_CONTEXT);
        };
        if context.status != abi::STATUS_OK {
            return refused(abi::STATUS_CONTEXT_ERROR);
        }
        if let Source::Memory { va, count } = *source {
            let bytes = match context.load_commands(va, count) {
                Ok(bytes) => bytes,
                Err(stop) => return context.end(0, (stop, 0)),
            };
            let raw = bytes
                .chunks_exact(64)
                .map(|raw| abi::Command::read_from_bytes(raw).unwrap());
            match raw.map(|raw| decode(&raw)).collect() {
                Ok(decoded) => commands = decoded,
                Err(status) => return refused(status),
            }
        }
        for (executed, command) in (0..).zip(&commands) {
            if let Err(stop) = execute(context, &mut self.timelines[ring], command) {
                return context.end(executed, stop);
            }
        }
        Expected {
            executed: commands.len() as u32,
            ..Expected::default()
        }
    }
}

impl Context {
    /// A submission has come no further; the context is in error.
    fn end(&mut self, executed: u32, (stop, repeats): (Stop, u64)) -> Expected {
        let (status, fault_va) = match stop {
            Stop::Cancelled(va) => (abi::STATUS_FAULT_CANCELLED, va),
            Stop::Bus(va) => (abi::STATUS_BUS_ERROR, va),
        };
        self.status = status;
        Expected {
            status,
            executed,
            fault_va,
            repeats,
            timeline: 0,
        }
    }
}

/// Does what a command does. Waits are made so that they are over.
fn execute(context: &mut Context, timeline: &mut u64, command: &Command) -> Result<(), (Stop, u64)> {
    let plain = |stop| (stop, 0);
    match *command {
        Command::Nop | Command::Prefetch { .. } | Command::FenceWait { .. } => Ok(()),
        Command::Copy {
            destination,
            source,
            length,
        } => context.copy(destination, source, length).map_err(plain),
        Command::Fill {
            address,
            length,
            pattern,
        } => {
            for index in 0..length {
                context.check(address + index, abi::ACCESS_WRITE).map_err(plain)?;
                context.store_byte(address + index, pattern[(index % 8) as usize]);
            }
            Ok(())
        }
        Command::Atomic(atomic) => context.atomic(&atomic),
        Command::SemaphoreWait { address, .. } => context.check(address, abi::ACCESS_READ).map_err(plain),
        Command::SemaphoreSignal {
            address,
            width,
            operand,
        } => context.store_checked(address, width, operand),
        Command::Fence { value, write_back } => {
            *timeline = (*timeline).max(value);
            match write_back {
                Some(va) => context.store_checked(va, Width::W8, *timeline),
                None => Ok(()),
            }
        }
        Command::Chase(chase) => {
            context.chase(chase.head, chase.repeat, [chase.value, chase.next], chase.result)
        }
        Command::Timestamp { .. } | Command::Hang => {
            unreachable!("the model has no clock, and does not hang")
        }
    }
}
