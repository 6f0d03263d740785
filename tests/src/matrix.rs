// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ownership matrix: what can hit a page of a process, and in which state it can be then.
//!
//! The guest program `ownership` fills it in, a line of JSON for each cell; the harness compares it to `docs/ownership.md`, or writes
//! that.

use serde::{Deserialize, Serialize};

/// Where a page is when something hits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The GPU does not know it.
    Cpu,
    /// The CPU and the GPU both map it.
    Mirrored,
    /// In VRAM.
    Vram,
    /// Pinned in place for the GPU.
    Pinned,
    /// Exclusive to the GPU, by `make_device_exclusive`.
    Exclusive,
}

impl State {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::Cpu,
        Self::Mirrored,
        Self::Vram,
        Self::Pinned,
        Self::Exclusive,
    ];

    /// Its name, as in `docs/design.md`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Mirrored => "mirrored",
            Self::Vram => "vram",
            Self::Pinned => "pinned",
            Self::Exclusive => "exclusive",
        }
    }
}

/// How large the page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Size {
    /// 4 KiB.
    #[serde(rename = "4K")]
    Small,
    /// 2 MiB.
    #[serde(rename = "2M")]
    Huge,
}

impl Size {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Small, Self::Huge];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "4K",
            Self::Huge => "2M",
        }
    }
}

/// In which guest an event is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    /// One with two GPUs and a disk.
    Usual,
    /// One with a GPU that the harness has reset itself, by the control socket.
    Reset,
}

/// Something that can hit a page.
#[derive(Debug)]
pub struct Event {
    /// For programs.
    pub name: &'static str,
    /// For people.
    pub title: &'static str,
    /// What must come of it, whatever state the page is in.
    pub must: &'static str,
    /// Where it is tried.
    pub boot: Boot,
}

const fn event(name: &'static str, title: &'static str, must: &'static str) -> Event {
    Event {
        name,
        title,
        must,
        boot: Boot::Usual,
    }
}

