"""What FSDP must know of Medusa heads. accelerate does the wrapping; docs/distributed.md has the arithmetic.

The units are each decoder layer, each head, and under FSDP2 also the input embeddings and the `lm_head`. A unit's
weights are whole only while it runs. So with 5 heads of an 8B model (0.54 B weights each), a GPU holds a shard of each
head and only one whole head at a time.
"""

import itertools
import logging
import os
from typing import Any

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecision, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from common.errors import BadInput
from medusa_model import MedusaModel
from model.backbone import decoder_layers
from model.bits import PACKAGES, is_in_few_bits, quantised_by

logger = logging.getLogger(__name__)


def is_version_1() -> bool:
    """Under FSDP: whether it is its first version, accelerate's default."""
    return os.environ.get("FSDP_VERSION", "1") == "1"


def shards_by_version_1() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and is_version_1()


def reads_weights(config, training_args) -> bool:
    """Whether this process reads the backbone's weights. With `fsdp_cpu_ram_efficient_loading` only rank 0 does
    (FSDP1: the first process of each node), or 8 processes would hold 8 copies of an 8B model, 32 GB each in fp32.

    config: the backbone's. If its embeddings are tied, every process reads: the tie is lost when weights are sent
    (accelerate 1.15). Such models are small. So are those in few bits, which accelerate cannot send either.
    """
    if not all(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))):
        return True
    if config.get_text_config().tie_word_embeddings:
        logger.info("tied embeddings: every process reads the backbone itself")
        disable_fsdp_ram_efficient_loading()
        return True
    if training_args.bits in PACKAGES or quantised_by(config) is not None:
        logger.info("a backbone in few bits: every process reads and keeps the whole of it")
        disable_fsdp_ram_efficient_loading()
        return True
    # FSDP1: each node's first process may be the one that sends.
    return (training_args.local_process_index if is_version_1() else training_args.process_index) == 0


def configure(plugin, model: MedusaModel):
    """Called before the model is wrapped: checks the units and sets the dtypes of weights and gradients.

    plugin: accelerate's FullyShardedDataParallelPlugin. Raises BadInput if heads would not be units.
    """
    head = type(model.medusa_heads[0]).__name__ if len(model.medusa_heads) else None
    if not len(decoder_layers(model.backbone)):  # with stored states there are none to name
        plugin.transformer_cls_names_to_wrap = [head]
        if model.prefix is not None:
            plugin.transformer_cls_names_to_wrap.append(type(model.prefix.get_submodule("layers.0")).__name__)
    names = plugin.transformer_cls_names_to_wrap or list(model._no_split_modules or [])
    if plugin.auto_wrap_policy is None or "transformer" not in str(plugin.auto_wrap_policy):
        raise BadInput("fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP: each decoder layer and head is a unit")
    classes = {type(module).__name__ for module in model.modules()}
    missing = [name for name in names if name not in classes]
    if missing:
        layers = sorted({type(layer).__name__ for layer in decoder_layers(model.backbone)})
        raise BadInput(
            f"fsdp_transformer_layer_cls_to_wrap names {missing[0]}, but the model has no such class: write "
            f"{','.join([*layers, *([head] if head else [])])}, or leave it out"
        )
    if head and head not in names:
        raise BadInput(f"fsdp_transformer_layer_cls_to_wrap is {','.join(names)}: add {head}, or leave it out")
    if few := [layer for layer in model.backbone.modules() if is_in_few_bits(layer)]:
        plugin.ignored_modules = few  # each process keeps them whole: a shard of codes has no scales of its own
    if plugin.mixed_precision_policy is not None:
        # accelerate's policy would reduce gradients in bf16 and round each head's loss to bf16 (15.2 to 15.25).
        policy: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        if plugin.fsdp_version == 2:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(**policy, output_dtype=None)
        else:
            plugin.mixed_precision_policy = MixedPrecision(**policy, buffer_dtype=torch.float32)
    if plugin.fsdp_version == 2 and model.lm_head.weight is model.backbone.get_input_embeddings().weight:
        # accelerate would make one unit of the tied pair. Its hooks wait for the lm_head's own forward, which never
        # runs here. accelerate asks the model for the two; if it gets None, the pair stays in the root unit.
        for name in ("get_input_embeddings", "get_output_embeddings"):
            setattr(model, name, lambda: None)


def link_units(model: MedusaModel):
    """Called after FSDP2 has wrapped the model; does nothing to a model that is not wrapped.

    Registers the methods that need whole weights though they are not `forward`, and sets when a unit's weights are
    gathered and freed.
    """
    if not isinstance(model, FSDPModule):
        return
    register_fsdp_forward_method(model, "read")

    def teacher_weight() -> torch.Tensor:
        gather(lm_head_unit(model))
        return MedusaModel.teacher_weight(model)

    model.teacher_weight = teacher_weight  # type: ignore[method-assign]  # on this instance, as FSDP itself does
    if isinstance(model.lm_head, FSDPModule):  # like a head, it computes its loss while its weight is whole
        lm_head: Any = model.lm_head
        lm_head.loss = model.lm_head_loss
        register_fsdp_forward_method(lm_head, "loss")
        model.lm_head_loss = lm_head.loss  # type: ignore[method-assign]  # on this instance, as FSDP itself does
    # FSDP2 prefetches in the reverse order of the forward pass. Each head's backward ends that order, and the layers'
    # weights would then be gathered one by one while the GPU waits. So the order is set here.
    units = [module for module in model.backbone.modules() if isinstance(module, FSDPModule)]
    for before, layer in itertools.pairwise(unit for unit in units if any(unit.children())):
        layer.set_modules_to_backward_prefetch([before])
    keep_whole_between_forward_and_backward(model, True)


def keep_whole_between_forward_and_backward(model: MedusaModel, keep: bool):
    """Whether FSDP2 keeps a head's weights (1 GB) whole after its forward. In training its backward follows at once,
    so freeing and gathering them again gains nothing. In evaluation no backward follows that would free them."""
    for unit in (*model.medusa_heads, model.lm_head):
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(not keep)


def gather(unit: nn.Module):
    """Makes a unit's weights whole now, for the call that follows. That call's own hook would also keep the buffer
    they arrived in (1 GB for a head of an 8B model), to overlap with a next unit, and there is none."""
    if isinstance(unit, FSDPModule):
        unit.unshard()


def lm_head_unit(model: MedusaModel) -> nn.Module:
    return model if lm_head_in_root_unit(model) else model.lm_head


def release_teacher(model: MedusaModel):
    """Frees the lm_head's whole weight when the last head has learnt from it. (A root unit frees its own.)"""
    if model.medusa_loss != "ce" and isinstance(model.lm_head, FSDPModule):
        model.lm_head.reshard()


def lm_head_in_root_unit(model: MedusaModel) -> bool:
    """Whether the `lm_head`'s weight is in FSDP2's root unit (tied embeddings). The root unit's gradients are reduced
    at the end of the backbone's backward pass."""
    return isinstance(model, FSDPModule) and not isinstance(model.lm_head, FSDPModule)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this rank holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
