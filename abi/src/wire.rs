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
pub const VERSION: u32 = 2;

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
/// Base-2 logarithm of the size of a large page.
pub const LARGE_PAGE_SHIFT: u8 = 21;
/// Size of a large page in bytes; also of the regions of access counters.
pub const LARGE_PAGE_SIZE: u64 = 1 << LARGE_PAGE_SHIFT;
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
    /// Optional features of the device: `FEATURE_*`.
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
    /// With [`FEATURE_APERTURE`]: how much of VRAM, from its beginning, is in the shared memory region
    /// [`APERTURE_REGION`]. Otherwise zero.
    pub aperture_size: u64,
    /// Most regions whose accesses are counted at a time.
    pub max_counters: u32,
    /// Number of engines; ring `n` is served by engine `n % num_engines`.
    pub num_engines: u16,
    /// [`LARGE_PAGE_SHIFT`].
    pub large_page_shift: u8,
    /// Zero.
    pub reserved0: u8,
    /// Zero.
    pub reserved: u64,
}

/// [`Config::features`]: the beginning of VRAM is in a shared memory region.
pub const FEATURE_APERTURE: u64 = 1 << 0;
/// Id of the virtio shared memory region that is the aperture.
pub const APERTURE_REGION: u8 = 0;

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
/// What is in the page has been lost: an access faults with [`REASON_POISONED`]. The other bits must be
/// well-formed, and mean nothing.
pub const PTE_POISONED: u64 = 1 << 5;
/// The address bits of an entry, aligned to the size of the page.
pub const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Every bit that may be set in an entry.
pub const PTE_MASK: u64 =
    PTE_VALID | PTE_READ | PTE_WRITE | PTE_ATOMIC | PTE_VRAM | PTE_POISONED | PTE_ADDRESS;

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
/// Ends the work of a context that was submitted before this request, with [`STATUS_RESET`], and takes the context out of
/// error. Its page table stays. When this has completed, no access of that work is in flight or will start.
pub const REQUEST_CONTEXT_RESET: u16 = 7;
/// Resets the device, as [`EVENT_DEVICE_RESET`] says, but without that event: every context is gone, VRAM is
/// zero. All work that was submitted before completes with [`STATUS_RESET`].
pub const REQUEST_DEVICE_RESET: u16 = 8;
/// Asks for a number: a [`QueryRequest`]; the answer is in [`Response::value`].
pub const REQUEST_QUERY: u16 = 9;
/// Has the accesses of a context counted: a [`CountRequest`].
pub const REQUEST_COUNT: u16 = 10;
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
    /// REPLAY: how many of the retried accesses got through. QUERY: the number. Otherwise zero.
    pub value: u64,
}

/// [`REQUEST_MAP`]; `count` entries of 8 bytes follow.
///
/// Entries are written in ascending order from the page at `va`. With [`MAP_LARGE`] each is for a page of
/// [`LARGE_PAGE_SIZE`]. What is there of the other size, in so far as it overlaps, is cleared: small pages below a large
/// one, and the whole of a large page in which a small one is written. The TLB is not coherent with
/// this: where a valid entry is changed or cleared, an INVALIDATE must follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MapRequest {
    /// The header; `flags` may hold [`MAP_LARGE`].
    pub header: RequestHeader,
    /// Virtual address of the first page.
    pub va: u64,
    /// Number of entries, 1 to [`Config::max_map_entries`].
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// The entries are for large pages.
pub const MAP_LARGE: u16 = 1 << 0;

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
    /// The header; `flags` may hold [`INVALIDATE_CLEAR`] or [`INVALIDATE_EVERYTHING`].
    pub header: RequestHeader,
    /// Start of the range, page-aligned.
    pub va: u64,
    /// Length of the range in bytes, a multiple of the page size; `va + length <= VA_END`.
    pub length: u64,
}

/// Clear the page table entries of the range first; that of a large page also if only part of it is in the range.
pub const INVALIDATE_CLEAR: u16 = 1 << 0;
/// Forget all translations of all contexts; `context`, `va` and `length` are zero. Not with [`INVALIDATE_CLEAR`].
pub const INVALIDATE_EVERYTHING: u16 = 1 << 1;

