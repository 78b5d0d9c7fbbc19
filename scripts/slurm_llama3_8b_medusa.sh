#!/bin/sh
# scripts/llama3_8b_medusa.sh under SLURM, on one node or several; its flags and variables work here too.
#
#   sbatch scripts/slurm_llama3_8b_medusa.sh --medusa_only_heads False    from the repository's root
#   sbatch --nodes=4 --time=48:00:00 scripts/slurm_llama3_8b_medusa.sh    sbatch's own options come first, and win
#   MODEL=... sbatch scripts/slurm_llama3_8b_medusa.sh --resume_from_checkpoint True
#
# OUTPUT_DIR must be a directory that all nodes share.
#SBATCH --job-name=medusa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -eu

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: this is not a SLURM job: start it with sbatch $0, or without SLURM scripts/llama3_8b_medusa.sh" >&2
    exit 1
fi
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy that is elsewhere
if [ ! -f scripts/llama3_8b_medusa.sh ]; then
    echo "error: submit it from the repository's root: $PWD has no scripts/llama3_8b_medusa.sh" >&2
    exit 1
fi

MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" # two jobs of one node must not meet
export MASTER_ADDR MASTER_PORT

. scripts/setup.sh # here, on the first node, so that the nodes do not all make .venv at once

# One task a node, which starts a process per GPU. srun does not inherit --cpus-per-task, and without
# --kill-on-bad-exit the other nodes would wait for one that failed.
exec srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    bash scripts/llama3_8b_medusa.sh "$@"
