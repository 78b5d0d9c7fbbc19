#!/bin/sh
# What several GPUs of this machine do with LLaMA-3-8B shapes (random weights): each call takes some minutes.
#
#   bash scripts/benchmark_gpus.sh compare 1    stage 1: memory per GPU, tokens/s of all, MFU; three implementations
#   bash scripts/benchmark_gpus.sh compare 2    stage 2
#   bash scripts/benchmark_gpus.sh scaling 1    5 heads, 2048 tokens, on 1, 2, 4 ... GPUs; 2: from 4 GPUs on
#   bash scripts/benchmark_gpus.sh resume 1     a small model: train, SIGKILL a rank, resume, compare with never killed
#   bash scripts/benchmark_gpus.sh ... --smoke  the same on two CPU processes with tiny shapes: does the script run?
#
# Takes the variables of scripts/setup.sh, and:
#   NUM_GPUS=8                  those it finds
#   FSDP=2                      or 1
#   HEADS="3 5"                 how many heads `compare` takes
#   RESULTS=benchmark/results   where the CSVs go; rows are appended
#   MODEL=models/SmolLM2-135M-Instruct    what `resume` trains (scripts/quickstart.sh makes it)
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

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
    NUM_GPUS="${NUM_GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}"
    [ "$NUM_GPUS" -gt 1 ] || fail "this needs two GPUs or more, found $NUM_GPUS (nvidia-smi -L); without: --smoke"
    RESULTS="${RESULTS:-benchmark/results}" CONFIG=configs/fsdp$FSDP.yaml
    TRAIN="--bf16 True --max_steps 200 --save_steps 100 --per_device_train_batch_size 2 --model_max_length 512"
    SAVED=100
fi
. scripts/setup.sh
CSV=$RESULTS/$(date +%Y-%m-%d)_gpus_$WHAT.csv

launch() { # number of processes, script and flags
    processes=$1
    shift
    "$PY" -m accelerate.commands.launch --quiet --config_file "$CONFIG" --num_processes "$processes" "$@"
}
measure() { # number of processes, flags of benchmark/memory.py. Out of memory ends one measurement, not the others
    processes=$1
    shift
    echo "== $processes processes: benchmark/memory.py --stage $STAGE $*"
    # shellcheck disable=SC2086  # SMOKE is a word, or none
    (
        if [ -n "$SMOKE" ]; then # what fsdp*.yaml would set; cpu.yaml sets none of it
            export ACCELERATE_USE_FSDP=true FSDP_VERSION="$FSDP" FSDP_USE_ORIG_PARAMS=true
            export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
        fi
        launch "$processes" benchmark/memory.py --stage "$STAGE" --out "$CSV" "$@" $SMOKE
    ) || echo "== ended with status $?: the last row of $CSV says OOM if memory ran out" >&2
}

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
        if [ "$STAGE,$SMOKE" = 2, ]; then processes=4; fi # 171 GB of weights, gradients and moments
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
            launch "$NUM_GPUS" train.py --model_name_or_path "$MODEL" --data_path data/quickstart.jsonl \
                --medusa_only_heads "$([ "$STAGE" = 1 ] && echo True || echo False)" --medusa_num_heads 3 \
                --output_dir "$directory" $TRAIN --save_strategy steps --disable_tqdm True --report_to none "$@"
        }
        echo "== never stopped"
        train "$OUT/whole" >"$OUT/whole.log" 2>&1 || fail "training failed: see $OUT/whole.log"
        echo "== SIGKILL after checkpoint-$SAVED"
        train "$OUT/killed" >"$OUT/killed.log" 2>&1 &
        LAUNCHER=$!
        until [ -d "$OUT/killed/checkpoint-$SAVED" ]; do
            kill -0 "$LAUNCHER" || fail "it ended before the checkpoint: see $OUT/killed.log"
            sleep 0.05
        done
        kill -KILL "$(pgrep -f "train.py .*--output_dir $OUT/killed" | tail -n 1)" # the last rank
        if wait "$LAUNCHER"; then fail "it was done before the signal came: see $OUT/killed.log"; fi
        echo "== resumed"
        train "$OUT/killed" --resume_from_checkpoint True >"$OUT/resumed.log" 2>&1 || fail "see $OUT/resumed.log"
        grep "resuming from" "$OUT/resumed.log"
        (cd "$OUT/whole" && find . -name '*.safetensors' -not -path './checkpoint-*') | while read -r file; do
            cmp "$OUT/whole/$file" "$OUT/killed/$file" || fail "$file differs; both runs are in $OUT"
            echo "the same, byte for byte: $file"
        done
        echo "== one process loads it"
        "$PY" generate.py "$OUT/killed" --prompt "Why is the sky blue?" --max_new_tokens 32
        rm -rf "$OUT"
        ;;
esac
[ ! -f "$CSV" ] || echo "rows: $CSV"
