// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Getting work to the GPU, and knowing of its end: batches, fences, events, limits.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinion_client::uapi::{self, Argument};
use pinion_client::{
    Batch, ChaseResult, Command, Compare, Gpu, Memory, Operation, Status, Submission, Submit, Submitted,
};
use pinion_tests::{Failure, Mapping, patiently};

use crate::support::{
    PASSED, TestResult, add, ensure, ensure_eq, errno, execute, execute_ok, fork, join, open, page_with,
    raw_errno, soon, submit, submit_on, tests, value,
};

tests! {
    a_batch_has_many_commands
    rings_are_used_by_many_threads
    files_share_rings_and_do_not_see_each_other
    work_waits_for_work_on_another_ring
    work_that_waits_keeps_nobody_waiting
    a_fence_descriptor_is_waited_for_by_another_process
    a_fence_passes_when_its_file_is_closed
    bad_fences_are_refused
    an_eventfd_is_signalled
    a_file_can_be_polled_and_read
    reading_ends_with_a_signal
    waiting_for_several
    waiting_until_a_time
    waiting_goes_on_after_a_signal
    what_is_queued_is_bounded
    submitting_ends_with_a_signal
    failures_are_remembered
    commands_of_the_driver_are_refused
    address_spaces_of_a_user_are_bounded
    random_requests_do_no_harm
    memory_is_lent_to_the_gpu
    a_linked_list_is_followed
    time_goes_on
    locations_are_accepted_or_refused
}

/// Something that keeps a ring waiting.
struct Gate(Mapping);

impl Gate {
    fn new() -> Result<Self, Failure> {
        Ok(Self(page_with(0)?))
    }

    /// What waits for it.
    fn command(&self) -> Command {
        Command::semaphore_wait(self.0.as_ptr().cast::<u64>(), Compare::Equal, 1)
    }

    fn open(&self) {
        self.0.atomic(0).store(1, Ordering::Release);
    }

    fn close(&self) {
        self.0.atomic(0).store(0, Ordering::Release);
    }
}

/// Queues commands, with what goes with them.
fn send(gpu: &Gpu, submit: &Submit<'_>, commands: &[Command]) -> pinion_client::Result<Submitted> {
    // SAFETY: As for `support::submit_on`.
    unsafe { submit.send(gpu, commands) }
}

/// Time for something to go wrong.
const A_WHILE: Duration = Duration::from_millis(60);

/// Work that has not ended, even after a while.
fn ensure_pending(gpu: &Gpu, work: Submission) -> Result<(), Failure> {
    ensure_eq!(errno(gpu.wait(work, A_WHILE))?, libc::ETIMEDOUT, "{work:?}");
    Ok(())
}

fn ensure_ok(gpu: &Gpu, work: Submission) -> Result<(), Failure> {
    let end = gpu.wait(work, soon())?;
    ensure_eq!(end.status, Status::Ok, "{work:?}");
    Ok(())
}

/// Number of rings, of which there must be more than one.
fn rings(gpu: &Gpu) -> Result<u32, Failure> {
    let rings = gpu.info()?.rings;
    ensure!(rings >= 2, "these tests are for a device with two rings at least");
    Ok(rings)
}

fn a_batch_has_many_commands() -> TestResult {
    let gpu = open()?;
    let most = gpu.info()?.max_batch;
    ensure!(most >= 1024, "at most {most} commands");
    let memory = page_with(0)?;
    for count in [1, 63, 64, 65, 255, 256, 257, 1000, most as usize] {
        let before = value(&memory);
        let commands: Vec<_> = (1..=count as u64).map(|number| add(&memory, number)).collect();
        execute_ok(&gpu, &commands)?;
        let sum = (count * (count + 1) / 2) as u64;
        ensure_eq!(value(&memory) - before, sum, "{count} commands");
    }
    // In order, whatever the number.
    let commands: Vec<_> = (0..u64::from(most))
        .map(|number| Command::fill(memory.at(8 * (number as usize % 5)).cast::<u64>(), 1, number))
        .collect();
    execute_ok(&gpu, &commands)?;
    for place in 0..5 {
        let last = (0..u64::from(most)).rev().find(|number| number % 5 == place);
        ensure_eq!(
            Some(memory.atomic(8 * place as usize).load(Ordering::Relaxed)),
            last,
            "place {place}"
        );
    }
    PASSED
}

