// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest programs of Pinion and the harness that runs them.
