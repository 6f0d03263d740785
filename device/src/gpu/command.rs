// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Decoding and checking of submissions and commands.
//!
//! A submission is checked as a whole before any of it runs: one that is malformed changes nothing.

use pinion_abi::{self as abi, VA_END};
use zerocopy::{FromBytes, IntoBytes};

use super::operation::{Atomic, Comparison, Operation, Width, WriteBack};
use super::status::Error;

/// Most commands in one submission.
pub const MAX_BATCH: u32 = 1024;
/// Most bytes in the device-readable part of a submission.
pub const MAX_SUBMISSION: usize =
    size_of::<abi::SubmitHeader>() + MAX_BATCH as usize * size_of::<abi::Command>();

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
    /// Wait for a number in memory.
    SemaphoreWait {
        /// Where it is.
        address: u64,
        /// How wide.
        width: Width,
        /// Which bits of it count.
        mask: u64,
        /// How it has to be.
        comparison: Comparison,
        /// To what.
        operand: u64,
    },
    /// Store a number.
    SemaphoreSignal {
        /// Where.
        address: u64,
        /// How wide.
        width: Width,
        /// Which.
        operand: u64,
    },
    /// Store the time.
    Timestamp {
        /// Where.
        address: u64,
    },
    /// Advance the ring's timeline.
    Fence {
        /// To where.
        value: u64,
        /// Where the timeline is stored then.
        write_back: Option<u64>,
    },
    /// Wait for a timeline.
    FenceWait {
        /// Of which ring.
        ring: u16,
        /// What it has to have reached.
        value: u64,
    },
    /// Say what could not be accessed.
    Prefetch {
        /// From where on.
        address: u64,
        /// How many bytes.
        length: u64,
        /// `ACCESS_*`.
        access: u8,
    },
    /// Follow a linked list.
    Chase(Chase),
    /// A deliberate defect: nothing, without end.
    Hang,
}

/// A linked list to be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chase {
    /// The first node.
    pub head: u64,
    /// How many nodes at most.
    pub repeat: u32,
    /// Where in a node the value is.
    pub value: u32,
    /// Where in a node the pointer to the next one is.
    pub next: u32,
    /// Where the result goes.
    pub result: u64,
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

impl Command {
    /// Checks a command for a device with `rings` rings.
    ///
    /// Each takes the fields that it uses out of the raw command; what is left has to be zero.
    pub fn decode(raw: &abi::Command, rings: u16) -> Result<Self, Error> {
        let mut rest = *raw;
        rest.opcode = 0;
        let command = match raw.opcode {
            abi::COMMAND_NOP => Self::Nop,
            abi::COMMAND_COPY => Self::decode_copy(&mut rest)?,
            abi::COMMAND_FILL => Self::decode_fill(&mut rest)?,
            abi::COMMAND_ATOMIC => Self::decode_atomic(&mut rest)?,
            abi::COMMAND_SEMAPHORE_WAIT | abi::COMMAND_SEMAPHORE_SIGNAL => {
                Self::decode_semaphore(raw.opcode, &mut rest)?
            }
            abi::COMMAND_TIMESTAMP => Self::Timestamp {
                address: take_place(&mut rest.address, 8, 8)?,
            },
            abi::COMMAND_FENCE => Self::decode_fence(&mut rest)?,
            abi::COMMAND_FENCE_WAIT => {
                let ring = u16::try_from(take(&mut rest.span)).map_err(|_| Error::Invalid)?;
                if ring >= rings {
                    return Err(Error::Invalid);
                }
                let value = take(&mut rest.operand);
                Self::FenceWait { ring, value }
            }
            abi::COMMAND_PREFETCH => Self::decode_prefetch(&mut rest)?,
            abi::COMMAND_CHASE => Self::decode_chase(&mut rest)?,
            _ => return Err(Error::Unsupported),
        };
        if rest.as_bytes().iter().all(|&byte| byte == 0) {
            Ok(command)
        } else {
            Err(Error::Invalid)
        }
    }

