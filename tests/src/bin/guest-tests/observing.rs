// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can be seen of the driver from outside: tracepoints, counters.

use std::fs;
use std::path::{Path, PathBuf};

use pinion_client::{Command, Location};
use pinion_tests::{Failure, Mapping};

use crate::support::{
    PASSED, TestResult, ensure, ensure_eq, execute_ok, open, page_with, pin, soon, submit_on, tests, value,
};

tests! {
    tracepoints_tell_what_happens
    debugfs_counts
    fdinfo_can_be_read_by_others
}

/// A file system that is mounted while this exists.
pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    pub(crate) fn new(kind: &str) -> Result<Self, Failure> {
        let place = PathBuf::from(format!("/tmp/{kind}-{}", std::process::id()));
        fs::create_dir(&place)?;
        let (place_c, kind_c) = (
            std::ffi::CString::new(place.to_str().ok_or("a path")?)?,
            std::ffi::CString::new(kind)?,
        );
        // SAFETY: These are strings, and no data is wanted.
        let result = unsafe {
            libc::mount(
                kind_c.as_ptr(),
                place_c.as_ptr(),
                kind_c.as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        if result != 0 {
            return Err(format!("mounting {kind}: {}", std::io::Error::last_os_error()).into());
        }
        Ok(Self(place))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(place) = self
            .0
            .to_str()
            .and_then(|place| std::ffi::CString::new(place).ok())
        {
            // SAFETY: A string.
            unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) };
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// The value of a field in a line of a trace.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn tracepoints_tell_what_happens() -> TestResult {
    let mount = Mount::new("tracefs")?;
    let write = |file: &str, text: &str| {
        fs::write(mount.0.join(file), text).map_err(|error| Failure::from(format!("{file}: {error}")))
    };
    write("trace", "")?;
    write("tracing_on", "1")?;
    write("events/pinion/enable", "1")?;
    let gpu = open()?;
    let memory = page_with(5)?;
    let address = format!("{:#x}", memory.as_ptr().addr());
    pin(&gpu, &memory, 1)?;
    ensure_eq!(value(&memory), 6, "the number, at home again");
    let has_vram = gpu.info()?.locations.contains(&Location::Vram);
    if has_vram {
        gpu.prefetch(memory.as_ptr(), 4096, Location::Vram)?;
        ensure_eq!(value(&memory), 6, "the number, back from VRAM");
    }
    let failing = Command::fill::<u64>(std::ptr::without_provenance_mut(0x1000), 1, 1);
    let failed = submit_on(&gpu, 0, &[failing])?;
    ensure!(!gpu.wait(failed, soon())?.is_ok(), "it has succeeded");
    write("events/pinion/enable", "0")?;
    let trace = fs::read_to_string(mount.0.join("trace"))?;
    let lines = |event: &str| -> Vec<&str> {
        let event = format!(" pinion_{event}: ");
        trace.lines().filter(|line| line.contains(&event)).collect()
    };
    let mut expected = vec!["fault", "pin", "invalidate", "unpin"];
    if has_vram {
        expected.extend(["migrate", "migrate_home"]);
    }
    for event in expected {
        ensure!(
            lines(event)
                .iter()
                .any(|line| field(line, "va") == Some(&address)),
            "{event} at {address} in:\n{trace}"
        );
    }
    let (submitted, completed) = (lines("submit"), lines("complete"));
    for (sequence, status) in [("1", "0x0"), ("2", "0x9")] {
        let of = |line: &&&str| field(line, "sequence") == Some(sequence);
        let (submit, complete) = (submitted.iter().find(of), completed.iter().find(of));
        let (Some(submit), Some(complete)) = (submit, complete) else {
            return Err(format!("submission {sequence} in:\n{trace}").into());
        };
        for name in ["gpu", "ring", "context", "number"] {
            ensure_eq!(field(submit, name), field(complete, name), "{name}");
        }
        ensure_eq!(field(submit, "commands"), Some("1"), "{submit}");
        ensure_eq!(field(complete, "status"), Some(status), "{complete}");
    }
    PASSED
}

/// The numbers of a row of a table, by the names in its first line.
pub(crate) fn row(file: &Path, index: usize) -> Result<Vec<(String, i64)>, Failure> {
    let text = fs::read_to_string(file)?;
    let mut lines = text.lines();
    let names = lines.next().ok_or("an empty file")?.split_whitespace();
    let numbers = lines.nth(index).ok_or("no such row")?.split_whitespace();
    Ok(names
        .zip(numbers)
        .map(|(name, number)| (name.to_owned(), number.parse().unwrap_or(-1)))
        .collect())
}

pub(crate) fn number(row: &[(String, i64)], name: &str) -> Result<i64, Failure> {
    let found = row.iter().find(|(found, _)| found == name);
    Ok(found.ok_or_else(|| format!("no {name} in {row:?}"))?.1)
}

fn debugfs_counts() -> TestResult {
    let mount = Mount::new("debugfs")?;
    let directory = mount.0.join("pinion0");
    let gpu = open()?;
    let memory = page_with(0)?;
    let rings = directory.join("rings");
    let before = row(&rings, 0)?;
    for _ in 0..10 {
        let command = Command::atomic_add(memory.as_ptr().cast::<u64>(), 1);
        execute_ok(&gpu, &[command, command])?;
    }
    let malformed = submit_on(&gpu, 0, &[Command::atomic_add(memory.at(1).cast::<u64>(), 1)])?;
    ensure!(!gpu.wait(malformed, soon())?.is_ok(), "it has succeeded");
    let after = row(&rings, 0)?;
    for (name, expected) in [
        ("ring", 0),
        ("number", 11),
        ("submissions", 11),
        ("commands", 21),
        ("completed", 11),
        ("failed", 1),
        ("queued", 0),
        ("in-flight", 0),
    ] {
        ensure_eq!(number(&after, name)? - number(&before, name)?, expected, "{name}");
    }
    ensure!(
        number(&after, "busy-ns")? > number(&before, "busy-ns")?,
        "busy-ns"
    );
    let queue = row(&directory.join("queues"), 3)?;
    ensure!(number(&queue, "sent")? >= 11, "{queue:?}");
    ensure_eq!(number(&queue, "sent")?, number(&queue, "answered")?, "{queue:?}");
    PASSED
}

/// A monitoring program sees what a process does, and cannot do anything with its file.
fn fdinfo_can_be_read_by_others() -> TestResult {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let gpu = open()?;
    let memory = Mapping::anonymous(1)?;
    execute_ok(&gpu, &[Command::fill(memory.as_ptr(), 100, 1_u8)])?;
    let path = format!("/proc/{}/fdinfo/{}", std::process::id(), gpu.as_fd().as_raw_fd());
    let expected = gpu.statistics()?;
    let child = crate::support::fork(|| {
        let text = fs::read_to_string(&path)?;
        for line in [
            "pinion-driver:\tpinion".to_owned(),
            "pinion-device:\tpinion0".to_owned(),
            format!("pinion-client-id:\t{}", expected.client),
            "pinion-submissions:\t1".to_owned(),
            "pinion-outstanding:\t0".to_owned(),
        ] {
            ensure!(text.lines().any(|found| found == line), "{line:?} in:\n{text}");
        }
        ensure!(text.contains("\npinion-engine-ring0:\t"), "{text}");
        Ok(())
    })?;
    crate::support::join(child)?;
    PASSED
}
