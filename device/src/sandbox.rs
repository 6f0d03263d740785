// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Gives up the system calls that the daemon does not need any more once it is set up (seccomp).
//!
//! What is left is: memory without code in it, threads of its own, the descriptors that it has or is sent, and the
//! removal of its sockets at the end. There is no way to open a file, to connect to anything, to begin a program
//! or to signal one.
//!
//! Three filters do that; the strictest that has an opinion wins. A call that no filter knows ends the process with a
//! message and status [`VIOLATION`] (or, where signals are blocked, by SIGSYS). Some that libraries try, and can do without, are refused with an error
//! instead: files (the C library looks at settings of the kernel, a panic at where the program is), and
//! `clone3`, whose arguments no filter can see, and in whose place the C library then uses `clone`.

use std::collections::BTreeMap;
use std::io::Write as _;

use libc::{c_int, c_long, siginfo_t};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Status with which the process ends when it does what it must not: 128 and the number of SIGSYS.
pub const VIOLATION: i32 = 128 + libc::SIGSYS;

/// The sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filters could not be made, on this kind of processor perhaps.
    #[error("cannot make the filters of the sandbox")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refuses them.
    #[error("cannot enter the sandbox")]
    Enter(#[from] seccompiler::Error),
    /// There would be no message when something goes wrong.
    #[error("cannot handle SIGSYS")]
    Signal(#[source] std::io::Error),
}

/// What is allowed, whatever its arguments.
const ALLOWED: &[c_long] = &[
    // The descriptors that there are.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_memfd_create,
    libc::SYS_eventfd2,
    libc::SYS_dup,
    // Sockets that are connected, or listen.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Their files, at the end.
    libc::SYS_unlinkat,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_membarrier,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same, in the form that only the oldest architecture has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OF_OLD: &[c_long] = &[libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OF_OLD: &[c_long] = &[];

/// Refused with EACCES.
const REFUSED: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
];

#[cfg(target_arch = "x86_64")]
const REFUSED_OF_OLD: &[c_long] = &[libc::SYS_open, libc::SYS_readlink];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_OF_OLD: &[c_long] = &[];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Result<T> = std::result::Result<T, seccompiler::BackendError>;

/// The argument is one of these.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>> {
    let rule = |value: &u64| {
        let equal = SeccompCondition::new(argument, Length::Dword, Op::Eq, *value)?;
        SeccompRule::new(vec![equal])
    };
    values.iter().map(rule).collect()
}

/// Of these bits of the argument, these are set.
fn bits(argument: u8, mask: u64, set: u64) -> Result<Vec<SeccompRule>> {
    let equal = SeccompCondition::new(argument, Length::Qword, Op::MaskedEq(mask), set)?;
    Ok(vec![SeccompRule::new(vec![equal])?])
}

/// What is allowed.
fn allowed() -> Result<Rules> {
    let mut rules = Rules::new();
    // An empty list stands for "always". What another filter refuses must get past this one.
    for calls in [
        ALLOWED,
        ALLOWED_OF_OLD,
        REFUSED,
        REFUSED_OF_OLD,
        &[libc::SYS_clone3],
    ] {
        rules.extend(calls.iter().map(|call| (*call, Vec::new())));
    }
    let executable = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, bits(2, executable, 0)?);
    rules.insert(libc::SYS_mprotect, bits(2, executable, 0)?);
    let thread = (libc::CLONE_VM | libc::CLONE_THREAD) as u64;
    rules.insert(libc::SYS_clone, bits(0, thread, thread)?);
    // Names of threads and of memory.
    const PR_SET_VMA: u64 = 0x5356_4d41;
    rules.insert(
        libc::SYS_prctl,
        one_of(0, &[libc::PR_SET_NAME as u64, PR_SET_VMA])?,
    );
    rules.insert(libc::SYS_ioctl, one_of(1, &[libc::FIONBIO])?);
    let control = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_ADD_SEALS,
    ];
    rules.insert(
        libc::SYS_fcntl,
        one_of(1, &control.map(|command| command as u64))?,
    );
    // For abort().
    rules.insert(libc::SYS_tgkill, one_of(2, &[libc::SIGABRT as u64])?);
    Ok(rules)
}

fn compile(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram> {
    let processor: TargetArch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, others, these, processor)?.try_into()
}

