"""Refusals of one part each of train.py, for training/refusals.py: (applies, sentence)."""

import math

from model.bits import PACKAGES
from training.fsdp import shards_by_version_1
from training.lora_arguments import NAMES


def about_lora(training) -> tuple:
    """Refusals of adapters, and of their flags where there are none."""
    rank, dropout, alpha = training.lora_rank, training.lora_dropout, training.lora_alpha
    if rank is None:
        given = [name for name in NAMES[1:] if getattr(training, name) is not None]
        return ((bool(given), f"--{given[0] if given else ''} is of adapters: it goes with --lora_rank, in stage 2"),)
    return (
        (
            training.medusa_only_heads,
            "--lora_rank adapts the backbone, and --medusa_only_heads True (stage 1) freezes it: leave one out",
        ),
        (rank < 1, f"--lora_rank {rank}: at least 1"),
        (alpha is not None and alpha < 1, f"--lora_alpha {alpha}: at least 1"),
        (dropout is not None and not 0 <= dropout < 1, f"--lora_dropout {dropout}: at least 0, and below 1"),
        (
            training.preserve_coefficient is not None and not 0 <= training.preserve_coefficient < math.inf,
            f"--preserve_coefficient {training.preserve_coefficient}: 0 or more",
        ),
        (shards_by_version_1(), "--lora_rank needs FSDP2: FSDP1 cannot keep weights that train with others in a unit"),
    )


def about_plan(training) -> tuple:
    """Refusals of the flags of --plan."""
    given = [name for name in ("plan_gpus", "plan_gib") if getattr(training, name) is not None]
    return (
        (bool(given) and not training.plan, f"--{given[0] if given else ''} goes with --plan"),
        *(
            (not 0 < getattr(training, name) < math.inf, f"--{name} {getattr(training, name):g}: more than 0")
            for name in given
        ),
    )


def about_bits(training) -> tuple:
    """Refusals of a backbone in few bits."""
    bits, flag = training.bits, f"--backbone_dtype {training.bits}"
    frozen, old = training.medusa_only_heads, training.fp8_backbone
    return (
        (
            old and training.backbone_dtype not in (None, "fp8"),
            f"--fp8_backbone is --backbone_dtype fp8, and not {training.backbone_dtype}: leave one of them out",
        ),
        (
            training.backbone_dtype == "bfloat16" and not training.bf16,
            "--backbone_dtype bfloat16 goes with --bf16 True",
        ),
        (
            bits == "fp8" and not frozen,
            f"{flag} is for a backbone that is frozen: it goes with --medusa_only_heads True (stage 1)",
        ),
        (
            bits is not None and not frozen and training.lora_rank is None,
            f"{flag} is for a backbone whose weights do not train: --medusa_only_heads True (stage 1), or --lora_rank",
        ),
        (bits == "fp8" and not training.bf16, f"{flag} goes with --bf16 True: what is not a product stays in bf16"),
        (
            bits in PACKAGES and shards_by_version_1(),
            f"{flag} needs FSDP2: FSDP1 makes one flat weight of a layer's, and these are of several dtypes",
        ),
    )


def about_states(model, data, training) -> tuple:
    """Refusals of --states_path: what was decided when the states were stored, and what needs the layers."""
    if data.states_path is None:
        return ()
    names = ("data_path", "eval_data_path", "dataset_config", "train_split", "eval_split", "eval_holdout")
    decided = [f"--{name}" for name in names if getattr(data, name)]
    needs = "--medusa_only_heads True (stage 1): stage 2 trains the backbone, and its states change"
    return (
        (not training.medusa_only_heads, f"--states_path goes with {needs}"),
        (
            bool(decided),
            f"--states_path has its conversations already, chosen when they were stored: leave out "
            f"{' and '.join(decided)}",
        ),
        (
            training.bits is not None,
            f"--backbone_dtype {training.bits} does nothing with --states_path: no layer of the backbone runs; it "
            "goes to store_states.py",
        ),
        (data.lazy_preprocess, "--lazy_preprocess does nothing with --states_path: the rows are tokens already"),
        (data.packing, "--packing does nothing with --states_path: heads drop padding, and no attention runs"),
    )
