# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# The kernel's own tests of mm/, built from the source of the kernel that they are to run on, with all of our patches where
# that kernel has them. An entry selftests/KEY holds the programs, linked statically, and nothing of the source.

# What is built: programs of tools/testing/selftests/mm that need no library but the C library. A line of theirs in a
# guest: `qemu-scripts/run --selftests -- hmm-tests`.
readonly SELFTESTS_MM="hmm-tests"

# ensure_selftests: sets SELFTESTS to a directory with the programs for KERNEL.
ensure_selftests() {
    local set=source tree='' patched=$KERNEL_PATCHES key
    [[ $KERNEL_ORIGIN != debian ]] || set=debian-source
    key=$(package_key "$set")
    if [[ $KERNEL == */kernel-own/* ]]; then
        tree=$KERNEL_SRC patched=no
        key=$(cd "$tree" && hash_files tools/testing/selftests/mm tools/testing/selftests/*.h tools/include include/uapi \
            arch/x86/include/uapi lib/test_hmm_uapi.h mm/gup_test.h | hash)
    fi
    key=$( (echo "$key" "$SELFTESTS_MM"; basename "$TOOLCHAIN"; [[ $patched == no ]] || patches | patch_changes
        declare -f make_selftests apply_patches) | hash)
    if [[ -z $tree && ! -e $CACHE/selftests/$key ]]; then
        ensure_source "$set"
        tree=$SOURCE
    fi
    cache_entry selftests "$key" 300 "building the kernel's own tests" make_selftests "$tree" "$patched"
    SELFTESTS=$ENTRY
}

make_selftests() {
    local tree=$1 patched=$2 new=$3 name
    if [[ $patched == yes ]]; then
        cp -al "$tree" "$new/linux"
        tree=$new/linux
        patches | apply_patches "$tree"
    fi
    mkdir "$new/build"
    in_toolchain -r "$tree:/pinion/linux" -b "$new/build:/pinion/build" make -C /pinion/linux O=/pinion/build -j"$(nproc)" headers
    # As their Makefile builds them, which can only build all or nothing, with more libraries than these need.
    for name in $SELFTESTS_MM; do
        in_toolchain -r "$tree:/pinion/linux" -r "$new/build:/pinion/build" -b "$new:/pinion/out" \
            sh -c 'cd /pinion/linux/tools/testing/selftests/mm && gcc -static -O2 -Wall -U_FORTIFY_SOURCE -D_GNU_SOURCE= \
                -I /pinion/linux -I .. -isystem /pinion/build/usr/include -isystem /pinion/linux/tools/include/uapi \
                "$1.c" vm_util.c hugepage_settings.c -o "/pinion/out/$1" -lrt -lpthread -lm' sh "$name"
    done
    remove_tree "$new/build" "$new/linux"
}
