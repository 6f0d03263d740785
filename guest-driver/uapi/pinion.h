/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR MIT) */
/*
 * Interface of /dev/pinionN, the Pinion virtual GPU. Version 3.
 *
 * An open file is one GPU address space. It mirrors the address space of the process that opened it: a
 * pointer of the process means the same to the GPU. Only that process may use the file; a child that has
 * inherited it, or another process that was passed it, gets EPERM. It neither sees nor disturbs other files,
 * but for the time that their work takes on the same ring.
 *
 * Every argument starts with its size, set by the caller, and with flags. The kernel takes a structure that
 * is longer than the one it knows if what it does not know is zero (else E2BIG), and a shorter one as if the
 * rest were zero, down to the size that version 2 had. Unknown flags, and reserved fields that are not zero,
 * are EINVAL. So are numbers and ranges that make no sense. All layouts are the same for 32-bit and 64-bit callers.
 *
 * A user who is not privileged (CAP_SYS_RESOURCE) may have so many files in use on a device, by all processes
 * (module parameter contexts_per_user); the request that would make it one more, usually the first of a file, gets
 * EDQUOT. (INFO is free.) ENODEV: the device is lost.
 */
#ifndef _UAPI_PINION_H
#define _UAPI_PINION_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PINION_IOCTL_BASE	0xB9

/* 3: the aperture (pinion_info::aperture_size, PINION_LOCATION_APERTURE, PINION_PAGE_COHERENT). */
#define PINION_VERSION		3

/* What this device and this module can do. */
struct pinion_info {
	__u32 size;
	__u32 flags;		/* 0 */
	__u32 version;		/* of this interface: PINION_VERSION */
	__u32 rings;		/* number of command rings */
	__u32 max_batch;	/* most commands in one submission */
	__u32 pin_method;	/* PINION_PIN_METHOD_* */
	__u64 vram_size;	/* bytes */
	__u32 max_submissions;	/* of a file that have not ended */
	__u32 max_commands;	/* in them */
	__u32 atomics;		/* 1 << PINION_ATOMICS_* for each that is there */
	__u32 locations;	/* 1 << PINION_LOCATION_* for each that is there */
	__u64 aperture_size;	/* since 3: bytes of VRAM that the CPU can access, or 0 */
};

/* How the module keeps a page pinned in place. */
#define PINION_PIN_METHOD_MIGRATE_PFN	1	/* the kernel has MIGRATE_PFN_PIN and MIGRATE_PFN_UNPIN */
#define PINION_PIN_METHOD_TAKEOVER	2	/* the module takes over the source page's reference */

/*
 * One GPU command; the layout is that of the device's own commands, and docs/device.md says what each does.
 * Addresses are pointers of the process. Fields that a command does not use are zero.
 */
struct pinion_command {
	__u8 opcode;		/* PINION_COMMAND_* */
	__u8 operation;		/* ATOMIC: PINION_ATOMIC_*; SEMAPHORE_WAIT: PINION_COMPARE_*; PREFETCH: PINION_ACCESS_* */
	__u8 width;		/* bytes: FILL 1, 2, 4, 8; ATOMIC, SEMAPHORE_* 4, 8 */
	__u8 flags;		/* PINION_COMMAND_WRITE_BACK* */
	__u32 repeat;		/* ATOMIC: number of operations; CHASE: most nodes */
	__u64 address;		/* destination; CHASE: first node */
	__u64 source;		/* COPY: source; WRITE_BACK, CHASE: where the result goes */
	__u64 length;		/* COPY, FILL, PREFETCH: bytes */
	__u64 operand;		/* FILL: pattern; ATOMIC: operand; SEMAPHORE_*: number */
	__u64 compare;		/* ATOMIC compare-exchange; SEMAPHORE_WAIT: mask */
	__u32 stride;		/* ATOMIC: operation i is at address + (i % span) * stride; CHASE: offset of a node's value */
	__u32 span;		/* ATOMIC: 0 stands for repeat; CHASE: offset of a node's pointer */
	__u64 reserved;
};

