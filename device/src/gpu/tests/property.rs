// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random sequences of requests and submissions, on the core and on the [model](super::model): memory, completions,
//! timelines and the state of contexts have to be the same.
//!
//! The pages of a context are somewhere in system memory or VRAM, small or in a large page, and on the move: a
//! driver of the most lazy sort ([`World`]) puts in page table entries only when something faults, often with fewer rights than it
//! could give, takes them away again, and moves what was in the pages elsewhere, while the engines work. The
//! model knows nothing of that.
//!
//! Normally a fixed set of cases is run. `PINION_PROPERTY_CASES=N` has N random ones run; what fails is then
//! added to `device/proptest-regressions/`, and tried first from then on.

use proptest::prelude::*;
use proptest::test_runner::{
    Config, FileFailurePersistence, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner,
};

use super::model::{BASE, Class, Context, Expected, Model, PAGES, SPACE, Source};
use super::*;
use crate::gpu::operation::Width;

const CONTEXTS: u32 = 3;
const RINGS: u16 = 3;
/// Fewer than rings, so that some share one.
const ENGINES: u16 = 2;
const LARGE: u64 = LARGE_PAGE_SIZE;

/// The pages that commands use: around the border of the two regions of a context.
const WINDOW: std::ops::Range<u64> = 500..532;
/// The pages that commands are in.
const COMMANDS: std::ops::Range<u64> = 1004..1024;
/// Pages for the commands of one submission.
const COMMANDS_EACH: u64 = 5;

/// Where small pages are, in system memory and in VRAM, behind the large ones of all contexts.
const SMALL: u64 = 2 * CONTEXTS as u64 * LARGE;

const _: () = assert!(SMALL + CONTEXTS as u64 * 64 * PAGE_SIZE <= MEMORY);
const _: () = assert!(BASE % LARGE == 0 && MEMORY == VRAM);

/// The pages that a context has while its regions are not large.
fn small_pages() -> impl Iterator<Item = u64> {
    WINDOW.chain(COMMANDS)
}

fn va_of(page: u64) -> u64 {
    BASE + page * PAGE_SIZE
}

// --- What can happen -------------------------------------------------------------------------------

/// One thing that a driver does.
#[derive(Clone, Debug)]
enum Step {
    Create(u32),
    Destroy(u32),
    Reset(u32),
    DeviceReset,
    /// Changes what may be done with a page.
    Classify {
        context: u32,
        page: u64,
        class: Class,
    },
    /// Puts a region into one large page, or into many small ones.
    Resize {
        context: u32,
        region: u64,
        large: bool,
    },
    /// Moves a page, or the large page that it is in, to VRAM or back.
    Move {
        context: u32,
        page: u64,
    },
    /// Maps pages before anybody asks for them.
    Map {
        context: u32,
        page: u64,
        count: u64,
    },
    /// Takes pages away, in one of several ways.
    Clear {
        context: u32,
        page: u64,
        count: u64,
        way: u8,
    },
    /// Each context that is in it runs its submissions, on a ring of its own, at the same time.
    Work {
        /// Those that are not there, or in error, are made or reset before.
        revive: bool,
        work: Vec<(u32, Vec<Batch>)>,
    },
}

/// A submission.
#[derive(Clone, Debug)]
struct Batch {
    /// The commands are in memory, this far into the place for them.
    indirect: Option<u64>,
    actions: Vec<Action>,
}

/// A command, as long as it is not known what it will find.
#[derive(Clone, Debug)]
enum Action {
    /// It is what it is.
    Fixed(abi::Command),
    /// Waits until there is what is there.
    Wait {
        address: u64,
        width: u8,
        operation: u8,
        mask: u64,
    },
    /// Advances the timeline by this.
    Fence { ahead: u64, write_back: Option<u64> },
    /// Waits for what a ring has reached.
    FenceWait { ring: u16 },
    /// Follows a list with these nodes, behind the last of which there is `end`.
    Chase {
        nodes: Vec<u64>,
        end: u64,
        most: u32,
        value: u32,
        next: u32,
        result: u64,
    },
}

fn a_place() -> impl Strategy<Value = u64> {
    let page = prop_oneof![
        80 => WINDOW,
        1 => Just(WINDOW.start - 1),
        1 => Just(WINDOW.end),
    ];
    let offset = prop_oneof![3 => 0..PAGE_SIZE, 1 => Just(0), 2 => PAGE_SIZE - 16..PAGE_SIZE];
    (page, offset).prop_map(|(page, offset)| va_of(page) + offset)
}

fn a_length() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..64_u64,
        4 => 0..6000_u64,
        2 => 0..40_000_u64,
        1 => 0..140_000_u64,
    ]
}

/// As much of `length` as there is in front of the end of the window, nine times out of ten.
fn clamp(address: u64, length: u64, clamped: bool) -> u64 {
    let end = va_of(WINDOW.end);
    if clamped {
        length.min(end.saturating_sub(address))
    } else {
        length
    }
}

