// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Hands everything that comes from one Unix stream on to another, file descriptors too.

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

/// Hands over what can be read now. False at the end of the stream.
fn hand_over(from: &UnixStream, to: &UnixStream) -> rustix::io::Result<bool> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        from,
        &mut [IoSliceMut::new(&mut bytes)],
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
    let mut rest = bytes.get(..received).unwrap_or_default();
    if rest.is_empty() {
        return Ok(false);
    }
    // The descriptors go with the first byte that they came with.
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    while !rest.is_empty() {
        let sent = sendmsg(to, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)?;
        control.clear();
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn bytes_and_descriptors_come_through_and_the_end_too() {
        let (mut outside, one) = UnixStream::pair().unwrap();
        let (other, mut inside) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || run(&one, &other));
        outside.write_all(&[7; 10_000]).unwrap();
        let mut bytes = vec![0; 10_000];
        inside.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [7; 10_000]);

        let (mut mine, theirs) = UnixStream::pair().unwrap();
        let fds = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&inside, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(
            &outside,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::empty(),
        )
        .unwrap();
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

        drop(outside);
        assert_eq!(inside.read(&mut byte).unwrap(), 0);
        thread.join().unwrap();
    }
}
