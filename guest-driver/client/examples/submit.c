// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * The interface from C: two batches, the second after the first, whose end is seen in four ways.
 *
 *	cc -I guest-driver/uapi -o submit submit.c
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "pinion.h"

#define ADDRESS(pointer) ((uint64_t)(uintptr_t)(pointer))

static int gpu;

/* Makes a request; a signal does not end it. */
static void request(const char *name, unsigned long number, void *argument)
{
	int result;

	do {
		result = ioctl(gpu, number, argument);
	} while (result < 0 && errno == EINTR);
	if (result < 0) {
		fprintf(stderr, "%s: %s\n", name, strerror(errno));
		exit(1);
	}
}

#define REQUEST(name, argument) request(#name, PINION_IOCTL_##name, argument)

static void expect(int truth, const char *what)
{
	if (!truth) {
		fprintf(stderr, "not so: %s\n", what);
		exit(1);
	}
}

int main(void)
{
	static uint64_t counter = 5, found, copies[2][1000];
	struct pinion_info info = { .size = sizeof(info) };
	struct pinion_command first[] = {
		{
			.opcode = PINION_COMMAND_FILL,
			.width = 8,
			.address = ADDRESS(copies[0]),
			.length = sizeof(copies[0]),
			.operand = 0x0123456789abcdef,
		},
		{
			.opcode = PINION_COMMAND_ATOMIC,
			.operation = PINION_ATOMIC_ADD,
			.width = 8,
			.flags = PINION_COMMAND_WRITE_BACK,
			.repeat = 100,
			.address = ADDRESS(&counter),
			.source = ADDRESS(&found),
			.operand = 1,
		},
	};
	struct pinion_command second = {
		.opcode = PINION_COMMAND_COPY,
		.address = ADDRESS(copies[1]),
		.source = ADDRESS(copies[0]),
		.length = sizeof(copies[0]),
	};
	struct pinion_submit submit = {
		.size = sizeof(submit),
		.flags = PINION_SUBMIT_EVENTFD,
		.count = 2,
		.commands = ADDRESS(first),
	};
	struct pinion_fence fence = { .kind = PINION_FENCE_SEQUENCE };
	struct pinion_wait_entry entries[2] = {};
	struct pinion_wait wait = {
		.size = sizeof(wait),
		.entries = ADDRESS(entries),
		.count = 2,
		.timeout_ns = 10000000000,
	};
	struct pinion_page page;
	struct pinion_query query = {
		.size = sizeof(query),
		.address = ADDRESS(&counter) & ~4095ull,
		.count = 1,
		.pages = ADDRESS(&page),
	};
	struct pollfd poll_for = { .events = POLLIN };
	uint64_t ended;
	int event;

	gpu = open("/dev/pinion0", O_RDWR | O_CLOEXEC);
	event = eventfd(0, EFD_CLOEXEC);
	if (gpu < 0 || event < 0) {
		perror("/dev/pinion0");
		return 1;
	}
	REQUEST(INFO, &info);
	printf("version %u, %u rings, %u commands in a batch\n", info.version, info.rings, info.max_batch);

	submit.eventfd = event;
	REQUEST(SUBMIT, &submit);
	fence.id = entries[0].ring = submit.ring;
	fence.sequence = entries[0].sequence = submit.sequence;

	/* On another ring, if there is one. */
	submit = (struct pinion_submit) {
		.size = sizeof(submit),
		.flags = PINION_SUBMIT_FENCE,
		.ring = info.rings - 1,
		.count = 1,
		.commands = ADDRESS(&second),
		.fences = ADDRESS(&fence),
		.fence_count = 1,
	};
	REQUEST(SUBMIT, &submit);
	entries[1].ring = submit.ring;
	entries[1].sequence = submit.sequence;

	/* 1: the descriptor of its end. */
	poll_for.fd = submit.fence;
	expect(poll(&poll_for, 1, 10000) == 1 && poll_for.revents == POLLIN, "the second batch ends");
	/* 2: the eventfd of the first. */
	expect(read(event, &ended, sizeof(ended)) == sizeof(ended) && ended == 1, "the eventfd was signalled");
	/* 3: waiting, which also tells how they ended. */
	REQUEST(WAIT, &wait);
	expect(wait.ended == 2, "both have ended");
	expect(entries[0].status == PINION_STATUS_OK && entries[1].status == PINION_STATUS_OK, "both have succeeded");
	/* 4: the file itself. */
	for (uint64_t sum = 0; sum < 2; sum += ended)
		expect(read(gpu, &ended, sizeof(ended)) == sizeof(ended), "read() tells of the end of work");

	REQUEST(QUERY, &query);
	printf("the counter's page is in state %u, rights %#x\n", page.state, page.rights);
	expect(counter == 105, "the counter was incremented");
	expect(found == 104, "the last increment found the one before");
	for (int i = 0; i < 1000; i++)
		expect(copies[1][i] == 0x0123456789abcdef, "the copy is what was filled");
	printf("counter %llu\n", (unsigned long long)counter);
	return 0;
}
