#!/bin/sh
# From nothing to decoding with Medusa heads: sets up, converts SmolLM2-135M-Instruct, trains 2 heads for some minutes on
# conversations in its own words (data/quickstart.jsonl), shows how often each head is right, before and after, and
# decodes one prompt plainly and with the heads, side by side.
# Needs no GPU and no model hub; uses a GPU if there is one. Takes the variables of scripts/setup.sh, and:
#   OUTPUT_DIR=out/quickstart   where the heads go (an earlier result there is replaced)
#   MAX_STEPS=400               of one conversation each; longer is better
#   BF16=True                   computes in bf16; default: where the GPU or the CPU has bf16 products
#
# Time goes into products: a token costs 0.21 GFLOP in the backbone, and a row 0.17 in each head (6 x 576 x 49152). So
# few heads and one conversation a step teach most per minute: of the recipes tried (docs/log.md) this one yields most.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh
OUTPUT_DIR="${OUTPUT_DIR:-out/quickstart}"
MODEL=models/SmolLM2-135M-Instruct
DATA="--data_path data/quickstart.jsonl --eval_holdout 30 --model_max_length 256"

if [ -n "$(nvidia-smi -L 2>/dev/null)" ] || grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    BF16="${BF16:-True}"
fi
case "${BF16:=False}" in # a CPU without bf16 products only emulates them, far slower than fp32
    True) DTYPE=bfloat16 MAX_STEPS="${MAX_STEPS:-400}" ;;
    *) DTYPE=float32 MAX_STEPS="${MAX_STEPS:-200}" ;;
esac

if [ ! -d "$MODEL" ]; then
    echo "== 1/4 converting SmolLM2-135M-Instruct"
    "$PY" scripts/smollm2_from_gguf.py "$MODEL"
fi

echo "== 2/4 training 2 heads, $MAX_STEPS steps in $DTYPE (2 to 4 minutes on two CPU cores)"
if [ -f "$OUTPUT_DIR/train_command.txt" ]; then
    rm -rf "$OUTPUT_DIR" # an earlier quickstart's result, and nothing else
fi
# shellcheck disable=SC2086  # DATA is several words
"$PY" train.py --model_name_or_path "$MODEL" $DATA --do_eval False --output_dir "$OUTPUT_DIR" \
    --medusa_only_heads True --medusa_num_heads 2 --medusa_heads_coefficient 1 --bf16 "$BF16" \
    --max_steps "$MAX_STEPS" --per_device_train_batch_size 1 --learning_rate 3e-3 --adam_epsilon 1e-6 \
    --lr_scheduler_type linear --warmup_steps 0.05 --logging_steps 50 --save_strategy no --report_to none

echo "== 3/4 how often each head is right on 30 conversations it never saw (a minute)"
# shellcheck disable=SC2086
"$PY" evaluate.py "$OUTPUT_DIR" $DATA --max_new_tokens 64 --batch_size 30 --dtype "$DTYPE"

echo "== 4/4 one prompt, plainly and with the heads"
"$PY" generate.py "$OUTPUT_DIR" --prompt "Explain how a bicycle stays upright." --compare --nodes 8 \
    --max_new_tokens 100 --dtype float32
cat <<EOT

The text is the same, in fewer passes of the backbone: that is what heads give. Whether it takes less time depends on how
much longer a pass over several tokens is than over one. In fp32 on a CPU twice as long; in bf16 on a CPU that has it
1.2 to 1.4 times; on an H100 with LLaMA-3-8B shapes 1.3 times for 64 tokens (docs/decoding.md). There it pays.

The heads are in $OUTPUT_DIR/medusa_lm_head.safetensors, their settings in config.json beside it.
Next: MAX_STEPS=2000 bash scripts/quickstart.sh for better ones, or your own model:
    $PY distill.py --model_name_or_path YOUR_MODEL --prompts data/quickstart_prompts.txt --output chats.jsonl
    $PY train.py --model_name_or_path YOUR_MODEL --data_path chats.jsonl --output_dir out/heads \\
        --medusa_only_heads True --bf16 True --eval_holdout 500
    $PY evaluate.py out/heads --data_path chats.jsonl --eval_holdout 500
    $PY generate.py out/heads --prompt "..." --compare
LLaMA-3-8B: bash scripts/llama3_8b_medusa.sh
EOT
