#!/bin/sh
# What several GPUs of this machine do with LLaMA-3-8B shapes (random weights): each call takes some minutes.
#
#   bash scripts/benchmark_gpus.sh compare 1    stage 1: memory per GPU, tokens/s of all, MFU; three implementations
#   bash scripts/benchmark_gpus.sh compare 2    stage 2
#   bash scripts/benchmark_gpus.sh scaling 1    5 heads, 2048 tokens, on 1, 2, 4 ... GPUs; 2: from 4 GPUs on
#   bash scripts/benchmark_gpus.sh resume 1     a small model: train, SIGKILL a rank, resume, compare with never killed
#   bash scripts/benchmark_gpus.sh ... --smoke  two CPU processes and tiny shapes (resume: DDP): does the script run?
#
# Takes the variables of scripts/setup.sh, and:
#   NUM_GPUS=8                  those it finds
#   FSDP=2                      or 1
#   HEADS="3 5"                 how many heads `compare` takes
#   RESULTS=benchmark/results   where the CSVs go; rows are appended
#   MODEL=models/SmolLM2-135M-Instruct    what `resume` trains (scripts/quickstart.sh makes it)
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

WHAT="${1:-}" STAGE="${2:-}" SMOKE="${3:-}"
case "$WHAT,$STAGE,$SMOKE" in
    compare,[12], | scaling,[12], | resume,[12], | compare,[12],--smoke | scaling,[12],--smoke | resume,[12],--smoke) ;;
    *) fail "usage: bash scripts/benchmark_gpus.sh compare|scaling|resume 1|2 [--smoke]" ;;
esac
FSDP="${FSDP:-2}"
case "$FSDP" in [12]) ;; *) fail "FSDP must be 1 or 2, not '$FSDP'" ;; esac
if [ -n "$SMOKE" ]; then
    NUM_GPUS=2 RESULTS=$(mktemp -d) CONFIG=configs/cpu.yaml
    export CUDA_VISIBLE_DEVICES=
    TRAIN="--max_steps 4 --save_steps 2 --per_device_train_batch_size 1 --model_max_length 64"
    SAVED=2
else
    find_gpus
    NEEDED=2
    if [ "$WHAT,$STAGE" = scaling,2 ]; then NEEDED=4; fi # 171 GB of weights, gradients and moments
    if [ "$NUM_GPUS" -lt "$NEEDED" ] || [ "$NUM_GPUS" -gt "$FOUND" ]; then
        fail "this needs $NEEDED GPUs or more; NUM_GPUS is $NUM_GPUS, and there are $FOUND (nvidia-smi -L," \
            "CUDA_VISIBLE_DEVICES). Without GPUs try --smoke"
    fi
    RESULTS="${RESULTS:-benchmark/results}" CONFIG=configs/fsdp$FSDP.yaml
    TRAIN="--bf16 True --max_steps 200 --save_steps 100 --per_device_train_batch_size 2 --model_max_length 512"
    SAVED=100
fi
. scripts/setup.sh
CSV=$RESULTS/$(date +%Y-%m-%d)_gpus_$WHAT.csv

launch_here() { # number of processes, script and flags
    processes=$1
    shift
    "$PY" scripts/launch.py --quiet --config_file "$CONFIG" --num_processes "$processes" "$@"
}
DONE=0
measure() { # number of processes, flags of benchmark/memory.py. Out of memory ends one measurement, not the others
    processes=$1
    shift
    echo "== $processes processes: benchmark/memory.py --stage $STAGE $*"
    # shellcheck disable=SC2086  # SMOKE is a word, or none
    if launch_here "$processes" benchmark/memory.py --stage "$STAGE" --out "$CSV" "$@" $SMOKE; then
        DONE=$((DONE + 1))
    else
        echo "== this one failed, see above; if memory ran out on rank 0, the last row of $CSV says OOM" >&2
    fi
}
if [ -n "$SMOKE" ] && [ "$WHAT" != resume ]; then # what fsdp*.yaml would set; cpu.yaml sets none of it
    export ACCELERATE_USE_FSDP=true FSDP_VERSION="$FSDP" FSDP_USE_ORIG_PARAMS=true
    export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
