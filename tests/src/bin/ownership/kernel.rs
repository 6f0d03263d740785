// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernel takes references to pages of the process, for itself or for a disk.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use pinion_client::{Command, Gpu, Location, Status};
use pinion_tests::matrix::State;
use pinion_tests::process::pipe;
use pinion_tests::uring::Uring;
use pinion_tests::work::execute;
use pinion_tests::{Failure, Mapping, ensure_eq};

use crate::cell::{Body, Cell, ELSEWHERE, Outcome, advise, anonymous, compare, pattern, words_in};

pub(crate) const EVENTS: &[(&str, Body)] = &[
    ("gup-short", gup_short),
    ("gup-long", gup_long),
    ("direct-write", direct_write),
    ("direct-read", direct_read),
];

/// A pipe keeps the pages until somebody reads them.
fn gup_short(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    let (mut reader, writer) = pipe()?;
    let length = subject.memory.len();
    // SAFETY: It changes a pipe of our own.
    let room = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, length as i32) };
    ensure_eq!(room >= length as i32, true, "room in the pipe");
    let mut done = 0;
    while done < length {
        let vector = libc::iovec {
            iov_base: subject.memory.at(done).cast(),
            iov_len: length - done,
        };
        // SAFETY: The memory is there until the pipe has been read, and whatever is in it then is read.
        let spliced =
            unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const vector, 1, libc::SPLICE_F_NONBLOCK) };
        if spliced <= 0 {
            return Err(format!("vmsplice after {done} bytes: {}", std::io::Error::last_os_error()).into());
        }
        done += spliced as usize;
    }
    let result = subject.observe()?;
    subject.check_gpu()?;
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes)?;
    compare(&words_in(&bytes), &subject.expected, "who reads the pipe")?;
    subject.finish_as(result)
}

/// A buffer that was registered with io_uring is pinned (`FOLL_LONGTERM`) until it is not registered any more.
fn gup_long(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let mut ring = match Uring::new() {
        Ok(ring) => ring,
        Err(error) => return Ok(Outcome::Blank(format!("no io_uring: {error}"))),
    };
    // SAFETY: The memory is there for longer than the ring, and accessed through atomics only.
    unsafe { ring.register(subject.memory.as_ptr(), subject.memory.len()) }?;
    let result = subject.observe()?;
    let file = File::from(memfd()?);
    let length = subject.memory.len();
    let through_the_ring = |ring: &mut Uring, expected: &[u64]| -> Result<(), Failure> {
        ring.write_fixed(&file, 0, length)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0)?;
        compare(&words_in(&bytes), expected, "who holds the pages")
    };
    through_the_ring(&mut ring, &subject.expected)?;
    // While they are held the GPU works on the very same pages.
    subject.gpu_copies(5)?;
    through_the_ring(&mut ring, &subject.expected)?;
    // To ask that they move is no use.
    subject
        .gpu()
        .prefetch(subject.memory.as_ptr(), length, Location::Vram)?;
    subject.gpu_copies(6)?;
    through_the_ring(&mut ring, &subject.expected)?;
    if cell.state == State::Pinned {
        // For a pin it would have to have them to itself. (With a context of its own, which this puts into error. It takes a
        // second, as whoever holds a page may hold it for a moment only.)
        let gpu = Gpu::open(cell.device)?;
        advise(&gpu, &subject.memory, State::Pinned)?;
        let completion = execute(&gpu, &[Command::atomic_add(subject.pointer(), 1)])?;
        ensure_eq!(completion.status, Status::NotExclusive, "{completion:x?}");
    }
    subject.check_cpu()?;
    through_the_ring(&mut ring, &subject.expected)?;
    drop(ring);
    subject.finish_as(result)
}

fn memfd() -> Result<std::os::fd::OwnedFd, Failure> {
    use std::os::fd::FromRawFd as _;
    // SAFETY: A valid name.
    let descriptor = unsafe { libc::memfd_create(c"ownership".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: It is new, and nobody else's.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor) })
}

/// The disk, past the page cache, or why there is none.
fn disk(cell: &Cell<'_>) -> Result<Result<File, String>, Failure> {
    Ok(match &cell.machine.disk {
        Err(reason) => Err(reason.clone()),
        Ok(path) => Ok(OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?),
    })
}

/// Reads (or writes) all of the memory directly.
fn transfer(file: &File, memory: &Mapping, write: bool) -> Result<(), Failure> {
    let mut done = 0;
    while done < memory.len() {
        let (start, length) = (memory.at(done).cast(), memory.len() - done);
        let place = done as i64;
        let count = if write {
            // SAFETY: There are that many bytes.
            unsafe { libc::pwrite(file.as_raw_fd(), start, length, place) }
        } else {
            // SAFETY: There is room for that many bytes.
            unsafe { libc::pread(file.as_raw_fd(), start, length, place) }
        };
        if count <= 0 {
            let error = std::io::Error::last_os_error();
            return Err(format!("{count} bytes at {done:#x} of the memory: {error}").into());
        }
        done += count as usize;
    }
    Ok(())
}

fn direct_write(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let file = match disk(cell)? {
        Ok(disk) => disk,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    let subject = cell.enter()?;
    transfer(&file, &subject.memory, true)?;
    let copy = anonymous(ELSEWHERE, subject.memory.pages())?;
    transfer(&file, &copy, false)?;
    compare(&copy.words(), &subject.expected, "who reads the disk")?;
    subject.finish()
}

fn direct_read(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let file = match disk(cell)? {
        Ok(disk) => disk,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    let mut subject = cell.enter()?;
    let source = anonymous(ELSEWHERE, subject.memory.pages())?;
    source.set_words(&pattern(7, subject.expected.len()));
    transfer(&file, &source, true)?;
    transfer(&file, &subject.memory, false)?;
    subject.expected = pattern(7, subject.expected.len());
    subject.finish()
}
