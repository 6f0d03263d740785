# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# What goes into the guest: the module, the initramfs, the guest programs.

# --- The module ----------------------------------------------------------------------------------------------------

# ensure_module: builds guest-driver/ for KERNEL, sets MODULE to pinion.ko.
ensure_module() {
    local release
    [[ -e $REPO/guest-driver/Kbuild ]] || die "there is no module to build: $REPO/guest-driver/Kbuild is missing (--no-driver runs a guest without it)"
    release=$(<"$KERNEL/release")
    cache_entry module "$( (cd "$REPO" && module_sources | xargs -d '\n' sha256sum; kernel_identity; declare -f make_module module_make) | hash)" 100 \
        "building pinion.ko for $release" make_module
    MODULE=$ENTRY/pinion.ko
}

# kernel_identity: what tells this kernel from others. A tree of one's own is known by what came out of it.
kernel_identity() {
    echo "${KERNEL#"$CACHE"/}"
    [[ $KERNEL != */kernel-own/* ]] || cat "$KERNEL/bzImage" "$KERNEL/build/Module.symvers" | sha256sum
}

module_sources() {
    find guest-driver abi -path guest-driver/client -prune -o -path '*/target' -prune -o -type f ! -name '*.md' -print | LC_ALL=C sort
}

make_module() {
    local new=$1
    mkdir "$new/out"
    module_make "$new/out" modules
    cp "$new/out/pinion.ko" "$new/pinion.ko"
    remove_tree "$new/out"
}

# module_make OUT ARG…: runs make for the module, its products in OUT.
module_make() {
    local out=$1 args=()
    shift
    read -r -a args <<<"$KERNEL_MAKE"
    # Debian's kernel remembers its compiler by this name.
    if [[ $KERNEL_ORIGIN == debian ]]; then args+=(CC=x86_64-linux-gnu-gcc-14); fi
    in_toolchain -r "$KERNEL/linux:/pinion/linux" -r "$KERNEL/build:/pinion/build" -r "$REPO:/pinion/repo" -b "$out:/pinion/out" \
        make -C /pinion/build M=/pinion/repo/guest-driver MO=/pinion/out "${args[@]}" -j"$(nproc)" "$@"
}

# --- The initramfs -------------------------------------------------------------------------------------------------
# The guest unpacks several archives, one after the other: this one, which is the same for all runs, and one per run with the
# module, the programs and the command.

# ensure_initramfs: sets INITRAMFS to the archive, and BUSYBOX to a busybox that also runs on the host.
ensure_initramfs() {
    cache_entry initramfs "$( (basename "$TOOLCHAIN"; cat "$REPO/images/initramfs/init"; declare -f make_initramfs archive) | hash)" 20 \
        "building the initramfs" make_initramfs
    INITRAMFS=$ENTRY/base.cpio
    BUSYBOX=$ENTRY/busybox
}

make_initramfs() {
    local new=$1 applet
    cp "$TOOLCHAIN/usr/bin/busybox" "$new/busybox"
    BUSYBOX=$new/busybox
    mkdir -p "$new"/root/{bin,dev,proc,sys,tmp,root,run,etc,mnt,pinion}
    cp "$BUSYBOX" "$new/root/bin/busybox"
    for applet in $("$BUSYBOX" --list); do
        [[ $applet == busybox ]] || ln -s busybox "$new/root/bin/$applet"
    done
    ln -s bin "$new/root/sbin"
    install -m 755 "$REPO/images/initramfs/init" "$new/root/init"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$new/root/etc/passwd"
    echo 'nobody:x:65534:65534:nobody:/tmp:/bin/sh' >>"$new/root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$new/root/etc/group"
    archive "$new/root" "$new/base.cpio"
    remove_tree "$new/root"
}

# archive DIR FILE: a cpio archive of everything below DIR, owned by root.
archive() { (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | "$BUSYBOX" cpio -o -H newc -R 0:0 2>/dev/null) >"$2"; }

# --- Programs of the workspace -------------------------------------------------------------------------------------

# cargo_build TEXT ARG…: quiet when there is nothing to do; TEXT when there is, and the compiler's own words.
cargo_build() {
    local text=$1 color=()
    shift
    need_cargo
    [[ ! -t 2 || -n ${NO_COLOR:-}${CARGO_TERM_COLOR:-} ]] || color=(--color always)
    (cd "$REPO" && cargo build --release "${color[@]}" "$@" 2>&1 </dev/null | cargo_messages "$text") ||
        die "failed: $text (the compiler's messages are above)"
}

# cargo_messages TEXT: passes on what cargo says, but for its progress, whose first line becomes the stage TEXT.
cargo_messages() {
    local text=$1 line staged='' verb
    local progress=$'^(\e\\[[0-9;]*m)* *(\e\\[[0-9;]*m)*(Compiling|Checking|Building|Downloading|Downloaded|Updating|Locking|Adding|Fresh|Dirty|Running|Blocking|Waiting|Finished)(\e\\[[0-9;]*m)* '
    while IFS= read -r line; do
        if [[ ! $line =~ $progress ]]; then
            printf '%s\n' "$line" >&2
            continue
        fi
        verb=${BASH_REMATCH[3]}
        case $verb in
        Compiling | Download* | Updating)
            [[ -n $staged ]] || stage "$text"
            staged=yes
            ;;
        Blocking) stage "waiting for another cargo" ;;
        esac
    done
}

