// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The engine of one ring: takes submissions in order and executes them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Condvar, Mutex};
use pinion_abi::{Completion, STATUS_OK};

use super::command::{self, Command};
use super::context::Context;
use super::execute::{self, Execution, Scratch, Trouble, Window};
use super::fault::{Origin, Replayed, Wake};
use super::gate::Gate;
use super::status::Error;
use super::{Host, Shared};

/// Completions that are announced no later than work of this size (in bytes) is begun.
const LONG_WORK: u64 = 128 << 10;
/// Completions after which they are announced in any case.
const BATCH: u32 = 64;

/// The part of an engine that others reach.
#[derive(Default)]
pub(super) struct Engine {
    /// Where it touches memory.
    pub(super) gate: Gate,
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Engine {
    /// Tells the engine that there may be work, or that it may be time to end.
    pub(super) fn ring(&self) {
        *self.rung.lock() = true;
        self.bell.notify_one();
    }

    fn wait_for_bell(&self) {
        let mut rung = self.rung.lock();
        while !std::mem::take(&mut *rung) {
            self.bell.wait(&mut rung);
        }
    }
}

/// How a command, or one chunk of it, ended.
enum End {
    Done,
    Failed { error: Error, va: u64, repeats: u64 },
    Abandoned,
}

enum Chunk {
    Done,
    More,
    Stuck(Trouble),
    Ended(Error),
    Abandoned,
}

/// An engine's own part.
pub(super) struct Worker<H: Host> {
    pub(super) shared: Arc<Shared<H>>,
    pub(super) ring: u16,
}

impl<H: Host> Worker<H> {
    /// Works until the device ends.
    pub(super) fn run(&self) {
        let Some(engine) = self.shared.engines.get(usize::from(self.ring)) else {
            return;
        };
        let host = &self.shared.host;
        let mut bytes = Vec::with_capacity(command::MAX_SUBMISSION);
        let mut commands = Vec::with_capacity(command::MAX_BATCH as usize);
        let mut scratch = execute::scratch();
        let mut unannounced = 0_u32;
        loop {
            engine.wait_for_bell();
            host.busy(self.ring);
            loop {
                if self.shared.ending.load(Ordering::Relaxed) {
                    return;
                }
                bytes.clear();
                let Some((ticket, position)) = host.next(self.ring, &mut bytes) else {
                    unannounced = 0;
                    if host.idle(self.ring) { continue } else { break }
                };
                let decoded = command::decode_submission(&bytes, &mut commands);
                let cost = commands.iter().map(Command::cost).fold(0, u64::saturating_add);
                if unannounced > 0 && (cost >= LONG_WORK || unannounced >= BATCH) {
                    host.announce(self.ring);
                    unannounced = 0;
                }
                let completion = match decoded {
                    Ok(submission) => self.submission(engine, submission, position, &commands, &mut scratch),
                    Err((sequence, error)) => Some(failed(sequence, error)),
                };
                if let Some(completion) = completion {
                    host.complete(self.ring, ticket, completion);
                    unannounced = unannounced.saturating_add(1);
                }
            }
        }
    }

    /// Executes a submission. None if nobody wants to hear of it any more.
    fn submission(
        &self,
        engine: &Engine,
        submission: command::Submission,
        position: u64,
        commands: &[Command],
        scratch: &mut Scratch,
    ) -> Option<Completion> {
        let command::Submission { context, sequence } = submission;
        let context = match self.shared.contexts.get(context) {
            Ok(context) if context.is_meant_by(self.ring, position) => context,
            _ => return Some(failed(sequence, Error::NoContext)),
        };
        if let Err(error) = context.check() {
            return Some(failed(sequence, error));
        }
        let origin = Origin {
            ring: self.ring,
            context: &context,
            sequence,
        };
        let mut executed = 0_u32;
        for command in commands {
            match self.command(engine, origin, *command, scratch) {
                End::Done => executed = executed.saturating_add(1),
                End::Failed { error, va, repeats } => {
                    return Some(Completion {
                        executed,
                        fault_va: va,
                        repeats,
                        ..failed(sequence, error)
                    });
                }
                End::Abandoned => return None,
            }
        }
        Some(Completion {
            sequence,
            status: STATUS_OK,
            executed,
            ..Completion::default()
        })
    }

    fn command(&self, engine: &Engine, origin: Origin<'_>, command: Command, scratch: &mut Scratch) -> End {
        let faults = &self.shared.faults;
        let mut execution = Execution::new(command, scratch);
        // The fault whose REPLAY waits to hear how the next chunk goes.
        let mut retried = None;
        let end = loop {
            let before = execution.moves();
            let chunk = self.chunk(engine, origin.context, &mut execution, scratch);
            if execution.moves() != before {
                self.replayed(retried.take().and_then(|id| faults.report(id, true)));
            }
            let wake = match chunk {
                Chunk::More => continue,
                Chunk::Done => break End::Done,
                Chunk::Abandoned => break End::Abandoned,
                Chunk::Ended(error) => {
                    break End::Failed {
                        error,
                        va: 0,
                        repeats: execution.repeats(),
                    };
                }
                Chunk::Stuck(Trouble::Bus(va)) => {
                    faults.fail(origin, va, Error::Bus);
                    self.shared.host.events();
                    break End::Failed {
                        error: Error::Bus,
                        va,
                        repeats: execution.repeats(),
                    };
                }
                Chunk::Stuck(Trouble::Fault(fault)) => {
                    self.shared.host.announce(self.ring);
                    let (stalled, replayed) = faults.stall(origin, &fault, retried.take());
                    self.shared.host.events();
                    self.replayed(replayed);
                    let wake = match stalled {
                        Ok(()) => faults.wait(self.ring),
                        Err(wake) => wake,
                    };
                    (wake, fault.va)
                }
            };
            match wake {
                (Wake::Retry(id), _) => retried = Some(id),
                (Wake::Ended(error), va) => {
                    break End::Failed {
                        error,
                        va,
                        repeats: execution.repeats(),
                    };
                }
                (Wake::Abandoned, _) => break End::Abandoned,
            }
        };
        self.replayed(retried.and_then(|id| faults.report(id, false)));
        end
    }

    /// One stay inside the gate.
    fn chunk(
        &self,
        engine: &Engine,
        context: &Context,
        execution: &mut Execution,
        scratch: &mut Scratch,
    ) -> Chunk {
        let mut inside = engine.gate.enter();
        let chunk = loop {
            if self.shared.ending.load(Ordering::Relaxed) {
                break Chunk::Abandoned;
            }
            // Inside the gate: whoever ends a context says so in it first and then comes through here,
            // and after that no access of the context begins.
            if let Err(error) = context.check() {
                break Chunk::Ended(error);
            }
            if inside.paused {
                engine.gate.wait(&mut inside);
                continue;
            }
            let inside = &mut *inside;
            let mut window = Window {
                context,
                tlb: &mut inside.tlb,
                memory: &*inside.memory,
                vram: &self.shared.vram,
            };
            break match execution.chunk(&mut window, scratch) {
                Ok(true) => Chunk::Done,
                Ok(false) => Chunk::More,
                Err(trouble) => Chunk::Stuck(trouble),
            };
        };
        Gate::leave(inside);
        chunk
    }

    fn replayed(&self, replayed: Option<Replayed<H::Ticket>>) {
        if let Some(Replayed { ticket, through }) = replayed {
            self.shared.host.replayed(ticket, through);
        }
    }
}

fn failed(sequence: u64, error: Error) -> Completion {
    log::debug!("submission {sequence}: {error}");
    Completion {
        sequence,
        status: error.code(),
        ..Completion::default()
    }
}
