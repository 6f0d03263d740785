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
    ContextReset {
        context: u32,
    },
    DeviceReset,
    Map {
        context: u32,
        va: u64,
        entries: Vec<u64>,
        large: bool,
    },
    Replay {
        context: u32,
        fault: u64,
    },
    Cancel {
        context: u32,
        fault: u64,
    },
    Query(Query),
    Count(Count),
}

/// A number that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the abi::QUERY_* of the same name")]
pub enum Query {
    Time,
    Timeline { ring: u16 },
    Context { context: u32 },
    Entry { context: u32, va: u64 },
    Count { context: u32, va: u64 },
}

/// Which accesses are to be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Of which context.
    pub context: u32,
    /// Start of the range.
    pub va: u64,
    /// First address behind it.
    pub end: u64,
    /// When the driver is told; zero ends the counting.
    pub threshold: u64,
    /// `abi::COUNT_*`.
    pub targets: u32,
}

/// A request of the invalidation queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidate {
    /// Forget a range of a context.
    Range {
        /// The context.
        context: u32,
        /// Start of the range.
        va: u64,
        /// First address behind it.
        end: u64,
        /// Whether to clear the page table there first.
        clear: bool,
    },
    /// Forget everything.
    Everything,
}

fn header(bytes: &[u8]) -> Result<abi::RequestHeader, Error> {
    abi::RequestHeader::read_from_prefix(bytes)
        .map(|(header, _)| header)
        .map_err(|_| Error::Invalid)
}