    fn decode_copy(rest: &mut abi::Command) -> Result<Self, Error> {
        let length = take_length(rest)?;
        Ok(Self::Copy {
            destination: take_place(&mut rest.address, 1, length)?,
            source: take_place(&mut rest.source, 1, length)?,
            length,
        })
    }

    fn decode_fill(rest: &mut abi::Command) -> Result<Self, Error> {
        let width = take(&mut rest.width);
        let pattern = pattern(take(&mut rest.operand), width)?;
        let length = take_length(rest)?;
        check_aligned(length, width.into())?;
        Ok(Self::Fill {
            address: take_place(&mut rest.address, width.into(), length)?,
            length,
            pattern,
        })
    }

    fn decode_atomic(rest: &mut abi::Command) -> Result<Self, Error> {
        let operation = Operation::decode(take(&mut rest.operation))?;
        let width = Width::decode(take(&mut rest.width))?;
        let repeat = take_repeat(rest)?;
        let stride = take(&mut rest.stride);
        check_aligned(stride.into(), width.bytes())?;
        let span = match take(&mut rest.span) {
            0 => repeat,
            span => span,
        };
        // Places that no repeat gets to may lie outside.
        let last = u64::from(span.min(repeat).saturating_sub(1));
        let reach = last
            .checked_mul(stride.into())
            .and_then(|reach| reach.checked_add(width.bytes()))
            .ok_or(Error::BadAddress)?;
        let operand = match operation {
            Operation::Load => 0,
            _ => take_number(&mut rest.operand, width)?,
        };
        let compare = match operation {
            Operation::CompareExchange => take_number(&mut rest.compare, width)?,
            _ => 0,
        };
        let write_back = match take(&mut rest.flags) {
            0 => None,
            abi::COMMAND_WRITE_BACK => Some(WriteBack::Last(take_place(
                &mut rest.source,
                width.bytes(),
                width.bytes(),
            )?)),
            flags if flags == abi::COMMAND_WRITE_BACK | abi::COMMAND_WRITE_BACK_ALL => {
                let length = width.bytes().saturating_mul(repeat.into());
                Some(WriteBack::All(take_place(
                    &mut rest.source,
                    width.bytes(),
                    length,
                )?))
            }
            _ => return Err(Error::Invalid),
        };
        Ok(Self::Atomic(Atomic {
            operation,
            width,
            repeat,
            span,
            stride,
            address: take_place(&mut rest.address, width.bytes(), reach)?,
            operand,
            compare,
            write_back,
        }))
    }

    fn decode_semaphore(opcode: u8, rest: &mut abi::Command) -> Result<Self, Error> {
        let width = Width::decode(take(&mut rest.width))?;
        let address = take_place(&mut rest.address, width.bytes(), width.bytes())?;
        let operand = take_number(&mut rest.operand, width)?;
        if opcode == abi::COMMAND_SEMAPHORE_SIGNAL {
            return Ok(Self::SemaphoreSignal {
                address,
                width,
                operand,
            });
        }
        Ok(Self::SemaphoreWait {
            address,
            width,
            mask: take_number(&mut rest.compare, width)?,
            comparison: Comparison::decode(take(&mut rest.operation))?,
            operand,
        })
    }

    fn decode_fence(rest: &mut abi::Command) -> Result<Self, Error> {
        let write_back = match take(&mut rest.flags) {
            0 => None,
            abi::COMMAND_WRITE_BACK => Some(take_place(&mut rest.source, 8, 8)?),
            _ => return Err(Error::Invalid),
        };
        let value = take(&mut rest.operand);
        Ok(Self::Fence { value, write_back })
    }

