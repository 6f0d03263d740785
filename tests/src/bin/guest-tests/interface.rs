// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The requests themselves: what is accepted, and what is refused with which error.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use pinion_client::uapi::{self, Argument};
use pinion_client::{Atomics, Command, Location, PinMethod, Status, Submission};
use pinion_tests::{Mapping, patiently};

use crate::support::{
    PASSED, TestResult, add, ensure, ensure_eq, errno, execute, execute_ok, expect_failure, fork, join,
    long_work, open, page_with, pin, raw_errno, soon, submit, submit_on, tests, value,
};

tests! {
    info_is_plausible
    pin_method_is_what_sysfs_says
    unknown_flags_are_refused
    odd_sizes_are_refused
    longer_structures_are_taken_if_the_rest_is_zero
    unknown_requests_are_refused
    bad_pointers_are_refused
    bad_rings_and_counts_are_refused
    bad_advice_is_refused
    bad_queries_are_refused
    waiting_for_nothing_is_refused
    waiting_ends_when_the_time_is_over
    waiting_ends_with_a_signal
    malformed_commands_fail
    work_after_a_failure_fails
    a_malformed_batch_changes_nothing
    statistics_count
    a_child_cannot_use_an_inherited_file
    threads_share_a_file
}

/// An address where nothing is ever mapped.
const NOWHERE: u64 = 0x1000;

fn info_is_plausible() -> TestResult {
    let info = open()?.info()?;
    ensure_eq!(info.version, uapi::VERSION, "version");
    ensure!(
        info.max_submissions >= 64 && info.max_commands >= info.max_batch,
        "{info:?}"
    );
    ensure!(
        info.atomics.contains(&Atomics::Auto) && info.atomics.contains(&Atomics::Unprotected),
        "{info:?}"
    );
    ensure!(info.locations.contains(&Location::Anywhere), "{info:?}");
    ensure!((1..=16).contains(&info.rings), "{info:?}");
    ensure!(info.max_batch >= 1, "{info:?}");
    ensure!(info.vram_size % 4096 == 0, "{info:?}");
    PASSED
}

fn pin_method_is_what_sysfs_says() -> TestResult {
    let text = std::fs::read_to_string("/sys/module/pinion/parameters/pin_method")?;
    let expected = match open()?.info()?.pin_method {
        PinMethod::MigratePfn => "migrate_pfn_pin",
        PinMethod::Takeover => "takeover",
    };
    ensure_eq!(text.trim(), expected, "/sys/module/pinion/parameters/pin_method");
    PASSED
}

fn unknown_flags_are_refused() -> TestResult {
    let gpu = open()?;
    ensure_eq!(
        raw_errno(
            &gpu,
            uapi::Info {
                flags: 1,
                ..Argument::new()
            }
        )?,
        libc::EINVAL,
        "info"
    );
    let command = Command::nop();
    let commands = (&raw const command).addr() as u64;
    let submit = uapi::Submit {
        flags: 1,
        count: 1,
        commands,
        ..Argument::new()
    };
    ensure_eq!(raw_errno(&gpu, submit)?, libc::EINVAL, "submit");
    let work = crate::support::submit(&gpu, &[Command::nop()])?;
    let mut entry = uapi::WaitEntry {
        sequence: work.sequence,
        ..Default::default()
    };
    let wait = uapi::Wait {
        entries: (&raw mut entry).addr() as u64,
        count: 1,
        timeout_ns: 1_000_000_000,
        ..Argument::new()
    };
    ensure_eq!(
        raw_errno(
            &gpu,
            uapi::Wait {
                flags: 1 << 31,
                ..wait
            }
        )?,
        libc::EINVAL,
        "wait"
    );
    // SAFETY: It is there. (The compiler does not know that the driver reads it.)
    unsafe { (&raw mut entry.reserved).write_volatile(1) };
    ensure_eq!(raw_errno(&gpu, wait)?, libc::EINVAL, "wait, reserved");
    let memory = page_with(1)?;
    let address = memory.as_ptr().addr() as u64;
    let advise = uapi::Advise {
        flags: 2,
        address,
        length: 4096,
        advice: uapi::ADVISE_ATOMICS,
        ..Argument::new()
    };
    ensure_eq!(raw_errno(&gpu, advise)?, libc::EINVAL, "advise");
    let mut page = uapi::Page::default();
    let query = uapi::Query {
        flags: 4,
        address,
        count: 1,
        pages: (&raw mut page).addr() as u64,
        ..Argument::new()
    };
    ensure_eq!(raw_errno(&gpu, query)?, libc::EINVAL, "query");
    PASSED
}

