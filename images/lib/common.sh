# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# What every script of Pinion shares: messages, the cache, clean-up.
#
# The cache holds entries, KIND/KEY, where KEY is a hash of everything that went into the entry. An entry is built in a
# temporary directory beside its place and renamed into it when it is complete, so that an entry that exists can be trusted,
# whatever happened to the run that made it.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
readonly REPO

# Exit statuses. The ones of `qemu-scripts/run` are part of its interface: see its --help.
readonly STATUS_USAGE=109 STATUS_SETUP=110 STATUS_DEVICE=111 STATUS_PANIC=112 STATUS_TIMEOUT=113 STATUS_WARNING=114
readonly STATUS_QEMU=115 STATUS_DRIVER=116

PROGRAM=${0##*/}
START_SECONDS=$SECONDS
# The status that `die` ends with; a script that is past its set-up changes it.
DIE_STATUS=$STATUS_SETUP

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

die() {
    say "$@"
    exit "$DIE_STATUS"
}

# stage TEXT: says what takes time now, and how long everything has taken so far.
stage() {
    local t=$((SECONDS - START_SECONDS))
    printf '%s: [%d:%02d] %s\n' "$PROGRAM" $((t / 60)) $((t % 60)) "$*" >&2
}

[[ -n ${PINION_CACHE:-}${XDG_CACHE_HOME:-}${HOME:-} ]] || die "HOME is not set, and neither is PINION_CACHE"
CACHE=$(realpath -m -- "${PINION_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/pinion}")
readonly CACHE
# Mounts and library paths are lists with colons.
[[ $REPO != *:* ]] || die "there is a colon in the path of this repository, $REPO: move it to a path without one"
[[ $CACHE != *:* ]] || die "there is a colon in the path of the cache, $CACHE: PINION_CACHE=DIR puts it elsewhere"

# --- Clean-up ------------------------------------------------------------------------------------------------------
# One EXIT trap for all; whatever is registered last is undone first.

CLEANUP=()

run_cleanup() {
    EXIT_STATUS=$?
    local i
    trap '' INT TERM HUP
    for ((i = ${#CLEANUP[@]} - 1; i >= 0; i--)); do
        eval "${CLEANUP[i]}" || true
    done
    CLEANUP=()
}

on_exit() { CLEANUP+=("$1"); }

install_traps() {
    trap run_cleanup EXIT
    # `exit` runs the EXIT trap. The statuses are the customary 128 + signal.
    trap 'say interrupted; exit 130' INT
    trap 'say terminated; exit 143' TERM
    trap 'exit 129' HUP
}

# --- Small helpers -------------------------------------------------------------------------------------------------

# hash: the key made from standard input.
hash() { sha256sum | cut -c1-16; }

# hash_files PATH…: a line for each file below the paths, with its content's hash. Other names, other hash.
hash_files() { find "$@" -type f -print0 | LC_ALL=C sort -z | xargs -0 --no-run-if-empty sha256sum; }

# need_cargo: what builds the device and the guest programs.
need_cargo() {
    need_tool cargo "cargo (or see rustup)"
    need_tool cc gcc # cargo's linker
}

need_tool() {
    local tool=$1 package=$2
    command -v "$tool" >/dev/null || die "the program '$tool' is missing; install it: apt-get install $package"
}

# need_space MIB: refuses to start what would fill the disk.
need_space() {
    local need=$1 free
    free=$(df -Pm "$CACHE" | awk 'NR == 2 { print $4 }')
    ((free >= need)) ||
        die "not enough disk space in $CACHE: $free MiB free, $need MiB needed (PINION_CACHE=DIR puts the cache elsewhere)"
}

# --- The cache -----------------------------------------------------------------------------------------------------

init_cache() {
    [[ -z ${CACHE_READY:-} ]] || return 0
    local new=''
    [[ -e $CACHE ]] || new=yes
    mkdir -p "$CACHE/locks" "$CACHE/logs" 2>/dev/null || die "cannot create the cache directory $CACHE (PINION_CACHE=DIR puts it elsewhere)"
    [[ -w $CACHE/locks ]] || die "the cache directory $CACHE is not writable (PINION_CACHE=DIR puts it elsewhere)"
    # When root fills a user's cache, everything in it is to be the user's.
    if [[ $(id -u) == 0 ]]; then
        [[ -z $new || -z ${SUDO_UID:-} ]] || chown "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$CACHE"
        [[ $(stat -c %u "$CACHE") == 0 ]] || on_exit 'find "$CACHE" -maxdepth 2 -user root -exec chown -h --reference="$CACHE" {} +
            [[ ! -e $CACHE/ccache ]] || chown -hR --reference="$CACHE" "$CACHE/ccache"'
    fi
    CACHE_READY=yes
}

# with_lock NAME CMD…: runs CMD while no other run of ours holds the lock NAME.
with_lock() {
    local fd
    take_lock "$1"
    fd=$LOCK
    shift
    "$@"
    exec {fd}>&-
}

# take_lock NAME: sets LOCK to the file descriptor that holds the lock until it is closed.
take_lock() {
    local name=$1 fd
    exec {fd}>"$CACHE/locks/$name" || die "cannot write $CACHE/locks/$name"
    if ! flock -n "$fd"; then
        stage "waiting for another run that holds the lock '$name'"
        # In the background, as a trap does not run before a program in the foreground has ended.
        flock "$fd" &
        wait $!
    fi
    LOCK=$fd
}

# cache_entry KIND KEY MIB TEXT BUILDER ARG…: makes sure that the entry exists and sets ENTRY to its path.
# `BUILDER TEMP_DIR ARG…` runs in a subshell under `set -e`, its output goes to a log; TEXT is shown while it works.
# Never call this where `set -e` is off (in a condition, or on the left of `||`).
cache_entry() {
    local kind=$1 key=$2
    ENTRY=$CACHE/$kind/$key
    [[ ! -e $ENTRY ]] || return 0
    init_cache
    with_lock "$kind-$key" build_entry "$@"
}

build_entry() {
    local kind=$1 key=$2 mib=$3 text=$4 new log pid status=0
    shift 4
    [[ ! -e $ENTRY ]] || return 0 # made by the run that we have been waiting for
    # Were this called in a condition, a builder would go on after a failure, and the half-made entry would be trusted.
    (set -e; false; true) &
    if wait $!; then die "internal error: cache_entry was called where set -e is off"; fi
    need_space "$mib"
    case $kind in kernel-* | module | selftests) namespace_flags ;; esac # these work inside the toolchain's tree
    mkdir -p "$CACHE/$kind"
    # We hold the lock of this key, so what lies here was left by a run that was killed.
    remove_tree "$CACHE/$kind/.new-$key."*
    new=$CACHE/$kind/.new-$key.$$
    log=$CACHE/logs/$kind-$key.log
    mkdir "$new"
    stage "$text"
    # A process group of its own, so that an interrupt can end all of it.
    set -m
    (
        set +m -e
        trap - EXIT INT TERM HUP
        "$@" "$new"
    ) 3>&2 >"$log" 2>&1 </dev/null &
    pid=$!
    set +m
    on_exit "abandon_build $pid '$new'"
    wait "$pid" || status=$?
    unset 'CLEANUP[-1]'
    if ((status != 0)); then
        kill -KILL -- "-$pid" 2>/dev/null || true
        remove_tree "$new"
        explain_failure "$text" "$log" "$status"
        return 0 # which only happens with MAY_FAIL
    fi
    [[ $(id -u) != 0 || $(stat -c %u "$CACHE") == 0 ]] || chown -R --reference="$CACHE" "$new"
    # Somebody else's doing, past the lock: theirs is as good.
    if [[ -e $ENTRY ]]; then remove_tree "$new"; else mv -T "$new" "$ENTRY"; fi
}

abandon_build() {
    kill -KILL -- "-$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
    remove_tree "$2"
}

# explain_failure TEXT LOG STATUS: says why, and exits, unless MAY_FAIL is set.
explain_failure() {
    local text=$1 log=$2 status=$3 reason
    if reason=$(grep '^reason: ' "$log"); then # what a builder has to say itself
        say "failed: $text: ${reason#reason: } (log: $log)"
    elif grep -q -e 'No space left on device' -e 'Disk quota exceeded' "$log"; then
        say "the disk is full: '$text' ran out of space in $CACHE; nothing of it was kept (log: $log)"
    else
        say "failed: $text (status $status). The end of $log:"
        if grep -q -E "$COMPILER_ERROR" "$log"; then
            # What a compiler has to say first, with its context, and not only the trail of make.
            grep -m 12 -A 12 -E "$COMPILER_ERROR" "$log" | sed 's#/pinion/repo/##g' | head -n 120 >&2 || true
            echo '…' >&2
        fi
        tail -n 15 "$log" | sed 's#/pinion/repo/##g' >&2
    fi
    [[ -n ${MAY_FAIL:-} ]] || exit "$DIE_STATUS"
}

readonly COMPILER_ERROR='(^|[^a-z_])error(\[E[0-9]+\])?:'

# remove_tree PATH…: also removes directories without write permission.
remove_tree() {
    local path
    for path in "$@"; do
        [[ -e $path || -L $path ]] || continue
        rm -rf "$path" 2>/dev/null || {
            chmod -R u+rwX "$path" 2>/dev/null || true
            rm -rf "$path"
        }
    done
}

# remove_leftovers: what interrupted runs left behind, unless its lock says that somebody is still at it.
remove_leftovers() {
    local left name fd
    for left in "$CACHE"/*/.new-*; do
        [[ -e $left ]] || continue
        name=${left##*/.new-}
        name=$(basename "$(dirname "$left")")-${name%.*}
        exec {fd}>"$CACHE/locks/$name" || continue
        if flock -n "$fd"; then
            remove_tree "$left"
        fi
        exec {fd}>&-
    done
}
