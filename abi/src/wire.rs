// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Wire formats and constants of the Pinion device. `docs/device.md` is the specification.
//!
//! Every multi-byte field is little-endian. Every reserved field is zero and is checked to be zero.
//! Addresses and lengths are in bytes unless a field says otherwise.

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[cfg(not(target_endian = "little"))]
compile_error!("the Pinion interface is little-endian, and so must be both of its sides");

/// The virtio device id that Pinion borrows (QEMU insists on one that it has a name for).
///
/// 37 is VIRTIO_ID_DMABUF, which has no driver in Linux. Because the number is borrowed, a driver
/// checks [`MAGIC`] before it believes the device.
pub const VIRTIO_ID: u32 = 37;

/// First field of [`Config`]: "PINI".
pub const MAGIC: u32 = u32::from_le_bytes(*b"PINI");
/// Version of this interface. A driver refuses every version that it does not know.
pub const VERSION: u32 = 1;

/// Index of the control queue: requests and responses ([`RequestHeader`], [`Response`]).
pub const QUEUE_CONTROL: u16 = 0;
/// Index of the invalidation queue: [`InvalidateRequest`] only, so that nothing else can fill it.
pub const QUEUE_INVALIDATE: u16 = 1;
/// Index of the event queue: the driver posts buffers of [`EventRecord`], the device fills them.
pub const QUEUE_EVENT: u16 = 2;
/// Index of the first command ring; ring `n` is queue `QUEUE_FIRST_RING + n`.
pub const QUEUE_FIRST_RING: u16 = 3;

/// Most command rings that a device may have.
pub const MAX_RINGS: u16 = 16;
/// Width of a GPU virtual address in bits.
pub const VA_BITS: u8 = 48;
/// Base-2 logarithm of the page size.
pub const PAGE_SHIFT: u8 = 12;
/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// First byte that is no GPU virtual address.
pub const VA_END: u64 = 1 << VA_BITS;

/// Device configuration space.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Config {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`].
    pub version: u32,
    /// Optional features of the device; none is defined in version 1.
    pub features: u64,
    /// Size of VRAM in bytes, a multiple of the page size.
    pub vram_size: u64,
    /// Number of contexts; context ids are `0..max_contexts`.
    pub max_contexts: u32,
    /// Most commands in one submission.
    pub max_batch: u32,
    /// Most entries in one [`MapRequest`].
    pub max_map_entries: u32,
    /// Number of command rings, 1 to [`MAX_RINGS`].
    pub num_rings: u16,
    /// [`VA_BITS`].
    pub va_bits: u8,
    /// [`PAGE_SHIFT`].
    pub page_shift: u8,
    /// Zero.
    pub reserved: [u64; 3],
}

// --- Page table entries --------------------------------------------------------------------------

/// The entry translates. All other bits of an entry without it are ignored.
pub const PTE_VALID: u64 = 1 << 0;
/// The engines may load.
pub const PTE_READ: u64 = 1 << 1;
/// The engines may store.
pub const PTE_WRITE: u64 = 1 << 2;
/// The engines may do atomic operations (which also needs READ and WRITE).
///
/// On system memory the bus has no atomics: the operation is a load and then a store. A driver sets
/// this bit only on a page to which nothing else has access.
pub const PTE_ATOMIC: u64 = 1 << 3;
/// The address is an offset into VRAM, not a guest physical address.
pub const PTE_VRAM: u64 = 1 << 4;
/// The address bits of an entry, page-aligned.
pub const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Every bit that may be set in an entry.
pub const PTE_MASK: u64 = PTE_VALID | PTE_READ | PTE_WRITE | PTE_ATOMIC | PTE_VRAM | PTE_ADDRESS;

// --- Control and invalidation queues -------------------------------------------------------------

