#!/bin/sh
# From nothing to decoding with Medusa heads: sets up, converts SmolLM2-135M-Instruct, trains 3 heads for some minutes
# on conversations in its own words (data/quickstart.jsonl), shows how often each head is right, before and after, and
# decodes one prompt plainly and with the heads, side by side.
# Needs no GPU and no model hub; uses a GPU if there is one. Takes the variables of scripts/setup.sh, and:
#   OUTPUT_DIR=out/quickstart   where the heads go (an earlier result there is replaced)
#   MAX_STEPS=90                longer is better
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh
OUTPUT_DIR="${OUTPUT_DIR:-out/quickstart}"
MODEL=models/SmolLM2-135M-Instruct
DATA="--data_path data/quickstart.jsonl --eval_holdout 50 --model_max_length 512"

BF16=True
if [ -z "$(nvidia-smi -L 2>/dev/null)" ] && ! grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    BF16=False # a CPU without bf16 products only emulates them, slower than fp32
    MAX_STEPS="${MAX_STEPS:-20}"
fi

if [ ! -d "$MODEL" ]; then
    echo "== 1/4 converting SmolLM2-135M-Instruct"
    "$PY" scripts/smollm2_from_gguf.py "$MODEL"
fi

echo "== 2/4 training 3 heads"
if [ -f "$OUTPUT_DIR/train_command.txt" ]; then
    rm -rf "$OUTPUT_DIR" # an earlier quickstart's result, and nothing else
fi
# shellcheck disable=SC2086  # DATA is several words
"$PY" train.py --model_name_or_path "$MODEL" $DATA --output_dir "$OUTPUT_DIR" --medusa_only_heads True \
    --medusa_num_heads 3 --medusa_heads_coefficient 1 --learning_rate 2e-3 --lr_scheduler_type cosine \
    --warmup_steps 0.1 --max_steps "${MAX_STEPS:-90}" --per_device_train_batch_size 8 --bf16 "$BF16" \
    --logging_steps 10 --save_strategy no

echo "== 3/4 how often each head is right on 50 conversations it never saw"
# shellcheck disable=SC2086
"$PY" evaluate.py "$OUTPUT_DIR" $DATA --max_new_tokens 128 --batch_size 25

echo "== 4/4 the same prompt, plainly and with the heads: the same text in fewer passes"
echo "   (in fp32, where not even a rounding differs; on a CPU fewer passes are less time in bf16: --dtype bfloat16)"
"$PY" generate.py "$OUTPUT_DIR" --prompt "Why is the sky blue?" --compare --nodes 4 --max_new_tokens 100 --dtype float32
cat <<EOF

The heads are in $OUTPUT_DIR/medusa_lm_head.safetensors, their settings in config.json beside it.
Next: MAX_STEPS=500 bash scripts/quickstart.sh for better ones, or your own model:
    $PY distill.py --model_name_or_path YOUR_MODEL --prompts data/quickstart_prompts.txt --output chats.jsonl
    $PY train.py --model_name_or_path YOUR_MODEL --data_path chats.jsonl --output_dir out/heads \\
        --medusa_only_heads True --bf16 True --learning_rate 1e-3 --eval_holdout 500
    $PY evaluate.py out/heads --data_path chats.jsonl --eval_holdout 500
    $PY generate.py out/heads --prompt "..." --compare
LLaMA-3-8B: bash scripts/llama3_8b_medusa.sh
EOF
