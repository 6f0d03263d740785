// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Execution of one command in steps, each short, each complete or not begun.
//!
//! An [`Execution`] knows how far it has come. A step that cannot translate an address changes nothing
//! beyond what it has counted as done, so the command goes on from exactly there when it is tried again.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use pinion_abi::{ACCESS_READ, ACCESS_WRITE, ChaseResult, EVENT_PREFETCH, EventRecord, PAGE_SIZE, PTE_VRAM};
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

use super::access::{OFFSET_MASK, Trouble, Window};
use super::atomic_unit::{AtomicUnit, Turn};
use super::clock::Clock;
use super::command::{Chase, Command};
use super::event::EventLog;
use super::gate::Gate;
use super::inject::Defect;
use super::operation::{Atomic, Operation, Width, WriteBack};
use super::timeline::Timelines;
use crate::sync::{now, point};

/// Most bytes that are moved at once.
const PIECE: u64 = 128 << 10;
/// Length of the way of a number over the bus and back, in steps of one or two nanoseconds.
const BUS_STEPS: u32 = 24;
const PAGE: usize = PAGE_SIZE as usize;

/// How much an engine may do before it goes out of its gate. The unit is a byte moved.
pub struct Budget<'a> {
    left: u64,
    gate: &'a Gate,
}

impl<'a> Budget<'a> {
    /// Some ten microseconds.
    pub const STAY: u64 = 256 << 10;
    /// What a command costs at least.
    const COMMAND: u64 = 256;
    /// What an operation of an ATOMIC, or a lookup, costs.
    const OPERATION: u64 = 256;

    /// A budget for one stay inside `gate`: no more than `most`, if that is less than usual.
    pub fn new(gate: &'a Gate, most: u64) -> Self {
        Self {
            left: Self::STAY.min(most),
            gate,
        }
    }

    /// Most bytes that are moved at once.
    fn piece(&self) -> u64 {
        PIECE.min(self.left).max(PAGE_SIZE)
    }

    /// Takes from it. What is spent may be more than what is left.
    fn spend(&mut self, cost: u64) {
        self.left = self.left.saturating_sub(cost);
    }

    /// Takes from it for a piece of work that is done; all that is left if somebody waits at the gate. That is looked at
    /// here and not before, so that every stay comes forward.
    fn done(&mut self, cost: u64) {
        self.spend(cost);
        self.yield_if_wanted();
    }

    /// Takes all that is left if somebody waits at the gate.
    pub fn yield_if_wanted(&mut self) {
        if self.gate.is_wanted() {
            self.left = 0;
        }
    }

    /// Whether nothing is left.
    pub fn is_spent(&self) -> bool {
        self.left == 0
    }
}

/// How a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is done.
    Done,
    /// The budget is spent.
    More,
    /// It has to wait for something other than a page table entry.
    Wait,
}

/// What others are to be told of what commands have done.
#[derive(Clone, Copy, Debug, Default)]
pub struct News {
    /// There is an event.
    pub events: bool,
    /// A number has changed that others may wait for.
    pub signal: bool,
}

/// What commands know besides memory.
pub struct Surroundings<'a> {
    /// The ring they are on.
    pub ring: u16,
    /// The sequence number of their submission.
    pub sequence: u64,
    /// All timelines.
    pub timelines: &'a Timelines,
    /// Where the time comes from.
    pub clock: &'a Clock,
    /// Where PREFETCH says what is missing.
    pub log: &'a EventLog,
    /// How long a number takes over the bus and back, in addition to what it takes anyhow.
    pub round_trip: Duration,
    /// What keeps atomic operations of engines on system memory apart.
    pub atomic_unit: &'a AtomicUnit,
}

/// One page of an engine's own, for data on its way.
pub type Scratch = Box<[u8; PAGE]>;

/// A page of zeroes.
pub fn scratch() -> Scratch {
    Box::new([0; PAGE])
}