fn a_copy() -> impl Strategy<Value = Action> {
    let near = prop_oneof![
        Just(1_u64),
        Just(8),
        Just(4095),
        Just(4096),
        Just(4097),
        0..70_000_u64
    ];
    let clamped = prop::bool::weighted(0.9);
    (a_place(), a_place(), a_length(), near, 0..4_u8, clamped).prop_map(
        |(source, other, length, near, overlap, clamped)| {
            let destination = match overlap {
                0 => (source + near).min(va_of(WINDOW.end) - 1),
                1 => (source - near).max(va_of(WINDOW.start)),
                _ => other,
            };
            let length = clamp(source.max(destination), length, clamped);
            Action::Fixed(copy(destination, source, length))
        },
    )
}

fn a_fill() -> impl Strategy<Value = Action> {
    let clamped = prop::bool::weighted(0.9);
    (a_place(), a_length(), 0..4_u32, any::<u64>(), clamped).prop_map(
        |(address, length, width, operand, clamped)| {
            let width = 1_u64 << width;
            let address = address & !(width - 1);
            let length = clamp(address, length, clamped) & !(width - 1);
            let operand = operand & (u64::MAX >> (64 - 8 * width));
            Action::Fixed(fill(address, length, width as u8, operand))
        },
    )
}

fn an_atomic() -> impl Strategy<Value = Action> {
    let shape = (
        1..60_u32,
        0..5_u32,
        prop_oneof![
            Just(0_u32),
            Just(8),
            Just(24),
            Just(4096),
            Just(4104),
            0..20_000_u32
        ],
    );
    let numbers = (any::<u64>(), any::<u64>(), any::<bool>());
    let small_numbers = (0..3_u64, 0..3_u64, any::<bool>());
    (
        a_place(),
        a_place(),
        0..12_u8,
        any::<bool>(),
        0..4_u8,
        shape,
        prop_oneof![numbers, small_numbers],
    )
        .prop_map(
            |(address, source, operation, wide, flags, (repeat, span, stride), numbers)| {
                let width = if wide { 8 } else { 4 };
                let mask = if wide { u64::MAX } else { 0xffff_ffff };
                let (operand, compare, _) = numbers;
                // Neither without the other.
                let flags = if flags == abi::COMMAND_WRITE_BACK_ALL {
                    0
                } else {
                    flags
                };
                Action::Fixed(abi::Command {
                    opcode: abi::COMMAND_ATOMIC,
                    operation,
                    width: width as u8,
                    flags,
                    repeat,
                    address: address & !(width - 1),
                    source: if flags == 0 { 0 } else { source & !(width - 1) },
                    operand: if operation == abi::ATOMIC_LOAD {
                        0
                    } else {
                        operand & mask
                    },
                    compare: if operation == abi::ATOMIC_COMPARE_EXCHANGE {
                        compare & mask
                    } else {
                        0
                    },
                    stride: stride & !(width as u32 - 1),
                    span,
                    ..Default::default()
                })
            },
        )
}

fn a_chase() -> impl Strategy<Value = Action> {
    let nodes = prop::collection::vec(a_place().prop_map(|place| place & !7), 1..12);
    let end = prop_oneof![
        12 => Just(0),
        1 => a_place().prop_map(|place| place & !7),
        1 => any::<u64>(),
        1 => Just(VA_END - 8),
    ];
    let offset = || (0..4_u32).prop_map(|offset| 8 * offset);
    (nodes, end, 1..40_u32, offset(), offset(), a_place()).prop_map(
        |(nodes, end, most, value, next, result)| Action::Chase {
            nodes,
            end,
            most,
            value,
            next,
            result: result & !7,
        },
    )
}

/// Something that is refused.
fn a_malformed_command() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(abi::Command { opcode: 40, ..nop() }),
        Just(abi::Command { reserved: 5, ..nop() }),
        Just(copy(VA_END - 3, BASE, 4)),
        Just(fence_wait(RINGS, 0)),
    ]
    .prop_map(Action::Fixed)
}