# ensure_device: builds the daemon, sets DEVICE to it.
ensure_device() {
    cargo_build "building pinion-device" -p pinion-device
    DEVICE=$(target_dir)/release/pinion-device
}

target_dir() { echo "${CARGO_TARGET_DIR:-$REPO/target}"; }

# ensure_programs: builds the guest programs and the client's examples, sets PROGRAMS to their paths. Static, as the guest has
# no libraries.
ensure_programs() {
    local target=x86_64-unknown-linux-gnu dir source name
    dir=$(target_dir)/guest
    PROGRAMS=()
    for source in "$REPO"/tests/src/bin/*.rs "$REPO"/tests/src/bin/*/main.rs; do
        [[ -e $source ]] || continue
        name=${source%/main.rs}
        name=$(basename "$name" .rs)
        PROGRAMS+=("$dir/$target/release/$name")
    done
    for source in "$REPO"/guest-driver/client/examples/*.rs; do
        PROGRAMS+=("$dir/$target/release/examples/$(basename "$source" .rs)")
    done
    CARGO_TARGET_DIR=$dir RUSTFLAGS="-C target-feature=+crt-static -C strip=debuginfo" \
        cargo_build "building the guest programs" -p pinion-tests --bins -p pinion-client --examples --target "$target"
}

# ensure_c_programs: builds the examples in C, adds their paths to PROGRAMS. Needs TOOLCHAIN.
ensure_c_programs() {
    local header=guest-driver/uapi/pinion.h source
    local -a sources=("$REPO"/guest-driver/client/examples/*.c)
    cache_entry c-programs "$( (basename "$TOOLCHAIN"; cat "$REPO/$header" "${sources[@]}"; declare -f make_c_programs) | hash)" 10 \
        "building the examples in C" make_c_programs "${sources[@]}"
    for source in "${sources[@]}"; do
        PROGRAMS+=("$ENTRY/$(basename "$source" .c)")
    done
}

# make_c_programs SOURCE… DIR: those whose name ends with 32 are for 32 bits, for which there is no C library.
make_c_programs() {
    local new=${*: -1} source name
    namespace_flags
    for source in "${@:1:$#-1}"; do
        name=$(basename "$source" .c)
        local flags=()
        if [[ $name == *32 ]]; then
            flags=(-m32 -ffreestanding -nostdlib -fno-pie -no-pie -isystem /usr/include/x86_64-linux-gnu)
        fi
        in_toolchain -r "$REPO:/pinion/repo" -b "$new:/pinion/out" \
            gcc -O2 -Wall -Wextra -Werror -static "${flags[@]}" -I /pinion/repo/guest-driver/uapi \
            -o "/pinion/out/$name" "/pinion/repo/guest-driver/client/examples/$name.c"
    done
}
