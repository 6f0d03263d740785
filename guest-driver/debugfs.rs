// SPDX-License-Identifier: GPL-2.0-only

//! Counters of a device for people: `/sys/kernel/debug/pinionN`. docs/driver.md says what they mean.

use crate::{pins::Pins, ring::Ring, virtio::Channel};
use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    sync::{atomic::Relaxed, Arc},
};

/// The queues of a device, with what each is for.
type Queues = KVec<(&'static str, Arc<Channel>)>;

/// The directory of a device, which goes away when this is dropped.
#[pin_data]
pub(crate) struct Directory {
    #[pin]
    rings: File<KVec<Arc<Ring>>>,
    #[pin]
    queues: File<Queues>,
    #[pin]
    pins: File<Arc<Pins>>,
}

impl Directory {
    /// Makes it. Without debugfs there is nothing to be made.
    pub(crate) fn new(
        name: &CStr,
        rings: KVec<Arc<Ring>>,
        queues: Queues,
        pins: Arc<Pins>,
    ) -> Result<Pin<KBox<Self>>> {
        let directory = Dir::new(name);
        KBox::pin_init(
            try_pin_init!(Self {
                rings <- directory.read_callback_file(c"rings", rings, &show_rings),
                queues <- directory.read_callback_file(c"queues", queues, &show_queues),
                pins <- directory.read_callback_file(c"pins", pins, &show_pins),
            }? Error),
            GFP_KERNEL,
        )
    }
}

fn show_rings(rings: &KVec<Arc<Ring>>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(
        f,
        "ring number queued in-flight submissions commands completed failed full busy-ns"
    )?;
    for ring in rings {
        let counters = &ring.counters;
        let (queued, in_flight) = ring.load();
        writeln!(
            f,
            "{} {} {} {} {} {} {} {} {} {}",
            ring.number(),
            ring.sent(),
            queued,
            in_flight,
            counters.submissions.load(Relaxed),
            counters.commands.load(Relaxed),
            counters.completed.load(Relaxed),
            counters.failed.load(Relaxed),
            counters.full.load(Relaxed),
            counters.busy.load(Relaxed),
        )?;
    }
    Ok(())
}

fn show_pins(pins: &Arc<Pins>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (given_up, returned) = pins.given_back();
    writeln!(f, "pinned limit given-up returned")?;
    writeln!(f, "{} {} {} {}", pins.pinned(), pins.limit(), given_up, returned)
}

fn show_queues(queues: &Queues, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(f, "queue name slots sent answered kicks full")?;
    for (index, (name, channel)) in queues.iter().enumerate() {
        let counters = &channel.counters;
        writeln!(
            f,
            "{} {} {} {} {} {} {}",
            index,
            name,
            channel.slots(),
            counters.sent.load(Relaxed),
            counters.answered.load(Relaxed),
            counters.kicks.load(Relaxed),
            counters.full.load(Relaxed),
        )?;
    }
    Ok(())
}
