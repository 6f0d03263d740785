// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Work that goes on while the program does something else, on memory that outlives it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::time::Duration;

use crate::{Batch, Completion, Gpu, Result, Submission, Submit, Submitted};

/// Where work can be submitted without waiting for it at once; see [`Gpu::scope`].
#[derive(Debug)]
pub struct Scope<'env> {
    gpu: &'env Gpu,
    /// The latest on each ring, which is what has to be waited for.
    latest: RefCell<Vec<Submission>>,
    /// Invariant, so that nothing that lives in the scope can be taken for what outlives it.
    borrow: PhantomData<std::cell::Cell<&'env mut ()>>,
}

impl<'env> Scope<'env> {
    /// Queues a batch on a ring.
    ///
    /// # Errors
    ///
    /// As for [`Gpu::submit`].
    pub fn submit(&self, ring: u32, batch: &Batch<'env>) -> Result<Submission> {
        Ok(self.send(&Submit::new(ring), batch)?.work)
    }

    /// Queues a batch, with what goes with it.
    ///
    /// # Errors
    ///
    /// As for [`Submit::send`].
    pub fn send(&self, submit: &Submit<'_>, batch: &Batch<'env>) -> Result<Submitted> {
        // SAFETY: The memory is borrowed for longer than the scope, which does not end before the work.
        let submitted = unsafe { submit.send(self.gpu, batch.commands()) }?;
        let mut latest = self.latest.borrow_mut();
        match latest.iter_mut().find(|one| one.ring == submitted.work.ring) {
            Some(one) => *one = submitted.work,
            None => latest.push(submitted.work),
        }
        Ok(submitted)
    }

    /// Waits for a submission: [`Gpu::wait`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn wait(&self, work: Submission, timeout: Duration) -> Result<Completion> {
        self.gpu.wait(work, timeout)
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        for work in self.latest.take() {
            self.gpu.wait_for_end(work);
        }
    }
}

impl Gpu {
    /// Runs `body`, in which work can be submitted to be done meanwhile. Returns when all of it has ended, also if `body`
    /// panics.
    ///
    /// ```no_run
    /// # use pinion_client::{Batch, Gpu, Memory, Operation};
    /// # use std::time::Duration;
    /// let gpu = Gpu::open("/dev/pinion0")?;
    /// let (mut left, mut right) = (vec![0_u64; 4096], vec![0_u64; 4096]);
    /// let mut batches = [Batch::new(), Batch::new()];
    /// batches[0].fill(&mut left[..], 1);
    /// batches[1].fill(&mut right[..], 2);
    /// gpu.scope(|scope| {
    ///     let works = [scope.submit(0, &batches[0])?, scope.submit(0, &batches[1])?];
    ///     // Something else, and then:
    ///     assert!(scope.wait(works[0], Duration::from_secs(1))?.is_ok());
    ///     pinion_client::Result::Ok(())
    /// })?;
    /// assert_eq!((left[0], right[0]), (1, 2));
    /// # Ok::<_, pinion_client::Error>(())
    /// ```
    ///
    /// Memory that does not outlive the scope cannot be lent in it:
    ///
    /// ```compile_fail
    /// # use pinion_client::{Batch, Gpu};
    /// # let gpu = Gpu::open("/dev/pinion0").unwrap();
    /// gpu.scope(|scope| {
    ///     let mut number = 0_u64;
    ///     let mut batch = Batch::new();
    ///     batch.fill(&mut number, 1);
    ///     scope.submit(0, &batch).unwrap();
    /// });
    /// ```
    pub fn scope<'env, R>(&'env self, body: impl FnOnce(&Scope<'env>) -> R) -> R {
        let scope = Scope {
            gpu: self,
            latest: RefCell::new(Vec::new()),
            borrow: PhantomData,
        };
        body(&scope)
    }
}
