// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Hands the vhost-user messages that come from one Unix stream on to another, file descriptors too.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "a test that fails may panic"
    )
)]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Most file descriptors in one message; vhost-user sends no more than 32, Linux no more than 253.
const MAX_FDS: usize = 253;
/// Bytes in the header of a vhost-user message: request, flags, size.
const HEADER: usize = 12;

/// Runs until one of the two ends, and ends the other.
pub(crate) fn run(one: &UnixStream, other: &UnixStream) {
    while let Ok(true) = step(one, other) {}
    // They may be shut down already.
    let _ = one.shutdown(Shutdown::Both);
    let _ = other.shutdown(Shutdown::Both);
}

fn step(one: &UnixStream, other: &UnixStream) -> rustix::io::Result<bool> {
    let mut fds = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(true),
        Err(error) => return Err(error),
    }
    let [from_one, from_other] = fds;
    if !from_one.revents().is_empty() && !hand_over(one, other)? {
        return Ok(false);
    }
    if !from_other.revents().is_empty() && !hand_over(other, one)? {
        return Ok(false);
    }
    Ok(true)
}

/// Hands over one message. False at the end of the stream.
///
/// It has to be one exactly: file descriptors come with the message that they belong to, but a read
/// that goes beyond its end can return those of the next one with it.
fn hand_over(from: &UnixStream, to: &UnixStream) -> rustix::io::Result<bool> {
    let mut header = [0; HEADER];
    let mut have = 0;
    while let Some(rest) = header.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match pass(from, to, rest)? {
            0 => return Ok(false),
            count => have = have.saturating_add(count),
        }
    }
    // The last of the header's three fields: how many bytes follow.
    let [.., a, b, c, d] = header;
    let mut left = u32::from_le_bytes([a, b, c, d]) as usize;
    let mut bytes = [0; 4096];
    while let Some(next) = bytes.get_mut(..left.min(4096)).filter(|next| !next.is_empty()) {
        match pass(from, to, next)? {
            0 => return Ok(false),
            count => left = left.saturating_sub(count),
        }
    }
    Ok(true)
}

/// Reads into `bytes`, and sends what came, with the descriptors that came with it.
fn pass(from: &UnixStream, to: &UnixStream, bytes: &mut [u8]) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        from,
        &mut [IoSliceMut::new(bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?
    .bytes;
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let mut rest = bytes.get(..received).unwrap_or_default();
    while !rest.is_empty() {
        let sent = sendmsg(to, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)?;
        control.clear();
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn message(body: &[u8]) -> Vec<u8> {
        [&[0; 8], &(body.len() as u32).to_le_bytes()[..], body].concat()
    }

    #[test]
    fn messages_keep_their_descriptors() {
        let (outside, one) = UnixStream::pair().unwrap();
        let (other, mut inside) = UnixStream::pair().unwrap();
        let (mut mine, theirs) = UnixStream::pair().unwrap();
        // Two messages, of which the second has a descriptor, before anybody reads.
        let (first, second) = (message(&[7; 10_000]), message(b"x"));
        (&outside).write_all(&first).unwrap();
        let fds = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(
            &outside,
            &[IoSlice::new(&second)],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
        let thread = std::thread::spawn(move || run(&one, &other));

        // A plain read would drop descriptors, and the relay's must not come with these bytes.
        let mut bytes = vec![0; first.len()];
        inside.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, first);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut header = [0; HEADER];
        recvmsg(
            &inside,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::empty(),
        )
        .unwrap();
        assert_eq!(header, second[..HEADER]);
        let fd = control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            })
            .unwrap();
        UnixStream::from(fd).write_all(b"hello").unwrap();
        let mut hello = [0; 5];
        mine.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");

        let mut byte = [0];
        inside.read_exact(&mut byte).unwrap();
        drop(outside);
        assert_eq!(inside.read(&mut byte).unwrap(), 0);
        thread.join().unwrap();
    }
}