#define PINION_COMMAND_NOP		0
#define PINION_COMMAND_COPY		1
#define PINION_COMMAND_FILL		2
#define PINION_COMMAND_ATOMIC		3
#define PINION_COMMAND_SEMAPHORE_WAIT	4	/* the ring waits, at most until the device's watchdog ends the work */
#define PINION_COMMAND_SEMAPHORE_SIGNAL	5
#define PINION_COMMAND_TIMESTAMP	6	/* device time, in nanoseconds */
#define PINION_COMMAND_PREFETCH		9
#define PINION_COMMAND_CHASE		10

#define PINION_COMMAND_WRITE_BACK	(1 << 0)
#define PINION_COMMAND_WRITE_BACK_ALL	(1 << 1)

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
#define PINION_ATOMIC_LOAD		10
#define PINION_ATOMIC_STORE		11

#define PINION_COMPARE_EQUAL		0
#define PINION_COMPARE_NOT_EQUAL	1
#define PINION_COMPARE_LESS		2
#define PINION_COMPARE_LESS_EQUAL	3
#define PINION_COMPARE_GREATER		4
#define PINION_COMPARE_GREATER_EQUAL	5

#define PINION_ACCESS_READ		(1 << 0)
#define PINION_ACCESS_WRITE		(1 << 1)
#define PINION_ACCESS_ATOMIC		(1 << 2)	/* with READ and WRITE */

/* What CHASE stores. */
struct pinion_chase_result {
	__u64 pointer;		/* that came last; 0 at the end of the list */
	__u64 sum;
	__u64 visited;		/* nodes */
};

/*
 * Something to wait for. It has passed when the submission that it stands for has ended, however it ended, and so
 * have all before that on the same ring. Waiting does not make it fail with what it waits for.
 */
struct pinion_fence {
	__u32 kind;		/* PINION_FENCE_* */
	__u32 id;		/* SEQUENCE: a ring. DESCRIPTOR: a file descriptor */
	__u64 sequence;		/* SEQUENCE: number of a submission of this file on that ring. DESCRIPTOR: 0 */
};

#define PINION_FENCE_SEQUENCE		0
/* A file descriptor from PINION_SUBMIT_FENCE, of any file and any device. */
#define PINION_FENCE_DESCRIPTOR		1

/*
 * Queues a batch of commands. Returns as soon as they are queued. A batch runs when those of the file before it on
 * that ring and all its fences have passed; until then it keeps nobody else's work waiting.
 *
 * A file can have so many submissions that have not ended, with so many commands in them (pinion_info). If
 * there is no room then this waits for some, or fails with EAGAIN if the file is O_NONBLOCK.
 *
 * A command that the kernel does not know, or does not let programs use, is EINVAL. One that the device finds malformed
 * ends the submission with a status.
 */
struct pinion_submit {
	__u32 size;
	__u32 flags;		/* PINION_SUBMIT_* */
	__u32 ring;
	__u32 count;		/* commands, 1 to pinion_info::max_batch */
	__u64 commands;		/* pointer to struct pinion_command[count] */
	__u64 fences;		/* pointer to struct pinion_fence[fence_count], for which the batch waits */
	__u32 fence_count;	/* at most PINION_MAX_FENCES */
	__s32 eventfd;		/* with PINION_SUBMIT_EVENTFD, else 0 */
	__s32 fence;		/* out, with PINION_SUBMIT_FENCE; else 0 */
	__u32 reserved;
	__u64 sequence;		/* out: this submission's number in the file's order on that ring, from 1 */
};

/* Adds one to the event descriptor (see eventfd(2)) when the submission has ended. */
#define PINION_SUBMIT_EVENTFD		(1 << 0)
/*
 * Makes a file descriptor (close-on-exec) that stands for the end of the submission. It can be polled (POLLIN when it
 * has passed), passed to another process, and waited for by submissions to any file of any device. It tells
 * nothing else about the submission.
 */
#define PINION_SUBMIT_FENCE		(1 << 1)

#define PINION_MAX_FENCES		64

/* A submission to wait for, and how it ended. */
struct pinion_wait_entry {
	__u32 ring;
	__u32 status;		/* out: PINION_STATUS_* */
	__u64 sequence;
	__u64 fault_address;	/* out: where it failed, if it did */
	__u64 repeats;		/* out, if it failed: repeats of the unfinished command */
	__u32 executed;		/* out, if it failed: commands that were executed to their end */
	__u32 reserved;
};

