// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Every kind of memory that a process can have: what the GPU reads and writes there is compared byte by byte with what the
//! CPU finds.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pinion_client::uapi::ChaseResult;
use pinion_client::{Command, Gpu, Location, PageState, Status};
use pinion_tests::{Failure, Mapping, pagemap, patiently};

use crate::support::{
    Outcome, PASSED, TestResult, ensure, ensure_eq, execute, execute_ok, fork, join, open, page_with, tests,
};

tests! {
    kinds_anonymous_memory_in_small_pages
    kinds_anonymous_memory_in_huge_pages
    kinds_memory_that_is_shared_with_a_child
    kinds_the_zero_page
    kinds_a_file_mapped_shared
    kinds_a_file_mapped_private
    kinds_a_memory_file
    kinds_a_memory_file_in_huge_pages
    kinds_memory_of_hugetlb
    kinds_pages_merged_by_ksm
    kinds_memory_that_was_swapped_out
    kinds_memory_behind_userfaultfd
    kinds_a_file_that_is_truncated
    a_long_list_is_followed_wherever_its_nodes_are
}

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Bytes that differ from page to page and from seed to seed.
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|index| ((index ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8)
        .collect()
}

/// Where two differ first must be nowhere.
fn ensure_same(found: &[u8], expected: &[u8], what: &str) -> Result<(), Failure> {
    ensure_eq!(found.len(), expected.len(), "length of {what}");
    let other = found.iter().zip(expected).position(|(one, other)| one != other);
    ensure_eq!(other, None, "where {what} differs");
    Ok(())
}

/// Has the GPU copy the memory elsewhere: what it sees there.
fn seen_by_gpu(gpu: &Gpu, memory: &Mapping) -> Result<Vec<u8>, Failure> {
    let copy = Mapping::anonymous(memory.pages())?;
    execute_ok(
        gpu,
        &[Command::copy(memory.as_ptr(), copy.as_ptr(), memory.len())],
    )?;
    Ok(copy.read(0, copy.len()))
}

/// Has the GPU write those bytes at an offset.
fn write_by_gpu(gpu: &Gpu, memory: &Mapping, offset: usize, bytes: &[u8]) -> Result<(), Failure> {
    execute_ok(
        gpu,
        &[Command::copy(bytes.as_ptr(), memory.at(offset), bytes.len())],
    )
}

/// The GPU and the CPU write to the memory in turn, and each reads what the other has written, all of it and nothing else.
/// Returns what is there in the end.
fn by_turns(gpu: &Gpu, memory: &Mapping) -> Result<Vec<u8>, Failure> {
    let length = memory.len();
    let mut expected = memory.read(0, length);
    ensure_same(&seen_by_gpu(gpu, memory)?, &expected, "what the GPU sees first")?;
    for round in 0..2 {
        // All but the edges, and off every alignment.
        let new = bytes(100 + round, length - 200);
        write_by_gpu(gpu, memory, 101, &new)?;
        expected[101..length - 99].copy_from_slice(&new);
        ensure_same(&memory.read(0, length), &expected, "what the GPU has written")?;
        ensure_same(&seen_by_gpu(gpu, memory)?, &expected, "what the GPU reads back")?;
        expected = bytes(200 + round, length);
        memory.write(0, &expected);
        ensure_same(&seen_by_gpu(gpu, memory)?, &expected, "what the CPU has written")?;
    }
    let new = bytes(300, length);
    write_by_gpu(gpu, memory, 0, &new)?;
    ensure_same(&memory.read(0, length), &new, "what the GPU has written last")?;
    Ok(new)
}

/// Sets a file of `/proc` or `/sys`, and sets it back when this is dropped.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    fn new(path: &'static str, value: &str) -> Result<Self, Failure> {
        let before = fs::read_to_string(path)?.trim().to_owned();
        fs::write(path, value).map_err(|error| format!("{value} to {path}: {error}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path, &self.before) {
            eprintln!("{} to {}: {error}", self.before, self.path);
        }
    }
}

fn aligned(length: usize, advice: i32) -> Result<Mapping, Failure> {
    let anywhere = Mapping::anonymous((length + HUGE) / 4096)?;
    let start = anywhere.as_ptr().addr().next_multiple_of(HUGE);
    drop(anywhere);
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    let memory = Mapping::new(Some(start), length / 4096, protection, flags)?;
    memory.advise(advice)?;
    Ok(memory)
}

