"""Every flag of train.py and its meaning. training/refusals.py has the combinations that cannot work."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from transformers.trainer_pt_utils import AcceleratorConfig

from common.errors import BadInput
from conversations.options import parse_kwargs
from model.path_heads import HEAD_TYPES
from training.bits_arguments import BitsArguments
from training.lora_arguments import LoraArguments
from training.plan_arguments import PlanArguments
from training.refusals import refuse, refuse_renamed
from training.states import read_index


def computed(text: str) -> Any:
    """A field that __post_init__ fills in if the flag is not given."""
    return field(default=None, metadata={"help": text})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The backbone: a Hub id or a local directory."})
    medusa_num_heads: int = field(default=5, metadata={"help": "K: head k predicts the token at t + k + 1."})
    medusa_num_layers: int = field(default=1, metadata={"help": "ResBlocks per head; 0 is a projection alone."})
    medusa_head_type: str | None = field(
        default=None,
        metadata={
            "help": "What a head knows of the k tokens before its guess: medusa, nothing (default, or the type of "
            "--medusa_heads_path); markov, the last one; hydra, all of them. docs/heads.md.",
            "choices": [*HEAD_TYPES],
        },
    )
    medusa_rank: int | None = field(
        default=None, metadata={"help": "r of --medusa_head_type markov: numbers kept of each token (default: 256)."}
    )
    medusa_prefix_layer: bool | None = field(
        default=None,
        metadata={"help": "One more decoder layer between backbone and heads, trained with them (docs/heads.md)."},
    )
    medusa_heads_path: str | None = field(
        default=None,
        metadata={"help": "Start from these trained heads (a stage 1 output_dir): for stage 2, or more of stage 1."},
    )
    medusa_vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "V': heads guess only the V' tokens that are most frequent among the labels, and are that much "
            "smaller (default: all tokens). docs/decoding.md says what is lost."
        },
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
        metadata={"help": "Jinja file for a tokenizer that has no chat template, or the wrong one (see templates/)."},
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "What the chat template can be told, as JSON: '{\"enable_thinking\": false}'."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code a model brings along. Read it first."}
    )

    @property
    def num_heads(self) -> int:
        """K, or 0 with --medusa_return False."""
        return self.medusa_num_heads if self.medusa_return else 0


@dataclass
class ConversationArguments:
    """Which conversations, and how long. store_states.py has these flags too."""

    data_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Conversations: files (.json, .jsonl, both also .gz, .parquet, .csv), directories, patterns such "
            "as 'chats/*.jsonl', or a Hub dataset id. docs/data.md has what their records may look like."
        },
    )
    eval_data_path: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Of a Hub dataset that has several."})
    train_split: str | None = field(
        default=None, metadata={"help": "The split of --data_path to train on (default: train)."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "The split of --eval_data_path (default: train), or of --data_path, to evaluate on."},
    )
    eval_holdout: float = field(
        default=0,
        metadata={"help": "Without --eval_data_path: hold out the last N conversations (a share if below 1)."},
    )
    model_max_length: int = computed("Longer conversations are cut to this many tokens. Default: 2048.")

    def __post_init__(self):
        if self.model_max_length is None:
            self.model_max_length = 2048

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on. Raises BadInput if --states_path has no states."""
        return self.eval_data_path is not None or self.eval_split is not None or self.eval_holdout != 0


@dataclass
class DataArguments(ConversationArguments):
    states_path: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --data_path, in stage 1: hidden states that store_states.py has stored. The "
            "backbone's layers do not run, and are not read."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Several conversations to a row of --model_max_length tokens, kept apart by the mask."},
    )
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "Tokenise when a batch is drawn, not before: starts at once, pads more."}
    )
    show_data: int = field(
        default=0,
        metadata={"help": "Print so many rows with their labels, and what became of all records; then stop."},
    )

    def __post_init__(self):
        if self.states_path is None:  # or the states say how long rows are
            super().__post_init__()

    @property
    def evaluates(self) -> bool:
        if self.states_path is not None:
            return bool(read_index(Path(self.states_path))["shards"]["eval"])
        return super().evaluates