fn an_action() -> impl Strategy<Value = Action> {
    let wide = || prop_oneof![Just(4_u8), Just(8_u8)];
    let aligned = |address: u64, width: u8| address & !(u64::from(width) - 1);
    let wait =
        (a_place(), wide(), 0..6_u8, any::<u64>()).prop_map(move |(address, width, operation, mask)| {
            Action::Wait {
                address: aligned(address, width),
                width,
                operation,
                mask: mask & (u64::MAX >> (64 - 8 * u32::from(width))),
            }
        });
    let signal = (a_place(), wide(), any::<u32>()).prop_map(move |(address, width, operand)| {
        Action::Fixed(abi::Command {
            width,
            ..semaphore_signal(aligned(address, width), operand.into())
        })
    });
    let fence = (
        0..50_u64,
        prop::option::of(a_place().prop_map(|place| place & !7)),
    )
        .prop_map(|(ahead, write_back)| Action::Fence { ahead, write_back });
    let look = (a_place(), a_length(), 1..8_u8)
        .prop_map(|(address, length, access)| Action::Fixed(prefetch(address, length, access)));
    prop_oneof![
        1 => Just(Action::Fixed(nop())),
        8 => a_copy(),
        5 => a_fill(),
        8 => an_atomic(),
        2 => wait,
        2 => signal,
        2 => fence,
        1 => (0..RINGS).prop_map(|ring| Action::FenceWait { ring }),
        1 => look,
        3 => a_chase(),
    ]
}

fn a_batch() -> impl Strategy<Value = Batch> {
    let indirect = prop::option::weighted(0.3, (0..2 * PAGE_SIZE / 8).prop_map(|place| 8 * place));
    let actions = prop_oneof![
        20 => prop::collection::vec(an_action(), 1..8),
        1 => prop::collection::vec(prop_oneof![3 => an_action(), 1 => a_malformed_command()], 1..8),
    ];
    (indirect, actions).prop_map(|(indirect, actions)| Batch { indirect, actions })
}

fn a_step() -> impl Strategy<Value = Step> {
    let context = || 0..CONTEXTS;
    let page = || prop_oneof![5 => WINDOW, 1 => COMMANDS];
    let class = prop_oneof![
        3 => Just(Class::All),
        3 => Just(Class::Write),
        1 => Just(Class::Read),
        1 => Just(Class::Forbidden),
        1 => Just(Class::Poisoned),
        2 => Just(Class::Nowhere),
    ];
    let work = (context(), prop::collection::vec(a_batch(), 1..4));
    prop_oneof![
        1 => context().prop_map(Step::Create),
        1 => context().prop_map(Step::Destroy),
        1 => context().prop_map(Step::Reset),
        1 => prop::bool::weighted(0.2).prop_map(|device| if device { Step::DeviceReset } else { Step::Reset(0) }),
        5 => (context(), page(), class).prop_map(|(context, page, class)| Step::Classify { context, page, class }),
        2 => (context(), 0..2_u64, any::<bool>())
            .prop_map(|(context, region, large)| Step::Resize { context, region, large }),
        2 => (context(), page()).prop_map(|(context, page)| Step::Move { context, page }),
        2 => (context(), page(), 1..20_u64).prop_map(|(context, page, count)| Step::Map { context, page, count }),
        2 => (context(), page(), 1..600_u64, 0..4_u8)
            .prop_map(|(context, page, count, way)| Step::Clear { context, page, count, way }),
        14 => (prop::bool::weighted(0.9), prop::collection::vec(work, 1..=RINGS as usize))
            .prop_map(|(revive, work)| Step::Work { revive, work }),
    ]
}

/// What is done, and where the driver's whims begin.
fn a_story() -> impl Strategy<Value = (Vec<Step>, u64)> {
    (prop::collection::vec(a_step(), 1..24), 1..u64::MAX)
}

// --- The driver ------------------------------------------------------------------------------------

/// Where the pages of a context are.
#[derive(Clone, Debug)]
struct Layout {
    /// Whether each of the two regions is one large page.
    large: [bool; 2],
    /// Whether each page, or the large page that it is in, is in VRAM.
    vram: Vec<bool>,
}

/// A device, the model of it, and a driver for both.
struct World {
    rig: Rig,
    model: Model,
    layouts: HashMap<u32, Layout>,
    whims: Random,
    patience: Duration,
}

type Verdict = Result<(), TestCaseError>;

fn violated<T>(what: String) -> Result<T, TestCaseError> {
    Err(TestCaseError::fail(what))
}

/// Says what is different.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Verdict {
    if found == expected {
        Ok(())
    } else {
        violated(format!("{what}: found {found:x?}, expected {expected:x?}"))
    }
}

impl World {
    fn new(inject: &[&str], seed: u64, patience: Duration) -> Self {
        let mut rig = Rig::build(settings(RINGS, ENGINES), inject);
        rig.tickets = 1;
        Self {
            rig,
            model: Model::new(RINGS),
            layouts: HashMap::new(),
            whims: Random(seed),
            patience,
        }
    }

    /// The VRAM flag and address of a page.
    fn location(&self, context: u32, page: u64) -> (bool, u64) {
        let layout = &self.layouts[&context];
        let region = page / 512;
        let address = if layout.large[region as usize] {
            (2 * u64::from(context) + region) * LARGE + page % 512 * PAGE_SIZE
        } else {
            // In an order of their own.
            let slot = if WINDOW.contains(&page) {
                page - WINDOW.start
            } else {
                page - COMMANDS.start + 32
            };
            SMALL + (u64::from(context) * 64 + slot * 7 % 64) * PAGE_SIZE
        };
        (layout.vram[page as usize], address)
    }