fn kinds_anonymous_memory_in_small_pages() -> TestResult {
    let memory = aligned(64 << 10, libc::MADV_NOHUGEPAGE)?;
    memory.write(0, &bytes(1, memory.len()));
    by_turns(&open()?, &memory).map(|_| Outcome::Passed)
}

fn kinds_anonymous_memory_in_huge_pages() -> TestResult {
    let memory = aligned(HUGE, libc::MADV_HUGEPAGE)?;
    memory.write(0, &bytes(2, memory.len()));
    by_turns(&open()?, &memory).map(|_| Outcome::Passed)
}

fn kinds_memory_that_is_shared_with_a_child() -> TestResult {
    let memory = Mapping::new(
        None,
        40,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    )?;
    let gpu = open()?;
    let last = by_turns(&gpu, &memory)?;
    // Another process sees what the GPU has written, and the GPU what that process writes.
    let child = fork(|| {
        ensure_same(&memory.read(0, memory.len()), &last, "what the child reads")?;
        memory.write(0, &bytes(3, memory.len()));
        Ok(())
    })?;
    join(child)?;
    let expected = bytes(3, memory.len());
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &expected,
        "what the child has written",
    )?;
    PASSED
}

fn kinds_the_zero_page() -> TestResult {
    let gpu = open()?;
    let (memory, neighbour) = (Mapping::anonymous(20)?, Mapping::anonymous(20)?);
    let zeroes = vec![0; memory.len()];
    for memory in [&memory, &neighbour] {
        ensure_same(&memory.read(0, memory.len()), &zeroes, "new memory")?;
        ensure_same(&seen_by_gpu(&gpu, memory)?, &zeroes, "what the GPU sees of it")?;
    }
    by_turns(&gpu, &memory)?;
    ensure_same(
        &neighbour.read(0, memory.len()),
        &zeroes,
        "other memory of zeroes",
    )?;
    ensure_same(
        &seen_by_gpu(&gpu, &neighbour)?,
        &zeroes,
        "other memory of zeroes, for the GPU",
    )?;
    PASSED
}

/// A file with bytes in it, which has no name any more.
fn file(length: usize, seed: u64) -> Result<File, Failure> {
    let path = format!("/tmp/kinds.{}", std::process::id());
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    file.write_all_at(&bytes(seed, length), 0)?;
    Ok(file)
}

fn content(file: &File, length: usize) -> Result<Vec<u8>, Failure> {
    let mut content = vec![0; length];
    file.read_exact_at(&mut content, 0)?;
    Ok(content)
}

fn kinds_a_file_mapped_shared() -> TestResult {
    let file = file(30 * 4096, 4)?;
    let memory = Mapping::of_file(&file, 30, libc::MAP_SHARED)?;
    let gpu = open()?;
    // The GPU is the first to touch it.
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &bytes(4, memory.len()),
        "what the GPU sees of the file",
    )?;
    let last = by_turns(&gpu, &memory)?;
    ensure_same(&content(&file, memory.len())?, &last, "what is in the file")?;
    // By a system call, and read by the GPU.
    file.write_all_at(&bytes(5, memory.len()), 0)?;
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &bytes(5, memory.len()),
        "what was written to the file",
    )?;
    PASSED
}

fn kinds_a_file_mapped_private() -> TestResult {
    let file = file(30 * 4096, 6)?;
    let memory = Mapping::of_file(&file, 30, libc::MAP_PRIVATE)?;
    let gpu = open()?;
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &bytes(6, memory.len()),
        "what the GPU sees of the file",
    )?;
    by_turns(&gpu, &memory)?;
    let expected = bytes(6, memory.len());
    ensure_same(
        &content(&file, memory.len())?,
        &expected,
        "the file, which is left alone,",
    )?;
    // Nobody else's copy has changed either, though the GPU is the first to write to it.
    let other = Mapping::of_file(&file, 30, libc::MAP_PRIVATE)?;
    write_by_gpu(&gpu, &other, 4000, &bytes(7, 200))?;
    let mut changed = expected.clone();
    changed[4000..4200].copy_from_slice(&bytes(7, 200));
    ensure_same(&other.read(0, other.len()), &changed, "another mapping")?;
    ensure_same(&content(&file, memory.len())?, &expected, "the file at last")?;
    PASSED
}

/// A file that lives in memory, of that many bytes, all zeroes.
fn memory_file(name: &CStr, length: usize, flags: u32) -> io::Result<File> {
    // SAFETY: The name is a C string.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: It is new, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
    file.set_len(length as u64)?;
    Ok(file)
}

