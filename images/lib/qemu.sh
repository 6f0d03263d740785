# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# QEMU: the machine's own when it can do what we need, else Debian's from trixie-backports, run in place.

readonly DEVICE_MODEL=vhost-user-test-device-pci

# ensure_qemu: sets QEMU to the command (an array).
ensure_qemu() {
    local own
    if [[ -n ${PINION_QEMU:-} ]]; then
        qemu_suits "$PINION_QEMU" || {
            DIE_STATUS=$STATUS_QEMU
            die "PINION_QEMU=$PINION_QEMU has no $DEVICE_MODEL: QEMU 10.2 or newer is needed"
        }
        QEMU=("$PINION_QEMU")
        return
    fi
    if own=$(command -v qemu-system-x86_64) && qemu_suits "$own"; then
        QEMU=("$own")
        return
    fi
    resolve
    cache_entry qemu "$( (package_key qemu; declare -f make_qemu) | hash)" 600 "unpacking QEMU" make_qemu "$RESOLVED/qemu.uris"
    # Its own loader and libraries, the host's everything else: no root, no chroot.
    QEMU=("$ENTRY/usr/lib64/ld-linux-x86-64.so.2" --library-path "$ENTRY/usr/lib/x86_64-linux-gnu"
        "$ENTRY/usr/bin/qemu-system-x86_64" -L "$ENTRY/usr/share/qemu" -L "$ENTRY/usr/share/seabios")
}

make_qemu() {
    unpack_packages "$1" "$2"
    test -x "$2/usr/bin/qemu-system-x86_64"
    test -x "$2/usr/lib64/ld-linux-x86-64.so.2"
}

# qemu_suits CMD…: a usable generic vhost-user device came with 10.2; before, it was there but could not be created.
qemu_suits() { "$@" -device help 2>/dev/null | grep -q "\"$DEVICE_MODEL\""; }

# accelerator: KVM only where it really works. (/dev/kvm without vmx or svm hangs in the firmware.)
accelerator() {
    if [[ -r /dev/kvm && -w /dev/kvm ]] && grep -q -w -E 'vmx|svm' /proc/cpuinfo; then
        echo kvm
    else
        echo tcg,thread=multi
    fi
}
