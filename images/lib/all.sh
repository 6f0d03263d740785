# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
LIB=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=images/lib/common.sh
source "$LIB/common.sh"
# shellcheck source=images/lib/packages.sh
source "$LIB/packages.sh"
# shellcheck source=images/lib/sysroot.sh
source "$LIB/sysroot.sh"
# shellcheck source=images/lib/kernel.sh
source "$LIB/kernel.sh"
# shellcheck source=images/lib/guest.sh
source "$LIB/guest.sh"
# shellcheck source=images/lib/selftests.sh
source "$LIB/selftests.sh"
# shellcheck source=images/lib/qemu.sh
source "$LIB/qemu.sh"
