"""The command line of train.py: every flag, its meaning, and which combinations cannot work."""

import os
from dataclasses import dataclass, field

import torch
import transformers

from errors import BadInput


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The backbone: a Hub id or a local directory."})
    medusa_num_heads: int = field(default=5, metadata={"help": "K: head k predicts the token at t + k + 1."})
    medusa_num_layers: int = field(default=1, metadata={"help": "ResBlocks per head; 0 is a projection alone."})
    medusa_heads_path: str | None = field(
        default=None,
        metadata={"help": "Start from these trained heads (a stage 1 output_dir): for stage 2, or more of stage 1."},
    )
    medusa_return: bool = field(
        default=True,
        metadata={"help": "False: no heads. Fine-tunes the backbone through the same data and loss, to compare with."},
    )
    use_liger: bool = field(
        default=True,
        metadata={
            "help": "Liger's Triton kernels: the fused head loss, and on a GPU RMSNorm, RoPE and SwiGLU of the "
            "backbone. False: plain torch with all logits of a head in memory, for comparison."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "What trainable weights and their Adam moments are kept in. bfloat16 halves their memory, but "
            "loses updates smaller than 1/256 of a weight. A frozen backbone is kept in bf16 under --bf16.",
            "choices": ["float32", "bfloat16"],
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Jinja file for a tokenizer that has no chat template (templates/ holds some)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code a model brings along. Read it first."}
    )


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "Conversations: a .json or .jsonl file, or a Hub dataset id."})
    eval_data_path: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    eval_holdout: float = field(
        default=0,
        metadata={"help": "Without --eval_data_path: hold out the last N conversations (a share if below 1)."},
    )
    model_max_length: int = field(default=2048, metadata={"help": "Longer conversations are cut to this many tokens."})
    packing: bool = field(
        default=False,
        metadata={"help": "Several conversations to a row of --model_max_length tokens, kept apart by the mask."},
    )
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "Tokenise when a batch is drawn, not before: starts at once, pads more."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and tokenised data are kept."})
    medusa_only_heads: bool = field(
        default=False,
        metadata={"help": "True: stage 1, the backbone is frozen. False: stage 2, everything trains together."},
    )
    medusa_heads_coefficient: float = field(
        default=0.2, metadata={"help": "lambda_0, the weight of the heads' losses next to the backbone's."}
    )
    medusa_decay_coefficient: float = field(
        default=0.8, metadata={"help": "Head k's loss is weighted with this to the power of k."}
    )
    medusa_scheduler: str = field(
        default="constant",
        metadata={
            "help": "lambda_0 over training: constant, or ramped up to its value as a line or a quarter sine.",
            "choices": ["constant", "linear", "sine"],
        },
    )
    medusa_lr_multiplier: float = field(
        default=1.0, metadata={"help": "The heads' learning rate over --learning_rate, which the backbone has."}
    )
    gradient_checkpointing_layers: int | None = field(
        default=None,
        metadata={
            "help": "Stage 2, with --gradient_checkpointing True: recompute only the first N decoder layers, and keep "
            "the activations of the others (default: recompute all). As few as memory allows is fastest."
        },
    )
    fp8_backbone: bool = field(
        default=False,
        metadata={
            "help": "Stage 1: the frozen backbone multiplies in 8-bit floating point, each row scaled to its range. "
            "Faster on GPUs that can (H100 and later), a little less exact: docs/performance.md."
        },
    )
    offload_activations: bool = field(
        default=False,
        metadata={
            "help": "Stage 2: what --gradient_checkpointing keeps (each layer's input, B x T x H x 2 bytes) waits in "
            "the CPU's memory for the backward pass. Slower; for long sequences. FSDP2 or one process."
        },
    )

    def __post_init__(self):
        self.check_gpus()
        if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":  # configs/*.yaml: what accelerate will do anyway
            self.bf16 = True
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # a head without a row has zero gradients, not none
        if not torch.accelerator.is_available():
            self.use_cpu = True  # or --bf16 is refused, though a CPU computes in bf16 too
            self.dataloader_pin_memory = False
        super().__post_init__()
        # Or the copy of a batch to the GPU waits until the last step is done. It needs pinned memory.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.n_gpu > 1:  # one process that sees several GPUs uses one; the Trainer would use DataParallel
            self._n_gpu = 1
        self.remove_unused_columns = False  # columns are chat_data's business
        # The Trainer's filter replaces a NaN loss by the average and trains on; MedusaTrainer stops instead.
        self.logging_nan_inf_filter = False
        if env_flag("ACCELERATE_USE_FSDP") and self.accelerator_config.gradient_accumulation_kwargs is None:
            # Without it each rank would add up the whole gradient over the micro-batches, 43 GB for 8B and 5 heads.
            self.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}

    @staticmethod
    def check_gpus():
        asked, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if there and asked > there and not env_flag("ACCELERATE_USE_CPU"):
            raise BadInput(f"{asked} processes were started here, but there are {there} GPUs: one process per GPU")


