// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/hmm_dmirrorN`: the interface of the kernel's HMM test module (`lib/test_hmm.c`), so that the kernel's own
//! hmm-tests run against a device behind a bus. docs/hmm-tests.md has more.
//!
//! The test module pretends to be a device: it keeps a page table in software, and copies with the CPU. Here each command is
//! what a program could have done by `/dev/pinionN`, or asks the driver to do at once what it would do in time:
//!
//! - READ and WRITE are a COPY from one address of the process to another, by an engine, in the context of the file. What it
//!   faults on is repaired as for any other work.
//! - MIGRATE_TO_DEV and MIGRATE_TO_SYS are what a prefetch does, and what an eviction does.
//! - EXCLUSIVE is an atomic operation of the device on each page (which adds 0); the address space has been told by what mechanism it
//!   gets exclusive access.
//! - SNAPSHOT reads the CPU's page table, and asks the device nothing.
//!
//! Where the test module looks into its page table (after MIGRATE_TO_DEV and EXCLUSIVE, and in CHECK_EXCLUSIVE), this looks at the
//! rights that the device has been given.
//!
//! Each GPU has a node for device-private memory, which is VRAM out of the CPU's sight, and one for device-coherent memory,
//! which is VRAM in its aperture. Number 0 and 1 are the former of the first two GPUs, 2 and 3 the latter.

mod uapi;

use self::uapi::Command;
use crate::{
    abi,
    address_space::{explicit::Seen, AddressSpace},
    advice::Atomics,
    chardev::CharDevice,
    fence::Waited,
    file::{page_range, FileHandle},
    gpu::Gpu,
    hmm::{memory::Kind, migrate::MAX_PAGES},
    residency::Residency,
    ring::Request,
    submission::{Awaited, Submissions},
};
use core::ops::Range;
use kernel::{
    fs::File as KernelFile,
    miscdevice::{MiscDevice, MiscDeviceRegistration},
    mm::virt::VmaNew,
    new_mutex,
    page::{Page, PAGE_SIZE},
    prelude::*,
    seq_file::SeqFile,
    str::CString,
    sync::{Arc, Mutex},
    uaccess::{UserPtr, UserSlice},
};

/// GPUs that have nodes. The test module has as many devices of one kind.
const MAX_DEVICES: u32 = 2;
/// Permissions of the nodes: those of the test module's. RELEASE concerns all processes.
const MODE: u16 = 0o600;
/// Rounds of bringing home what is in VRAM, a millisecond apart.
const RELEASE_ROUNDS: usize = 1000;
/// The ring on which the device does what it is told here.
const RING: u32 = 0;
/// Base-2 logarithm of the number of pages that a PMD maps.
const PMD_ORDER: usize = 9;
/// Base-2 logarithm of the number of pages that a PUD maps.
const PUD_ORDER: usize = 18;

/// What a node is opened for.
pub(crate) struct Target {
    gpu: Arc<Gpu>,
    /// Which part of VRAM it is about.
    kind: Kind,
    /// How the device gets exclusive access.
    exclusive: Atomics,
}

/// `/dev/hmm_dmirrorN`.
type Node = CharDevice<Dmirror, Target>;

/// The nodes of a GPU.
pub(crate) type Nodes = KVec<Pin<KBox<Node>>>;

/// The mechanism that the module's parameter asks for, if it asks for the nodes at all.
///
/// # Errors
///
/// EINVAL: for nothing that there is.
pub(crate) fn parameter() -> Result<Option<Atomics>> {
    match crate::module_parameters::dmirror.value() {
        0 => Ok(None),
        1 => Ok(Some(Atomics::Exclusive)),
        2 => Ok(Some(Atomics::Pin)),
        value => {
            pr_err!("dmirror={}: 0, 1 or 2 is wanted\n", value);
            Err(EINVAL)
        }
    }
}

/// Registers the nodes of `gpu`, if there are to be any.
pub(crate) fn nodes(gpu: &Arc<Gpu>) -> Result<Nodes> {
    let mut nodes = KVec::new();
    let Some(exclusive) = parameter()?.filter(|_| gpu.number() < MAX_DEVICES) else {
        return Ok(nodes);
    };
    for kind in Kind::ALL {
        if gpu.memory().usage(kind).total == 0 {
            continue;
        }
        let first = match kind {
            Kind::Private => 0,
            Kind::Coherent => MAX_DEVICES,
        };
        let name = CString::try_from_fmt(fmt!("hmm_dmirror{}", first + gpu.number()))?;
        let target = Target {
            gpu: gpu.clone(),
            kind,
            exclusive,
        };
        let node = KBox::pin_init(Node::new(name, MODE, target), GFP_KERNEL)?;
        nodes.push(node, GFP_KERNEL)?;
    }
    Ok(nodes)
}

/// An open file.
#[pin_data]
pub(crate) struct Dmirror {
    gpu: Arc<Gpu>,
    kind: Kind,
    exclusive: Atomics,
    #[pin]
    file: FileHandle,
    /// Held while a command is carried out: what is observed of faults is this one's.
    #[pin]
    turn: Mutex<()>,
}

