// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/pinionN`: the ioctls. `uapi/pinion.h` describes them.

use crate::{
    abi,
    address_space::{AddressSpace, Statistics},
    advice::{Atomics, Location},
    chardev::{self, CharDevice},
    gpu::Gpu,
    hmm::migrate,
    uapi,
};
use core::ops::Range;
use kernel::{
    current,
    fs::File,
    ioctl::{_IOC_DIR, _IOC_NR, _IOC_TYPE},
    miscdevice::{MiscDevice, MiscDeviceRegistration},
    mm::Mm,
    new_mutex,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{aref::ARef, atomic::Relaxed, Arc, Mutex},
    uaccess::{UserPtr, UserSlice},
};

/// An open file.
#[pin_data(PinnedDrop)]
pub(crate) struct FileHandle {
    gpu: Arc<Gpu>,
    /// The opener's memory.
    mm: ARef<Mm>,
    statistics: Arc<Statistics>,
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

#[vtable]
impl MiscDevice for FileHandle {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, device: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        // SAFETY: This is `open`, and `Gpu` is what registers this type.
        let gpu = unsafe { CharDevice::<Self, Arc<Gpu>>::data_of(device) };
        if gpu.is_lost() {
            return Err(ENODEV);
        }
        let current = current!();
        let mm: &Mm = current.mm().ok_or(ESRCH)?;
        let statistics = Arc::new(Statistics::new(), GFP_KERNEL)?;
        KBox::pin_init(
            pin_init!(Self {
                gpu: gpu.clone(),
                mm: mm.into(),
                statistics,
                space <- new_mutex!(None, "FileHandle::space"),
            }),
            GFP_KERNEL,
        )
    }

    fn ioctl(this: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        const READ_WRITE: u32 = kernel::uapi::_IOC_READ | kernel::uapi::_IOC_WRITE;
        if _IOC_TYPE(cmd) != uapi::IOCTL_BASE || _IOC_DIR(cmd) != READ_WRITE {
            return Err(ENOTTY);
        }
        // The size is in the structure.
        match _IOC_NR(cmd) {
            uapi::INFO => this.info(arg)?,
            uapi::SUBMIT => this.submit(arg)?,
            uapi::WAIT => this.wait(arg)?,
            uapi::ADVISE => this.advise(arg)?,
            uapi::QUERY => this.query(arg)?,
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }

    fn show_fdinfo(this: Pin<&Self>, m: &SeqFile, _file: &File) {
        let statistics = &this.statistics;
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
        seq_print!(
            m,
            "pinion-submissions:\t{}\n",
            statistics.submissions.load(Relaxed)
        );
    }
}

/// A page-aligned range of user addresses.
fn page_range(address: u64, length: u64) -> Result<Range<usize>> {
    let end = address.checked_add(length).ok_or(EINVAL)?;
    if length == 0 || address % abi::PAGE_SIZE != 0 || length % abi::PAGE_SIZE != 0 || end > abi::VA_END {
        return Err(EINVAL);
    }
    Ok(usize::try_from(address)?..usize::try_from(end)?)
}

impl FileHandle {
    /// The address space means the memory of the process that opened it: nobody else may use it.
    fn owned(&self) -> Result<Arc<AddressSpace>> {
        let current = current!();
        let mm: &Mm = current.mm().ok_or(EPERM)?;
        if !core::ptr::eq(mm.as_raw(), self.mm.as_raw()) {
            return Err(EPERM);
        }
        let mut space = self.space.lock();
        match &*space {
            Some(space) => Ok(space.clone()),
            None => {
                let new = AddressSpace::open(&self.gpu, mm, self.statistics.clone())?;
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
        };
        uapi::write(arg, request.size, &info)
    }

    fn submit(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let mut request: uapi::Submit = uapi::read(arg)?;
        if !(1..=self.gpu.limits().max_batch).contains(&request.count) {
            return Err(EINVAL);
        }
        let mut commands = KVec::with_capacity(request.count as usize, GFP_KERNEL)?;
        let pointer = UserPtr::from_addr(usize::try_from(request.commands)?);
        let size = request.count as usize * size_of::<abi::Command>();
        let mut reader = UserSlice::new(pointer, size).reader();
        for _ in 0..request.count {
            let mut command = abi::Command::default();
            reader.read_slice(command.as_mut_bytes())?;
            commands.push(command, GFP_KERNEL)?;
        }
        request.sequence = space.submissions().submit(request.ring, &commands)?;
        uapi::write(arg, request.size, &request)
    }

    fn wait(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let mut request: uapi::Wait = uapi::read(arg)?;
        if request.reserved != 0 {
            return Err(EINVAL);
        }
        let milliseconds = request.timeout_ns.div_ceil(1_000_000);
        let end = space
            .submissions()
            .wait(request.ring, request.sequence, milliseconds)?;
        request.status = end.status;
        request.fault_address = end.fault_va;
        request.executed = end.executed;
        request.repeats = end.repeats;
        uapi::write(arg, request.size, &request)
    }

    fn advise(&self, arg: usize) -> Result {
        let space = self.owned()?;
        let request: uapi::Advise = uapi::read(arg)?;
        let range = page_range(request.address, request.length)?;
        match (request.advice, request.value) {
            (uapi::ADVISE_ATOMICS, uapi::ATOMICS_PIN) => space.advise(range, Atomics::Pin),
            (uapi::ADVISE_ATOMICS, uapi::ATOMICS_UNPROTECTED) => space.advise(range, Atomics::Unprotected),
            (2, 0) => space.advise_location(range, Location::Anywhere),
            (2, 1) => space.advise_location(range, Location::System),
            (2, 2) => space.advise_location(range, Location::Vram),
            (3, 2) => space.advise(range, Atomics::Exclusive),
            (3, 3) => space.advise(range, Atomics::Migrate),
            (4, 1) => space.prefetch(range, Location::System),
            (4, 2) => space.prefetch(range, Location::Vram),
            _ => Err(EINVAL),
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
        for va in range.step_by(kernel::page::PAGE_SIZE) {
            let found = space.query(va)?;
            let page = uapi::Page {
                state: found.state,
                // The bits are in the order of the page table entry's, which has VALID in front.
                rights: u32::from(found.rights >> 1),
                pfn: found
                    .pfn
                    .filter(|_| privileged)
                    .map_or(0, |pfn| pfn.number() as u64),
            };
            writer.write_slice(page.as_bytes())?;
        }
        Ok(())
    }
}