/// Eight threads on all rings: every one has a number of its own for each ring, and there is one that all share.
fn rings_are_used_by_many_threads() -> TestResult {
    const THREADS: usize = 8;
    const ROUNDS: u64 = 100;
    let gpu = open()?;
    let rings = rings(&gpu)?;
    let memory = Mapping::anonymous(THREADS + 1)?;
    let results: Vec<Result<(), Failure>> = std::thread::scope(|scope| {
        let (gpu, memory) = (&gpu, &memory);
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || -> Result<(), Failure> {
                    let mut last = [0; 16];
                    for round in 0..ROUNDS {
                        let ring = (thread as u64 + round) as u32 % rings;
                        // Not one number for all rings: nobody waits for one of them before using the next.
                        let own = memory.at(thread * 4096 + 8 * ring as usize).cast::<u64>();
                        let commands = [
                            Command::atomic_add(own, 1).repeat(3),
                            Command::atomic_add(memory.page(THREADS).cast::<u64>(), 1),
                        ];
                        let work = submit_on(gpu, ring, &commands)?;
                        ensure!(work.sequence > last[ring as usize], "{work:?} after {last:?}");
                        last[ring as usize] = work.sequence;
                        // Some are waited for at once, so that queues are short and long.
                        if round % 4 == thread as u64 % 4 {
                            ensure_ok(gpu, work)?;
                        }
                    }
                    for (ring, &sequence) in last.iter().enumerate() {
                        if sequence > 0 {
                            let ring = ring as u32;
                            ensure_ok(gpu, Submission { ring, sequence })?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| "a thread panicked")?)
            .collect()
    });
    results.into_iter().collect::<Result<Vec<_>, _>>()?;
    for thread in 0..THREADS {
        let numbers = (0..rings as usize).map(|ring| memory.atomic(thread * 4096 + 8 * ring));
        let found: u64 = numbers.map(|number| number.load(Ordering::Relaxed)).sum();
        ensure_eq!(found, 3 * ROUNDS, "the numbers of thread {thread}");
    }
    // The device's loads and stores for two rings may come between each other.
    let shared = memory.atomic(THREADS * 4096).load(Ordering::Relaxed);
    ensure!(shared <= THREADS as u64 * ROUNDS && shared > 0, "{shared}");
    let statistics = gpu.statistics()?;
    ensure_eq!(
        (statistics.completed, statistics.failed, statistics.outstanding),
        (THREADS as u64 * ROUNDS, 0, 0),
        "{statistics:?}"
    );
    PASSED
}

fn files_share_rings_and_do_not_see_each_other() -> TestResult {
    const ROUNDS: u64 = 60;
    let work = || -> Result<(), Failure> {
        let gpus = [open()?, open()?];
        let rings = rings(&gpus[0])?;
        let memory = Mapping::anonymous(2)?;
        for round in 1..=ROUNDS {
            for (index, gpu) in gpus.iter().enumerate() {
                for ring in 0..rings {
                    let target = memory.page(index).wrapping_add(64 * ring as usize).cast::<u64>();
                    let work = submit_on(gpu, ring, &[Command::atomic_add(target, 1)])?;
                    // Each file counts for itself.
                    ensure_eq!(work.sequence, round, "on ring {ring} of file {index}");
                }
            }
        }
        for (index, gpu) in gpus.iter().enumerate() {
            for ring in 0..rings {
                let sequence = ROUNDS;
                ensure_ok(gpu, Submission { ring, sequence })?;
                let found = memory
                    .atomic(index * 4096 + 64 * ring as usize)
                    .load(Ordering::Relaxed);
                ensure_eq!(found, ROUNDS, "the number of ring {ring} of file {index}");
                let sequence = ROUNDS + 1;
                let other = gpu.wait(Submission { ring, sequence }, soon());
                ensure_eq!(errno(other)?, libc::EINVAL, "work of others");
            }
        }
        Ok(())
    };
    let children = [fork(work)?, fork(work)?];
    for child in children {
        join(child)?;
    }
    PASSED
}

fn work_waits_for_work_on_another_ring() -> TestResult {
    let gpu = open()?;
    rings(&gpu)?;
    let (gate, memory) = (Gate::new()?, page_with(0)?);
    for round in 0..20 {
        gate.close();
        memory.atomic(0).store(0, Ordering::Relaxed);
        let first = submit_on(
            &gpu,
            1,
            &[gate.command(), Command::fill(memory.as_ptr().cast::<u64>(), 1, 5)],
        )?;
        let second = send(
            &gpu,
            &Submit::new(0).after(first),
            &[Command::copy(memory.as_ptr(), memory.at(8), 8)],
        )?
        .work;
        // What comes after it on the ring waits with it.
        let third = submit_on(&gpu, 0, &[Command::copy(memory.at(8), memory.at(16), 8)])?;
        if round == 0 {
            ensure_pending(&gpu, second)?;
            ensure_pending(&gpu, third)?;
        }
        gate.open();
        for work in [third, second, first] {
            ensure_ok(&gpu, work)?;
        }
        ensure_eq!(memory.atomic(8).load(Ordering::Relaxed), 5, "the second");
        ensure_eq!(memory.atomic(16).load(Ordering::Relaxed), 5, "the third");
        memory.atomic(8).store(0, Ordering::Relaxed);
        memory.atomic(16).store(0, Ordering::Relaxed);
    }
    PASSED
}

fn work_that_waits_keeps_nobody_waiting() -> TestResult {
    let (gpu, other) = (open()?, open()?);
    rings(&gpu)?;
    let (gate, memory) = (Gate::new()?, page_with(0)?);
    let first = submit_on(&gpu, 1, &[gate.command()])?;
    let second = send(&gpu, &Submit::new(0).after(first), &[add(&memory, 1)])?.work;
    for round in 1..=10 {
        execute_ok(&other, &[add(&memory, 10)])?;
        ensure_eq!(value(&memory), 10 * round, "the number");
    }
    ensure_pending(&gpu, second)?;
    gate.open();
    ensure_ok(&gpu, second)?;
    ensure_eq!(value(&memory), 101, "the number");
    PASSED
}

fn a_fence_descriptor_is_waited_for_by_another_process() -> TestResult {
    let gpu = open()?;
    rings(&gpu)?;
    let gate = Gate::new()?;
    let submitted = send(&gpu, &Submit::new(1).fence(), &[gate.command()])?;
    let fence = submitted.fence.ok_or("no fence")?;
    ensure!(!fence.has_passed()?, "it has passed at once");
    let (mut reader, mut writer) = pinion_tests::process::pipe()?;
    let child = fork(|| {
        let gpu = open()?;
        let memory = page_with(3)?;
        let work = send(
            &gpu,
            &Submit::new(0).after_fence(fence.as_fd()),
            &[add(&memory, 1)],
        )?
        .work;
        ensure_pending(&gpu, work)?;
        writer.write_all(b"x")?;
        ensure_ok(&gpu, work)?;
        ensure!(fence.has_passed()?, "the work has not waited");
        ensure_eq!(value(&memory), 4, "the number of the child");
        Ok(())
    })?;
    reader.read_exact(&mut [0])?;
    ensure!(!fence.has_passed()?, "it has passed early");
    gate.open();
    ensure!(fence.wait(soon())?, "it does not pass");
    join(child)?;
    ensure_ok(&gpu, submitted.work)?;
    // It goes on to be passed, also after its file was closed.
    drop(gpu);
    ensure!(fence.has_passed()?, "after closing");
    execute_ok(&open()?, &[Command::nop()])?;
    PASSED
}

fn a_fence_passes_when_its_file_is_closed() -> TestResult {
    let (gpu, other) = (open()?, open()?);
    rings(&gpu)?;
    let (gate, memory) = (Gate::new()?, page_with(0)?);
    // One is with the device, and one waits for it in the driver.
    let sent = send(&gpu, &Submit::new(1).fence(), &[gate.command()])?;
    let held = Submit::new(0).after(sent.work).fence();
    let held = send(&gpu, &held, &[add(&memory, 1)])?;
    let (sent, held) = (sent.fence.ok_or("no fence")?, held.fence.ok_or("no fence")?);
    let after = send(
        &other,
        &Submit::new(0).after_fence(held.as_fd()).after_fence(sent.as_fd()),
        &[add(&memory, 10)],
    )?
    .work;
    ensure_pending(&other, after)?;
    drop(gpu);
    ensure!(sent.wait(soon())? && held.wait(soon())?, "a fence does not pass");
    ensure_ok(&other, after)?;
    ensure_eq!(value(&memory), 10, "the number");
    PASSED
}

fn bad_fences_are_refused() -> TestResult {
    let gpu = open()?;
    let work = submit(&gpu, &[Command::nop()])?;
    ensure_ok(&gpu, work)?;
    let command = Command::nop();
    let null = std::fs::File::open("/dev/null")?;
    let fence = |kind, id, sequence| uapi::Fence { kind, id, sequence };
    for (fence, expected) in [
        (fence(uapi::FENCE_SEQUENCE, 0, 0), libc::EINVAL),
        (fence(uapi::FENCE_SEQUENCE, 0, 2), libc::EINVAL),
        (fence(uapi::FENCE_SEQUENCE, 0, u64::MAX), libc::EINVAL),
        (fence(uapi::FENCE_SEQUENCE, 99, 1), libc::EINVAL),
        (fence(2, 0, 1), libc::EINVAL),
        (fence(uapi::FENCE_DESCRIPTOR, 0, 1), libc::EINVAL),
        (fence(uapi::FENCE_DESCRIPTOR, 777, 0), libc::EBADF),
        (fence(uapi::FENCE_DESCRIPTOR, u32::MAX, 0), libc::EBADF),
        (
            fence(uapi::FENCE_DESCRIPTOR, null.as_raw_fd() as u32, 0),
            libc::EINVAL,
        ),
        (
            fence(uapi::FENCE_DESCRIPTOR, gpu.as_fd().as_raw_fd() as u32, 0),
            libc::EINVAL,
        ),
    ] {
        let good = uapi::Submit {
            count: 1,
            commands: (&raw const command).addr() as u64,
            fences: (&raw const fence).addr() as u64,
            fence_count: 1,
            ..Argument::new()
        };
        ensure_eq!(raw_errno(&gpu, good)?, expected, "{fence:?}");
    }
    let good = uapi::Submit {
        count: 1,
        commands: (&raw const command).addr() as u64,
        ..Argument::new()
    };
    for bad in [
        uapi::Submit {
            fence_count: 1,
            ..good
        },
        uapi::Submit {
            fences: 0x1000,
            ..good
        },
        uapi::Submit {
            fences: good.commands,
            fence_count: uapi::MAX_FENCES + 1,
            ..good
        },
        uapi::Submit { reserved: 1, ..good },
        uapi::Submit { sequence: 1, ..good },
        uapi::Submit { fence: 1, ..good },
        uapi::Submit { eventfd: 1, ..good },
        uapi::Submit { count: 0, ..good },
        uapi::Submit {
            count: u32::MAX,
            ..good
        },
        uapi::Submit { flags: 4, ..good },
    ] {
        ensure_eq!(raw_errno(&gpu, bad)?, libc::EINVAL, "{bad:x?}");
    }
    let unmapped = uapi::Submit {
        fences: 0x1000,
        fence_count: 1,
        ..good
    };
    ensure_eq!(raw_errno(&gpu, unmapped)?, libc::EFAULT, "{unmapped:x?}");
    // None of them has done anything.
    ensure_eq!(submit(&gpu, &[Command::nop()])?.sequence, 2, "the next number");
    PASSED
}

fn eventfd() -> Result<OwnedFd, Failure> {
    // SAFETY: No preconditions.
    match unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        // SAFETY: It is new, and nobody else's.
        descriptor => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
    }
}