/// Two mappings of one file show the same.
fn of_memory_file(file: &File, pages: usize) -> TestResult {
    let memory = Mapping::of_file(file, pages, libc::MAP_SHARED)?;
    let other = Mapping::of_file(file, pages, libc::MAP_SHARED)?;
    let gpu = open()?;
    let last = by_turns(&gpu, &memory)?;
    ensure_same(&other.read(0, other.len()), &last, "the other mapping")?;
    other.write(0, &bytes(8, other.len()));
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &bytes(8, other.len()),
        "what was written through the other mapping",
    )?;
    PASSED
}

fn kinds_a_memory_file() -> TestResult {
    of_memory_file(&memory_file(c"kinds", 50 * 4096, 0)?, 50)
}

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

fn kinds_a_memory_file_in_huge_pages() -> TestResult {
    let _reserved = Setting::new(RESERVED, "2")?;
    of_memory_file(&memory_file(c"kinds", HUGE, libc::MFD_HUGETLB)?, HUGE / 4096)
}

fn kinds_memory_of_hugetlb() -> TestResult {
    let _reserved = Setting::new(RESERVED, "3")?;
    let memory = Mapping::new(
        None,
        HUGE / 4096,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
    )?;
    by_turns(&open()?, &memory).map(|_| Outcome::Passed)
}