fi

case "$WHAT" in
    compare)
        for heads in ${HEADS:-3 5}; do
            for implementation in ours liger hf; do
                measure "$NUM_GPUS" --heads "$heads" --implementations "$implementation"
            done
        done
        ;;
    scaling)
        processes=1
        if [ "$STAGE,$SMOKE" = 2, ]; then processes=$NEEDED; fi
        LENGTH=2048
        if [ -n "$SMOKE" ]; then LENGTH=32; fi
        while [ "$processes" -le "$NUM_GPUS" ]; do
            measure "$processes" --heads 5 --implementations ours --lengths "$LENGTH"
            processes=$((processes * 2))
        done
        ;;
    resume)
        MODEL="${MODEL:-models/SmolLM2-135M-Instruct}"
        [ -d "$MODEL" ] || fail "there is no directory MODEL=$MODEL"
        OUT=$(mktemp -d)
        train() { # directory and more flags
            directory=$1
            shift
            # shellcheck disable=SC2086  # TRAIN is several words
            launch_here "$NUM_GPUS" train.py --model_name_or_path "$MODEL" --data_path data/quickstart.jsonl \
                --medusa_only_heads "$([ "$STAGE" = 1 ] && echo True || echo False)" --medusa_num_heads 3 \
                --output_dir "$directory" $TRAIN --save_strategy steps --disable_tqdm True --report_to none "$@"
        }
        # OUT is in the command line of every process that is started here.
        trap 'pkill -KILL -f -- "--output_dir $OUT/" || true' EXIT
        echo "== never stopped"
        train "$OUT/whole" >"$OUT/whole.log" 2>&1 || fail "training failed: see $OUT/whole.log"
        echo "== SIGKILL of a rank after checkpoint-$SAVED"
        train "$OUT/killed" >"$OUT/killed.log" 2>&1 &
        LAUNCHER=$!
        until [ -d "$OUT/killed/checkpoint-$SAVED" ]; do
            kill -0 "$LAUNCHER" 2>/dev/null || fail "it ended before the checkpoint: see $OUT/killed.log"
            sleep 0.05
        done
        pgrep -f -- "-u train.py .*--output_dir $OUT/killed" >"$OUT/ranks" || fail "no rank was running any more"
        kill -KILL "$(tail -n 1 "$OUT/ranks")"
        if wait "$LAUNCHER"; then fail "it was done before the signal came: see $OUT/killed.log"; fi
        echo "== resumed"
        train "$OUT/killed" --resume_from_checkpoint True >"$OUT/resumed.log" 2>&1 || fail "see $OUT/resumed.log"
        grep "resuming from" "$OUT/resumed.log" || fail "it did not resume: see $OUT/resumed.log"
        # On a GPU the backward pass of attention, stage 2, adds up in no fixed order.
        "$PY" - "$OUT" "$([ "$STAGE" = 1 ] && echo 0 || echo 0.01)" <<'COMPARE' || fail "they differ; both are in $OUT"
import sys
from pathlib import Path
from safetensors.torch import load_file
out, limit = Path(sys.argv[1]), float(sys.argv[2])
files = [path for path in (out / "whole").rglob("*.safetensors") if "checkpoint-" not in str(path)]
furthest = 0.0
for path in files:
    whole, killed = load_file(path), load_file(out / "killed" / path.relative_to(out / "whole"))
    assert whole.keys() == killed.keys()
    furthest = max(furthest, *(float((killed[n] - w).norm() / w.norm().clamp(min=1e-9)) for n, w in whole.items()))
print(f"{len(files)} files; furthest apart, over the tensor's norm: {furthest:.2g} (at most {limit:g})")
sys.exit(not files or furthest > limit)
COMPARE
        echo "== one process loads it"
        "$PY" generate.py "$OUT/killed" --prompt "Why is the sky blue?" --max_new_tokens 32
        rm -rf "$OUT"
        ;;
esac
[ "$WHAT" = resume ] || [ "$DONE" -gt 0 ] || fail "no measurement succeeded"
[ ! -f "$CSV" ] || echo "rows: $CSV"
