// SPDX-License-Identifier: GPL-2.0-only

//! Driver of Pinion, a virtual GPU that shares the memory of processes.
//!
//! From the bottom up:
//!
//! - abstractions over C interfaces, in which all `unsafe` lives: [`bindings`], [`sync`], [`virtio`],
//!   [`chardev`], [`hmm`];
//! - the driver: [`gpu`] (the device), [`fence`], [`submission`], [`address_space`] (what the GPU maps of a process),
//!   [`residency`] (how pages come home), [`file`] (`/dev/pinionN`), [`dmirror`] (the nodes for the kernel's hmm-tests);
//! - the two interfaces: [`abi`] (the device's, shared with its implementation) and [`uapi`].

use kernel::prelude::*;

mod address_space;
mod advice;
mod bindings;
mod chardev;
mod copy;
mod debugfs;
mod dmirror;
mod eventfd;
mod fence;
mod fence_file;
mod file;
mod gpu;
mod hmm;
mod pins;
mod residency;
mod ring;
mod shrinker;
mod submission;
mod sync;
mod trace;
mod uapi;
mod virtio;
mod window;

#[allow(dead_code, unreachable_pub)]
#[path = "../abi/src/wire.rs"]
mod abi;

module! {
    type: Pinion,
    name: "pinion",
    authors: ["Pinion developers"],
    description: "Pinion virtual GPU",
    license: "GPL",
    params: {
        timeout_ms: u32 {
            default: 10000,
            description: "Milliseconds after which a device that does not answer is lost",
        },
        pins: u32 {
            default: 32768,
            description: "Most pages that are pinned in place at a time for a device (at most 32768)",
        },
        contexts_per_user: u32 {
            default: 128,
            description: "Most address spaces that a user may have on a device (CAP_SYS_RESOURCE: no limit)",
        },
        dmirror: u32 {
            default: 0,
            description: "/dev/hmm_dmirrorN for the kernel's hmm-tests: 0 none, 1 exclusive by make_device_exclusive, 2 by pinning",
        },
    },
}

#[pin_data]
struct Pinion {
    #[pin]
    _driver: virtio::Registration<gpu::Gpu>,
    /// Last: work runs until the driver is unregistered.
    _queues: sync::ModuleQueues,
}

impl kernel::InPlaceModule for Pinion {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _queues: { dmirror::parameter()?; sync::ModuleQueues::new()? },
            _driver <- virtio::Registration::new(module),
        })
    }
}