/// The count of an eventfd, which is reset.
fn count(eventfd: impl AsFd) -> Result<u64, Failure> {
    let mut file = std::fs::File::from(eventfd.as_fd().try_clone_to_owned()?);
    let mut bytes = [0; 8];
    match file.read_exact(&mut bytes) {
        Ok(()) => Ok(u64::from_ne_bytes(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// What `poll` says of a descriptor within a time.
fn poll(descriptor: impl AsFd, events: i16, timeout: Duration) -> Result<i16, Failure> {
    let mut poll = libc::pollfd {
        fd: descriptor.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: There is one structure.
    match unsafe { libc::poll(&raw mut poll, 1, timeout.as_millis() as i32) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(poll.revents),
    }
}

fn an_eventfd_is_signalled() -> TestResult {
    let gpu = open()?;
    let (gate, event) = (Gate::new()?, eventfd()?);
    let submit = Submit::new(0).notify(event.as_fd());
    let notify = |commands: &[Command]| send(&gpu, &submit, commands);
    let mut last = notify(&[gate.command()])?.work;
    for _ in 0..4 {
        last = notify(&[Command::nop()])?.work;
    }
    std::thread::sleep(A_WHILE);
    ensure_eq!(count(&event)?, 0, "early");
    gate.open();
    ensure_eq!(poll(&event, libc::POLLIN, soon())?, libc::POLLIN, "poll");
    ensure_ok(&gpu, last)?;
    // The last one is told after it is known to have ended.
    let mut seen = 0;
    let deadline = Instant::now() + soon();
    while seen < 5 && Instant::now() < deadline {
        seen += count(&event)?;
    }
    ensure_eq!(seen, 5, "the count");
    // Work that fails ends as well, and so does what closing ends.
    let failing = Command::fill::<u64>(std::ptr::without_provenance_mut(0x1000), 1, 1);
    notify(&[failing])?;
    ensure_eq!(
        poll(&event, libc::POLLIN, soon())?,
        libc::POLLIN,
        "after a failure"
    );
    ensure_eq!(count(&event)?, 1, "after a failure");
    gate.close();
    let other = open()?;
    send(&other, &Submit::new(0).notify(event.as_fd()), &[gate.command()])?;
    drop(other);
    ensure_eq!(poll(&event, libc::POLLIN, soon())?, libc::POLLIN, "after closing");
    for bad in [-1, 777] {
        let command = Command::nop();
        let submit = uapi::Submit {
            flags: uapi::SUBMIT_EVENTFD,
            eventfd: bad,
            count: 1,
            commands: (&raw const command).addr() as u64,
            ..Argument::new()
        };
        ensure_eq!(raw_errno(&open()?, submit)?, libc::EBADF, "{bad}");
    }
    let null = std::fs::File::open("/dev/null")?;
    let refused = send(&open()?, &Submit::new(0).notify(null.as_fd()), &[Command::nop()]);
    ensure_eq!(errno(refused.map(|_| ()))?, libc::EINVAL, "what is no eventfd");
    PASSED
}

fn set_nonblocking(gpu: &Gpu, on: bool) -> Result<(), Failure> {
    let flags = if on {
        libc::O_RDWR | libc::O_NONBLOCK
    } else {
        libc::O_RDWR
    };
    // SAFETY: No preconditions.
    match unsafe { libc::fcntl(gpu.as_fd().as_raw_fd(), libc::F_SETFL, flags) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(()),
    }
}

fn a_file_can_be_polled_and_read() -> TestResult {
    const BOTH: i16 = libc::POLLIN | libc::POLLOUT;
    let gpu = open()?;
    let gate = Gate::new()?;
    let nothing = Duration::ZERO;
    ensure_eq!(poll(&gpu, BOTH, nothing)?, libc::POLLOUT, "at first");
    let first = submit(&gpu, &[gate.command()])?;
    submit(&gpu, &[Command::nop()])?;
    let third = submit(&gpu, &[Command::nop()])?;
    ensure_eq!(poll(&gpu, libc::POLLIN, A_WHILE)?, 0, "before anything has ended");
    ensure_eq!(gpu.ended(nothing)?, 0, "before anything has ended");

    // SAFETY: No preconditions.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    ensure!(epoll >= 0, "epoll_create1");
    // SAFETY: It is new, and nobody else's.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 5,
    };
    // SAFETY: Both are open, and there is an event.
    let added = unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            gpu.as_fd().as_raw_fd(),
            &raw mut event,
        )
    };
    ensure_eq!(added, 0, "epoll_ctl");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            gate.open();
        });
        // SAFETY: There is room for one event.
        let ready = unsafe { libc::epoll_wait(epoll.as_raw_fd(), &raw mut event, 1, 10_000) };
        let events = event.events;
        ensure_eq!((ready, events), (1, libc::EPOLLIN as u32), "epoll_wait");
        Ok::<_, Failure>(())
    })?;
    ensure_ok(&gpu, first)?;
    ensure_ok(&gpu, third)?;
    // Waiting has not read them.
    let mut seen = 0;
    let deadline = Instant::now() + soon();
    while seen < 3 && Instant::now() < deadline {
        seen += gpu.ended(nothing)?;
    }
    ensure_eq!(seen, 3, "ended in all");
    ensure_eq!(poll(&gpu, BOTH, nothing)?, libc::POLLOUT, "after reading");
    ensure_eq!(gpu.ended(nothing)?, 0, "after reading");

    // What read() does by itself.
    set_nonblocking(&gpu, true)?;
    let descriptor = gpu.as_fd().as_raw_fd();
    let mut number = 0_u64;
    let read = |number: *mut u64, size| {
        // SAFETY: There is room for a number, or the address leads nowhere.
        match unsafe { libc::read(descriptor, number.cast(), size) } {
            -1 => -(std::io::Error::last_os_error().raw_os_error().unwrap_or(0) as isize),
            size => size,
        }
    };
    ensure_eq!(
        read(&raw mut number, 8),
        -(libc::EAGAIN as isize),
        "nothing to read"
    );
    let fourth = submit(&gpu, &[Command::nop()])?;
    ensure_ok(&gpu, fourth)?;
    ensure_eq!(poll(&gpu, libc::POLLIN, soon())?, libc::POLLIN, "one to read");
    ensure_eq!(
        read(&raw mut number, 7),
        -(libc::EINVAL as isize),
        "too little room"
    );
    ensure_eq!(
        read(std::ptr::without_provenance_mut(0x1000), 8),
        -(libc::EFAULT as isize),
        "no room"
    );
    ensure_eq!((read(&raw mut number, 8), number), (8, 1), "one");

    // A child may look, and no more.
    let child = fork(|| {
        let size = read(&raw mut number, 8);
        ensure_eq!(size, -(libc::EPERM as isize), "read in a child");
        Ok(())
    })?;
    join(child)?;
    PASSED
}