/// Is the device alive? Answers with status OK.
pub const REQUEST_PING: u16 = 1;
/// Makes context [`RequestHeader::context`], with an empty page table. It must not exist.
pub const REQUEST_CONTEXT_CREATE: u16 = 2;
/// Ends a context. When this has completed, no access of the context is in flight or will start, its
/// page table is gone, and its stalled and queued work completes with [`STATUS_NO_CONTEXT`].
pub const REQUEST_CONTEXT_DESTROY: u16 = 3;
/// Writes page table entries: a [`MapRequest`].
pub const REQUEST_MAP: u16 = 4;
/// Retries the accesses that are stalled on a fault: a [`FaultRequest`].
///
/// Completes only when each of them has been retried once: it either got through, or stalled again on
/// a new fault. Whoever maps a page, replays, and waits for this response before taking the page back
/// therefore lets the engine make progress.
pub const REQUEST_REPLAY: u16 = 5;
/// Gives up the accesses that are stalled on a fault: a [`FaultRequest`]. Their context is in error
/// from then on, and their work completes with [`STATUS_FAULT_CANCELLED`].
pub const REQUEST_CANCEL: u16 = 6;
/// The one request of the invalidation queue: an [`InvalidateRequest`].
pub const REQUEST_INVALIDATE: u16 = 16;

/// Beginning of every request.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RequestHeader {
    /// `REQUEST_*`.
    pub opcode: u16,
    /// Flags of that request.
    pub flags: u16,
    /// The context it is about; zero for PING.
    pub context: u32,
}

/// Answer to every request: the device-writable part of its descriptor chain.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Response {
    /// `STATUS_*`.
    pub status: u32,
    /// Zero.
    pub reserved: u32,
    /// REPLAY: how many of the retried accesses got through. Otherwise zero.
    pub value: u64,
}

/// [`REQUEST_MAP`]; `count` entries of 8 bytes follow.
///
/// Entries are written in ascending order from the page at `va`. The TLB is not coherent with this:
/// where a valid entry is changed or cleared, an INVALIDATE must follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MapRequest {
    /// The header.
    pub header: RequestHeader,
    /// Virtual address of the first page.
    pub va: u64,
    /// Number of entries, 1 to [`Config::max_map_entries`].
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`REQUEST_REPLAY`] and [`REQUEST_CANCEL`].
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FaultRequest {
    /// The header.
    pub header: RequestHeader,
    /// [`EventRecord::fault`].
    pub fault: u64,
}

/// [`REQUEST_INVALIDATE`].
///
/// The invalidation promise: when it has completed, no engine access through a translation older than
/// the request is in flight or will start. An access that is stalled on a fault holds no
/// translation, so this never waits for one.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InvalidateRequest {
    /// The header; `flags` may hold [`INVALIDATE_CLEAR`].
    pub header: RequestHeader,
    /// Start of the range, page-aligned.
    pub va: u64,
    /// Length of the range in bytes, a multiple of the page size; `va + length <= VA_END`.
    pub length: u64,
}

/// Clear the page table entries of the range first.
pub const INVALIDATE_CLEAR: u16 = 1 << 0;

// --- Events --------------------------------------------------------------------------------------

/// An engine access has stalled on a fault.
pub const EVENT_FAULT: u16 = 1;
/// A context has gone into error: work of it ended with a status other than OK.
pub const EVENT_CONTEXT_ERROR: u16 = 2;

/// The access loads.
pub const ACCESS_READ: u8 = 1 << 0;
/// The access stores.
pub const ACCESS_WRITE: u8 = 1 << 1;
/// The access is atomic (READ and WRITE are then set too).
pub const ACCESS_ATOMIC: u8 = 1 << 2;

/// No valid entry.
pub const REASON_NOT_PRESENT: u8 = 1;
/// The entry lacks READ.
pub const REASON_READ: u8 = 2;
/// The entry lacks WRITE.
pub const REASON_WRITE: u8 = 3;
/// The entry lacks ATOMIC.
pub const REASON_ATOMIC: u8 = 4;

