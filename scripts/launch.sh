#!/bin/sh
# Sourced by the scripts that start a process per GPU. From the top directory:
#   . scripts/launch.sh
#   find_machines               which GPUs and nodes there are, or one sentence about what is wrong
#   . scripts/setup.sh          sets $PY
#   plan train.py --flags       ends here, with advice, if that would not fit into a GPU's memory
#   launch train.py --flags     on all of them
# Takes these variables:
#   NUM_GPUS=2                  of this node; default: all that nvidia-smi and CUDA_VISIBLE_DEVICES show
#   CONFIG=configs/fsdp1.yaml   how accelerate launches it; default: one of configs/, by the number of GPUs and nodes
#   PLAN=no                     does not ask whether it fits
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=first-node MASTER_PORT=29500
#                               on the first of two nodes, with NODE_RANK=1 on the second; SLURM sets its own

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
need_gpu() { # after find_gpus
    [ "$NUM_GPUS" -ge 1 ] ||
        fail "no NVIDIA GPU found (nvidia-smi -L lists none). Without a GPU try: bash scripts/quickstart.sh"
}
find_nodes() { # sets NUM_NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; a variable that is set wins over SLURM's
    NUM_NODES="${NUM_NODES:-${SLURM_NNODES:-1}}"
    MASTER_PORT="${MASTER_PORT:-29500}"
    need_number NUM_NODES "$NUM_NODES"
    need_number MASTER_PORT "$MASTER_PORT"
    if [ "$NUM_NODES" -gt 1 ]; then
        NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
        if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
            MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        fi
        if [ -z "$NODE_RANK" ] || [ -z "${MASTER_ADDR:-}" ]; then
            fail "NUM_NODES is $NUM_NODES: set NODE_RANK (this node's number, from 0) and MASTER_ADDR (node 0's name) too"
        fi
    fi
    NODE_RANK="${NODE_RANK:-0}"
    need_number NODE_RANK "$NODE_RANK"
    [ "$NODE_RANK" -lt "$NUM_NODES" ] || fail "NODE_RANK is $NODE_RANK, and must be less than NUM_NODES, $NUM_NODES"
}
find_machines() { # all of the above, and sets CONFIG
    find_gpus
    need_gpu
    if [ "$FOUND" -gt 0 ] && [ "$NUM_GPUS" -gt "$FOUND" ]; then
        fail "NUM_GPUS is $NUM_GPUS, but there are only $FOUND (nvidia-smi -L, CUDA_VISIBLE_DEVICES)"
    fi
    find_nodes
    if [ -z "${CONFIG:-}" ]; then
        case "$NUM_NODES,$NUM_GPUS" in
            1,1) CONFIG=configs/single_gpu.yaml ;;
            1,* | *,1) CONFIG=configs/fsdp2.yaml ;; # nodes of one GPU have nothing to shard inside: over all of them
            *) CONFIG=configs/fsdp2_multi_node.yaml ;;
        esac
    fi
    [ -f "$CONFIG" ] || fail "there is no file CONFIG=$CONFIG (from $PWD)"
}
plan() { # a script that knows --plan, and its flags
    case "${PLAN:-yes},$CONFIG" in # what plans are of: one GPU, or FSDP2 over all or over those of a node
        no,*) return 0 ;;
        *single_gpu.yaml) SHARED_BY=1 ;;
        *fsdp2_multi_node.yaml) SHARED_BY=$NUM_GPUS ;;
        *fsdp2.yaml) SHARED_BY=$((NUM_NODES * NUM_GPUS)) ;;
        *) return 0 ;;
    esac
    "$PY" "$@" --plan --plan_gpus "$SHARED_BY" || exit 1
}
launch() { # a script and its flags: a process per GPU, and on all nodes together one group
    SIZES= # a configuration of your own keeps its own
    case "$CONFIG" in
        *fsdp2_multi_node.yaml)
            SIZES="--parallelism_config_dp_replicate_size $NUM_NODES --parallelism_config_dp_shard_size $NUM_GPUS"
            ;;
    esac
    # --quiet and launch.py: where one process fails, no second traceback, of the launcher.
    # shellcheck disable=SC2086  # SIZES is several words, or none
    exec "$PY" scripts/launch.py --quiet --config_file "$CONFIG" $SIZES \
        --num_machines "$NUM_NODES" --num_processes $((NUM_NODES * NUM_GPUS)) --machine_rank "$NODE_RANK" \
        --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$MASTER_PORT" "$@"
}