extern "C" fn ignore(_signal: i32) {}

/// Has SIGALRM come after a time, and then again and again, without effect but for system calls.
fn alarm(after: Duration, interval: Duration, flags: i32) {
    let handler = ignore as extern "C" fn(i32);
    // SAFETY: All-zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = flags;
    // SAFETY: The handler does nothing.
    unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    let time = |time: Duration| libc::timeval {
        tv_sec: time.as_secs() as i64,
        tv_usec: i64::from(time.subsec_micros()),
    };
    let timer = libc::itimerval {
        it_interval: time(interval),
        it_value: time(after),
    };
    // SAFETY: A valid value; the old one is not wanted.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
}

fn reading_ends_with_a_signal() -> TestResult {
    let gpu = open()?;
    alarm(A_WHILE, Duration::ZERO, 0);
    let mut number = 0_u64;
    let descriptor = gpu.as_fd().as_raw_fd();
    // SAFETY: There is room for a number.
    let result = unsafe { libc::read(descriptor, (&raw mut number).cast(), 8) };
    let error = std::io::Error::last_os_error().raw_os_error();
    ensure_eq!((result, error), (-1, Some(libc::EINTR)), "read");
    PASSED
}

fn waiting_for_several() -> TestResult {
    let gpu = open()?;
    rings(&gpu)?;
    let gates = [Gate::new()?, Gate::new()?];
    let works = [
        submit_on(&gpu, 0, &[gates[0].command()])?,
        submit_on(&gpu, 1, &[gates[1].command()])?,
        submit_on(&gpu, 1, &[Command::nop()])?,
    ];
    for any in [false, true] {
        let result = if any {
            gpu.wait_any(&works, A_WHILE).map(|_| ())
        } else {
            gpu.wait_all(&works, A_WHILE).map(|_| ())
        };
        ensure_eq!(errno(result)?, libc::ETIMEDOUT, "before, any: {any}");
    }
    gates[1].open();
    let found = gpu.wait_any(&works, soon())?;
    ensure!(
        found[0].is_none() && found[1].is_some_and(|end| end.is_ok()),
        "{found:?}"
    );
    ensure_ok(&gpu, works[2])?;
    ensure_eq!(
        errno(gpu.wait_all(&works, A_WHILE))?,
        libc::ETIMEDOUT,
        "all, when one is missing"
    );
    // What has ended is told even so.
    let mut entries: Vec<_> = works
        .iter()
        .map(|work| uapi::WaitEntry {
            ring: work.ring,
            sequence: work.sequence,
            ..Default::default()
        })
        .collect();
    let mut wait = uapi::Wait {
        entries: entries.as_mut_ptr().addr() as u64,
        count: 3,
        ..Argument::new()
    };
    // SAFETY: There are three entries.
    let result = unsafe { uapi::ioctl(gpu.as_fd(), &mut wait) };
    ensure!(result.is_err(), "{result:?}");
    let statuses: Vec<_> = entries.iter().map(|entry| entry.status).collect();
    ensure_eq!(
        (statuses, wait.ended),
        (vec![uapi::STATUS_PENDING, uapi::STATUS_OK, uapi::STATUS_OK], 2),
        "entries"
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            gates[0].open();
        });
        let ends = gpu.wait_all(&works, soon())?;
        ensure!(ends.iter().all(|end| end.is_ok()), "{ends:?}");
        Ok::<_, Failure>(())
    })?;
    let none = gpu.wait_all(&[], soon());
    ensure_eq!(errno(none)?, libc::EINVAL, "none");
    let many = gpu.wait_all(&[works[0]; 65], soon());
    ensure_eq!(errno(many)?, libc::EINVAL, "too many");
    let ends = gpu.wait_all(&[works[0]; 64], soon())?;
    ensure_eq!(ends.len(), 64, "as many as can be");
    PASSED
}