/// What the device writes into a buffer of the event queue.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EventRecord {
    /// `EVENT_*`.
    pub kind: u16,
    /// The command ring whose access it was.
    pub ring: u16,
    /// The context.
    pub context: u32,
    /// Virtual address of the access; its page is what counts.
    pub va: u64,
    /// EVENT_FAULT: a number that is never used twice between resets; names this fault in REPLAY and
    /// CANCEL. Further accesses of the same context that stall on the same page for want of the same
    /// rights join it instead of being reported again.
    pub fault: u64,
    /// Sequence number of the submission.
    pub sequence: u64,
    /// `ACCESS_*` bits.
    pub access: u8,
    /// EVENT_FAULT: `REASON_*`.
    pub reason: u8,
    /// Zero.
    pub reserved0: u16,
    /// EVENT_CONTEXT_ERROR: `STATUS_*`.
    pub status: u32,
    /// Zero.
    pub reserved: [u64; 3],
}

// --- Command rings -------------------------------------------------------------------------------

/// Device-readable beginning of a submission; `count` commands follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SubmitHeader {
    /// The context in which the commands run.
    pub context: u32,
    /// Number of commands, 1 to [`Config::max_batch`].
    pub count: u32,
    /// Chosen by the driver, handed back in [`Completion::sequence`].
    pub sequence: u64,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// Device-writable end of a submission.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Completion {
    /// [`SubmitHeader::sequence`].
    pub sequence: u64,
    /// `STATUS_*`.
    pub status: u32,
    /// How many commands were executed to their end.
    pub executed: u32,
    /// The virtual address at which the first unfinished command failed; zero if none did.
    pub fault_va: u64,
    /// Repeats of the unfinished command that were done before it failed.
    pub repeats: u64,
}

/// Nothing.
pub const COMMAND_NOP: u8 = 0;
/// Copies `length` bytes from `source` to `address`; the result is as if the source had been read
/// whole before the first store, also where the two overlap.
pub const COMMAND_COPY: u8 = 1;
/// Stores the low `width` bytes of `operand` over `length` bytes at `address`; `length` is a multiple
/// of `width`, `address` is aligned to it.
pub const COMMAND_FILL: u8 = 2;
/// `repeat` atomic operations `operation` of `width` (4 or 8) bytes. Number `i`, from zero, is at
/// `address + (i % span) * stride`; `address` and `stride` are multiples of `width`, and a `span` of
/// zero stands for `repeat`.
pub const COMMAND_ATOMIC: u8 = 3;

/// `*p + operand`, wrapping.
pub const ATOMIC_ADD: u8 = 0;
/// `*p & operand`.
pub const ATOMIC_AND: u8 = 1;
/// `*p | operand`.
pub const ATOMIC_OR: u8 = 2;
/// `*p ^ operand`.
pub const ATOMIC_XOR: u8 = 3;
/// The smaller of the two as unsigned numbers.
pub const ATOMIC_MIN_UNSIGNED: u8 = 4;
/// The larger of the two as unsigned numbers.
pub const ATOMIC_MAX_UNSIGNED: u8 = 5;
/// The smaller of the two as signed numbers.
pub const ATOMIC_MIN_SIGNED: u8 = 6;
/// The larger of the two as signed numbers.
pub const ATOMIC_MAX_SIGNED: u8 = 7;
/// `operand`.
pub const ATOMIC_EXCHANGE: u8 = 8;
/// `operand` if `*p == compare`, else unchanged.
pub const ATOMIC_COMPARE_EXCHANGE: u8 = 9;

/// ATOMIC: store the value found by the last repeat at `source` (`width` bytes, aligned).
pub const COMMAND_WRITE_BACK: u8 = 1 << 0;

