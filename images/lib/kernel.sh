# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# Kernels. Each is described by images/kernel/NAME.conf; this file only knows the two ways to get one: from source, with
# patches and configuration fragments, or as Debian built it.
#
# An entry kernel-NAME/KEY holds: bzImage, config, release, linux/ (the source) and build/ (what modules are built against).

readonly KERNEL_DIR=$REPO/images/kernel
# How large the compiler's cache may become; a kernel takes about a tenth of it.
readonly CCACHE_SIZE=1Gi

kernel_names() {
    local conf
    for conf in "$KERNEL_DIR"/*.conf; do
        basename "$conf" .conf
    done
}

# read_kernel NAME: sets KERNEL_DESCRIPTION, KERNEL_ORIGIN (source or debian), KERNEL_PATCHES (yes or no), KERNEL_FRAGMENTS,
# KERNEL_MAKE (arguments for make, for the kernel and for modules), KERNEL_APPEND (for its command line).
read_kernel() {
    if [[ -z $1 || $1 == */* || ! -r $KERNEL_DIR/$1.conf ]]; then
        DIE_STATUS=$STATUS_USAGE
        die "there is no kernel '$1'; known: $(kernel_names | paste -sd ' ')"
    fi
    KERNEL_DESCRIPTION='' KERNEL_ORIGIN='' KERNEL_PATCHES=no KERNEL_FRAGMENTS='' KERNEL_MAKE='' KERNEL_APPEND=''
    # shellcheck source=/dev/null
    source "$KERNEL_DIR/$1.conf"
}

# ensure_kernel NAME: sets KERNEL to the entry. With HOLD_KERNEL set, no other run changes the entry until release_kernel.
ensure_kernel() {
    local name=$1
    release_kernel
    read_kernel "$name"
    ensure_toolchain
    if [[ -n ${KERNEL_SRC:-} && $KERNEL_ORIGIN == source ]]; then
        ensure_own_kernel "$name"
    elif [[ $KERNEL_ORIGIN == source ]]; then
        ensure_built_kernel "$name"
    else
        ensure_debian_kernel "$name"
    fi
    KERNEL=$ENTRY
}

KERNEL_LOCK=''

release_kernel() {
    [[ -n $KERNEL_LOCK ]] || return 0
    exec {KERNEL_LOCK}>&-
    KERNEL_LOCK=''
}

# ensure_source SET: sets SOURCE to the unpacked kernel source.
ensure_source() {
    cache_entry source "$(package_key "$1")" 2600 "unpacking the kernel source" make_source "$RESOLVED/$1.uris"
    SOURCE=$ENTRY
}

make_source() {
    local uris=$1 new=$2
    unpack_packages "$uris" "$new/package"
    tar -C "$new" --strip-components=1 --no-same-owner -xf "$new"/package/usr/src/linux-source-*.tar.xz
    remove_tree "$new/package"
    test -e "$new/mm/migrate_device.c"
}

# ensure_previous_source: sets PREVIOUS to the files of the kernel before the newest that our patches touch.
ensure_previous_source() {
    cache_entry previous "$( (package_key previous; patched_files) | hash)" 600 "unpacking parts of the kernel source before the newest" \
        make_previous_source "$RESOLVED/previous.uris"
    PREVIOUS=$ENTRY
}

make_previous_source() {
    local uris=$1 new=$2 files
    unpack_packages "$uris" "$new/package"
    mapfile -t files < <(patched_files | sed 's#^#*/#')
    tar -C "$new" --strip-components=1 --no-same-owner --wildcards -xf "$new"/package/usr/src/linux-source-*.tar.xz "${files[@]}"
    remove_tree "$new/package"
}

patched_files() { patches | xargs -d '\n' sed -n 's#^--- a/##p' | LC_ALL=C sort -u; }

# --- From source ---------------------------------------------------------------------------------------------------

kernel_inputs() {
    local fragment
    for fragment in $KERNEL_FRAGMENTS; do
        cat "$KERNEL_DIR/config/$fragment.config"
    done
    [[ $KERNEL_PATCHES == no ]] || kernel_patches | patch_changes
    [[ -z $KERNEL_MAKE ]] || echo "$KERNEL_MAKE"
    declare -f make_kernel configure_kernel
}

patches() { find "$KERNEL_DIR/patches" -name '*.patch' 2>/dev/null | LC_ALL=C sort; }

# kernel_patches: those of the patches from which a kernel comes out another. The rest is documentation and tests.
kernel_patches() {
    local patch
    patches | while read -r patch; do
        ! sed -n -E 's#^(---|\+\+\+) [ab]/##p' "$patch" | grep -q -v -E '^(Documentation|tools/testing)/' || echo "$patch"
    done
}

# patch_changes: what the patches named on standard input change, without what they say about it.
patch_changes() { xargs --no-run-if-empty -d '\n' sed -s -n '/^diff --git/,$ { /^index /!p }'; }