fn kinds_pages_merged_by_ksm() -> TestResult {
    const PAGES: usize = 32;
    let gpu = open()?;
    let memory = aligned(PAGES * 4096, libc::MADV_NOHUGEPAGE)?;
    let page = bytes(9, 4096);
    for index in 0..PAGES {
        memory.write(index * 4096, &page);
    }
    memory.advise(libc::MADV_MERGEABLE)?;
    let _scan = Setting::new("/sys/kernel/mm/ksm/pages_to_scan", "1000")?;
    let _pause = Setting::new("/sys/kernel/mm/ksm/sleep_millisecs", "5")?;
    let _run = Setting::new("/sys/kernel/mm/ksm/run", "1")?;
    // As many as are one page with the last one, which stays as it is.
    let merged = || -> Result<usize, Failure> {
        let one = pagemap::entry(memory.page(PAGES - 1))?;
        let entries: Vec<_> = (0..PAGES)
            .map(|index| pagemap::entry(memory.page(index)))
            .collect::<Result<_, _>>()?;
        Ok(entries.iter().filter(|entry| **entry == one).count())
    };
    let deadline = Instant::now() + patiently(Duration::from_secs(10));
    while merged()? < PAGES {
        ensure!(
            Instant::now() < deadline,
            "{} of {PAGES} pages were merged in time",
            merged()?
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    // It merges no more, so that what is written here stays apart.
    fs::write("/sys/kernel/mm/ksm/run", "0")?;
    let mut expected = page.repeat(PAGES);
    ensure_same(&seen_by_gpu(&gpu, &memory)?, &expected, "what the GPU sees")?;
    ensure_eq!(merged()?, PAGES, "merged pages after reading");
    // In the middle of one, and across two others. The rest is nobody's business.
    for (offset, length) in [(3 * 4096 + 100, 50), (8 * 4096 - 10, 20)] {
        let new = bytes(offset as u64, length);
        write_by_gpu(&gpu, &memory, offset, &new)?;
        expected[offset..offset + length].copy_from_slice(&new);
        ensure_same(
            &memory.read(0, memory.len()),
            &expected,
            "what the GPU has written",
        )?;
    }
    ensure_eq!(merged()?, PAGES - 3, "merged pages after writing");
    // An atomic operation takes a page for itself, too.
    let target = memory.page(20).cast::<u64>();
    let number = memory.atomic(20 * 4096).load(Ordering::Relaxed);
    execute_ok(&gpu, &[Command::atomic_add(target, 5)])?;
    expected[20 * 4096..20 * 4096 + 8].copy_from_slice(&number.wrapping_add(5).to_ne_bytes());
    ensure_same(
        &memory.read(0, memory.len()),
        &expected,
        "what the GPU has added to",
    )?;
    ensure_eq!(merged()?, PAGES - 4, "merged pages in the end");
    by_turns(&gpu, &memory).map(|_| Outcome::Passed)
}

/// Swap on a compressed block device in memory, for as long as this is there.
struct Swap;

const ZRAM: &CStr = c"/dev/zram0";

impl Swap {
    fn on() -> Result<Self, Failure> {
        fs::write("/sys/block/zram0/disksize", "32M")?;
        let made = std::process::Command::new("mkswap").arg("/dev/zram0").output()?;
        ensure!(
            made.status.success(),
            "mkswap: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        // SAFETY: The path is a C string.
        let on = unsafe { libc::swapon(ZRAM.as_ptr(), 0) };
        ensure_eq!(on, 0, "swapon: {}", io::Error::last_os_error());
        Ok(Self)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: The path is a C string.
        if unsafe { libc::swapoff(ZRAM.as_ptr()) } != 0 {
            eprintln!("swapoff: {}", io::Error::last_os_error());
        } else if let Err(error) = fs::write("/sys/block/zram0/reset", "1") {
            eprintln!("reset of zram: {error}");
        }
    }
}

/// Kilobytes of the process that are in swap.
fn swapped() -> Result<u64, Failure> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmSwap:"));
    Ok(line.ok_or("no VmSwap")?.trim().trim_end_matches(" kB").parse()?)
}

fn kinds_memory_that_was_swapped_out() -> TestResult {
    if !Path::new("/sys/block/zram0").exists() {
        return Ok(Outcome::Skipped("this kernel has no zram built in".to_owned()));
    }
    let _swap = Swap::on()?;
    let gpu = open()?;
    let memory = aligned(256 << 10, libc::MADV_NOHUGEPAGE)?;
    let expected = bytes(10, memory.len());
    let out = || -> Result<(), Failure> {
        // A page that is still in another processor's batch is left where it is.
        let deadline = Instant::now() + patiently(Duration::from_secs(5));
        loop {
            memory.advise(libc::MADV_PAGEOUT)?;
            let swapped = swapped()?;
            if swapped >= 128 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "only {swapped} KiB of 256 are in swap");
        }
    };
    memory.write(0, &expected);
    out()?;
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &expected,
        "what the GPU sees of pages in swap",
    )?;
    // What the GPU has mapped can go as well, and what it writes is not lost.
    let new = bytes(11, memory.len());
    write_by_gpu(&gpu, &memory, 0, &new)?;
    out()?;
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &new,
        "what the GPU had written before",
    )?;
    // Pages in swap come to VRAM by way of memory; an atomic operation pins.
    out()?;
    if gpu.info()?.vram_size > 0 {
        gpu.prefetch(memory.as_ptr(), memory.len(), Location::Vram)?;
        ensure_same(&memory.read(0, memory.len()), &new, "what was in VRAM")?;
        out()?;
    }
    let add = Command::atomic_add(memory.as_ptr().cast::<u64>(), 1)
        .repeat(memory.pages() as u32)
        .stride(4096);
    execute_ok(&gpu, &[add])?;
    for page in 0..memory.pages() {
        memory.atomic(page * 4096).fetch_sub(1, Ordering::Relaxed);
    }
    ensure_same(
        &memory.read(0, memory.len()),
        &new,
        "what was counted up and down",
    )?;
    by_turns(&gpu, &memory).map(|_| Outcome::Passed)
}

/// `struct uffdio_api`, `struct uffdio_register`, `struct uffdio_copy`, `struct uffd_msg` (`include/uapi/linux/userfaultfd.h`).
mod userfault {
    pub(super) const API: u64 = 0xaa;
    pub(super) const MISSING: u64 = 1;
    pub(super) const PAGEFAULT: u8 = 0x12;
    /// `_IOWR(0xaa, 0x3f, struct uffdio_api)` and its like.
    pub(super) const API_REQUEST: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    pub(super) const REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
    pub(super) const COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
}