/// A command on its way.
#[derive(Debug)]
pub struct Execution {
    command: Command,
    /// Bytes stored, operations done, nodes visited.
    done: u64,
    /// COPY: bytes that were loaded into the scratch page and not yet stored. CHASE: numbers of the result that were
    /// stored.
    loaded: usize,
    /// ATOMIC: what the last operation found. CHASE: the sum.
    found: u64,
    /// ATOMIC: it is still to be written back. CHASE: the value of the node is in it, the pointer is still to be loaded.
    owed: bool,
    /// CHASE: the next node. PREFETCH: end of the last page that was missing.
    pointer: u64,
    /// PREFETCH: the first page that was missing.
    missing: Option<u64>,
    /// Number of accesses that got through.
    moves: u64,
}

impl Execution {
    /// Begins `command`. The scratch page is its own until it ends.
    pub fn new(command: Command, scratch: &mut Scratch) -> Self {
        if let Command::Fill { pattern, .. } = &command {
            for bytes in scratch.chunks_exact_mut(pattern.len()) {
                bytes.copy_from_slice(pattern);
            }
        }
        let pointer = match command {
            Command::Chase(chase) => chase.head,
            _ => 0,
        };
        Self {
            command,
            done: 0,
            loaded: 0,
            found: 0,
            owed: false,
            pointer,
            missing: None,
            moves: 0,
        }
    }

    /// A number that grows with every access that gets through.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// ATOMIC: operations done. CHASE: nodes visited.
    pub fn repeats(&self) -> u64 {
        match self.command {
            Command::Atomic(_) | Command::Chase(_) => self.done,
            _ => 0,
        }
    }

    /// PREFETCH, when it is done: whether something was missing, so that there is an event.
    pub fn missed(&self) -> bool {
        matches!(self.command, Command::Prefetch { .. }) && self.pointer != 0
    }

    /// Whether it has changed a number that others may wait for, given that an access got through (`moved`), or none.
    pub fn signals(&self, moved: bool) -> bool {
        match self.command {
            // The timeline advances before it is stored.
            Command::Fence { .. } => true,
            Command::SemaphoreSignal { .. } | Command::Atomic(_) => moved,
            _ => false,
        }
    }

    /// Goes on until the command is done, the budget is spent, or something is missing.
    pub fn go_on(
        &mut self,
        window: &mut Window<'_>,
        around: &Surroundings<'_>,
        scratch: &mut Scratch,
        budget: &mut Budget<'_>,
    ) -> Result<Progress, Trouble> {
        budget.spend(Budget::COMMAND);
        match self.command {
            Command::Nop => Ok(Progress::Done),
            Command::Hang => Ok(Progress::Wait),
            Command::Copy {
                destination,
                source,
                length,
            } => pieces(budget, |budget| {
                self.copy(window, scratch, (destination, source, length), budget)
            }),
            Command::Fill { address, length, .. } => pieces(budget, |budget| {
                self.fill(window, scratch, address, length, budget)
            }),
            Command::Atomic(atomic) => self.atomic(window, &atomic, around, budget),
            Command::SemaphoreWait {
                address,
                width,
                mask,
                comparison,
                operand,
            } => {
                let value = self.load(window, address, width)?;
                let holds = comparison.holds(value & mask, operand);
                Ok(if holds { Progress::Done } else { Progress::Wait })
            }
            Command::SemaphoreSignal {
                address,
                width,
                operand,
            } => {
                let number = (width, operand);
                self.store(window, address, number, width.bytes(), Some(around.atomic_unit))
            }
            Command::Timestamp { address } => {
                let now = around.clock.now();
                self.store(window, address, (Width::W8, now), Width::W8.bytes(), None)
            }
            Command::Fence { value, write_back } => {
                around.timelines.advance(around.ring, value);
                let Some(va) = write_back else {
                    return Ok(Progress::Done);
                };
                let timeline = around.timelines.get(around.ring);
                self.store(window, va, (Width::W8, timeline), Width::W8.bytes(), None)
            }
            Command::FenceWait { ring, value } => Ok(if around.timelines.get(ring) >= value {
                Progress::Done
            } else {
                Progress::Wait
            }),
            Command::Prefetch {
                address,
                length,
                access,
            } => Ok(self.prefetch(window, around, (address, length, access), budget)),
            Command::Chase(chase) => self.chase(window, &chase, budget),
        }
    }

