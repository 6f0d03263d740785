// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `src/uapi.rs` is what `guest-driver/uapi/pinion.h` says, and commands are what the device takes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use pinion_abi as wire;
use pinion_client::uapi::{self, Argument};

/// C expressions and their values on the Rust side.
fn expected() -> BTreeMap<String, u64> {
    let mut values = BTreeMap::new();
    macro_rules! structure {
        ($c:literal, $type:ty, $($field:ident)*) => {
            values.insert(format!("sizeof(struct {})", $c), size_of::<$type>() as u64);
            $(values.insert(
                format!("offsetof(struct {}, {})", $c, stringify!($field)),
                offset_of!($type, $field) as u64,
            );)*
        };
    }
    structure!("pinion_info", uapi::Info, size flags version rings max_batch pin_method vram_size max_submissions
        max_commands atomics locations aperture_size);
    structure!("pinion_command", uapi::Command, opcode operation width flags repeat address source length operand
        compare stride span reserved);
    structure!("pinion_chase_result", uapi::ChaseResult, pointer sum visited);
    structure!("pinion_fence", uapi::Fence, kind id sequence);
    structure!("pinion_submit", uapi::Submit, size flags ring count commands fences fence_count eventfd fence reserved
        sequence);
    structure!("pinion_wait_entry", uapi::WaitEntry, ring status sequence fault_address repeats executed reserved);
    structure!("pinion_wait", uapi::Wait, size flags entries count ended timeout_ns);
    structure!("pinion_advise", uapi::Advise, size flags address length advice value);
    structure!("pinion_prefetch", uapi::Prefetch, size flags address length location reserved);
    structure!("pinion_discard", uapi::Discard, size flags address length);
    structure!("pinion_query", uapi::Query, size flags address count pages);
    structure!("pinion_page", uapi::Page, state rights page_size reserved pfn);
    macro_rules! numbers {
        ($($name:ident)*) => { $(values.insert(format!("PINION_{}", stringify!($name)), u64::from(uapi::$name));)* };
    }
    numbers!(IOCTL_BASE VERSION PIN_METHOD_MIGRATE_PFN PIN_METHOD_TAKEOVER COMMAND_NOP COMMAND_COPY COMMAND_FILL COMMAND_ATOMIC
        COMMAND_SEMAPHORE_WAIT COMMAND_SEMAPHORE_SIGNAL COMMAND_TIMESTAMP COMMAND_PREFETCH COMMAND_CHASE
        COMMAND_WRITE_BACK COMMAND_WRITE_BACK_ALL ATOMIC_ADD ATOMIC_AND ATOMIC_OR ATOMIC_XOR ATOMIC_MIN_UNSIGNED
        ATOMIC_MAX_UNSIGNED ATOMIC_MIN_SIGNED ATOMIC_MAX_SIGNED ATOMIC_EXCHANGE ATOMIC_COMPARE_EXCHANGE ATOMIC_LOAD
        ATOMIC_STORE COMPARE_EQUAL COMPARE_NOT_EQUAL COMPARE_LESS COMPARE_LESS_EQUAL COMPARE_GREATER
        COMPARE_GREATER_EQUAL ACCESS_READ ACCESS_WRITE ACCESS_ATOMIC FENCE_SEQUENCE FENCE_DESCRIPTOR SUBMIT_EVENTFD
        SUBMIT_FENCE MAX_FENCES WAIT_ANY WAIT_ABSOLUTE STATUS_OK STATUS_INVALID STATUS_UNSUPPORTED STATUS_BAD_ADDRESS
        STATUS_BUS_ERROR STATUS_CONTEXT_ERROR STATUS_FAULT STATUS_RESET STATUS_HUNG STATUS_DEVICE_LOST
        STATUS_NOT_EXCLUSIVE STATUS_NO_MEMORY STATUS_PENDING ADVISE_ATOMICS ADVISE_LOCATION ATOMICS_AUTO ATOMICS_PIN
        ATOMICS_EXCLUSIVE ATOMICS_MIGRATE ATOMICS_UNPROTECTED LOCATION_NONE LOCATION_SYSTEM LOCATION_VRAM LOCATION_APERTURE PAGE_CPU
        PAGE_MIRRORED PAGE_VRAM PAGE_PINNED PAGE_EXCLUSIVE PAGE_COHERENT RIGHT_READ RIGHT_WRITE RIGHT_ATOMIC);
    values.insert("PINION_QUERY_MAX".to_owned(), uapi::QUERY_MAX as u64);
    for (name, number) in [
        (uapi::Info::NAME, uapi::Info::NUMBER),
        (uapi::Submit::NAME, uapi::Submit::NUMBER),
        (uapi::Wait::NAME, uapi::Wait::NUMBER),
        (uapi::Advise::NAME, uapi::Advise::NUMBER),
        (uapi::Query::NAME, uapi::Query::NUMBER),
        (uapi::Prefetch::NAME, uapi::Prefetch::NUMBER),
        (uapi::Discard::NAME, uapi::Discard::NUMBER),
    ] {
        values.insert(name.to_owned(), u64::from(number));
    }
    values
}