/// All events, in the order of the table.
pub const EVENTS: &[Event] = &[
    event(
        "cpu-read",
        "CPU read",
        "The CPU finds what the GPU wrote last. What was away comes home; what the CPU has mapped stays as it is.",
    ),
    event(
        "cpu-write",
        "CPU write",
        "As a read; and the GPU finds what the CPU has written.",
    ),
    event(
        "cpu-atomic",
        "CPU atomic",
        "As a write. The GPU has no right to atomic operations on a page that the CPU has mapped.",
    ),
    event(
        "gpu-read",
        "GPU read",
        "The GPU reads through the mapping it has. Where it has none, the page is mirrored.",
    ),
    event("gpu-write", "GPU write", "As a read, with the right to write."),
    event(
        "gpu-atomic",
        "GPU atomic",
        "The GPU has the page to itself, by the means that the program has chosen: pinned, unless it is exclusive or in VRAM already.",
    ),
    event(
        "fork-child-first",
        "fork, child touches first",
        "The child has the memory as it was. What it writes is its own; the parent and its GPU do not see it.",
    ),
    event(
        "fork-parent-first",
        "fork, parent touches first",
        "What the parent writes is its own; the child has the memory as it was at the fork.",
    ),
    event(
        "fork-gpu-first",
        "fork, GPU touches first",
        "The GPU is the parent's: the child does not see what it writes, as if the parent's CPU had written it.",
    ),
    event(
        "munmap",
        "munmap",
        "Nothing is there any more, for the GPU neither: its access ends with a fault. Memory that is mapped there afterwards is new.",
    ),
    event(
        "mremap",
        "mremap",
        "The content moves along, and nothing is left at the old address, for the GPU neither. The state is that at the new address.",
    ),
    event(
        "mprotect-read-only",
        "mprotect to read-only",
        "The GPU may read and must not write: its write ends with a fault, and changes nothing.",
    ),
    event(
        "mprotect-and-back",
        "mprotect to read-only and back",
        "The content stays, and both may write again.",
    ),
    event(
        "madvise-dontneed",
        "madvise DONTNEED",
        "The content is gone: zeros, for the CPU and for the GPU.",
    ),
    event(
        "madvise-free",
        "madvise FREE",
        "Each page has its old content or zeros. What is written afterwards stays.",
    ),
    event(
        "madvise-pageout",
        "madvise PAGEOUT",
        "What can be swapped out is, and the GPU forgets it first. What the GPU has to itself is not on the kernel's lists, or cannot be looked up: it stays.",
    ),
    event(
        "madvise-collapse",
        "madvise COLLAPSE",
        "Small pages become a huge one, with the same content, or the kernel refuses, which changes nothing else. (4K: 512 pages in that state.)",
    ),
    event(
        "mlock",
        "mlock",
        "All pages are brought to where the CPU can reach them, which is what is promised; the GPU can have them nevertheless, as before.",
    ),
    event(
        "swap-out",
        "swap-out (memory.reclaim)",
        "As PAGEOUT, but by the kernel's lists: what can be found there is swapped out, after the GPU has forgotten it.",
    ),
    event(
        "ksm",
        "KSM merge",
        "Pages that the CPU has mapped are joined with a twin of the same content, and the GPU forgets them; a write by either is then a copy's. What the GPU has to itself is not joined.",
    ),
    event(
        "gup-short",
        "GUP, short term (vmsplice)",
        "Pages are brought home to be looked up, and may be mirrored while somebody holds them.",
    ),
    event(
        "gup-long",
        "GUP, long term (io_uring buffer)",
        "As short term. While they are held, the GPU may read and write them in place, which both sides see; they are not pinned and do not move.",
    ),
    event(
        "direct-write",
        "O_DIRECT write to disk",
        "The disk gets what the GPU wrote last.",
    ),
    event(
        "direct-read",
        "O_DIRECT read from disk",
        "CPU and GPU find what came from the disk.",
    ),
    event(
        "process-vm-readv",
        "process_vm_readv",
        "Another process reads what the GPU wrote last, as if the CPU of this one did.",
    ),
    event(
        "ptrace",
        "ptrace peek and poke",
        "Another process reads what the GPU wrote last, and the GPU finds what it writes.",
    ),
    event(
        "core-dump",
        "core dump",
        "What the GPU wrote last is in the core. The process is gone, and its memory free. (Not so for a huge page in VRAM: what is not present in the upper levels of the page table Linux 7.3 takes for a hole when it dumps, see `no_page_table()` in `mm/gup.c`, and the core has zeros. No driver can help that.)",
    ),
    event(
        "exec",
        "exec",
        "The old memory is gone and free, and the open file of no use to the new program. A child that shares the memory keeps it, with its content.",
    ),
    event(
        "exit",
        "exit",
        "The memory is free, wherever it was, and uncharged. A child that shares it keeps it, with its content.",
    ),
    event("sigkill", "SIGKILL", "As exit."),
    event(
        "oom-kill",
        "OOM kill",
        "As exit; whoever reaps the memory of the process must not be kept waiting by the GPU.",
    ),
    event(
        "second-gpu-read",
        "a second GPU reads",
        "It finds what the first GPU wrote last. What only one can have comes home.",
    ),
    event(
        "second-gpu-atomic",
        "a second GPU's atomic",
        "It has the page to itself, after the first has given it up; the first finds the result.",
    ),
    event(
        "unbind",
        "driver unbound from the device",
        "Everything comes home first, VRAM included. The file is of no use any more; a device that is bound again is.",
    ),
    event(
        "module-unload",
        "module unload",
        "Refused while a file is open, which changes nothing. When it is closed everything comes home, and the module goes.",
    ),
    Event {
        name: "device-reset",
        title: "device resets itself",
        must: "The device is lost, and work for it ends so. What was in system memory is there, with what the GPU wrote; what was in VRAM is lost, and says so (SIGBUS). After the driver was bound again, the memory can be used again.",
        boot: Boot::Reset,
    },
];

/// What came of a cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// All that was checked is so, and this is the state afterwards.
    Result(String),
    /// It could not be tried, for this reason.
    Blank(String),
    /// A check has failed.
    Error(String),
}

/// A cell, as the guest program says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// [`Event::name`].
    pub event: String,
    /// The state before.
    pub state: State,
    /// The size of the page.
    pub size: Size,
    /// What came of it.
    pub end: End,
    /// How long it took.
    pub milliseconds: u64,
}
