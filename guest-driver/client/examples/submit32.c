// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * The interface from a 32-bit program: structures have the same layout, and the same requests work.
 *
 * It needs no C library, which is seldom there in 32 bits:
 *
 *	cc -m32 -static -ffreestanding -nostdlib -fno-pie -no-pie -I guest-driver/uapi -o submit32 submit32.c
 */
#include "pinion.h"

#ifndef __i386__
#error "to be compiled with -m32"
#endif

#define SAME(structure, size, field, offset)                                        \
	_Static_assert(sizeof(struct structure) == (size), #structure);             \
	_Static_assert(__builtin_offsetof(struct structure, field) == (offset), #structure "." #field)

SAME(pinion_info, 56, aperture_size, 48);
SAME(pinion_command, 64, reserved, 56);
SAME(pinion_chase_result, 24, visited, 16);
SAME(pinion_fence, 16, sequence, 8);
SAME(pinion_submit, 56, sequence, 48);
SAME(pinion_wait_entry, 40, reserved, 36);
SAME(pinion_wait, 32, timeout_ns, 24);
SAME(pinion_advise, 32, value, 28);
SAME(pinion_prefetch, 32, reserved, 28);
SAME(pinion_discard, 24, length, 16);
SAME(pinion_query, 32, pages, 24);
SAME(pinion_page, 24, pfn, 16);

/* Numbers of system calls on i386. */
#define EXIT	1
#define READ	3
#define WRITE	4
#define OPEN	5
#define IOCTL	54

static long call(long number, long a, long b, long c)
{
	long result;

	asm volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
	return result;
}

static void say(const char *text)
{
	long length = 0;

	while (text[length])
		length++;
	call(WRITE, 1, (long)text, length);
}

static void expect(int truth, const char *what)
{
	if (truth)
		return;
	say("not so: ");
	say(what);
	say("\n");
	call(EXIT, 1, 0, 0);
}

#define ADDRESS(pointer) ((__u64)(unsigned long)(pointer))

static __u64 counter = 5;

void _start(void)
{
	static struct pinion_command command = {
		.opcode = PINION_COMMAND_ATOMIC,
		.width = 8,
		.repeat = 100,
		.operand = 0x100000001,
	};
	static struct pinion_info info = { .size = sizeof(info) };
	static struct pinion_submit submit = { .size = sizeof(submit), .count = 1 };
	static struct pinion_wait_entry entry;
	static struct pinion_wait wait = { .size = sizeof(wait), .count = 1, .timeout_ns = 10000000000 };
	static struct pinion_page page;
	static struct pinion_query query = { .size = sizeof(query), .count = 1 };
	static __u64 ended;
	long gpu = call(OPEN, (long)"/dev/pinion0", 2, 0);

	expect(gpu >= 0, "/dev/pinion0 can be opened");
	expect(call(IOCTL, gpu, PINION_IOCTL_INFO, (long)&info) == 0, "INFO");
	expect(info.version == PINION_VERSION, "the version");
	command.address = ADDRESS(&counter);
	submit.commands = ADDRESS(&command);
	expect(call(IOCTL, gpu, PINION_IOCTL_SUBMIT, (long)&submit) == 0, "SUBMIT");
	expect(submit.sequence == 1, "the number");
	entry.sequence = submit.sequence;
	wait.entries = ADDRESS(&entry);
	expect(call(IOCTL, gpu, PINION_IOCTL_WAIT, (long)&wait) == 0, "WAIT");
	expect(entry.status == PINION_STATUS_OK && wait.ended == 1, "it has succeeded");
	expect(call(READ, gpu, (long)&ended, sizeof(ended)) == sizeof(ended) && ended == 1, "read()");
	query.address = ADDRESS(&counter) & ~4095ull;
	query.pages = ADDRESS(&page);
	expect(call(IOCTL, gpu, PINION_IOCTL_QUERY, (long)&query) == 0, "QUERY");
	/* Other variables are on the same page, and bring it home. */
	expect(page.state <= PINION_PAGE_EXCLUSIVE, "the state of a page");
	expect(counter == 0x6400000000 + 100 + 5, "the counter");
	say("a 32-bit program has used the GPU\n");
	call(EXIT, 0, 0, 0);
	__builtin_unreachable();
}