/// [`REQUEST_QUERY`].
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct QueryRequest {
    /// The header; `context` is zero where the query is not about one.
    pub header: RequestHeader,
    /// `QUERY_*`.
    pub what: u32,
    /// What it is about; zero where it says nothing else.
    pub index: u32,
    /// What it is about; zero where it says nothing else.
    pub va: u64,
}

/// Device time in nanoseconds; see [`COMMAND_TIMESTAMP`].
pub const QUERY_TIME: u32 = 1;
/// The timeline of ring `index`; see [`Completion::timeline`].
pub const QUERY_TIMELINE: u32 = 2;
/// [`STATUS_OK`] if context `context` is alive, else why it is in error.
pub const QUERY_CONTEXT: u32 = 3;
/// The page table entry of context `context` for `va`, or zero. Bit 63 says that it is of a large page.
pub const QUERY_ENTRY: u32 = 4;
/// How often the region of `va` in context `context` was accessed since its counter was set ([`CountRequest`]).
pub const QUERY_COUNT: u32 = 5;

/// [`REQUEST_COUNT`]: accesses to the 2 MiB regions of a range are counted from now on, from zero.
///
/// An access is an operation of an ATOMIC, or what a command does to one page without interruption.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CountRequest {
    /// The header.
    pub header: RequestHeader,
    /// Start of the range, a multiple of [`LARGE_PAGE_SIZE`].
    pub va: u64,
    /// Length of the range, a multiple of [`LARGE_PAGE_SIZE`].
    pub length: u64,
    /// When a counter reaches this, an [`EVENT_ACCESS_COUNT`] is posted, once. Zero ends the counting.
    pub threshold: u64,
    /// What is counted: [`COUNT_SYSTEM`], [`COUNT_VRAM`] or both; zero if `threshold` is.
    pub targets: u32,
    /// Zero.
    pub reserved: u32,
}

/// Count accesses to system pages.
pub const COUNT_SYSTEM: u32 = 1 << 0;
/// Count accesses to VRAM pages.
pub const COUNT_VRAM: u32 = 1 << 1;

// --- Events --------------------------------------------------------------------------------------

/// An engine access has stalled on a fault.
pub const EVENT_FAULT: u16 = 1;
/// A context has gone into error: work of it ended with a status other than OK.
pub const EVENT_CONTEXT_ERROR: u16 = 2;
/// A PREFETCH found pages that it could not access. Nothing waits for them. The device may drop this, as
/// the hint that it is.
pub const EVENT_PREFETCH: u16 = 3;
/// The counter of a region has reached its threshold.
pub const EVENT_ACCESS_COUNT: u16 = 4;
/// The device has reset itself: contexts, page tables, faults and work are gone, VRAM is zero. Submissions of
/// before complete with [`STATUS_RESET`]. Fault numbers and timelines go on.
pub const EVENT_DEVICE_RESET: u16 = 5;

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
/// What was in the page is lost ([`PTE_POISONED`], or a failure of VRAM).
pub const REASON_POISONED: u8 = 5;
/// A pointer in memory ([`COMMAND_CHASE`]) is no virtual address, or misaligned; there is no repair.
pub const REASON_BAD_ADDRESS: u8 = 6;

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
    /// Virtual address of the access; its page is what counts. EVENT_ACCESS_COUNT: start of the region.
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
    /// EVENT_FAULT, EVENT_PREFETCH: from `va` on, how many bytes the command is going to access in the same
    /// way, one after the other; at least one. A driver that repairs more than the first page saves faults.
    /// EVENT_ACCESS_COUNT: the count.
    pub length: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

// --- Command rings -------------------------------------------------------------------------------

