// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of the process, or of its memory. It happens twice: to a process by itself, whose memory must be free afterwards, and to
//! one with a child that shares the memory, which must keep it.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use pinion_client::{PAGE_SIZE, uapi};
use pinion_tests::matrix::{Size, State};
use pinion_tests::process::{Child, pipe, wait_readable};
use pinion_tests::{Failure, Mapping, ensure, ensure_eq, patiently};

use crate::cell::{Body, Cell, Outcome, Subject, anonymous, compare, words_in};
use crate::machine::Cgroup;

pub(crate) const EVENTS: &[(&str, Body)] = &[
    ("core-dump", core_dump),
    ("exec", exec),
    ("exit", exit),
    ("sigkill", sigkill),
    ("oom-kill", oom_kill),
];

/// Names the descriptor of an open GPU for this program when it is executed with it.
pub(crate) const INHERITED: &str = "PINION_OWNERSHIP_INHERITED";
/// Where the kernel puts a core.
const CORES: &str = "/tmp/core";
/// Where there is more memory of the process, and how many pages. The kernel brings the statistics of a cgroup up to date only when they
/// have changed by much.
const BALLAST: (usize, usize) = (0x1400_0000_0000, 512);
/// Time for a process to come to its end.
const LIMIT: Duration = Duration::from_secs(15);

/// How a process ends.
struct Ending {
    /// What it does last.
    last: fn(&mut Subject, &Cgroup) -> Result<(), Failure>,
    /// What its parent does to it when it is ready for its end.
    blow: fn(&Child),
    /// Its status, as [`Child::wait`] tells it.
    status: i32,
}

/// A process whose memory is in the state of the cell, and what it said about itself.
struct Victim {
    child: Child,
    ready: File,
}

/// What a child does that has shared the memory, and survives.
fn survive(subject: &mut Subject, go: &mut File, verdict: &mut File) -> i32 {
    subject.close();
    // It is not to be the one that is killed for want of memory.
    let spared = fs::write("/proc/self/oom_score_adj", "-1000").is_ok();
    let told =
        wait_readable(go, patiently(LIMIT * 2)).is_ok_and(|told| told) && go.read_exact(&mut [0]).is_ok();
    let fine = match subject.check_cpu() {
        Ok(()) => spared && told,
        Err(error) => {
            eprintln!("in the child that survives: {error}");
            false
        }
    };
    i32::from(verdict.write_all(&[u8::from(fine)]).is_err())
}

/// Forks a process that brings its memory into the state, says so, and comes to its end.
fn victim(
    cell: &Cell<'_>,
    memory: Mapping,
    cgroup: &Cgroup,
    ending: &Ending,
    survivor: Option<(File, File)>,
) -> Result<Victim, Failure> {
    let (ready, mut said) = pipe()?;
    let body = || -> Result<(), Failure> {
        cgroup.join()?;
        let ballast = anonymous(BALLAST.0, BALLAST.1)?;
        ballast.advise(libc::MADV_NOHUGEPAGE)?;
        for page in 0..ballast.pages() {
            ballast.write(page * PAGE_SIZE, &[1]);
        }
        let mut subject = cell.enter_at(memory)?;
        if let Some((mut go, mut verdict)) = survivor {
            // SAFETY: It has one thread.
            let child = unsafe { Child::fork(|| survive(&mut subject, &mut go, &mut verdict)) }?;
            // It is not this process's to reap.
            std::mem::forget(child);
        }
        said.write_all(&[1])?;
        (ending.last)(&mut subject, cgroup)?;
        Err("it has not come to its end".into())
    };
    let body = || match body() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("in the process that is to end: {}", pinion_tests::chain(&*error));
            101
        }
    };
    // SAFETY: A cell has a process of its own, with one thread.
    let child = unsafe { Child::fork(body) }?;
    Ok(Victim { child, ready })
}

impl Victim {
    /// Waits until its memory is in its state, and sees it to its end.
    fn end(mut self, ending: &Ending) -> Result<(), Failure> {
        let ready = wait_readable(&self.ready, patiently(LIMIT))?;
        ensure!(
            ready && self.ready.read_exact(&mut [0]).is_ok(),
            "the process has not got its memory into that state"
        );
        (ending.blow)(&self.child);
        let status = self.child.wait(patiently(LIMIT))?;
        ensure_eq!(status, ending.status, "how the process has ended");
        Ok(())
    }
}