/// Enters the sandbox, with all threads that there are or will be. There is no way out.
pub fn enter() -> std::result::Result<(), Error> {
    let always = |calls: &[&[c_long]]| -> Rules {
        calls
            .iter()
            .flat_map(|calls| calls.iter().map(|call| (*call, Vec::new())))
            .collect()
    };
    let no_file = compile(
        always(&[REFUSED, REFUSED_OF_OLD]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EACCES as u32),
    )?;
    let no_clone3 = compile(
        always(&[&[libc::SYS_clone3]]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let only = compile(allowed()?, SeccompAction::Trap, SeccompAction::Allow)?;
    // SAFETY: The handler does only what is allowed where a signal has come in: it writes to a descriptor from
    // memory of its own stack, and ends the process.
    unsafe { signal_hook_registry::register_sigaction(libc::SIGSYS, violation) }.map_err(Error::Signal)?;
    // The last of them forbids to add others.
    for filter in [&no_file, &no_clone3, &only] {
        seccompiler::apply_filter_all_threads(filter)?;
    }
    Ok(())
}

/// Says which system call it was, and ends the process.
fn violation(info: &siginfo_t) {
    /// The fields of `siginfo_t` up to those of SIGSYS, on all 64-bit architectures.
    #[repr(C)]
    struct Sigsys {
        _signal_error_code: [c_int; 4],
        _address: *const libc::c_void,
        syscall: c_int,
    }
    const _: () = assert!(size_of::<Sigsys>() <= size_of::<siginfo_t>());
    const _: () = assert!(align_of::<Sigsys>() <= align_of::<siginfo_t>());
    // SAFETY: The structure is a prefix of the kernel's, which is as large as `siginfo_t` says, and for SIGSYS
    // from a filter these fields are set; for any other SIGSYS they are just numbers.
    let call = unsafe { (*std::ptr::from_ref(info).cast::<Sigsys>()).syscall };
    let mut line = [0; 96];
    let mut rest = &mut line[..];
    // It fits.
    let _ = writeln!(
        rest,
        "pinion-device: ended by its sandbox: system call {call} is not allowed"
    );
    let left = rest.len();
    let said = line.len() - left;
    let _ = rustix::io::write(std::io::stderr(), &line[..said]);
    signal_hook::low_level::exit(VIOLATION);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    /// Runs one of the tests below, which are ignored on their own, in a process of its own.
    fn child(test: &str) -> (ExitStatus, String) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg(format!("sandbox::tests::{test}"))
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status, String::from_utf8_lossy(&said).into_owned())
    }

    #[test]
    #[ignore = "it enters the sandbox; run by another test"]
    fn child_does_what_it_may() {
        let (begin, begun) = std::sync::mpsc::channel();
        let (done, finished) = std::sync::mpsc::channel();
        let before = std::thread::spawn(move || {
            begun.recv().unwrap();
            // This thread was there before.
            done.send(
                std::fs::File::open("/dev/null")
                    .map_err(|error| error.kind())
                    .err(),
            )
            .unwrap();
        });
        enter().unwrap();
        begin.send(()).unwrap();
        let refused = Some(std::io::ErrorKind::PermissionDenied);
        assert_eq!(finished.recv().unwrap(), refused);
        before.join().unwrap();
        let sum = std::thread::spawn(|| vec![1_u64; 1 << 20].iter().sum::<u64>());
        assert_eq!(sum.join().unwrap(), 1 << 20);
        let open = std::fs::File::open("/dev/null").map_err(|error| error.kind());
        assert_eq!(open.err(), refused);
        println!("did what it may");
    }

    #[test]
    #[ignore = "it is ended by the sandbox; run by another test"]
    fn child_makes_a_socket() {
        enter().unwrap();
        let _ = std::os::unix::net::UnixDatagram::unbound();
        println!("went on");
    }

    #[test]
    #[ignore = "it is ended by the sandbox; run by another test"]
    fn child_begins_a_program() {
        enter().unwrap();
        let _ = Command::new("/bin/true").status();
        println!("went on");
    }

    #[test]
    #[ignore = "it is ended by the sandbox; run by another test"]
    fn child_makes_memory_executable() {
        enter().unwrap();
        let (rights, flags) = (
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: Nothing is there before, and nobody uses what comes of it.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, flags, -1, 0) };
        println!("went on");
    }

    #[test]
    fn what_is_needed_is_allowed() {
        let (status, said) = child("child_does_what_it_may");
        assert!(status.success(), "{said}");
        assert!(said.contains("did what it may"), "{said}");
    }

    #[test]
    fn a_violation_ends_the_process_with_a_message() {
        for (test, call) in [
            ("child_makes_a_socket", libc::SYS_socket),
            ("child_makes_memory_executable", libc::SYS_mmap),
        ] {
            let (status, said) = child(test);
            assert_eq!(status.code(), Some(VIOLATION), "{test}: {said}");
            let message = format!("ended by its sandbox: system call {call}");
            assert!(said.contains(&message), "{test}: {said}");
            assert!(!said.contains("went on"), "{test}: {said}");
        }
        // The C library blocks all signals for that, and the kernel ends the process.
        let (status, said) = child("child_begins_a_program");
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{said}");
    }
}
