"""Peak memory of one of N GPUs, measured on a single one: the real trainer under a fake process group.

    python benchmark/memory.py --world_size 8 --stage 1 --out benchmark/results/memory.csv

The process believes it is rank 0 of N: weights, gradients and Adam's moments are its shard, every buffer that FSDP
allocates is allocated, but collectives move nothing. So numbers (losses) mean nothing, times leave communication out,
and NCCL's own buffers (about 1 GiB, by its settings) come on top. LLaMA-3-8B shapes, no weights needed.

One run trains three optimiser steps at each length and reports the peak of the last two; the first one makes Adam's
moments. An out-of-memory error is a row too, and ends the run.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import accelerate
import liger_kernel  # noqa: F401  (fail here, not after minutes)
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, TrainerCallback

from arguments import TrainingArguments
from backbone import empty_backbone
from batches import Collator
from callback import GIB
from medusa_model import MedusaConfig, MedusaModel
from medusa_trainer import MedusaTrainer

STEPS = 3  # per length
LLAMA3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA3_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
TINY = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072}


def become_rank_0_of(world_size: int, fsdp_version: int):
    """What accelerate launch would have set, and a process group that answers at once."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(fsdp_version)}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_USE_ORIG_PARAMS": "true"}
    os.environ |= {
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(fsdp_version == 2).lower(),
        "FSDP_SYNC_MODULE_STATES": "false",
    }
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


class FakeRanksTrainer(MedusaTrainer):
    def _stop_if_not_finite(self):
        """Gathered weights are whatever was in memory, so a NaN says nothing."""


class PeakPerStep(TrainerCallback):
    """Peak and resting bytes of every step on `device` (on a CPU: 0)."""

    def __init__(self, device: torch.device):
        self.cuda, self.steps = device.type == "cuda", []

    def on_step_begin(self, *args, **kwargs):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *args, **kwargs):
        figures = (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated) if self.cuda else ()
        self.steps.append([figure() / GIB for figure in figures] or [0.0, 0.0])


def build_trainer(options) -> MedusaTrainer:
    stage_1 = options.stage == 1
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        medusa_only_heads=stage_1,
        bf16=True,
        per_device_train_batch_size=options.batch_size,
        max_steps=STEPS * len(options.lengths),
        gradient_checkpointing=not stage_1,
        offload_activations=options.offload_activations,
        train_sampling_strategy="sequential",
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
    )
    config = LlamaConfig(**(TINY if options.tiny else LLAMA3_8B), tie_word_embeddings=False)
    backbone = empty_backbone(config, torch.bfloat16 if stage_1 else torch.float32)
    heads = MedusaConfig(medusa_num_heads=options.heads, medusa_num_layers=1)
    model = MedusaModel.from_backbone(backbone, heads, dtype=torch.float32, fill=False)
    if stage_1:
        model.freeze_backbone()
    model.choose_kernels(options.impl != "torch", args.device)
    rows = []
    for length in options.lengths:  # every token but the first is a row
        tokens = (list(range(100, 200)) * (length // 100 + 1))[:length]
        rows += [{"input_ids": tokens, "labels": tokens}] * (STEPS * options.batch_size * options.world_size)
    return FakeRanksTrainer(model=model, args=args, train_dataset=rows, data_collator=Collator(0))


def measure(options) -> list[dict]:
    """One row per length; the length at which memory ran out is the last one."""
    become_rank_0_of(options.world_size, options.fsdp)
    trainer = build_trainer(options)
    peaks = PeakPerStep(trainer.args.device)
    trainer.add_callback(peaks)
    problem = None
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        problem = "OOM"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    common = {
        "stage": options.stage,
        "heads": options.heads,
        "batch_size": options.batch_size,
        "world_size": options.world_size,
        "implementation": f"{trainer.medusa.loss_impl} fsdp{options.fsdp}"
        + (" offload" if options.offload_activations else ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}",
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown",
        "command": shlex.join(["python", "benchmark/memory.py", *sys.argv[1:]]),
    }
    rows = []
    for i, length in enumerate(options.lengths):
        steps = peaks.steps[STEPS * i + 1 : STEPS * (i + 1)]
        if len(steps) == STEPS - 1:
            peak, resting = (max(column) for column in zip(*steps, strict=True))
            rows.append({"length": length, "peak_gib": f"{peak:.2f}", "resting_gib": f"{resting:.2f}"} | common)
        elif problem:
            rows.append({"length": length, "peak_gib": problem, "resting_gib": ""} | common)
            break
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world_size", type=int, default=8)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4, help="conversations per GPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2)
    parser.add_argument("--impl", choices=("liger", "torch"), default="liger", help="torch: all logits of a head")
    parser.add_argument("--offload_activations", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model of 30,000 weights, to try the script itself")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    rows = measure(options)
    for row in rows:
        print(f"stage {row['stage']}, {row['heads']} heads, length {row['length']}: {row['peak_gib']} GiB", flush=True)
    if options.out:
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