@dataclass
class TrainingArguments(BitsArguments, PlanArguments, LoraArguments, transformers.TrainingArguments):
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and tokenised data are kept."})
    output_dir: str = computed(
        "Where checkpoints and the result go. {stage} in it becomes 1 or 2. Default: trainer_output."
    )
    do_eval: bool | None = field(  # type: ignore[assignment]  # None until parse() knows the data
        default=None,
        metadata={"help": "Evaluate when training has ended (default: if there is something to evaluate on)."},
    )
    medusa_only_heads: bool = field(
        default=False,
        metadata={"help": "True: stage 1, the backbone is frozen. False: stage 2, everything trains together."},
    )
    medusa_loss: str = field(
        default="ce",
        metadata={
            "help": "What heads learn: ce, the conversations' tokens; kl, the backbone's distribution of them; lk, "
            "the same in a form that aims at how many guesses are accepted (model/teacher_loss.py).",
            "choices": ["ce", "kl", "lk"],
        },
    )
    medusa_rows: str = field(
        default="answers",
        metadata={
            "help": "Which rows heads learn from: those whose token is the assistant's, or all, prompts included: "
            "stage 1, with --medusa_loss kl or lk.",
            "choices": ["answers", "all"],
        },
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
    learning_rate: float = computed(
        "Of the backbone; times --medusa_lr_multiplier, of the heads. Default: stage 1 1e-3, 2 1e-5, by LoRA 1e-4."
    )
    medusa_lr_multiplier: float = computed(
        "The heads' learning rate over --learning_rate. Default: 1 in stage 1, else what gives them 5e-4, but at "
        "least 1."
    )
    gradient_checkpointing_layers: int | None = field(
        default=None,
        metadata={
            "help": "Stage 2, with --gradient_checkpointing True: recompute only the first N decoder layers, and keep "
            "the activations of the others (default: recompute all). As few as memory allows is fastest."
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
        if self.optim == "muon":
            self.optim, self.muon = "adamw_torch", True
        stage_1 = self.medusa_only_heads
        # Stage 1: as in the original Medusa recipe. Stage 2: common rates for full fine-tuning, and for adapters.
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if stage_1 else 1e-5 if self.lora_rank is None else 1e-4
        if self.medusa_lr_multiplier is None:  # 5e-4 for heads that are fresh beside a trained backbone
            self.medusa_lr_multiplier = 1.0 if stage_1 else max(1.0, 5e-4 / (self.learning_rate or 5e-4))
        if self.output_dir is not None:
            self.output_dir = self.output_dir.replace("{stage}", "1" if stage_1 else "2")
        if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":  # from configs/*.yaml: accelerate computes in bf16
            self.bf16 = True
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every head has gradients: zeros if it has no row
        if not torch.accelerator.is_available():
            self.use_cpu = True  # or transformers refuses --bf16, though a CPU can compute in bf16
            self.dataloader_pin_memory = False
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
        assert isinstance(self.accelerator_config, AcceleratorConfig)  # super().__post_init__() made it one
        # Copies a batch to the GPU while the last step still runs. It needs pinned memory.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.n_gpu > 1:  # a process uses one GPU; where it sees several, the Trainer would use DataParallel
            self._n_gpu = 1
        self.remove_unused_columns = False  # conversations/rows.py chooses the columns
        # The Trainer's filter logs the average in place of a NaN loss and trains on; MedusaTrainer stops instead.
        self.logging_nan_inf_filter = False
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and self.accelerator_config.gradient_accumulation_kwargs is None:
            # Or each rank would sum up whole gradients over the micro-batches: 43 GB for an 8B model with 5 heads.
            self.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}

    @staticmethod
    def check_gpus():
        asked, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if there and asked > there and not parse_flag_from_env("ACCELERATE_USE_CPU"):
            raise BadInput(f"{asked} processes were started here, but there are {there} GPUs: one process per GPU")


class Parser(transformers.HfArgumentParser):
    def error(self, message: str):
        raise BadInput(message)  # argparse would print the usage of all flags first


def read_flags(argv: list[str], *classes) -> tuple:
    """The flags, as instances of the dataclasses. Raises BadInput for an unknown or renamed one or a wrong value."""
    refuse_renamed(argv)
    try:
        return Parser(cast(Any, classes)).parse_args_into_dataclasses(argv)  # annotated as several of one class
    except (ValueError, OverflowError) as error:  # an unknown flag, or a value that transformers refuses
        raise BadInput(" ".join(str(error).split())) from error


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Raises BadInput, before anything loads, for an unknown or renamed flag, an invalid value, and combinations that
    cannot work."""
    model, data, training = read_flags(argv, ModelArguments, DataArguments, TrainingArguments)
    refuse(model, data, training)
    parse_kwargs(model.chat_template_kwargs)
    if training.medusa_only_heads:  # a frozen backbone keeps no activations, so there is nothing to recompute
        training.gradient_checkpointing = False
        training.activation_checkpointing = False  # its name since transformers 5.20; the old one mirrors it
    if training.do_eval is None:
        training.do_eval = data.evaluates
    return model, data, training