fn waiting_until_a_time() -> TestResult {
    let gpu = open()?;
    let gate = Gate::new()?;
    let work = submit(&gpu, &[gate.command()])?;
    let mut entry = uapi::WaitEntry {
        ring: work.ring,
        sequence: work.sequence,
        ..Default::default()
    };
    let mut wait = |flags, timeout_ns| {
        let mut wait = uapi::Wait {
            flags,
            entries: (&raw mut entry).addr() as u64,
            count: 1,
            timeout_ns,
            ..Argument::new()
        };
        let started = Instant::now();
        // SAFETY: There is an entry.
        let result = unsafe { uapi::ioctl(gpu.as_fd(), &mut wait) };
        let error = result.err().and_then(|error| error.raw_os_error());
        (error, wait.timeout_ns, started.elapsed())
    };
    let now = || {
        // SAFETY: All-zero is valid.
        let mut time: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: There is room for it.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let millisecond = 1_000_000;
    let deadline = now() + 80 * millisecond;
    let (error, left, took) = wait(uapi::WAIT_ABSOLUTE, deadline);
    ensure_eq!((error, left), (Some(libc::ETIMEDOUT), deadline), "absolute");
    ensure!(took >= Duration::from_millis(75) && took < soon(), "{took:?}");
    let (error, _, took) = wait(uapi::WAIT_ABSOLUTE, now() - 80 * millisecond);
    ensure_eq!(error, Some(libc::ETIMEDOUT), "the past");
    ensure!(took < patiently(Duration::from_secs(1)), "{took:?}");
    let (error, left, took) = wait(0, 80 * millisecond);
    ensure_eq!((error, left), (Some(libc::ETIMEDOUT), 0), "relative");
    ensure!(took >= Duration::from_millis(80), "{took:?}");
    alarm(A_WHILE, Duration::ZERO, 0);
    let (error, left, took) = wait(0, 20_000 * millisecond);
    ensure_eq!(error, Some(libc::EINTR), "with a signal");
    let lived = 20_000 * millisecond - left;
    ensure!(
        lived >= 50 * millisecond && lived <= took.as_nanos() as i64,
        "{lived} of {took:?}"
    );
    // For ever.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            gate.open();
        });
        for flags in [0, uapi::WAIT_ABSOLUTE] {
            let (error, left, _) = wait(flags, -1);
            ensure_eq!((error, left), (None, -1), "for ever");
        }
        Ok::<_, Failure>(())
    })?;
    PASSED
}

/// With SA_RESTART a wait is not ended by signals, and takes no longer than without them.
fn waiting_goes_on_after_a_signal() -> TestResult {
    let gpu = open()?;
    let gate = Gate::new()?;
    let work = submit(&gpu, &[gate.command()])?;
    let interval = Duration::from_millis(30);
    alarm(interval, interval, libc::SA_RESTART);
    let started = Instant::now();
    let timeout = Duration::from_millis(300);
    ensure_eq!(errno(gpu.wait(work, timeout))?, libc::ETIMEDOUT, "in the end");
    let took = started.elapsed();
    ensure!(
        took >= timeout && took < 2 * timeout + patiently(timeout),
        "{took:?}"
    );
    gate.open();
    ensure_ok(&gpu, work)?;
    // The same for what is safe.
    gate.close();
    let memory = AtomicU64::new(0);
    let mut batch = Batch::new();
    batch
        .semaphore_wait(gate.0.atomic(0), Compare::Equal, 1)
        .atomic(Operation::Add, &memory, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(2 * A_WHILE);
            gate.open();
        });
        ensure!(gpu.run(0, &batch)?.is_ok(), "not done");
        Ok::<_, Failure>(())
    })?;
    ensure_eq!(memory.load(Ordering::Relaxed), 1, "the number");
    PASSED
}

