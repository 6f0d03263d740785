#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Runs in a guest: the benchmark of the kernel's hmm-tests, first on Pinion and then on the kernel's own test module, which pretends to
# be a device, in the same boot. docs/hmm-tests.md says how to call it.
set -eu

benchmark() {
    echo "== $1"
    hmm-tests -r hmm.hmm_device_private.benchmark_thp_migration
}

benchmark Pinion
# The nodes of the test module have the same names.
rm /dev/hmm_dmirror*
insmod /pinion/test_hmm.ko
benchmark test_hmm.ko
rmmod test_hmm
