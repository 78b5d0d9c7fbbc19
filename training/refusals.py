"""Refuses combinations of flags that cannot work: each in one sentence, before anything loads."""

import math
import os
import re

from accelerate.utils import parse_flag_from_env
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from common.errors import BadInput
from conversations.sources import is_share_or_number
from training.part_refusals import about_bits, about_lora, about_plan, about_states

RENAMED = {  # flags of older transformers, which the parser would only call unknown
    "--warmup_ratio": "--warmup_steps 0.1 (a value below 1 is a ratio)",
    "--evaluation_strategy": "--eval_strategy",
    "--group_by_length": "nothing: batches are grouped by length already",
    "--overwrite_output_dir": "--resume_from_checkpoint True, or another --output_dir",
    "--torch_dtype": "--dtype",
    "--fp16": "--bf16",
    "--use_liger_kernel": "--use_liger",
    "--deepspeed": "FSDP through accelerate launch",
}


def refuse_renamed(argv: list[str]):
    """Raises BadInput for a flag that has another name today."""
    for word in argv:
        old = "--" + word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and old in RENAMED:
            raise BadInput(f"{old} is not supported here; use {RENAMED[old]}")


def refuse(model, data, training):
    """Raises BadInput with the first sentence that applies. The three are the dataclasses of training/arguments.py."""
    stage_1, heads = training.medusa_only_heads, model.medusa_num_heads
    recomputed = training.gradient_checkpointing_layers
    recomputes = training.gradient_checkpointing and not stage_1  # a frozen backbone keeps nothing to recompute
    without = "and --medusa_return False has none"
    to_whom = "" if data.states_path is None else " where the states are stored (store_states.py)"
    refusals = (
        # ---- the model ----
        (not model.model_name_or_path, "--model_name_or_path is empty"),
        (heads < 1, f"--medusa_num_heads {heads}: at least 1; for plain fine-tuning use --medusa_return False"),
        (not 0 <= model.medusa_num_layers <= 100, f"--medusa_num_layers {model.medusa_num_layers}: from 0 to 100"),
        (
            model.medusa_head_type == "hydra" and model.medusa_num_layers == 0,
            "--medusa_num_layers 0: --medusa_head_type hydra needs 1, whose first ResBlock reads the tokens before",
        ),
        (
            model.medusa_rank is not None and model.medusa_rank < 1,
            f"--medusa_rank {model.medusa_rank}: at least 1",
        ),
        (
            model.medusa_head_type not in (None, "medusa") and not model.medusa_return,
            f"--medusa_head_type {model.medusa_head_type} is of heads, {without}",
        ),
        *(
            (not model.medusa_return and bool(getattr(model, name)), f"--{name} is of heads, {without}")
            for name in ("medusa_prefix_layer", "medusa_vocab_size")
        ),
        (
            not model.medusa_return and stage_1,
            "--medusa_return False trains the backbone alone; it cannot go with --medusa_only_heads True",
        ),
        (
            not model.medusa_return and model.medusa_heads_path is not None,
            "--medusa_heads_path goes with heads, not with --medusa_return False",
        ),
        (
            model.medusa_vocab_size is not None and model.medusa_vocab_size < 1,
            f"--medusa_vocab_size {model.medusa_vocab_size}: at least 1",
        ),
        (
            model.medusa_vocab_size is not None and data.lazy_preprocess and model.medusa_heads_path is None,
            "--medusa_vocab_size counts the labels before training, and --lazy_preprocess does not know them then",
        ),
        (
            model.chat_template is not None and not os.path.isfile(model.chat_template),
            f"there is no file --chat_template {model.chat_template}",
        ),
        (
            model.dtype == "bfloat16" and parse_flag_from_env("ACCELERATE_USE_FSDP"),
            "--dtype bfloat16 has no effect under FSDP, which keeps a shard of fp32 weights: leave it out",
        ),
        # ---- the data ----
        (
            data.model_max_length is not None and data.model_max_length < heads + 2,
            f"--model_max_length {data.model_max_length}: head {heads} looks {heads + 1} tokens ahead, so at least "
            f"{heads + 2}",
        ),
        (
            data.lazy_preprocess and data.packing,
            "--lazy_preprocess and --packing exclude each other: packing must know the lengths",
        ),
        (data.show_data < 0, f"--show_data {data.show_data}: 0 or more"),
        *about_states(model, data, training),
        *about_lora(training),
        *about_plan(training),
        *about_conversations(data),
        (
            training.eval_strategy != "no" and not data.evaluates,
            f"--eval_strategy asks for evaluation: add --eval_data_path, --eval_split or --eval_holdout{to_whom}",
        ),
        (
            bool(training.do_eval) and not data.evaluates,
            f"--do_eval asks for evaluation: add --eval_data_path, --eval_split or --eval_holdout{to_whom}",
        ),
        (
            training.load_best_model_at_end
            and training.eval_strategy == training.save_strategy == "steps"
            and training.eval_steps != training.save_steps,
            "--load_best_model_at_end needs a checkpoint of each evaluation: give --save_steps and --eval_steps the "
            "same value",
        ),
        # ---- steps ----
        *about_steps(model, training),
        # ---- the loss ----
        (
            training.medusa_loss != "ce" and not model.medusa_return,
            f"--medusa_loss {training.medusa_loss} is a loss of heads, and --medusa_return False has none",
        ),
        (
            training.medusa_rows == "all" and (training.medusa_loss == "ce" or not stage_1),
            "--medusa_rows all needs a teacher and a frozen backbone: --medusa_loss kl or lk, in stage 1",
        ),
        (
            training.medusa_heads_coefficient == 0 and stage_1,
            "--medusa_heads_coefficient 0 with --medusa_only_heads True would train nothing",
        ),
        (
            training.label_smoothing_factor != 0,
            "--label_smoothing_factor is not supported: the fused loss of the heads has none",
        ),
        (
            training.neftune_noise_alpha is not None and stage_1,
            "--neftune_noise_alpha does nothing to a frozen backbone: leave it out in stage 1",
        ),
        # ---- memory and speed ----
        *about_bits(training),
        (
            training.offload_activations and not recomputes,
            "--offload_activations keeps what --gradient_checkpointing True of stage 2 leaves: use it with that",
        ),
        (
            recomputed is not None and not recomputes,
            "--gradient_checkpointing_layers goes with --gradient_checkpointing True in stage 2",
        ),
        (
            recomputed is not None and recomputed < 1,
            f"--gradient_checkpointing_layers {recomputed}: at least 1; to recompute nothing use "
            "--gradient_checkpointing False",
        ),
        (
            recomputed is not None and training.offload_activations,
            "--offload_activations keeps layer inputs only: leave --gradient_checkpointing_layers out",
        ),
        (
            training.torch_compile,
            "--torch_compile is not supported: the heads run one after the other, outside the model's forward",
        ),
        # ---- flags of the Trainer that this one does not follow ----
        (training.torch_empty_cache_steps is not None, "--torch_empty_cache_steps is not supported"),
        (
            training.bf16_full_eval or training.fp16_full_eval,
            "--bf16_full_eval and --fp16_full_eval are not supported: evaluation computes as training does",
        ),
        (
            training.push_to_hub and training.hub_strategy != "end",
            "--push_to_hub uploads the finished directory only: use --hub_strategy end",
        ),
    )
    refuse_first(refusals)


