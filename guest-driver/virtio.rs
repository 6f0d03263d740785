// SPDX-License-Identifier: GPL-2.0-only

//! Virtio drivers and virtqueues.
//!
//! A [`Transport`] owns the queues of a device. Each queue is a [`Channel`]: a fixed number of slots with
//! buffers that are allocated beforehand. Sending a request takes a slot, never memory, so that it can be
//! done from where nothing may be allocated (MMU notifiers under reclaim).
//!
//! Who owns a slot's buffers is its state: `Free` and `Done` slots belong to the driver, `Sent` ones to the
//! device. A request that is given up (timeout) leaves its slot with the device until the device answers
//! after all or is reset; the memory is never reused before.
//!
//! Locking: a channel's one spinlock is taken with interrupts disabled and is a leaf.
//!
//! C headers: `include/linux/virtio.h`, `include/linux/virtio_config.h`. Specification: OASIS virtio 1.3.

use crate::{
    bindings as c,
    sync::{Completion, Semaphore},
};
use core::{marker::PhantomData, mem::size_of, ops::Range, ptr};
use kernel::{
    device,
    error::to_result,
    new_spinlock_irq,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, SpinLockIrq,
    },
    time::Msecs,
    types::{ForeignOwnable, Opaque},
};
use zerocopy::FromBytes;

/// A virtio device that is bound to a driver.
#[repr(transparent)]
pub(crate) struct Device(Opaque<c::virtio_device>);

impl Device {
    fn as_raw(&self) -> *mut c::virtio_device {
        self.0.get()
    }

    /// The generic device, for messages.
    pub(crate) fn generic(&self) -> &device::Device {
        // SAFETY: `self` is a valid virtio device, whose `dev` lives as long.
        unsafe { device::Device::from_raw(c::pinion_virtio_device(self.as_raw()).cast()) }
    }

    /// Reads the beginning of the configuration space.
    pub(crate) fn read_config<T: FromBytes + zerocopy::IntoBytes>(&self) -> T {
        let mut config = T::new_zeroed();
        let bytes = config.as_mut_bytes();
        // SAFETY: `bytes` is valid for writes of its length.
        unsafe { c::pinion_virtio_read_config(self.as_raw(), bytes.as_mut_ptr().cast(), bytes.len()) };
        config
    }

    /// The physical addresses at which the driver finds the shared memory region `id`, if there is one.
    pub(crate) fn shared_memory(&self, id: u8) -> Option<Range<usize>> {
        let (mut start, mut size) = (0, 0);
        // SAFETY: The device is valid, and both are valid for writes.
        let found = unsafe { c::pinion_virtio_get_shm_region(self.as_raw(), id, &mut start, &mut size) };
        let end = start.checked_add(size).filter(|_| found)?;
        Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }
}

/// A virtio driver. Its data is shared by the callbacks below and whatever else holds the `Arc`.
pub(crate) trait Driver: Send + Sync + Sized + 'static {
    /// Name of the driver.
    const NAME: &'static CStr;
    /// The device id that it drives.
    const DEVICE_ID: u32;

    /// Takes a device, as far as that goes without it answering.
    fn probe(device: &Device) -> Result<Arc<Self>>;

    /// Starts the device. From here on there are interrupts. If this fails then `remove` is called.
    fn started(this: &Arc<Self>) -> Result;

    /// The device has used buffers of queue `queue`. Runs in a hard interrupt.
    fn interrupt(this: &Arc<Self>, queue: u16);

    /// Lets go of the device: when this returns, nothing may use it any more.
    fn remove(this: Arc<Self>);
}

/// A registered driver; dropping it unregisters.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Driver> {
    #[pin]
    driver: Opaque<c::virtio_driver>,
    #[pin]
    ids: Opaque<[c::virtio_device_id; 2]>,
    _driver: PhantomData<T>,
}

// SAFETY: A registration has no methods; it can be dropped from any thread.
unsafe impl<T: Driver> Send for Registration<T> {}
// SAFETY: As above.
unsafe impl<T: Driver> Sync for Registration<T> {}

/// `VIRTIO_DEV_ANY_ID`.
const ANY_VENDOR: u32 = 0xffff_ffff;

