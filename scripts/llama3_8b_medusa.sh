#!/bin/sh
# Medusa heads for LLaMA-3-8B-Instruct: on one GPU, on several, on several nodes.
#
#   bash scripts/llama3_8b_medusa.sh                              stage 1, 5 heads
#   bash scripts/llama3_8b_medusa.sh --medusa_num_heads 3         flags are appended to those below, and win
#   bash scripts/llama3_8b_medusa.sh --medusa_only_heads False    stage 2: the backbone trains too
#   MODEL=... DATA_PATH=my_chats.jsonl OUTPUT_DIR=... NUM_GPUS=2 bash scripts/llama3_8b_medusa.sh
#   CONFIG=configs/fsdp1.yaml bash scripts/llama3_8b_medusa.sh    how accelerate launches it; configs/ has five ways
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=first-node MASTER_PORT=29500 bash scripts/llama3_8b_medusa.sh
#       on the first of two nodes, with NODE_RANK=1 on the second; under SLURM: scripts/slurm_llama3_8b_medusa.sh
#
# Memory: 16 bytes a trained weight (fp32 weight, gradient and two Adam moments), 2 a frozen one (bf16).
#   stage 1, one GPU    8.0 B x 2 = 16 GB, and for each head 0.54 B x 16 = 8.7 GB: 5 heads 60 GB, 3 heads 43 GB, and
#                       some for a batch. --dtype bfloat16 halves the heads' part.
#   N GPUs of a node    each has 1/N of it and about 4 GB more in stage 1; in stage 2, where all 171 GB are of trained
#                       weights, about 3 to 13 GB more. Nodes hold copies of one another.
set -eu
cd "$(dirname "$0")/.."

. scripts/gpus.sh

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
        ;;
    *) fail "--medusa_only_heads $STAGE1 is neither True nor False" ;;
esac
OUTPUT_DIR="${OUTPUT_DIR:-out/llama3_8b_medusa_stage$STAGE}"

find_gpus
if [ "$NUM_GPUS" -lt 1 ]; then
    fail "no NVIDIA GPU found (nvidia-smi -L lists none), and an 8B model needs one of 80 GB for 5 heads." \
        "Without a GPU try: bash scripts/quickstart.sh"
elif [ "$FOUND" -gt 0 ] && [ "$NUM_GPUS" -gt "$FOUND" ]; then
    fail "NUM_GPUS is $NUM_GPUS, but there are only $FOUND (nvidia-smi -L, CUDA_VISIBLE_DEVICES)"
fi

NUM_NODES="${NUM_NODES:-${SLURM_NNODES:-1}}"
need_number NUM_NODES "$NUM_NODES"
MASTER_PORT="${MASTER_PORT:-29500}"
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

if [ -z "${CONFIG:-}" ]; then
    case "$NUM_NODES,$NUM_GPUS" in
        1,1) CONFIG=configs/single_gpu.yaml ;;
        1,* | *,1) CONFIG=configs/fsdp2.yaml ;; # nodes of one GPU have nothing to shard inside, so over all of them
        *) CONFIG=configs/fsdp2_multi_node.yaml ;;
    esac
fi
[ -f "$CONFIG" ] || fail "there is no file CONFIG=$CONFIG (from $PWD)"
SIZES= # a file of your own keeps its own
case "$CONFIG" in
    *fsdp2_multi_node.yaml)
        SIZES="--parallelism_config_dp_replicate_size $NUM_NODES --parallelism_config_dp_shard_size $NUM_GPUS"
        ;;
esac
if [ "$STAGE,$NUM_NODES,$NUM_GPUS" = 2,1,1 ]; then
    echo "note: stage 2 of LLaMA-3-8B with 5 heads keeps 16 bytes a weight, (8.0 + 5 x 0.54) B x 16 = 171 GB, more" \
        "than one GPU has. Use several: FSDP leaves each of them 171 GB / GPUs plus about 3 to 13 GB, so at least 4" \
        "of 80 GB. A smaller MODEL= may fit into one." >&2
fi

# --quiet: where one process fails, no second traceback, of the launcher.
# shellcheck disable=SC2086  # SIZES is several words, or none
exec "$PYTHON" -m accelerate.commands.launch --quiet --config_file "$CONFIG" $SIZES \
    --num_machines "$NUM_NODES" --num_processes $((NUM_NODES * NUM_GPUS)) --machine_rank "$NODE_RANK" \
    --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$MASTER_PORT" \
    train.py \
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
