// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/pinionN`: the ioctls. `uapi/pinion.h` describes them.

use crate::{
    abi,
    address_space::{AddressSpace, Statistics},
    advice::{Atomics, Location},
    chardev::{self, CharDevice},
    eventfd::EventFd,
    fence::{Progress, Waited, MAX_COMMANDS, MAX_SUBMISSIONS},
    fence_file::{self, FenceFile},
    gpu::Gpu,
    hmm::{memory::Kind, migrate},
    ring::{Fence, Request},
    submission::{Awaited, Submissions},
    uapi,
};
use core::ops::Range;
use kernel::{
    bindings, current,
    fs::{
        file::{flags, FileDescriptorReservation},
        File, Kiocb,
    },
    ioctl::{_IOC_DIR, _IOC_NR, _IOC_TYPE},
    iov::IovIterDest,
    miscdevice::{MiscDevice, MiscDeviceRegistration},
    mm::Mm,
    new_mutex,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        poll::PollTable,
        Arc, Mutex,
    },
    time::{ClockSource, Monotonic},
    uaccess::{UserPtr, UserSlice},
};

/// Bytes of a page.
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// An open file.
#[pin_data(PinnedDrop)]
pub(crate) struct FileHandle {
    gpu: Arc<Gpu>,
    /// Tells files apart in fdinfo.
    number: i64,
    /// The opener's memory.
    mm: ARef<Mm>,
    statistics: Arc<Statistics>,
    progress: Arc<Progress>,
    /// Made when it is first used, rather than by `open`, which runs under a lock of all misc devices and had
    /// better not wait for this one.
    #[pin]
    space: Mutex<Option<Arc<AddressSpace>>>,
}

#[pinned_drop]
impl PinnedDrop for FileHandle {
    fn drop(self: Pin<&mut Self>) {
        let space = self.space.lock().take();
        if let Some(space) = space {
            space.close();
        }
    }
}

/// The number of the last file that was opened.
static FILES: Atomic<i64> = Atomic::new(0);

#[vtable]
impl MiscDevice for FileHandle {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, device: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        // SAFETY: This is `open`, and `Gpu` is what registers this type.
        let gpu = unsafe { CharDevice::<Self, Arc<Gpu>>::data_of(device) };
        KBox::pin_init(Self::new(gpu)?, GFP_KERNEL)
    }

    // Structures have the same layout for 32-bit callers, whose pointers the `kernel` crate's `compat_ioctl` extends.
    fn ioctl(this: Pin<&Self>, file: &File, cmd: u32, arg: usize) -> Result<isize> {
        const READ_WRITE: u32 = kernel::uapi::_IOC_READ | kernel::uapi::_IOC_WRITE;
        if _IOC_TYPE(cmd) != uapi::IOCTL_BASE || _IOC_DIR(cmd) != READ_WRITE {
            return Err(ENOTTY);
        }
        // The size is in the structure.
        match _IOC_NR(cmd) {
            uapi::INFO => this.info(arg)?,
            uapi::SUBMIT => this.submit(arg, file.flags() & flags::O_NONBLOCK == 0)?,
            uapi::WAIT => this.wait(arg)?,
            uapi::ADVISE => this.advise(arg)?,
            uapi::QUERY => this.query(arg)?,
            uapi::PREFETCH => this.prefetch(arg)?,
            uapi::DISCARD => this.discard(arg)?,
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }

    fn read_iter(kiocb: Kiocb<'_, Self::Ptr>, output: &mut IovIterDest<'_>) -> Result<usize> {
        let this = kiocb.file();
        // Not only for the check: a file without an address space is not told when the device is lost.
        this.owned()?;
        if output.len() < size_of::<u64>() {
            return Err(EINVAL);
        }
        let may_wait = !chardev::is_nonblocking(&kiocb);
        let count = this.progress.read(may_wait)?;
        match output.copy_to_iter(count.as_bytes()) {
            size if size == size_of::<u64>() => Ok(size),
            _ => {
                this.progress.unread(count);
                Err(EFAULT)
            }
        }
    }

    fn show_fdinfo(this: Pin<&Self>, m: &SeqFile, _file: &File) {
        this.show(m);
    }
}

