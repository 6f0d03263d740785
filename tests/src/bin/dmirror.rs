// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the kernel's hmm-tests do not ask of `/dev/hmm_dmirror0`: that exclusive access is what it is called, by the mechanism that the
//! module's parameter names; that the device is what copies; and what is refused.
//!
//! The argument is the mechanism: "exclusive" or "pin".

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::PAGE_SIZE;
use pinion_tests::{Failure, Mapping, process::Child};

/// `struct hmm_dmirror_cmd` of the kernel's `lib/test_hmm_uapi.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Command {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

const READ: u8 = 0;
const WRITE: u8 = 1;
const MIGRATE_TO_DEV: u8 = 2;
const SNAPSHOT: u8 = 4;
const EXCLUSIVE: u8 = 5;
const CHECK_EXCLUSIVE: u8 = 6;
const RELEASE: u8 = 7;
const FLAGS: u8 = 8;
const UNKNOWN: u8 = 10;

const PAGES: usize = 4;

struct Node(File);

impl Node {
    fn open() -> io::Result<Self> {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/hmm_dmirror0")
            .map(Self)
    }

    /// One command; the pages that were copied, and the faults.
    fn call(&self, number: u8, command: Command) -> io::Result<(u64, u64)> {
        let mut command = command;
        let request =
            3 << 30 | (size_of::<Command>() as u64) << 16 | u64::from(b'H') << 8 | u64::from(number);
        // SAFETY: The argument is as long as the request says. What it points to is accessed through raw pointers and atomics only.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw mut command) };
        if result == 0 {
            Ok((command.cpages, command.faults))
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// A command on pages of `memory`, the data of which goes to or comes from `other`.
    fn on(
        &self,
        number: u8,
        memory: &Mapping,
        pages: std::ops::Range<usize>,
        other: &Mapping,
    ) -> io::Result<(u64, u64)> {
        self.call(
            number,
            Command {
                addr: memory.page(pages.start).addr() as u64,
                ptr: other.as_ptr().addr() as u64,
                npages: pages.len() as u64,
                ..Command::default()
            },
        )
    }

    /// A number in fdinfo.
    fn statistic(&self, name: &str) -> Result<u64, Failure> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let line = text.lines().find_map(|line| {
            line.strip_prefix("pinion-")?
                .strip_prefix(name)?
                .strip_prefix(':')
        });
        Ok(line
            .ok_or_else(|| format!("no {name} in {text}"))?
            .trim()
            .parse()?)
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), Failure> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: {found:?}, where {expected:?} was expected").into())
    }
}

fn refused(what: &str, result: io::Result<(u64, u64)>, errno: i32) -> Result<(), Failure> {
    let found = result.map_err(|error| error.raw_os_error());
    same(what, found, Err(Some(errno)))
}

/// Anonymous memory whose pages hold their numbers, from `first` on.
fn numbered(first: u64) -> io::Result<Mapping> {
    let memory = Mapping::anonymous(PAGES)?;
    for page in 0..PAGES {
        memory
            .atomic(page * PAGE_SIZE)
            .store(first + page as u64, Ordering::Relaxed);
    }
    Ok(memory)
}

fn hold(what: &str, memory: &Mapping, first: u64) -> Result<(), Failure> {
    for page in 0..PAGES {
        let found = memory.atomic(page * PAGE_SIZE).load(Ordering::Relaxed);
        same(&format!("{what}, page {page}"), found, first + page as u64)?;
    }
    Ok(())
}

/// The device has pages to itself until a CPU touches them, each by itself.
fn exclusive(node: &Node, mechanism: &str) -> Result<(), Failure> {
    let (memory, data) = (numbered(100)?, Mapping::anonymous(PAGES)?);
    let counters = ["exclusives", "pins"];
    let before = [node.statistic(counters[0])?, node.statistic(counters[1])?];
    same(
        "EXCLUSIVE",
        node.on(EXCLUSIVE, &memory, 0..PAGES, &data)?.0,
        PAGES as u64,
    )?;
    hold("what the device has read", &data, 100)?;
    let now = [node.statistic(counters[0])?, node.statistic(counters[1])?];
    let grown = [now[0] - before[0], now[1] - before[1]];
    let expected = match mechanism {
        "exclusive" => [PAGES as u64, 0],
        _ => [0, PAGES as u64],
    };
    same("pages made exclusive, and pinned", grown, expected)?;
    refused(
        "CHECK_EXCLUSIVE of exclusive pages",
        node.on(CHECK_EXCLUSIVE, &memory, 0..PAGES, &data),
        libc::EPERM,
    )?;
    same(
        "page 1 when the CPU reads it",
        memory.atomic(PAGE_SIZE).load(Ordering::Relaxed),
        101,
    )?;
    node.on(CHECK_EXCLUSIVE, &memory, 1..2, &data)?;
    for page in [0, 2, 3] {
        let result = node.on(CHECK_EXCLUSIVE, &memory, page..page + 1, &data);
        refused("CHECK_EXCLUSIVE of a page next to it", result, libc::EPERM)?;
    }
    hold("all of them", &memory, 100)?;
    node.on(CHECK_EXCLUSIVE, &memory, 0..PAGES, &data)?;
    Ok(())
}

