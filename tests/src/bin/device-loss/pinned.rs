// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that are pinned are the system's: they come home.

use std::sync::atomic::Ordering;
use std::time::Instant;

use pinion_client::{Command, Gpu, PageState, Status, Submit};
use pinion_tests::{DEVICE, Failure, Mapping};

use crate::{bound, ready};

pub(crate) fn run() -> Result<(), Failure> {
    let gpu = Gpu::open(DEVICE)?;
    let (pinned, busy) = (Mapping::anonymous(16)?, Mapping::anonymous(1)?);
    for page in 0..pinned.pages() {
        pinned.atomic(page * 4096).store(page as u64, Ordering::Relaxed);
    }
    let command = Command::atomic_add(pinned.as_ptr().cast::<u64>(), 100)
        .repeat(16)
        .stride(4096);
    // SAFETY: The mapping is accessed through atomics, and is there until the end.
    let work = unsafe { gpu.submit(0, &[command]) }?;
    if !gpu.wait(work, bound())?.is_ok() {
        return Err("the GPU has not done what it should do before it is killed".into());
    }
    let command = Command::atomic_add(busy.as_ptr().cast::<u64>(), 1).repeat(u32::MAX);
    // SAFETY: As above.
    let submitted = unsafe { Submit::new(0).fence().send(&gpu, &[command]) }?;
    let (work, fence) = (submitted.work, submitted.fence.ok_or("no fence")?);
    // What the driver holds back, as it waits for what the device is at.
    let held = Submit::new(gpu.info()?.rings - 1).after(work);
    // SAFETY: The command does nothing.
    let held = unsafe { held.send(&gpu, &[Command::nop()]) }?.work;
    if gpu
        .query(pinned.as_ptr(), pinned.len())?
        .iter()
        .any(|page| page.state != PageState::Pinned)
    {
        return Err("the pages are not pinned".into());
    }

    ready()?;
    // There is no telling when the device is killed, only that it is soon: the wait is for that, too.
    // It waits without asking the driver for anything, which has to find out by itself.
    let started = Instant::now();
    if !fence.wait(bound() * 2)? {
        return Err("the fence has not passed".into());
    }
    for work in [work, held] {
        let completion = gpu.wait(work, bound() * 2)?;
        println!("the wait ended after {:?}: {completion:?}", started.elapsed());
        if completion.status != Status::DeviceLost || started.elapsed() > bound() {
            return Err(format!("{completion:?} after {:?}", started.elapsed()).into());
        }
    }
    // All three are told of, and then that there will be no more.
    let mut ended = 0;
    let error = loop {
        match gpu.ended(bound()) {
            Ok(count) => ended += count,
            Err(error) => break error,
        }
        if started.elapsed() > bound() {
            return Err("reading does not end".into());
        }
    };
    if ended != 3 || error.errno() != Some(libc::ENODEV) {
        return Err(format!("{ended} have ended, then {error}").into());
    }

    let started = Instant::now();
    for page in 0..pinned.pages() {
        let found = pinned.atomic(page * 4096).load(Ordering::Relaxed);
        if found != page as u64 + 100 {
            return Err(format!("page {page} held {found} when it came home").into());
        }
    }
    println!("the pinned pages came home after {:?}", started.elapsed());
    if started.elapsed() > bound() {
        return Err(format!("the pinned pages came home only after {:?}", started.elapsed()).into());
    }

    // SAFETY: The command does nothing.
    match unsafe { gpu.submit(0, &[Command::nop()]) } {
        Err(error) if error.errno() == Some(libc::ENODEV) => {}
        other => return Err(format!("work for a device that is lost: {other:?}").into()),
    }
    let started = Instant::now();
    drop(gpu);
    println!("closed after {:?}", started.elapsed());
    match Gpu::open(DEVICE) {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        other => Err(format!("a device that is lost, opened: {other:?}").into()),
    }
}
