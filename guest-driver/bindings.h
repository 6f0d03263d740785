/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Input of bindgen: the C interfaces that Pinion uses and the `kernel` crate does not cover. What of them is
 * taken is listed in bindings_parameters.
 */
#include <linux/anon_inodes.h>
#include <linux/completion.h>
#include <linux/device-id/virtio.h>
#include <linux/eventfd.h>
#include <linux/fs.h>
#include <linux/hmm.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/rmap.h>
#include <linux/semaphore.h>
#include <linux/shrinker.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "helpers.h"
#include "pinion_trace.h"
#include "uapi/pinion.h"

#ifdef PINION_HAS_TEST_HMM_UAPI
#include <../lib/test_hmm_uapi.h>

const unsigned int PINION_DMIRROR_READ = HMM_DMIRROR_READ;
const unsigned int PINION_DMIRROR_WRITE = HMM_DMIRROR_WRITE;
const unsigned int PINION_DMIRROR_MIGRATE_TO_DEV = HMM_DMIRROR_MIGRATE_TO_DEV;
const unsigned int PINION_DMIRROR_MIGRATE_TO_SYS = HMM_DMIRROR_MIGRATE_TO_SYS;
const unsigned int PINION_DMIRROR_SNAPSHOT = HMM_DMIRROR_SNAPSHOT;
const unsigned int PINION_DMIRROR_EXCLUSIVE = HMM_DMIRROR_EXCLUSIVE;
const unsigned int PINION_DMIRROR_CHECK_EXCLUSIVE = HMM_DMIRROR_CHECK_EXCLUSIVE;
const unsigned int PINION_DMIRROR_RELEASE = HMM_DMIRROR_RELEASE;
const unsigned int PINION_DMIRROR_FLAGS = HMM_DMIRROR_FLAGS;
const unsigned int PINION_DMIRROR_READ_UNLOCKED = HMM_DMIRROR_READ_UNLOCKED;
const unsigned long PINION_DMIRROR_FLAG_FAIL_ALLOC = HMM_DMIRROR_FLAG_FAIL_ALLOC;
#endif

/* Macros with casts are beyond bindgen; constants are not. (Those of HMM need 64 unsigned bits: see hmm/range.rs.) */
const unsigned long PINION_MIGRATE_PFN_VALID = MIGRATE_PFN_VALID;
const unsigned long PINION_MIGRATE_PFN_MIGRATE = MIGRATE_PFN_MIGRATE;
const unsigned long PINION_MIGRATE_PFN_WRITE = MIGRATE_PFN_WRITE;
const unsigned long PINION_MIGRATE_PFN_COMPOUND = MIGRATE_PFN_COMPOUND;
const unsigned long PINION_MIGRATE_PFN_SHIFT = MIGRATE_PFN_SHIFT;
#ifdef MIGRATE_PFN_UNPIN
const unsigned long PINION_MIGRATE_PFN_PIN = MIGRATE_PFN_PIN;
const unsigned long PINION_MIGRATE_PFN_UNPIN = MIGRATE_PFN_UNPIN;
#endif
const unsigned int PINION_RANGE_BLOCKABLE = MMU_NOTIFIER_RANGE_BLOCKABLE;
const int PINION_IOCB_NOWAIT = IOCB_NOWAIT;
