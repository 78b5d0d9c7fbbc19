#!/bin/sh
# Measures again what docs/performance.md shows: every CSV and every picture, on one GPU, in about a quarter of an hour.
# Whole steps of stage 2 need more than 80 GB (one H200 has it): on less, their rows and bars say OOM.
#
#   bash scripts/benchmark.sh            CSVs of today's date in benchmark/results/, pictures in docs/images/
#   bash scripts/benchmark.sh --smoke    tiny shapes, without a GPU, into a temporary directory: do the scripts run?
#
# Takes the variables of scripts/setup.sh, and:
#   RESULTS=benchmark/results    where the CSVs go
#   OVERWRITE=1                  replaces CSVs of today that are there already
#   RECOMPUTED="0 0 5 20"        layers that stage 2 recomputes at 1024, 2048, 4096 and 8192 tokens (an H200; default: all)
#   DATA_PATH=... TOKENIZER=...  measures real conversations too, as train.py reads them
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}
run() {
    echo "== python $*"
    # shellcheck disable=SC2086  # SMOKE is a word, or none
    "$PY" "$@" $SMOKE
}

SMOKE="$*"
case "$SMOKE" in
    '')
        RESULTS="${RESULTS:-benchmark/results}"
        IMAGES=docs/images
        ;;
    --smoke)
        RESULTS=$(mktemp -d)
        IMAGES=$RESULTS
        ;;
    *) fail "'$SMOKE' is not an option of this script, which takes none but --smoke" ;;
esac
if [ -z "$SMOKE" ] && [ -z "$(nvidia-smi -L 2>/dev/null)" ]; then
    fail "no NVIDIA GPU found (nvidia-smi -L lists none); without one try: bash scripts/benchmark.sh --smoke"
elif [ -n "${DATA_PATH:-}" ] && [ -z "${TOKENIZER:-}" ]; then
    fail "DATA_PATH is set: set TOKENIZER (a directory or a name of the Hub) too"
fi

CSV=$RESULTS/$(date +%Y-%m-%d)
for file in "${CSV}_head_loss.csv" "${CSV}_throughput.csv" "${CSV}_memory.csv"; do
    if [ "${OVERWRITE:-}" = 1 ]; then
        rm -f "$file"
    elif [ -e "$file" ]; then
        fail "$file is there already and would be appended to: OVERWRITE=1 replaces it, RESULTS= names another place"
    fi
done
. scripts/setup.sh

run benchmark/head_loss.py --out "${CSV}_head_loss.csv"
run benchmark/throughput.py --stage 1 --out "${CSV}_throughput.csv"
# shellcheck disable=SC2086  # RECOMPUTED is several words, or none
run benchmark/throughput.py --stage 2 ${RECOMPUTED:+--recomputed_layers $RECOMPUTED} --out "${CSV}_throughput.csv"
if [ -z "$SMOKE" ]; then # a GPU's business: fp8, and conversations as long as LLaMA 3.1 reads
    run benchmark/throughput.py --stage 1 --implementations ours --heads 3 --lengths 2048 4096 8192 --fp8_backbone \
        --out "${CSV}_throughput.csv"
    run benchmark/throughput.py --stage 1 --implementations ours --heads 5 --batch_size 1 --lengths 32768 65536 131072 \
        --warmup 1 --steps 1 --out "${CSV}_throughput.csv"
fi
if [ -n "${DATA_PATH:-}" ]; then
    run benchmark/throughput.py --stage 1 --implementations ours --heads 5 --lengths 2048 \
        --data_path "$DATA_PATH" --tokenizer "$TOKENIZER" --warmup 5 --steps 45 --out "${CSV}_throughput.csv"
fi
run benchmark/memory.py --stage 1 --out "${CSV}_memory.csv"
run benchmark/memory.py --stage 2 --out "${CSV}_memory.csv"
SMOKE= # the rest has no tiny shapes
run benchmark/plot.py --memory "${CSV}_memory.csv" --throughput "${CSV}_throughput.csv" --out "$IMAGES"
echo "CSVs: $RESULTS, pictures: $IMAGES"
