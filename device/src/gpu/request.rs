// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Decoding and checking of what comes through the control and invalidation queues.

use pinion_abi as abi;
use zerocopy::FromBytes;

use super::page_table::check_range;
use super::status::Error;

/// Most entries in one MAP.
pub const MAX_MAP_ENTRIES: u32 = 512;
/// Most bytes in the device-readable part of a request.
pub const MAX_REQUEST: usize = size_of::<abi::MapRequest>() + MAX_MAP_ENTRIES as usize * size_of::<u64>();

/// A request of the control queue.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the abi::REQUEST_* of the same name")]
pub enum Request {
    Ping,
    Create {
        context: u32,
    },
    Destroy {
        context: u32,
    },
    Map {
        context: u32,
        va: u64,
        entries: Vec<u64>,
    },
    Replay {
        context: u32,
        fault: u64,
    },
    Cancel {
        context: u32,
        fault: u64,
    },
}

/// A request of the invalidation queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidate {
    /// The context.
    pub context: u32,
    /// Start of the range.
    pub va: u64,
    /// First address behind it.
    pub end: u64,
    /// Whether to clear the page table there first.
    pub clear: bool,
}

fn header(bytes: &[u8]) -> Result<abi::RequestHeader, Error> {
    abi::RequestHeader::read_from_prefix(bytes)
        .map(|(header, _)| header)
        .map_err(|_| Error::Invalid)
}

fn exactly<T: FromBytes>(bytes: &[u8]) -> Result<T, Error> {
    T::read_from_bytes(bytes).map_err(|_| Error::Invalid)
}

fn ensure(condition: bool) -> Result<(), Error> {
    if condition { Ok(()) } else { Err(Error::Invalid) }
}

impl Request {
    /// Checks a request; `bytes` is all of its device-readable part.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let abi::RequestHeader {
            opcode,
            flags,
            context,
        } = header(bytes)?;
        match opcode {
            abi::REQUEST_PING | abi::REQUEST_CONTEXT_CREATE | abi::REQUEST_CONTEXT_DESTROY => {
                exactly::<abi::RequestHeader>(bytes)?;
                ensure(flags == 0)?;
                match opcode {
                    abi::REQUEST_PING => ensure(context == 0).map(|()| Self::Ping),
                    abi::REQUEST_CONTEXT_CREATE => Ok(Self::Create { context }),
                    _ => Ok(Self::Destroy { context }),
                }
            }
            abi::REQUEST_MAP => Self::decode_map(bytes),
            abi::REQUEST_REPLAY | abi::REQUEST_CANCEL => {
                let abi::FaultRequest { fault, .. } = exactly(bytes)?;
                ensure(flags == 0)?;
                Ok(if opcode == abi::REQUEST_REPLAY {
                    Self::Replay { context, fault }
                } else {
                    Self::Cancel { context, fault }
                })
            }
            _ => Err(Error::Unsupported),
        }
    }

    fn decode_map(bytes: &[u8]) -> Result<Self, Error> {
        let (map, rest) = abi::MapRequest::read_from_prefix(bytes).map_err(|_| Error::Invalid)?;
        ensure(map.header.flags == 0 && map.reserved == 0)?;
        ensure((1..=MAX_MAP_ENTRIES).contains(&map.count))?;
        ensure(rest.len() == size_of::<u64>().saturating_mul(map.count as usize))?;
        let entries = rest
            .chunks_exact(size_of::<u64>())
            .map(exactly)
            .collect::<Result<_, _>>()?;
        Ok(Self::Map {
            context: map.header.context,
            va: map.va,
            entries,
        })
    }
}

