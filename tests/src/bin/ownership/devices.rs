// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Another GPU, and the loss of the one there is.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use pinion_client::{Command, Gpu, PAGE_SIZE, Status};
use pinion_tests::matrix::State;
use pinion_tests::work::{execute_ok, submit_on};
use pinion_tests::{Failure, ensure, ensure_eq, module, patiently};

use crate::cell::{Body, Cell, ELSEWHERE, Outcome, Subject, advise, anonymous, compare, second_device};

pub(crate) const EVENTS: &[(&str, Body)] = &[
    ("second-gpu-read", second_gpu_read),
    ("second-gpu-atomic", second_gpu_atomic),
    ("unbind", unbind),
    ("module-unload", module_unload),
    ("device-reset", device_reset),
];

const DRIVER: &str = "/sys/bus/virtio/drivers/pinion";

/// The other GPU, or why there is none.
fn second(subject: &Subject, state: State) -> Result<Result<Gpu, String>, Failure> {
    if !Path::new(&second_device()).exists() {
        return Ok(Err("the guest has one GPU only".to_owned()));
    }
    let gpu = Gpu::open(second_device())?;
    advise(&gpu, &subject.memory, state)?;
    Ok(Ok(gpu))
}

fn second_gpu_read(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let subject = cell.enter()?;
    // Not told where the memory had better be: it is to look at it where it is.
    let gpu = match second(&subject, State::Cpu)? {
        Ok(gpu) => gpu,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    let copy = anonymous(ELSEWHERE, 1)?;
    let start = subject.target();
    let read = Command::copy(subject.memory.at(start), copy.as_ptr(), PAGE_SIZE);
    execute_ok(&gpu, &[read])?;
    let expected = &subject.expected[start / 8..(start + PAGE_SIZE) / 8];
    compare(&copy.words(), expected, "the second GPU")?;
    subject.finish()
}

fn second_gpu_atomic(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let mut subject = cell.enter()?;
    let gpu = match second(&subject, cell.state)? {
        Ok(gpu) => gpu,
        Err(reason) => return Ok(Outcome::Blank(reason)),
    };
    execute_ok(&gpu, &[Command::atomic_add(subject.pointer(), 80)])?;
    let number = subject.number();
    *number = number.wrapping_add(80);
    let page = gpu.query(subject.pointer(), 1)?[0];
    ensure!(page.rights.atomic, "the second GPU has {page:?}");
    subject.finish()
}

/// Waits for a device file.
fn wait_for(device: &str) -> Result<(), Failure> {
    let started = Instant::now();
    while !Path::new(device).exists() {
        ensure!(
            started.elapsed() < patiently(Duration::from_secs(10)),
            "{device} has not come back"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The virtio device that was found first.
fn first_virtio_device() -> Result<String, Failure> {
    let mut names: Vec<_> = fs::read_dir(DRIVER)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("virtio"))
        .collect();
    names.sort_unstable();
    names
        .into_iter()
        .next()
        .ok_or_else(|| "the driver has no device".into())
}

/// An answer to a request that is refused because the device is gone.
fn must_be_gone(subject: &Subject) -> Result<(), Failure> {
    match submit_on(subject.gpu(), 0, &[Command::nop()]) {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        other => Err(format!("work for a device that is gone: {other:?}").into()),
    }
}

fn unbind(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let device = first_virtio_device()?;
    let mut subject = cell.enter()?;
    fs::write(format!("{DRIVER}/unbind"), &device)?;
    must_be_gone(&subject)?;
    let result = subject.observe_without_driver()?;
    subject.check_cpu()?;
    subject.close();
    fs::write(format!("{DRIVER}/bind"), &device)?;
    wait_for(cell.device)?;
    subject.open(cell.device)?;
    subject.settle()?;
    Ok(Outcome::Result(result))
}

fn module_unload(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let Ok(file) = File::open(module::FILE) else {
        return Ok(Outcome::Blank(format!(
            "there is no {} to load again",
            module::FILE
        )));
    };
    let mut subject = cell.enter()?;
    let refused = module::unload().err().and_then(|error| error.raw_os_error());
    ensure!(
        [Some(libc::EBUSY), Some(libc::EAGAIN)].contains(&refused),
        "while a file is open: {refused:?}"
    );
    ensure_eq!(
        subject.observe()?,
        cell.state.name(),
        "the state after it was refused"
    );
    subject.check_gpu()?;
    subject.close();
    let devices = fs::read_dir(DRIVER)?.filter_map(Result::ok);
    let count = devices
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
        .count();
    module::unload().map_err(|error| format!("unloading it: {error}"))?;
    ensure!(!Path::new(cell.device).exists(), "the device file is still there");
    let result = subject.observe_without_driver()?;
    subject.check_cpu()?;
    module::load(&file).map_err(|error| format!("loading it: {error}"))?;
    for number in 0..count {
        wait_for(&cell.device.replace('0', &number.to_string()))?;
    }
    subject.open(cell.device)?;
    subject.settle()?;
    Ok(Outcome::Result(result))
}

/// Looks at the memory in a child, which SIGBUS may kill. Says whether it did.
fn is_lost(subject: &Subject) -> Result<bool, Failure> {
    let child = || {
        let found = subject.memory.words();
        i32::from(compare(&found, &subject.expected, "the child").is_err())
    };
    // SAFETY: A cell has a process of its own, with one thread.
    let child = unsafe { pinion_tests::process::Child::fork(child) }?;
    match child.wait(patiently(Duration::from_secs(15)))? {
        0 => Ok(false),
        status if status == -libc::SIGBUS => Ok(true),
        status => Err(format!("the memory has something else in it (status {status})").into()),
    }
}

/// The harness has the device reset itself when this says "ready".
fn device_reset(cell: &Cell<'_>) -> Result<Outcome, Failure> {
    let device = first_virtio_device()?;
    let mut subject = cell.enter()?;
    println!("ready");
    std::io::stdout().flush()?;
    // Work on which it can happen, until it has. There is no telling when.
    let started = Instant::now();
    let mut ended = false;
    while let Ok(work) = submit_on(subject.gpu(), 0, &[Command::nop()]) {
        let completion = subject.gpu().wait(work, patiently(Duration::from_secs(20)))?;
        match completion.status {
            Status::Ok => {}
            // What the device was at; and what it does not know of.
            Status::Reset | Status::DeviceLost => ended = true,
            _ => return Err(format!("{completion:x?}").into()),
        }
        ensure!(
            started.elapsed() < patiently(Duration::from_secs(20)),
            "nobody has reset the device"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(ended, "no work has ended because of the reset");
    must_be_gone(&subject)?;
    let away = subject.observe_without_driver()?;
    let lost = is_lost(&subject)?;
    ensure_eq!(
        lost,
        cell.state == State::Vram,
        "whether what was {} is lost ({away})",
        cell.state.name()
    );
    if !lost {
        subject.check_cpu()?;
    }
    let result = if lost {
        "lost".to_owned()
    } else {
        subject.observe_without_driver()?
    };
    subject.close();
    fs::write(format!("{DRIVER}/unbind"), &device)?;
    fs::write(format!("{DRIVER}/bind"), &device)?;
    wait_for(cell.device)?;
    if lost {
        // Zeros have taken the place of what was lost when the driver was unbound.
        subject.expected.fill(0);
    }
    subject.open(cell.device)?;
    subject.settle()?;
    Ok(Outcome::Result(result))
}
