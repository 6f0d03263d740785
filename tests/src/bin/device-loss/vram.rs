// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is in VRAM is lost with the device, and nothing else is. Whoever touches it gets SIGBUS.

use std::fs;
use std::io::{Read as _, Write as _};
use std::sync::atomic::Ordering;
use std::time::Instant;

use pinion_client::{Command, Gpu, Location, PageState, Status, Submit};
use pinion_tests::process::{Child, pipe};
use pinion_tests::{DEVICE, Failure, Mapping};

use crate::{bound, ready};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// The word with that index.
fn pattern(word: usize) -> u64 {
    (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn filled(count: usize, advice: i32) -> Result<Mapping, Failure> {
    let memory = Mapping::anonymous(count * HUGE / 4096)?;
    memory.advise(advice)?;
    for word in 0..memory.len() / 8 {
        memory.atomic(word * 8).store(pattern(word), Ordering::Relaxed);
    }
    Ok(memory)
}

/// What the kernel finds in each page, on behalf of this process: none for one that is lost, which would be SIGBUS if it were
/// touched from here.
fn contents(memory: &Mapping) -> Result<Vec<Option<Vec<u8>>>, Failure> {
    let (mut from, mut to) = pipe()?;
    let mut found = Vec::new();
    for page in 0..memory.pages() {
        // SAFETY: It is only passed on to the kernel, which can deal with memory that is lost.
        let bytes = unsafe { std::slice::from_raw_parts(memory.page(page), 4096) };
        match to.write(bytes) {
            Ok(4096) => {
                let mut read = vec![0; 4096];
                from.read_exact(&mut read)?;
                found.push(Some(read));
            }
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => found.push(None),
            other => return Err(format!("reading page {page}: {other:?}").into()),
        }
    }
    Ok(found)
}

/// Whether a page is what was put there, but for its first number.
fn rest_is_right(page: usize, bytes: &[u8]) -> bool {
    (1..512).all(|word| bytes[word * 8..][..8] == pattern(page * 512 + word).to_ne_bytes())
}

fn first_of(bytes: &[u8]) -> u64 {
    bytes[..8]
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Has the virtio device taken away from its driver, as an administrator would.
fn unbind() -> Result<(), Failure> {
    let driver = "/sys/bus/virtio/drivers/pinion";
    for entry in fs::read_dir(driver)? {
        let name = entry?.file_name();
        if name.to_string_lossy().starts_with("virtio") {
            fs::write(format!("{driver}/unbind"), name.as_encoded_bytes())?;
        }
    }
    Ok(())
}

/// A child that touches a page must be killed by SIGBUS.
fn touching_is_deadly(memory: &Mapping, page: usize) -> Result<(), Failure> {
    let touch = || {
        memory.atomic(page * 4096).fetch_add(1, Ordering::Relaxed);
        0
    };
    // SAFETY: This program has one thread.
    let status = unsafe { Child::fork(touch) }?.wait(bound())?;
    if status == -libc::SIGBUS {
        Ok(())
    } else {
        Err(format!("a child that has touched page {page} has ended with {status}").into())
    }
}

/// Memory is in VRAM when the device dies. If `unbound`, the driver is then taken away, which must not wait for anything.
pub(crate) fn resting(unbound: bool) -> Result<(), Failure> {
    let gpu = Gpu::open(DEVICE)?;
    let kept = filled(1, libc::MADV_NOHUGEPAGE)?;
    let mut lost = Vec::new();
    for place in gpu.info()?.locations {
        let state = match place {
            Location::Vram => PageState::Vram,
            Location::Aperture => PageState::Coherent,
            _ => continue,
        };
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
            let memory = filled(2, advice)?;
            gpu.prefetch(memory.as_ptr(), memory.len(), place)?;
            let pages = gpu.query(memory.as_ptr(), memory.len())?;
            if pages.iter().any(|page| page.state != state) {
                return Err(format!("not all pages are in {place:?}").into());
            }
            lost.push(memory);
        }
    }
    if lost.is_empty() {
        return Err("there is no VRAM".into());
    }
    let work = Command::atomic_add(lost[0].as_ptr().cast::<u64>(), 1).repeat(u32::MAX);
    // SAFETY: The mapping is accessed through atomics, and is there until the end.
    let work = unsafe { Submit::new(0).send(&gpu, &[work]) }?.work;
    ready()?;
    let completion = gpu.wait(work, bound() * 2)?;
    if completion.status != Status::DeviceLost {
        return Err(format!("the work has ended with {completion:?}").into());
    }
    let started = Instant::now();
    for (number, memory) in lost.iter().enumerate() {
        // The driver takes the aperture's pages away when the device has been reset, which is a moment later.
        loop {
            let left = contents(memory)?.iter().filter(|page| page.is_some()).count();
            if left == 0 {
                break;
            }
            if started.elapsed() > bound() {
                return Err(format!("{left} pages of mapping {number} can be read, after all").into());
            }
        }
        for page in [0, memory.pages() / 2, memory.pages() - 1] {
            touching_is_deadly(memory, page)?;
        }
    }
    println!("all is lost after {:?}", started.elapsed());
    check_kept(&kept)?;
    // Lost memory can be unmapped.
    let memory = &lost[0];
    // SAFETY: Nobody accesses it any more.
    let unmapped = unsafe { libc::madvise(memory.as_ptr().cast(), memory.len() / 2, libc::MADV_DONTNEED) };
    if unmapped != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    memory.atomic(8).store(5, Ordering::Relaxed);
    if memory.atomic(8).load(Ordering::Relaxed) != 5 || memory.atomic(0).load(Ordering::Relaxed) != 0 {
        return Err("new memory in the place of lost memory does not begin as zeros".into());
    }
    if unbound {
        let started = Instant::now();
        unbind()?;
        println!("unbound after {:?}", started.elapsed());
        if started.elapsed() > bound() {
            return Err(format!("unbinding has taken {:?}", started.elapsed()).into());
        }
        for memory in &lost[1..] {
            let zeros = |page: &Option<Vec<u8>>| {
                page.as_ref()
                    .is_some_and(|page| page.iter().all(|byte| *byte == 0))
            };
            if !contents(memory)?.iter().all(zeros) {
                return Err("zeros should have taken the place of what is lost".into());
            }
        }
        check_kept(&kept)?;
    }
    let started = Instant::now();
    drop(gpu);
    if started.elapsed() > bound() {
        return Err(format!("closing has taken {:?}", started.elapsed()).into());
    }
    check_kept(&kept)
}

fn check_kept(kept: &Mapping) -> Result<(), Failure> {
    for word in 0..kept.len() / 8 {
        let found = kept.atomic(word * 8).load(Ordering::Relaxed);
        if found != pattern(word) {
            return Err(format!("word {word} of memory that was not in VRAM is {found:#x}").into());
        }
    }
    Ok(())
}

/// Memory is on its way to VRAM, or home, when the device dies.
pub(crate) fn moving() -> Result<(), Failure> {
    let gpu = Gpu::open(DEVICE)?;
    let memories = [filled(2, libc::MADV_HUGEPAGE)?, filled(2, libc::MADV_NOHUGEPAGE)?];
    let places: Vec<_> = gpu.info()?.locations;
    let mut rounds = 0;
    let mut started = Instant::now();
    let error = 'moving: loop {
        for memory in &memories {
            for place in places.iter().filter(|place| **place != Location::Anywhere) {
                if let Err(error) = gpu.prefetch(memory.as_ptr(), memory.len(), *place) {
                    break 'moving error;
                }
            }
            // By CPU faults as well. (Not by touching it, for it may be gone.)
            if let Err(error) = gpu.prefetch(memory.as_ptr(), memory.len(), Location::Vram) {
                break 'moving error;
            }
            contents(memory)?;
        }
        rounds += 1;
        if rounds == 2 {
            ready()?;
            started = Instant::now();
        }
        if started.elapsed() > bound() * 2 {
            return Err("the device has not been lost".into());
        }
    };
    if error.errno() != Some(libc::ENODEV) {
        return Err(format!("moving has ended with {error}").into());
    }
    println!(
        "the device was lost in round {rounds}, after {:?}",
        started.elapsed()
    );
    // What was locked when the device was lost, because it was being moved, stays so until the device has been reset. In the
    // aperture the CPU sees something else then, for as long as it takes to replace these pages (docs/driver.md).
    let started = Instant::now();
    let (right, lost) = 'looking: loop {
        let (mut right, mut lost) = (0, 0);
        for memory in &memories {
            for (page, bytes) in contents(memory)?.iter().enumerate() {
                match bytes {
                    Some(bytes) if rest_is_right(page, bytes) && first_of(bytes) == pattern(page * 512) => {
                        right += 1;
                    }
                    Some(bytes) if started.elapsed() > bound() => {
                        return Err(format!("page {page} begins with {:x?}", &bytes[..16]).into());
                    }
                    Some(_) => continue 'looking,
                    None => lost += 1,
                }
            }
        }
        break (right, lost);
    };
    println!("{right} pages are right, {lost} are lost");
    Ok(())
}

