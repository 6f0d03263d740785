// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A cell of the matrix: memory in a state, and what must be so after something has hit it.

use std::sync::atomic::Ordering;

use pinion_client::{Atomics, Command, Gpu, Location, PAGE_SIZE, Page, PageState};
use pinion_tests::matrix::{Size, State};
use pinion_tests::pagemap::{self, Entry};
use pinion_tests::smaps::kilobytes;
use pinion_tests::work::execute_ok;
use pinion_tests::{DEVICE, Failure, Mapping, ensure, ensure_eq};

use crate::machine::Machine;

/// Where the memory is, that things happen to. There is nothing next to it, so that the kernel does not join it with anything.
const HERE: usize = 0x1000_0000_0000;
/// Where there is room for as much again.
pub(crate) const ELSEWHERE: usize = 0x1100_0000_0000;
/// Where the GPU copies from and to.
const SCRATCH: usize = 0x1200_0000_0000;
/// Pages of a huge page.
const HUGE: usize = 512;
/// How many words at both ends of the memory the GPU does not copy over.
const EDGE: usize = 8;

/// How a cell ended in which nothing was wrong.
pub(crate) enum Outcome {
    /// The state afterwards.
    Result(String),
    /// Why it could not be tried.
    Blank(String),
}

/// What an event does.
pub(crate) type Body = fn(&Cell<'_>) -> Result<Outcome, Failure>;

/// Which state, and where.
pub(crate) struct Cell<'a> {
    pub(crate) state: State,
    pub(crate) size: Size,
    pub(crate) machine: &'a Machine,
    /// The GPU's device file.
    pub(crate) device: &'static str,
}

/// Memory that was brought into the state of a cell.
pub(crate) struct Subject {
    /// There is always one but while the driver is unbound.
    gpu: Option<Gpu>,
    pub(crate) memory: Mapping,
    /// What is to be found in it.
    pub(crate) expected: Vec<u64>,
    scratch: Mapping,
    state: State,
}

/// Words to be told apart from those of another seed.
pub(crate) fn pattern(seed: u64, count: usize) -> Vec<u64> {
    (1..=count as u64)
        .map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed)
        .collect()
}

/// The words that are in bytes.
pub(crate) fn words_in(bytes: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word.copy_from_slice(bytes);
        u64::from_ne_bytes(word)
    };
    bytes.chunks_exact(8).map(word).collect()
}

/// What is in memory of that many pages after [`Cell::enter`].
pub(crate) fn content(state: State, pages: usize) -> Vec<u64> {
    let mut words = pattern(1, pages * PAGE_SIZE / 8);
    copied(&mut words, 2);
    if atomically(state) {
        for word in words.iter_mut().step_by(PAGE_SIZE / 8) {
            *word = word.wrapping_add(1);
        }
    }
    if state != State::Cpu {
        copied(&mut words, 3);
    }
    words
}

/// Overwrites what [`Subject::gpu_copies`] does.
fn copied(words: &mut [u64], seed: u64) {
    let pattern = pattern(seed, words.len());
    let inner = EDGE..words.len() - EDGE;
    words[inner.clone()].copy_from_slice(&pattern[inner]);
}

/// Whether memory gets into that state by atomic operations.
fn atomically(state: State) -> bool {
    matches!(state, State::Pinned | State::Exclusive)
}

/// Fails unless all words are as expected.
pub(crate) fn compare(found: &[u64], expected: &[u64], who: &str) -> Result<(), Failure> {
    ensure_eq!(found.len(), expected.len(), "words that {who} finds");
    let differs = found.iter().zip(expected).position(|(one, other)| one != other);
    if let Some(word) = differs {
        let count = found
            .iter()
            .zip(expected)
            .filter(|(one, other)| one != other)
            .count();
        return Err(format!(
            "{who} finds {:#x} at {:#x} where {:#x} is expected; {count} of {} words are wrong",
            found[word],
            word * 8,
            expected[word],
            found.len()
        )
        .into());
    }
    Ok(())
}

/// Tells a GPU how memory is to get into a state, and to stay in it.
pub(crate) fn advise(gpu: &Gpu, memory: &Mapping, state: State) -> Result<(), Failure> {
    match state {
        State::Cpu | State::Mirrored => {}
        State::Vram => gpu.advise_location(memory.as_ptr(), memory.len(), Location::Vram)?,
        State::Pinned => gpu.advise_atomics(memory.as_ptr(), memory.len(), Atomics::Pin)?,
        State::Exclusive => gpu.advise_atomics(memory.as_ptr(), memory.len(), Atomics::Exclusive)?,
    }
    Ok(())
}