/// Names of all constants with a value that the header defines.
fn constants(header: &str) -> impl Iterator<Item = &str> {
    header
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_once(char::is_whitespace))
        .filter(|(_, value)| !value.trim().is_empty())
        .map(|(name, _)| name)
}

#[test]
fn rust_and_c_agree() {
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/../uapi/pinion.h");
    let expected = expected();

    let text = std::fs::read_to_string(header).unwrap();
    let missing: Vec<_> = constants(&text)
        .filter(|name| !expected.contains_key(*name))
        .collect();
    assert!(
        missing.is_empty(),
        "not in uapi.rs, or not in this test: {missing:?}"
    );

    let mut source =
        format!("#include <stddef.h>\n#include <stdio.h>\n#include \"{header}\"\nint main(void)\n{{\n");
    for expression in expected.keys() {
        writeln!(
            source,
            "\tprintf(\"%llu %s\\n\", (unsigned long long)({expression}), \"{expression}\");"
        )
        .unwrap();
    }
    source.push_str("\treturn 0;\n}\n");

    let directory = tempfile::tempdir().unwrap();
    let (c, program) = (directory.path().join("header.c"), directory.path().join("header"));
    std::fs::write(&c, source).unwrap();
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let status = Command::new(compiler)
        .args(["-Wall", "-Werror", "-o"])
        .arg(&program)
        .arg(&c)
        .status();
    assert!(
        status.expect("a C compiler (cc, or $CC)").success(),
        "the header does not compile"
    );

    let output = Command::new(&program).output().unwrap();
    let found: BTreeMap<_, _> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(value, expression)| (expression.to_owned(), value.parse::<u64>().unwrap()))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn a_command_is_the_devices_command() {
    assert_eq!(size_of::<uapi::Command>(), size_of::<wire::Command>());
    macro_rules! same_place {
        ($($field:ident)*) => { $(
            assert_eq!(offset_of!(uapi::Command, $field), offset_of!(wire::Command, $field), stringify!($field));
        )* };
    }
    same_place!(opcode operation width flags repeat address source length operand compare stride span reserved);

    macro_rules! same_number {
        ($($name:ident)*) => { $(assert_eq!(uapi::$name, wire::$name, stringify!($name));)* };
    }
    same_number!(COMMAND_NOP COMMAND_COPY COMMAND_FILL COMMAND_ATOMIC COMMAND_SEMAPHORE_WAIT COMMAND_SEMAPHORE_SIGNAL
        COMMAND_TIMESTAMP COMMAND_PREFETCH COMMAND_CHASE COMMAND_WRITE_BACK COMMAND_WRITE_BACK_ALL ATOMIC_ADD ATOMIC_AND
        ATOMIC_OR ATOMIC_XOR ATOMIC_MIN_UNSIGNED ATOMIC_MAX_UNSIGNED ATOMIC_MIN_SIGNED ATOMIC_MAX_SIGNED ATOMIC_EXCHANGE
        ATOMIC_COMPARE_EXCHANGE ATOMIC_LOAD ATOMIC_STORE COMPARE_EQUAL COMPARE_NOT_EQUAL COMPARE_LESS
        COMPARE_LESS_EQUAL COMPARE_GREATER COMPARE_GREATER_EQUAL ACCESS_READ ACCESS_WRITE ACCESS_ATOMIC STATUS_OK
        STATUS_INVALID STATUS_UNSUPPORTED STATUS_BAD_ADDRESS STATUS_BUS_ERROR STATUS_CONTEXT_ERROR STATUS_RESET
        STATUS_HUNG);
}