/*
 * Waits until submissions have ended: all of them, or any. How one ended is known until it was followed by 64 that
 * failed differently each time (ESTALE from then on).
 *
 * The time is rounded up to what the kernel's timers can do. Negative is for ever; 0 asks without waiting. With
 * PINION_WAIT_ABSOLUTE it is a time of CLOCK_MONOTONIC, else the call leaves in `timeout_ns` what is left of it, so that
 * a call that a signal has ended (EINTR, or restarted under SA_RESTART) goes on where it was. When the time is over: ETIMEDOUT,
 * and the entries tell of those that have ended.
 */
struct pinion_wait {
	__u32 size;
	__u32 flags;		/* PINION_WAIT_* */
	__u64 entries;		/* pointer to struct pinion_wait_entry[count] */
	__u32 count;		/* 1 to PINION_MAX_FENCES */
	__u32 ended;		/* out: how many of them have ended */
	__s64 timeout_ns;	/* in and out */
};

#define PINION_WAIT_ANY			(1 << 0)
#define PINION_WAIT_ABSOLUTE		(1 << 1)

#define PINION_STATUS_OK		0
#define PINION_STATUS_INVALID		1	/* the device found the command malformed */
#define PINION_STATUS_UNSUPPORTED	2	/* an operation that the device does not know */
#define PINION_STATUS_BAD_ADDRESS	6
#define PINION_STATUS_BUS_ERROR		7
#define PINION_STATUS_CONTEXT_ERROR	8	/* an earlier submission of this file failed */
#define PINION_STATUS_FAULT		9	/* the process could not have made this access either */
#define PINION_STATUS_RESET		11	/* the device was reset */
#define PINION_STATUS_HUNG		12	/* it ran, or waited, for longer than the device lets it */
#define PINION_STATUS_DEVICE_LOST	0x100	/* the device has gone, or does not answer */
#define PINION_STATUS_NOT_EXCLUSIVE	0x101	/* a page that cannot be pinned: file-backed, or in use by others */
#define PINION_STATUS_NO_MEMORY		0x102	/* no memory for the page, or for the page table */
#define PINION_STATUS_PENDING		0x1ff	/* it has not ended */

/*
 * read() and poll() tell of the end of submissions. read() takes at least 8 bytes of room and gives a __u64: how many
 * submissions of this file have ended since it was last read; it waits until that is not 0, or fails with EAGAIN if the
 * file is O_NONBLOCK. poll(): POLLIN when read() would not wait. POLLOUT when a submission of one command would not. POLLERR
 * and POLLHUP when the device is lost. WAIT does not change any of this.
 */

/*
 * Says how the pages of a range are to be treated, from now on. The range is page-aligned, and need not be mapped. What is
 * not there (see pinion_info) is EOPNOTSUPP.
 */
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
/* Where the pages had better be: PINION_LOCATION_*. */
#define PINION_ADVISE_LOCATION		2

#define PINION_ATOMICS_AUTO		0	/* default: the driver chooses */
/*
 * The page is pinned in place (MIGRATE_PFN_PIN): it is unmapped from the CPU and the GPU works on it where it is. The CPU
 * gets it back when it touches it. Anonymous memory only.
 */
#define PINION_ATOMICS_PIN		1
/*
 * The page is made exclusive to the device (make_device_exclusive): the same, by the means of an unpatched kernel. It stays
 * a page of the process in every other respect. Anonymous memory only.
 */
#define PINION_ATOMICS_EXCLUSIVE	2
/* The page is migrated to VRAM, where operations of the GPU are atomic, and back when the CPU touches it. */
#define PINION_ATOMICS_MIGRATE		3
/*
 * No exclusivity: the GPU operates on a page that the CPU has mapped too, and updates get lost. For
 * demonstration; this is what the other mechanisms are there to prevent.
 */
#define PINION_ATOMICS_UNPROTECTED	4

#define PINION_LOCATION_NONE		0	/* default: pages stay where they are */
#define PINION_LOCATION_SYSTEM		1	/* system memory: the GPU accesses it there */
/*
 * Device memory: an access by the GPU brings it there, and one by the CPU brings it back. That part of VRAM is used which the
 * CPU cannot access; if there is none, the same as PINION_LOCATION_APERTURE.
 */