impl Cell<'_> {
    /// How many pages the memory has.
    pub(crate) fn pages(&self) -> usize {
        match self.size {
            Size::Small => 1,
            Size::Huge => HUGE,
        }
    }

    /// What is in the memory when it is in its state.
    pub(crate) fn content(&self) -> Vec<u64> {
        content(self.state, self.pages())
    }

    /// The memory, in which there is nothing yet.
    pub(crate) fn memory(&self) -> Result<Mapping, Failure> {
        self.memory_of(self.pages())
    }

    fn memory_of(&self, pages: usize) -> Result<Mapping, Failure> {
        let memory = anonymous(HERE, pages)?;
        memory.advise(match self.size {
            Size::Small => libc::MADV_NOHUGEPAGE,
            Size::Huge => libc::MADV_HUGEPAGE,
        })?;
        Ok(memory)
    }

    /// Opens a GPU, and brings memory into the state.
    pub(crate) fn enter(&self) -> Result<Subject, Failure> {
        Subject::enter(self, self.memory()?)
    }

    /// The same for 512 pages, of which each is a page of its own, or all are one.
    pub(crate) fn enter_with_many(&self) -> Result<Subject, Failure> {
        Subject::enter(self, self.memory_of(HUGE)?)
    }

    /// The same for memory that is there.
    pub(crate) fn enter_at(&self, memory: Mapping) -> Result<Subject, Failure> {
        Subject::enter(self, memory)
    }
}

/// Anonymous memory at an address.
pub(crate) fn anonymous(address: usize, pages: usize) -> Result<Mapping, Failure> {
    Ok(Mapping::new(
        Some(address),
        pages,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    )?)
}

impl Subject {
    fn enter(cell: &Cell<'_>, memory: Mapping) -> Result<Self, Failure> {
        let gpu = Gpu::open(cell.device)?;
        memory.set_words(&pattern(1, memory.len() / 8));
        if cell.size == Size::Huge {
            let huge = kilobytes(&memory, "AnonHugePages")?;
            ensure_eq!(huge as usize * 1024, memory.len(), "bytes in huge pages");
        }
        let mut this = Self {
            gpu: Some(gpu),
            expected: memory.words(),
            scratch: anonymous(SCRATCH, memory.pages())?,
            memory,
            state: cell.state,
        };
        advise(this.gpu(), &this.memory, cell.state)?;
        this.gpu_copies(2)?;
        match cell.state {
            // What it has is taken back when it is told something about it.
            State::Cpu => {
                this.gpu()
                    .advise_atomics(this.memory.as_ptr(), this.memory.len(), Atomics::Auto)?
            }
            // By the advice.
            State::Mirrored | State::Vram => {}
            State::Pinned | State::Exclusive => {
                let target = this.memory.as_ptr().cast::<u64>();
                let pages = this.memory.pages() as u32;
                let add = Command::atomic_add(target, 1)
                    .repeat(pages)
                    .stride(PAGE_SIZE as u32);
                execute_ok(this.gpu(), &[add])?;
                for word in this.expected.iter_mut().step_by(PAGE_SIZE / 8) {
                    *word = word.wrapping_add(1);
                }
            }
        }
        ensure_eq!(this.observe()?, cell.state.name(), "the state to begin with");
        if cell.state != State::Cpu {
            this.gpu_copies(3)?;
            ensure_eq!(
                this.observe()?,
                cell.state.name(),
                "the state after the GPU has written"
            );
        }
        let content = content(cell.state, this.memory.pages());
        compare(&this.expected, &content, "the test itself")?;
        Ok(this)
    }

    /// The GPU.
    pub(crate) fn gpu(&self) -> &Gpu {
        self.gpu.as_ref().expect("the driver is bound")
    }

    /// Closes the GPU.
    pub(crate) fn close(&mut self) {
        self.gpu = None;
    }

    /// Opens a new one.
    pub(crate) fn open(&mut self, device: &str) -> Result<(), Failure> {
        self.close();
        let gpu = Gpu::open(device)?;
        advise(&gpu, &self.memory, self.state)?;
        self.gpu = Some(gpu);
        Ok(())
    }

    /// The page that an access is to; a byte offset.
    pub(crate) fn target(&self) -> usize {
        self.memory.pages() / 3 * PAGE_SIZE
    }

    /// The target as a command wants it.
    pub(crate) fn pointer(&self) -> *mut u64 {
        self.memory.at(self.target()).cast()
    }

    /// The number there that is expected.
    pub(crate) fn number(&mut self) -> &mut u64 {
        let word = self.target() / 8;
        &mut self.expected[word]
    }

    /// Has the GPU overwrite all but both ends.
    pub(crate) fn gpu_copies(&mut self, seed: u64) -> Result<(), Failure> {
        self.scratch.set_words(&pattern(seed, self.expected.len()));
        let length = self.memory.len() - 2 * EDGE * 8;
        let copy = Command::copy(self.scratch.at(EDGE * 8), self.memory.at(EDGE * 8), length);
        execute_ok(self.gpu(), &[copy])?;
        copied(&mut self.expected, seed);
        Ok(())
    }

    /// Where the memory is now, by what the driver and the CPU's page table say. Fails if they do not fit together. Nothing is
    /// changed by looking.
    pub(crate) fn observe(&self) -> Result<String, Failure> {
        let pages = self.gpu().query(self.memory.as_ptr(), self.memory.len())?;
        let entries = pagemap::entries(self.memory.as_ptr(), self.memory.pages())?;
        let swapped = kilobytes(&self.memory, "Swap")? > 0;
        let states: Result<Vec<_>, _> = pages
            .iter()
            .zip(&entries)
            .map(|(page, entry)| describe(page, entry, swapped))
            .collect();
        Ok(summary(&states?))
    }

