// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the tests have in common.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::{Command, Completion, Gpu, Page, PageState, Status, Submission, uapi};
use pinion_tests::process::Child;
use pinion_tests::{DEVICE, Failure, Mapping, patiently};

/// How a test ended that has not failed.
pub(crate) enum Outcome {
    Passed,
    Skipped(String),
}

pub(crate) type TestResult = Result<Outcome, Failure>;

/// Its name, and what it does.
pub(crate) type Test = (&'static str, fn() -> TestResult);

/// The end of every test that gets there.
pub(crate) const PASSED: TestResult = Ok(Outcome::Passed);

/// Declares the tests of a module: functions of these names.
macro_rules! tests {
    ($($name:ident)*) => {
        pub(crate) const TESTS: &[crate::support::Test] = &[$((stringify!($name), $name)),*];
    };
}

/// Fails the test unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($format:tt)+) => {
        if !$condition {
            return Err(format!("{} (line {})", format_args!($($format)+), line!()).into());
        }
    };
}

/// Fails the test unless the two are equal.
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($format:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) if found == expected => {}
            (found, expected) => return Err(format!(
                "{}: {found:x?} where {expected:x?} is expected (line {})",
                format_args!($($format)+),
                line!()
            ).into()),
        }
    };
}

pub(crate) use {ensure, ensure_eq, tests};

/// Time for work that takes none to speak of.
pub(crate) fn soon() -> Duration {
    patiently(Duration::from_secs(30))
}

pub(crate) fn open() -> Result<Gpu, Failure> {
    Ok(Gpu::open(DEVICE)?)
}

/// Queues commands.
pub(crate) fn submit_on(gpu: &Gpu, ring: u32, commands: &[Command]) -> pinion_client::Result<Submission> {
    // SAFETY: Tests have the GPU work on memory that they access through raw pointers and atomics, and keep it until
    // the work is done, or unmap it on purpose while nothing else of this process can be mapped there.
    unsafe { gpu.submit(ring, commands) }
}

/// Queues commands on ring 0.
pub(crate) fn submit(gpu: &Gpu, commands: &[Command]) -> Result<Submission, Failure> {
    Ok(submit_on(gpu, 0, commands)?)
}

/// Has commands executed, however they end.
pub(crate) fn execute(gpu: &Gpu, commands: &[Command]) -> Result<Completion, Failure> {
    Ok(gpu.wait(submit(gpu, commands)?, soon())?)
}

/// Has commands executed, which must succeed.
pub(crate) fn execute_ok(gpu: &Gpu, commands: &[Command]) -> Result<(), Failure> {
    let completion = execute(gpu, commands)?;
    ensure_eq!(completion.status, Status::Ok, "{completion:x?}");
    Ok(())
}

/// Has a command executed by a GPU of its own; it must end with that status, at that address.
pub(crate) fn expect_failure(command: Command, status: Status, address: u64) -> Result<(), Failure> {
    let completion = execute(&open()?, &[command])?;
    ensure_eq!(completion.status, status, "{completion:x?}");
    ensure_eq!(completion.executed, 0, "executed commands");
    ensure_eq!(completion.fault_address, address, "where it failed");
    Ok(())
}

/// A populated page with a number at its start.
pub(crate) fn page_with(value: u64) -> Result<Mapping, Failure> {
    let memory = Mapping::anonymous(1)?;
    memory.atomic(0).store(value, Ordering::Relaxed);
    Ok(memory)
}

/// The number at the start.
pub(crate) fn value(memory: &Mapping) -> u64 {
    memory.atomic(0).load(Ordering::Relaxed)
}

/// Adds to the number at the start of a page. Exclusive access is what it takes.
pub(crate) fn add(memory: &Mapping, operand: u64) -> Command {
    Command::atomic_add(memory.as_ptr().cast::<u64>(), operand)
}

/// Work on a page that takes much longer than a test may: minutes.
pub(crate) fn long_work(memory: &Mapping) -> [Command; 1] {
    [add(memory, 1).repeat(u32::MAX)]
}

/// Has the GPU add to the number at the start of a page, after which the page is pinned.
pub(crate) fn pin(gpu: &Gpu, memory: &Mapping, operand: u64) -> Result<Page, Failure> {
    execute_ok(gpu, &[add(memory, operand)])?;
    let page = gpu.query(memory.as_ptr(), 1)?[0];
    ensure_eq!(page.state, PageState::Pinned, "after an atomic operation");
    Ok(page)
}

/// The error number of a request that must fail.
pub(crate) fn errno<T: std::fmt::Debug>(result: pinion_client::Result<T>) -> Result<i32, Failure> {
    match result {
        Ok(value) => Err(format!("{value:?} where an error is expected").into()),
        Err(error) => error.errno().ok_or_else(|| error.into()),
    }
}

/// The error number of a request made as it is. It must fail.
pub(crate) fn raw_errno<T: uapi::Argument>(gpu: &Gpu, mut argument: T) -> Result<i32, Failure> {
    use std::os::fd::AsFd as _;
    // SAFETY: The tests pass addresses where nothing is, or memory that lives long enough.
    match unsafe { uapi::ioctl(gpu.as_fd(), &mut argument) } {
        Ok(()) => Err(format!("{} has succeeded", T::NAME).into()),
        Err(error) => error.raw_os_error().ok_or_else(|| error.into()),
    }
}

/// Runs part of a test in a child process.
pub(crate) fn fork(body: impl FnOnce() -> Result<(), Failure>) -> Result<Child, Failure> {
    let body = || match body() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("in the child: {}", pinion_tests::chain(&*error));
            1
        }
    };
    // SAFETY: Each test runs in a process of its own, and starts no threads before it forks.
    Ok(unsafe { Child::fork(body) }?)
}

/// Waits for a child, which must succeed.
pub(crate) fn join(child: Child) -> Result<(), Failure> {
    let status = child.wait(patiently(Duration::from_secs(30)))?;
    ensure_eq!(status, 0, "status of the child");
    Ok(())
}

/// A number from `/proc/meminfo`, in KiB.
pub(crate) fn meminfo(name: &str) -> Result<i64, Failure> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line
        .and_then(|rest| rest.split_whitespace().next())
        .ok_or_else(|| format!("no {name}"))?;
    Ok(number.parse()?)
}