    fn decode_prefetch(rest: &mut abi::Command) -> Result<Self, Error> {
        let access = take(&mut rest.operation);
        let known = abi::ACCESS_READ | abi::ACCESS_WRITE | abi::ACCESS_ATOMIC;
        if access == 0 || access & !known != 0 {
            return Err(Error::Invalid);
        }
        let length = take_length(rest)?;
        Ok(Self::Prefetch {
            address: take_place(&mut rest.address, 1, length)?,
            length,
            access,
        })
    }

    fn decode_chase(rest: &mut abi::Command) -> Result<Self, Error> {
        let (value, next) = (take(&mut rest.stride), take(&mut rest.span));
        check_aligned(u64::from(value | next), 8)?;
        Ok(Self::Chase(Chase {
            // Like every pointer behind it, the first is checked when it is followed.
            head: take(&mut rest.address),
            repeat: take_repeat(rest)?,
            value,
            next,
            result: take_place(&mut rest.source, 8, size_of::<abi::ChaseResult>() as u64)?,
        }))
    }
}

/// Takes a field out, and leaves zero.
fn take<T: Default>(field: &mut T) -> T {
    std::mem::take(field)
}

/// Takes an address out: it is aligned to `alignment`, a power of two, and `length` bytes from it on are in the
/// address space.
fn take_place(field: &mut u64, alignment: u64, length: u64) -> Result<u64, Error> {
    let address = take(field);
    check_aligned(address, alignment)?;
    check_span(address, length)?;
    Ok(address)
}

/// Takes a number out that has to fit into `width`.
fn take_number(field: &mut u64, width: Width) -> Result<u64, Error> {
    let number = take(field);
    if number & !width.mask() == 0 {
        Ok(number)
    } else {
        Err(Error::Invalid)
    }
}

fn take_repeat(rest: &mut abi::Command) -> Result<u32, Error> {
    match take(&mut rest.repeat) {
        0 => Err(Error::Invalid),
        repeat => Ok(repeat),
    }
}

fn take_length(rest: &mut abi::Command) -> Result<u64, Error> {
    let length = take(&mut rest.length);
    if length <= abi::MAX_COMMAND_LENGTH {
        Ok(length)
    } else {
        Err(Error::Invalid)
    }
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
    if operand & !mask != 0 {
        return Err(Error::Invalid);
    }
    Ok(operand.wrapping_mul(factor).to_le_bytes())
}

/// What the header of a submission says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submission {
    /// The context its commands run in.
    pub context: u32,
    /// Its sequence number.
    pub sequence: u64,
    /// If its commands are in memory: where, and how many bytes of them.
    pub indirect: Option<(u64, usize)>,
}

impl Submission {
    /// Decodes a submission, and its commands into `commands` if it has them with it. An error comes with the
    /// sequence number, zero if not even that is there.
    pub fn decode(bytes: &[u8], rings: u16, commands: &mut Vec<Command>) -> Result<Self, (u64, Error)> {
        commands.clear();
        let (header, rest) = abi::SubmitHeader::read_from_prefix(bytes).map_err(|_| (0, Error::Invalid))?;
        Self::decode_rest(&header, rest, rings, commands).map_err(|error| (header.sequence, error))
    }

    fn decode_rest(
        header: &abi::SubmitHeader,
        rest: &[u8],
        rings: u16,
        commands: &mut Vec<Command>,
    ) -> Result<Self, Error> {
        if header.flags & !abi::SUBMIT_INDIRECT != 0
            || header.reserved != 0
            || !(1..=MAX_BATCH).contains(&header.count)
        {
            return Err(Error::Invalid);
        }
        let length = size_of::<abi::Command>().saturating_mul(header.count as usize);
        let mut indirect = None;
        if header.flags & abi::SUBMIT_INDIRECT != 0 {
            let abi::Indirect { va } = abi::Indirect::read_from_bytes(rest).map_err(|_| Error::Invalid)?;
            check_aligned(va, 8)?;
            check_span(va, length as u64)?;
            indirect = Some((va, length));
        } else if rest.len() == length {
            decode_commands(rest, rings, commands)?;
        } else {
            return Err(Error::Invalid);
        }
        Ok(Self {
            context: header.context,
            sequence: header.sequence,
            indirect,
        })
    }
}