#define PINION_LOCATION_VRAM		2
/*
 * The part of device memory that the CPU can access, as long as there is room: an access by the GPU brings a page there, and it
 * stays. Both access it at the same time, and atomic operations of both on the same number are atomic. Once the device is lost
 * the pages there are, and whoever touches them gets SIGBUS. docs/driver.md says what can be seen before that.
 */
#define PINION_LOCATION_APERTURE	3

/*
 * Brings the pages of a range to a place ahead of their use, and maps them for the GPU: in VRAM to do anything there, in system
 * memory to read, and to write what is anonymous memory that the process may write to. What cannot be brought
 * there stays where it is; that is not an error. EOPNOTSUPP: there is no such place.
 */
struct pinion_prefetch {
	__u32 size;
	__u32 flags;		/* 0 */
	__u64 address;		/* page-aligned, as is the length */
	__u64 length;
	__u32 location;		/* PINION_LOCATION_*, but not NONE */
	__u32 reserved;
};

/*
 * What is in the range is not needed any more: pages in VRAM leave it without being copied, until the GPU accesses them again. The
 * memory stays the process's. Until it is written again, each byte of the range reads as what it was or as zero, and may change
 * from the one to the other; never as what another process has written. What is written afterwards is kept, by whomever and
 * wherever. Pages that the CPU can access keep what they have, and so do those that the process may not write to, or shares with
 * a child.
 */
struct pinion_discard {
	__u32 size;
	__u32 flags;		/* 0 */
	__u64 address;		/* page-aligned, as is the length */
	__u64 length;
};

/* Where the pages of a range are. */
struct pinion_query {
	__u32 size;
	__u32 flags;		/* 0 */
	__u64 address;		/* page-aligned */
	__u64 count;		/* pages of 4096 bytes, at most PINION_QUERY_MAX */
	__u64 pages;		/* pointer to struct pinion_page[count] */
};

#define PINION_QUERY_MAX		512

struct pinion_page {
	__u32 state;		/* PINION_PAGE_* */
	__u32 rights;		/* PINION_RIGHT_*: what the GPU page table grants at the moment */
	__u32 page_size;	/* bytes of the page of the GPU page table that this is (part of); 0 if it maps nothing */
	__u32 reserved;
	__u64 pfn;		/* of the pinned system page, with CAP_SYS_ADMIN; else 0 */
};

#define PINION_PAGE_CPU			0	/* not known to the GPU */
#define PINION_PAGE_MIRRORED		1	/* mapped by the GPU as well */
#define PINION_PAGE_VRAM		2	/* in VRAM, where the CPU cannot access it */
#define PINION_PAGE_PINNED		3	/* pinned in place for the GPU */
#define PINION_PAGE_EXCLUSIVE		4	/* exclusive to the GPU, in place */
#define PINION_PAGE_COHERENT		5	/* in VRAM, where the CPU can access it */

#define PINION_RIGHT_READ		(1 << 0)
#define PINION_RIGHT_WRITE		(1 << 1)
#define PINION_RIGHT_ATOMIC		(1 << 2)

#define PINION_IOCTL_INFO	_IOWR(PINION_IOCTL_BASE, 0x00, struct pinion_info)
#define PINION_IOCTL_SUBMIT	_IOWR(PINION_IOCTL_BASE, 0x01, struct pinion_submit)
#define PINION_IOCTL_WAIT	_IOWR(PINION_IOCTL_BASE, 0x02, struct pinion_wait)
#define PINION_IOCTL_ADVISE	_IOWR(PINION_IOCTL_BASE, 0x03, struct pinion_advise)
#define PINION_IOCTL_QUERY	_IOWR(PINION_IOCTL_BASE, 0x04, struct pinion_query)
#define PINION_IOCTL_PREFETCH	_IOWR(PINION_IOCTL_BASE, 0x05, struct pinion_prefetch)
#define PINION_IOCTL_DISCARD	_IOWR(PINION_IOCTL_BASE, 0x06, struct pinion_discard)

/*
 * Statistics of the file are in /proc/PID/fdinfo/FD, one "KEY:\tVALUE" a line; see docs/driver.md.
 */

#endif /* _UAPI_PINION_H */
