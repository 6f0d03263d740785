// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The conventions that programs which start the daemon rely on.

mod support;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};

use pinion_abi as abi;
use support::*;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pinion-device"))
}

fn run(arguments: &[&str]) -> (Output, String) {
    let output = program().args(arguments).output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    (output, said)
}

#[test]
fn prints_its_capabilities() {
    let (output, said) = run(&["--print-capabilities"]);
    assert!(output.status.success());
    assert_eq!(said, "");
    assert_eq!(output.stdout, b"{\"type\": \"pinion\", \"features\": []}\n");
}

#[test]
fn the_descriptor_names_the_same_type() {
    let descriptor = include_str!("../50-pinion-device.json");
    assert!(descriptor.contains("\"type\": \"pinion\""));
}

#[test]
fn wrong_arguments_end_it_with_a_reason() {
    for (arguments, reason) in [
        (&[][..], "required"),
        (&["--socket-path", "a", "--fd", "9"], "cannot be used with"),
        (&["--socket-path", "a", "--vram", "lots"], "--vram"),
        (&["--socket-path", "a", "--vram", "2T"], "1M to 1T"),
        (&["--socket-path", "a", "--rings", "17"], "1..=16"),
        (
            &["--socket-path", "a", "--inject", "nothing"],
            "stale-tlb, lost-fault",
        ),
        (&["--fd", "77"], "file descriptor 77"),
        (&["--fd", "2"], "file descriptor 2"),
    ] {
        let (output, said) = run(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(said.contains(reason), "{arguments:?} said: {said}");
    }
}

#[test]
fn a_bad_socket_path_gives_one_clear_message() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("file"), "precious").unwrap();
    let _used = UnixListener::bind(path("used")).unwrap();
    for (socket, reason) in [
        (path("none/socket"), "cannot listen on"),
        (path("file"), "is not a socket"),
        (path("used"), "another program listens"),
        (path(&"x".repeat(200)), "cannot listen on"),
    ] {
        let (output, said) = run(&["--socket-path", &socket]);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains(reason) && said.contains(&socket) && said.lines().count() == 1,
            "{said}"
        );
    }
    assert_eq!(std::fs::read(path("file")).unwrap(), b"precious");
}

#[test]
fn a_dead_socket_is_replaced_and_both_signals_end_it() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        drop(UnixListener::bind(&socket).unwrap());
        let mut child = program()
            .arg("--socket-path")
            .arg(&socket)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(connect(&socket, &mut child));
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        assert!(wait_for_exit(&mut child).success());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "");
        assert!(!socket.exists());
    }
}

/// Starts the daemon with `socket` as its file descriptor 3.
fn with_fd(socket: OwnedFd) -> std::process::Child {
    Command::new("sh")
        .args([
            "-c",
            r#"exec "$0" --sandbox --fd 3 --vram 64M 3<&0 </dev/null"#,
            env!("CARGO_BIN_EXE_pinion-device"),
        ])
        .stdin(socket)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn ping(stream: UnixStream) {
    let mut guest = Guest::on(stream, 1);
    assert_eq!(guest.config().magic, abi::MAGIC);
    assert_eq!(guest.create(1), abi::STATUS_OK);
    assert_eq!(guest.map(1, 0x1000, &[ALL | FREE]), abi::STATUS_OK);
    assert_eq!(guest.run(1, 5, &[increments(0x1000, 9)]).status, abi::STATUS_OK);
    assert_eq!(guest.read::<u64>(FREE), 9);
}

#[test]
fn serves_a_connected_descriptor_and_ends_with_it() {
    let (mine, theirs) = UnixStream::pair().unwrap();
    let mut child = with_fd(theirs.into());
    ping(mine);
    assert!(wait_for_exit(&mut child).success());
}

#[test]
fn serves_a_listening_descriptor_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = with_fd(listener.into());
    for _ in 0..2 {
        ping(UnixStream::connect(&path).unwrap());
    }
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(wait_for_exit(&mut child).success());
}

#[test]
fn a_connected_descriptor_does_not_keep_it_from_ending() {
    let (mine, theirs) = UnixStream::pair().unwrap();
    let mut child = with_fd(theirs.into());
    let mut guest = Guest::on(mine, 1);
    assert_eq!(guest.create(1), abi::STATUS_OK);
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(wait_for_exit(&mut child).success());
}