    fn moved(&mut self, done: u64) {
        self.done = self.done.wrapping_add(done);
        self.moves = self.moves.wrapping_add(1);
    }

    /// Copies one piece. Says whether it was the last.
    fn copy(
        &mut self,
        window: &mut Window<'_>,
        scratch: &mut Scratch,
        (destination, source, length): (u64, u64, u64),
        budget: &mut Budget<'_>,
    ) -> Result<bool, Trouble> {
        let left = length.saturating_sub(self.done);
        if left == 0 {
            return Ok(true);
        }
        // Where the source would be overwritten before it is read, begin at the end. A piece is loaded whole before
        // it is stored: the two sides of it may overlap.
        let (offset, size) = if destination.wrapping_sub(source) < length {
            let before_end =
                |address: u64| (address.wrapping_add(left).wrapping_sub(1) & OFFSET_MASK).wrapping_add(1);
            let size = left.min(before_end(source)).min(before_end(destination));
            (left.wrapping_sub(size), size)
        } else {
            (self.done, left.min(budget.piece()))
        };
        let (source, destination) = (source.wrapping_add(offset), destination.wrapping_add(offset));
        // What can be said to the driver in advance: only forwards does the rest lie ahead.
        let ahead = if offset == self.done { left } else { size };
        let small = |size: u64, address: u64| size.min(PAGE_SIZE.wrapping_sub(address & OFFSET_MASK));

        let stored = if self.loaded == 0 {
            let from = window.translate(source, ACCESS_READ, ahead)?;
            let size = size.min(window.reach(from, source));
            match window.translate(destination, ACCESS_WRITE, ahead) {
                Ok(to) => {
                    let source = window.data(from, source, size.min(window.reach(to, destination)))?;
                    let target = window.data(to, destination, source.len() as u64)?;
                    source.copy_to_volatile_slice(target);
                    let stored = source.len().min(target.len()) as u64;
                    if window.injector.strikes(Defect::CorruptCopy) {
                        corrupt(&target);
                    }
                    window.crossed(from, stored);
                    window.crossed(to, stored);
                    stored
                }
                Err(trouble) => {
                    // The load counts, so that the two sides need not be present at the same time.
                    let size = small(small(size, source), destination);
                    let piece = window.data(from, source, size)?;
                    let Some(buffer) = scratch.get_mut(..piece.len()) else {
                        return Err(Trouble::Bus(source));
                    };
                    piece.copy_to(buffer);
                    window.crossed(from, piece.len() as u64);
                    self.loaded = piece.len();
                    self.moved(0);
                    return Err(trouble);
                }
            }
        } else {
            let to = window.translate(destination, ACCESS_WRITE, ahead)?;
            let size = self.loaded;
            let Some(buffer) = scratch.get(..size) else {
                return Err(Trouble::Bus(destination));
            };
            window.data(to, destination, size as u64)?.copy_from(buffer);
            window.crossed(to, size as u64);
            self.loaded = 0;
            size as u64
        };
        window.tally.copied = window.tally.copied.saturating_add(stored);
        budget.done(stored);
        self.moved(stored);
        Ok(self.done >= length)
    }

    /// Fills one piece. Says whether it was the last.
    fn fill(
        &mut self,
        window: &mut Window<'_>,
        scratch: &mut Scratch,
        address: u64,
        length: u64,
        budget: &mut Budget<'_>,
    ) -> Result<bool, Trouble> {
        let left = length.saturating_sub(self.done);
        if left == 0 {
            return Ok(true);
        }
        // Address and length are aligned to the pattern, so every piece begins with its first byte.
        let va = address.wrapping_add(self.done);
        let size = left.min(PAGE_SIZE.wrapping_sub(va & OFFSET_MASK));
        let to = window.translate(va, ACCESS_WRITE, left)?;
        let target = window.data(to, va, size)?;
        let Some(buffer) = scratch.get(..target.len()) else {
            return Err(Trouble::Bus(va));
        };
        target.copy_from(buffer);
        let stored = buffer.len() as u64;
        window.crossed(to, stored);
        window.tally.filled = window.tally.filled.saturating_add(stored);
        budget.done(stored);
        self.moved(stored);
        Ok(self.done >= length)
    }

