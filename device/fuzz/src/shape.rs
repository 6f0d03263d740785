// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Requests and submissions that are nearly right: made of the same bytes as everything else, but so that most of them get
//! past the first check.

use arbitrary::{Arbitrary, Result, Unstructured};
use pinion_abi as abi;
use zerocopy::{FromBytes, IntoBytes};

/// Contexts that are used.
pub const CONTEXTS: u32 = 4;
/// Size of the memory behind page table entries, system memory and VRAM alike.
pub const MEMORY: u64 = 4 << 20;

/// A number of a context; mostly one that may exist.
pub fn context(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 32)? {
        u.arbitrary()
    } else {
        Ok(u.int_in_range(0..=CONTEXTS - 1)?)
    }
}

/// A virtual address: mostly one of those, some hundred pages in all, that have a chance to be mapped.
pub fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    if u.ratio(1, 24)? {
        return u.arbitrary();
    }
    let base = *u.choose(&[
        0,
        abi::LARGE_PAGE_SIZE,
        0x1234_5000_0000,
        abi::VA_END - abi::LARGE_PAGE_SIZE,
    ])?;
    let page: u8 = u.arbitrary()?;
    let offset = *u.choose(&[0, 0, 0, 8, 0x800, 0xff8, 0xffc, 0xfff, 3])?;
    Ok(base + u64::from(page) * abi::PAGE_SIZE + offset)
}

/// A length in bytes.
pub fn length(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=9)? {
        0 => u.arbitrary()?,
        1 => u.arbitrary::<u32>()?.into(),
        2 | 3 => u64::from(u.arbitrary::<u8>()?) * abi::PAGE_SIZE,
        4 | 5 => u.arbitrary::<u16>()?.into(),
        _ => u64::from(u.arbitrary::<u8>()?) * 8,
    })
}

/// A page table entry.
pub fn entry(u: &mut Unstructured<'_>) -> Result<u64> {
    if u.ratio(1, 32)? {
        return u.arbitrary();
    }
    let rights = *u.choose(&[0xf, 0xf, 0xf, 0x7, 0x3, 0x5, 0x9, 0x1, 0x0, 0x2f])?;
    let vram = if u.arbitrary()? { abi::PTE_VRAM } else { 0 };
    // Some of them behind the end.
    let page = u.int_in_range(0..=MEMORY / abi::PAGE_SIZE + 1)?;
    Ok(rights | vram | (page * abi::PAGE_SIZE))
}

