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
    let mut child = program()
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("waited {PATIENCE:?} for the end of pinion-device {arguments:?}");
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    (output, said)
}

#[test]
fn prints_its_capabilities() {
    let (output, said) = run(&["--print-capabilities"]);
    assert!(output.status.success());
    assert_eq!(said, "");
    assert_eq!(output.stdout, b"{\"type\": \"pinion\", \"features\": []}\n");
    // All other arguments are ignored.
    for others in [
        &["--socket-path", "/nowhere/socket", "--print-capabilities"][..],
        &["--print-capabilities", "--fd", "77", "--unknown", "--vram=lots"],
    ] {
        let (same, said) = run(others);
        assert!(same.status.success() && said.is_empty(), "{others:?}: {said}");
        assert_eq!(same.stdout, output.stdout);
    }
    assert!(!std::path::Path::new("/nowhere").exists());
}

#[test]
fn the_descriptor_names_the_same_type() {
    let descriptor: serde_json::Value =
        serde_json::from_str(include_str!("../50-pinion-device.json")).unwrap();
    let capabilities: serde_json::Value =
        serde_json::from_slice(&run(&["--print-capabilities"]).0.stdout).unwrap();
    // What the schema of QEMU wants of both.
    assert_eq!(descriptor["type"], capabilities["type"]);
    assert_eq!(capabilities["features"], serde_json::json!([]));
    assert!(descriptor["description"].is_string());
    let binary = std::path::Path::new(descriptor["binary"].as_str().unwrap());
    assert!(binary.is_absolute() && binary.ends_with("pinion-device"));
    let known = ["description", "type", "binary", "tags"];
    for member in descriptor.as_object().unwrap().keys() {
        assert!(known.contains(&member.as_str()), "{member}");
    }
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
        (
            &["--socket-path", "a", "--vram", "1M", "--aperture", "2M"],
            "--aperture 2M",
        ),
        (
            &["--socket-path", "a", "--rings", "1", "--engines", "2"],
            "--engines 2",
        ),
        (&["--socket-path", "a", "--watchdog", "soon"], "'soon'"),
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

/// The session of a process, as `/proc/PID/stat` has it (proc_pid_stat(5)): 0 when its leader is outside of this
/// namespace of processes, which getsid(2) of rustix takes for impossible.
fn session(process: u32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().nth(3).unwrap().parse().unwrap()
}

#[test]
fn it_stays_in_the_foreground_and_says_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut child = program()
        .arg("--socket-path")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(connect(&socket, &mut child));
    // It is the process that was started which listens, in the session that it was started in.
    let pid = rustix::process::Pid::from_child(&child);
    assert_eq!(session(child.id()), session(std::process::id()));
    assert!(child.try_wait().unwrap().is_none());
    // The second signal does not find it at work still, or ends it at once.
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(wait_for_exit(&mut child).success());
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

#[test]
fn it_ends_quickly_with_work_under_way() {
    let mut daemon = Daemon::start(&["--rings", "2"]);
    let mut guest = Guest::connect(&mut daemon, 2);
    assert_eq!(guest.create(0), abi::STATUS_OK);
    assert_eq!(guest.map(0, 0x1000, &[ALL | FREE]), abi::STATUS_OK);
    guest.submit(0, 0, 1, &[increments(0x1000, u32::MAX)]);
    guest.submit(1, 0, 1, &[increments(0x5000, 1)]);
    assert_eq!(guest.event().kind, abi::EVENT_FAULT);
    until("the engine to be at work", || {
        (guest.read::<u64>(FREE) > 1000).then_some(())
    });
    let asked = std::time::Instant::now();
    daemon.terminate();
    // "As quickly and cleanly as possible"; management software waits for a few seconds before it kills.
    assert!(asked.elapsed() < std::time::Duration::from_secs(2));
}