    /// The entry for a page, with these rights.
    fn entry(&self, context: u32, page: u64, rights: u8) -> u64 {
        let (vram, address) = self.location(context, page);
        let target = if vram { abi::PTE_VRAM } else { 0 };
        let entry = abi::PTE_VALID | u64::from(rights) << 1 | target;
        match self.model.contexts[&context].pages[page as usize] {
            Class::Nowhere => entry | MEMORY,
            Class::Poisoned => entry | abi::PTE_POISONED | address,
            _ => entry | address,
        }
    }

    /// What is in `length` bytes of a page from its beginning.
    fn read(&self, (vram, address): (bool, u64), length: u64) -> Vec<u8> {
        if !vram {
            return self.rig.bytes(address, length as usize);
        }
        let mut bytes = vec![0; length as usize];
        let slice = self.rig.gpu.vram().slice(address, length as usize).unwrap();
        slice.read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    fn write(&self, (vram, address): (bool, u64), bytes: &[u8]) {
        if vram {
            self.rig.vram_write(address, bytes);
        } else {
            self.rig.write(address, bytes);
        }
    }

    /// Stores like a CPU, in the model and where the device will see it.
    fn store(&mut self, context: u32, va: u64, bytes: &[u8]) {
        for (va, &byte) in (va..).zip(bytes) {
            let page = (va - BASE) / PAGE_SIZE;
            if !self.exists(context, page) {
                continue;
            }
            let (vram, address) = self.location(context, page);
            self.write((vram, address + va % PAGE_SIZE), &[byte]);
            let known = self.model.contexts.get_mut(&context).unwrap();
            known.store_byte(va, byte);
        }
    }

    /// Whether there is anything behind a page.
    fn exists(&self, context: u32, page: u64) -> bool {
        let layout = &self.layouts[&context];
        layout.large[(page / 512) as usize] || WINDOW.contains(&page) || COMMANDS.contains(&page)
    }

    /// The pages of a context that have something behind them.
    fn pages(&self, context: u32) -> Vec<u64> {
        let all = 0..PAGES as u64;
        all.filter(|&page| self.exists(context, page)).collect()
    }

    /// Puts in the entry of a page that exists, and which may be used for `rights`.
    fn map(&mut self, context: u32, page: u64, rights: u8) {
        let region = page / 512;
        if self.layouts[&context].large[region as usize] {
            let first = region * 512;
            let entry = self.entry(context, first, 7);
            self.rig.map_large(context, va_of(first), &[entry]);
        } else {
            let entry = self.entry(context, page, rights);
            self.rig.map(context, va_of(page), &[entry]);
        }
    }

    fn take(&mut self, context: u32, page: u64) {
        self.rig
            .invalidate(context, va_of(page), PAGE_SIZE, abi::INVALIDATE_CLEAR);
    }

    /// Moves a page, or the large page that it is in, to the other memory. The engines may be at work.
    fn relocate(&mut self, context: u32, page: u64) {
        let region = page / 512;
        let pages = if self.layouts[&context].large[region as usize] {
            region * 512..(region + 1) * 512
        } else {
            page..page + 1
        };
        let length = (pages.end - pages.start) * PAGE_SIZE;
        self.rig
            .invalidate(context, va_of(pages.start), length, abi::INVALIDATE_CLEAR);
        // From here on no access is in flight: that is the promise.
        let from = self.location(context, pages.start);
        let bytes = self.read(from, length);
        // Whoever still goes there finds nothing of what was.
        self.write(from, &vec![0xdb; length as usize]);
        let layout = self.layouts.get_mut(&context).unwrap();
        for page in pages.clone() {
            layout.vram[page as usize] = !from.0;
        }
        let to = self.location(context, pages.start);
        self.write(to, &bytes);
    }

    fn step(&mut self, step: &Step) -> Verdict {
        match *step {
            Step::Create(context) => {
                let status = self.rig.simple(abi::REQUEST_CONTEXT_CREATE, context);
                if self.model.contexts.contains_key(&context) {
                    return same("CREATE", status, abi::STATUS_CONTEXT_EXISTS);
                }
                same("CREATE", status, OK)?;
                self.furnish(context);
            }
            Step::Destroy(context) => {
                let status = self.rig.simple(abi::REQUEST_CONTEXT_DESTROY, context);
                let expected = match self.model.contexts.remove(&context) {
                    Some(_) => OK,
                    None => abi::STATUS_NO_CONTEXT,
                };
                self.layouts.remove(&context);
                same("DESTROY", status, expected)?;
            }
            Step::Reset(context) => {
                let status = self.rig.simple(abi::REQUEST_CONTEXT_RESET, context);
                let expected = match self.model.contexts.get_mut(&context) {
                    Some(context) => {
                        context.status = OK;
                        OK
                    }
                    None => abi::STATUS_NO_CONTEXT,
                };
                same("CONTEXT_RESET", status, expected)?;
            }
            Step::DeviceReset => {
                same("DEVICE_RESET", self.rig.simple(abi::REQUEST_DEVICE_RESET, 0), OK)?;
                self.model.contexts.clear();
                self.layouts.clear();
                for address in (0..VRAM).step_by(64 << 10) {
                    same("VRAM after a reset", self.rig.vram_load(address), 0)?;
                }
            }
            Step::Work { revive, ref work } => {
                for (context, _) in work.iter().filter(|_| revive) {
                    match self.model.contexts.get(context) {
                        None => self.step(&Step::Create(*context))?,
                        Some(known) if known.status != OK => self.step(&Step::Reset(*context))?,
                        Some(_) => {}
                    }
                }
                return self.work(work);
            }
            // The rest is about a context that has to be there.
            Step::Classify { context, .. }
            | Step::Resize { context, .. }
            | Step::Move { context, .. }
            | Step::Map { context, .. }
            | Step::Clear { context, .. }
                if !self.model.contexts.contains_key(&context) => {}
            Step::Classify { context, page, class } => {
                // A large page is good for everything.
                if !self.layouts[&context].large[(page / 512) as usize] {
                    self.take(context, page);
                    let known = self.model.contexts.get_mut(&context).unwrap();
                    known.pages[page as usize] = class;
                }
            }
            Step::Resize {
                context,
                region,
                large,
            } => self.resize(context, region, large),
            Step::Move { context, page } => self.relocate(context, page),
            Step::Map { context, page, count } => {
                for page in page..(page + count).min(PAGES as u64) {
                    self.prepare(context, page);
                }
            }
            Step::Clear {
                context,
                page,
                count,
                way,
            } => self.clear(context, page..(page + count).min(PAGES as u64), way),
        }
        Ok(())
    }

    /// Maps a page with all that may be done with it, if that is anything.
    fn prepare(&mut self, context: u32, page: u64) {
        let class = self.model.contexts[&context].pages[page as usize];
        if self.exists(context, page) && class != Class::Forbidden {
            // A right that is there is never taken away without an INVALIDATE, so a page that is there is left alone.
            if self.rig.query(abi::QUERY_ENTRY, context, 0, va_of(page)) == 0 {
                self.map(context, page, class.allowed());
            }
        }
    }

    /// Fills a new context with pages, and these with something.
    fn furnish(&mut self, context: u32) {
        self.model.contexts.insert(context, Context::new());
        let layout = Layout {
            large: [false; 2],
            vram: (0..PAGES).map(|page| page % 3 == 1).collect(),
        };
        self.layouts.insert(context, layout);
        for page in small_pages() {
            let bytes: Vec<u8> = (0..PAGE_SIZE / 8)
                .flat_map(|_| self.whims.below(u64::MAX).to_le_bytes())
                .collect();
            self.write(self.location(context, page), &bytes);
            let known = self.model.contexts.get_mut(&context).unwrap();
            known.pages[page as usize] = Class::All;
            known.bytes[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize].copy_from_slice(&bytes);
        }
    }

    fn resize(&mut self, context: u32, region: u64, large: bool) {
        if self.layouts[&context].large[region as usize] == large {
            return;
        }
        let pages = region * 512..(region + 1) * 512;
        self.rig
            .invalidate(context, va_of(pages.start), LARGE, abi::INVALIDATE_CLEAR);
        let vram = self.whims.below(2) == 0;
        let layout = self.layouts.get_mut(&context).unwrap();
        layout.large[region as usize] = large;
        for page in pages.clone() {
            layout.vram[page as usize] = if large { vram } else { self.whims.below(2) == 0 };
        }
        // What is there is, in both sizes, what the model says; what gets nothing behind it is gone.
        let known = self.model.contexts.get_mut(&context).unwrap();
        for page in pages.clone() {
            let exists = large || WINDOW.contains(&page) || COMMANDS.contains(&page);
            known.pages[page as usize] = if exists { Class::All } else { Class::Forbidden };
            if !exists {
                known.bytes[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize].fill(0);
            }
        }
        let bytes = known.bytes[(pages.start * PAGE_SIZE) as usize..][..LARGE as usize].to_vec();
        if large {
            self.write(self.location(context, pages.start), &bytes);
            return;
        }
        for page in small_pages().filter(|page| pages.contains(page)) {
            let offset = ((page - pages.start) * PAGE_SIZE) as usize;
            self.write(
                self.location(context, page),
                &bytes[offset..][..PAGE_SIZE as usize],
            );
        }
    }

    fn clear(&mut self, context: u32, pages: std::ops::Range<u64>, way: u8) {
        let (va, count) = (va_of(pages.start), pages.end - pages.start);
        match way {
            // What is remembered goes, what is in the page table stays.
            0 => self.rig.invalidate(context, va, count * PAGE_SIZE, 0),
            1 => self.rig.invalidate(0, 0, 0, abi::INVALIDATE_EVERYTHING),
            2 => self
                .rig
                .invalidate(context, va, count * PAGE_SIZE, abi::INVALIDATE_CLEAR),
            _ => {
                let entries = vec![0; count.min(512) as usize];
                self.rig.map(context, va, &entries);
                // A large page goes whole with any part of it; so it is forgotten whole.
                self.rig
                    .invalidate(context, va, entries.len() as u64 * PAGE_SIZE, 0);
            }
        }
    }

    /// The command that an action is now, and what it stores before.
    fn command(&mut self, ring: usize, context: u32, action: &Action) -> abi::Command {
        let known = self.model.contexts.get(&context);
        match *action {
            Action::Fixed(command) => command,
            Action::Wait {
                address,
                width,
                operation,
                mask,
            } => {
                let inside = (BASE..BASE + SPACE).contains(&address);
                let wide = Width::decode(width).unwrap();
                let value = known
                    .filter(|_| inside)
                    .map_or(0, |known| known.load(address, wide))
                    & mask;
                let (operation, operand) = match operation {
                    abi::COMPARE_NOT_EQUAL => (operation, value ^ 1),
                    abi::COMPARE_LESS if value < wide.mask() => (operation, value + 1),
                    abi::COMPARE_GREATER if value > 0 => (operation, value - 1),
                    abi::COMPARE_LESS_EQUAL | abi::COMPARE_GREATER_EQUAL => (operation, value),
                    _ => (abi::COMPARE_EQUAL, value),
                };
                abi::Command {
                    operation,
                    width,
                    compare: mask,
                    ..semaphore_wait(address, operand)
                }
            }
            Action::Fence { ahead, write_back } => {
                let value = self.model.timelines[ring] + ahead;
                match write_back {
                    Some(place) => fence_to(value, place),
                    None => fence(value),
                }
            }
            Action::FenceWait { ring: other } => {
                // Of another ring it is only sure what it had reached before.
                fence_wait(other, self.rig.timeline(other))
            }
            Action::Chase {
                ref nodes,
                most,
                value,
                next,
                result,
                ..
            } => abi::Command {
                opcode: abi::COMMAND_CHASE,
                repeat: most,
                address: nodes[0],
                source: result,
                stride: value,
                span: next,
                ..Default::default()
            },
        }
    }

    /// Stores the lists that a CHASE will follow.
    fn lay_out(&mut self, context: u32, action: &Action) {
        if let Action::Chase { nodes, end, next, .. } = action {
            let following = nodes.iter().skip(1).chain(std::iter::once(end));
            for (node, following) in nodes.iter().zip(following) {
                self.store(context, node + u64::from(*next), &following.to_le_bytes());
            }
        }
    }

    fn work(&mut self, work: &[(u32, Vec<Batch>)]) -> Verdict {
        // Each context once, and on a ring that is now its own.
        let turn = self.whims.below(RINGS.into());
        let mut slots: Vec<(u16, u32, &[Batch])> = Vec::new();
        for (context, batches) in work {
            if slots.iter().all(|(_, other, _)| other != context) {
                let ring = (slots.len() as u64 + turn) % u64::from(RINGS);
                slots.push((ring as u16, *context, batches));
            }
        }
        for (_, context, batches) in &slots {
            if self.model.contexts.contains_key(context) {
                for action in batches.iter().flat_map(|batch| &batch.actions) {
                    self.lay_out(*context, action);
                }
            }
        }
        let mut expected = HashMap::new();
        let mut submissions = Vec::new();
        for (ring, context, batches) in &slots {
            for (number, batch) in (0..).zip(*batches) {
                let (sequence, bytes, outcome) = self.prepare_batch(*ring, *context, number, batch);
                expected.insert(sequence, outcome);
                submissions.push((*ring, sequence, bytes));
            }
        }
        for (ring, sequence, bytes) in submissions {
            self.rig.submit_bytes(ring, sequence, bytes);
        }
        self.serve(&expected)?;
        for (ring, context, _) in slots {
            let timeline = self.rig.timeline(ring);
            same("a timeline", timeline, self.model.timelines[usize::from(ring)])?;
            self.compare(context)?;
        }
        Ok(())
    }

    /// Has the model do what a submission does. Says how it ends, and what to submit.
    fn prepare_batch(
        &mut self,
        ring: u16,
        context: u32,
        number: u64,
        batch: &Batch,
    ) -> (u64, Vec<u8>, Expected) {
        self.rig.tickets += 1;
        let sequence = self.rig.tickets;
        // What an action finds depends on those before it: they are done one after the other, and then taken back.
        let known = self.model.contexts.get(&context).cloned();
        let timelines = self.model.timelines.clone();
        let mut commands = Vec::new();
        for action in &batch.actions {
            let command = self.command(ring.into(), context, action);
            self.model
                .submit(ring.into(), context, 0, &Source::Inline(&[command]));
            commands.push(command);
        }
        self.model.timelines = timelines;
        if let Some(known) = known {
            self.model.contexts.insert(context, known);
        }
        let count = commands.len();
        match batch.indirect {
            Some(offset) if self.model.contexts.contains_key(&context) => {
                let va = va_of(COMMANDS.start + number * COMMANDS_EACH) + offset;
                self.store(context, va, commands.as_bytes());
                let source = Source::Memory {
                    va,
                    count: count as u64,
                };
                let outcome = self.model.submit(ring.into(), context, sequence, &source);
                let header = submission(context, count, sequence, abi::SUBMIT_INDIRECT);
                let bytes = [header.as_bytes(), abi::Indirect { va }.as_bytes()].concat();
                (sequence, bytes, outcome)
            }
            _ => {
                let source = Source::Inline(&commands);
                let outcome = self.model.submit(ring.into(), context, sequence, &source);
                let header = submission(context, count, sequence, 0);
                (
                    sequence,
                    [header.as_bytes(), commands.as_bytes()].concat(),
                    outcome,
                )
            }
        }
    }

    /// Repairs what faults until all submissions have ended, as they should.
    fn serve(&mut self, expected: &HashMap<u64, Expected>) -> Verdict {
        let start = Instant::now();
        let mut missing = expected.len();
        let mut last = vec![0; RINGS.into()];
        while missing > 0 {
            while let Ok((ring, ticket, done)) = self.rig.completions.try_recv() {
                same("the sequence of a completion", done.sequence, ticket)?;
                let found = Expected {
                    status: done.status,
                    executed: done.executed,
                    fault_va: done.fault_va,
                    repeats: done.repeats,
                    timeline: done.timeline,
                };
                same(
                    &format!("completion {ticket} on ring {ring}"),
                    Some(&found),
                    expected.get(&ticket),
                )?;
                let last = &mut last[usize::from(ring)];
                if ticket <= *last {
                    return violated(format!("ring {ring}: {ticket} came after {last}"));
                }
                *last = ticket;
                missing -= 1;
            }
            while let Some(event) = self.rig.log.take() {
                self.handle(&event)?;
            }
            if self.whims.below(64) == 0 {
                self.disturb();
            }
            if start.elapsed() > self.patience {
                return violated(format!("waited {:?} for {missing} completions", self.patience));
            }
            std::thread::yield_now();
        }
        // What a completion says was said before it came.
        while let Some(event) = self.rig.log.take() {
            if event.kind == abi::EVENT_FAULT {
                return violated(format!("nothing can stall any more: {event:x?}"));
            }
        }
        Ok(())
    }

    /// Takes or moves a page while the engines work.
    fn disturb(&mut self) {
        let contexts: Vec<u32> = self.model.contexts.keys().copied().collect();
        if contexts.is_empty() {
            return;
        }
        let context = contexts[self.whims.below(contexts.len() as u64) as usize];
        let pages: Vec<u64> = small_pages().collect();
        let page = pages[self.whims.below(pages.len() as u64) as usize];
        if self.whims.below(2) == 0 {
            self.take(context, page);
        } else {
            self.relocate(context, page);
        }
    }

    fn handle(&mut self, event: &abi::EventRecord) -> Verdict {
        let context = event.context;
        match event.kind {
            abi::EVENT_FAULT => {}
            abi::EVENT_CONTEXT_ERROR | abi::EVENT_PREFETCH => return Ok(()),
            _ => return violated(format!("nobody expects {event:x?}")),
        }
        if !self.model.contexts.contains_key(&context) {
            return violated(format!("there is no such context: {event:x?}"));
        }
        let inside = (BASE..BASE + SPACE).contains(&event.va);
        let page = event.va.wrapping_sub(BASE) / PAGE_SIZE;
        let known = &self.model.contexts[&context];
        let class = if inside {
            known.pages[page as usize]
        } else {
            Class::Forbidden
        };
        let hopeless = event.reason == abi::REASON_BAD_ADDRESS
            || event.reason == abi::REASON_POISONED
            || (class != Class::Poisoned && event.access & !class.allowed() != 0);
        if hopeless {
            // Some drivers try what they can first.
            let rights = class.allowed();
            if rights != 0 && event.reason == abi::REASON_NOT_PRESENT && self.whims.below(2) == 0 {
                self.map(context, page, rights);
                return self.replay(event, 0);
            }
            same("CANCEL", self.rig.cancel(context, event.fault), OK)?;
            return Ok(());
        }
        if class == Class::Poisoned {
            self.map(context, page, 7);
            return self.replay(event, 0);
        }
        // All rights, or those which are needed (and READ, which may be there already).
        let rights = match self.whims.below(3) {
            0 => class.allowed(),
            _ => event.access | abi::ACCESS_READ,
        };
        self.map(context, page, rights);
        if self.whims.below(4) == 0 {
            // As far as the hint goes, or nearly.
            let last = event.va.saturating_add(event.length - 1).min(BASE + SPACE - 1);
            let last = ((last - BASE) / PAGE_SIZE).min(page + 5);
            for page in page + 1..=last {
                self.prepare(context, page);
            }
        }
        let through = if class == Class::Nowhere { 0 } else { 1 };
        self.replay(event, through)?;
        match self.whims.below(6) {
            0 => self.take(context, page),
            1 => self.relocate(context, page),
            _ => {}
        }
        Ok(())
    }

    /// Replays a fault. Its access, which is one, gets through or not.
    fn replay(&mut self, event: &abi::EventRecord, through: u64) -> Verdict {
        let what = format!("REPLAY of {event:x?}");
        let begun = self.rig.replay_begin(event.context, event.fault, event.fault);
        same(&what, begun, Ok(()))?;
        let Ok((ticket, found)) = self.rig.replays.recv_timeout(self.patience) else {
            return violated(format!("waited {:?} for the {what}", self.patience));
        };
        same(&what, ticket, event.fault)?;
        // A copy from a page that is there to where there is no memory ends at once.
        let known = &self.model.contexts[&event.context];
        if found == 0 && known.pages.contains(&Class::Nowhere) {
            return Ok(());
        }
        same(&what, found, through)
    }

    /// Memory and state of a context have to be those of the model.
    fn compare(&mut self, context: u32) -> Verdict {
        let status = self.rig.try_query(abi::QUERY_CONTEXT, context, 0, 0);
        let Some(known) = self.model.contexts.get(&context) else {
            return same("the state of no context", status, Err(abi::STATUS_NO_CONTEXT));
        };
        same("the state of a context", status, Ok(known.status.into()))?;
        for page in self.pages(context) {
            let found = self.read(self.location(context, page), PAGE_SIZE);
            let expected = &known.bytes[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize];
            if found != expected {
                let at = found.iter().zip(expected).position(|(a, b)| a != b).unwrap();
                return violated(format!(
                    "memory of context {context}, {:x}: found {:x?}, expected {:x?}",
                    va_of(page) + at as u64,
                    &found[at..(at + 16).min(4096)],
                    &expected[at..(at + 16).min(4096)]
                ));
            }
        }
        Ok(())
    }
}

fn play(steps: &[Step], seed: u64, inject: &[&str], patience: Duration) -> Verdict {
    let mut world = World::new(inject, seed, patience);
    // There is something to begin with.
    for context in 0..CONTEXTS {
        world.step(&Step::Create(context))?;
    }
    for step in steps {
        world.step(step)?;
    }
    Ok(())
}

fn fixed() -> TestRng {
    TestRng::deterministic_rng(RngAlgorithm::ChaCha)
}

#[test]
fn the_device_does_what_the_model_does() {
    let persistence = FileFailurePersistence::SourceParallel("proptest-regressions");
    let config = Config {
        cases: 32,
        failure_persistence: Some(Box::new(persistence)),
        source_file: Some(file!()),
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let mut runner = match std::env::var("PINION_PROPERTY_CASES") {
        Ok(cases) => TestRunner::new(Config {
            cases: cases.parse().expect("PINION_PROPERTY_CASES is a number"),
            ..config
        }),
        Err(_) => TestRunner::new_with_rng(config, fixed()),
    };
    let result = runner.run(&a_story(), |(steps, seed)| play(&steps, seed, &[], PATIENCE));
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

/// How the property is violated by a device with a defect, if it is.
fn violation(inject: &str) -> Option<String> {
    let config = Config {
        cases: 64,
        failure_persistence: None,
        // It is enough to know that there is one.
        max_shrink_iters: 0,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, fixed());
    let patience = Duration::from_secs(10);
    let result = runner.run(&a_story(), |(steps, seed)| {
        play(&steps, seed, &[inject], patience)
    });
    match result {
        Ok(()) => None,
        Err(TestError::Fail(reason, _)) => Some(reason.message().into()),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

fn expect_violation(inject: &str) {
    let violation = violation(inject).expect("a defect that changes data to be found");
    // And not because something came to nothing.
    assert!(!violation.contains("waited"), "{violation}");
}

#[test]
fn accesses_to_the_wrong_page_are_found() {
    expect_violation("wrong-page");
}

#[test]
fn copies_that_change_data_are_found() {
    expect_violation("corrupt-copy");
}

#[test]
fn stale_translations_are_found() {
    expect_violation("stale-tlb");
}

#[test]
fn fences_that_are_too_early_are_found() {
    expect_violation("early-fence");
}
