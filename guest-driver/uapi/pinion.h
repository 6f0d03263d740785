/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR MIT) */
/*
 * Interface of /dev/pinionN, the Pinion virtual GPU.
 *
 * An open file is one GPU address space. It mirrors the address space of the process that opened it: a
 * pointer of the process means the same to the GPU. Only that process may use the file; a child that has
 * inherited it, or another process that was passed it, gets EPERM.
 *
 * Every structure starts with its size, set by the caller, and with flags. The kernel takes a structure that
 * is longer than the one it knows if what it does not know is zero (else E2BIG), and a shorter one as if the
 * rest were zero, down to the size that version 1 had. Unknown flags and reserved fields that are not zero are EINVAL.
 */
#ifndef _UAPI_PINION_H
#define _UAPI_PINION_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PINION_IOCTL_BASE	0xB9

/* How the module keeps a page pinned in place (struct pinion_info::pin_method). */
#define PINION_PIN_METHOD_MIGRATE_PFN	1	/* the kernel has MIGRATE_PFN_PIN and MIGRATE_PFN_UNPIN */
#define PINION_PIN_METHOD_TAKEOVER	2	/* the module takes over the source page's reference */

/* What this device and this module can do. */
struct pinion_info {
	__u32 size;
	__u32 flags;		/* 0 */
	__u32 version;		/* of this interface: 1 */
	__u32 rings;		/* number of command rings */
	__u32 max_batch;	/* most commands in one submission */
	__u32 pin_method;	/* PINION_PIN_METHOD_* */
	__u64 vram_size;	/* bytes */
};

/*
 * One GPU command; the layout is that of the device's own commands, and docs/device.md says what each does.
 * Addresses are pointers of the process.
 */
struct pinion_command {
	__u8 opcode;		/* PINION_COMMAND_* */
	__u8 operation;		/* PINION_ATOMIC_* */
	__u8 width;		/* bytes: FILL 1, 2, 4, 8; ATOMIC 4, 8 */
	__u8 flags;		/* PINION_COMMAND_WRITE_BACK */
	__u32 repeat;		/* ATOMIC: number of operations */
	__u64 address;
	__u64 source;		/* COPY: source; ATOMIC with WRITE_BACK: where the last old value goes */
	__u64 length;		/* COPY, FILL: bytes */
	__u64 operand;		/* FILL: pattern; ATOMIC: operand */
	__u64 compare;		/* ATOMIC compare-exchange */
	__u32 stride;		/* ATOMIC: operation i is at address + (i % span) * stride */
	__u32 span;		/* 0 stands for repeat */
	__u64 reserved;
};

#define PINION_COMMAND_NOP		0
#define PINION_COMMAND_COPY		1
#define PINION_COMMAND_FILL		2
#define PINION_COMMAND_ATOMIC		3

#define PINION_COMMAND_WRITE_BACK	(1 << 0)

#define PINION_ATOMIC_ADD		0
#define PINION_ATOMIC_AND		1
#define PINION_ATOMIC_OR		2
#define PINION_ATOMIC_XOR		3
#define PINION_ATOMIC_MIN_UNSIGNED	4
#define PINION_ATOMIC_MAX_UNSIGNED	5
#define PINION_ATOMIC_MIN_SIGNED	6
#define PINION_ATOMIC_MAX_SIGNED	7
#define PINION_ATOMIC_EXCHANGE		8
#define PINION_ATOMIC_COMPARE_EXCHANGE	9

/* Queues a batch of commands. Returns as soon as they are queued. */
struct pinion_submit {
	__u32 size;
	__u32 flags;		/* 0 */
	__u32 ring;
	__u32 count;		/* commands, 1 to pinion_info::max_batch */
	__u64 commands;		/* pointer to struct pinion_command[count] */
	__u64 sequence;		/* out: this submission's number in the file's order on that ring, from 1 */
};

/*
 * Waits until a submission, and so all before it on that ring, has ended. How it ended is known until 64 later
 * ones have failed (ESTALE from then on).
 */