fn what_is_queued_is_bounded() -> TestResult {
    let gpu = open()?;
    let info = gpu.info()?;
    let (gate, memory) = (Gate::new()?, page_with(0)?);
    set_nonblocking(&gpu, true)?;
    submit(&gpu, &[gate.command()])?;
    let mut queued = 1;
    let error = loop {
        match submit_on(&gpu, 0, &[add(&memory, 1)]) {
            Ok(_) => queued += 1,
            Err(error) => break error.errno(),
        }
    };
    ensure_eq!(
        (error, queued),
        (Some(libc::EAGAIN), info.max_submissions),
        "submissions"
    );
    ensure_eq!(poll(&gpu, libc::POLLOUT, Duration::ZERO)?, 0, "poll");
    // Others have room.
    let other = open()?;
    rings(&other)?;
    ensure_ok(&other, submit_on(&other, 1, &[Command::nop()])?)?;
    // Who waits gets it in the end.
    set_nonblocking(&gpu, false)?;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| submit_on(&gpu, 0, &[add(&memory, 1)]));
        std::thread::sleep(A_WHILE);
        let early = waiter.is_finished();
        gate.open();
        let work = waiter.join().map_err(|_| "it panicked")??;
        ensure!(!early, "it has not waited");
        ensure_ok(&gpu, work)?;
        Ok::<_, Failure>(())
    })?;
    ensure_eq!(value(&memory), u64::from(info.max_submissions), "the number");
    ensure_eq!(poll(&gpu, libc::POLLOUT, Duration::ZERO)?, libc::POLLOUT, "poll");
    // The same for commands.
    gate.close();
    set_nonblocking(&gpu, true)?;
    let big = vec![Command::nop(); info.max_batch as usize];
    submit(&gpu, &[gate.command()])?;
    let mut queued = 1;
    let error = loop {
        match submit_on(&gpu, 0, &big) {
            Ok(_) => queued += info.max_batch,
            Err(error) => break error.errno(),
        }
    };
    ensure_eq!(error, Some(libc::EAGAIN), "commands");
    ensure!(
        queued <= info.max_commands && queued + info.max_batch > info.max_commands,
        "{queued}"
    );
    gate.open();
    PASSED
}

fn submitting_ends_with_a_signal() -> TestResult {
    let gpu = open()?;
    let gate = Gate::new()?;
    submit(&gpu, &[gate.command()])?;
    set_nonblocking(&gpu, true)?;
    while submit_on(&gpu, 0, &[Command::nop()]).is_ok() {}
    set_nonblocking(&gpu, false)?;
    let before = gpu.statistics()?.submissions;
    alarm(A_WHILE, Duration::ZERO, 0);
    ensure_eq!(
        errno(submit_on(&gpu, 0, &[Command::nop()]))?,
        libc::EINTR,
        "submit"
    );
    ensure_eq!(gpu.statistics()?.submissions, before, "submissions");
    gate.open();
    PASSED
}

fn failures_are_remembered() -> TestResult {
    let gpu = open()?;
    let memory = page_with(0)?;
    let malformed = |flags| {
        Command::from_raw(uapi::Command {
            operation: if flags == 0 { 99 } else { 0 },
            flags,
            ..*add(&memory, 1).as_raw()
        })
    };
    // As many as are remembered at least, each unlike the one before.
    let mut works = Vec::new();
    for round in 0..60 {
        works.push((
            submit(&gpu, &[malformed(if round % 2 == 0 { 0 } else { 0x80 })])?,
            round,
        ));
        ensure_ok(&gpu, submit(&gpu, &[Command::nop()])?)?;
    }
    for &(work, round) in &works {
        let expected = if round % 2 == 0 {
            Status::Unsupported
        } else {
            Status::Invalid
        };
        ensure_eq!(gpu.wait(work, soon())?.status, expected, "number {round}");
    }
    for _ in 0..10 {
        for flags in [0, 0x80] {
            ensure!(!execute(&gpu, &[malformed(flags)])?.is_ok(), "malformed");
        }
    }
    ensure_eq!(errno(gpu.wait(works[0].0, soon()))?, libc::ESTALE, "long ago");
    // Any number of those that fail alike.
    let failing = Command::fill::<u64>(std::ptr::without_provenance_mut(0x1000), 1, 1);
    let first = submit(&gpu, &[failing])?;
    let others: Vec<_> = (0..200)
        .map(|_| submit(&gpu, &[add(&memory, 1)]))
        .collect::<Result<_, _>>()?;
    for (index, &work) in others.iter().enumerate() {
        ensure_eq!(
            gpu.wait(work, soon())?.status,
            Status::ContextError,
            "number {index}"
        );
    }
    ensure_eq!(gpu.wait(first, soon())?.status, Status::Fault, "the failure");
    let statistics = gpu.statistics()?;
    ensure_eq!(statistics.failed, 60 + 20 + 201, "{statistics:?}");
    ensure_eq!(value(&memory), 0, "the number");
    PASSED
}

fn commands_of_the_driver_are_refused() -> TestResult {
    let gpu = open()?;
    let memory = page_with(0)?;
    // FENCE and FENCE_WAIT, with which one could end or stop the work of others, and what nobody knows.
    for opcode in [7, 8, 11, 99, 255] {
        let command = Command::from_raw(uapi::Command {
            opcode,
            operand: 1 << 40,
            ..Default::default()
        });
        let refused = submit_on(&gpu, 0, &[add(&memory, 1), command]);
        ensure_eq!(errno(refused)?, libc::EINVAL, "opcode {opcode}");
    }
    ensure_eq!(submit(&gpu, &[Command::nop()])?.sequence, 1, "the first number");
    ensure_eq!(value(&memory), 0, "the number");
    PASSED
}