/// Pages of VRAM make room for others when the device dies: the GPU works on twice as much memory as there is VRAM.
pub(crate) fn evicting() -> Result<(), Failure> {
    let gpu = Gpu::open(DEVICE)?;
    let vram = gpu.info()?.vram_size as usize;
    if !(HUGE..=32 << 20).contains(&vram) {
        return Err("this takes a small VRAM (--vram 8M)".into());
    }
    let memory = filled(2 * vram / HUGE, libc::MADV_NOHUGEPAGE)?;
    gpu.advise_location(memory.as_ptr(), memory.len(), Location::Vram)?;
    let pieces = memory.len() / HUGE;
    let mut done = vec![0_u64; pieces];
    let started = Instant::now();
    let last = 'working: loop {
        for (piece, done) in done.iter_mut().enumerate() {
            let first = memory.at(piece * HUGE).cast::<u64>();
            let work = Command::atomic_add(first, 1).repeat(512).stride(4096);
            // SAFETY: The mapping is accessed through atomics, and is there until the end.
            let work = match unsafe { gpu.submit(0, &[work]) } {
                Ok(work) => work,
                Err(error) if error.errno() == Some(libc::ENODEV) => break 'working piece,
                Err(error) => return Err(error.into()),
            };
            match gpu.wait(work, bound() * 2)?.status {
                Status::Ok => *done += 1,
                Status::DeviceLost => break 'working piece,
                other => return Err(format!("the work has ended with {other:?}").into()),
            }
        }
        if done[0] == 2 {
            if gpu.statistics()?.evictions == 0 {
                return Err("nothing had to make room".into());
            }
            ready()?;
        }
        if started.elapsed() > bound() * 4 {
            return Err("the device has not been lost".into());
        }
    };
    println!("the device was lost in round {}, at piece {last}", done[0]);
    let (mut right, mut lost) = (0, 0);
    for (page, bytes) in contents(&memory)?.iter().enumerate() {
        let Some(bytes) = bytes else {
            lost += 1;
            continue;
        };
        let piece = page / 512;
        let found = first_of(bytes).wrapping_sub(pattern(page * 512));
        // What was not finished may have been done.
        let most = done[piece] + u64::from(piece == last);
        if !(done[piece]..=most).contains(&found) || !rest_is_right(page, bytes) {
            return Err(format!("page {page} has {found} of {} to {most}", done[piece]).into());
        }
        right += 1;
    }
    println!("{right} pages are right, {lost} are lost");
    // Half of it was not in VRAM.
    if right < memory.pages() / 2 - 512 {
        return Err("more is lost than was in VRAM".into());
    }
    Ok(())
}
