// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the guest has to offer: a disk, swap, cgroups, KSM.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_client::PAGE_SIZE;
use pinion_tests::{Failure, ensure, patiently};

/// Bytes of each disk.
const SIZE: u64 = 128 << 20;
const CGROUPS: &str = "/sys/fs/cgroup";
const KSM: &str = "/sys/kernel/mm/ksm";

/// What there is, or why it is not there.
pub(crate) struct Machine {
    /// A block device with that many bytes to be written over.
    pub(crate) disk: Result<PathBuf, String>,
    /// Swap is on, on another.
    pub(crate) swap: Result<(), String>,
    cgroups: Result<(), String>,
}

/// A cgroup, which is removed when this is dropped.
pub(crate) struct Cgroup(PathBuf);

impl Machine {
    /// Sets it up.
    pub(crate) fn new() -> Self {
        let (disk, swap) = match find_disks() {
            Ok([disk, swap]) => (
                Ok(disk),
                swap_on(&swap).map_err(|error| format!("no swap: {error}")),
            ),
            Err(reason) => (Err(reason.clone()), Err(reason)),
        };
        let cgroups = fs::write(format!("{CGROUPS}/cgroup.subtree_control"), "+memory")
            .map_err(|error| format!("no memory cgroups: {error}"));
        Self { disk, swap, cgroups }
    }

    /// A new cgroup, or why there is none.
    pub(crate) fn cgroup(&self) -> Result<Cgroup, String> {
        self.cgroups.clone()?;
        let path = PathBuf::from(format!("{CGROUPS}/ownership-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("no cgroup: {error}"))?;
        Ok(Cgroup(path))
    }
}

/// Two disks: such as are the kernel's own, in compressed memory, or those that the guest was given.
fn find_disks() -> Result<[PathBuf; 2], String> {
    let given = ["/dev/nvme0n1", "/dev/nvme1n1"].map(PathBuf::from);
    if given.iter().all(|path| path.exists()) {
        return Ok(given);
    }
    if !Path::new("/sys/class/zram-control").exists() {
        return Err("the guest has no two disks".to_owned());
    }
    let zram = || -> Result<PathBuf, Failure> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")?;
        let number = number.trim();
        fs::write(format!("/sys/block/zram{number}/disksize"), SIZE.to_string())?;
        Ok(PathBuf::from(format!("/dev/zram{number}")))
    };
    let zram = || zram().map_err(|error| format!("no zram: {error}"));
    Ok([zram()?, zram()?])
}

/// Swaps to a disk.
fn swap_on(path: &Path) -> Result<(), Failure> {
    // union swap_header (include/linux/swap.h): version, last page, number of bad ones; and a name at the end.
    let mut header = [0; PAGE_SIZE];
    header[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
    header[1028..1032].copy_from_slice(&(SIZE as u32 / PAGE_SIZE as u32 - 1).to_ne_bytes());
    header[PAGE_SIZE - 10..].copy_from_slice(b"SWAPSPACE2");
    let file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&header, 0)?;
    file.sync_all()?;
    drop(file);
    let name = std::ffi::CString::new(path.to_str().ok_or("a strange name")?)?;
    // SAFETY: A valid name.
    if unsafe { libc::swapon(name.as_ptr(), 0) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

impl Cgroup {
    /// Has this process belong to it from now on.
    pub(crate) fn join(&self) -> Result<(), Failure> {
        self.set("cgroup.procs", &std::process::id().to_string())
    }

    /// Has this process belong to the root again.
    pub(crate) fn leave(&self) -> Result<(), Failure> {
        Ok(fs::write(
            format!("{CGROUPS}/cgroup.procs"),
            std::process::id().to_string(),
        )?)
    }

    /// Writes one of its files.
    pub(crate) fn set(&self, file: &str, value: &str) -> Result<(), Failure> {
        let path = self.0.join(file);
        fs::write(&path, value).map_err(|error| format!("{value} to {}: {error}", path.display()).into())
    }

    /// Reads a number: the whole of a file, or a line of it.
    pub(crate) fn get(&self, file: &str, line: Option<&str>) -> Result<u64, Failure> {
        let text = fs::read_to_string(self.0.join(file))?;
        let number = match line {
            None => Some(text.trim()),
            Some(name) => text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')),
        };
        Ok(number.ok_or_else(|| format!("no {line:?} in {file}"))?.parse()?)
    }

    /// Bytes of anonymous memory that are charged to it.
    pub(crate) fn anonymous(&self) -> Result<u64, Failure> {
        self.get("memory.stat", Some("anon"))
    }

    /// Waits until no anonymous memory is charged to it.
    pub(crate) fn wait_until_empty(&self) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            let charged = self.anonymous()?;
            if charged == 0 {
                return Ok(());
            }
            ensure!(
                started.elapsed() < patiently(Duration::from_secs(10)),
                "{charged} bytes are still charged for a process that is gone"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has the kernel reclaim from it what it can.
    pub(crate) fn reclaim(&self) {
        // EAGAIN when there is less than that, which is so.
        let _ = fs::OpenOptions::new()
            .write(true)
            .open(self.0.join("memory.reclaim"))
            .and_then(|mut file| file.write_all(b"16M"));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Fails while processes are in it, such as this one.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Has KSM look at all memory that it is allowed to join, often enough to join what can be.
pub(crate) fn run_ksm() -> Result<(), Failure> {
    let set = |file: &str, value: &str| fs::write(format!("{KSM}/{file}"), value);
    let scans =
        || -> Result<u64, Failure> { Ok(fs::read_to_string(format!("{KSM}/full_scans"))?.trim().parse()?) };
    set("pages_to_scan", "100000")?;
    set("sleep_millisecs", "0")?;
    let before = scans()?;
    set("run", "1")?;
    let started = Instant::now();
    // The first may be under way; the second sees each page for the first time, the third finds it unchanged, and joins it with one
    // that was found so before. One more for the order of the two.
    while scans()? < before + 4 {
        if started.elapsed() > patiently(Duration::from_secs(20)) {
            let _ = set("run", "0");
            return Err(format!("KSM has done {} scans only", scans()? - before).into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    set("run", "0")?;
    Ok(())
}
