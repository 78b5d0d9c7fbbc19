#!/bin/sh
# Sourced by the scripts that start a process per GPU.

fail() {
    echo "error: $*" >&2
    exit 1
}
need_number() { # name, value
    case "$2" in '' | *[!0-9]* | 0?*) fail "$1 must be a number, not '$2'" ;; esac
}
find_gpus() { # sets FOUND, how many there are, and NUM_GPUS, how many to use, unless that is set
    FOUND=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    if [ "$FOUND" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # nvidia-smi lists those that are hidden too
        FOUND=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true)
    fi
    NUM_GPUS="${NUM_GPUS:-$FOUND}"
    need_number NUM_GPUS "$NUM_GPUS"
}