#[vtable]
impl MiscDevice for Dmirror {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &KernelFile, device: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        // SAFETY: This is `open`, and `nodes` is what registers this type.
        let target = unsafe { Node::data_of(device) };
        let file = FileHandle::new(&target.gpu)?;
        KBox::pin_init(
            pin_init!(Self {
                gpu: target.gpu.clone(),
                kind: target.kind,
                exclusive: target.exclusive,
                file <- file,
                turn <- new_mutex!((), "Dmirror::turn"),
            }),
            GFP_KERNEL,
        )
    }

    fn ioctl(this: Pin<&Self>, _file: &KernelFile, request: u32, arg: usize) -> Result<isize> {
        let user = || UserSlice::new(UserPtr::from_addr(arg), size_of::<Command>());
        let mut bytes = [0; size_of::<Command>()];
        user().reader().read_slice(&mut bytes)?;
        let mut command = Command::read_from_bytes(&bytes).map_err(|_| EINVAL)?;
        this.carry_out(request, &mut command)?;
        user().writer().write_slice(command.as_bytes())?;
        Ok(0)
    }

    /// Memory that is neither anonymous nor of a file.
    fn mmap(_this: Pin<&Self>, _file: &KernelFile, vma: &VmaNew) -> Result {
        let mixed = vma.set_mixedmap();
        for va in (vma.start()..vma.end()).step_by(PAGE_SIZE) {
            // The mapping has a reference of its own.
            let page = Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;
            mixed.vm_insert_page(va, &page)?;
        }
        Ok(())
    }

    fn show_fdinfo(this: Pin<&Self>, m: &SeqFile, _file: &KernelFile) {
        this.file.show(m);
    }
}

impl Dmirror {
    fn carry_out(&self, request: u32, command: &mut Command) -> Result {
        let length = command.npages.checked_mul(PAGE_SIZE as u64).ok_or(EINVAL)?;
        let range = page_range(command.addr, length)?;
        let ptr = usize::try_from(command.ptr)?;
        command.cpages = 0;
        command.faults = 0;
        let space = self.file.owned()?;
        let _turn = self.turn.lock();
        let pages = command.npages;
        match request {
            uapi::READ | uapi::READ_UNLOCKED => {
                space.observation().begin(range.clone());
                let copied = copy(&space, range.start, ptr, range.len());
                command.faults = space.observation().end();
                copied?;
                command.cpages = pages;
            }
            uapi::WRITE => {
                space.observation().begin(range.clone());
                let copied = copy(&space, ptr, range.start, range.len());
                command.faults = space.observation().end();
                copied?;
                command.cpages = pages;
            }
            uapi::MIGRATE_TO_DEV => {
                space.migrate(range.clone(), self.kind)?;
                read_mapped(&space, &range, ptr)?;
                command.cpages = pages;
            }
            uapi::MIGRATE_TO_SYS => command.cpages = space.migrate_home(range, self.kind)? as u64,
            uapi::SNAPSHOT => {
                snapshot(&space, self.kind, &range, ptr)?;
                command.cpages = pages;
            }
            uapi::EXCLUSIVE => {
                // One piece of advice, once and for all.
                space.prefer(0..abi::VA_END as usize, self.exclusive)?;
                touch_atomically(&space, &range)?;
                read_mapped(&space, &range, ptr)?;
                command.cpages = pages;
            }
            uapi::CHECK_EXCLUSIVE if space.has_atomic(range) => return Err(EPERM),
            uapi::CHECK_EXCLUSIVE => {}
            uapi::RELEASE => release(&self.gpu)?,
            uapi::FLAGS => match pages {
                uapi::FLAG_FAIL_ALLOC => space.fail_next_allocation(),
                _ => return Err(EINVAL),
            },
            // Not ENOTTY: what the test module says.
            _ => return Err(EINVAL),
        }
        Ok(())
    }
}

/// Has the device carry out one command, and waits for its end.
///
/// # Errors
///
/// Why a fault could not be repaired, if it is that. EINTR: a signal has come; the command is still carried out. ENODEV: the
/// device is lost. EIO: the device does not want to.
fn execute(space: &AddressSpace, command: &abi::Command) -> Result {
    let submissions = space.submissions();
    let mut buffer = Submissions::buffer(1)?;
    Submissions::commands(&mut buffer).copy_from_slice(command.as_bytes());
    let request = Request {
        buffer,
        commands: 1,
        after: KVec::new(),
        eventfd: None,
    };
    let sequence = submissions.submit(RING, request, true)?;
    let mut awaited = [Awaited {
        ring: RING,
        sequence,
        end: None,
    }];
    // While there is work, the device is asked whether it lives; if not, then this ends.
    if submissions.wait(&awaited, false, None) == Waited::Interrupted {
        return Err(EINTR);
    }
    submissions.look(&mut awaited)?;
    match awaited[0].end {
        Some(end) if end.status == abi::STATUS_OK => Ok(()),
        _ if space.gpu().is_lost() => Err(ENODEV),
        _ => {
            let error = space.failure().unwrap_or(EIO);
            space.recover()?;
            Err(error)
        }
    }
}

