// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs the kernel's own hmm-tests, with what our patches add to them, against the kernel's own device, `test_hmm.ko`: what
//! the patches do is right without a driver of ours, and what was there before has not changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the patches add: each is one result, and passes.
const PINNING: &[&str] = &[
    "fault",
    "unpin",
    "range",
    "fork",
    "unmap",
    "evict_unmap",
    "huge",
    "huge_split",
    "huge_partial_unmap",
];

/// How many results there were before, on device-private memory and again on device-coherent memory, of which there is none.
const EACH: usize = 39;

/// How a test of the kernel's has ended.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Skipped,
    Failed,
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../qemu-scripts")
        .join(name)
}

/// The plan of a TAP output, and the verdict on each test by its name.
fn results(tap: &str) -> (Option<usize>, BTreeMap<String, Verdict>) {
    let mut plan = None;
    let mut verdicts = BTreeMap::new();
    for line in tap.lines() {
        if let Some(count) = line.strip_prefix("1..") {
            plan = count.parse().ok();
        }
        let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => continue,
        };
        let name = rest.split_whitespace().nth(1).unwrap_or(rest);
        let verdict = match (passed, rest.contains("# SKIP")) {
            (false, _) => Verdict::Failed,
            (true, true) => Verdict::Skipped,
            (true, false) => Verdict::Passed,
        };
        assert!(
            verdicts.insert(name.to_owned(), verdict).is_none(),
            "two results of {name}:\n{tap}"
        );
    }
    (plan, verdicts)
}

/// All of hmm-tests on `test_hmm.ko`.
fn hmm_tests(kernel: &str, seconds: &str) {
    let command = "insmod /pinion/test_hmm.ko && { hmm-tests; status=$?; rmmod test_hmm && exit $status; }";
    let output = Command::new(script("run"))
        .args(["--kernel", kernel, "--timeout", seconds, "--memory", "2G"])
        .args(["--devices", "0", "--no-driver", "--selftests"])
        .args(["--", "sh", "-c", command])
        .stdin(Stdio::null())
        .output()
        .expect("qemu-scripts/run");
    let tap = String::from_utf8_lossy(&output.stdout);
    let everything = format!(
        "hmm-tests on kernel '{kernel}', {}\n--- output\n{tap}--- errors\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );

    let (plan, verdicts) = results(&tap);
    let names = |verdict| -> Vec<_> {
        verdicts
            .iter()
            .filter(|(_, v)| **v == verdict)
            .map(|(name, _)| name.as_str())
            .collect()
    };
    assert!(names(Verdict::Failed).is_empty(), "{everything}");
    for test in PINNING {
        let name = format!("hmm_pin.{test}");
        assert_eq!(
            verdicts.get(&name),
            Some(&Verdict::Passed),
            "{name}: {everything}"
        );
    }
    let skipped = names(Verdict::Skipped);
    let elsewhere: Vec<_> = skipped
        .iter()
        .filter(|name| !name.contains("_coherent."))
        .collect();
    assert!(elsewhere.is_empty(), "skipped: {elsewhere:?}\n{everything}");
    assert_eq!(skipped.len(), EACH, "{everything}");
    assert_eq!(names(Verdict::Passed).len(), EACH + PINNING.len(), "{everything}");
    assert_eq!(plan, Some(verdicts.len()), "{everything}");
    // A warning in the guest's log is a failure, too.
    assert!(output.status.success(), "{everything}");
}

#[test]
fn hmm_tests_on_the_kernels_own_device() {
    hmm_tests("pin", "300");
}

#[test]
#[ignore = "takes several minutes"]
fn hmm_tests_on_kernel_debug() {
    hmm_tests("debug", "1800");
}
