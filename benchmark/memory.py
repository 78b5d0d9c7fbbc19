"""Peak memory of one of N GPUs, measured on a single one: the real trainer under a fake process group.

    python benchmark/memory.py --world_size 8 --stage 1 --out benchmark/results/memory.csv

The process believes it is rank 0 of N: weights, gradients and Adam's moments are its shard, every buffer that FSDP
allocates is allocated, but collectives move nothing. So numbers (losses) mean nothing, times leave communication out,
and NCCL's own buffers (about 1 GiB, by its settings) come on top. LLaMA-3-8B shapes, no weights needed.

Each implementation (benchmark/common.py) with each number of heads trains two optimiser steps at each length in turn.
A row has the peak of the last step at its length, in GiB, and what is held between steps: the first step of all makes
Adam's moments. Where memory runs out, the row says OOM, and the next combination follows.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path

import torch
from common import IMPLEMENTATIONS, append, choose_implementation, origin, random_rows, set_sizes, trainer_class
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, TrainerCallback

from arguments import TrainingArguments
from backbone import empty_backbone
from batches import Collator
from callback import GIB
from medusa_model import MedusaConfig, MedusaModel
from medusa_trainer import MedusaTrainer

STEPS = 2  # per length


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


class LastStepOfEachLength(TrainerCallback):
    """Calls `report` with the step's peak and what is left after it, in GiB (on a CPU: 0)."""

    def __init__(self, report):
        self.report = report

    def on_step_begin(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % STEPS == 0:
            figures = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            self.report(*(f"{figure / GIB:.2f}" for figure in figures))


def build_trainer(options, implementation: str, heads: int, directory: str) -> MedusaTrainer:
    stage_1 = options.stage == 1
    args = TrainingArguments(
        output_dir=directory,
        medusa_only_heads=stage_1,
        bf16=True,
        per_device_train_batch_size=options.batch_size,
        max_steps=STEPS * len(options.lengths),
        gradient_checkpointing=not stage_1,
        offload_activations=options.offload_activations,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    backbone = empty_backbone(LlamaConfig(**options.shape), torch.bfloat16 if stage_1 else torch.float32)
    config = MedusaConfig(medusa_num_heads=heads)
    model = MedusaModel.from_backbone(backbone, config, dtype=torch.float32, fill=False)
    if stage_1:
        model.freeze_backbone()
    choose_implementation(model, implementation, args.device)
    rows = []
    for length in options.lengths:
        rows += random_rows(options.shape, length, 1) * (STEPS * options.batch_size * options.world_size)
    trainer = trainer_class(implementation)(model=model, args=args, train_dataset=rows, data_collator=Collator(0))
    trainer._stop_if_not_finite = lambda: None  # gathered weights are whatever was in memory: a NaN says nothing
    return trainer


def measure(options, implementation: str, heads: int, source: dict):
    """Writes one row after the other; the length at which memory ran out is the last one. source: `origin()`."""
    lengths = iter(options.lengths)

    def report(peak: str, resting: str):
        row = {"stage": options.stage, "heads": heads, "batch_size": options.batch_size}
        row |= {"world_size": options.world_size, "length": next(lengths), "implementation": implementation}
        row["options"] = f"fsdp{options.fsdp}" + " offload" * options.offload_activations
        row |= {"peak_gib": peak, "resting_gib": resting} | source
        print(*(f"{key} {value}" for key, value in row.items() if key not in source), sep=", ", flush=True)
        if options.out:
            append(options.out, row)

    with tempfile.TemporaryDirectory() as directory:
        try:
            trainer = build_trainer(options, implementation, heads, directory)
            trainer.add_callback(LastStepOfEachLength(report))
            trainer.train()
        except torch.OutOfMemoryError:
            report("OOM", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world_size", type=int, default=8)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--batch_size", type=int, default=4, help="conversations per GPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1024 2048 4096 8192; --smoke: 32 64")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2)
    parser.add_argument("--offload_activations", action="store_true", help="with --implementations ours only")
    parser.add_argument("--limit_gib", type=float, help="memory runs out here: a larger GPU stands for a smaller one")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    set_sizes(options)
    if options.offload_activations and options.implementations != ["ours"]:
        parser.error("--offload_activations works with one head after the other: add --implementations ours")
    if options.smoke and not torch.cuda.is_available():
        from tests.worker import allow_fsdp_on_cpu  # accelerate by itself would not shard there

        allow_fsdp_on_cpu()
    become_rank_0_of(options.world_size, options.fsdp)
    if options.limit_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.limit_gib * GIB / total, 0)
    source = origin()
    # hf first: Liger's kernels stay in transformers, for every model that is made after them.
    for implementation in sorted(options.implementations, key=IMPLEMENTATIONS.index):
        for heads in options.heads:
            measure(options, implementation, heads, source)
            gc.collect()  # a trainer and its model point at each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