/// The module's parameter `contexts_per_user`, if it was not given.
const CONTEXTS_PER_USER: usize = 128;

fn address_spaces_of_a_user_are_bounded() -> TestResult {
    let child = fork(|| {
        // SAFETY: No preconditions.
        if unsafe { libc::setuid(65534) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let mut gpus = Vec::new();
        let error = loop {
            ensure!(gpus.len() <= CONTEXTS_PER_USER, "there is no limit");
            let gpu = open()?;
            match submit_on(&gpu, 0, &[Command::nop()]) {
                Ok(_) => gpus.push(gpu),
                Err(error) => break error.errno(),
            }
        };
        ensure_eq!(
            (error, gpus.len()),
            (Some(libc::EDQUOT), CONTEXTS_PER_USER),
            "address spaces"
        );
        // One less, one more.
        gpus.pop();
        execute_ok(&open()?, &[Command::nop()])?;
        Ok(())
    })?;
    join(child)?;
    execute_ok(&open()?, &[Command::nop()])?;
    PASSED
}

/// Numbers that look random, the same each time: SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number that may get somewhere: often small, a page, an address, or extreme.
    fn interesting(&mut self, addresses: &[u64]) -> u64 {
        match self.next() % 10 {
            0..=3 => self.next() % 5,
            4 => 1 << (self.next() % 64),
            5 => (1 << (self.next() % 64)) - 1,
            6 => 4096 * (self.next() % 600),
            7 => self.next(),
            _ => addresses[self.next() as usize % addresses.len()],
        }
    }
}

/// Requests of all kinds with anything in them. Nothing but an error may come of it, and the GPU goes on.
fn random_requests_do_no_harm() -> TestResult {
    let memory = Mapping::anonymous(64)?;
    let until = Instant::now() + Duration::from_secs(4);
    let mut children = Vec::new();
    for seed in 0..3 {
        children.push(fork(|| {
            let mut numbers = Numbers(seed);
            let mut gpu = open()?;
            set_nonblocking(&gpu, true)?;
            let (mut done, mut accepted) = (0_u64, 0_u64);
            while Instant::now() < until {
                let request = numbers.next() % 8;
                let size = match numbers.next() % 8 {
                    0 => numbers.interesting(&[56, 4096]) as u32,
                    1 => 4096,
                    _ => [48, 56, 32, 32, 32, 32, 24, 16][request as usize],
                };
                // The structure, with what it points to behind it; the last pages are not there.
                let place = 8 * (numbers.next() as usize % 128);
                let base = memory.as_ptr().addr() as u64;
                let addresses = [
                    base + 8192,
                    base + 4096 * (numbers.next() % 64),
                    base + 63 * 4096 + 4000,
                    memory.as_ptr().addr() as u64 + place as u64,
                    0x1000,
                    u64::MAX - 4095,
                    1 << 47,
                ];
                for offset in (0..128).step_by(8) {
                    let number = match numbers.next() % 4 {
                        0 => numbers.interesting(&addresses),
                        1 => (numbers.next() % 3) | ((numbers.next() % 3) << 32),
                        _ => 0,
                    };
                    memory.atomic(place + offset).store(number, Ordering::Relaxed);
                }
                // SAFETY: It is in the mapping.
                unsafe { memory.at(place).cast::<u32>().write_volatile(size) };
                if numbers.next() % 4 != 0 {
                    // SAFETY: It is in the mapping.
                    unsafe { memory.at(place + 4).cast::<u32>().write_volatile(0) };
                }
                // Commands and entries.
                for offset in (8192..8192 + 256).step_by(8) {
                    let number = match numbers.next() % 3 {
                        0 => {
                            let (opcode, operation, width, repeat) = (
                                numbers.next() % 12,
                                numbers.next() % 12,
                                numbers.next() % 9,
                                numbers.next() % 50,
                            );
                            opcode | (operation << 8) | (width << 16) | (repeat << 32)
                        }
                        1 => numbers.interesting(&addresses),
                        _ => 0,
                    };
                    memory.atomic(offset).store(number, Ordering::Relaxed);
                }
                let number = 3 << 30 | 64 << 16 | u64::from(uapi::IOCTL_BASE) << 8 | request;
                // SAFETY: Whatever is done is done to the mapping, or to what is not there. Waiting is not for long: see below.
                let result = unsafe { libc::ioctl(gpu.as_fd().as_raw_fd(), number as _, memory.at(place)) };
                done += 1;
                accepted += u64::from(result == 0);
                // A context in error would refuse everything; a wait for ever ends with an alarm.
                if done % 20 == 0 {
                    gpu = open()?;
                    set_nonblocking(&gpu, true)?;
                    alarm(Duration::from_millis(100), Duration::from_millis(100), 0);
                }
            }
            ensure!(done > 100 && accepted > 10, "{accepted} of {done} accepted");
            Ok(())
        })?);
    }
    for child in children {
        join(child)?;
    }
    let memory = page_with(1)?;
    execute_ok(&open()?, &[add(&memory, 1)])?;
    ensure_eq!(value(&memory), 2, "the number");
    PASSED
}