    /// Where the memory is when there is no driver to ask.
    pub(crate) fn observe_without_driver(&self) -> Result<String, Failure> {
        let entries = pagemap::entries(self.memory.as_ptr(), self.memory.pages())?;
        let states: Vec<_> = entries
            .iter()
            .map(|entry| match entry {
                Entry::Present(_) => "cpu",
                Entry::Absent => "away",
                Entry::None => "empty",
            })
            .collect();
        Ok(summary(&states))
    }

    /// The GPU must find what is expected.
    pub(crate) fn check_gpu(&self) -> Result<(), Failure> {
        self.scratch.set_words(&vec![0; self.expected.len()]);
        let copy = Command::copy(self.memory.as_ptr(), self.scratch.as_ptr(), self.memory.len());
        execute_ok(self.gpu(), &[copy])?;
        compare(&self.scratch.words(), &self.expected, "the GPU")
    }

    /// The CPU must find what is expected.
    pub(crate) fn check_cpu(&self) -> Result<(), Failure> {
        compare(&self.memory.words(), &self.expected, "the CPU")
    }

    /// How much the process has there, wherever it is, in KiB.
    pub(crate) fn charged(&self) -> Result<u64, Failure> {
        Ok(kilobytes(&self.memory, "Rss")? + kilobytes(&self.memory, "Swap")?)
    }

    /// The end of a cell: nothing has been lost, and the process has as much memory as before.
    pub(crate) fn finish(self) -> Result<Outcome, Failure> {
        let result = self.observe()?;
        self.finish_as(result)
    }

    /// The same, where the state that counts was another one.
    pub(crate) fn finish_as(mut self, result: String) -> Result<Outcome, Failure> {
        ensure_eq!(
            self.charged()? as usize * 1024,
            self.memory.len(),
            "resident and swapped memory after the event"
        );
        self.settle()?;
        Ok(Outcome::Result(result))
    }

    /// The GPU and the CPU must find what is expected, and go on as if nothing had been.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        self.check_gpu()?;
        self.check_cpu()?;
        self.gpu_copies(4)?;
        self.check_cpu()?;
        // By turns.
        for _ in 0..2 {
            let target = self.pointer();
            execute_ok(self.gpu(), &[Command::atomic_add(target, 3)])?;
            let found = self.memory.atomic(self.target()).fetch_add(5, Ordering::Relaxed);
            let number = self.number();
            *number = number.wrapping_add(3);
            ensure_eq!(found, *number, "what the CPU's atomic operation finds");
            *number = number.wrapping_add(5);
        }
        self.check_gpu()?;
        self.check_cpu()?;
        ensure_eq!(
            self.charged()? as usize * 1024,
            self.memory.len(),
            "resident and swapped memory in the end"
        );
        Ok(())
    }
}

/// In a word where a page is.
fn describe(page: &Page, entry: &Entry, swapped: bool) -> Result<&'static str, Failure> {
    let present = matches!(entry, Entry::Present(_));
    let rights = page.rights;
    if present {
        ensure!(
            !rights.atomic,
            "the GPU may do atomic operations on what the CPU has mapped: {page:?}"
        );
    }
    let mapped = matches!(page.state, PageState::Cpu | PageState::Mirrored);
    ensure!(
        mapped || *entry == Entry::Absent,
        "{page:?} where the CPU's page table has {entry:?}"
    );
    Ok(match page.state {
        PageState::Cpu => {
            ensure!(!rights.read && !rights.write, "nobody's, for the GPU: {page:?}");
            match entry {
                Entry::Present(_) => "cpu",
                Entry::Absent if swapped => "swapped",
                Entry::Absent => "away",
                Entry::None => "empty",
            }
        }
        PageState::Mirrored => {
            ensure!(
                present && rights.read,
                "{page:?} where the CPU's page table has {entry:?}"
            );
            if rights.write { "mirrored" } else { "mirrored (r)" }
        }
        PageState::Vram if rights.write => "vram",
        PageState::Vram if rights.read => "vram (r)",
        PageState::Vram => "vram (-)",
        PageState::Pinned if rights.write => "pinned",
        PageState::Pinned if rights.read => "pinned (r)",
        PageState::Pinned => "pinned (-)",
        PageState::Exclusive if rights.write => "exclusive",
        other => return Err(format!("{other:?} with {rights:?}").into()),
    })
}

/// States, with the number of pages that are in each if there are several.
fn summary(states: &[&str]) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for state in states {
        match counts.iter_mut().find(|(name, _)| name == state) {
            Some((_, count)) => *count += 1,
            None => counts.push((state, 1)),
        }
    }
    counts.sort_unstable();
    match &counts[..] {
        [(state, _)] => (*state).to_owned(),
        several => several
            .iter()
            .map(|(state, count)| format!("{state} {count}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// The second GPU's device file.
pub(crate) fn second_device() -> String {
    DEVICE.replace('0', "1")
}