/// Has the device copy `length` bytes.
///
/// # Errors
///
/// EFAULT: what is to be copied, or where it is to go, is not the process's. As [`execute`] otherwise.
fn copy(space: &AddressSpace, from: usize, to: usize, length: usize) -> Result {
    let limit = abi::VA_END as usize;
    if from.max(to).checked_add(length).is_none_or(|end| end > limit) {
        return Err(EFAULT);
    }
    let mut done = 0;
    while done < length {
        let piece = (length - done).min(abi::MAX_COMMAND_LENGTH as usize);
        execute(
            space,
            &abi::Command {
                opcode: abi::COMMAND_COPY,
                address: (to + done) as u64,
                source: (from + done) as u64,
                length: piece as u64,
                ..abi::Command::default()
            },
        )?;
        done += piece;
    }
    Ok(())
}

/// Has the device do an atomic operation on each page of `range`.
fn touch_atomically(space: &AddressSpace, range: &Range<usize>) -> Result {
    execute(
        space,
        &abi::Command {
            opcode: abi::COMMAND_ATOMIC,
            operation: abi::ATOMIC_ADD,
            width: 8,
            repeat: u32::try_from(range.len() / PAGE_SIZE)?,
            address: range.start as u64,
            stride: PAGE_SIZE as u32,
            ..abi::Command::default()
        },
    )
}

/// Has the device read `range`, all of which it has to have in its page table.
///
/// # Errors
///
/// ENOENT: it has not.
fn read_mapped(space: &AddressSpace, range: &Range<usize>, ptr: usize) -> Result {
    if space.mapped(range.clone()) * PAGE_SIZE < range.len() {
        return Err(ENOENT);
    }
    copy(space, range.start, ptr, range.len())
}

/// Brings home all that is in the VRAM of `gpu`.
///
/// # Errors
///
/// EBUSY: there still is something, or something again. EINTR.
fn release(gpu: &Gpu) -> Result {
    for _ in 0..RELEASE_ROUNDS {
        if Residency::vacate(gpu, 1) {
            return Ok(());
        }
        if kernel::current!().signal_pending() {
            return Err(EINTR);
        }
    }
    Err(EBUSY)
}

/// Stores what the CPU's page table says about `range` at `ptr`, a byte for each page.
///
/// # Errors
///
/// EFAULT: it cannot be stored there. EINTR: a signal has come. As [`AddressSpace::snapshot`] otherwise.
fn snapshot(space: &AddressSpace, kind: Kind, range: &Range<usize>, ptr: usize) -> Result {
    let mut writer = UserSlice::new(UserPtr::from_addr(ptr), range.len() / PAGE_SIZE).writer();
    let mut bytes = KVec::with_capacity(MAX_PAGES, GFP_KERNEL)?;
    for start in range.clone().step_by(MAX_PAGES * PAGE_SIZE) {
        // The range can be all there is.
        if kernel::current!().signal_pending() {
            return Err(EINTR);
        }
        let end = (start + MAX_PAGES * PAGE_SIZE).min(range.end);
        bytes.clear();
        let mut result = Ok(());
        space.snapshot(start..end, kind == Kind::Private, |page| {
            result = result.and(
                bytes
                    .push_within_capacity(describe(&page, kind))
                    .map_err(|_| EINVAL),
            );
        })?;
        result?;
        writer.write_slice(&bytes)?;
    }
    Ok(())
}

/// `HMM_DMIRROR_PROT_*` of a page, for a device whose memory is of that kind.
fn describe(page: &Seen, kind: Kind) -> u8 {
    let (what, writable, order) = match *page {
        Seen::Error => return uapi::PROT_ERROR,
        Seen::Nothing => return uapi::PROT_NONE,
        Seen::System { pfn, writable, order } if pfn.is_zero() => (uapi::PROT_ZERO, writable, order),
        Seen::System { writable, order, .. } => (uapi::PROT_NONE, writable, order),
        Seen::Private { writable, order } => (uapi::PROT_DEV_PRIVATE_LOCAL, writable, order),
        Seen::Coherent {
            local: true,
            writable,
            order,
        } if kind == Kind::Coherent => (uapi::PROT_DEV_COHERENT_LOCAL, writable, order),
        Seen::Coherent { writable, order, .. } => (uapi::PROT_DEV_COHERENT_REMOTE, writable, order),
    };
    let access = if writable {
        uapi::PROT_WRITE
    } else {
        uapi::PROT_READ
    };
    let size = match order {
        PMD_ORDER => uapi::PROT_PMD,
        PUD_ORDER => uapi::PROT_PUD,
        _ => 0,
    };
    what | access | size
}
