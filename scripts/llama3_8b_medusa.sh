#!/bin/sh
# Medusa heads for LLaMA-3-8B-Instruct: on one GPU, on several, on several nodes.
#
#   bash scripts/llama3_8b_medusa.sh                              stage 1, 5 heads
#   bash scripts/llama3_8b_medusa.sh --medusa_only_heads False    stage 2: the backbone trains too
#   bash scripts/llama3_8b_medusa.sh --medusa_num_heads 3         flags are appended to those below, and win
#   bash scripts/llama3_8b_medusa.sh --medusa_head_type hydra --medusa_prefix_layer True
#                                     23 % more tokens per pass on SmolLM2, in this repository alone (docs/heads.md);
#                                     the default is what other programs load (docs/engines.md)
#   MODEL=... DATA_PATH=my_chats.jsonl OUTPUT_DIR=... NUM_GPUS=2 bash scripts/llama3_8b_medusa.sh
#
# It makes .venv the first time (VENV=none: the Python that is active) and takes the variables of scripts/launch.sh,
# which has GPUs and nodes. Several nodes: run `bash scripts/setup.sh` on one of them before. SLURM: sbatch
# scripts/slurm_llama3_8b_medusa.sh.
#
# Memory: before anything is loaded, train.py --plan says what each GPU will hold. If that does not fit, the script ends
# with the flags that would make it fit (PLAN=no: it starts all the same). One GPU of 80 GB holds stage 1 with 5 heads,
# four hold stage 2. docs/distributed.md has the arithmetic.
# Batch: 4 conversations per GPU at once, 4 times before an optimiser step: 16 x GPUs conversations a step.
# Learning rates: train.py chooses them by the stage. Stage 1: 1e-3. Stage 2: 1e-5 for the backbone, 5e-4 for the heads.
# They end linearly after a short warm-up: the best of the recipes tried (docs/log.md).
# Time: stage 1 with 5 heads does 18,580 tokens/s on one H100 (docs/performance.md), 67 million an hour.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh
find_machines
. scripts/setup.sh

set -- \
    --model_name_or_path "${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}" \
    --data_path "${DATA_PATH:-Aeala/ShareGPT_Vicuna_unfiltered}" \
    --eval_holdout "${EVAL_HOLDOUT:-500}" \
    --output_dir "${OUTPUT_DIR:-out/llama3_8b_medusa_stage{stage\}}" \
    --model_max_length "${MAX_LENGTH:-2048}" \
    --medusa_num_heads 5 \
    --medusa_num_layers 1 \
    --medusa_only_heads True \
    --medusa_heads_coefficient 0.2 \
    --medusa_decay_coefficient 0.8 \
    --medusa_scheduler constant \
    --bf16 True \
    --use_liger True \
    --num_train_epochs "${EPOCHS:-1}" \
    --per_device_train_batch_size "${BATCH_SIZE:-4}" \
    --per_device_eval_batch_size "${BATCH_SIZE:-4}" \
    --gradient_accumulation_steps "${ACCUMULATION:-4}" \
    --gradient_checkpointing True \
    --lr_scheduler_type linear \
    --warmup_steps 0.02 \
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
    ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} \
    ${LR_MULTIPLIER:+--medusa_lr_multiplier "$LR_MULTIPLIER"} \
    "$@"
plan train.py "$@"
launch train.py "$@"
