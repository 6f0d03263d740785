// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What `vhost-user-backend` asks of a device; and when the device stops, goes on, or is reset.
//!
//! A vhost-user frontend does not say "reset" when a driver resets the device: it stops the queues, as it
//! also does when the virtual machine is paused. (RESET_DEVICE exists; QEMU's generic device does not
//! send it.) The difference shows when the queues are started again: after a pause the control queue
//! goes on at the index where it stopped, after a reset it begins at zero.
//!
//! ```text
//!   running ──(a queue stops)──> stopped ──(control queue starts where it was)──> running
//!      │                            └──(control queue starts elsewhere, or at zero)──┐
//!      └──(RESET_DEVICE)──> reset <───────────────────────────────────────────────┘──> running
//! ```
//!
//! While stopped, engines touch no memory: the guest may have given it to somebody else.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use pinion_abi::{QUEUE_CONTROL, QUEUE_EVENT, QUEUE_FIRST_RING, QUEUE_INVALIDATE};
use vhost::vhost_user::Backend as Channel;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

use super::aperture::Aperture;
use super::memory::GuestMap;
use super::queues::{MAX_QUEUE_SIZE, Memory, Queues, Vring};
use crate::control::Device;
use crate::gpu::event::EventLog;
use crate::gpu::inject::Injector;
use crate::gpu::request::MAX_REQUEST;
use crate::gpu::state::State;
use crate::gpu::{Answer, Gpu, Settings, StartError};

/// What `--print-capabilities` prints, in the form that QEMU's conventions give it.
///
/// None of the types that they list fits. It is not "gpu": whoever looks for one of those wants virtio-gpu.
pub fn capabilities() -> &'static str {
    r#"{"type": "pinion", "features": []}"#
}

enum Life {
    Running,
    /// With the index at which the control queue stopped, once it has.
    Stopped {
        control: Option<u16>,
    },
}

/// Which queues to look at after an event.
enum Serve {
    Nothing,
    This,
    All,
}

/// The device of one connection.
pub struct Backend {
    settings: Settings,
    queues: Arc<Queues>,
    gpu: Gpu<Queues>,
    aperture: Option<Aperture>,
    life: Mutex<Life>,
    /// Read while a request is carried out, written while the device is reset.
    serving: RwLock<()>,
}

impl Backend {
    /// Makes a device whose guest memory is `memory`.
    pub fn new(settings: Settings, injector: Arc<Injector>, memory: Memory) -> Result<Self, StartError> {
        let log = Arc::new(EventLog::default());
        let queues = Queues::new(memory, settings.rings, log.clone(), injector.clone());
        let queues = Arc::new(queues);
        let gpu = Gpu::start(&settings, queues.clone(), log, injector)?;
        let aperture = match settings.aperture {
            0 => None,
            size => Some(Aperture::new(gpu.vram().duplicate()?, size)),
        };
        Ok(Self {
            settings,
            queues,
            gpu,
            aperture,
            life: Mutex::new(Life::Running),
            serving: RwLock::new(()),
        })
    }

    /// The number that an event source other than a queue has to be registered with; such an event
    /// ends the worker thread that gets it.
    pub fn stop_event(&self) -> u64 {
        // The library keeps the number of queues for itself.
        (self.num_queues() as u64).saturating_add(1)
    }

    /// The connection is over, or is to be: nobody waits for the frontend or the driver any more.
    pub fn close(&self) {
        self.queues.close();
        if let Some(aperture) = &self.aperture {
            aperture.close();
        }
    }

    fn reset(&self) {
        let _serving = self.serving.write();
        log::info!("device reset");
        if let Some(aperture) = &self.aperture {
            aperture.forget();
        }
        // First the queues, so that what the core still answers is known as old.
        self.queues.reset();
        self.gpu.reset();
    }

    /// A queue has been started or kicked. Says what is to be done.
    fn admit(&self, queue: u16) -> Serve {
        let mut life = self.life.lock();
        let Life::Stopped { control: stopped_at } = &*life else {
            return Serve::This;
        };
        if queue != QUEUE_CONTROL || !self.queues.is_running(QUEUE_CONTROL) {
            return Serve::Nothing;
        }
        let starts_at = self.queues.next_index(QUEUE_CONTROL);
        // A control queue that begins at zero has carried nothing, so there is nothing to be kept.
        if starts_at != *stopped_at || matches!(starts_at, None | Some(0)) {
            self.reset();
        } else {
            log::info!("the queues go on where they were");
        }
        *life = Life::Running;
        self.gpu.resume();
        Serve::All
    }

