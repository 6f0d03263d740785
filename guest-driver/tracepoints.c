// SPDX-License-Identifier: GPL-2.0-only
/*
 * What pinion_trace.h declares.
 */
#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "pinion_trace.h"
