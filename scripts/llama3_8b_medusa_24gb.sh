#!/bin/sh
# Medusa heads for LLaMA-3-8B-Instruct on one GPU of 24 GB, in one command: the model, in 4 bits, answers prompts; heads
# train on its answers; it is measured how often they are right; and one prompt is decoded plainly and with them.
#
#   bash scripts/llama3_8b_medusa_24gb.sh
#   bash scripts/llama3_8b_medusa_24gb.sh --medusa_num_heads 3       flags are for train.py, and win over those below
#   PROMPTS=my_prompts.txt LIMIT=2000 OUTPUT_DIR=... bash scripts/llama3_8b_medusa_24gb.sh
#
# The same command goes on where an earlier one stopped. It makes .venv the first time (VENV=none: the Python that is
# active, which needs requirements-quantised.txt too).
#
# Memory: docs/one-card.md has the arithmetic, 13 to 14 GiB with these settings (not measured yet). 5 heads guess the
# 32,768 most frequent tokens; their weights are kept in fp32, and Adam's moments in 8 bits.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh
find_gpus
need_gpu
. scripts/setup.sh
MODEL="${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}"
OUTPUT_DIR="${OUTPUT_DIR:-out/llama3_8b_medusa_24gb}"
CHATS="${CHATS:-$OUTPUT_DIR-chats.jsonl}"
BITS="${BITS:-nf4}"

echo "== 1/4 the model answers prompts: $CHATS"
"$PY" distill.py --model_name_or_path "$MODEL" --backbone_dtype "$BITS" \
    --prompts "${PROMPTS:-Aeala/ShareGPT_Vicuna_unfiltered}" --limit "${LIMIT:-10000}" --output "$CHATS" \
    --max_new_tokens "${MAX_NEW_TOKENS:-512}" --batch_size "${ANSWERS_AT_ONCE:-32}"

echo "== 2/4 heads train on its answers: $OUTPUT_DIR"
if [ ! -f "$OUTPUT_DIR/medusa_lm_head.safetensors" ]; then # an earlier command has trained them
    RESUME=False
    for checkpoint in "$OUTPUT_DIR"/checkpoint-*; do
        [ ! -f "$checkpoint/run.json" ] || RESUME=True
    done
    "$PY" train.py \
        --model_name_or_path "$MODEL" \
        --backbone_dtype "$BITS" \
        --data_path "$CHATS" \
        --eval_holdout "${EVAL_HOLDOUT:-200}" \
        --output_dir "$OUTPUT_DIR" \
        --resume_from_checkpoint "$RESUME" \
        --model_max_length "${MAX_LENGTH:-2048}" \
        --medusa_num_heads 5 \
        --medusa_num_layers 1 \
        --medusa_vocab_size "${VOCAB_SIZE:-32768}" \
        --medusa_only_heads True \
        --bf16 True \
        --use_liger True \
        --optim adamw_8bit \
        --num_train_epochs "${EPOCHS:-2}" \
        --per_device_train_batch_size 1 \
        --per_device_eval_batch_size 1 \
        --gradient_accumulation_steps 16 \
        --lr_scheduler_type linear \
        --warmup_steps 0.02 \
        --logging_steps 10 \
        --save_strategy steps \
        --save_steps 500 \
        --save_total_limit 2 \
        --report_to "${REPORT_TO:-tensorboard}" \
        "$@"
fi

echo "== 3/4 how often each head is right on conversations that it never saw"
"$PY" evaluate.py "$OUTPUT_DIR" --data_path "$CHATS" --eval_holdout "${EVAL_HOLDOUT:-200}" --backbone_dtype "$BITS"

echo "== 4/4 one prompt, plainly and with the heads"
"$PY" generate.py "$OUTPUT_DIR" --prompt "${PROMPT:-Explain how a bicycle stays upright.}" --compare --backbone_dtype "$BITS"
