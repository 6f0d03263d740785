// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Decoding and checking of submissions and commands.
//!
//! A submission is checked as a whole before any of it runs: one that is malformed changes nothing.

use pinion_abi::{self as abi, VA_END};
use zerocopy::FromBytes;

use super::status::Error;

/// Most commands in one submission.
pub const MAX_BATCH: u32 = 256;
/// Most bytes in the device-readable part of a submission.
pub const MAX_SUBMISSION: usize =
    size_of::<abi::SubmitHeader>() + MAX_BATCH as usize * size_of::<abi::Command>();

/// Width of an atomic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32 bits.
    W4,
    /// 64 bits.
    W8,
}

impl Width {
    /// The width in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::W4 => 4,
            Self::W8 => 8,
        }
    }
}

/// An operation on a number in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the abi::ATOMIC_* of the same name")]
pub enum Operation {
    Add,
    And,
    Or,
    Xor,
    MinUnsigned,
    MaxUnsigned,
    MinSigned,
    MaxSigned,
    Exchange,
    CompareExchange,
}

impl Operation {
    fn decode(operation: u8) -> Result<Self, Error> {
        Ok(match operation {
            abi::ATOMIC_ADD => Self::Add,
            abi::ATOMIC_AND => Self::And,
            abi::ATOMIC_OR => Self::Or,
            abi::ATOMIC_XOR => Self::Xor,
            abi::ATOMIC_MIN_UNSIGNED => Self::MinUnsigned,
            abi::ATOMIC_MAX_UNSIGNED => Self::MaxUnsigned,
            abi::ATOMIC_MIN_SIGNED => Self::MinSigned,
            abi::ATOMIC_MAX_SIGNED => Self::MaxSigned,
            abi::ATOMIC_EXCHANGE => Self::Exchange,
            abi::ATOMIC_COMPARE_EXCHANGE => Self::CompareExchange,
            _ => return Err(Error::Unsupported),
        })
    }

    /// What the number `old` becomes, as 64 bits.
    pub fn apply64(self, old: u64, operand: u64, compare: u64) -> u64 {
        match self {
            Self::Add => old.wrapping_add(operand),
            Self::And => old & operand,
            Self::Or => old | operand,
            Self::Xor => old ^ operand,
            Self::MinUnsigned => old.min(operand),
            Self::MaxUnsigned => old.max(operand),
            Self::MinSigned => (old as i64).min(operand as i64) as u64,
            Self::MaxSigned => (old as i64).max(operand as i64) as u64,
            Self::Exchange => operand,
            Self::CompareExchange if old == compare => operand,
            Self::CompareExchange => old,
        }
    }

    /// What the number `old` becomes, as 32 bits.
    pub fn apply32(self, old: u32, operand: u32, compare: u32) -> u32 {
        match self {
            Self::MinSigned => (old as i32).min(operand as i32) as u32,
            Self::MaxSigned => (old as i32).max(operand as i32) as u32,
            // The low half of these depends on the low halves only.
            _ => self.apply64(old.into(), operand.into(), compare.into()) as u32,
        }
    }
}

/// `repeat` atomic operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Atomic {
    /// What to do.
    pub operation: Operation,
    /// On how wide a number.
    pub width: Width,
    /// How often; not zero.
    pub repeat: u32,
    /// On how many different places; not zero.
    pub span: u32,
    /// Bytes from one place to the next.
    pub stride: u32,
    /// The first place.
    pub address: u64,
    /// The operand.
    pub operand: u64,
    /// What compare-exchange compares with.
    pub compare: u64,
    /// Where the value found last goes.
    pub write_back: Option<u64>,
}

impl Atomic {
    /// The place of operation number `index`. It is inside the address space: that was checked.
    pub fn place(&self, index: u32) -> u64 {
        let place = u64::from(index.checked_rem(self.span).unwrap_or(0));
        self.address.wrapping_add(place.wrapping_mul(self.stride.into()))
    }
}

/// A command that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing.
    Nop,
    /// A copy.
    Copy {
        /// To where.
        destination: u64,
        /// From where.
        source: u64,
        /// How many bytes.
        length: u64,
    },
    /// A fill.
    Fill {
        /// From where on.
        address: u64,
        /// How many bytes.
        length: u64,
        /// With what: the pattern repeated to eight bytes.
        pattern: [u8; 8],
    },
    /// Atomic operations.
    Atomic(Atomic),
}

