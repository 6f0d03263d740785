// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pinion, a virtual GPU: a vhost-user device.