impl<T: Driver> Registration<T> {
    /// Registers the driver, and probes the devices that are there.
    pub(crate) fn new(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let ids = [
            c::virtio_device_id {
                device: T::DEVICE_ID,
                vendor: ANY_VENDOR,
            },
            c::virtio_device_id { device: 0, vendor: 0 },
        ];
        try_pin_init!(&this in Self {
            ids: Opaque::new(ids),
            driver <- Opaque::try_ffi_init(|slot: *mut c::virtio_driver| {
                // SAFETY: `slot` is valid for writes; all-zero is a valid `struct virtio_driver`, and the
                // fields that the core requires are set right here. `this.ids` has been initialised above
                // and is pinned like the driver itself.
                unsafe {
                    ptr::write_bytes(slot, 0, 1);
                    (*slot).driver.name = T::NAME.as_char_ptr();
                    (*slot).id_table = Opaque::cast_into(&raw const (*this.as_ptr()).ids).cast();
                    (*slot).probe = Some(Self::probe);
                    (*slot).remove = Some(Self::remove);
                }
                // SAFETY: `slot` is an initialised driver that stays in place until it is unregistered.
                to_result(unsafe { c::__register_virtio_driver(slot, module.as_ptr()) })
            }),
            _driver: PhantomData,
        })
    }