impl Invalidate {
    /// Checks a request; `bytes` is all of its device-readable part.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let abi::RequestHeader {
            opcode,
            flags,
            context,
        } = header(bytes)?;
        if opcode != abi::REQUEST_INVALIDATE {
            return Err(Error::Unsupported);
        }
        let abi::InvalidateRequest { va, length, .. } = exactly(bytes)?;
        ensure(flags & !abi::INVALIDATE_CLEAR == 0)?;
        let end = check_range(va, length)?;
        Ok(Self {
            context,
            va,
            end,
            clear: flags & abi::INVALIDATE_CLEAR != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn head(opcode: u16, flags: u16, context: u32) -> abi::RequestHeader {
        abi::RequestHeader {
            opcode,
            flags,
            context,
        }
    }

    #[test]
    fn good_requests_are_taken() {
        let decode = |bytes: &[u8]| Request::decode(bytes).unwrap();
        assert_eq!(decode(head(abi::REQUEST_PING, 0, 0).as_bytes()), Request::Ping);
        assert_eq!(
            decode(head(abi::REQUEST_CONTEXT_CREATE, 0, 4).as_bytes()),
            Request::Create { context: 4 }
        );
        let map = abi::MapRequest {
            header: head(abi::REQUEST_MAP, 0, 4),
            va: 0x1000,
            count: 2,
            reserved: 0,
        };
        let bytes = [map.as_bytes(), 7_u64.as_bytes(), 8_u64.as_bytes()].concat();
        assert_eq!(
            decode(&bytes),
            Request::Map {
                context: 4,
                va: 0x1000,
                entries: vec![7, 8]
            }
        );
    }

    #[test]
    fn every_other_length_is_refused() {
        let map = abi::MapRequest {
            header: head(abi::REQUEST_MAP, 0, 4),
            va: 0,
            count: 2,
            reserved: 0,
        };
        let fault = abi::FaultRequest {
            header: head(abi::REQUEST_REPLAY, 0, 4),
            fault: 1,
        };
        for good in [
            head(abi::REQUEST_PING, 0, 0).as_bytes().to_vec(),
            fault.as_bytes().to_vec(),
            [map.as_bytes(), &[0; 16]].concat(),
        ] {
            Request::decode(&good).unwrap();
            for length in 0..good.len() {
                assert_eq!(Request::decode(&good[..length]), Err(Error::Invalid));
            }
            assert_eq!(
                Request::decode(&[good.as_slice(), &[0]].concat()),
                Err(Error::Invalid)
            );
        }
    }

    #[test]
    fn bad_requests_are_refused() {
        let decode = |bytes: &[u8]| Request::decode(bytes).unwrap_err();
        assert_eq!(decode(head(0, 0, 0).as_bytes()), Error::Unsupported);
        assert_eq!(
            decode(head(abi::REQUEST_INVALIDATE, 0, 0).as_bytes()),
            Error::Unsupported
        );
        assert_eq!(decode(head(abi::REQUEST_PING, 0, 1).as_bytes()), Error::Invalid);
        assert_eq!(decode(head(abi::REQUEST_PING, 1, 0).as_bytes()), Error::Invalid);
        for (count, reserved) in [(0, 0), (MAX_MAP_ENTRIES + 1, 0), (1, 1)] {
            let map = abi::MapRequest {
                header: head(abi::REQUEST_MAP, 0, 4),
                va: 0,
                count,
                reserved,
            };
            let bytes = [map.as_bytes(), &vec![0; 8 * count as usize]].concat();
            assert_eq!(decode(&bytes), Error::Invalid);
        }
    }

    #[test]
    fn invalidations() {
        let request = |opcode, flags, va, length| {
            let request = abi::InvalidateRequest {
                header: head(opcode, flags, 1),
                va,
                length,
            };
            Invalidate::decode(request.as_bytes())
        };
        let good = request(abi::REQUEST_INVALIDATE, 1, 0, abi::VA_END).unwrap();
        assert_eq!(
            good,
            Invalidate {
                context: 1,
                va: 0,
                end: abi::VA_END,
                clear: true
            }
        );
        assert_eq!(request(abi::REQUEST_INVALIDATE, 2, 0, 0), Err(Error::Invalid));
        assert_eq!(request(abi::REQUEST_INVALIDATE, 0, 1, 0), Err(Error::Invalid));
        assert_eq!(request(abi::REQUEST_INVALIDATE, 0, 0, 1), Err(Error::Invalid));
        assert_eq!(
            request(abi::REQUEST_INVALIDATE, 0, 0x1000, abi::VA_END),
            Err(Error::BadAddress)
        );
        assert_eq!(
            request(abi::REQUEST_INVALIDATE, 0, 0x1000, !0xfff),
            Err(Error::BadAddress)
        );
        assert_eq!(request(abi::REQUEST_MAP, 0, 0, 0), Err(Error::Unsupported));
    }
}