/// Checks that `length` bytes at `address` are in the address space.
fn check_span(address: u64, length: u64) -> Result<(), Error> {
    match address.checked_add(length) {
        Some(end) if end <= VA_END => Ok(()),
        _ => Err(Error::BadAddress),
    }
}

/// Checks that `address` is aligned to `width`, a power of two.
fn check_aligned(address: u64, width: u64) -> Result<(), Error> {
    if address & width.wrapping_sub(1) == 0 {
        Ok(())
    } else {
        Err(Error::Invalid)
    }
}

fn check_zero(fields: &[u64]) -> Result<(), Error> {
    if fields.iter().all(|&field| field == 0) {
        Ok(())
    } else {
        Err(Error::Invalid)
    }
}

impl Command {
    /// Checks a command.
    pub fn decode(raw: &abi::Command) -> Result<Self, Error> {
        check_zero(&[raw.reserved])?;
        match raw.opcode {
            abi::COMMAND_NOP => {
                check_zero(&[raw.address, raw.source, raw.length, raw.operand, raw.width.into()])?;
                check_not_atomic(raw)?;
                Ok(Self::Nop)
            }
            abi::COMMAND_COPY => {
                check_zero(&[raw.operand, raw.width.into()])?;
                check_not_atomic(raw)?;
                check_length(raw.length)?;
                check_span(raw.address, raw.length)?;
                check_span(raw.source, raw.length)?;
                Ok(Self::Copy {
                    destination: raw.address,
                    source: raw.source,
                    length: raw.length,
                })
            }
            abi::COMMAND_FILL => {
                check_zero(&[raw.source])?;
                check_not_atomic(raw)?;
                let pattern = pattern(raw.operand, raw.width)?;
                check_length(raw.length)?;
                check_aligned(raw.address | raw.length, raw.width.into())?;
                check_span(raw.address, raw.length)?;
                Ok(Self::Fill {
                    address: raw.address,
                    length: raw.length,
                    pattern,
                })
            }
            abi::COMMAND_ATOMIC => Self::decode_atomic(raw).map(Self::Atomic),
            _ => Err(Error::Unsupported),
        }
    }

    fn decode_atomic(raw: &abi::Command) -> Result<Atomic, Error> {
        let operation = Operation::decode(raw.operation)?;
        let width = match raw.width {
            4 => Width::W4,
            8 => Width::W8,
            _ => return Err(Error::Invalid),
        };
        check_zero(&[raw.length, u64::from(raw.flags & !abi::COMMAND_WRITE_BACK)])?;
        if operation != Operation::CompareExchange {
            check_zero(&[raw.compare])?;
        }
        if width == Width::W4 {
            check_zero(&[raw.operand >> 32, raw.compare >> 32])?;
        }
        if raw.repeat == 0 {
            return Err(Error::Invalid);
        }
        check_aligned(raw.address | u64::from(raw.stride), width.bytes())?;
        let span = if raw.span == 0 { raw.repeat } else { raw.span };
        // Places that no repeat gets to may lie outside.
        let last = u64::from(span.min(raw.repeat).saturating_sub(1));
        let reach = last
            .checked_mul(raw.stride.into())
            .and_then(|reach| reach.checked_add(width.bytes()))
            .ok_or(Error::BadAddress)?;
        check_span(raw.address, reach)?;
        let write_back = if raw.flags & abi::COMMAND_WRITE_BACK != 0 {
            check_aligned(raw.source, width.bytes())?;
            check_span(raw.source, width.bytes())?;
            Some(raw.source)
        } else {
            check_zero(&[raw.source])?;
            None
        };
        Ok(Atomic {
            operation,
            width,
            repeat: raw.repeat,
            span,
            stride: raw.stride,
            address: raw.address,
            operand: raw.operand,
            compare: raw.compare,
            write_back,
        })
    }

    /// A rough measure of how long it takes, in bytes moved.
    pub fn cost(&self) -> u64 {
        match self {
            Self::Nop => 0,
            Self::Copy { length, .. } | Self::Fill { length, .. } => *length,
            Self::Atomic(atomic) => u64::from(atomic.repeat).saturating_mul(16),
        }
    }
}