fn odd_sizes_are_refused() -> TestResult {
    let gpu = open()?;
    for size in [0, 1, 4, 8, size_of::<uapi::Wait>() as u32 - 1, 1 << 20, u32::MAX] {
        let info = uapi::Info {
            size,
            ..uapi::Info::default()
        };
        ensure_eq!(raw_errno(&gpu, info)?, libc::EINVAL, "info of {size} bytes");
        let wait = uapi::Wait {
            size,
            ..uapi::Wait::default()
        };
        ensure_eq!(raw_errno(&gpu, wait)?, libc::EINVAL, "wait of {size} bytes");
    }
    PASSED
}

/// What a program would pass that was made for a later version of the interface.
#[repr(C)]
#[derive(Default)]
struct LongInfo {
    info: uapi::Info,
    later: [u64; 32],
}

// SAFETY: The driver writes no more than the `size` that is in the structure.
unsafe impl Argument for LongInfo {
    const NUMBER: u32 = uapi::Info::NUMBER;
    const NAME: &'static str = "PINION_IOCTL_INFO (longer)";

    fn new() -> Self {
        let mut this = Self::default();
        this.info.size = size_of::<Self>() as u32;
        this
    }
}

fn longer_structures_are_taken_if_the_rest_is_zero() -> TestResult {
    let gpu = open()?;
    let mut long = LongInfo::new();
    // SAFETY: It points to nothing.
    unsafe { uapi::ioctl(gpu.as_fd(), &mut long) }?;
    ensure_eq!(long.info.version, uapi::VERSION, "version");
    ensure_eq!(long.later, [0; 32], "the rest");
    let mut long = LongInfo::new();
    long.later[31] = 1;
    let error = raw_errno(&gpu, long)?;
    ensure!([libc::EINVAL, libc::E2BIG].contains(&error), "errno {error}");
    PASSED
}

fn unknown_requests_are_refused() -> TestResult {
    let gpu = open()?;
    for request in [
        uapi::Discard::NUMBER + 1,
        uapi::Info::NUMBER | 0xff,
        0,
        u32::MAX,
        0x5401,
    ] {
        // SAFETY: No request of that number is known, so there is nothing that it could touch; and if there is, at
        // this address there is nothing.
        let result = unsafe { libc::ioctl(gpu.as_fd().as_raw_fd(), request as _, NOWHERE) };
        let error = std::io::Error::last_os_error();
        ensure!(
            result == -1 && error.raw_os_error() == Some(libc::ENOTTY),
            "{request:#x}: {result}, {error}"
        );
    }
    PASSED
}

fn bad_pointers_are_refused() -> TestResult {
    let gpu = open()?;
    let numbers = [
        uapi::Info::NUMBER,
        uapi::Submit::NUMBER,
        uapi::Wait::NUMBER,
        uapi::Advise::NUMBER,
        uapi::Query::NUMBER,
        uapi::Prefetch::NUMBER,
        uapi::Discard::NUMBER,
    ];
    for request in numbers {
        for address in [0, NOWHERE, u64::MAX - 7, 0xffff_8000_0000_0000] {
            // SAFETY: There is nothing of ours at these addresses.
            let result = unsafe { libc::ioctl(gpu.as_fd().as_raw_fd(), request as _, address) };
            let error = std::io::Error::last_os_error();
            let refused = result == -1 && error.raw_os_error() == Some(libc::EFAULT);
            ensure!(refused, "{request:#x} at {address:#x}: {result}, {error}");
        }
    }
    let submit = uapi::Submit {
        count: 1,
        commands: NOWHERE,
        ..Argument::new()
    };
    ensure_eq!(raw_errno(&gpu, submit)?, libc::EFAULT, "commands");
    let memory = page_with(1)?;
    let query = uapi::Query {
        address: memory.as_ptr().addr() as u64,
        count: 1,
        pages: NOWHERE,
        ..Argument::new()
    };
    ensure_eq!(raw_errno(&gpu, query)?, libc::EFAULT, "pages");
    PASSED
}

fn bad_rings_and_counts_are_refused() -> TestResult {
    let gpu = open()?;
    let info = gpu.info()?;
    let commands = vec![Command::nop(); info.max_batch as usize + 1];
    for ring in [info.rings, u32::MAX] {
        ensure_eq!(
            errno(submit_on(&gpu, ring, &commands[..1]))?,
            libc::EINVAL,
            "ring {ring}"
        );
        ensure_eq!(
            errno(gpu.wait(Submission { ring, sequence: 1 }, soon()))?,
            libc::EINVAL,
            "wait on ring {ring}"
        );
    }
    ensure_eq!(errno(submit_on(&gpu, 0, &[]))?, libc::EINVAL, "no commands");
    ensure_eq!(
        errno(submit_on(&gpu, 0, &commands))?,
        libc::EINVAL,
        "too many commands"
    );
    execute_ok(&gpu, &commands[1..])?;
    PASSED
}