/// Decodes commands that lie one behind the other, no more than [`MAX_BATCH`].
pub fn decode_commands(bytes: &[u8], rings: u16, commands: &mut Vec<Command>) -> Result<(), Error> {
    commands.clear();
    for raw in bytes
        .chunks_exact(size_of::<abi::Command>())
        .take(MAX_BATCH as usize)
    {
        let raw = abi::Command::read_from_bytes(raw).map_err(|_| Error::Invalid)?;
        commands.push(Command::decode(&raw, rings)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RINGS: u16 = 3;

    fn decode(raw: &abi::Command) -> Result<Command, Error> {
        Command::decode(raw, RINGS)
    }

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
        assert_eq!(decode(&abi::Command::default()), Ok(Command::Nop));
        let copy = abi::Command {
            opcode: abi::COMMAND_COPY,
            address: VA_END - 3,
            source: 1,
            length: 3,
            ..Default::default()
        };
        assert_eq!(
            decode(&copy),
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
            decode(&fill),
            Ok(Command::Fill {
                address: 4,
                length: 6,
                pattern
            })
        );
        let Ok(Command::Atomic(decoded)) = decode(&atomic()) else {
            panic!()
        };
        assert_eq!(decoded.place(7), 0x1000 + 16);
    }

    #[test]
    fn bad_commands_are_refused() {
        type Change = fn(&mut abi::Command);
        let cases: &[(Change, Error)] = &[
            (|c| c.opcode = 11, Error::Unsupported),
            (|c| c.operation = 12, Error::Unsupported),
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
            (|c| (c.flags, c.source) = (4, 0), Error::Invalid),
            (|c| (c.flags, c.source) = (3, VA_END - 72), Error::BadAddress),
            (|c| (c.width, c.operand) = (4, 1 << 32), Error::Invalid),
            (|c| c.operation = abi::ATOMIC_LOAD, Error::Invalid),
        ];
        for (number, (change, expect)) in cases.iter().enumerate() {
            let mut raw = atomic();
            change(&mut raw);
            assert_eq!(decode(&raw), Err(*expect), "case {number}");
        }
        for opcode in [abi::COMMAND_NOP, abi::COMMAND_COPY, abi::COMMAND_FILL] {
            let raw = abi::Command {
                opcode,
                width: u8::from(opcode == 2),
                repeat: 1,
                ..Default::default()
            };
            assert_eq!(decode(&raw), Err(Error::Invalid));
        }
        for (width, operand, length) in [(0, 0, 8), (3, 0, 9), (2, 0x1_0000, 8), (4, 0, 6)] {
            let fill = abi::Command {
                opcode: abi::COMMAND_FILL,
                width,
                operand,
                length,
                ..Default::default()
            };
            assert_eq!(decode(&fill), Err(Error::Invalid));
        }
        let mut copy = abi::Command {
            opcode: abi::COMMAND_COPY,
            ..Default::default()
        };
        copy.length = abi::MAX_COMMAND_LENGTH + 1;
        assert_eq!(decode(&copy), Err(Error::Invalid));
        copy.length = abi::MAX_COMMAND_LENGTH;
        copy.source = VA_END - abi::MAX_COMMAND_LENGTH + 1;
        assert_eq!(decode(&copy), Err(Error::BadAddress));
    }

    #[test]
    fn waiting_and_signalling_commands() {
        let wait = abi::Command {
            opcode: abi::COMMAND_SEMAPHORE_WAIT,
            operation: abi::COMPARE_GREATER_EQUAL,
            width: 4,
            address: 0x1004,
            operand: 7,
            compare: 0xff,
            ..Default::default()
        };
        let decoded = Command::SemaphoreWait {
            address: 0x1004,
            width: Width::W4,
            mask: 0xff,
            comparison: Comparison::GreaterEqual,
            operand: 7,
        };
        assert_eq!(decode(&wait), Ok(decoded));
        assert_eq!(
            decode(&abi::Command { operation: 6, ..wait }),
            Err(Error::Unsupported)
        );
        assert_eq!(
            decode(&abi::Command {
                compare: 1 << 32,
                ..wait
            }),
            Err(Error::Invalid)
        );
        let signal = abi::Command {
            opcode: abi::COMMAND_SEMAPHORE_SIGNAL,
            ..wait
        };
        assert_eq!(decode(&signal), Err(Error::Invalid));
        let fence_wait = |span| abi::Command {
            opcode: abi::COMMAND_FENCE_WAIT,
            operand: 9,
            span,
            ..Default::default()
        };
        assert_eq!(
            decode(&fence_wait(2)),
            Ok(Command::FenceWait { ring: 2, value: 9 })
        );
        assert_eq!(decode(&fence_wait(3)), Err(Error::Invalid));
        assert_eq!(decode(&fence_wait(0x1_0001)), Err(Error::Invalid));
        let prefetch = |operation| abi::Command {
            opcode: abi::COMMAND_PREFETCH,
            operation,
            length: 5,
            ..Default::default()
        };
        assert!(decode(&prefetch(7)).is_ok());
        assert_eq!(decode(&prefetch(0)), Err(Error::Invalid));
        assert_eq!(decode(&prefetch(8)), Err(Error::Invalid));
        let chase = abi::Command {
            opcode: abi::COMMAND_CHASE,
            repeat: 1,
            address: u64::MAX,
            source: VA_END - 24,
            stride: 8,
            ..Default::default()
        };
        assert!(decode(&chase).is_ok());
        assert_eq!(decode(&abi::Command { stride: 4, ..chase }), Err(Error::Invalid));
        assert_eq!(
            decode(&abi::Command {
                source: VA_END - 16,
                ..chase
            }),
            Err(Error::BadAddress)
        );
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
        let mut decode = |bytes: &[u8]| {
            let result = Submission::decode(bytes, RINGS, &mut commands);
            (result, commands.len())
        };
        let decoded = Submission {
            context: 3,
            sequence: 77,
            indirect: None,
        };
        assert_eq!(decode(&good), (Ok(decoded), 2));
        for length in 0..good.len() {
            let sequence = if length < 24 { 0 } else { 77 };
            assert_eq!(decode(&good[..length]).0, Err((sequence, Error::Invalid)));
        }
        let long = [good.as_slice(), &[0]].concat();
        assert!(decode(&long).0.is_err());
        for (flags, reserved, count) in [(1, 0, 2), (2, 0, 2), (0, 1, 2), (0, 0, 0), (0, 0, MAX_BATCH + 1)] {
            let header = abi::SubmitHeader {
                flags,
                reserved,
                count,
                ..header
            };
            let bytes = [header.as_bytes(), command.as_bytes(), command.as_bytes()].concat();
            assert_eq!(decode(&bytes).0, Err((77, Error::Invalid)));
        }
        let indirect = |va: u64| {
            let header = abi::SubmitHeader {
                flags: abi::SUBMIT_INDIRECT,
                ..header
            };
            [header.as_bytes(), abi::Indirect { va }.as_bytes()].concat()
        };
        let decoded = Submission {
            indirect: Some((0x1008, 128)),
            ..decoded
        };
        assert_eq!(decode(&indirect(0x1008)), (Ok(decoded), 0));
        assert_eq!(decode(&indirect(0x1004)).0, Err((77, Error::Invalid)));
        assert_eq!(decode(&indirect(VA_END - 64)).0, Err((77, Error::BadAddress)));
    }
}
