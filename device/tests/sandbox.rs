// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether the daemon is where it says it is. That it can do its work there, the other tests show.

mod support;

use pinion_abi as abi;
use support::*;

const VA: u64 = 0x7000_0000_0000;

/// By thread: its name, and the lines of its status that are about system calls.
fn threads(daemon: &Daemon) -> Vec<(String, String)> {
    let tasks = format!("/proc/{}/task", daemon.child.id());
    std::fs::read_dir(tasks)
        .unwrap()
        // Some may end meanwhile.
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            let status = std::fs::read_to_string(path.join("status")).ok()?;
            let lines: Vec<&str> = status
                .lines()
                .filter(|line| line.starts_with("Seccomp:") || line.starts_with("NoNewPrivs:"))
                .collect();
            Some((name.trim().to_owned(), lines.join(" ")))
        })
        .collect()
}

fn use_it(daemon: &mut Daemon) {
    let mut guest = Guest::connect(daemon, 1);
    assert_eq!(guest.create(0), abi::STATUS_OK);
    assert_eq!(guest.map(0, VA, &[ALL | FREE]), abi::STATUS_OK);
    assert_eq!(guest.run(0, 1, &[increments(VA, 3)]).status, abi::STATUS_OK);
}

#[test]
fn all_threads_are_in_it() {
    let mut daemon = Daemon::with_control(&["--rings", "3", "--aperture", "1M"]);
    let mut guest = Guest::connect(&mut daemon, 3);
    assert_eq!(guest.create(0), abi::STATUS_OK);
    let threads = threads(&daemon);
    for name in ["pinion-device", "signals", "control", "vring_worker"] {
        assert!(
            threads.iter().any(|(thread, _)| thread == name),
            "{name}: {threads:?}"
        );
    }
    for (thread, status) in &threads {
        // 2: with a filter.
        assert!(
            status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
            "{thread}: {status}"
        );
    }
    drop(guest);
    daemon.terminate();
}

#[test]
fn without_the_option_there_is_none() {
    let mut daemon = Daemon::without_sandbox(&[]);
    use_it(&mut daemon);
    for (thread, status) in threads(&daemon) {
        assert!(status.contains("Seccomp:\t0"), "{thread}: {status}");
    }
    use_it(&mut daemon);
    daemon.terminate();
}
