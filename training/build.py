"""Builds the model that train.py's flags ask for: backbone, heads, frozen parts, kernels."""

import logging
import os
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch import nn

from callback import peak_process_gib
from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.adapter import CONFIG
from model.backbone import (
    empty_backbone,
    has_experts,
    load_backbone,
    load_backbone_config,
    load_without_layers,
    meta_backbone,
    without_layers,
)
from model.bits import check_bits, held_bytes, is_in_few_bits, quantised_by
from model.heads_file import HEADS_FILE, TOKEN_MAP, find_heads, load_config, load_heads
from model.varlen import use_varlen
from training.fsdp import reads_weights
from training.lora_arguments import LoraArguments
from training.states import check_model, fingerprint

logger = logging.getLogger(__name__)


def choose_head_type(model_args):
    """Sets `medusa_head_type`, `medusa_prefix_layer` and, of markov heads, `medusa_rank`: those of the heads that the
    run starts from, or what the flags say. Raises BadInput if they differ, or for a rank of other heads."""
    kind, rank, heads = model_args.medusa_head_type, model_args.medusa_rank, model_args.medusa_heads_path
    prefix = model_args.medusa_prefix_layer
    if heads is not None and os.path.isdir(heads):  # a run that is resumed does without them
        found = load_config(find_heads(heads)[0])
        if kind not in (None, found["medusa_head_type"]):
            raise BadInput(f"--medusa_head_type {kind}: the heads in {heads} are {found['medusa_head_type']} heads")
        kind = found["medusa_head_type"]
        has = bool(found.get("medusa_prefix_layer"))
        if prefix not in (None, has):
            what = "a" if has else "no"
            raise BadInput(f"--medusa_prefix_layer {prefix}: the heads in {heads} have {what} prefix layer")
        prefix = has
        if kind == "markov" and rank not in (None, found["medusa_rank"]):
            raise BadInput(f"--medusa_rank {rank}: the heads in {heads} have {found['medusa_rank']}; leave it out")
        rank = found["medusa_rank"] if kind == "markov" else rank
    kind = kind or "medusa"
    if rank is not None and kind != "markov":
        raise BadInput(f"--medusa_rank {rank} is of --medusa_head_type markov, and these are {kind} heads")
    model_args.medusa_head_type, model_args.medusa_prefix_layer = kind, bool(prefix)
    model_args.medusa_rank = rank or (MedusaConfig.medusa_rank if kind == "markov" else None)


def heads_config(model_args) -> MedusaConfig:
    """The heads that the flags ask for, after `choose_head_type`."""
    return MedusaConfig(
        medusa_num_heads=model_args.num_heads,
        medusa_num_layers=model_args.medusa_num_layers,
        medusa_head_type=model_args.medusa_head_type,
        medusa_rank=model_args.medusa_rank or MedusaConfig.medusa_rank,
        medusa_prefix_layer=model_args.medusa_prefix_layer,
    )