/// Opcode and context of a request, for a message about it; zero if they are not there.
pub fn subject(bytes: &[u8]) -> (u16, u32) {
    header(bytes).map_or((0, 0), |header| (header.opcode, header.context))
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
            abi::REQUEST_PING
            | abi::REQUEST_CONTEXT_CREATE
            | abi::REQUEST_CONTEXT_DESTROY
            | abi::REQUEST_CONTEXT_RESET
            | abi::REQUEST_DEVICE_RESET => {
                exactly::<abi::RequestHeader>(bytes)?;
                ensure(flags == 0)?;
                match opcode {
                    abi::REQUEST_PING => ensure(context == 0).map(|()| Self::Ping),
                    abi::REQUEST_DEVICE_RESET => ensure(context == 0).map(|()| Self::DeviceReset),
                    abi::REQUEST_CONTEXT_CREATE => Ok(Self::Create { context }),
                    abi::REQUEST_CONTEXT_RESET => Ok(Self::ContextReset { context }),
                    _ => Ok(Self::Destroy { context }),
                }
            }
            abi::REQUEST_QUERY => Self::decode_query(bytes),
            abi::REQUEST_COUNT => Self::decode_count(bytes),
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
        ensure(map.header.flags & !abi::MAP_LARGE == 0 && map.reserved == 0)?;
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
            large: map.header.flags & abi::MAP_LARGE != 0,
        })
    }

    fn decode_query(bytes: &[u8]) -> Result<Self, Error> {
        let abi::QueryRequest {
            header,
            what,
            index,
            va,
        } = exactly(bytes)?;
        ensure(header.flags == 0)?;
        let context = header.context;
        // Field by field: what a query does not use is zero.
        let only = |index_used: bool, context_used: bool, va_used: bool| {
            ensure((index_used || index == 0) && (context_used || context == 0) && (va_used || va == 0))
        };
        let query = match what {
            abi::QUERY_TIME => only(false, false, false).map(|()| Query::Time),
            abi::QUERY_TIMELINE => {
                only(true, false, false)?;
                let ring = u16::try_from(index).map_err(|_| Error::Invalid)?;
                Ok(Query::Timeline { ring })
            }
            abi::QUERY_CONTEXT => only(false, true, false).map(|()| Query::Context { context }),
            abi::QUERY_ENTRY => only(false, true, true).map(|()| Query::Entry { context, va }),
            abi::QUERY_COUNT => only(false, true, true).map(|()| Query::Count { context, va }),
            _ => Err(Error::Unsupported),
        };
        query.map(Self::Query)
    }

    fn decode_count(bytes: &[u8]) -> Result<Self, Error> {
        let abi::CountRequest {
            header,
            va,
            length,
            threshold,
            targets,
            reserved,
        } = exactly(bytes)?;
        ensure(header.flags == 0 && reserved == 0)?;
        ensure(targets & !(abi::COUNT_SYSTEM | abi::COUNT_VRAM) == 0)?;
        ensure((threshold == 0) == (targets == 0))?;
        ensure((va | length) & (abi::LARGE_PAGE_SIZE - 1) == 0)?;
        let end = check_range(va, length)?;
        Ok(Self::Count(Count {
            context: header.context,
            va,
            end,
            threshold,
            targets,
        }))
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
        if flags == abi::INVALIDATE_EVERYTHING {
            ensure(context == 0 && va == 0 && length == 0)?;
            return Ok(Self::Everything);
        }
        ensure(flags & !abi::INVALIDATE_CLEAR == 0)?;
        let end = check_range(va, length)?;
        Ok(Self::Range {
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
                entries: vec![7, 8],
                large: false
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
            Invalidate::Range {
                context: 1,
                va: 0,
                end: abi::VA_END,
                clear: true
            }
        );
        assert_eq!(request(abi::REQUEST_INVALIDATE, 4, 0, 0), Err(Error::Invalid));
        // Everything is of no context.
        assert_eq!(request(abi::REQUEST_INVALIDATE, 2, 0, 0), Err(Error::Invalid));
        let everything = abi::InvalidateRequest {
            header: head(abi::REQUEST_INVALIDATE, abi::INVALIDATE_EVERYTHING, 0),
            va: 0,
            length: 0,
        };
        assert_eq!(
            Invalidate::decode(everything.as_bytes()),
            Ok(Invalidate::Everything)
        );
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

    #[test]
    fn queries() {
        let query = |what, index, context, va| {
            let request = abi::QueryRequest {
                header: head(abi::REQUEST_QUERY, 0, context),
                what,
                index,
                va,
            };
            Request::decode(request.as_bytes())
        };
        let good = |query| Ok(Request::Query(query));
        assert_eq!(query(abi::QUERY_TIME, 0, 0, 0), good(Query::Time));
        assert_eq!(
            query(abi::QUERY_TIMELINE, 7, 0, 0),
            good(Query::Timeline { ring: 7 })
        );
        assert_eq!(
            query(abi::QUERY_CONTEXT, 0, 7, 0),
            good(Query::Context { context: 7 })
        );
        assert_eq!(
            query(abi::QUERY_ENTRY, 0, 7, 5),
            good(Query::Entry { context: 7, va: 5 })
        );
        for (what, index, context, va) in [
            (abi::QUERY_TIME, 1, 0, 0),
            (abi::QUERY_TIMELINE, 0x1_0000, 0, 0),
            (abi::QUERY_TIMELINE, 0, 1, 0),
            (abi::QUERY_CONTEXT, 0, 0, 1),
            (abi::QUERY_COUNT, 1, 0, 0),
        ] {
            assert_eq!(query(what, index, context, va), Err(Error::Invalid), "{what}");
        }
        assert_eq!(query(0, 0, 0, 0), Err(Error::Unsupported));
        assert_eq!(query(6, 0, 0, 0), Err(Error::Unsupported));
    }

    #[test]
    fn counting() {
        let request = |va, length, threshold, targets| {
            let request = abi::CountRequest {
                header: head(abi::REQUEST_COUNT, 0, 3),
                va,
                length,
                threshold,
                targets,
                reserved: 0,
            };
            Request::decode(request.as_bytes())
        };
        let size = abi::LARGE_PAGE_SIZE;
        let count = Count {
            context: 3,
            va: size,
            end: 3 * size,
            threshold: 5,
            targets: 3,
        };
        assert_eq!(request(size, 2 * size, 5, 3), Ok(Request::Count(count)));
        assert!(request(0, abi::VA_END, 0, 0).is_ok());
        for (va, length, threshold, targets) in [
            (4096, size, 5, 3),
            (0, 4096, 5, 3),
            (0, size, 5, 4),
            (0, size, 5, 0),
            (0, size, 0, 1),
        ] {
            assert_eq!(request(va, length, threshold, targets), Err(Error::Invalid));
        }
        assert_eq!(request(size, abi::VA_END, 5, 3), Err(Error::BadAddress));
    }
}
