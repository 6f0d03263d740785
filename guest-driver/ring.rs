// SPDX-License-Identifier: GPL-2.0-only

//! Command rings: which file's work goes to the device next.
//!
//! A submission waits here until those before it of the same file have gone, the fences that it was to wait for have
//! passed, and the device has room. Nothing that a program makes its work wait for ever gets to the device
//! before that has happened, so that it keeps no one else's work waiting. Files take turns, and none has more than
//! [`MAX_IN_FLIGHT`] submissions at the device at a time.
//!
//! What a ring sends is numbered in the order in which it is sent, across all files; the device's timeline of that ring
//! follows these numbers.
//!
//! Locking: `Ring::state` is a mutex and comes before everything that `fence.rs` and `virtio.rs` take.

use crate::{
    abi,
    eventfd::EventFd,
    fence::{End, Timeline},
    sync::ModuleQueue,
    trace, uapi,
    virtio::{Answered, Channel},
};
use kernel::{
    impl_has_work, new_mutex, new_work,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed},
        Arc, Mutex,
    },
    time::{ClockSource, Monotonic},
    workqueue::{Work, WorkItem},
};

/// Most submissions of one file that a ring of the device has at a time.
const MAX_IN_FLIGHT: i32 = 32;

/// A fence that work waits for: a submission on a timeline.
#[derive(Clone)]
pub(crate) struct Fence {
    /// The timeline.
    pub(crate) timeline: Arc<Timeline>,
    /// The submission.
    pub(crate) sequence: u64,
}

impl Fence {
    fn has_passed(&self) -> bool {
        self.timeline.has_passed(self.sequence)
    }
}

/// What a program wants to have done.
pub(crate) struct Request {
    /// Room for the header, and the commands.
    pub(crate) buffer: KVec<u8>,
    /// How many there are.
    pub(crate) commands: usize,
    /// What it waits for.
    pub(crate) after: KVec<Fence>,
    /// What is told of its end.
    pub(crate) eventfd: Option<EventFd>,
}

/// A submission, from when it is queued until it has ended.
struct Job {
    ring: Arc<Ring>,
    timeline: Arc<Timeline>,
    context: u32,
    sequence: u64,
    commands: usize,
    eventfd: Option<EventFd>,
    /// When the device got it.
    sent: Atomic<i64>,
}

impl Job {
    /// `number` is that in the order of the ring, or 0 if it has none.
    fn end(&self, number: u64, end: End) {
        let end = self.timeline.end(self.sequence, self.commands, end);
        let ring = &self.ring;
        trace::complete(
            ring.gpu,
            ring.number,
            self.context,
            self.sequence,
            number,
            end.status,
        );
        self.ring.counters.ended(&end);
        if let Some(eventfd) = &self.eventfd {
            eventfd.signal();
        }
    }
}

impl Answered for Job {
    fn answered(&self, tag: u64, input: Option<&[u8]>) {
        let end = match input.map(abi::Completion::read_from_bytes) {
            Some(Ok(done)) if done.sequence == tag => End {
                status: done.status,
                executed: done.executed,
                fault_va: done.fault_va,
                repeats: done.repeats,
            },
            // A device that does not write its completion, or another's, is not one that can be relied on.
            _ => End::new(uapi::STATUS_DEVICE_LOST),
        };
        // The ring has worked on this since it got it, or since it was done with what came before.
        let now = Monotonic::ktime_get();
        let before = self.ring.idle_since.xchg(now, Full);
        let busy = now.saturating_sub(before.max(self.sent.load(Relaxed)));
        self.timeline.busy.add(busy, Relaxed);
        self.ring.counters.busy.add(busy, Relaxed);
        self.timeline.in_flight.fetch_sub(1, Full);
        self.ring.in_flight.fetch_sub(1, Full);
        self.end(tag, end);
    }
}

/// A submission that the device has not got yet.
struct Queued {
    job: Arc<Job>,
    buffer: KVec<u8>,
    after: KVec<Fence>,
}

impl Queued {
    fn is_ready(&self) -> bool {
        self.job.timeline.in_flight.load(Acquire) < MAX_IN_FLIGHT && self.after.iter().all(Fence::has_passed)
    }
}