/// Both: by itself, and with a child that survives.
fn end(
    cell: &Cell<'_>,
    ending: &Ending,
    check: impl Fn(&Cgroup) -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    let cgroup = match cell.machine.cgroup() {
        Ok(cgroup) => cgroup,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    victim(cell, cell.memory()?, &cgroup, ending, None)?.end(ending)?;
    check(&cgroup)?;
    cgroup.wait_until_empty()?;

    cgroup.set("memory.max", "max")?;
    let (go, mut tell) = pipe()?;
    let (verdict, say) = pipe()?;
    victim(cell, cell.memory()?, &cgroup, ending, Some((go, say)))?.end(ending)?;
    let charged = cgroup.anonymous()?;
    ensure!(
        charged as usize >= (BALLAST.1 + cell.pages()) * PAGE_SIZE,
        "{charged} bytes are charged for the child that survives"
    );
    tell.write_all(&[1])?;
    let mut fine = [0];
    ensure!(
        wait_readable(&verdict, patiently(LIMIT))? && (&verdict).read(&mut fine)? == 1 && fine == [1],
        "the child that survives has not found what was there"
    );
    cgroup.wait_until_empty()?;
    Ok(Outcome::Result("gone".to_owned()))
}

fn nothing(_: &Cgroup) -> Result<(), Failure> {
    Ok(())
}

fn exit(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let ending = Ending {
        // SAFETY: It ends with nothing closed or unmapped.
        last: |_, _| unsafe { libc::_exit(7) },
        blow: |_| {},
        status: 7,
    };
    end(cell, &ending, nothing)
}

fn sigkill(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let ending = Ending {
        last: |_, _| {
            std::thread::sleep(patiently(LIMIT * 2));
            Ok(())
        },
        blow: Child::kill,
        status: -libc::SIGKILL,
    };
    end(cell, &ending, nothing)
}

fn oom_kill(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let ending = Ending {
        last: |_, cgroup| {
            // Absent where there is no swap.
            let _ = cgroup.set("memory.swap.max", "0");
            let room = cgroup.get("memory.current", None)? + (4 << 20);
            cgroup.set("memory.max", &room.to_string())?;
            let more = anonymous(0x1500_0000_0000, 16 << 8)?;
            for page in 0..more.pages() {
                more.write(page * PAGE_SIZE, &[1]);
            }
            Ok(())
        },
        blow: |_| {},
        status: -libc::SIGKILL,
    };
    end(cell, &ending, |cgroup| {
        let killed = cgroup.get("memory.events", Some("oom_kill"))?;
        ensure!(killed > 0, "nobody was killed for want of memory");
        Ok(())
    })
}

fn exec(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let ending = Ending {
        last: |subject, _| {
            let descriptor = subject.gpu().as_fd().as_raw_fd();
            // SAFETY: It changes a flag of a descriptor that is open.
            ensure_eq!(unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) }, 0, "fcntl");
            let error = std::process::Command::new(std::env::current_exe()?)
                .env(INHERITED, descriptor.to_string())
                .exec();
            Err(error.into())
        },
        blow: |_| {},
        status: 0,
    };
    end(cell, &ending, nothing)
}

/// What the program does that was executed: the inherited file must be of no use to it.
pub(crate) fn inherited(descriptor: &str) -> ExitCode {
    let Ok(descriptor) = descriptor.parse() else {
        return ExitCode::FAILURE;
    };
    // SAFETY: Whoever has executed this has left it open.
    let file = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let mut page = uapi::Page::default();
    let mut query = uapi::Query {
        count: 1,
        pages: (&raw mut page).addr() as u64,
        ..uapi::Argument::new()
    };
    // SAFETY: There is room for a page.
    match unsafe { uapi::ioctl(file, &mut query) } {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => ExitCode::SUCCESS,
        other => {
            eprintln!("a query by another program than opened the file: {other:?}");
            ExitCode::FAILURE
        }
    }
}

/// What a core has of a range of addresses.
fn dumped(core: &[u8], start: usize, length: usize) -> Option<&[u8]> {
    let number = |offset: usize, bytes: usize| -> Option<u64> {
        let bytes = core.get(offset..offset + bytes)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte)),
        )
    };
    // ELF64: where the program headers are, how large, how many; of each, its type, where it is and for which address.
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    (0..count).find_map(|index| {
        let header = (table + index * size) as usize;
        let (kind, offset, address, bytes) = (
            number(header, 4)?,
            number(header + 8, 8)?,
            number(header + 16, 8)?,
            number(header + 32, 8)?,
        );
        let skip = (start as u64).checked_sub(address)?;
        if kind != 1 || skip + length as u64 > bytes {
            return None;
        }
        let from = (offset + skip) as usize;
        core.get(from..from + length)
    })
}

fn core_dump(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let cgroup = match cell.machine.cgroup() {
        Ok(cgroup) => cgroup,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    let ending = Ending {
        last: |_, _| {
            let all = libc::rlimit {
                rlim_cur: libc::RLIM_INFINITY,
                rlim_max: libc::RLIM_INFINITY,
            };
            // SAFETY: A valid limit.
            let set = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const all) };
            ensure_eq!(set, 0, "setrlimit");
            std::process::abort()
        },
        blow: |_| {},
        status: -libc::SIGABRT,
    };
    fs::write("/proc/sys/kernel/core_pattern", format!("{CORES}.%p"))?;
    let victim = victim(cell, cell.memory()?, &cgroup, &ending, None)?;
    let path = PathBuf::from(format!("{CORES}.{}", victim.child.pid()));
    victim.end(&ending)?;
    let core = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    fs::remove_file(&path)?;
    let memory = cell.memory()?;
    let bytes = dumped(&core, memory.as_ptr().addr(), memory.len()).ok_or("the memory is not in the core")?;
    let found = words_in(bytes);
    cgroup.wait_until_empty()?;
    // The kernel takes what is not present in the upper levels of the page table for a hole (`follow_pmd_mask()`, `no_page_table()`).
    let hole = found.iter().all(|word| *word == 0);
    if hole && cell.state == State::Vram && cell.size == Size::Huge {
        return Ok(Outcome::Result("gone, a hole in the core".to_owned()));
    }
    compare(&found, &cell.content(), "who reads the core")?;
    Ok(Outcome::Result("gone".to_owned()))
}