impl chardev::Poll for FileHandle {
    fn poll(this: Pin<&Self>, file: &File, table: PollTable<'_>) -> u32 {
        this.progress.poll(file, table)
    }
}

/// An array of a program: `count` of `T`.
fn read_array<T: FromBytes + IntoBytes + zerocopy::Immutable>(pointer: u64, count: u32) -> Result<KVec<T>> {
    let count = count as usize;
    let mut array = KVec::with_capacity(count, GFP_KERNEL)?;
    for _ in 0..count {
        array.push(T::new_zeroed(), GFP_KERNEL)?;
    }
    let pointer = UserPtr::from_addr(usize::try_from(pointer)?);
    UserSlice::new(pointer, count * size_of::<T>())
        .reader()
        .read_slice(array.as_mut_bytes())?;
    Ok(array)
}

/// A page-aligned range of user addresses.
pub(crate) fn page_range(address: u64, length: u64) -> Result<Range<usize>> {
    let end = address.checked_add(length).ok_or(EINVAL)?;
    if length == 0 || address % abi::PAGE_SIZE != 0 || length % abi::PAGE_SIZE != 0 || end > abi::VA_END {
        return Err(EINVAL);
    }
    Ok(usize::try_from(address)?..usize::try_from(end)?)
}

impl FileHandle {
    /// One that the current process has opened.
    ///
    /// # Errors
    ///
    /// ENODEV: the device is lost.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<impl PinInit<Self>> {
        if gpu.is_lost() {
            return Err(ENODEV);
        }
        let current = current!();
        let mm: ARef<Mm> = current.mm().map(|mm| -> &Mm { mm }).ok_or(ESRCH)?.into();
        let statistics = Arc::new(Statistics::new(), GFP_KERNEL)?;
        let progress = Progress::new()?;
        let gpu = gpu.clone();
        Ok(pin_init!(Self {
            gpu,
            number: FILES.fetch_add(1, Relaxed) + 1,
            mm,
            statistics,
            progress,
            space <- new_mutex!(None, "FileHandle::space"),
        }))
    }

    /// The address space means the memory of the process that opened it: nobody else may use it.
    fn check_owner(&self) -> Result {
        let current = current!();
        let mm: &Mm = current.mm().ok_or(EPERM)?;
        if core::ptr::eq(mm.as_raw(), self.mm.as_raw()) {
            Ok(())
        } else {
            Err(EPERM)
        }
    }

    /// The address space, which comes into being when it is first used.
    ///
    /// # Errors
    ///
    /// EPERM: it is another process's.
    pub(crate) fn owned(&self) -> Result<Arc<AddressSpace>> {
        self.check_owner()?;
        let mut space = self.space.lock();
        match &*space {
            Some(space) => Ok(space.clone()),
            None => {
                let new = AddressSpace::open(&self.gpu, &self.mm, self.statistics.clone(), &self.progress)?;
                Ok(space.insert(new).clone())
            }
        }
    }

    fn info(&self, arg: usize) -> Result {
        let request: uapi::Info = uapi::read(arg)?;
        let limits = self.gpu.limits();
        let info = uapi::Info {
            size: request.size,
            flags: 0,
            version: uapi::VERSION,
            rings: limits.rings,
            max_batch: limits.max_batch,
            pin_method: if migrate::KERNEL_PINS {
                uapi::PIN_METHOD_MIGRATE_PFN
            } else {
                uapi::PIN_METHOD_TAKEOVER
            },
            vram_size: limits.vram_size,
            max_submissions: MAX_SUBMISSIONS as u32,
            max_commands: MAX_COMMANDS as u32,
            atomics: self.mechanisms(),
            locations: self.locations(),
            aperture_size: (self.gpu.memory().usage(Kind::Coherent).total * PAGE_SIZE) as u64,
        };
        uapi::write(arg, request.size, &info)
    }

    fn submit(&self, arg: usize, may_wait: bool) -> Result {
        let space = self.owned()?;
        let submissions = space.submissions();
        let mut request: uapi::Submit = uapi::read(arg)?;
        let with_eventfd = request.flags & uapi::SUBMIT_EVENTFD != 0;
        if !(1..=self.gpu.limits().max_batch).contains(&request.count)
            || request.fence_count > uapi::MAX_FENCES
            || (request.fences != 0) != (request.fence_count != 0)
            || (request.eventfd != 0 && !with_eventfd)
            || request.fence != 0
            || request.reserved != 0
            || request.sequence != 0
        {
            return Err(EINVAL);
        }
        let commands = request.count as usize;
        let mut buffer = Submissions::buffer(commands)?;
        let pointer = UserPtr::from_addr(usize::try_from(request.commands)?);
        UserSlice::new(pointer, commands * size_of::<abi::Command>())
            .reader()
            .read_slice(Submissions::commands(&mut buffer))?;
        let mut opcodes = Submissions::commands(&mut buffer)
            .iter()
            .skip(core::mem::offset_of!(abi::Command, opcode))
            .step_by(size_of::<abi::Command>());
        if !opcodes.all(|opcode| uapi::may_be_used(*opcode)) {
            return Err(EINVAL);
        }
        let mut after = KVec::with_capacity(request.fence_count as usize, GFP_KERNEL)?;
        for fence in &read_array::<uapi::Fence>(request.fences, request.fence_count)? {
            after.push(self.fence(submissions, fence)?, GFP_KERNEL)?;
        }
        let eventfd = if with_eventfd {
            Some(EventFd::from_descriptor(request.eventfd)?)
        } else {
            None
        };
        let wants_fence = request.flags & uapi::SUBMIT_FENCE != 0;
        let descriptor = if wants_fence {
            let descriptor = FileDescriptorReservation::get_unused_fd_flags(bindings::O_CLOEXEC)?;
            Some((descriptor, FenceFile::new()?))
        } else {
            None
        };
        let work = Request {
            buffer,
            commands,
            after,
            eventfd,
        };
        request.sequence = submissions.submit(request.ring, work, may_wait)?;
        // From here on the work is queued, and goes on whatever comes of telling so.
        let Some((descriptor, file)) = descriptor else {
            return uapi::write(arg, request.size, &request);
        };
        request.fence = descriptor.reserved_fd() as i32;
        let file = file.of(submissions.fence(request.ring, request.sequence)?);
        uapi::write(arg, request.size, &request)?;
        descriptor.fd_install(file);
        Ok(())
    }

    /// What `fence` stands for.
    fn fence(&self, submissions: &Submissions, fence: &uapi::Fence) -> Result<Fence> {
        match fence.kind {
            uapi::FENCE_SEQUENCE => submissions.fence(fence.id, fence.sequence),
            uapi::FENCE_DESCRIPTOR if fence.sequence == 0 => fence_file::get(fence.id),
            _ => Err(EINVAL),
        }
    }

    fn wait(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let mut request: uapi::Wait = uapi::read(arg)?;
        if !(1..=uapi::MAX_FENCES).contains(&request.count) {
            return Err(EINVAL);
        }
        let mut entries = read_array::<uapi::WaitEntry>(request.entries, request.count)?;
        let mut awaited = KVec::with_capacity(entries.len(), GFP_KERNEL)?;
        for entry in &entries {
            if entry.reserved != 0 {
                return Err(EINVAL);
            }
            let one = Awaited {
                ring: entry.ring,
                sequence: entry.sequence,
                end: None,
            };
            awaited.push(one, GFP_KERNEL)?;
        }
        let submissions = space.submissions();
        let now = Monotonic::ktime_get();
        let absolute = request.flags & uapi::WAIT_ABSOLUTE != 0;
        let remaining = if absolute {
            (request.timeout_ns >= 0).then(|| request.timeout_ns.saturating_sub(now).max(0))
        } else {
            (request.timeout_ns >= 0).then_some(request.timeout_ns)
        };
        let any = request.flags & uapi::WAIT_ANY != 0;
        submissions.look(&mut awaited)?;
        let milliseconds = remaining.map(|remaining| remaining.unsigned_abs().div_ceil(1_000_000));
        let waited = submissions.wait(&awaited, any, milliseconds);
        request.ended = submissions.look(&mut awaited)? as u32;
        for (entry, one) in entries.iter_mut().zip(&awaited) {
            match one.end {
                Some(end) => {
                    entry.status = end.status;
                    entry.fault_address = end.fault_va;
                    entry.repeats = end.repeats;
                    entry.executed = end.executed;
                }
                None => entry.status = uapi::STATUS_PENDING,
            }
        }
        if let Some(remaining) = remaining.filter(|_| !absolute) {
            let passed = Monotonic::ktime_get().saturating_sub(now);
            request.timeout_ns = remaining.saturating_sub(passed).max(0);
        }
        let pointer = UserPtr::from_addr(usize::try_from(request.entries)?);
        UserSlice::new(pointer, entries.len() * size_of::<uapi::WaitEntry>())
            .writer()
            .write_slice(entries.as_bytes())?;
        uapi::write(arg, request.size, &request)?;
        match waited {
            Waited::Done => Ok(()),
            Waited::TimedOut => Err(ETIMEDOUT),
            Waited::Interrupted => Err(ERESTARTSYS),
        }
    }

    fn advise(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let request: uapi::Advise = uapi::read(arg)?;
        let range = page_range(request.address, request.length)?;
        match (request.advice, request.value) {
            (uapi::ADVISE_ATOMICS, atomics) => {
                let mechanism = match atomics {
                    uapi::ATOMICS_AUTO => Atomics::Auto,
                    uapi::ATOMICS_PIN => Atomics::Pin,
                    uapi::ATOMICS_EXCLUSIVE => Atomics::Exclusive,
                    uapi::ATOMICS_MIGRATE => Atomics::Migrate,
                    uapi::ATOMICS_UNPROTECTED => Atomics::Unprotected,
                    _ => return Err(EINVAL),
                };
                if self.mechanisms() & 1 << atomics == 0 {
                    return Err(EOPNOTSUPP);
                }
                space.advise(range, mechanism)
            }
            (uapi::ADVISE_LOCATION, location) => space.advise_location(range, self.location(location)?),
            _ => Err(EINVAL),
        }
    }

    /// How the GPU can get exclusive access: bits of `uapi::ATOMICS_*`.
    fn mechanisms(&self) -> u32 {
        let mut bits = 1 << uapi::ATOMICS_AUTO
            | 1 << uapi::ATOMICS_PIN
            | 1 << uapi::ATOMICS_EXCLUSIVE
            | 1 << uapi::ATOMICS_UNPROTECTED;
        if self.has_vram() {
            bits |= 1 << uapi::ATOMICS_MIGRATE;
        }
        bits
    }

    /// Where pages can be: bits of `uapi::LOCATION_*`.
    fn locations(&self) -> u32 {
        let mut bits = 1 << uapi::LOCATION_NONE | 1 << uapi::LOCATION_SYSTEM;
        if self.has_vram() {
            bits |= 1 << uapi::LOCATION_VRAM;
        }
        if self.gpu.memory().usage(Kind::Coherent).total > 0 {
            bits |= 1 << uapi::LOCATION_APERTURE;
        }
        bits
    }

    fn has_vram(&self) -> bool {
        let memory = self.gpu.memory();
        Kind::ALL.into_iter().any(|kind| memory.usage(kind).total > 0)
    }

    /// A place of that number, which must be there.
    fn location(&self, location: u32) -> Result<Location> {
        let place = match location {
            uapi::LOCATION_NONE => Location::Anywhere,
            uapi::LOCATION_SYSTEM => Location::System,
            uapi::LOCATION_VRAM => Location::Vram,
            uapi::LOCATION_APERTURE => Location::Aperture,
            _ => return Err(EINVAL),
        };
        if self.locations() & 1 << location == 0 {
            return Err(EOPNOTSUPP);
        }
        Ok(place)
    }

    fn prefetch(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let request: uapi::Prefetch = uapi::read(arg)?;
        let range = page_range(request.address, request.length)?;
        if request.reserved != 0 || request.location == uapi::LOCATION_NONE {
            return Err(EINVAL);
        }
        match space.prefetch(range, self.location(request.location)?) {
            // To begin again does no harm: what is there already is there.
            Err(error) if error == EINTR => Err(ERESTARTSYS),
            other => other,
        }
    }

    fn discard(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let request: uapi::Discard = uapi::read(arg)?;
        match space.discard(page_range(request.address, request.length)?) {
            // As for a prefetch.
            Err(error) if error == EINTR => Err(ERESTARTSYS),
            other => other,
        }
    }

    fn query(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let request: uapi::Query = uapi::read(arg)?;
        if request.count > uapi::QUERY_MAX {
            return Err(EINVAL);
        }
        let length = request.count.checked_mul(abi::PAGE_SIZE).ok_or(EINVAL)?;
        let range = page_range(request.address, length)?;
        let privileged = chardev::caller_is_administrator();
        let size = request.count as usize * size_of::<uapi::Page>();
        let pointer = UserPtr::from_addr(usize::try_from(request.pages)?);
        let mut writer = UserSlice::new(pointer, size).writer();
        for va in range.step_by(PAGE_SIZE) {
            let found = space.query(va)?;
            let page = uapi::Page {
                state: found.state,
                // The bits are in the order of the page table entry's, which has VALID in front.
                rights: u32::from(found.rights >> 1),
                page_size: found.size as u32,
                reserved: 0,
                pfn: found
                    .pfn
                    .filter(|_| privileged)
                    .map_or(0, |pfn| pfn.number() as u64),
            };
            writer.write_slice(page.as_bytes())?;
        }
        Ok(())
    }

    /// The statistics, for fdinfo. docs/driver.md says what they mean.
    pub(crate) fn show(&self, m: &SeqFile) {
        seq_print!(m, "pinion-driver:\tpinion\n");
        seq_print!(m, "pinion-device:\tpinion{}\n", self.gpu.number());
        seq_print!(m, "pinion-client-id:\t{}\n", self.number);
        let statistics = &self.statistics;
        seq_print!(m, "pinion-faults:\t{}\n", statistics.faults.load(Relaxed));
        seq_print!(m, "pinion-pins:\t{}\n", statistics.pins.load(Relaxed));
        seq_print!(m, "pinion-unpins:\t{}\n", statistics.unpins.load(Relaxed));
        seq_print!(m, "pinion-mirrors:\t{}\n", statistics.mirrors.load(Relaxed));
        seq_print!(m, "pinion-exclusives:\t{}\n", statistics.exclusives.load(Relaxed));
        seq_print!(m, "pinion-to-vram:\t{}\n", statistics.to_vram.load(Relaxed));
        seq_print!(m, "pinion-from-vram:\t{}\n", statistics.from_vram.load(Relaxed));
        seq_print!(m, "pinion-evictions:\t{}\n", statistics.evictions.load(Relaxed));
        seq_print!(
            m,
            "pinion-invalidations:\t{}\n",
            statistics.invalidations.load(Relaxed)
        );
        let counters = &self.progress.counters;
        seq_print!(m, "pinion-submissions:\t{}\n", counters.submissions.load(Relaxed));
        seq_print!(m, "pinion-commands:\t{}\n", counters.commands.load(Relaxed));
        seq_print!(m, "pinion-completed:\t{}\n", counters.completed.load(Relaxed));
        seq_print!(m, "pinion-failed:\t{}\n", counters.failed.load(Relaxed));
        seq_print!(m, "pinion-outstanding:\t{}\n", self.progress.outstanding());
        let space = self.space.lock().clone();
        let Some(space) = space else { return };
        for (ring, timeline) in space.submissions().timelines().iter().enumerate() {
            seq_print!(
                m,
                "pinion-engine-ring{}:\t{} ns\n",
                ring,
                timeline.busy.load(Relaxed)
            );
        }
    }
}
