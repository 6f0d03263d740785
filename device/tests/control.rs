// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control socket, and what can be switched through it.

mod support;

use pinion_abi::{self as abi, PAGE_SIZE};
use serde_json::json;
use support::*;

const OK: u32 = abi::STATUS_OK;
const VA: u64 = 0x7000_0000_0000;

#[test]
fn state_is_that_of_the_device_that_is_there() {
    let mut daemon = Daemon::with_control(&["--rings", "2"]);
    let state = daemon.ask(r#"{"command":"state"}"#);
    let result = &state["result"];
    assert_eq!(state["version"], json!(1), "{state}");
    assert_eq!(
        (&result["connected"], &result["connections"]),
        (&json!(false), &json!(0))
    );
    assert_eq!(result["device"]["vram_size"], json!(64 << 20));
    assert_eq!(result["contexts"], json!([]));
    assert_eq!(result["rings"].as_array().map(Vec::len), Some(2));

    let mut guest = Guest::connect(&mut daemon, 2);
    assert_eq!(guest.create(3), OK);
    assert_eq!(guest.map(3, VA, &[ALL | FREE, ALL | abi::PTE_VRAM]), OK);
    assert_eq!(guest.run(3, 1, &[increments(VA + PAGE_SIZE, 1)]).status, OK);
    guest.submit(1, 3, 9, &[increments(VA + 5 * PAGE_SIZE + 8, 1)]);
    let fault = guest.event();
    let state = daemon.ask(r#"{"command":"state"}"#);
    let result = &state["result"];
    assert_eq!(
        (&result["connected"], &result["connections"]),
        (&json!(true), &json!(1)),
        "{state}"
    );
    let used = result["device"]["vram_used"].as_u64().unwrap();
    assert!((PAGE_SIZE..64 << 20).contains(&used), "{state}");
    let context = &result["contexts"][0];
    assert_eq!(
        (&context["id"], &context["status"]),
        (&json!(3), &json!(OK)),
        "{state}"
    );
    let nodes = context["page_table_nodes"].as_u64().unwrap();
    assert!(nodes > 0);
    let page = VA + 5 * PAGE_SIZE;
    assert_eq!(
        result["rings"][1]["activity"],
        json!({"stalled": {"fault": fault.fault, "va": page, "reason": abi::REASON_NOT_PRESENT}})
    );
    assert_eq!(
        result["faults"],
        json!([{"fault": fault.fault, "context": 3, "va": page, "reason": abi::REASON_NOT_PRESENT,
            "stalled": 1, "replaying": false}])
    );
    let (status, said, _) = daemon.ctl(&["state"]);
    assert_eq!(status, Some(0));
    for line in [
        "frontend connected: yes (connections so far: 1)",
        "vram: 64M, in use: 4K;",
        "stalled on fault 1 at 0x700000005000: not present",
        &format!("context 3: alive, page-table nodes: {nodes}"),
        "fault 1: context 3, 0x700000005000, not present, rings stalled: 1",
    ] {
        assert!(said.contains(line), "{line} is not in: {said}");
    }

    // The next frontend's device knows nothing of it.
    drop(guest);
    until("the frontend to be gone", || {
        let state = daemon.ask(r#"{"command":"state"}"#);
        (state["result"]["connected"] == json!(false)
            && state["result"]["connections"] == json!(1)
            && state["result"]["contexts"] == json!([])
            && state["result"]["device"]["vram_used"] == json!(0))
        .then_some(())
    });
    daemon.terminate();
}

#[test]
fn statistics_are_there_with_and_without_a_frontend() {
    let mut daemon = Daemon::with_control(&[]);
    let before = daemon.ask(r#"{"command":"statistics"}"#);
    assert_eq!(before["result"]["connected"], json!(false), "{before}");
    assert_eq!(before["result"]["counters"]["requests"], json!(0), "{before}");
    let _guest = Guest::connect(&mut daemon, 1);
    let (status, said, _) = daemon.ctl(&["statistics"]);
    assert_eq!(status, Some(0));
    assert!(
        said.starts_with("frontend connected: yes") && said.contains("tlb_hits"),
        "{said}"
    );
    daemon.terminate();
}

#[test]
fn defects_are_switched_while_the_device_runs() {
    let mut daemon = Daemon::with_control(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.create(0), OK);
    let mut stale = |daemon: &Daemon, change: &[&str]| {
        assert_eq!(daemon.ctl(change).0, Some(0), "{change:?}");
        assert_eq!(guest.map(0, VA, &[ALL | FREE]), OK);
        guest.invalidate(0, VA, PAGE_SIZE, 0);
        assert_eq!(guest.run(0, 1, &[increments(VA, 1)]).status, OK);
        assert_eq!(guest.map(0, VA, &[ALL | (FREE + PAGE_SIZE)]), OK);
        assert_eq!(guest.invalidate(0, VA, PAGE_SIZE, 0), OK);
        let before: u64 = guest.read(FREE + PAGE_SIZE);
        assert_eq!(guest.run(0, 2, &[increments(VA, 1)]).status, OK);
        guest.read::<u64>(FREE + PAGE_SIZE) == before
    };
    assert!(!stale(&daemon, &["injections"]));
    // Of the two INVALIDATEs the second one.
    assert!(stale(&daemon, &["inject", "stale-tlb:after=1,count=1"]));
    assert_eq!(
        daemon.ask(r#"{"command":"injections"}"#)["result"]["injections"],
        json!([{"defect": "stale-tlb", "after": 1, "every": 1, "count": 1,
            "opportunities": 2, "strikes": 1}])
    );
    let (_, said, _) = daemon.ctl(&["injections"]);
    assert_eq!(
        said,
        "stale-tlb:after=1,every=1,count=1  opportunities: 2, strikes: 1\n"
    );
    let (_, said, _) = daemon.ctl(&["clear", "stale-tlb", "--json"]);
    assert_eq!(
        said,
        "{\"version\":1,\"result\":{\"defect\":\"stale-tlb\",\"was_on\":true}}\n"
    );
    assert!(!stale(&daemon, &["clear", "stale-tlb"]));
    assert_eq!(daemon.ctl(&["injections"]).1, "no defect is switched on\n");
    daemon.terminate();
}

#[test]
fn defects_outlive_connections() {
    let mut daemon = Daemon::with_control(&["--inject", "lost-fault:after=9"]);
    daemon.ask(r#"{"command":"inject","defect":"stale-tlb"}"#);
    drop(Guest::connect(&mut daemon, 1));
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.simple(abi::REQUEST_PING, 0), OK);
    let active = daemon.ask(r#"{"command":"injections"}"#);
    let names: Vec<_> = active["result"]["injections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|active| active["defect"].clone())
        .collect();
    assert_eq!(names, [json!("stale-tlb"), json!("lost-fault")], "{active}");
    daemon.terminate();
}

#[test]
fn a_dropped_interrupt_leaves_the_used_ring_as_it_should_be() {
    let mut daemon = Daemon::with_control(&[]);
    let mut guest = Guest::connect(&mut daemon, 1);
    assert_eq!(guest.create(0), OK);
    let ring = usize::from(abi::QUEUE_FIRST_RING);
    let lost = daemon.ask(r#"{"command":"inject","defect":"drop-interrupt","after":0,"count":1}"#);
    assert_eq!(lost["result"]["every"], json!(16), "{lost}");
    let work = guest.submit(0, 0, 1, &[abi::Command::default()]);
    until("the interrupt to be dropped", || {
        let active = daemon.ask(r#"{"command":"injections"}"#);
        (active["result"]["injections"][0]["strikes"] == json!(1)).then_some(())
    });
    assert!(guest.is_complete(0, work));
    assert!(!guest.queues[ring].was_notified());
    // That was the one.
    let next = guest.submit(0, 0, 2, &[abi::Command::default()]);
    guest.completion(0, next);
    assert_eq!(guest.completion(0, work).sequence, 1);
    daemon.terminate();
}

#[test]
fn the_command_fails_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nobody");
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_pinion-device"))
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"");
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let path = path.to_str().unwrap();
    let (status, said) = run(&["ctl", path, "state"]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains(&format!(
            "cannot connect to the control socket {path}: No such file"
        )) && said.lines().count() == 1,
        "{said}"
    );
    let (status, said) = run(&["ctl", path, "fly"]);
    assert_eq!(status, Some(2), "{said}");
    let (status, said) = run(&["ctl", path, "inject", "nothing"]);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("stale-tlb, lost-fault"), "{said}");

    // One that accepts and says nothing of sense, and one that ends.
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    let server = std::thread::spawn(move || {
        use std::io::{BufRead, Write};
        for answer in [
            &b"hello\n"[..],
            b"{\"version\":7}\n",
            b"{\"version\":1,\"error\":\"no\"}\n",
            b"",
        ] {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = std::io::BufReader::new(stream);
            stream.read_line(&mut String::new()).unwrap();
            stream.get_mut().write_all(answer).unwrap();
        }
    });
    for reason in [
        "not understood",
        "version 7 of the protocol",
        "refused: no",
        "no answer from",
    ] {
        let (status, said) = run(&["ctl", path, "version"]);
        assert_eq!(status, Some(1));
        assert!(said.contains(reason) && said.lines().count() == 1, "{said}");
    }
    server.join().unwrap();
}

#[test]
fn it_listens_and_ends_as_the_other_socket_does() {
    let mut daemon = Daemon::with_control(&[]);
    let control = daemon.control.clone();
    let _idle = std::os::unix::net::UnixStream::connect(&control).unwrap();
    drop(Guest::connect(&mut daemon, 1));
    daemon.terminate();
    assert!(!control.exists());

    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("precious"), "precious").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_pinion-device"))
        .args([
            "--socket-path",
            &path("socket"),
            "--control-path",
            &path("precious"),
        ])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("precious exists and is not a socket"), "{said}");
    assert!(!std::path::Path::new(&path("socket")).exists());
}