fn bad_advice_is_refused() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(2)?;
    let address = memory.as_ptr().addr() as u64;
    let good = uapi::Advise {
        address,
        length: 4096,
        advice: uapi::ADVISE_ATOMICS,
        value: uapi::ATOMICS_PIN,
        ..Argument::new()
    };
    let bad = [
        uapi::Advise {
            address: address + 8,
            ..good
        },
        uapi::Advise { length: 4095, ..good },
        uapi::Advise { length: 0, ..good },
        uapi::Advise {
            length: u64::MAX - 4095,
            ..good
        },
        uapi::Advise {
            address: 1 << 60,
            ..good
        },
        uapi::Advise { advice: 0, ..good },
        uapi::Advise { advice: 77, ..good },
        uapi::Advise { value: 77, ..good },
    ];
    for advise in bad {
        ensure_eq!(raw_errno(&gpu, advise)?, libc::EINVAL, "{advise:x?}");
    }
    PASSED
}

fn bad_queries_are_refused() -> TestResult {
    let gpu = open()?;
    let mut pages = vec![uapi::Page::default(); uapi::QUERY_MAX + 1];
    let memory = Mapping::anonymous(1)?;
    let good = uapi::Query {
        address: memory.as_ptr().addr() as u64,
        count: 1,
        pages: pages.as_mut_ptr().addr() as u64,
        ..Argument::new()
    };
    let bad = [
        uapi::Query {
            address: good.address + 1,
            ..good
        },
        uapi::Query {
            count: pages.len() as u64,
            ..good
        },
        uapi::Query {
            count: u64::MAX,
            ..good
        },
        uapi::Query {
            address: 1 << 60,
            ..good
        },
    ];
    for query in bad {
        ensure_eq!(raw_errno(&gpu, query)?, libc::EINVAL, "{query:x?}");
    }
    PASSED
}

fn waiting_for_nothing_is_refused() -> TestResult {
    let gpu = open()?;
    for sequence in [0, 1, u64::MAX] {
        let error = errno(gpu.wait(Submission { ring: 0, sequence }, soon()))?;
        ensure_eq!(error, libc::EINVAL, "submission {sequence}");
    }
    PASSED
}

fn waiting_ends_when_the_time_is_over() -> TestResult {
    let gpu = open()?;
    let memory = page_with(0)?;
    let work = submit(&gpu, &long_work(&memory))?;
    for timeout in [Duration::ZERO, Duration::from_millis(30)] {
        let started = Instant::now();
        ensure_eq!(errno(gpu.wait(work, timeout))?, libc::ETIMEDOUT, "{timeout:?}");
        let took = started.elapsed();
        ensure!(
            took >= timeout && took < timeout + patiently(Duration::from_secs(2)),
            "{timeout:?} has become {took:?}"
        );
    }
    PASSED
}

extern "C" fn ignore(_signal: i32) {}

fn waiting_ends_with_a_signal() -> TestResult {
    let gpu = open()?;
    let memory = page_with(0)?;
    let work = submit(&gpu, &long_work(&memory))?;
    let handler = ignore as extern "C" fn(i32);
    // SAFETY: All-zero is valid, and stands for no flags: the call is not restarted.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // SAFETY: The handler does nothing.
    unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    let after = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 100_000,
        },
    };
    // SAFETY: A valid value; the old one is not wanted.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const after, std::ptr::null_mut()) };
    let started = Instant::now();
    ensure_eq!(
        errno(gpu.wait(work, Duration::from_secs(20)))?,
        libc::EINTR,
        "with a signal"
    );
    ensure!(
        started.elapsed() < patiently(Duration::from_secs(5)),
        "only after {:?}",
        started.elapsed()
    );
    PASSED
}

fn malformed_commands_fail() -> TestResult {
    let memory = page_with(5)?;
    let good = *add(&memory, 1).as_raw();
    let bad = [
        uapi::Command {
            address: good.address + 1,
            ..good
        },
        uapi::Command { width: 3, ..good },
        uapi::Command { stride: 4, ..good },
        uapi::Command { repeat: 0, ..good },
        uapi::Command { reserved: 1, ..good },
        uapi::Command { length: 8, ..good },
        uapi::Command { flags: 0x80, ..good },
    ];
    for command in bad {
        expect_failure(Command::from_raw(command), Status::Invalid, 0)?;
    }
    let command = uapi::Command {
        operation: 99,
        ..good
    };
    expect_failure(Command::from_raw(command), Status::Unsupported, 0)?;
    ensure_eq!(value(&memory), 5, "the number");
    PASSED
}