def env_flag(name: str) -> bool:
    """Whether accelerate launch, or the user, has switched it on."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")


RENAMED = {  # flags of older transformers, which its parser would only call unknown
    "--warmup_ratio": "--warmup_steps 0.1 (a value below 1 is a ratio)",
    "--evaluation_strategy": "--eval_strategy",
    "--group_by_length": "nothing: batches are grouped by length already",
    "--overwrite_output_dir": "--resume_from_checkpoint True, or another --output_dir",
    "--torch_dtype": "--dtype",
    "--fp16": "--bf16",
    "--use_liger_kernel": "--use_liger",
    "--deepspeed": "FSDP through accelerate launch",
}


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Raises BadInput for a flag that was renamed and for combinations that cannot work, before anything loads."""
    for word in argv:
        old = "--" + word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and old in RENAMED:
            raise BadInput(f"{old} is not supported here; use {RENAMED[old]}")
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    try:
        model, data, training = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:  # an unknown flag, or what TrainingArguments itself refuses
        raise BadInput(str(error)) from error
    refusals = {
        f"--medusa_num_heads {model.medusa_num_heads}: at least 1; for plain fine-tuning use --medusa_return False": (
            model.medusa_num_heads < 1
        ),
        f"--medusa_num_layers {model.medusa_num_layers}: 0 or more": model.medusa_num_layers < 0,
        "--medusa_return False trains the backbone alone; it cannot go with --medusa_only_heads True": (
            not model.medusa_return and training.medusa_only_heads
        ),
        f"--model_max_length {data.model_max_length}: head {model.medusa_num_heads} looks "
        f"{model.medusa_num_heads + 1} tokens ahead, so at least {model.medusa_num_heads + 2}": (
            data.model_max_length < model.medusa_num_heads + 2
        ),
        "--lazy_preprocess and --packing exclude each other: packing must know the lengths": (
            data.lazy_preprocess and data.packing
        ),
        "--eval_data_path and --eval_holdout exclude each other: evaluate on one of them": (
            data.eval_data_path is not None and data.eval_holdout != 0
        ),
        f"--eval_holdout {data.eval_holdout:g}: 0 or more": not data.eval_holdout >= 0,
        "--eval_strategy asks for evaluation: add --eval_data_path or --eval_holdout": (
            training.eval_strategy != "no" and data.eval_data_path is None and data.eval_holdout == 0
        ),
        "--label_smoothing_factor is not supported: the fused loss of the heads has none": (
            training.label_smoothing_factor != 0
        ),
        "--torch_compile is not supported: the heads run one after the other, outside the model's forward": (
            training.torch_compile
        ),
        "--medusa_heads_path goes with heads, not with --medusa_return False": (
            model.medusa_heads_path is not None and not model.medusa_return
        ),
        "--fp8_backbone is for a backbone that is frozen: it goes with --medusa_only_heads True (stage 1)": (
            training.fp8_backbone and not training.medusa_only_heads
        ),
        "--fp8_backbone goes with --bf16 True: what is not a product stays in bf16": (
            training.fp8_backbone and not training.bf16
        ),
        "--offload_activations keeps what --gradient_checkpointing True of stage 2 leaves: use it with that": (
            training.offload_activations and (training.medusa_only_heads or not training.gradient_checkpointing)
        ),
        "--gradient_checkpointing_layers goes with --gradient_checkpointing True in stage 2": (
            training.gradient_checkpointing_layers is not None
            and (training.medusa_only_heads or not training.gradient_checkpointing)
        ),
        f"--gradient_checkpointing_layers {training.gradient_checkpointing_layers}: at least 1; to recompute nothing "
        "use --gradient_checkpointing False": (
            training.gradient_checkpointing_layers is not None and training.gradient_checkpointing_layers < 1
        ),
        "--offload_activations keeps layer inputs only: leave --gradient_checkpointing_layers out": (
            training.offload_activations and training.gradient_checkpointing_layers is not None
        ),
        "--dtype bfloat16 has no effect under FSDP, which keeps a shard of fp32 weights: leave it out": (
            model.dtype == "bfloat16" and env_flag("ACCELERATE_USE_FSDP")
        ),
        "--model_name_or_path is empty": not model.model_name_or_path,
        "--torch_empty_cache_steps is not supported": training.torch_empty_cache_steps is not None,
        "--bf16_full_eval and --fp16_full_eval are not supported: evaluation computes as training does": (
            training.bf16_full_eval or training.fp16_full_eval
        ),
        "--neftune_noise_alpha does nothing to a frozen backbone: leave it out in stage 1": (
            training.neftune_noise_alpha is not None and training.medusa_only_heads
        ),
        "--push_to_hub uploads the finished directory only: use --hub_strategy end": (
            training.push_to_hub and training.hub_strategy != "end"
        ),
        "--medusa_heads_coefficient, --medusa_decay_coefficient and --medusa_lr_multiplier: 0 or more": (
            min(training.medusa_heads_coefficient, training.medusa_decay_coefficient, training.medusa_lr_multiplier)
            < 0
        ),
        "--medusa_heads_coefficient 0 with --medusa_only_heads True would train nothing": (
            training.medusa_heads_coefficient == 0 and training.medusa_only_heads
        ),
    }
    for sentence, applies in refusals.items():
        if applies:
            raise BadInput(sentence)
    if training.medusa_only_heads:  # a frozen backbone keeps no activations, so there is nothing to recompute
        training.gradient_checkpointing = False
        training.activation_checkpointing = False  # the name from transformers 5.20 on; the old one mirrors it
    if model.chat_template is not None and not os.path.isfile(model.chat_template):
        raise BadInput(f"there is no file --chat_template {model.chat_template}")
    return model, data, training