    fn serve(&self, queue: u16) {
        self.queues.unpark(queue);
        match queue {
            QUEUE_CONTROL | QUEUE_INVALIDATE => self.serve_requests(queue),
            QUEUE_EVENT => self.queues.pump_events(),
            _ => self.gpu.attend(queue.saturating_sub(QUEUE_FIRST_RING)),
        }
    }

    fn serve_requests(&self, queue: u16) {
        if let (QUEUE_CONTROL, Some(aperture)) = (queue, &self.aperture) {
            aperture.want();
        }
        let mut bytes = Vec::with_capacity(MAX_REQUEST);
        loop {
            self.queues.quiet(queue);
            loop {
                let _serving = self.serving.read();
                let Some(ticket) = self.queues.request(queue, &mut bytes, MAX_REQUEST) else {
                    break;
                };
                if queue == QUEUE_INVALIDATE {
                    self.queues.respond(queue, ticket, &self.gpu.invalidate(&bytes));
                } else if let Answer::Now(ticket, response) = self.gpu.control(&bytes, ticket) {
                    self.queues.respond(queue, ticket, &response);
                }
            }
            if !self.queues.listen(queue) {
                break;
            }
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(QUEUE_FIRST_RING).saturating_add(self.settings.rings.into())
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        // No INDIRECT_DESC: a driver would then allocate where it sends, and Pinion's sends an
        // INVALIDATE under reclaim.
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // Not both: when a reset has taken the aperture's mapping away, QEMU (11.1 at least) wants to remove the
        // slot that it was, looks for the memory, which is gone, and crashes. Without slots it sends the
        // whole table, which does not say what went.
        let memory = match self.aperture {
            None => VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            Some(_) => {
                VhostUserProtocolFeatures::SHMEM
                    | VhostUserProtocolFeatures::BACKEND_REQ
                    | VhostUserProtocolFeatures::BACKEND_SEND_FD
            }
        };
        memory
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.gpu.pause();
        self.reset();
        self.gpu.resume();
        *self.life.lock() = Life::Running;
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The vrings know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = Gpu::<Queues>::config(&self.settings);
        let (offset, size) = (offset as usize, size as usize);
        // Behind its end configuration space reads as zero. The library has bounded `size`.
        let mut bytes: Vec<u8> = config
            .as_bytes()
            .iter()
            .copied()
            .skip(offset)
            .take(size)
            .collect();
        bytes.resize(size, 0);
        bytes
    }

    fn update_memory(&self, memory: Memory) -> std::io::Result<()> {
        self.gpu
            .set_memory(Arc::new(GuestMap(memory.memory().clone().into_inner())));
        self.queues.settle();
        Ok(())
    }

    fn set_backend_req_fd(&self, channel: Channel) {
        if let Some(aperture) = &self.aperture {
            aperture.set_channel(channel);
        }
    }

    fn get_shmem_config(&self) -> std::io::Result<VhostUserShMemConfig> {
        Ok(self.aperture.as_ref().map(Aperture::regions).unwrap_or_default())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.num_queues())
            .map(|queue| 1_u64.checked_shl(queue as u32).unwrap_or(0))
            .collect()
    }

    fn stop_vring(&self, queue: u32) -> std::io::Result<()> {
        let mut life = self.life.lock();
        if let Life::Running = *life {
            log::info!("stopped");
            self.gpu.pause();
            *life = Life::Stopped { control: None };
        }
        if let Life::Stopped { control } = &mut *life {
            if queue == u32::from(QUEUE_CONTROL) {
                *control = self.queues.next_index(QUEUE_CONTROL);
            }
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> std::io::Result<()> {
        if u64::from(event) == self.stop_event() {
            // The library takes this for the end of the thread.
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        // Each thread has one queue, and the number of its queue.
        let (Some(vring), Ok(queue)) = (vrings.first(), u16::try_from(thread)) else {
            return Ok(());
        };
        self.queues.learn(queue, vring);
        match self.admit(queue) {
            Serve::Nothing => {}
            Serve::This => self.serve(queue),
            // The others may have come while it was not clear yet whether the device was reset.
            // The control queue comes last: it may have to wait for the aperture.
            Serve::All => (0..self.num_queues() as u16)
                .rev()
                .for_each(|queue| self.serve(queue)),
        }
        Ok(())
    }
}

impl Device for Backend {
    fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.gpu.statistics().list()
    }

    fn state(&self) -> State {
        self.gpu.state()
    }
}