/// A command.
pub fn command(u: &mut Unstructured<'_>) -> Result<abi::Command> {
    let mut command = abi::Command {
        opcode: u.int_in_range(0..=abi::COMMAND_CHASE)?,
        ..Default::default()
    };
    let width = |u: &mut Unstructured<'_>| -> Result<u8> { Ok(*u.choose(&[8, 8, 4])?) };
    match command.opcode {
        abi::COMMAND_COPY => {
            command.address = address(u)?;
            command.source = address(u)?;
            command.length = length(u)?;
        }
        abi::COMMAND_FILL => {
            command.width = *u.choose(&[1, 2, 4, 8])?;
            command.operand = u.arbitrary::<u8>()?.into();
            command.address = address(u)? & !7;
            command.length = length(u)? & !7;
        }
        abi::COMMAND_ATOMIC => {
            command.operation = u.int_in_range(0..=abi::ATOMIC_STORE)?;
            command.width = width(u)?;
            command.repeat = if u.ratio(1, 16)? {
                u.arbitrary()?
            } else {
                u.arbitrary::<u8>()?.into()
            };
            command.address = address(u)? & !7;
            command.stride = *u.choose(&[0, 8, 8, 64, 4096, 0xffff_fff8])?;
            command.span = u.arbitrary::<u8>()?.into();
            command.operand = u.arbitrary::<u16>()?.into();
            if command.operation == abi::ATOMIC_COMPARE_EXCHANGE {
                command.compare = u.arbitrary::<u8>()?.into();
            } else if command.operation == abi::ATOMIC_LOAD {
                command.operand = 0;
            }
            command.flags = *u.choose(&[0, 0, 1, 3])?;
            if command.flags != 0 {
                command.source = address(u)? & !7;
            }
        }
        abi::COMMAND_SEMAPHORE_WAIT => {
            command.operation = u.int_in_range(0..=abi::COMPARE_GREATER_EQUAL)?;
            command.width = width(u)?;
            command.compare = *u.choose(&[0, 0xff, 0xffff_ffff])?;
            command.operand = u.arbitrary::<u8>()?.into();
            command.address = address(u)? & !7;
        }
        abi::COMMAND_SEMAPHORE_SIGNAL => {
            command.width = width(u)?;
            command.operand = u.arbitrary::<u8>()?.into();
            command.address = address(u)? & !7;
        }
        abi::COMMAND_TIMESTAMP => command.address = address(u)? & !7,
        abi::COMMAND_FENCE => {
            command.operand = u.arbitrary::<u16>()?.into();
            command.flags = u.int_in_range(0..=1)?;
            if command.flags != 0 {
                command.source = address(u)? & !7;
            }
        }
        abi::COMMAND_FENCE_WAIT => {
            command.span = u.int_in_range(0..=3)?;
            command.operand = u.arbitrary::<u16>()?.into();
        }
        abi::COMMAND_PREFETCH => {
            command.operation = u.int_in_range(1..=7)?;
            command.address = address(u)?;
            command.length = length(u)?;
        }
        abi::COMMAND_CHASE => {
            command.repeat = u.arbitrary::<u16>()?.into();
            command.address = address(u)? & !7;
            command.stride = *u.choose(&[0, 8, 0xffff_fff8])?;
            command.span = *u.choose(&[8, 0, 4096])?;
            command.source = address(u)? & !7;
        }
        _ => {}
    }
    if u.ratio(1, 24)? {
        // One byte of it is something else.
        let mut bytes = [0; size_of::<abi::Command>()];
        bytes.copy_from_slice(command.as_bytes());
        let at = u.choose_index(bytes.len())?;
        bytes[at] = u.arbitrary()?;
        command = abi::Command::read_from_bytes(&bytes).unwrap_or(command);
    }
    Ok(command)
}

/// A submission.
pub fn submission(u: &mut Unstructured<'_>, sequence: u64) -> Result<Vec<u8>> {
    if u.ratio(1, 24)? {
        return Ok(u.arbitrary::<&[u8]>()?.to_vec());
    }
    let context = context(u)?;
    let indirect = u.ratio(1, 8)?;
    let count = u.int_in_range(1..=6_u32)?;
    let header = abi::SubmitHeader {
        context,
        count,
        sequence,
        flags: if indirect { abi::SUBMIT_INDIRECT } else { 0 },
        reserved: 0,
    };
    let mut bytes = header.as_bytes().to_vec();
    if indirect {
        let va = address(u)? & !7;
        bytes.extend_from_slice(abi::Indirect { va }.as_bytes());
    } else {
        for _ in 0..count {
            bytes.extend_from_slice(command(u)?.as_bytes());
        }
    }
    Ok(bytes)
}

