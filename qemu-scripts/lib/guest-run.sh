# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash disable=SC2153 # the options are set by the script that includes this
#
# One run of a guest, from the devices' start to the verdict. Used by qemu-scripts/run only.

# --- The directory of this run -------------------------------------------------------------------------------------

make_run_dir() {
    RUN_DIR=$(mktemp -d "${TMPDIR:-/tmp}/pinion.XXXXXX" 2>/dev/null) ||
        die "cannot write a directory in ${TMPDIR:-/tmp} (TMPDIR=DIR puts it elsewhere)"
    on_exit 'remove_tree "$RUN_DIR"'
}

# in_run_dir WHAT CMD…: runs CMD, which writes files into RUN_DIR. What it has to say is an error's reason.
in_run_dir() {
    local what=$1 messages status=0
    shift
    # Called in a condition, CMD would go on after a failure.
    set +e
    messages=$(set -e; export LC_ALL=C; "$@" 2>&1)
    status=$?
    set -e
    ((status != 0)) || return 0
    if grep -q -E 'No space left on device|Disk quota exceeded' <<<"$messages"; then
        die "cannot write $what to $RUN_DIR: no space left there (TMPDIR=DIR puts it elsewhere)"
    fi
    die "cannot write $what to $RUN_DIR: $(head -n 1 <<<"$messages")"
}

# take_kernel_image: sets KERNEL_IMAGE to what this run boots.
take_kernel_image() {
    KERNEL_IMAGE=$KERNEL/bzImage
    [[ -n $KERNEL_LOCK ]] || return 0
    # Another run may build this kernel anew.
    KERNEL_IMAGE=$RUN_DIR/bzImage
    in_run_dir "the kernel" cp "$KERNEL/bzImage" "$KERNEL_IMAGE"
    release_kernel
}

# check_exit: when a command of ours has failed for which nobody was prepared, its status must not pass for that of CMD.
check_exit() {
    [[ -z ${JUDGED:-} ]] || return 0
    case $EXIT_STATUS in
    0 | 109 | 11[0-6] | 129 | 130 | 143) ;;
    *)
        say "failed, with status $EXIT_STATUS, before there was a result (is the disk full?)"
        exit "$DIE_STATUS"
        ;;
    esac
}

# --- The second archive: what is particular to this run ------------------------------------------------------------

pack_job() { in_run_dir "the guest's files" pack_files; }

pack_files() {
    local root=$RUN_DIR/root program
    mkdir -p "$root/pinion" "$root/bin" "$root/root"
    [[ $DRIVER == no ]] || cp "$MODULE" "$root/pinion/pinion.ko"
    for program in "${PROGRAMS[@]}"; do
        cp "$program" "$root/bin/"
    done
    add_files "$root"
    write_settings >"$root/pinion/settings"
    write_command >"$root/pinion/command"
    chmod 755 "$root/pinion/command"
    # As `archive` does it, but with cpio's word on what went wrong.
    (cd "$root" && find . -mindepth 1 | LC_ALL=C sort | "$BUSYBOX" cpio -o -H newc -R 0:0) >"$RUN_DIR/job.cpio"
    cat "$INITRAMFS" "$RUN_DIR/job.cpio" >"$RUN_DIR/initrd"
    remove_tree "$root" "$RUN_DIR/job.cpio"
}

add_files() {
    local root=$1 i
    for i in "${!ADD_HOST[@]}"; do
        mkdir -p "$(dirname "$root${ADD_GUEST[i]}")"
        cp -aL "${ADD_HOST[i]}" "$root${ADD_GUEST[i]}"
    done
}

quote() {
    local word
    for word in "$@"; do
        printf " '%s'" "${word//\'/\'\\\'\'}"
    done
}

write_settings() {
    local size=''
    [[ $SHELL_WANTED == no ]] || size=$(stty size 2>/dev/null || true)
    echo "driver=$DRIVER devices=$DEVICES shell=$SHELL_WANTED driver_options=$(quote "${DRIVER_OPTIONS[*]}")" | sed "s/= '/='/"
    if [[ $size == *\ * ]]; then echo "rows=${size% *} columns=${size#* }"; fi
}