/// It is the device that copies: each READ and WRITE is work of the file's.
fn copies(node: &Node) -> Result<(), Failure> {
    let (memory, data) = (numbered(200)?, Mapping::anonymous(PAGES)?);
    let before = node.statistic("submissions")?;
    same(
        "READ",
        node.on(READ, &memory, 0..PAGES, &data)?,
        (PAGES as u64, 1),
    )?;
    hold("what READ has read", &data, 200)?;
    same(
        "READ of what is mapped",
        node.on(READ, &memory, 0..PAGES, &data)?,
        (PAGES as u64, 0),
    )?;
    let other = numbered(300)?;
    same(
        "WRITE",
        node.on(WRITE, &memory, 0..PAGES, &other)?,
        (PAGES as u64, 1),
    )?;
    hold("what WRITE has written", &memory, 300)?;
    same("submissions", node.statistic("submissions")? - before, 3)
}

/// An access that fails leaves the file as it was, with its pages in VRAM.
fn failures(node: &Node) -> Result<(), Failure> {
    let (memory, data) = (numbered(400)?, numbered(0)?);
    let hole = Mapping::new(
        None,
        PAGES,
        libc::PROT_NONE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    )?;
    node.on(MIGRATE_TO_DEV, &memory, 0..PAGES, &data)?;
    let from_vram = node.statistic("from-vram")?;
    refused(
        "READ of what is inaccessible",
        node.on(READ, &hole, 0..PAGES, &data),
        libc::EFAULT,
    )?;
    refused(
        "READ to what is inaccessible",
        node.on(READ, &memory, 0..PAGES, &hole),
        libc::EFAULT,
    )?;
    same(
        "READ afterwards",
        node.on(READ, &memory, 0..PAGES, &data)?,
        (PAGES as u64, 0),
    )?;
    hold("what it has read", &data, 400)?;
    same(
        "pages that came home",
        node.statistic("from-vram")? - from_vram,
        0,
    )
}

/// RELEASE brings home what is in VRAM, that of other files too.
fn release(node: &Node) -> Result<(), Failure> {
    let (memory, data) = (numbered(500)?, Mapping::anonymous(PAGES)?);
    let other = Node::open()?;
    other.on(MIGRATE_TO_DEV, &memory, 0..PAGES, &data)?;
    node.on(RELEASE, &memory, 0..PAGES, &data)?;
    same(
        "pages that came home",
        other.statistic("from-vram")?,
        PAGES as u64,
    )?;
    let mut seen = [0; PAGES];
    other.call(
        SNAPSHOT,
        Command {
            addr: memory.as_ptr().addr() as u64,
            ptr: seen.as_mut_ptr().addr() as u64,
            npages: PAGES as u64,
            ..Command::default()
        },
    )?;
    // HMM_DMIRROR_PROT_WRITE: a page of the system's.
    same("SNAPSHOT", seen, [2_u8; PAGES])?;
    hold("what was in VRAM", &memory, 500)
}

/// What is wrong is refused.
fn refusals(node: &Node) -> Result<(), Failure> {
    let (memory, data) = (numbered(0)?, Mapping::anonymous(PAGES)?);
    let good = Command {
        addr: memory.as_ptr().addr() as u64,
        ptr: data.as_ptr().addr() as u64,
        npages: 1,
        ..Command::default()
    };
    let bad = [
        (
            "an address within a page",
            Command {
                addr: good.addr + 8,
                ..good
            },
            libc::EINVAL,
        ),
        ("no pages", Command { npages: 0, ..good }, libc::EINVAL),
        (
            "more pages than there are",
            Command {
                npages: u64::MAX,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "pages to the end of the address space and beyond",
            Command {
                npages: 1 << 36,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "a buffer beyond the address space",
            Command {
                ptr: u64::MAX - 100,
                ..good
            },
            libc::EFAULT,
        ),
    ];
    for (what, command, errno) in bad {
        refused(what, node.call(READ, command), errno)?;
    }
    refused("an unknown command", node.call(UNKNOWN, good), libc::EINVAL)?;
    refused(
        "an unknown flag",
        node.call(FLAGS, Command { npages: 2, ..good }),
        libc::EINVAL,
    )?;
    // SAFETY: There is one thread.
    let child = unsafe {
        Child::fork(|| match node.call(READ, good) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => 0,
            _ => 1,
        })
    }?;
    let limit = pinion_tests::patiently(Duration::from_secs(10));
    same("READ by another process is refused", child.wait(limit)?, 0)
}

fn run(mechanism: &str) -> Result<(), Failure> {
    let node = Node::open()?;
    copies(&node)?;
    failures(&node)?;
    exclusive(&node, mechanism)?;
    release(&node)?;
    refusals(&node)
}

fn main() -> ExitCode {
    let mechanism = std::env::args().nth(1).unwrap_or_default();
    if !["exclusive", "pin"].contains(&mechanism.as_str()) {
        eprintln!("usage: dmirror exclusive|pin");
        return ExitCode::FAILURE;
    }
    match run(&mechanism) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dmirror: FAILED: {}", pinion_tests::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