def build_model(
    model_args, data_args, training_args, checkpoint: Path | None, token_map: torch.Tensor | None = None
) -> MedusaModel:
    """Called on every process. A process that gets its weights through FSDP only reserves memory for them.

    checkpoint: the one to resume from, or None. token_map: the tokens of a draft vocabulary `[V']`, or None. Raises
    BadInput if backbone, heads and flags do not fit together.
    """
    frozen = torch.bfloat16 if training_args.bf16 else torch.float32
    trainable = getattr(torch, model_args.dtype)
    where = {"cache_dir": training_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    config = load_backbone_config(model_args.model_name_or_path, **where)
    reads = reads_weights(config, training_args)
    lora = training_args.lora_rank
    dtype = frozen if training_args.medusa_only_heads or lora else trainable
    stored = data_args.states_path is not None
    if not reads:
        config = without_layers(config) if stored else config
        backbone = empty_backbone(config, dtype, model_args.trust_remote_code)
    elif stored:
        backbone = load_without_layers(model_args.model_name_or_path, config, dtype=dtype, **where)
    else:
        backbone = load_backbone(model_args.model_name_or_path, bits=training_args.bits, dtype=dtype, **where)
    if stored:
        check_model(data_args.states_path, model_args.model_name_or_path, fingerprint(backbone) if reads else None)
    model = MedusaModel.from_backbone(
        backbone,
        heads_config(model_args),
        dtype=trainable,
        fill=reads,
        token_map=token_map,
    )
    if (heads_dir := trained_heads(model_args, training_args, checkpoint)) is not None:
        put_heads(model, heads_dir, reads)
    if training_args.medusa_only_heads:
        model.freeze_backbone()
    if lora:
        adapt(model, training_args, trainable, training_args.seed)
    if training_args.bits == "fp8" and not reads:  # where it is read, it is so already
        from model.fp8 import use_fp8  # not at the top: it needs Triton

        use_fp8(backbone, training_args.device)
    # DDP would send rank 0's to the others, which torchao's int8 weights cannot be. All have read the same.
    few = [f"{at}.{name}" for at, m in model.named_modules() if is_in_few_bits(m) for name, _ in m.named_parameters()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, few)
    model.choose_kernels(model_args.use_liger, training_args.device)
    if data_args.packing:
        use_varlen(backbone, training_args.device, frozen)  # autocast computes in bf16 whatever weights are kept in
    model.medusa_loss = training_args.medusa_loss
    if training_args.device.type == "cuda" and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        warn_of_memory(model, torch.cuda.get_device_properties(training_args.device).total_memory)
    memory = [f"{gib:.1f}" for gib in gather_object([peak_process_gib()])]
    logger.info("the model is built; each process had at most %s GiB of CPU memory", ", ".join(memory))
    return model


def adapt(model: MedusaModel, args: LoraArguments, dtype: torch.dtype | None = None, seed: int = 0):
    """Puts the adapters into the backbone that the flags ask for. dtype: of their weights (default: the backbone's).
    seed: of their first values."""
    assert args.lora_rank is not None
    from model.lora import add_lora  # not at the top: peft takes a second to import, and few need it

    alpha, targets = args.lora_alpha or 2 * args.lora_rank, args.lora_target_modules or ()
    add_lora(model.backbone, args.lora_rank, alpha, args.lora_dropout or 0.0, targets, dtype, seed)
    model.preserves = args.preserves


def warn_of_memory(model: MedusaModel, device_bytes: int):
    """Warns if one GPU cannot hold the whole model in training: value, gradient and AdamW's two moments of each
    trained weight, and the value of each frozen one."""
    kept = sum(held_bytes(p) * (4 if p.requires_grad else 1) for p in model.parameters())
    if kept > device_bytes:
        logger.warning(
            "weights, gradients and Adam's moments take %.0f GB, and a GPU has %.0f: memory will run out. Share them "
            "out over several GPUs with FSDP (docs/distributed.md), or take a smaller backbone or fewer heads",
            *(kept / 1e9, device_bytes / 1e9),
        )


def check_before_data(
    name_or_path: str, tokenizer, max_length: int | None, trains_backbone=False, adapts=False, bits=None, **where
):
    """Raises BadInput for what the backbone's config alone shows, before conversations are tokenised and gigabytes
    are read: it cannot have heads, or not this stage; it has fewer embeddings than the tokenizer has tokens, or fewer
    positions than --model_max_length. where: cache_dir and trust_remote_code."""
    if adapts and os.path.isfile(os.path.join(name_or_path, CONFIG)):
        raise BadInput(
            f"--lora_rank: {name_or_path} is an adapter already; merge it first: python export.py {name_or_path} --to "
            "peft-merged --output DIRECTORY, or give --model_name_or_path the model that it is of"
        )
    backbone = meta_backbone(name_or_path, **where)
    check_bits(bits, backbone.config, name_or_path)
    if trains_backbone and (method := quantised_by(backbone.config)) is not None:
        raise BadInput(
            f"{name_or_path} is quantised by {method}, and such weights do not train: train the heads alone, with "
            "--medusa_only_heads True (stage 1)"
        )
    if trains_backbone and has_experts(backbone):
        raise BadInput(
            f"{type(backbone).__name__} is a mixture of experts, and stage 2 has no loss that keeps them balanced: "
            "train the heads alone, with --medusa_only_heads True (stage 1)"
        )
    vocab_size = cast(nn.Embedding, backbone.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise BadInput(
            f"the tokenizer has {len(tokenizer)} tokens, but {name_or_path} has embeddings for {vocab_size}: it is "
            "another model's tokenizer, or tokens were added to it and not to the model"
        )
    positions = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and (max_length or 0) > positions:
        raise BadInput(f"--model_max_length {max_length}: the backbone knows {positions} positions")


def trained_heads(model_args, training_args, checkpoint: Path | None) -> Path | None:
    """The directory of trained heads to start from, if any: a stage 1 checkpoint, or --medusa_heads_path. The heads of
    a stage 2 checkpoint are loaded with its backbone, after the model is sharded (training/checkpoints.py)."""
    if checkpoint is not None:
        return checkpoint if training_args.medusa_only_heads else None
    return None if model_args.medusa_heads_path is None else find_heads(model_args.medusa_heads_path)[0]


def put_heads(model: MedusaModel, heads_dir: Path, reads: bool):
    """Loads trained heads, where this process reads weights. Raises BadInput if they are of other sizes."""
    fields = load_config(heads_dir)
    for key in ("medusa_num_heads", "medusa_num_layers", "hidden_size", "vocab_size"):
        if fields[key] not in (None, getattr(model.config, key)):
            raise BadInput(f"the heads in {heads_dir} have {key} {fields[key]}, not {getattr(model.config, key)}")
    if reads:
        state_dict = load_heads(heads_dir)[1]
        state_dict.pop(TOKEN_MAP, None)  # `choose_tokens` of training/vocabulary.py has read it, on every process
        model.load_heads(state_dict, heads_dir / HEADS_FILE)
    logger.info("starting from the heads in %s", heads_dir)
