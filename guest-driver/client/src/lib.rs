// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A safe interface to /dev/pinionN.
