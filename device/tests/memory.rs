// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory that comes and goes while the device runs.

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;

use pinion_abi::{self as abi, PAGE_SIZE};
use support::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const OK: u32 = abi::STATUS_OK;
const VA: u64 = 0x7000_0000_0000;
/// Where more memory comes.
const THERE: u64 = 1 << 32;
const SIZE: u64 = 1 << 20;

/// A piece of guest memory.
struct Slot {
    file: File,
    memory: GuestMemoryMmap,
    address: u64,
}

impl Slot {
    fn new(address: u64) -> Self {
        let file = rustix::fs::memfd_create("slot", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, SIZE).unwrap();
        let file = File::from(file);
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(address), SIZE as usize, Some(offset))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        Self {
            file,
            memory,
            address,
        }
    }

    fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.address,
            memory_size: SIZE,
            // Only queues are addressed that way, and there are none in it.
            userspace_addr: 0x7fff_0000_0000 + self.address,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn count(&self) -> u64 {
        self.memory.read_obj(GuestAddress(self.address)).unwrap()
    }
}

#[test]
fn added_memory_is_accessible_and_removed_memory_is_not() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert!(guest.frontend.get_max_mem_slots().unwrap() >= 32);
    let slot = Slot::new(THERE);
    let run = |guest: &mut Guest, context: u32| {
        assert_eq!(guest.create(context), OK);
        assert_eq!(guest.map(context, VA, &[ALL | THERE]), OK);
        guest.run(context, 1, &[increments(VA, 5)]).status
    };
    assert_eq!(run(&mut guest, 0), abi::STATUS_BUS_ERROR);
    guest.frontend.add_mem_region(&slot.info()).unwrap();
    assert_eq!(run(&mut guest, 1), OK);
    assert_eq!(slot.count(), 5);
    guest.frontend.remove_mem_region(&slot.info()).unwrap();
    // The translation is in the TLB and leads nowhere.
    assert_eq!(
        guest.run(1, 2, &[increments(VA, 5)]).status,
        abi::STATUS_BUS_ERROR
    );
    assert_eq!(run(&mut guest, 2), abi::STATUS_BUS_ERROR);
    assert_eq!(slot.count(), 5);
    // What is there otherwise has not been touched.
    assert_eq!(guest.create(3), OK);
    assert_eq!(guest.map(3, VA, &[ALL | FREE]), OK);
    assert_eq!(guest.run(3, 1, &[increments(VA, 5)]).status, OK);
    // And again, with other memory there.
    let other = Slot::new(THERE);
    guest.frontend.add_mem_region(&other.info()).unwrap();
    assert_eq!(run(&mut guest, 4), OK);
    assert_eq!((slot.count(), other.count()), (5, 5));
    daemon.terminate_saying(&["memory that does not exist"]);
}

#[test]
fn memory_is_removed_under_a_running_engine() {
    let mut daemon = Daemon::start(&["--rings", "2"]);
    let mut guest = Guest::connect(&mut daemon, 2);
    for round in 0..10 {
        let slot = Slot::new(THERE);
        guest.frontend.add_mem_region(&slot.info()).unwrap();
        let (busy, other) = (2 * round, 2 * round + 1);
        assert_eq!(guest.create(busy), OK);
        assert_eq!(guest.map(busy, VA, &[ALL | THERE]), OK);
        let work = guest.submit(0, busy, 1, &[increments(VA, u32::MAX)]);
        until("the engine to be at work", || (slot.count() > 1000).then_some(()));
        // Another region comes and goes meanwhile, and does not disturb it.
        let more = Slot::new(2 * THERE);
        guest.frontend.add_mem_region(&more.info()).unwrap();
        assert_eq!(guest.create(other), OK);
        assert_eq!(guest.map(other, VA, &[ALL | (2 * THERE)]), OK);
        let short = guest.submit(1, other, 1, &[increments(VA, 1000)]);
        assert_eq!(guest.completion(1, short).status, OK);
        guest.frontend.remove_mem_region(&more.info()).unwrap();
        assert!(!guest.is_complete(0, work));

        guest.frontend.remove_mem_region(&slot.info()).unwrap();
        // That was answered, so nobody is at it any more.
        let counted = slot.count();
        let done = guest.completion(0, work);
        assert_eq!((done.status, done.fault_va), (abi::STATUS_BUS_ERROR, VA));
        assert_eq!((slot.count(), done.repeats), (counted, counted));
    }
    daemon.terminate_saying(&["memory that does not exist"]);
}

