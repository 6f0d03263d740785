// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Everything that turns bytes or text of others into something the device works with.

use std::sync::Arc;

use pinion_abi::{self as abi, VA_END};
use pinion_device::control::Subject;
use pinion_device::gpu::command::{Command, MAX_BATCH, Submission};
use pinion_device::gpu::inject::{Injection, Injector};
use pinion_device::gpu::request::{Invalidate, MAX_MAP_ENTRIES, Request};

/// Requests of the control and of the invalidation queue.
pub fn requests(data: &[u8]) {
    if let Ok(request) = Request::decode(data) {
        match request {
            Request::Map {
                va, entries, large, ..
            } => {
                let size = if large {
                    abi::LARGE_PAGE_SIZE
                } else {
                    abi::PAGE_SIZE
                };
                assert!((1..=MAX_MAP_ENTRIES as usize).contains(&entries.len()));
                // Whether the range is one is for the page table to say; that must not be up to this.
                let _ = (va, size);
            }
            Request::Count(count) => assert!(count.va <= count.end && count.end <= VA_END),
            _ => {}
        }
    }
    if let Ok(Invalidate::Range { va, end, .. }) = Invalidate::decode(data) {
        assert!(va <= end && end <= VA_END && (va | end) % abi::PAGE_SIZE == 0);
    }
}

fn inside(address: u64, length: u64) {
    let end = address.checked_add(length);
    assert!(end.is_some_and(|end| end <= VA_END), "{address:x}, {length:x}");
}

/// Submissions and their commands.
pub fn submissions(data: &[u8]) {
    const RINGS: u16 = 4;
    let mut commands = Vec::new();
    let Ok(submission) = Submission::decode(data, RINGS, &mut commands) else {
        return;
    };
    if let Some((va, length)) = submission.indirect {
        assert!(commands.is_empty());
        inside(va, length as u64);
    }
    assert!(commands.len() <= MAX_BATCH as usize);
    for command in commands {
        match command {
            Command::Copy {
                destination,
                source,
                length,
            } => {
                inside(destination, length);
                inside(source, length);
            }
            Command::Fill { address, length, .. } | Command::Prefetch { address, length, .. } => {
                inside(address, length);
            }
            Command::Atomic(atomic) => {
                assert!(atomic.repeat > 0 && atomic.span > 0);
                for index in [0, atomic.span.min(atomic.repeat) - 1, atomic.repeat - 1] {
                    inside(atomic.place(index), atomic.width.bytes());
                }
            }
            Command::FenceWait { ring, .. } => assert!(ring < RINGS),
            Command::Hang => panic!("no guest can ask for this"),
            _ => {}
        }
    }
}

/// Deliberate defects, as they are written.
pub fn injections(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match text.parse::<Injection>() {
        Ok(injection) => assert!(injection.every > 0 && text.starts_with(injection.defect.name())),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A line of the control socket, without its end, asked of a daemon that has no device.
pub fn control(data: &[u8]) {
    let subject = Subject::new(Arc::new(Injector::default()));
    let answer = subject.answer(data);
    assert_eq!(answer.last(), Some(&b'\n'));
    assert_eq!(answer.iter().filter(|&&byte| byte == b'\n').count(), 1);
    assert!(answer.len() < 64 << 10, "an answer of {} bytes", answer.len());
}