# apply_patches DIR: applies the patches named on standard input to the source in DIR.
apply_patches() {
    local dir=$1 patch
    while read -r patch; do
        echo "== $patch"
        in_toolchain -b "$dir:/pinion/linux" -r "$KERNEL_DIR:/pinion/repo" \
            patch -d /pinion/linux -p1 --no-backup-if-mismatch -i "/pinion/repo/patches/${patch##*/}" </dev/null
    done
}

ensure_built_kernel() {
    local name=$1 key
    key=$( (package_key source; basename "$TOOLCHAIN"; kernel_inputs) | hash)
    [[ -e $CACHE/kernel-$name/$key ]] || ensure_source source
    cache_entry "kernel-$name" "$key" 1800 \
        "building kernel '$name' (the longest step: 5 to 10 minutes on two cores)" make_kernel "${SOURCE:-}"
}

make_kernel() {
    local source=$1 new=$2
    # Hard links: patch(1) writes a new file and renames it, so the files that it changes are not shared any more.
    cp -al "$source" "$new/linux"
    mkdir "$new/build"
    [[ $KERNEL_PATCHES == no ]] || kernel_patches | apply_patches "$new/linux"
    build_kernel_in "$new/linux" "$new/build" tinyconfig
    collect_kernel "$new"
}

# build_kernel_in SOURCE BUILD BASE: configures and builds.
build_kernel_in() {
    local source=$1 build=$2 base=$3
    configure_kernel "$source" "$build" "$base"
    kernel_make "$source" "$build" -j"$(nproc)" bzImage modules
}

# kernel_make SOURCE BUILD ARG…: runs make for the kernel. All kernels share a cache of compiled C files, so that a change of
# a few files costs the compilation of these and not of the whole kernel. It is the cache's own; losing it only costs time.
kernel_make() {
    local source=$1 build=$2 args=()
    shift 2
    read -r -a args <<<"$KERNEL_MAKE"
    mkdir -p "$CACHE/ccache"
    # The toolchain's key says what the compiler is, all of its parts included.
    in_toolchain -r "$source:/pinion/linux" -b "$build:/pinion/build" -b "$CACHE/ccache:/pinion/ccache" \
        PATH=/usr/lib/ccache:/usr/sbin:/usr/bin CCACHE_DIR=/pinion/ccache CCACHE_MAXSIZE="$CCACHE_SIZE" \
        CCACHE_COMPILERCHECK="string:$(basename "$TOOLCHAIN")" make -C /pinion/linux O=/pinion/build "${args[@]}" "$@"
}

# configure_kernel SOURCE BUILD BASE: the base configuration plus the fragments; fails when an option came out differently.
configure_kernel() {
    local source=$1 build=$2 base=$3 fragment line option wrong=''
    kernel_make "$source" "$build" "$base"
    for fragment in $KERNEL_FRAGMENTS; do
        cat "$KERNEL_DIR/config/$fragment.config"
    done >"$build/fragment"
    cat "$build/fragment" >>"$build/.config"
    kernel_make "$source" "$build" olddefconfig
    while read -r line; do
        case $line in
        CONFIG_*=n) option=${line%=n} ;;
        CONFIG_*=*) option='' ;;
        '# CONFIG_'*' is not set') option=${line#\# } option=${option% is not set} ;;
        *) continue ;;
        esac
        if [[ -n $option ]]; then
            ! grep -q "^$option=" "$build/.config" || wrong+=" $option (asked for: not set)"
        else
            grep -q -x -F "$line" "$build/.config" || wrong+=" $line"
        fi
        # A later fragment may overrule an earlier one.
    done < <(awk -F'[= ]' '/^CONFIG_/ { last[$1] = $0 } /^# CONFIG_.* is not set/ { last[$2] = $0 } END { for (o in last) print last[o] }' "$build/fragment")
    if [[ -n $wrong ]]; then
        echo "reason: the kernel configuration did not come out as asked for:$wrong"
        return 1
    fi
}

collect_kernel() {
    local dir=$1
    cp "$dir/build/arch/x86/boot/bzImage" "$dir/bzImage"
    cp "$dir/build/.config" "$dir/config"
    cp "$dir/build/include/config/kernel.release" "$dir/release"
    # Modules are not built from the kernel's objects; without them the entry is half as large.
    find "$dir/build" \( -path "$dir/build/scripts" -o -path "$dir/build/tools" \) -prune -o \
        \( -name '*.o' -o -name '*.a' -o -name 'vmlinux*' -o -name '.*.cmd' \) -type f ! -name vmlinux.symvers -exec rm -f {} +
}