/// By context, and then in the order of the file.
type Key = (u32, u64);

struct State {
    /// Number of the last submission that was sent.
    sent: u64,
    /// The context whose turn it is, or the next one that has something.
    turn: u32,
    queue: RBTree<Key, Queued>,
}

impl State {
    /// What is to be sent next. With `all`, whether it is ready or not.
    fn next(&self, all: bool) -> Option<Key> {
        let (mut from, mut around) = (self.turn, false);
        loop {
            let Some(cursor) = self.queue.cursor_lower_bound(&(from, 0)) else {
                if around {
                    return None;
                }
                (from, around) = (0, true);
                continue;
            };
            let (key, queued) = cursor.current();
            if around && key.0 >= self.turn {
                return None;
            }
            if all || queued.is_ready() {
                return Some(*key);
            }
            from = key.0.saturating_add(1);
        }
    }
}

/// What a ring has done since the device was probed.
pub(crate) struct Counters {
    /// Submissions that the device got.
    pub(crate) submissions: Atomic<i64>,
    /// Commands in them.
    pub(crate) commands: Atomic<i64>,
    /// Submissions that have ended.
    pub(crate) completed: Atomic<i64>,
    /// Those of them that have failed.
    pub(crate) failed: Atomic<i64>,
    /// How often the device had no room for what was ready.
    pub(crate) full: Atomic<i64>,
    /// Nanoseconds for which there was something to do.
    pub(crate) busy: Atomic<i64>,
}

impl Counters {
    fn ended(&self, end: &End) {
        self.completed.add(1, Relaxed);
        self.failed.add((end.status != abi::STATUS_OK).into(), Relaxed);
    }
}

/// A command ring.
#[pin_data]
pub(crate) struct Ring {
    gpu: u32,
    number: u32,
    channel: Arc<Channel>,
    #[pin]
    state: Mutex<State>,
    /// How many submissions are in the queue of `state`.
    queued: Atomic<i32>,
    /// How many the device has.
    in_flight: Atomic<i32>,
    /// When the last one ended.
    idle_since: Atomic<i64>,
    /// The counters.
    pub(crate) counters: Counters,
    #[pin]
    work: Work<Self>,
}

impl_has_work! {
    impl HasWork<Self> for Ring { self.work }
}

impl WorkItem for Ring {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.pump();
    }
}

impl Ring {
    /// The ring of that number, of the GPU of that number, over its channel.
    pub(crate) fn new(gpu: u32, number: u32, channel: Arc<Channel>) -> Result<Arc<Self>> {
        let state = State {
            sent: 0,
            turn: 0,
            queue: RBTree::new(),
        };
        Arc::pin_init(
            pin_init!(Self {
                gpu,
                number,
                channel,
                state <- new_mutex!(state, "Ring::state"),
                queued: Atomic::new(0),
                in_flight: Atomic::new(0),
                idle_since: Atomic::new(0),
                counters: Counters {
                    submissions: Atomic::new(0),
                    commands: Atomic::new(0),
                    completed: Atomic::new(0),
                    failed: Atomic::new(0),
                    full: Atomic::new(0),
                    busy: Atomic::new(0),
                },
                work <- new_work!("Ring::work"),
            }),
            GFP_KERNEL,
        )
    }

    /// What it sends over.
    pub(crate) fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Number of the last submission that was sent.
    pub(crate) fn sent(&self) -> u64 {
        self.state.lock().sent
    }

    /// How many submissions wait to be sent, and how many the device has.
    pub(crate) fn load(&self) -> (i32, i32) {
        (self.queued.load(Relaxed), self.in_flight.load(Relaxed))
    }

    /// Whether there is anything to do.
    pub(crate) fn is_busy(&self) -> bool {
        self.queued.load(Acquire) > 0 || self.in_flight.load(Acquire) > 0
    }