/// What a program would do that knows nothing of `unsafe`.
fn memory_is_lent_to_the_gpu() -> TestResult {
    let gpu = open()?;
    let rings = rings(&gpu)?;
    let source: Vec<u32> = (0..10_000).collect();
    let mut destination = vec![0_u32; 10_000];
    let counter = AtomicU64::new(5);
    let (mut found, mut swapped) = (0_u64, 0_u64);
    let mut batch = Batch::new();
    batch
        .copy(&source[..], &mut destination[..])
        .fetch(Operation::Add, &counter, 7, &mut found)
        .compare_exchange(&counter, 12, 100, &mut swapped);
    ensure!(gpu.run(0, &batch)?.is_ok(), "the batch");
    ensure_eq!((found, swapped), (5, 12), "what was found");
    ensure_eq!(counter.load(Ordering::Relaxed), 100, "the counter");
    ensure!(destination == source, "the copy");

    // Halves on different rings, meanwhile.
    let mut numbers = vec![0_u64; 8192];
    let (left, right) = numbers.split_at_mut(4096);
    let (left, right) = (Memory::from(left), Memory::from(right));
    let mut batches = [Batch::new(), Batch::new()];
    batches[0].fill(left, 1).atomic(Operation::Add, left, 1);
    batches[1]
        .fill(right, 10)
        .copy(right.part(0..8), right.part(8..16));
    gpu.scope(|scope| {
        for round in 0..8 {
            let index = round % 2;
            scope.submit(index as u32 % rings, &batches[index])?;
        }
        pinion_client::Result::Ok(())
    })?;
    ensure!(numbers[..4096].iter().all(|number| *number == 2), "the left half");
    ensure!(
        numbers[4096..].iter().all(|number| *number == 10),
        "the right half"
    );

    // A scope does not end before its work does, even if it panics.
    let gate = Gate::new()?;
    let mut late = [0_u64; 2];
    let (one, two) = late.split_at_mut(1);
    let mut batch = Batch::new();
    batch
        .semaphore_wait(gate.0.atomic(0), Compare::Equal, 1)
        .fill(one, 1)
        .semaphore_signal(&mut two[0], 3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_WHILE);
            gate.open();
        });
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            gpu.scope(|scope| {
                scope.submit(0, &batch).expect("submit");
                std::panic::resume_unwind(Box::new("on purpose"));
            });
        }));
        ensure!(panicked.is_err(), "no panic");
        Ok::<_, Failure>(())
    })?;
    ensure_eq!(late, [1, 3], "what was done late");
    PASSED
}

fn a_linked_list_is_followed() -> TestResult {
    #[repr(C)]
    struct Node {
        other: u64,
        value: u64,
        next: *const Node,
    }
    let gpu = open()?;
    let mut nodes: Vec<Box<Node>> = Vec::new();
    for value in 0..3000_u64 {
        let next = nodes.last().map_or(std::ptr::null(), |node| &raw const **node);
        nodes.push(Box::new(Node {
            other: 77,
            value,
            next,
        }));
    }
    ensure!(nodes.iter().all(|node| node.other == 77), "they are there");
    let first = &raw const **nodes.last().ok_or("no node")?;
    for (most, expected) in [(10_000, 3000), (10, 10)] {
        let mut result = ChaseResult::default();
        let command = Command::chase(first, most, 16, 8, &raw mut result);
        execute_ok(&gpu, &[command])?;
        let result = std::hint::black_box(result);
        let sum: u64 = (3000 - expected..3000).sum();
        ensure_eq!((result.visited, result.sum), (expected, sum), "{most} at most");
        ensure_eq!(result.pointer == 0, expected == 3000, "the end");
    }
    PASSED
}

fn time_goes_on() -> TestResult {
    let gpu = open()?;
    let (mut before, mut after) = (0_u64, 0_u64);
    let pause = Duration::from_millis(20);
    for place in [&mut before, &mut after] {
        let mut batch = Batch::new();
        batch.timestamp(place);
        ensure!(gpu.run(0, &batch)?.is_ok(), "the batch");
        std::thread::sleep(pause);
    }
    let passed = Duration::from_nanos(after - before);
    ensure!(passed >= pause && passed < soon(), "{passed:?}");
    PASSED
}

fn locations_are_accepted_or_refused() -> TestResult {
    use pinion_client::{Atomics, Location};
    let gpu = open()?;
    let info = gpu.info()?;
    let memory = Mapping::anonymous(4)?;
    let start = memory.as_ptr();
    for place in Location::ALL {
        let result = gpu.advise_location(start, memory.len(), place);
        if info.locations.contains(&place) {
            result?;
        } else {
            ensure_eq!(errno(result)?, libc::EOPNOTSUPP, "{place:?}");
        }
    }
    for how in Atomics::ALL {
        let result = gpu.advise_atomics(start, memory.len(), how);
        if info.atomics.contains(&how) {
            result?;
        } else {
            ensure_eq!(errno(result)?, libc::EOPNOTSUPP, "{how:?}");
        }
    }
    ensure_eq!(
        errno(gpu.prefetch(start, 4096, Location::Anywhere))?,
        libc::EINVAL,
        "nowhere in particular"
    );
    let address = start.addr() as u64;
    let prefetch = uapi::Prefetch {
        address,
        length: 4096,
        location: uapi::LOCATION_SYSTEM,
        ..Argument::new()
    };
    let discard = uapi::Discard {
        address,
        length: 4096,
        ..Argument::new()
    };
    for bad in [
        uapi::Prefetch { flags: 1, ..prefetch },
        uapi::Prefetch {
            reserved: 1,
            ..prefetch
        },
        uapi::Prefetch {
            location: 9,
            ..prefetch
        },
        uapi::Prefetch {
            address: address + 1,
            ..prefetch
        },
        uapi::Prefetch {
            length: 0,
            ..prefetch
        },
        uapi::Prefetch {
            length: 1 << 50,
            ..prefetch
        },
    ] {
        ensure_eq!(raw_errno(&gpu, bad)?, libc::EINVAL, "{bad:x?}");
    }
    for bad in [
        uapi::Discard { flags: 1, ..discard },
        uapi::Discard {
            length: 100,
            ..discard
        },
        uapi::Discard {
            address: 1 << 60,
            ..discard
        },
    ] {
        ensure_eq!(raw_errno(&gpu, bad)?, libc::EINVAL, "{bad:x?}");
    }
    // What is discarded reads as it was, or as zeroes.
    let mut numbers = vec![7_u64; 4096];
    gpu.discard(&mut numbers)?;
    ensure!(numbers.iter().all(|number| [0, 7].contains(number)), "discarded");
    PASSED
}
