// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sizes and times as people write them.

use std::time::Duration;

/// A number of bytes: digits, and K, M, G or T for powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    // `parse` alone would let a plus sign through.
    let number = Some(digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    number
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "it has to be a number, with K, M, G or T if you like".into())
}

/// `bytes` with the largest suffix that leaves a whole number.
pub(crate) fn show_size(bytes: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// A time: a decimal number and ns, us, ms, s (if nothing is said) or m.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let units: [(&str, u64); 5] = [
        // Longer ones first: "ms" ends with "s" too.
        ("ns", 1),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
    ];
    let (number, unit) = units
        .into_iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .unwrap_or((text, 1_000_000_000));
    nanoseconds(number, unit)
        .map(Duration::from_nanos)
        .ok_or_else(|| "it has to be a number with ns, us, ms, s or m, such as 500ms".into())
}

/// `number`, a decimal one, times `unit`; exact, what is below a nanosecond is cut off.
fn nanoseconds(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let mut nanoseconds = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    let mut place = unit;
    for digit in fraction.bytes().take(12) {
        place /= 10;
        nanoseconds = nanoseconds.checked_add(place.checked_mul(u64::from(digit - b'0'))?)?;
    }
    Some(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("64M", 64 << 20),
            ("1T", 1 << 40),
            ("1g", 1 << 30),
            ("4k", 4096),
            ("1048576", 1 << 20),
            ("0", 0),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "M",
            "-1M",
            "+1M",
            "99999999999T",
            "1MiB",
            "1.5G",
            "é",
            "64é",
            " 1",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(show_size(256 << 20), "256M");
        assert_eq!(show_size(1 << 40), "1T");
        assert_eq!(show_size(4097), "4097");
        assert_eq!(show_size(0), "0");
    }

    #[test]
    fn durations() {
        for (text, nanoseconds) in [
            ("10", 10_000_000_000),
            ("2.5", 2_500_000_000),
            ("0.001s", 1_000_000),
            ("500ms", 500_000_000),
            ("5us", 5_000),
            ("1.5us", 1_500),
            ("7ns", 7),
            ("2m", 120_000_000_000),
            ("0", 0),
            ("1.0000000001", 1_000_000_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_nanos(nanoseconds)), "{text}");
        }
        for bad in [
            "",
            "s",
            "ms",
            ".5",
            "5.",
            "-1s",
            "1e3",
            "nan",
            "inf",
            "1 s",
            "1h",
            "1.2.3",
            "99999999999999999999",
            "99999999999999m",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