/// Device-readable beginning of a submission; `count` commands follow, or an [`Indirect`].
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SubmitHeader {
    /// The context in which the commands run.
    pub context: u32,
    /// Number of commands, 1 to [`Config::max_batch`].
    pub count: u32,
    /// Chosen by the driver, handed back in [`Completion::sequence`]. The ring's timeline advances to it.
    pub sequence: u64,
    /// [`SUBMIT_INDIRECT`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// The commands are in memory: an [`Indirect`] follows the header.
pub const SUBMIT_INDIRECT: u32 = 1 << 0;

/// Where the commands of a submission are.
///
/// The device loads them all, through the page table of the context and with READ, before it checks them and runs
/// the first.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Indirect {
    /// Virtual address of the first command, a multiple of eight.
    pub va: u64,
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
    /// The timeline of the ring: the highest number that a submission which has ended had as its sequence, or
    /// that a FENCE has set. It begins at zero and never goes back.
    pub timeline: u64,
    /// Device time at which the submission ended; see [`COMMAND_TIMESTAMP`].
    pub time: u64,
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
/// Waits until the number of `width` bytes at `address`, ANDed with `compare`, is to `operand` as `operation`
/// (`COMPARE_*`, unsigned) says. The ring waits, its engine does not.
pub const COMMAND_SEMAPHORE_WAIT: u8 = 4;
/// When all that the ring did before is visible, stores `operand`, of `width` bytes, at `address`.
pub const COMMAND_SEMAPHORE_SIGNAL: u8 = 5;
/// Stores the device time, in nanoseconds since some moment before the driver began, 8 bytes, at `address`.
pub const COMMAND_TIMESTAMP: u8 = 6;
/// When all that the ring did before is visible, advances the timeline of the ring to `operand` if that is
/// more, and then, with [`COMMAND_WRITE_BACK`], stores the timeline, 8 bytes, at `source`.
pub const COMMAND_FENCE: u8 = 7;
/// Waits until the timeline of ring `span` is `operand` at least.
pub const COMMAND_FENCE_WAIT: u8 = 8;
/// Looks whether `length` bytes at `address` can be accessed as `operation` (`ACCESS_*` bits) says, and posts an
/// [`EVENT_PREFETCH`] from the first page which cannot to the last. Never stalls, never fails.
pub const COMMAND_PREFETCH: u8 = 9;
/// Follows a linked list: at most `repeat` times, adds the 8 bytes at `p + stride` to a sum and loads the next
/// `p` from `p + span`, beginning with `p = address`, until it is zero. Then stores a [`ChaseResult`] at `source`.
pub const COMMAND_CHASE: u8 = 10;

/// What [`COMMAND_CHASE`] stores.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ChaseResult {
    /// The pointer that came last: zero at the end of the list.
    pub pointer: u64,
    /// The sum, wrapping.
    pub sum: u64,
    /// How many nodes were visited.
    pub visited: u64,
}

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
/// Unchanged: a load. Needs READ and nothing else.
pub const ATOMIC_LOAD: u8 = 10;
/// `operand`; what was there is not loaded (and is zero for WRITE_BACK). Needs WRITE and nothing else.
pub const ATOMIC_STORE: u8 = 11;

/// Equal.
pub const COMPARE_EQUAL: u8 = 0;
/// Not equal.
pub const COMPARE_NOT_EQUAL: u8 = 1;
/// Less.
pub const COMPARE_LESS: u8 = 2;
/// Less or equal.
pub const COMPARE_LESS_EQUAL: u8 = 3;
/// Greater.
pub const COMPARE_GREATER: u8 = 4;
/// Greater or equal.
pub const COMPARE_GREATER_EQUAL: u8 = 5;

/// ATOMIC: store the value found by the last repeat at `source` (`width` bytes, aligned). FENCE: store the timeline.
pub const COMMAND_WRITE_BACK: u8 = 1 << 0;
/// ATOMIC, with [`COMMAND_WRITE_BACK`]: store the value found by every repeat, number `i` at `source + i * width`.
pub const COMMAND_WRITE_BACK_ALL: u8 = 1 << 1;