    /// # Safety
    ///
    /// Called by the virtio core with a device that is being bound.
    unsafe extern "C" fn probe(raw: *mut c::virtio_device) -> c_int {
        // SAFETY: `Device` is transparent, and the core keeps the device alive during the call.
        let device = unsafe { &*raw.cast::<Device>() };
        match T::probe(device) {
            Ok(data) => {
                let started = data.clone();
                // SAFETY: The device is valid; its private pointer is the driver's to use. `remove` takes
                // this reference back.
                unsafe { c::pinion_virtio_set_private(raw, data.into_foreign().cast()) };
                match T::started(&started) {
                    Ok(()) => 0,
                    Err(error) => {
                        drop(started);
                        // SAFETY: The device is valid and its private data set; the core does not call
                        // `remove` after a probe that has failed.
                        unsafe { Self::remove(raw) };
                        error.to_errno()
                    }
                }
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by the virtio core with a device that `probe` took.
    unsafe extern "C" fn remove(raw: *mut c::virtio_device) {
        // SAFETY: `probe` has put it there, and the core calls `remove` once.
        let data = unsafe {
            let private = c::pinion_virtio_get_private(raw);
            Arc::<T>::from_foreign(private.cast())
        };
        T::remove(data);
        // SAFETY: The device is valid. `T::remove` has ended the transport, and with it all callbacks.
        unsafe { c::pinion_virtio_set_private(raw, ptr::null_mut()) };
    }

    /// # Safety
    ///
    /// Called by the virtio core with a queue of a device of this driver.
    unsafe extern "C" fn callback(vq: *mut c::virtqueue) {
        // SAFETY: The queue is valid, and so is its device. The private pointer is null or what `probe`
        // put there; in the latter case `remove` takes its reference only after the callbacks have ended,
        // so that the reference is live here.
        unsafe {
            let private = c::pinion_virtio_get_private(c::pinion_virtqueue_device(vq));
            if !private.is_null() {
                let data = core::mem::ManuallyDrop::new(Arc::<T>::from_foreign(private.cast()));
                T::interrupt(&data, c::pinion_virtqueue_index(vq) as u16);
            }
        }
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered in `new`.
        unsafe { c::unregister_virtio_driver(self.driver.get()) };
    }
}

/// How many slots of which size a channel has.
pub(crate) struct Layout {
    /// Bytes that the device reads, at most.
    pub(crate) output: usize,
    /// Bytes that the device writes.
    pub(crate) input: usize,
    /// Number of slots, at most.
    pub(crate) slots: usize,
}

/// The queues of a device. Dropping it resets the device and ends all requests.
pub(crate) struct Transport {
    device: *mut c::virtio_device,
    channels: KVec<Arc<Channel>>,
}

// SAFETY: The device pointer is used only to reset the device and to delete its queues, which may be done
// from any thread.
unsafe impl Send for Transport {}

impl Transport {
    /// Finds the queues of `device` and makes a channel of each.
    pub(crate) fn new<T: Driver>(device: &Device, layouts: &[Layout]) -> Result<Self> {
        let mut queues = KVec::from_elem(ptr::null_mut::<c::virtqueue>(), layouts.len(), GFP_KERNEL)?;
        // SAFETY: `queues` has room for that many pointers, and `callback` is made for this core's callbacks.
        to_result(unsafe {
            c::pinion_virtio_find_vqs(
                device.as_raw(),
                layouts.len() as u32,
                queues.as_mut_ptr(),
                Some(Registration::<T>::callback),
            )
        })?;
        // From here on, dropping `this` deletes the queues.
        let mut this = Self {
            device: device.as_raw(),
            channels: KVec::new(),
        };
        for (queue, layout) in queues.iter().zip(layouts) {
            // SAFETY: `find_vqs` has returned this queue. `Drop` closes the channel before it deletes the
            // queues.
            let channel = unsafe { Channel::new(*queue, layout) }?;
            this.channels.push(channel, GFP_KERNEL)?;
        }
        Ok(this)
    }

    /// Lets the device start (DRIVER_OK).
    pub(crate) fn ready(&self) {
        // SAFETY: The device is valid while the transport exists.
        unsafe { c::pinion_virtio_device_ready(self.device) };
    }

    /// The channel over queue `index`.
    pub(crate) fn channel(&self, index: usize) -> Result<Arc<Channel>> {
        self.channels.get(index).cloned().ok_or(EINVAL)
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        // SAFETY: The device is valid while the transport exists. After the reset the device touches no
        // buffer any more, and no callback is running or will.
        unsafe { c::virtio_reset_device(self.device) };
        for channel in &self.channels {
            channel.close();
        }
        // SAFETY: The channels, which alone know the queues, have just forgotten them.
        unsafe { c::pinion_virtio_del_vqs(self.device) };
    }
}

/// What to do when the device has answered a request.
pub(crate) trait Answered: Send + Sync {
    /// Takes the answer: what the device wrote, or nothing if it was reset instead. Called with interrupts
    /// disabled and the channel locked.
    fn answered(&self, tag: u64, input: Option<&[u8]>);
}

enum State {
    /// With the driver, unused.
    Free,
    /// With the device; a [`Pending`] waits for the answer.
    Sent,
    /// With the device; nobody waits for the answer any more.
    Abandoned,
    /// With the device; the answer goes to this callback, with this tag.
    Posted(Arc<dyn Answered>, u64),
    /// With the driver; so many bytes were written, or the device was reset.
    Done(Option<usize>),
}

struct Slot {
    output: KVec<u8>,
    input: KVec<u8>,
    state: State,
}

struct Inner {
    /// The queue, until the channel is closed.
    queue: Option<ptr::NonNull<c::virtqueue>>,
    slots: KVec<Slot>,
}

// SAFETY: The virtqueue is used only under the channel's lock; it has no affinity to a thread.
unsafe impl Send for Inner {}

/// A virtqueue with its slots.
#[pin_data]
pub(crate) struct Channel {
    /// # Invariants
    ///
    /// A slot that is `Sent`, `Abandoned` or `Posted` has been added to the queue with its number plus one
    /// as token, and has not come back: the device may access its buffers. The buffers of such a slot are
    /// neither reallocated nor replaced.
    #[pin]
    inner: SpinLockIrq<Inner>,
    /// Counts the free slots.
    #[pin]
    free: Semaphore,
    /// One for each slot: it is `Done`.
    done: KVec<Pin<KBox<Completion>>>,
    /// The counters.
    pub(crate) counters: Counters,
}

/// What a channel has done.
pub(crate) struct Counters {
    /// Buffers that were given to the device.
    pub(crate) sent: Atomic<i64>,
    /// Those that have come back.
    pub(crate) answered: Atomic<i64>,
    /// How often the device was told.
    pub(crate) kicks: Atomic<i64>,
    /// How often there was no free slot in time.
    pub(crate) full: Atomic<i64>,
}

impl Channel {
    /// # Safety
    ///
    /// `queue` must be valid until [`Channel::close`] is called.
    unsafe fn new(queue: *mut c::virtqueue, layout: &Layout) -> Result<Arc<Self>> {
        let queue = ptr::NonNull::new(queue).ok_or(EINVAL)?;
        // SAFETY: The queue is valid.
        let descriptors = unsafe { c::virtqueue_get_vring_size(queue.as_ptr()) } as usize;
        let both = layout.output > 0 && layout.input > 0;
        let count = layout.slots.min(if both { descriptors / 2 } else { descriptors });
        if count == 0 {
            return Err(EINVAL);
        }
        let mut slots = KVec::with_capacity(count, GFP_KERNEL)?;
        let mut done = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            let slot = Slot {
                output: KVec::zeroed(layout.output, GFP_KERNEL)?,
                input: KVec::zeroed(layout.input, GFP_KERNEL)?,
                state: State::Free,
            };
            slots.push(slot, GFP_KERNEL)?;
            done.push(KBox::pin_init(Completion::new(), GFP_KERNEL)?, GFP_KERNEL)?;
        }
        let inner = Inner {
            queue: Some(queue),
            slots,
        };
        Arc::pin_init(
            pin_init!(Self {
                inner <- new_spinlock_irq!(inner),
                free <- Semaphore::new(count),
                done,
                counters: Counters {
                    sent: Atomic::new(0),
                    answered: Atomic::new(0),
                    kicks: Atomic::new(0),
                    full: Atomic::new(0),
                },
            }),
            GFP_KERNEL,
        )
    }

    /// Number of slots.
    pub(crate) fn slots(&self) -> usize {
        self.done.len()
    }

    /// Sends a request. `write` fills the output buffer and says how much of it. Waits at most `timeout` for
    /// a free slot. The device learns of it at the next [`Channel::kick`].
    ///
    /// # Errors
    ///
    /// ETIMEDOUT, ENODEV after the channel was closed.
    fn send(&self, state: State, timeout: Msecs, write: impl FnOnce(&mut [u8]) -> usize) -> Result<usize> {
        if let Err(error) = self.free.down(timeout) {
            self.counters.full.add(1, Relaxed);
            return Err(error);
        }
        self.send_from(state, |output| write(output))
    }

    /// The same, with a unit of `free` that was taken. `write` may replace the buffer, which is the driver's here.
    fn send_from(&self, state: State, write: impl FnOnce(&mut KVec<u8>) -> usize) -> Result<usize> {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let free = inner
            .slots
            .iter()
            .position(|slot| matches!(slot.state, State::Free));
        let (Some(queue), Some(index)) = (inner.queue, free) else {
            // Closed, for the semaphore counts the free slots.
            drop(guard);
            self.free.up();
            return Err(ENODEV);
        };
        let slot = &mut inner.slots[index];
        let length = write(&mut slot.output).min(slot.output.len());
        self.done[index].reset();
        // SAFETY: The queue is valid as long as it is `Some`. The buffers are heap memory of the given
        // length, contiguous since `KVec` uses kmalloc, and not touched again before the slot comes back.
        let status = unsafe {
            c::pinion_virtqueue_add(
                queue.as_ptr(),
                slot.output.as_mut_ptr().cast(),
                length,
                slot.input.as_mut_ptr().cast(),
                slot.input.len(),
                ptr::without_provenance_mut(index + 1),
            )
        };
        if let Err(error) = to_result(status) {
            drop(guard);
            self.free.up();
            return Err(error);
        }
        slot.state = state;
        self.counters.sent.add(1, Relaxed);
        Ok(index)
    }

    /// Sends a request for whose answer the caller waits.
    pub(crate) fn request(
        &self,
        timeout: Msecs,
        write: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<Pending<'_>> {
        let slot = self.send(State::Sent, timeout, write)?;
        Ok(Pending { channel: self, slot })
    }

    /// Sends a request that is in a buffer of its own, and whose answer goes to `callback`, if there is a free
    /// slot; returns whether there was. The buffer is then freed when the answer has come. Calls `before` right before the
    /// device can see it.
    ///
    /// # Errors
    ///
    /// ENODEV after the channel was closed.
    pub(crate) fn try_post(
        &self,
        callback: Arc<dyn Answered>,
        tag: u64,
        output: &mut KVec<u8>,
        before: impl FnOnce(),
    ) -> Result<bool> {
        if !self.free.try_down() {
            return if self.is_closed() { Err(ENODEV) } else { Ok(false) };
        }
        let length = output.len();
        let sent = self.send_from(State::Posted(callback, tag), |slot| {
            core::mem::swap(slot, output);
            before();
            length
        });
        sent.map(|_| true)
    }

    /// Whether the queue is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.inner.lock().queue.is_none()
    }

    /// Tells the device of the requests that were sent since the last time.
    pub(crate) fn kick(&self) {
        self.counters.kicks.add(1, Relaxed);
        let inner = self.inner.lock();
        if let Some(queue) = inner.queue {
            // SAFETY: The queue is valid as long as it is `Some`.
            unsafe { c::virtqueue_kick(queue.as_ptr()) };
        }
    }

    /// Takes the answers that have come. To be called from the queue's interrupt.
    pub(crate) fn collect(&self) {
        let mut inner = self.inner.lock();
        while let Some((index, length)) = inner.next_used() {
            self.answer(&mut inner, index, Some(length));
        }
    }

    /// Hands `taker` what the device has written into each buffer that has come, and gives the buffers back
    /// to the device. For queues on which the device speaks first; their buffers are sent with
    /// [`Channel::post_inputs`].
    pub(crate) fn drain(&self, mut taker: impl FnMut(&[u8])) {
        let mut again = false;
        let mut copy = [0u8; MAX_EVENT];
        loop {
            let mut inner = self.inner.lock();
            let Some((index, length)) = inner.next_used() else {
                break;
            };
            let length = length.min(copy.len());
            copy[..length].copy_from_slice(&inner.slots[index].input[..length]);
            self.answer(&mut inner, index, None);
            drop(inner);
            again |= self.send(State::Abandoned, 0, |_| 0).is_ok();
            taker(&copy[..length]);
        }
        if again {
            self.kick();
        }
    }

    /// Gives every free buffer to the device.
    pub(crate) fn post_inputs(&self) -> Result {
        for _ in 0..self.slots() {
            self.send(State::Abandoned, 0, |_| 0)?;
        }
        self.kick();
        Ok(())
    }

    /// A slot has come back, with an answer or, after a reset, without.
    fn answer(&self, inner: &mut Inner, index: usize, length: Option<usize>) {
        self.counters.answered.add(1, Relaxed);
        let slot = &mut inner.slots[index];
        match core::mem::replace(&mut slot.state, State::Free) {
            State::Sent => {
                slot.state = State::Done(length);
                self.done[index].complete();
                return;
            }
            State::Posted(callback, tag) => {
                callback.answered(tag, length.map(|length| &slot.input[..length]));
                // The device is done with it.
                slot.output = KVec::new();
            }
            State::Abandoned => {}
            State::Free | State::Done(_) => {
                pr_err!("the device has used a buffer that it was not given\n");
                return;
            }
        }
        self.free.up();
    }

    /// Forgets the queue, and ends all requests. The device has been reset.
    fn close(&self) {
        let mut inner = self.inner.lock();
        let Some(queue) = inner.queue.take() else { return };
        // SAFETY: The queue was valid until now. Taking the unused buffers out is what virtio asks for before
        // the queues are deleted; those that were used and not collected are found by their state.
        while !unsafe { c::virtqueue_detach_unused_buf(queue.as_ptr()) }.is_null() {}
        for index in 0..inner.slots.len() {
            if !matches!(inner.slots[index].state, State::Free | State::Done(_)) {
                self.answer(&mut inner, index, None);
            }
        }
    }
}

/// Largest buffer of a queue on which the device speaks first.
const MAX_EVENT: usize = 64;

impl Inner {
    /// Number and written length of the next slot that has come back.
    fn next_used(&mut self) -> Option<(usize, usize)> {
        let queue = self.queue?;
        let mut length = 0;
        // SAFETY: The queue is valid as long as it is `Some`.
        let token = unsafe { c::virtqueue_get_buf(queue.as_ptr(), &mut length) };
        let index = token.addr().checked_sub(1)?;
        let slot = self.slots.get(index)?;
        Some((index, (length as usize).min(slot.input.len())))
    }
}

/// A request whose answer is still to come. Dropping it without waiting gives the answer up.
pub(crate) struct Pending<'a> {
    channel: &'a Channel,
    slot: usize,
}

impl Pending<'_> {
    /// Waits at most `timeout` for the answer.
    ///
    /// # Errors
    ///
    /// ETIMEDOUT; EIO for an answer that is too short; ENODEV if the device was reset instead of answering.
    pub(crate) fn wait<T: FromBytes>(self, timeout: Msecs) -> Result<T> {
        self.channel.done[self.slot].wait(timeout)?;
        let inner = self.channel.inner.lock();
        let slot = &inner.slots[self.slot];
        match slot.state {
            State::Done(Some(length)) if length >= size_of::<T>() => {
                T::read_from_bytes(&slot.input[..size_of::<T>()]).map_err(|_| EIO)
            }
            State::Done(Some(_)) => Err(EIO),
            _ => Err(ENODEV),
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut inner = self.channel.inner.lock();
        let slot = &mut inner.slots[self.slot];
        match slot.state {
            State::Done(_) => {
                slot.state = State::Free;
                drop(inner);
                self.channel.free.up();
            }
            // Its slot comes back when the device answers after all.
            _ => slot.state = State::Abandoned,
        }
    }
}