struct pinion_wait {
	__u32 size;
	__u32 flags;		/* 0 */
	__u32 ring;
	__u32 status;		/* out: PINION_STATUS_* of that submission */
	__u64 sequence;
	__u64 timeout_ns;	/* relative; 0 asks without waiting. ETIMEDOUT when it is over */
	__u64 fault_address;	/* out: where it failed, if it did */
	__u32 executed;		/* out, if it failed: commands that were executed to their end */
	__u32 reserved;
	__u64 repeats;		/* out, if it failed: repeats of the unfinished command */
};

#define PINION_STATUS_OK		0
#define PINION_STATUS_INVALID		1	/* the device found the command malformed */
#define PINION_STATUS_UNSUPPORTED	2
#define PINION_STATUS_BAD_ADDRESS	6
#define PINION_STATUS_BUS_ERROR		7
#define PINION_STATUS_CONTEXT_ERROR	8	/* an earlier submission of this file failed */
#define PINION_STATUS_FAULT		9	/* the process could not have made this access either */
#define PINION_STATUS_DEVICE_LOST	0x100	/* the device has gone, or does not answer */
#define PINION_STATUS_NOT_EXCLUSIVE	0x101	/* a page that cannot be pinned: file-backed, or in use by others */
#define PINION_STATUS_NO_MEMORY		0x102	/* no memory for the page, or for the page table */

/* Says how the pages of a range are to be treated. The range is page-aligned. */
struct pinion_advise {
	__u32 size;
	__u32 flags;		/* 0 */
	__u64 address;
	__u64 length;
	__u32 advice;		/* PINION_ADVISE_* */
	__u32 value;
};

/* How the GPU gets exclusive access for its atomic operations on system memory: PINION_ATOMICS_*. */
#define PINION_ADVISE_ATOMICS		1

#define PINION_ATOMICS_PIN		0	/* default: pin in place (MIGRATE_PFN_PIN) */
/*
 * No exclusivity: the GPU operates on a page that the CPU has mapped too, and updates get lost. For
 * demonstration; this is what the other modes are there to prevent.
 */
#define PINION_ATOMICS_UNPROTECTED	1

/* Where the pages of a range are. */
struct pinion_query {
	__u32 size;
	__u32 flags;		/* 0 */
	__u64 address;		/* page-aligned */
	__u64 count;		/* pages, at most PINION_QUERY_MAX */
	__u64 pages;		/* pointer to struct pinion_page[count] */
};

#define PINION_QUERY_MAX		512

struct pinion_page {
	__u32 state;		/* PINION_PAGE_* */
	__u32 rights;		/* PINION_RIGHT_*: what the GPU page table grants at the moment */
	__u64 pfn;		/* of the pinned system page, with CAP_SYS_ADMIN; else 0 */
};

#define PINION_PAGE_CPU			0	/* not known to the GPU */
#define PINION_PAGE_MIRRORED		1	/* mapped by the GPU as well */
#define PINION_PAGE_PINNED		3	/* pinned in place for the GPU */

#define PINION_RIGHT_READ		(1 << 0)
#define PINION_RIGHT_WRITE		(1 << 1)
#define PINION_RIGHT_ATOMIC		(1 << 2)

#define PINION_IOCTL_INFO	_IOWR(PINION_IOCTL_BASE, 0x00, struct pinion_info)
#define PINION_IOCTL_SUBMIT	_IOWR(PINION_IOCTL_BASE, 0x01, struct pinion_submit)
#define PINION_IOCTL_WAIT	_IOWR(PINION_IOCTL_BASE, 0x02, struct pinion_wait)
#define PINION_IOCTL_ADVISE	_IOWR(PINION_IOCTL_BASE, 0x03, struct pinion_advise)
#define PINION_IOCTL_QUERY	_IOWR(PINION_IOCTL_BASE, 0x04, struct pinion_query)

/*
 * Statistics of the file are in /proc/PID/fdinfo/FD, one "pinion-NAME:\tVALUE" a line, counted since open:
 * faults, pins, unpins, mirrors, invalidations, submissions.
 */

#endif /* _UAPI_PINION_H */
