/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Tracepoints, called from trace.rs. docs/driver.md lists them.
 *
 * `gpu` is the number in /dev/pinionN. A context is an address space on that device. Addresses are those of the process.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM pinion

#if !defined(_PINION_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _PINION_TRACE_H

#include <linux/tracepoint.h>

#define pinion_show_access(access)				\
	__print_flags(access, "|", { 1, "read" }, { 2, "write" }, { 4, "atomic" })

/* The GPU has faulted, and the fault is about to be handled. */
TRACE_EVENT(pinion_fault,
	TP_PROTO(u32 gpu, u32 context, u32 ring, u64 va, u64 length, u32 access, u32 reason),
	TP_ARGS(gpu, context, ring, va, length, access, reason),
	TP_STRUCT__entry(
		__field(u32, gpu)
		__field(u32, context)
		__field(u32, ring)
		__field(u64, va)
		__field(u64, length)
		__field(u32, access)
		__field(u32, reason)
	),
	TP_fast_assign(
		__entry->gpu = gpu;
		__entry->context = context;
		__entry->ring = ring;
		__entry->va = va;
		__entry->length = length;
		__entry->access = access;
		__entry->reason = reason;
	),
	TP_printk("gpu=%u context=%u ring=%u va=%#llx length=%#llx access=%s reason=%u", __entry->gpu,
		  __entry->context, __entry->ring, __entry->va, __entry->length,
		  pinion_show_access(__entry->access), __entry->reason)
);

/* Something has happened to pages, from a virtual address on. */
DECLARE_EVENT_CLASS(pinion_pages,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages),
	TP_STRUCT__entry(
		__field(u32, gpu)
		__field(u32, context)
		__field(u64, va)
		__field(u64, pages)
	),
	TP_fast_assign(
		__entry->gpu = gpu;
		__entry->context = context;
		__entry->va = va;
		__entry->pages = pages;
	),
	TP_printk("gpu=%u context=%u va=%#llx pages=%llu", __entry->gpu, __entry->context, __entry->va,
		  __entry->pages)
);

/* They were migrated to VRAM. */
DEFINE_EVENT(pinion_pages, pinion_migrate,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages));

/* They came home from VRAM. */
DEFINE_EVENT(pinion_pages, pinion_migrate_home,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages));

/* They came home from VRAM to make room for others. */
DEFINE_EVENT(pinion_pages, pinion_evict,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages));

/* The GPU's mapping of them was cleared, and INVALIDATE has been answered. */
DEFINE_EVENT(pinion_pages, pinion_invalidate,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages));

/* They were pinned in place for the GPU. */
DEFINE_EVENT(pinion_pages, pinion_pin,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages));

/* Pinned pages were given back. */
DEFINE_EVENT(pinion_pages, pinion_unpin,
	TP_PROTO(u32 gpu, u32 context, u64 va, u64 pages),
	TP_ARGS(gpu, context, va, pages));

/* A submission has gone to the device. `sequence` counts those of the file on the ring, `number` those of the ring. */
TRACE_EVENT(pinion_submit,
	TP_PROTO(u32 gpu, u32 ring, u32 context, u64 sequence, u64 number, u32 commands),
	TP_ARGS(gpu, ring, context, sequence, number, commands),
	TP_STRUCT__entry(
		__field(u32, gpu)
		__field(u32, ring)
		__field(u32, context)
		__field(u64, sequence)
		__field(u64, number)
		__field(u32, commands)
	),
	TP_fast_assign(
		__entry->gpu = gpu;
		__entry->ring = ring;
		__entry->context = context;
		__entry->sequence = sequence;
		__entry->number = number;
		__entry->commands = commands;
	),
	TP_printk("gpu=%u ring=%u context=%u sequence=%llu number=%llu commands=%u", __entry->gpu, __entry->ring,
		  __entry->context, __entry->sequence, __entry->number, __entry->commands)
);

/* A submission has ended. `number` is 0 if it never went to the device. */
TRACE_EVENT(pinion_complete,
	TP_PROTO(u32 gpu, u32 ring, u32 context, u64 sequence, u64 number, u32 status),
	TP_ARGS(gpu, ring, context, sequence, number, status),
	TP_STRUCT__entry(
		__field(u32, gpu)
		__field(u32, ring)
		__field(u32, context)
		__field(u64, sequence)
		__field(u64, number)
		__field(u32, status)
	),
	TP_fast_assign(
		__entry->gpu = gpu;
		__entry->ring = ring;
		__entry->context = context;
		__entry->sequence = sequence;
		__entry->number = number;
		__entry->status = status;
	),
	TP_printk("gpu=%u ring=%u context=%u sequence=%llu number=%llu status=%#x", __entry->gpu, __entry->ring,
		  __entry->context, __entry->sequence, __entry->number, __entry->status)
);

#endif /* _PINION_TRACE_H */

/* This part must be outside protection. */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE pinion_trace
#include <trace/define_trace.h>