# The command as a script, every word quoted: what the guest runs is what was given here, to the letter.
write_command() {
    echo '#!/bin/sh'
    if [[ $SHELL_WANTED == no ]]; then
        echo "exec$(quote "${COMMAND[@]}")"
    else
        ((${#COMMAND[@]} == 0)) || quote "${COMMAND[@]}"
        printf '\nexec /bin/sh -i\n'
    fi
}

# --- Devices -------------------------------------------------------------------------------------------------------

DEVICE_PIDS=()

device_command() { # SOCKET
    local command=("$DEVICE" --socket-path "$1")
    command+=(--rings "$RINGS")
    command+=("${DEVICE_OPTIONS[@]}")
    printf '%s\0' "${command[@]}"
}

start_devices() {
    local i command
    DIE_STATUS=$STATUS_DEVICE
    for ((i = 0; i < DEVICES; i++)); do
        mapfile -d '' -t command < <(device_command "$RUN_DIR/gpu$i")
        start "${command[@]}" >"$RUN_DIR/device$i.log" 2>&1
        DEVICE_PIDS+=("$STARTED")
    done
    for ((i = 0; i < DEVICES; i++)); do
        wait_for_socket "$RUN_DIR/gpu$i" "${DEVICE_PIDS[i]}" "$RUN_DIR/device$i.log"
    done
}

# start CMD…: in the background, with its pid in STARTED; it does not outlive us, however we end.
start() {
    setpriv --pdeathsig KILL -- "$@" </dev/null &
    STARTED=$!
    on_exit "stop $STARTED"
}

stop() {
    kill -TERM "$1" 2>/dev/null || return 0
    local i
    for ((i = 0; i < 250; i++)); do
        ! has_ended "$1" || break
        sleep 0.02
    done
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

# wait_for_socket PATH PID LOG: until PID listens on PATH (and not only until the file is there), for at most 10 s.
wait_for_socket() {
    local path=$1 pid=$2 log=$3 i
    for ((i = 0; i < 500; i++)); do
        grep -q "^[0-9a-f]*: [0-9A-F]* [0-9A-F]* 00010000 .* $path\$" /proc/net/unix && return 0
        if ! kill -0 "$pid" 2>/dev/null; then
            sed 's/^/  pinion-device: /' "$log" >&2
            die "pinion-device ended before it listened on its socket $path"
        fi
        sleep 0.02
    done
    sed 's/^/  pinion-device: /' "$log" >&2
    die "waited 10 s in vain for pinion-device to listen on $path"
}

# --- QEMU ----------------------------------------------------------------------------------------------------------

# machine_args SOCKET_PREFIX: sets MACHINE_ARGS, what a QEMU needs for our GPU and nothing else.
machine_args() {
    local i accel
    accel=$(accelerator)
    MACHINE_ARGS=(-M q35 -accel "$accel" -cpu max -smp "$CPUS" -m "$MEMORY"
        # The device works in the guest's memory, so that must be memory which can be shared.
        -object "memory-backend-memfd,id=mem,size=$MEMORY,share=on" -numa node,memdev=mem)
    for ((i = 0; i < DEVICES; i++)); do
        MACHINE_ARGS+=(-chardev "socket,id=gpu$i,path=$1$i"
            -device "$DEVICE_MODEL,chardev=gpu$i,virtio-id=37,num_vqs=$((3 + RINGS)),vq_size=128,config_size=64")
    done
}

print_command() {
    local i command prefix=/tmp/pinion-gpu
    DEVICE=$(target_dir)/release/pinion-device
    [[ -x $DEVICE || $DEVICES == 0 ]] || say "note: $DEVICE is not there yet: cargo build --release -p pinion-device"
    machine_args "$prefix"
    for ((i = 0; i < DEVICES; i++)); do
        mapfile -d '' -t command < <(device_command "$prefix$i")
        echo "$(plain "${command[@]}") &"
    done
    plain "${PINION_QEMU:-qemu-system-x86_64}" "${MACHINE_ARGS[@]}" | sed 's/ -\(object\|chardev\|device\)/ \\\n    -\1/g'
    echo
}

# plain WORD…: quoted for a shell, but only where that is needed.
plain() {
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./,=:+@%-]+$ ]] || word=$(quote "$word") word=${word# }
        line+=" $word"
    done
    printf '%s' "${line# }"
}

start_qemu() {
    local args=() name i
    DIE_STATUS=$STATUS_QEMU
    machine_args "$RUN_DIR/gpu"
    args=("${MACHINE_ARGS[@]}" -nodefaults -no-user-config -display none -no-reboot
        -kernel "$KERNEL_IMAGE" -initrd "$RUN_DIR/initrd"
        # panic=-1 with -no-reboot: a panic ends QEMU at once.
        -append "console=ttyS0 loglevel=5 panic=-1 oops=panic log_buf_len=4M no_timer_check $KERNEL_APPEND $APPEND"
        -chardev "file,id=console,path=$RUN_DIR/console" -serial chardev:console)
    for i in "${!DISKS[@]}"; do
        in_run_dir "the guest's disk" truncate -s "${DISKS[i]}" "$RUN_DIR/disk$i"
        args+=(-drive "file=$RUN_DIR/disk$i,format=raw,cache=unsafe,if=none,id=disk$i" -device "nvme,drive=disk$i,serial=disk$i")
    done
    if [[ $SHELL_WANTED == yes ]]; then
        args+=(-chardev stdio,id=shell,mux=on,signal=off -serial chardev:shell -mon chardev=shell)
    fi
    args+=(-device virtio-serial-pci,max_ports=6)
    for name in stdout stderr; do
        mkfifo "$RUN_DIR/$name"
    done
    for name in stdout stderr status log; do
        args+=(-chardev "file,id=$name,path=$RUN_DIR/$name" -device "virtserialport,chardev=$name,name=$name")
    done
    # QEMU writes into pipes, as it would truncate a file and make a terminal non-blocking.
    cat "$RUN_DIR/stdout" &
    OUTPUT_PIDS=($!)
    cat "$RUN_DIR/stderr" >&2 &
    OUTPUT_PIDS+=($!)
    if [[ $SHELL_WANTED == yes ]]; then
        # In the foreground, where it may read the terminal.
        setpriv --pdeathsig KILL -- "${QEMU[@]}" "${args[@]}" <&0 2>"$RUN_DIR/qemu.log" &
        QEMU_PID=$!
        on_exit "stop $QEMU_PID; stty sane 2>/dev/null"
    else
        start "${QEMU[@]}" "${args[@]}" >"$RUN_DIR/qemu.log" 2>&1
        QEMU_PID=$STARTED
    fi
}

# has_ended PID: whether the process is gone, or waits to be waited for.
has_ended() { [[ ! -e /proc/$1/stat || $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) != [!ZX]* ]]; }

# wait_for_end: until QEMU is gone, which it is when the guest ends, when the time is up, or when a device fails.
wait_for_end() {
    local timer pid status
    QEMU_STATUS='' TIMED_OUT='' FAILED_DEVICE=''
    start sleep "$TIMEOUT"
    timer=$STARTED
    local waiting=("$QEMU_PID" "$timer" "${DEVICE_PIDS[@]}")
    while [[ -z $QEMU_STATUS ]]; do
        status=0
        wait -n -p pid "${waiting[@]}" 2>/dev/null || status=$?
        case $pid in
        "$QEMU_PID") QEMU_STATUS=$status ;;
        "$timer")
            TIMED_OUT=yes
            stop "$QEMU_PID"
            QEMU_STATUS=0
            ;;
        *)
            # A device may end when QEMU hangs up, and we may hear of that before we hear of QEMU's own end.
            if [[ $DEVICE_MAY_END == no ]] && ! has_ended "$QEMU_PID"; then
                for FAILED_DEVICE in "${!DEVICE_PIDS[@]}"; do
                    [[ ${DEVICE_PIDS[FAILED_DEVICE]} != "$pid" ]] || break
                done
                FAILED_STATUS=$status
                stop "$QEMU_PID"
                QEMU_STATUS=0
            fi
            mapfile -t waiting < <(printf '%s\n' "${waiting[@]}" | grep -v -x "$pid")
            ;;
        esac
    done
    stop "$timer"
    for pid in "${DEVICE_PIDS[@]}"; do
        stop "$pid"
    done
    # Had QEMU not opened the pipes, their readers would wait for ever: this opens and closes them.
    : 1<>"$RUN_DIR/stdout" 2<>"$RUN_DIR/stderr"
    wait "${OUTPUT_PIDS[@]}" 2>/dev/null || true
}

