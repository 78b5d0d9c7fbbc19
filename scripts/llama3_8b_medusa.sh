#!/bin/sh
# Medusa heads for LLaMA-3-8B-Instruct on one node.
#
#   bash scripts/llama3_8b_medusa.sh                              stage 1, 5 heads
#   bash scripts/llama3_8b_medusa.sh --medusa_num_heads 3         flags are appended to those below, and win
#   bash scripts/llama3_8b_medusa.sh --medusa_only_heads False    stage 2: the backbone trains too
#   MODEL=... DATA_PATH=my_chats.jsonl OUTPUT_DIR=... NUM_GPUS=2 bash scripts/llama3_8b_medusa.sh
#
# Memory of a GPU in stage 1: backbone in bf16 8.0 B x 2 bytes = 16 GB, and for each head 0.54 B weights x 16 bytes
# (fp32 weight, gradient and two Adam moments) = 8.7 GB: 5 heads 60 GB, 3 heads 43 GB, and some for a batch.
# --dtype bfloat16 halves the heads' part.
set -eu
cd "$(dirname "$0")/.."

MODEL="${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}"
DATA_PATH="${DATA_PATH:-Aeala/ShareGPT_Vicuna_unfiltered}" # a Hub dataset, or a .json or .jsonl file
EVAL_HOLDOUT="${EVAL_HOLDOUT:-500}"                       # its last conversations, never trained on
MAX_LENGTH="${MAX_LENGTH:-2048}"
BATCH_SIZE="${BATCH_SIZE:-4}"    # conversations per GPU at once
ACCUMULATION="${ACCUMULATION:-4}" # ... and so often before an optimiser step
EPOCHS="${EPOCHS:-1}"
PYTHON="${PYTHON:-python3}"

STAGE1=True # what the appended flags say; the flag alone, without a value, means True
previous=
for word in "$@"; do
    case "$previous" in
        --medusa[_-]only[_-]heads) case "$word" in -*) STAGE1=True ;; *) STAGE1=$word ;; esac ;;
    esac
    case "$word" in --medusa[_-]only[_-]heads=*) STAGE1=${word#*=} ;; esac
    previous=$word
done
case "$STAGE1" in
    [Tt]* | [Yy]* | 1)
        STAGE=1
        LEARNING_RATE="${LEARNING_RATE:-1e-3}" # of the original Medusa recipe
        LR_MULTIPLIER="${LR_MULTIPLIER:-1}"
        ;;
    [Ff]* | [Nn]* | 0)
        STAGE=2
        LEARNING_RATE="${LEARNING_RATE:-1e-5}" # usual for full fine-tuning ...
        LR_MULTIPLIER="${LR_MULTIPLIER:-50}"   # ... while heads want 5e-4
        echo "note: stage 2 keeps 16 bytes a weight on each GPU: (8.0 + 5 x 0.54) B x 16 = 171 GB for LLaMA-3-8B and" \
            "5 heads, more than one GPU has. Sharding (FSDP) is not in this version; MODEL= a smaller one works." >&2
        ;;
    *)
        echo "error: --medusa_only_heads $STAGE1 is neither True nor False" >&2
        exit 1
        ;;
esac
OUTPUT_DIR="${OUTPUT_DIR:-out/llama3_8b_medusa_stage$STAGE}"

NUM_GPUS="${NUM_GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}"
if [ "$NUM_GPUS" -lt 1 ]; then
    echo "error: no NVIDIA GPU found (nvidia-smi -L lists none), and an 8B model needs one of 80 GB for 5 heads." \
        "Without a GPU try: bash scripts/quickstart.sh" >&2
    exit 1
fi
if [ "$NUM_GPUS" -eq 1 ]; then
    LAUNCH="$PYTHON"
else
    LAUNCH="$PYTHON -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes $NUM_GPUS \
        --mixed_precision bf16 --dynamo_backend no"
fi

# shellcheck disable=SC2086  # LAUNCH is several words
exec $LAUNCH train.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA_PATH" \
    --eval_holdout "$EVAL_HOLDOUT" \
    --output_dir "$OUTPUT_DIR" \
    --model_max_length "$MAX_LENGTH" \
    --medusa_num_heads 5 \
    --medusa_num_layers 1 \
    --medusa_only_heads "$STAGE1" \
    --medusa_heads_coefficient 0.2 \
    --medusa_decay_coefficient 0.8 \
    --medusa_scheduler constant \
    --medusa_lr_multiplier "$LR_MULTIPLIER" \
    --bf16 True \
    --use_liger True \
    --num_train_epochs "$EPOCHS" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --gradient_checkpointing True \
    --learning_rate "$LEARNING_RATE" \
    --lr_scheduler_type cosine \
    --warmup_steps 0.1 \
    --weight_decay 0.0 \
    --logging_steps 10 \
    --eval_strategy steps \
    --eval_steps 500 \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    --include_num_input_tokens_seen True \
    --prediction_loss_only True \
    --report_to "${REPORT_TO:-tensorboard}" \
    "$@"