fn work_after_a_failure_fails() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    let bad = Command::fill::<u64>(std::ptr::without_provenance_mut(NOWHERE as usize), 1, 1);
    let works = [
        submit(&gpu, &[add(&memory, 1)])?,
        submit(&gpu, &[add(&memory, 1), bad, add(&memory, 1)])?,
        submit(&gpu, &[add(&memory, 1)])?,
    ];
    // In any order, and more than once.
    for _ in 0..2 {
        ensure_eq!(gpu.wait(works[2], soon())?.status, Status::ContextError, "after");
        let failed = gpu.wait(works[1], soon())?;
        ensure_eq!(
            (failed.status, failed.executed),
            (Status::Fault, 1),
            "the failure"
        );
        ensure_eq!(gpu.wait(works[0], soon())?.status, Status::Ok, "before");
    }
    ensure_eq!(value(&memory), 7, "the number");
    // It is the file that has failed, not the process.
    execute_ok(&open()?, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 8, "the number");
    PASSED
}

/// Nothing of it is done. What is said about the work after it must be true.
fn a_malformed_batch_changes_nothing() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    let bad = Command::from_raw(uapi::Command {
        operation: 99,
        ..*add(&memory, 1).as_raw()
    });
    let completion = execute(&gpu, &[add(&memory, 1), bad, add(&memory, 1)])?;
    ensure_eq!(
        (completion.status, completion.executed),
        (Status::Unsupported, 0),
        "{completion:x?}"
    );
    ensure_eq!(value(&memory), 5, "the number");
    let completion = execute(&gpu, &[add(&memory, 1)])?;
    let expected = match completion.status {
        Status::Ok => 6,
        Status::ContextError => 5,
        _ => return Err(format!("{completion:x?}").into()),
    };
    ensure_eq!(value(&memory), expected, "the number after {completion:x?}");
    PASSED
}

fn statistics_count() -> TestResult {
    let gpu = open()?;
    let first = gpu.statistics()?;
    ensure_eq!(
        (first.faults, first.pins, first.submissions, first.completed),
        (0, 0, 0, 0),
        "at first"
    );
    ensure!(
        first.client > 0 && open()?.statistics()?.client > first.client,
        "{first:?}"
    );
    let memory = page_with(5)?;
    for round in 1..=3 {
        pin(&gpu, &memory, 1)?;
        ensure_eq!(value(&memory), 5 + round, "the number");
        let found = gpu.statistics()?;
        ensure_eq!(
            (found.pins, found.unpins, found.submissions),
            (round, round, round),
            "{found:?}"
        );
        ensure!(found.faults >= round, "{found:?}");
        ensure_eq!(
            (found.commands, found.completed, found.failed, found.outstanding),
            (round, round, 0, 0),
            "{found:?}"
        );
        ensure!(found.busy.iter().any(|busy| !busy.is_zero()), "{found:?}");
    }
    PASSED
}

fn a_child_cannot_use_an_inherited_file() -> TestResult {
    let gpu = open()?;
    let memory = page_with(5)?;
    let child = fork(|| {
        ensure_eq!(
            errno(submit_on(&gpu, 0, &[add(&memory, 1)]))?,
            libc::EPERM,
            "submit"
        );
        ensure_eq!(
            errno(gpu.wait(Submission { ring: 0, sequence: 1 }, soon()))?,
            libc::EPERM,
            "wait"
        );
        ensure_eq!(errno(gpu.query(memory.as_ptr(), 1))?, libc::EPERM, "query");
        let advice = gpu.advise_atomics(memory.as_ptr(), 4096, pinion_client::Atomics::Unprotected);
        ensure_eq!(errno(advice)?, libc::EPERM, "advise");
        Ok(())
    })?;
    join(child)?;
    ensure_eq!(value(&memory), 5, "the number");
    execute_ok(&gpu, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 6, "the number");
    PASSED
}

fn threads_share_a_file() -> TestResult {
    let gpu = open()?;
    let memory = Mapping::anonymous(4)?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|page| {
                let (gpu, memory) = (&gpu, &memory);
                scope.spawn(move || {
                    for _ in 0..50 {
                        execute_ok(
                            gpu,
                            &[Command::atomic_add(memory.page(page).cast::<u64>(), 1).repeat(10)],
                        )?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| "a thread panicked")?)
    })
    .map_err(|error: pinion_tests::Failure| error)?;
    for page in 0..4 {
        ensure_eq!(
            memory
                .atomic(page * 4096)
                .load(std::sync::atomic::Ordering::Relaxed),
            500,
            "page {page}"
        );
    }
    PASSED
}