#[test]
fn a_new_memory_table_is_followed() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    let slot = Slot::new(THERE);
    guest.frontend.add_mem_region(&slot.info()).unwrap();
    assert_eq!(guest.create(0), OK);
    assert_eq!(guest.map(0, VA, &[ALL | THERE, ALL | FREE]), OK);
    let work = guest.submit(0, 0, 1, &[increments(VA, u32::MAX)]);
    until("the engine to be at work", || (slot.count() > 1000).then_some(()));
    // The table of before the slot came.
    guest.frontend.set_mem_table(&guest.regions()).unwrap();
    let counted = slot.count();
    assert_eq!(guest.completion(0, work).status, abi::STATUS_BUS_ERROR);
    assert_eq!(slot.count(), counted);
    assert_eq!(guest.create(1), OK);
    assert_eq!(guest.map(1, VA, &[ALL | (FREE + PAGE_SIZE)]), OK);
    assert_eq!(guest.run(1, 1, &[increments(VA, 7)]).status, OK);
    assert_eq!(guest.read::<u64>(FREE + PAGE_SIZE), 7);
    daemon.terminate_saying(&["memory that does not exist"]);
}

#[test]
fn a_stalled_access_finds_the_memory_that_came_meanwhile() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.create(0), OK);
    let work = guest.submit(0, 0, 1, &[increments(VA, 9)]);
    let fault = guest.event();
    let slot = Slot::new(THERE);
    guest.frontend.add_mem_region(&slot.info()).unwrap();
    assert_eq!(guest.map(0, VA, &[ALL | THERE]), OK);
    assert_eq!(guest.replay(0, fault.fault), Ok(1));
    assert_eq!(guest.completion(0, work).status, OK);
    assert_eq!(slot.count(), 9);
    daemon.terminate();
}

#[test]
fn many_slots() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    let slots: Vec<_> = (1..=64).map(|n| Slot::new(n * THERE)).collect();
    for slot in &slots {
        guest.frontend.add_mem_region(&slot.info()).unwrap();
    }
    assert_eq!(guest.create(0), OK);
    let entries: Vec<u64> = slots.iter().map(|slot| ALL | slot.address).collect();
    assert_eq!(guest.map(0, VA, &entries), OK);
    let work: Vec<_> = (0..64).map(|n| increments(VA + n * PAGE_SIZE, 3)).collect();
    assert_eq!(guest.run(0, 1, &work).status, OK);
    for slot in slots.iter().rev() {
        guest.frontend.remove_mem_region(&slot.info()).unwrap();
        assert_eq!(slot.count(), 3);
    }
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    daemon.terminate();
}

#[test]
fn the_queues_own_memory_is_taken_away() {
    let mut daemon = Daemon::start(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.create(0), OK);
    let stalled = guest.submit(0, 0, 1, &[increments(VA, 1)]);
    guest.event();
    let regions = guest.regions();
    guest.frontend.remove_mem_region(&regions[0]).unwrap();
    for queue in &mut guest.queues {
        queue.kick_anyway();
    }
    // It goes on to listen, and finds its queues again when they are back.
    guest.frontend.add_mem_region(&regions[0]).unwrap();
    guest.queues[0].kick_anyway();
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    assert!(!guest.is_complete(0, stalled));
    drop(guest);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    daemon.signal(rustix::process::Signal::TERM);
    let (status, said) = daemon.end();
    assert!(status.success() && said.lines().count() < 10, "{said}");
}
