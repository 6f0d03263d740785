// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks that end a function with an error, which says where and what was found.

/// Fails unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($format:tt)+) => {
        if !$condition {
            return Err(format!("{} (line {})", format_args!($($format)+), line!()).into());
        }
    };
}

/// Fails unless the two are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($format:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) if found == expected => {}
            (found, expected) => return Err(format!(
                "{}: {found:x?} where {expected:x?} is expected (line {})",
                format_args!($($format)+),
                line!()
            ).into()),
        }
    };
}