fn check_length(length: u64) -> Result<(), Error> {
    if length <= abi::MAX_COMMAND_LENGTH {
        Ok(())
    } else {
        Err(Error::Invalid)
    }
}

/// The fields that only ATOMIC has are zero.
fn check_not_atomic(raw: &abi::Command) -> Result<(), Error> {
    check_zero(&[
        raw.operation.into(),
        raw.flags.into(),
        raw.repeat.into(),
        raw.compare,
        raw.stride.into(),
        raw.span.into(),
    ])
}

/// The low `width` bytes of `operand` over and over; what is above them has to be zero.
fn pattern(operand: u64, width: u8) -> Result<[u8; 8], Error> {
    let (mask, factor) = match width {
        1 => (0xff, 0x0101_0101_0101_0101),
        2 => (0xffff, 0x0001_0001_0001_0001),
        4 => (0xffff_ffff, 0x0000_0001_0000_0001),
        8 => (u64::MAX, 1_u64),
        _ => return Err(Error::Invalid),
    };
    check_zero(&[operand & !mask])?;
    Ok(operand.wrapping_mul(factor).to_le_bytes())
}

/// What the header of a submission says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submission {
    /// The context its commands run in.
    pub context: u32,
    /// Its sequence number.
    pub sequence: u64,
}