# --- The verdict ---------------------------------------------------------------------------------------------------

# What the kernel says only when something is wrong.
readonly SPLAT='WARNING: |BUG: |\bOops|Kernel panic|Call Trace:|KASAN|KCSAN|UBSAN|INFO: (task|possible|inconsistent|suspicious|trying|rcu)|rcu: INFO|possible (circular|recursive|irq)|kmemleak: [0-9]+ new|general protection fault|soft lockup|hard LOCKUP|refcount_t: |list_(add|del) corruption|Bad page (state|map)|page_table_check|nobody cared|Unable to handle|Invalid relocation'

# without_oom FILE: the log, without what the kernel says when it kills a process for want of memory, if that is fine. What begins
# like that and has no end stays.
without_oom() {
    [[ $OOM_IS_FINE == yes ]] || { cat "$1"; return; }
    awk '/ invoked oom-killer: / { held = 1; text = "" }
        !held { print; next }
        { text = text $0 "\n" }
        / Killed process / { held = 0 }
        END { if (held) printf "%s", text }' "$1"
}

# has_splat FILE: whether there is a warning in the log.
has_splat() { grep -q -E "$SPLAT" < <(without_oom "$1"); }

# judge: says what went wrong, and exits with the status that --help promises.
judge() {
    local status=0 outcome='' line log=$RUN_DIR/log driver='' ended=''
    # The console has the warnings, even when the guest has emptied its log since (dmesg -C).
    if [[ ! -s $log ]] || { ! has_splat "$log" && has_splat "$RUN_DIR/console"; }; then
        log=$RUN_DIR/console
    fi
    while read -r line; do
        case $line in
        'exit '*) outcome=${line#exit } ;;
        'driver loaded' | 'driver unloaded') ;;
        'driver '*) driver=${line#driver } ;;
        end) ended=yes ;;
        esac
    done < <(cat "$RUN_DIR/status" 2>/dev/null)
    [[ -z $LOG_FILE ]] || cat "$log" >"$LOG_FILE" || say "cannot write the guest's log to $LOG_FILE"
    JUDGED=yes

    if [[ -n $TIMED_OUT ]]; then
        status=$STATUS_TIMEOUT
        say "time-out: the guest was not done after $TIMEOUT s"
    elif grep -q 'Kernel panic' "$RUN_DIR/console" 2>/dev/null; then
        status=$STATUS_PANIC
        say "the guest's kernel panicked: $(grep -m 1 -o 'Kernel panic.*' "$RUN_DIR/console")"
    elif [[ -n $FAILED_DEVICE ]]; then
        status=$STATUS_DEVICE
        say "pinion-device (GPU $FAILED_DEVICE) ended with status $FAILED_STATUS while the guest was running"
    elif ((QEMU_STATUS != 0)); then
        status=$STATUS_QEMU
        say "QEMU failed with status $QEMU_STATUS"
    elif [[ -z $ended ]]; then
        status=$STATUS_PANIC
        say "the guest went off before the command had ended"
    elif has_splat "$log"; then
        status=$STATUS_WARNING
        say "the guest's log holds a warning (the command's status was ${outcome:-none})"
    elif [[ -n $driver ]]; then
        status=$STATUS_DRIVER
        say "the driver pinion.ko was $driver"
    fi
    if ((status == 0)); then
        show_log "pinion-device" "$RUN_DIR"/device*.log
        exit "${outcome:-$STATUS_PANIC}"
    fi
    [[ -z $driver || $status == "$STATUS_DRIVER" ]] || say "the driver pinion.ko was $driver"
    show_log QEMU "$RUN_DIR/qemu.log"
    show_log pinion-device "$RUN_DIR"/device*.log
    show_guest_log "$log"
    exit "$status"
}

# show_log NAME FILE…: whatever these said, which is nothing when all is well.
show_log() {
    local name=$1 file
    shift
    for file in "$@"; do
        [[ ! -s $file ]] || tail -n 20 "$file" | sed "s/^/  $name: /" >&2
    done
}

show_guest_log() {
    local first
    if [[ ! -s $1 ]]; then
        say "the guest's log is empty"
    elif first=$(grep -n -m 1 -E "$SPLAT" < <(without_oom "$1")); then
        first=${first%%:*}
        say "the guest's log from the first warning on:"
        without_oom "$1" | tail -n "+$((first > 3 ? first - 3 : 1))" | head -n 60 | tr -d '\r' | sed 's/^/  guest: /' >&2
    else
        say "the end of the guest's log:"
        tail -n 25 "$1" | tr -d '\r' | sed 's/^/  guest: /' >&2
    fi
}