def refuse_first(refusals):
    """Raises BadInput with the first sentence of (applies, sentence) that applies."""
    for applies, sentence in refusals:
        if applies:
            raise BadInput(sentence)


def about_conversations(data) -> tuple:
    """Refusals that train.py and store_states.py share."""
    return (
        (not data.data_path and data.states_path is None, "--data_path is missing: the conversations"),
        (
            data.eval_split == (data.train_split or "train") and data.eval_data_path is None,
            f"--eval_split {data.eval_split} is what is trained on: hold some of it out with --eval_holdout",
        ),
        (
            not is_share_or_number(data.eval_holdout),
            f"--eval_holdout {data.eval_holdout:g}: a share below 1, or a number of conversations",
        ),
        (
            data.eval_holdout != 0 and (data.eval_data_path is not None or data.eval_split is not None),
            "--eval_holdout excludes --eval_data_path and --eval_split: evaluate on one of them",
        ),
    )


def install(name: str) -> str:
    """What to do about a tracker that transformers does not find."""
    if name not in INTEGRATION_TO_CALLBACK:
        return f"transformers knows {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
    where = "-r requirements-wandb.txt" if name == "wandb" else name.replace("_ml", "-ml")
    return f"its package is not installed: pip install {where}"


def about_steps(model, training) -> tuple:
    """Refusals of numbers that would train nothing, or end in a library's error long after the start."""
    at_least = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "learning_rate": 0,
        "medusa_lr_multiplier": 0,
        "medusa_heads_coefficient": 0,
        "medusa_decay_coefficient": 0,
        "weight_decay": 0,
        "adam_epsilon": 0,
        "max_grad_norm": 0,
        "warmup_steps": 0,
    }
    numbers = {name: (getattr(training, name), least) for name, least in at_least.items()}
    metric = training.metric_for_best_model
    measured = re.fullmatch(r"(?:eval_)?(?:loss|head_(\d{1,9})_(?:loss|top1))", metric or "loss")
    missing = [name for name in training.report_to if name not in get_available_reporting_integrations()]
    return (
        *(
            (not least <= number < math.inf, f"--{name} {number:g}: {least} or more")
            for name, (number, least) in numbers.items()
            if number is not None
        ),
        *(
            (not 0 <= getattr(training, name) < 1, f"--{name} {getattr(training, name):g}: at least 0, and below 1")
            for name in ("adam_beta1", "adam_beta2")
        ),
        (
            training.max_steps <= 0 and not 0 < training.num_train_epochs < math.inf,
            f"--num_train_epochs {training.num_train_epochs:g} trains nothing: more than 0, or give --max_steps",
        ),
        (
            training.eval_steps is not None and not 0 < training.eval_steps < math.inf,
            f"--eval_steps {training.eval_steps}: more than 0",
        ),
        (not 0 < training.save_steps < math.inf, f"--save_steps {training.save_steps:g}: more than 0"),
        (
            measured is None or int(measured[1] or 0) > model.num_heads,
            f"--metric_for_best_model {metric} is not measured: loss, and head_k_loss and head_k_top1 of heads 0 to "
            f"{model.num_heads} are",
        ),
        (
            training.dataloader_num_workers > (os.cpu_count() or 1),
            f"--dataloader_num_workers {training.dataloader_num_workers}: the machine has {os.cpu_count()} processors",
        ),
        *(
            (
                bool(getattr(training, name)) and training.dataloader_num_workers == 0,
                f"--{name} is for workers that load data: give --dataloader_num_workers 1 or more",
            )
            for name in (
                f"dataloader_{what}" for what in ("persistent_workers", "prefetch_factor", "multiprocessing_context")
            )
        ),
        *(
            (
                isinstance(getattr(training, name, None), str),
                f"--{name} {getattr(training, name, '')} is no JSON object",
            )
            for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
        ),
        *((True, f"--report_to {name}: {install(name)}") for name in missing),
    )
