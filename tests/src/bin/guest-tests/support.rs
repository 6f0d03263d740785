// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the tests have in common.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pinion_client::{Command, Gpu, Page, PageState, Status, uapi};
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

pub(crate) use pinion_tests::work::{add, execute, execute_ok, soon, submit, submit_on};
pub(crate) use pinion_tests::{ensure, ensure_eq};
pub(crate) use tests;

pub(crate) fn open() -> Result<Gpu, Failure> {
    Ok(Gpu::open(DEVICE)?)
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
