# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# The kernel's hmm-tests on Pinion: one result for each of them. Used by qemu-scripts/test only, whose counters this adds to.

# What a guest takes for them: two GPUs, each with VRAM that the CPU sees and VRAM that it does not see. The benchmark among the tests moves 256 MiB
# to either at once.
readonly HMM_GUEST=(--selftests --devices 2 --memory 3G --device-option --vram=1G --device-option --aperture=512M --timeout 900)

# hmm_tests NAME PASSES SKIPS OPTION…: runs them in a guest, where that many are to pass and to be skipped.
hmm_tests() {
    local name=$1 passes=$2 skips=$3 out=$WORK/hmm-tests.out err=$WORK/hmm-tests.err status=0
    local line lines test passed=0 skipped=0 failures=0
    shift 3
    stage "$name"
    "$REPO/qemu-scripts/run" "${HMM_GUEST[@]}" "$@" -- hmm-tests >"$out" 2>"$err" || status=$?
    mapfile -t lines <"$out"
    for line in "${lines[@]}"; do
        if [[ $line =~ ^ok\ [0-9]+\ ([^ ]+)(\ #\ SKIP(.*))?$ ]]; then
            test="$name: ${BASH_REMATCH[1]}"
            if [[ -n ${BASH_REMATCH[2]} ]]; then
                skipped=$((skipped + 1))
                echo "test $test ... skipped:${BASH_REMATCH[3]}"
            else
                passed=$((passed + 1))
                echo "test $test ... ok"
            fi
        elif [[ $line =~ ^not\ ok\ [0-9]+\ ([^ ]+) ]]; then
            failures=$((failures + 1))
            echo "test $name: ${BASH_REMATCH[1]} ... FAILED"
            failed "$name: ${BASH_REMATCH[1]}: $(hmm_reason "${BASH_REMATCH[1]}" "$out")"
        fi
    done
    PASSED=$((PASSED + passed)) SKIPPED=$((SKIPPED + skipped))
    # A guest whose log holds a warning is one, too.
    if ((status != 0 && failures == 0)); then
        failed "$name (the guest ended with status $status)"
        tail -n 60 "$err" >&2
    elif ((failures == 0 && (passed != passes || skipped != skips))); then
        failed "$name: $passed have passed and $skipped were skipped, where $passes and $skips were expected"
    fi
}

# hmm_reason TEST LOG: the assertion with which it failed.
hmm_reason() {
    local test=${1##*.}
    grep -m 1 -E "hmm-tests\.c:[0-9]+:$test:" "$2" | sed 's/^# *//' || echo "it says no reason"
}