    fn atomic(
        &mut self,
        window: &mut Window<'_>,
        atomic: &Atomic,
        around: &Surroundings<'_>,
        budget: &mut Budget<'_>,
    ) -> Result<Progress, Trouble> {
        let mut page: Option<(u64, Page<'_>)> = None;
        // Given back by whatever leaves this function: a fault, or a look at the gate.
        let mut turn: Option<Turn<'_>> = None;
        loop {
            if self.owed {
                self.write_back(window, atomic)?;
            }
            if self.done >= u64::from(atomic.repeat) {
                return Ok(Progress::Done);
            }
            if budget.is_spent() {
                return Ok(Progress::More);
            }
            // Below `repeat`, which has 32 bits.
            let index = self.done as u32;
            let va = atomic.place(index);
            let number = va & !OFFSET_MASK;
            let here = match &page {
                // Every access is counted by itself, so it goes through the translation if somebody counts.
                Some((of, here)) if *of == number && !window.counting => here,
                _ => {
                    let to = window.translate(va, atomic.operation.access(), atomic.reach(index))?;
                    let here = Page {
                        bytes: window
                            .slice(to, number, PAGE_SIZE)
                            .map_err(|_| Trouble::Bus(va))?,
                        address: to.address_of(number),
                        vram: to.pte & PTE_VRAM != 0,
                    };
                    &page.insert((number, here)).1
                }
            };
            let offset = (va & OFFSET_MASK) as usize;
            turn = if here.vram || atomic.operation == Operation::Load {
                None
            } else {
                let address = here.address.wrapping_add(offset as u64);
                Some(around.atomic_unit.turn(turn, address))
            };
            let hurry = || budget.gate.is_wanted() || turn.as_ref().is_some_and(Turn::is_wanted);
            self.found = here
                .operate(offset, atomic, around.round_trip, hurry)
                .ok_or(Trouble::Bus(va))?;
            turn = turn.filter(|turn| !turn.is_wanted());
            if !here.vram {
                // There and back, or one way only.
                let times = match atomic.operation {
                    Operation::Load | Operation::Store => 1,
                    _ => 2,
                };
                let crossed = atomic.width.bytes().saturating_mul(times);
                window.tally.bus = window.tally.bus.saturating_add(crossed);
                if !around.round_trip.is_zero() {
                    // Long enough for one stay.
                    budget.spend(Budget::STAY);
                }
            }
            window.tally.operations = window.tally.operations.saturating_add(1);
            budget.done(Budget::OPERATION);
            self.moved(1);
            self.owed = match atomic.write_back {
                None => false,
                Some(WriteBack::All(_)) => true,
                Some(WriteBack::Last(_)) => self.done >= u64::from(atomic.repeat),
            };
        }
    }

    fn write_back(&mut self, window: &mut Window<'_>, atomic: &Atomic) -> Result<(), Trouble> {
        let width = atomic.width.bytes();
        let (va, ahead) = match atomic.write_back {
            Some(WriteBack::Last(va)) => (va, width),
            Some(WriteBack::All(va)) => {
                let before = self.done.saturating_sub(1);
                let ahead = u64::from(atomic.repeat).saturating_sub(before);
                (
                    va.wrapping_add(before.saturating_mul(width)),
                    ahead.saturating_mul(width),
                )
            }
            None => return Ok(()),
        };
        self.store(window, va, (atomic.width, self.found), ahead, None)?;
        self.owed = false;
        Ok(())
    }

    /// Loads a number. It is aligned.
    fn load(&mut self, window: &mut Window<'_>, va: u64, width: Width) -> Result<u64, Trouble> {
        let from = window.translate(va, ACCESS_READ, width.bytes())?;
        let bytes = window.slice(from, va, width.bytes())?;
        let value = match width {
            Width::W4 => bytes
                .get_atomic_ref::<AtomicU32>(0)
                .map(|place| place.load(Ordering::Acquire).into()),
            Width::W8 => bytes
                .get_atomic_ref::<AtomicU64>(0)
                .map(|place| place.load(Ordering::Acquire)),
        };
        let value = value.map_err(|_| Trouble::Bus(va))?;
        window.crossed(from, width.bytes());
        self.moves = self.moves.wrapping_add(1);
        Ok(value)
    }

    /// Stores a number, behind everything that was done before. It is aligned. `ahead` bytes from there on, it
    /// included, will be stored to one after the other. With the atomic unit, no atomic operation of another engine on system
    /// memory is halfway.
    fn store(
        &mut self,
        window: &mut Window<'_>,
        va: u64,
        (width, value): (Width, u64),
        ahead: u64,
        unit: Option<&AtomicUnit>,
    ) -> Result<Progress, Trouble> {
        let to = window.translate(va, ACCESS_WRITE, ahead)?;
        let bytes = window.slice(to, va, width.bytes())?;
        let _turn = unit
            .filter(|_| to.pte & PTE_VRAM == 0)
            .map(|unit| unit.turn(None, to.address_of(va)));
        match width {
            Width::W4 => bytes
                .get_atomic_ref::<AtomicU32>(0)
                .map(|place| place.store(value as u32, Ordering::Release)),
            Width::W8 => bytes
                .get_atomic_ref::<AtomicU64>(0)
                .map(|place| place.store(value, Ordering::Release)),
        }
        .map_err(|_| Trouble::Bus(va))?;
        window.crossed(to, width.bytes());
        self.moves = self.moves.wrapping_add(1);
        Ok(Progress::Done)
    }

    fn prefetch(
        &mut self,
        window: &mut Window<'_>,
        around: &Surroundings<'_>,
        (address, length, access): (u64, u64, u8),
        budget: &mut Budget<'_>,
    ) -> Progress {
        while self.done < length {
            if budget.is_spent() {
                return Progress::More;
            }
            let va = address.wrapping_add(self.done);
            let size = PAGE_SIZE
                .wrapping_sub(va & OFFSET_MASK)
                .min(length.saturating_sub(self.done));
            if !window.is_accessible(va, access) {
                self.missing.get_or_insert(va);
                self.pointer = va.wrapping_add(size);
            }
            self.done = self.done.saturating_add(size);
            budget.done(Budget::OPERATION);
        }
        if let Some(first) = self.missing.take() {
            around.log.hint(EventRecord {
                kind: EVENT_PREFETCH,
                ring: around.ring,
                context: window.context.id(),
                va: first,
                sequence: around.sequence,
                access,
                length: self.pointer.wrapping_sub(first),
                ..EventRecord::default()
            });
        }
        Progress::Done
    }

    fn chase(
        &mut self,
        window: &mut Window<'_>,
        chase: &Chase,
        budget: &mut Budget<'_>,
    ) -> Result<Progress, Trouble> {
        while self.pointer != 0 && self.done < u64::from(chase.repeat) {
            if budget.is_spent() {
                return Ok(Progress::More);
            }
            let place = |offset: u32| {
                // An overflow leads where a check fails.
                let va = self.pointer.saturating_add(offset.into());
                Window::check_pointer(va, 8).map(|()| va)
            };
            let (value, next) = (place(chase.value)?, place(chase.next)?);
            // The two can be on different pages, which need not be there at the same time.
            if !self.owed {
                let value = self.load(window, value, Width::W8)?;
                self.found = self.found.wrapping_add(value);
                self.owed = true;
            }
            self.pointer = self.load(window, next, Width::W8)?;
            self.owed = false;
            budget.done(Budget::OPERATION);
            self.moved(1);
        }
        let result = ChaseResult {
            pointer: self.pointer,
            sum: self.found,
            visited: self.done,
        };
        // Aligned to eight only, so it can end on another page.
        let size = result.as_bytes().len() as u64;
        for bytes in result.as_bytes().chunks_exact(8).skip(self.loaded) {
            let stored = (self.loaded as u64).saturating_mul(8);
            let va = chase.result.wrapping_add(stored);
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            let number = (Width::W8, u64::from_le_bytes(word));
            self.store(window, va, number, size.saturating_sub(stored), None)?;
            self.loaded = self.loaded.saturating_add(1);
        }
        Ok(Progress::Done)
    }
}

/// Repeats `piece` until it says that it was the last one, or the budget is spent.
fn pieces(
    budget: &mut Budget<'_>,
    mut piece: impl FnMut(&mut Budget<'_>) -> Result<bool, Trouble>,
) -> Result<Progress, Trouble> {
    loop {
        if piece(budget)? {
            return Ok(Progress::Done);
        }
        if budget.is_spent() {
            return Ok(Progress::More);
        }
    }
}

/// The deliberate defect of a copy.
fn corrupt(target: &VolatileSlice<'_>) {
    if let Ok(byte) = target.read_obj::<u8>(0) {
        // Fails only where reading failed.
        let _ = target.write_obj(byte ^ 0xff, 0);
    }
}

/// A page that atomic operations are done on.
struct Page<'a> {
    bytes: VolatileSlice<'a>,
    /// Guest physical, or in VRAM.
    address: u64,
    vram: bool,
}

macro_rules! operate {
    ($page:ident, $offset:ident, $atomic:ident, $bus:expr, $type:ty, $apply:expr) => {{
        let place = $page.bytes.get_atomic_ref::<$type>($offset).ok()?;
        match $atomic.operation {
            Operation::Load => place.load(Ordering::Relaxed),
            Operation::Store => {
                place.store($apply(0), Ordering::Relaxed);
                0
            }
            _ if $page.vram => place
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some($apply(old)))
                .ok()?,
            _ => {
                // A load and a store, and whatever the CPUs do in between is lost: the bus has no atomics.
                // This is what exclusive access is for. (Other engines wait for their turn.)
                let old = place.load(Ordering::Relaxed);
                $bus;
                place.store($apply(old), Ordering::Relaxed);
                old
            }
        }
    }};
}