    /// Queues a request of `context` on `timeline`; returns its number there.
    pub(crate) fn submit(
        self: &Arc<Self>,
        context: u32,
        timeline: &Arc<Timeline>,
        request: Request,
    ) -> Result<u64> {
        // What it waits for has to tell this ring; if it does so too early then this does no harm.
        for fence in &request.after {
            fence.timeline.watch(fence.sequence, self)?;
        }
        // Numbers are given out under the lock, so that the order in the queue is theirs.
        let mut state = self.state.lock();
        let sequence = timeline.next();
        let job = Job {
            ring: self.clone(),
            timeline: timeline.clone(),
            context,
            sequence,
            commands: request.commands,
            eventfd: request.eventfd,
            sent: Atomic::new(0),
        };
        let queued = Queued {
            job: Arc::new(job, GFP_KERNEL)?,
            buffer: request.buffer,
            after: request.after,
        };
        let node = RBTreeNode::new((context, sequence), queued, GFP_KERNEL)?;
        timeline.queued(sequence, request.commands);
        state.queue.insert(node);
        self.queued.fetch_add(1, Full);
        drop(state);
        self.pump();
        Ok(sequence)
    }

    /// Sends what can be sent.
    pub(crate) fn pump(&self) {
        let mut kick = false;
        let mut state = self.state.lock();
        loop {
            let closed = self.channel.is_closed();
            let Some(key) = state.next(closed) else { break };
            let sequence = state.sent + 1;
            let Some(queued) = state.queue.get_mut(&key) else {
                break;
            };
            let job = queued.job.clone();
            let header = abi::SubmitHeader {
                context: job.context,
                count: job.commands as u32,
                sequence,
                flags: 0,
                reserved: 0,
            };
            queued.buffer[..size_of::<abi::SubmitHeader>()].copy_from_slice(header.as_bytes());
            job.sent.store(Monotonic::ktime_get(), Relaxed);
            // Counted first: the answer may be faster than what comes after sending.
            job.timeline.in_flight.fetch_add(1, Full);
            self.in_flight.fetch_add(1, Full);
            let posted = self
                .channel
                .try_post(job.clone(), sequence, &mut queued.buffer, || {
                    trace::submit(
                        self.gpu,
                        self.number,
                        job.context,
                        job.sequence,
                        sequence,
                        job.commands as u32,
                    );
                });
            if posted != Ok(true) {
                job.timeline.in_flight.fetch_sub(1, Full);
                self.in_flight.fetch_sub(1, Full);
            }
            match posted {
                Ok(true) => {
                    state.sent = sequence;
                    state.turn = key.0.saturating_add(1);
                    self.counters.submissions.add(1, Relaxed);
                    self.counters.commands.add(job.commands as i64, Relaxed);
                    kick = true;
                }
                // An interrupt after this sees that something is queued.
                Ok(false) => {
                    self.counters.full.add(1, Relaxed);
                    break;
                }
                Err(_) => job.end(0, End::new(uapi::STATUS_DEVICE_LOST)),
            }
            drop(state.queue.remove(&key));
            self.queued.fetch_sub(1, Full);
        }
        drop(state);
        if kick {
            self.channel.kick();
        }
    }

    /// Has [`Ring::pump`] called soon. May be called in interrupts.
    pub(crate) fn pump_later(self: Arc<Self>) {
        // Fails if it is queued already, which is as good. There is another owner then, so that nothing is freed here.
        let _ = ModuleQueue::Submissions.get().map(|queue| queue.enqueue(self));
    }

    /// The device has answered.
    pub(crate) fn interrupt(self: &Arc<Self>) {
        self.channel.collect();
        if self.queued.load(Acquire) > 0 {
            self.clone().pump_later();
        }
    }

    /// Forgets what is queued for a context that has ended.
    pub(crate) fn forget(&self, context: u32) {
        let mut state = self.state.lock();
        loop {
            let key = match state.queue.cursor_lower_bound(&(context, 0)) {
                Some(cursor) if cursor.current().0 .0 == context => *cursor.current().0,
                _ => return,
            };
            if let Some(queued) = state.queue.remove(&key) {
                self.queued.fetch_sub(1, Full);
                queued.job.end(0, End::new(abi::STATUS_NO_CONTEXT));
            }
        }
    }
}