/// A command. Fields that an opcode does not use are zero, and are checked to be zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Command {
    /// `COMMAND_*`.
    pub opcode: u8,
    /// ATOMIC: `ATOMIC_*`. SEMAPHORE_WAIT: `COMPARE_*`. PREFETCH: `ACCESS_*` bits.
    pub operation: u8,
    /// FILL: 1, 2, 4 or 8. ATOMIC, SEMAPHORE: 4 or 8.
    pub width: u8,
    /// `COMMAND_WRITE_BACK`, `COMMAND_WRITE_BACK_ALL`.
    pub flags: u8,
    /// ATOMIC: how many operations, at least 1. CHASE: how many nodes at most, at least 1.
    pub repeat: u32,
    /// Virtual address of the destination; CHASE: of the first node.
    pub address: u64,
    /// COPY: virtual address of the source. With WRITE_BACK, and CHASE: where the result goes.
    pub source: u64,
    /// COPY, FILL, PREFETCH: bytes, at most [`MAX_COMMAND_LENGTH`].
    pub length: u64,
    /// FILL: the pattern. ATOMIC: the operand. SEMAPHORE, FENCE: the number.
    pub operand: u64,
    /// ATOMIC compare-exchange: the value to compare with. SEMAPHORE_WAIT: the mask.
    pub compare: u64,
    /// ATOMIC: distance of one operation from the next in bytes. CHASE: offset of the value in a node.
    pub stride: u32,
    /// ATOMIC: number of different places; see [`COMMAND_ATOMIC`]. FENCE_WAIT: the ring. CHASE: offset of the
    /// pointer in a node.
    pub span: u32,
    /// Zero.
    pub reserved: u64,
}

/// Most bytes in one COPY, FILL or PREFETCH.
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
/// A limit of the device is reached (page-table memory, access counters).
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
/// The work was ended by a reset of its context, or of the device.
pub const STATUS_RESET: u32 = 11;
/// The watchdog has ended the work: it ran, or waited for a semaphore or fence, for too long.
pub const STATUS_HUNG: u32 = 12;

macro_rules! assert_size {
    ($($type:ty = $size:literal, { $($field:ident @ $offset:literal),* $(,)? };)*) => { $(
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        $(const _: () = assert!(core::mem::offset_of!($type, $field) == $offset);)*
    )* };
}

assert_size! {
    Config = 64, { magic @ 0, version @ 4, features @ 8, vram_size @ 16, max_contexts @ 24, max_batch @ 28,
        max_map_entries @ 32, num_rings @ 36, va_bits @ 38, page_shift @ 39, aperture_size @ 40,
        max_counters @ 48, num_engines @ 52, large_page_shift @ 54, reserved0 @ 55, reserved @ 56 };
    RequestHeader = 8, { opcode @ 0, flags @ 2, context @ 4 };
    Response = 16, { status @ 0, reserved @ 4, value @ 8 };
    MapRequest = 24, { header @ 0, va @ 8, count @ 16, reserved @ 20 };
    FaultRequest = 16, { header @ 0, fault @ 8 };
    InvalidateRequest = 24, { header @ 0, va @ 8, length @ 16 };
    EventRecord = 64, { kind @ 0, ring @ 2, context @ 4, va @ 8, fault @ 16, sequence @ 24, access @ 32,
        reason @ 33, reserved0 @ 34, status @ 36, length @ 40, reserved @ 48 };
    QueryRequest = 24, { header @ 0, what @ 8, index @ 12, va @ 16 };
    CountRequest = 40, { header @ 0, va @ 8, length @ 16, threshold @ 24, targets @ 32, reserved @ 36 };
    SubmitHeader = 24, { context @ 0, count @ 4, sequence @ 8, flags @ 16, reserved @ 20 };
    Indirect = 8, { va @ 0 };
    Completion = 48, { sequence @ 0, status @ 8, executed @ 12, fault_va @ 16, repeats @ 24, timeline @ 32, time @ 40 };
    ChaseResult = 24, { pointer @ 0, sum @ 8, visited @ 16 };
    Command = 64, { opcode @ 0, operation @ 1, width @ 2, flags @ 3, repeat @ 4, address @ 8, source @ 16,
        length @ 24, operand @ 32, compare @ 40, stride @ 48, span @ 52, reserved @ 56 };
}