/// The pages of the memory come into being when somebody asks for them, with the bytes of `source`: how many did.
fn fill_on_demand(
    userfaults: &File,
    memory: &Mapping,
    source: &[u8],
    done: &AtomicBool,
) -> Result<usize, Failure> {
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        let mut ready = libc::pollfd {
            fd: userfaults.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One entry.
        if unsafe { libc::poll(&raw mut ready, 1, 20) } != 1 {
            continue;
        }
        let mut message = [0_u64; 4];
        // SAFETY: There is room for one message.
        let read = unsafe { libc::read(userfaults.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        ensure_eq!(read, 32, "a message");
        ensure_eq!(message[0] as u8, userfault::PAGEFAULT, "kind of the message");
        let page = message[2] as usize & !4095;
        let offset = page - memory.as_ptr().addr();
        let mut copy = [
            page as u64,
            source[offset..].as_ptr().addr() as u64,
            4096,
            0_u64,
            0,
        ];
        // SAFETY: The source has a page there.
        let copied = unsafe { libc::ioctl(userfaults.as_raw_fd(), userfault::COPY, copy.as_mut_ptr()) };
        // Two that wait for one page make two messages, of which the second comes too late.
        let late = io::Error::last_os_error().raw_os_error() == Some(libc::EEXIST);
        ensure!(copied == 0 || late, "UFFDIO_COPY: {}", io::Error::last_os_error());
        count += usize::from(copied == 0);
    }
    Ok(count)
}

fn kinds_memory_behind_userfaultfd() -> TestResult {
    const PAGES: usize = 24;
    let memory = aligned(PAGES * 4096, libc::MADV_NOHUGEPAGE)?;
    // SAFETY: It makes a new descriptor.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    ensure!(descriptor >= 0, "userfaultfd: {}", io::Error::last_os_error());
    // SAFETY: It is new, and nobody else's.
    let userfaults = File::from(unsafe { OwnedFd::from_raw_fd(descriptor as i32) });
    let mut api = [userfault::API, 0, 0];
    let mut register = [
        memory.as_ptr().addr() as u64,
        memory.len() as u64,
        userfault::MISSING,
        0,
    ];
    // SAFETY: The structure is as long as the request says.
    let agreed = unsafe { libc::ioctl(userfaults.as_raw_fd(), userfault::API_REQUEST, api.as_mut_ptr()) };
    ensure_eq!(agreed, 0, "UFFDIO_API: {}", io::Error::last_os_error());
    // SAFETY: As above.
    let registered =
        unsafe { libc::ioctl(userfaults.as_raw_fd(), userfault::REGISTER, register.as_mut_ptr()) };
    ensure_eq!(registered, 0, "UFFDIO_REGISTER: {}", io::Error::last_os_error());
    let source = bytes(12, memory.len());
    let done = AtomicBool::new(false);
    let (worked, filled) = std::thread::scope(|scope| {
        let filler = scope.spawn(|| fill_on_demand(&userfaults, &memory, &source, &done));
        let work = || -> Result<(), Failure> {
            let gpu = open()?;
            // Some pages are asked for by the CPU, some by an atomic operation, the others by a copy.
            ensure_eq!(memory.read(5 * 4096, 1)[0], source[5 * 4096], "the CPU");
            execute_ok(&gpu, &[Command::atomic_add(memory.page(9).cast::<u64>(), 0)])?;
            ensure_same(&seen_by_gpu(&gpu, &memory)?, &source, "what the GPU sees")?;
            ensure_same(&memory.read(0, memory.len()), &source, "what the CPU sees")?;
            // Once more after the pages are gone, and with the GPU writing first.
            memory.advise(libc::MADV_DONTNEED)?;
            let new = bytes(13, 5000);
            write_by_gpu(&gpu, &memory, 3000, &new)?;
            let mut expected = source.clone();
            expected[3000..8000].copy_from_slice(&new);
            ensure_same(
                &memory.read(0, memory.len()),
                &expected,
                "what the GPU has written",
            )
        };
        let worked = work();
        done.store(true, Ordering::Relaxed);
        (worked, filler.join())
    });
    worked?;
    let filled = filled.map_err(|_| "the thread has panicked")??;
    ensure_eq!(filled, 2 * PAGES, "pages that were filled on demand");
    PASSED
}

fn kinds_a_file_that_is_truncated() -> TestResult {
    let file = file(8 * 4096, 14)?;
    let memory = Mapping::of_file(&file, 8, libc::MAP_SHARED)?;
    let gpu = open()?;
    ensure_same(&seen_by_gpu(&gpu, &memory)?, &bytes(14, memory.len()), "the file")?;
    write_by_gpu(&gpu, &memory, 0, &bytes(15, memory.len()))?;
    // From the middle of a page on it is gone: to the GPU as to the CPU, which would get SIGBUS.
    file.set_len(2 * 4096 + 100)?;
    let copy = page_with(0)?;
    let beyond = [
        Command::copy(memory.page(3), copy.as_ptr(), 8),
        Command::fill(memory.page(7).cast::<u64>(), 1, 1_u64),
    ];
    for command in beyond {
        let completion = execute(&open()?, &[command])?;
        ensure_eq!(
            completion.status,
            Status::Fault,
            "beyond the end: {completion:x?}"
        );
    }
    let mut expected = bytes(15, memory.len());
    expected[2 * 4096 + 100..].fill(0);
    file.set_len(memory.len() as u64)?;
    ensure_same(
        &seen_by_gpu(&gpu, &memory)?,
        &expected,
        "what was cut off, for the GPU",
    )?;
    ensure_same(&memory.read(0, memory.len()), &expected, "what was cut off")?;
    let last = by_turns(&gpu, &memory)?;
    ensure_same(&content(&file, memory.len())?, &last, "the file in the end")?;
    PASSED
}

/// A list that jumps about in thousands of pages: some in VRAM, some mirrored, some pinned, some never touched by the GPU, some
/// in a file.
fn a_long_list_is_followed_wherever_its_nodes_are() -> TestResult {
    const PAGES: usize = 2048;
    const FILE_PAGES: usize = 512;
    let gpu = open()?;
    let anonymous = aligned(PAGES * 4096, libc::MADV_NOHUGEPAGE)?;
    let file = memory_file(c"list", FILE_PAGES * 4096, 0)?;
    let shared = Mapping::of_file(&file, FILE_PAGES, libc::MAP_SHARED)?;
    let count = PAGES + FILE_PAGES;
    // One node in each page, not always in the same place: a value, and the address of the next one.
    let node = |index: usize| {
        let offset = index % 200 * 16;
        if index < PAGES {
            (&anonymous, index * 4096 + offset)
        } else {
            (&shared, (index - PAGES) * 4096 + offset)
        }
    };
    let address = |index: usize| {
        let (memory, offset) = node(index);
        memory.at(offset)
    };
    // 1 + 4 * 613 has no factor in common with the number of pages, so the steps go through all of them.
    let at_step = |step: usize| step * 2453 % count;
    let mut sum = 0_u64;
    for step in 0..count {
        let (memory, offset) = node(at_step(step));
        let value = (step as u64 + 1) * (step as u64 + 3);
        sum += value;
        memory.atomic(offset).store(value, Ordering::Relaxed);
        let next = if step + 1 < count {
            address(at_step(step + 1)).addr()
        } else {
            0
        };
        memory.atomic(offset + 8).store(next as u64, Ordering::Relaxed);
    }
    let result = Mapping::anonymous(1)?;
    let follow = |sum: u64, what: &str| -> Result<(), Failure> {
        result.write(0, &[0xff; 24]);
        let first = address(at_step(0)).cast::<u64>();
        let command = Command::chase(
            first,
            2 * count as u32,
            8,
            0,
            result.as_ptr().cast::<ChaseResult>(),
        );
        execute_ok(&gpu, &[command])?;
        let found = [0, 8, 16].map(|offset| result.atomic(offset).load(Ordering::Relaxed));
        ensure_eq!(found, [0, sum, count as u64], "the list, {what}");
        Ok(())
    };
    if gpu.info()?.vram_size > 0 {
        // Every other run of 64 pages of a half of it.
        for start in (0..PAGES / 2).step_by(128) {
            gpu.prefetch(anonymous.page(start), 64 * 4096, Location::Vram)?;
        }
    }
    // And some others pinned.
    let pinned = Command::atomic_add(anonymous.page(PAGES / 2).cast::<u64>(), 0);
    execute_ok(&gpu, &[pinned.repeat(300).stride(4096)])?;
    let count_of = |state: PageState| -> Result<usize, Failure> {
        let pages = gpu.query(anonymous.as_ptr(), anonymous.len())?;
        Ok(pages.iter().filter(|page| page.state == state).count())
    };
    let (in_vram, pinned) = (count_of(PageState::Vram)?, count_of(PageState::Pinned)?);
    ensure!(
        in_vram >= 500 || gpu.info()?.vram_size == 0,
        "{in_vram} pages in VRAM"
    );
    ensure!(pinned >= 250, "{pinned} pinned pages");
    follow(sum, "at first")?;
    ensure_eq!(count_of(PageState::Vram)?, in_vram, "pages in VRAM after reading");
    // The CPU changes a value on every eighth page, wherever that is, and so brings some of them home.
    for index in (0..count).step_by(8) {
        let (memory, offset) = node(index);
        memory.atomic(offset).fetch_add(7, Ordering::Relaxed);
    }
    follow(sum + 7 * count.div_ceil(8) as u64, "after the CPU has changed it").map(|()| Outcome::Passed)
}