/// A command. Fields that an opcode does not use are zero, and are checked to be zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Command {
    /// `COMMAND_*`.
    pub opcode: u8,
    /// ATOMIC: `ATOMIC_*`.
    pub operation: u8,
    /// FILL: 1, 2, 4 or 8. ATOMIC: 4 or 8.
    pub width: u8,
    /// `COMMAND_WRITE_BACK`.
    pub flags: u8,
    /// ATOMIC: how many operations, at least 1.
    pub repeat: u32,
    /// Virtual address of the destination.
    pub address: u64,
    /// COPY: virtual address of the source. ATOMIC with WRITE_BACK: where the result goes.
    pub source: u64,
    /// COPY, FILL: bytes, at most [`MAX_COMMAND_LENGTH`].
    pub length: u64,
    /// FILL: the pattern. ATOMIC: the operand.
    pub operand: u64,
    /// ATOMIC compare-exchange: the value to compare with.
    pub compare: u64,
    /// ATOMIC: distance of one operation from the next in bytes.
    pub stride: u32,
    /// ATOMIC: number of different places; see [`COMMAND_ATOMIC`].
    pub span: u32,
    /// Zero.
    pub reserved: u64,
}

/// Most bytes in one COPY or FILL.
pub const MAX_COMMAND_LENGTH: u64 = 1 << 30;

// --- Status --------------------------------------------------------------------------------------

/// Done.
pub const STATUS_OK: u32 = 0;
/// Malformed: too short or too long, a reserved field that is not zero, a misaligned or overflowing
/// address, a value out of range.
pub const STATUS_INVALID: u32 = 1;
/// An opcode or operation that the device does not know.
pub const STATUS_UNSUPPORTED: u32 = 2;
/// There is no such context.
pub const STATUS_NO_CONTEXT: u32 = 3;
/// The context exists already.
pub const STATUS_CONTEXT_EXISTS: u32 = 4;
/// A limit of the device is reached (page-table memory).
pub const STATUS_LIMIT: u32 = 5;
/// A virtual address outside the address space.
pub const STATUS_BAD_ADDRESS: u32 = 6;
/// A page table entry leads to memory that does not exist.
pub const STATUS_BUS_ERROR: u32 = 7;
/// The context is in error because of earlier work.
pub const STATUS_CONTEXT_ERROR: u32 = 8;
/// The driver has cancelled the fault on which the work was stalled.
pub const STATUS_FAULT_CANCELLED: u32 = 9;
/// REPLAY, CANCEL: there is no such fault (any more).
pub const STATUS_NO_FAULT: u32 = 10;

macro_rules! assert_size {
    ($($type:ty = $size:literal, { $($field:ident @ $offset:literal),* $(,)? };)*) => { $(
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        $(const _: () = assert!(core::mem::offset_of!($type, $field) == $offset);)*
    )* };
}

assert_size! {
    Config = 64, { magic @ 0, version @ 4, features @ 8, vram_size @ 16, max_contexts @ 24, max_batch @ 28,
        max_map_entries @ 32, num_rings @ 36, va_bits @ 38, page_shift @ 39, reserved @ 40 };
    RequestHeader = 8, { opcode @ 0, flags @ 2, context @ 4 };
    Response = 16, { status @ 0, reserved @ 4, value @ 8 };
    MapRequest = 24, { header @ 0, va @ 8, count @ 16, reserved @ 20 };
    FaultRequest = 16, { header @ 0, fault @ 8 };
    InvalidateRequest = 24, { header @ 0, va @ 8, length @ 16 };
    EventRecord = 64, { kind @ 0, ring @ 2, context @ 4, va @ 8, fault @ 16, sequence @ 24, access @ 32,
        reason @ 33, reserved0 @ 34, status @ 36, reserved @ 40 };
    SubmitHeader = 24, { context @ 0, count @ 4, sequence @ 8, flags @ 16, reserved @ 20 };
    Completion = 32, { sequence @ 0, status @ 8, executed @ 12, fault_va @ 16, repeats @ 24 };
    Command = 64, { opcode @ 0, operation @ 1, width @ 2, flags @ 3, repeat @ 4, address @ 8, source @ 16,
        length @ 24, operand @ 32, compare @ 40, stride @ 48, span @ 52, reserved @ 56 };
}