impl Page<'_> {
    /// Does one operation at `offset` and says what it found; none if that is not in the page, or the
    /// memory behind the page is not aligned. On system memory it needs a turn of the atomic unit.
    fn operate(
        &self,
        offset: usize,
        atomic: &Atomic,
        round_trip: Duration,
        hurry: impl Fn() -> bool,
    ) -> Option<u64> {
        let Atomic {
            operation,
            operand,
            compare,
            ..
        } = *atomic;
        Some(match atomic.width {
            Width::W4 => {
                let apply = |old| operation.apply32(old, operand as u32, compare as u32);
                operate!(self, offset, atomic, bus(round_trip, hurry), AtomicU32, apply).into()
            }
            Width::W8 => {
                let apply = |old| operation.apply64(old, operand, compare);
                operate!(self, offset, atomic, bus(round_trip, hurry), AtomicU64, apply)
            }
        })
    }
}

/// The way of a number over the bus and back.
///
/// On a real bus it takes about a microsecond from the load until the store. Without any time between
/// the two a processor hardly ever gets in between, and a driver that forgets to ask for exclusive access
/// would get away with it. This takes some tens of nanoseconds: dependent work, not a pause instruction,
/// upon which a hypervisor may take the processor away.
///
/// A slow bus takes longer, but nobody waits at the gate, or for a turn, for that: then there is a `hurry`.
fn bus(round_trip: Duration, hurry: impl Fn() -> bool) {
    point();
    let mut number = 1_u64;
    for _ in 0..BUS_STEPS {
        number = std::hint::black_box(number).rotate_left(1);
    }
    std::hint::black_box(number);
    if !round_trip.is_zero() {
        let start = now();
        while now().saturating_duration_since(start) < round_trip && !hurry() {
            std::hint::spin_loop();
        }
    }
}