/// A request of the control queue; faults are numbered up to `faults`.
pub fn request(u: &mut Unstructured<'_>, faults: u64) -> Result<Vec<u8>> {
    if u.ratio(1, 24)? {
        return Ok(u.arbitrary::<&[u8]>()?.to_vec());
    }
    let opcode = *u.choose(&[
        abi::REQUEST_PING,
        abi::REQUEST_CONTEXT_CREATE,
        abi::REQUEST_CONTEXT_CREATE,
        abi::REQUEST_CONTEXT_CREATE,
        abi::REQUEST_CONTEXT_DESTROY,
        abi::REQUEST_CONTEXT_RESET,
        abi::REQUEST_DEVICE_RESET,
        abi::REQUEST_MAP,
        abi::REQUEST_MAP,
        abi::REQUEST_MAP,
        abi::REQUEST_MAP,
        abi::REQUEST_REPLAY,
        abi::REQUEST_REPLAY,
        abi::REQUEST_REPLAY,
        abi::REQUEST_CANCEL,
        abi::REQUEST_QUERY,
        abi::REQUEST_COUNT,
    ])?;
    let mut header = abi::RequestHeader {
        opcode,
        flags: 0,
        context: match opcode {
            abi::REQUEST_PING | abi::REQUEST_DEVICE_RESET => 0,
            _ => context(u)?,
        },
    };
    Ok(match opcode {
        abi::REQUEST_MAP => {
            header.flags = u.ratio(1, 6)?.into();
            let mut va = address(u)? & !(abi::PAGE_SIZE - 1);
            let count = if u.ratio(1, 8)? {
                u.int_in_range(1..=512)?
            } else {
                u.int_in_range(1..=20)?
            };
            let mut entries = Vec::new();
            if header.flags != 0 {
                va &= !(abi::LARGE_PAGE_SIZE - 1);
            }
            if u.arbitrary()? {
                // Pages that follow each other in memory too.
                let first = entry(u)?;
                entries.extend((0..count as u64).map(|n| first.wrapping_add(n * abi::PAGE_SIZE)));
            } else {
                for _ in 0..count {
                    entries.push(entry(u)?);
                }
            }
            if header.flags != 0 {
                for entry in &mut entries {
                    *entry &= !(abi::PTE_ADDRESS & (abi::LARGE_PAGE_SIZE - 1));
                }
            }
            let map = abi::MapRequest {
                header,
                va,
                count,
                reserved: 0,
            };
            [map.as_bytes(), entries.as_bytes()].concat()
        }
        abi::REQUEST_REPLAY | abi::REQUEST_CANCEL => {
            let fault = if u.ratio(1, 16)? {
                u.arbitrary()?
            } else {
                u.int_in_range(0..=faults)?
            };
            abi::FaultRequest { header, fault }.as_bytes().to_vec()
        }
        abi::REQUEST_QUERY => {
            let what = u.int_in_range(0..=6)?;
            let about_context = (abi::QUERY_CONTEXT..=abi::QUERY_COUNT).contains(&what);
            if !about_context {
                header.context = 0;
            }
            let query = abi::QueryRequest {
                header,
                what,
                index: if what == abi::QUERY_TIMELINE {
                    u.int_in_range(0..=17)?
                } else {
                    0
                },
                va: if what >= abi::QUERY_ENTRY { address(u)? } else { 0 },
            };
            query.as_bytes().to_vec()
        }
        abi::REQUEST_COUNT => {
            let large = |number: u64| number & !(abi::LARGE_PAGE_SIZE - 1);
            let threshold = u.arbitrary::<u8>()?.into();
            let count = abi::CountRequest {
                header,
                va: large(address(u)?),
                length: u.int_in_range(0..=4)? * abi::LARGE_PAGE_SIZE,
                threshold,
                targets: if threshold == 0 { 0 } else { u.int_in_range(1..=3)? },
                reserved: 0,
            };
            count.as_bytes().to_vec()
        }
        _ => header.as_bytes().to_vec(),
    })
}

/// A request of the invalidation queue.
pub fn invalidation(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    if u.ratio(1, 24)? {
        return Ok(u.arbitrary::<&[u8]>()?.to_vec());
    }
    let everything = u.ratio(1, 8)?;
    let page = |number: u64| number & !(abi::PAGE_SIZE - 1);
    let request = abi::InvalidateRequest {
        header: abi::RequestHeader {
            opcode: abi::REQUEST_INVALIDATE,
            flags: if everything {
                abi::INVALIDATE_EVERYTHING
            } else {
                u.int_in_range(0..=1)?
            },
            context: if everything { 0 } else { context(u)? },
        },
        va: if everything { 0 } else { page(address(u)?) },
        length: if everything { 0 } else { page(length(u)?) },
    };
    Ok(request.as_bytes().to_vec())
}

/// A choice with these odds.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Odds(u8);

impl Odds {
    /// A number below the sum of `weights`, as the index of the weight that it falls under.
    pub fn of(self, weights: &[u8]) -> usize {
        let sum: u32 = weights.iter().map(|&weight| u32::from(weight)).sum();
        let mut number = u32::from(self.0) % sum.max(1);
        for (index, &weight) in weights.iter().enumerate() {
            if number < weight.into() {
                return index;
            }
            number -= u32::from(weight);
        }
        0
    }
}
