#!/bin/sh
# Measures again what docs/results.md compares: every CSV and every picture, on one GPU of 80 GB, in some hours.
#
#   bash scripts/benchmark.sh            CSVs of today's date in benchmark/results/, pictures in docs/images/
#   bash scripts/benchmark.sh --smoke    tiny shapes, without a GPU, into a temporary directory: do the scripts run?
#
# Takes the variables of scripts/setup.sh, and:
#   RESULTS=benchmark/results    where the CSVs go
#   OVERWRITE=1                  replaces CSVs of today that are there already
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
run benchmark/throughput.py --stage 2 --out "${CSV}_throughput.csv"
if [ -n "${DATA_PATH:-}" ]; then
    run benchmark/throughput.py --stage 1 --implementations ours --heads 5 --lengths 2048 \
        --data_path "$DATA_PATH" --tokenizer "$TOKENIZER" --out "${CSV}_throughput.csv"
fi
run benchmark/memory.py --stage 1 --out "${CSV}_memory.csv"
run benchmark/memory.py --stage 2 --out "${CSV}_memory.csv"
SMOKE= # the rest has no tiny shapes
run benchmark/plot.py --memory "${CSV}_memory.csv" --throughput "${CSV}_throughput.csv" --out "$IMAGES"
echo "CSVs: $RESULTS, pictures: $IMAGES"
