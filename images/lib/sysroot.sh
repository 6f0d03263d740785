# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# The sysroot: a Debian trixie tree with the toolchain for kernel and module, entered through namespaces of its own.

# ensure_toolchain: sets TOOLCHAIN to the tree.
ensure_toolchain() {
    resolve
    cache_entry toolchain "$( (package_key toolchain; declare -f make_toolchain) | hash)" 4500 \
        "unpacking the toolchain (Debian $SUITE)" make_toolchain "$RESOLVED/toolchain.uris"
    TOOLCHAIN=$ENTRY
}

make_toolchain() {
    local uris=$1 new=$2 compiler
    unpack_packages "$uris" "$new"
    # What maintainer scripts would have done, as far as anything here needs it.
    ln -s mawk "$new/usr/bin/awk"
    ln -s gcc "$new/usr/bin/cc"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$new/etc/passwd"
    echo 'root:x:0:' >"$new/etc/group"
    echo pinion >"$new/etc/hostname"
    # ccache is called by the names of the compilers that it stands in for; see kernel_make.
    mkdir -p "$new/usr/lib/ccache"
    for compiler in gcc clang-19; do
        ln -sf ../../bin/ccache "$new/usr/lib/ccache/$compiler"
    done
    # Where in_toolchain puts things.
    mkdir -p "$new"/{dev,proc,tmp,pinion/{repo,linux,build,out,ccache}}
    test -x "$new/usr/bin/rustc"
    test -x "$new/usr/bin/busybox"
    test -x "$new/usr/lib/ccache/clang-19"
}

# namespace_flags: how this user gets a mount namespace. Sets NAMESPACE; explains when there is no way.
namespace_flags() {
    local as_user=(--user --map-root-user)
    [[ -z ${NAMESPACE[*]:-} ]] || return 0
    need_tool unshare util-linux
    if [[ $(id -u) == 0 ]]; then
        NAMESPACE=(--mount --pid --fork --kill-child)
        unshare --mount true 2>/dev/null ||
            die "root may not create a mount namespace here (a container without CAP_SYS_ADMIN?): use a privileged container"
    else
        NAMESPACE=("${as_user[@]}" --mount --pid --fork --kill-child)
        unshare "${as_user[@]}" --mount true 2>/dev/null ||
            die "user namespaces are not allowed for you here. Run this once, then try again:
    sudo PINION_CACHE=$CACHE $REPO/images/setup"
    fi
}

# in_toolchain [-b HOST_DIR:DIR | -r HOST_DIR:DIR]… CMD…: runs CMD in the sysroot, with directories of the host bound into it
# (-r: read-only), in namespaces that vanish with it.
in_toolchain() {
    local binds=() root=$TOOLCHAIN
    while [[ $1 == -[br] ]]; do
        binds+=("$1" "${2%%:*}" "${2#*:}")
        shift 2
    done
    # shellcheck disable=SC2016 # for the inner shell
    unshare "${NAMESPACE[@]}" /bin/sh -ec '
        root=$1; shift
        mount --bind "$root" "$root"
        mount --rbind /dev "$root/dev"
        mount --rbind /proc "$root/proc"
        mount -t tmpfs tmp "$root/tmp"
        while [ "$1" != -- ]; do
            mount --bind "$2" "$root$3"
            # Only a safety net: some mounts of the host cannot be made read-only by an ordinary user.
            [ "$1" = -b ] || mount -o remount,bind,ro "$root$3" 2>/dev/null || :
            shift 3
        done
        shift
        # The PATH of an ordinary user need not have chroot in it.
        PATH=$PATH:/usr/sbin:/sbin
        exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/tmp LC_ALL=C \
            KBUILD_BUILD_USER=pinion KBUILD_BUILD_HOST=pinion "KBUILD_BUILD_TIMESTAMP=1970-01-01" "$@"
    ' sh "$root" "${binds[@]}" -- "$@"
}