/// Decodes a submission into `commands`. An error comes with the sequence number, zero if not even
/// that is there.
pub fn decode_submission(bytes: &[u8], commands: &mut Vec<Command>) -> Result<Submission, (u64, Error)> {
    commands.clear();
    let (header, rest) = abi::SubmitHeader::read_from_prefix(bytes).map_err(|_| (0, Error::Invalid))?;
    let fail = |error| (header.sequence, error);
    if header.flags != 0 || header.reserved != 0 || header.count == 0 || header.count > MAX_BATCH {
        return Err(fail(Error::Invalid));
    }
    if rest.len() != size_of::<abi::Command>().saturating_mul(header.count as usize) {
        return Err(fail(Error::Invalid));
    }
    for raw in rest.chunks_exact(size_of::<abi::Command>()) {
        let raw = abi::Command::read_from_bytes(raw).map_err(|_| fail(Error::Invalid))?;
        commands.push(Command::decode(&raw).map_err(fail)?);
    }
    Ok(Submission {
        context: header.context,
        sequence: header.sequence,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn atomic() -> abi::Command {
        abi::Command {
            opcode: abi::COMMAND_ATOMIC,
            operation: abi::ATOMIC_ADD,
            width: 8,
            repeat: 10,
            address: 0x1000,
            operand: 1,
            stride: 8,
            span: 5,
            ..Default::default()
        }
    }

    #[test]
    fn good_commands_are_taken() {
        assert_eq!(Command::decode(&abi::Command::default()), Ok(Command::Nop));
        let copy = abi::Command {
            opcode: abi::COMMAND_COPY,
            address: VA_END - 3,
            source: 1,
            length: 3,
            ..Default::default()
        };
        assert_eq!(
            Command::decode(&copy),
            Ok(Command::Copy {
                destination: VA_END - 3,
                source: 1,
                length: 3
            })
        );
        let fill = abi::Command {
            opcode: abi::COMMAND_FILL,
            width: 2,
            address: 4,
            length: 6,
            operand: 0xabcd,
            ..Default::default()
        };
        let pattern = [0xcd, 0xab, 0xcd, 0xab, 0xcd, 0xab, 0xcd, 0xab];
        assert_eq!(
            Command::decode(&fill),
            Ok(Command::Fill {
                address: 4,
                length: 6,
                pattern
            })
        );
        let Ok(Command::Atomic(decoded)) = Command::decode(&atomic()) else {
            panic!()
        };
        assert_eq!(decoded.place(7), 0x1000 + 16);
    }

    #[test]
    fn bad_commands_are_refused() {
        type Change = fn(&mut abi::Command);
        let cases: &[(Change, Error)] = &[
            (|c| c.opcode = 4, Error::Unsupported),
            (|c| c.operation = 10, Error::Unsupported),
            (|c| c.width = 3, Error::Invalid),
            (|c| c.flags = 2, Error::Invalid),
            (|c| c.repeat = 0, Error::Invalid),
            (|c| c.address = 0x1004, Error::Invalid),
            (|c| c.stride = 4, Error::Invalid),
            (|c| c.address = VA_END, Error::BadAddress),
            (|c| c.address = VA_END - 32, Error::BadAddress),
            (|c| c.address = u64::MAX - 7, Error::BadAddress),
            (
                |c| (c.repeat, c.span, c.stride) = (u32::MAX, 0, u32::MAX - 7),
                Error::BadAddress,
            ),
            (|c| c.source = 8, Error::Invalid),
            (|c| c.length = 8, Error::Invalid),
            (|c| c.compare = 8, Error::Invalid),
            (|c| c.reserved = 8, Error::Invalid),
            (|c| (c.flags, c.source) = (1, 4), Error::Invalid),
            (|c| (c.flags, c.source) = (1, VA_END), Error::BadAddress),
            (|c| (c.width, c.operand) = (4, 1 << 32), Error::Invalid),
        ];
        for (number, (change, expect)) in cases.iter().enumerate() {
            let mut raw = atomic();
            change(&mut raw);
            assert_eq!(Command::decode(&raw), Err(*expect), "case {number}");
        }
        for opcode in [abi::COMMAND_NOP, abi::COMMAND_COPY, abi::COMMAND_FILL] {
            let raw = abi::Command {
                opcode,
                width: u8::from(opcode == 2),
                repeat: 1,
                ..Default::default()
            };
            assert_eq!(Command::decode(&raw), Err(Error::Invalid));
        }
        let mut copy = abi::Command {
            opcode: abi::COMMAND_COPY,
            ..Default::default()
        };
        copy.length = abi::MAX_COMMAND_LENGTH + 1;
        assert_eq!(Command::decode(&copy), Err(Error::Invalid));
        copy.length = abi::MAX_COMMAND_LENGTH;
        copy.source = VA_END - abi::MAX_COMMAND_LENGTH + 1;
        assert_eq!(Command::decode(&copy), Err(Error::BadAddress));
    }

    #[test]
    fn operations() {
        use Operation::*;
        let minus_one = u64::MAX;
        assert_eq!(Add.apply64(minus_one, 2, 0), 1);
        assert_eq!(MinUnsigned.apply64(minus_one, 2, 0), 2);
        assert_eq!(MinSigned.apply64(minus_one, 2, 0), minus_one);
        assert_eq!(MaxSigned.apply32(u32::MAX, 2, 0), 2);
        assert_eq!(MinSigned.apply32(u32::MAX, 2, 0), u32::MAX);
        assert_eq!(Add.apply32(u32::MAX, 2, 0), 1);
        assert_eq!(CompareExchange.apply32(5, 9, 5), 9);
        assert_eq!(CompareExchange.apply64(5, 9, 6), 5);
        assert_eq!(Exchange.apply64(5, 9, 6), 9);
    }

    #[test]
    fn submissions() {
        let header = abi::SubmitHeader {
            context: 3,
            count: 2,
            sequence: 77,
            flags: 0,
            reserved: 0,
        };
        let command = atomic();
        let good = [header.as_bytes(), command.as_bytes(), command.as_bytes()].concat();
        let mut commands = Vec::new();
        assert_eq!(
            decode_submission(&good, &mut commands),
            Ok(Submission {
                context: 3,
                sequence: 77
            })
        );
        assert_eq!(commands.len(), 2);
        for length in 0..good.len() {
            let (sequence, error) = decode_submission(&good[..length], &mut commands).unwrap_err();
            assert_eq!(error, Error::Invalid);
            assert_eq!(sequence, if length < 24 { 0 } else { 77 });
        }
        let long = [good.as_slice(), &[0]].concat();
        assert!(decode_submission(&long, &mut commands).is_err());
        for (flags, reserved, count) in [(1, 0, 2), (0, 1, 2), (0, 0, 0), (0, 0, MAX_BATCH + 1)] {
            let header = abi::SubmitHeader {
                flags,
                reserved,
                count,
                ..header
            };
            let bytes = [header.as_bytes(), command.as_bytes(), command.as_bytes()].concat();
            assert_eq!(
                decode_submission(&bytes, &mut commands),
                Err((77, Error::Invalid))
            );
        }
    }
}
