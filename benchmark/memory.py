"""Peak memory of one of N GPUs: measured on a single GPU in a fake process group, or on all N, with their speed.

    python benchmark/memory.py --world_size 8 --stage 1 --out benchmark/results/memory.csv
    accelerate launch --config_file configs/fsdp2.yaml --num_processes 8 benchmark/memory.py --stage 1 --out real.csv

The first command runs one process that believes it is rank 0 of N. It holds its shard of weights, gradients and Adam's
moments, and every buffer that FSDP allocates, but collectives move nothing. So losses mean nothing, and there are
no times. NCCL's own buffers (about 1 GiB, by its settings) come on top. LLaMA-3-8B shapes; no weights are needed.

The second command runs a real group. Each rank fills its shards with random weights. The peak is the highest of all
ranks; tokens_per_s is of all GPUs together; useful_tflops and mfu are per GPU. The launcher decides on FSDP1 or 2.

Each implementation (benchmark/setting.py) with each number of heads trains at each length in turn: two optimiser
steps, or in a real group eight. A row has the peak of the last step at its length (real group: of the last four), and
what is held between steps, in GiB. The very first step makes Adam's moments, so it does not count. Where memory runs
out, the row says OOM and the next combination follows. A real group ends there, since other ranks may wait for the one
without memory; if that was not rank 0, the row is missing.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path

import torch
from accelerate.utils import gather_object
from setting import (
    IMPLEMENTATIONS,
    append,
    choose_implementation,
    draft_tokens,
    origin,
    random_rows,
    set_sizes,
    trainer_class,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, TrainerCallback

from callback import GIB, EfficiencyCallback, FlopCount
from conversations.batches import Collator
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import empty_backbone
from training.arguments import TrainingArguments
from training.fsdp import local
from training.trainer import MedusaTrainer

STEPS, REAL_STEPS, TIMED = 2, 8, 4  # per length
SPEED = ("step_time_s", "tokens_per_s", "useful_tflops", "mfu")


def become_rank_0_of(world_size: int, fsdp_version: int):
    """Sets what accelerate launch would have set, and makes a process group whose collectives move nothing."""
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
    """Calls `report` with the last step's peak and what is held after it, in GiB (on a CPU: 0)."""

    def __init__(self, report):
        self.report = report

    def on_step_begin(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % STEPS == 0:
            figures = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            self.report(*(f"{figure / GIB:.2f}" for figure in figures))


class RealSteps(TrainerCallback):
    """The same in a real group: after the timed steps of each length, with the figures EfficiencyCallback logs."""

    def __init__(self, report):
        self.report = report

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():  # products of zeros would be faster
            for name, parameter in model.named_parameters():
                local(parameter).fill_(1.0) if "norm" in name else local(parameter).normal_(std=0.02)

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available() and state.global_step % REAL_STEPS == REAL_STEPS - TIMED:
            torch.cuda.reset_peak_memory_stats()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "step_time_s" in logs and state.global_step % REAL_STEPS == 0:
            mine = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_allocated() / GIB
            peak, resting = (max(of_all) for of_all in zip(*gather_object([mine]), strict=True))
            self.report(f"{peak:.2f}", f"{resting:.2f}", logs)


def build_trainer(options, implementation: str, heads: int, directory: str) -> MedusaTrainer:
    stage_1 = options.stage == 1
    args = TrainingArguments(
        output_dir=directory,
        medusa_only_heads=stage_1,
        bf16=True,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps * len(options.lengths),
        gradient_checkpointing=not stage_1,
        offload_activations=options.offload_activations,
        train_sampling_strategy="sequential",
        logging_strategy="steps" if options.real else "no",
        logging_steps=TIMED,
        save_strategy="no",
        report_to="none",
    )
    backbone = empty_backbone(LlamaConfig(**options.shape), torch.bfloat16 if stage_1 else torch.float32)
    config = MedusaConfig(medusa_num_heads=heads)
    tokens = draft_tokens(options.shape, options.medusa_vocab_size)
    model = MedusaModel.from_backbone(backbone, config, dtype=torch.float32, fill=False, token_map=tokens)
    if stage_1:
        model.freeze_backbone()
    choose_implementation(model, implementation, args.device)
    rows = []
    for length in options.lengths:
        row = random_rows(options.shape, length, 1, options.medusa_vocab_size)
        rows += row * (options.steps * options.batch_size * options.world_size)
    meter = None
    if options.real:
        meter = EfficiencyCallback(FlopCount.of(model), args.device, world_size=options.world_size)
    trainer = trainer_class(implementation)(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collator(0),
        meter=meter,
    )
    trainer.judge = lambda: None  # type: ignore[method-assign]  # weights come later (RealSteps), or never
    if not options.real:
        # Gathered weights are whatever was in memory, so a NaN says nothing.
        trainer._stop_if_not_finite = lambda: None  # type: ignore[method-assign]  # for this instance only
    return trainer


def measure(options, implementation: str, heads: int, source: dict):
    """Writes a row per length, up to the length at which memory runs out. source: `origin()`."""
    lengths = iter(options.lengths)

    def report(peak: str, resting: str, logs: dict | None = None):
        if int(os.environ["RANK"]) > 0:
            return
        row = {"stage": options.stage, "heads": heads, "batch_size": options.batch_size}
        row |= {"world_size": options.world_size, "length": next(lengths), "implementation": implementation}
        row["medusa_vocab_size"] = options.medusa_vocab_size or ""
        row["options"] = f"fsdp{options.fsdp}" + " offload" * options.offload_activations
        row |= {"group": "real" if options.real else "fake", "peak_gib": peak, "resting_gib": resting}
        row |= {key: f"{logs[key]:.5g}" if logs and key in logs else "" for key in SPEED} | source
        print(*(f"{key} {value}" for key, value in row.items() if key not in source), sep=", ", flush=True)
        if options.out:
            append(options.out, row)

    with tempfile.TemporaryDirectory() as directory:
        try:
            trainer = build_trainer(options, implementation, heads, directory)
            trainer.add_callback((RealSteps if options.real else LastStepOfEachLength)(report))
            trainer.train()
        except torch.OutOfMemoryError:
            report("OOM", "")
            if options.real:
                raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world_size", type=int, default=8, help="where it is simulated")
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--batch_size", type=int, default=4, help="conversations per GPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1024 2048 4096 8192; --smoke: 32 64")
    parser.add_argument("--medusa_vocab_size", type=int, help="heads guess so many tokens (default: all)")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2, help="where it is simulated")
    parser.add_argument("--offload_activations", action="store_true", help="with --implementations ours only")
    parser.add_argument("--limit_gib", type=float, help="memory runs out here: a larger GPU stands for a smaller one")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    set_sizes(options)
    if options.offload_activations and options.implementations != ["ours"]:
        parser.error("--offload_activations works with one head after the other: add --implementations ours")
    if options.smoke and not torch.cuda.is_available():
        from tests.fsdp_on_cpu import allow_fsdp_on_cpu  # accelerate by itself would not shard there

        allow_fsdp_on_cpu()
    options.real = "LOCAL_RANK" in os.environ  # accelerate launch started this process, as one of a group
    options.steps = REAL_STEPS if options.real else STEPS
    if options.real and "FSDP_VERSION" not in os.environ:
        parser.error("under accelerate launch give a configuration with FSDP, such as configs/fsdp2.yaml")
    if options.real:
        options.world_size, options.fsdp = int(os.environ["WORLD_SIZE"]), int(os.environ["FSDP_VERSION"])
    else:
        become_rank_0_of(options.world_size, options.fsdp)
    if options.limit_gib:
        device = int(os.environ["LOCAL_RANK"])
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.limit_gib * GIB / total, device)
    source = origin()
    # hf first: Liger's kernels stay in transformers, for every later model.
    for implementation in sorted(options.implementations, key=IMPLEMENTATIONS.index):
        for heads in options.heads:
            measure(options, implementation, heads, source)
            gc.collect()  # a trainer and its model point at each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