# --- A tree of one's own -------------------------------------------------------------------------------------------
# KERNEL_SRC=DIR: built out of tree, the tree is not touched and not patched. It may change under us, so make decides each
# time what there is to do, and the entry is not addressed by content. So another run may replace what is in it: who boots the
# kernel holds the entry's lock until the module is built and the kernel's image copied.

ensure_own_kernel() {
    local name=$1 key
    [[ -f $KERNEL_SRC/Kbuild && -d $KERNEL_SRC/rust ]] || die "KERNEL_SRC=$KERNEL_SRC is not a Linux source tree with Rust support"
    KERNEL_SRC=$(readlink -f "$KERNEL_SRC")
    [[ $KERNEL_SRC != *:* ]] || die "there is a colon in the path KERNEL_SRC=$KERNEL_SRC: move the tree to a path without one"
    namespace_flags
    init_cache
    key=$( (echo "$name $KERNEL_SRC"; basename "$TOOLCHAIN"; KERNEL_PATCHES=no kernel_inputs) | hash)
    ENTRY=$CACHE/kernel-own/$key
    take_lock "kernel-own-$key"
    KERNEL_LOCK=$LOCK
    build_own_kernel "$key"
    [[ -n ${HOLD_KERNEL:-} ]] || release_kernel
}

build_own_kernel() {
    local key=$1 log=$CACHE/logs/kernel-own-$1.log status=0 pid
    need_space 1800
    mkdir -p "$ENTRY/build"
    [[ -e $ENTRY/linux ]] || ln -s "$KERNEL_SRC" "$ENTRY/linux"
    stage "building the kernel of $KERNEL_SRC"
    set -m
    (
        set +m -e
        trap - EXIT INT TERM HUP
        if [[ -e $ENTRY/configured ]]; then
            kernel_make "$KERNEL_SRC" "$ENTRY/build" -j"$(nproc)" bzImage modules
        else
            build_kernel_in "$KERNEL_SRC" "$ENTRY/build" tinyconfig
            touch "$ENTRY/configured"
        fi
        cp "$ENTRY/build/.config" "$ENTRY/config"
        cp "$ENTRY/build/include/config/kernel.release" "$ENTRY/release"
        cp "$ENTRY/build/arch/x86/boot/bzImage" "$ENTRY/.bzImage.new"
        mv -f "$ENTRY/.bzImage.new" "$ENTRY/bzImage"
    ) >"$log" 2>&1 </dev/null &
    pid=$!
    set +m
    on_exit "kill -KILL -- -$pid 2>/dev/null"
    wait "$pid" || status=$?
    unset 'CLEANUP[-1]'
    ((status == 0)) || explain_failure "building the kernel of $KERNEL_SRC" "$log" "$status"
}

# --- As Debian built it --------------------------------------------------------------------------------------------

ensure_debian_kernel() {
    local name=$1 key
    key=$( (package_key debian; package_key debian-source; basename "$TOOLCHAIN"; declare -f make_debian_kernel debian_make) | hash)
    [[ -e $CACHE/kernel-$name/$key ]] || ensure_source debian-source
    cache_entry "kernel-$name" "$key" 1800 \
        "preparing Debian's kernel $(<"$RESOLVED/debian.release")" make_debian_kernel "${SOURCE:-}" "$RESOLVED/debian.uris" "$(<"$RESOLVED/debian.release")"
}

# The kernel itself is Debian's. Its header packages lack the metadata of the kernel crate, which a module in Rust needs, so
# that is made again: the same source, the same configuration to the letter, the same compilers give the same symbol hashes.
make_debian_kernel() {
    local source=$1 uris=$2 release=$3 new=$4 headers vmlinuz
    unpack_packages "$uris" "$new/package"
    headers=$new/package/usr/src/linux-headers-$release
    vmlinuz=$new/package/usr/lib/modules/$release/vmlinuz
    [[ -e $vmlinuz ]] || vmlinuz=$new/package/boot/vmlinuz-$release # where it was before 7.1
    cp "$vmlinuz" "$new/bzImage"
    cp -al "$source" "$new/linux"
    mkdir "$new/build"
    cp "$headers/.config" "$new/build/.config"
    debian_make "$new" "$release" olddefconfig
    # One option off, and struct module has another size.
    if ! diff <(grep '^CONFIG' "$headers/.config") <(grep '^CONFIG' "$new/build/.config"); then
        echo "reason: the toolchain changes Debian's configuration, a module would not load"
        return 1
    fi
    debian_make "$new" "$release" -j"$(nproc)" modules_prepare
    cp "$headers/Module.symvers" "$new/build/Module.symvers"
    cp "$new/build/.config" "$new/config"
    echo "$release" >"$new/release"
    remove_tree "$new/package"
}

debian_make() {
    local dir=$1 release=$2
    shift 2
    kernel_make "$dir/linux" "$dir/build" CC=x86_64-linux-gnu-gcc-14 KERNELRELEASE="$release" "$@"
}
