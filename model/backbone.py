"""Loading a backbone: errors of one sentence, models that cannot have Medusa heads, and copies without weights."""

import contextlib
import copy
import inspect
import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import logging

from common.errors import ACCESS, NO_CODE, BadInput, first_line
from model.adapter import CONFIG, base_of_adapter, load_merged
from model.bits import INSTALL, check_bits, how_to_load, keep_exact


def load_backbone(
    name_or_path: str, adapter: Path | None = None, bits: str | None = None, **kwargs
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, but failures raise BadInput with one sentence, and a directory with a
    peft adapter is the model it belongs to, with the adapter merged. adapter: a directory that may hold an adapter of
    the model (if that is none itself). bits: one of BITS, to quantise it."""
    directory, base = name_or_path, base_of_adapter(name_or_path)
    if base is None and adapter is not None and (adapter / CONFIG).is_file():
        directory, base = str(adapter), name_or_path
    if base is None:
        return _load_whole(name_or_path, bits, **kwargs)
    if bits is not None:
        raise BadInput(
            f"--backbone_dtype {bits}: {directory} is an adapter, which is merged into whole weights: first "
            f"python export.py {directory} --to peft-merged --output DIRECTORY"
        )
    return load_merged(directory, base, lambda base: _load(AutoModelForCausalLM, base, **kwargs))


def _load_whole(name: str, bits: str | None, **kwargs) -> PreTrainedModel:
    where = {key: kwargs[key] for key in ("cache_dir", "trust_remote_code") if key in kwargs}
    config = load_backbone_config(name, **where)
    check_bits(bits, config, name)
    how = how_to_load(bits, config, kwargs.get("dtype", "auto"))
    try:
        backbone = _load(AutoModelForCausalLM, name, **kwargs | how)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        if not how:
            raise
        raise BadInput(
            f"cannot load the backbone {name} in few bits: {first_line(error)} (packages: {INSTALL}; not every "
            "quantisation runs on every machine)"
        ) from error
    keep_exact(backbone)
    if bits == "fp8":
        from model.fp8 import use_fp8  # not at the top: it needs Triton

        use_fp8(backbone, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return backbone


def load_backbone_config(name_or_path: str, **kwargs) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained`, with the same errors."""
    with reading_config(name_or_path):
        return _load(AutoConfig, name_or_path, **kwargs)


def without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same backbone without its layers: embeddings, last norm and lm_head are left. That is all that
    training from stored hidden states needs."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = 0
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = []
    return config


def load_without_layers(name_or_path: str, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """The backbone without its layers, whose weights are not read. config: the whole backbone's."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # or it would list the weights of all layers as unexpected
    try:
        how = {"config": without_layers(config), "output_loading_info": True} | kwargs
        backbone, report = _load(AutoModelForCausalLM, name_or_path, **how)
    finally:
        logging.set_verbosity(level)
    if missing := report["missing_keys"]:
        raise BadInput(f"cannot load the backbone {name_or_path}: it has no tensor {min(missing)}")
    return backbone


def _load(auto_class, name_or_path: str, **kwargs):
    if os.path.sep in name_or_path and name_or_path[0] in "./~" and not os.path.isdir(name_or_path):
        raise BadInput(f"there is no model directory {name_or_path}: give an existing one or a Hub id")
    try:
        return auto_class.from_pretrained(name_or_path, **NO_CODE | kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"cannot load the backbone {name_or_path}: {first_line(error)} {ACCESS}") from error


def check_backbone(backbone: PreTrainedModel, lm_head: nn.Module | None):
    """Refuses backbones whose logits are not (soft-capped) lm_head(hidden), because a head starts as a copy of it."""
    config, name = backbone.config.get_text_config(), type(backbone).__name__
    if lm_head is None:
        raise BadInput(f"{name} has no output embeddings: Medusa heads need a causal LM")
    if getattr(lm_head, "bias", None) is not None:
        raise BadInput(f"the lm_head of {name} has a bias; the Medusa format has none, so it is not supported")
    for key in ("logit_scale", "logits_scaling"):
        if getattr(config, key, 1.0) not in (None, 1.0):
            raise BadInput(f"{name} scales its logits ({key} = {getattr(config, key)}): not supported")
    decoder_layers(backbone)
    if "position_ids" not in inspect.signature(backbone.get_decoder().forward).parameters:
        raise BadInput(
            f"{name} takes no position_ids (its tokens know their places from ALiBi or a recurrent state): a tree of "
            "guesses, and a packed row, have places of their own, so it is not supported"
        )


def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, by whatever name: `layers` of LLaMA, `h` of GPT-2. Raises BadInput if it has no list of
    them."""
    number = backbone.config.get_text_config().num_hidden_layers
    for module in backbone.get_decoder().children():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise BadInput(f"{type(backbone).__name__} has no list of its {number} decoder layers: not supported")


def head_size(config: PreTrainedConfig) -> int:
    """How many numbers a query or key of attention has. config: of the text."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_experts(backbone: PreTrainedModel) -> bool:
    """Whether it is a mixture of experts. transformers has them under many names in configs, but one in modules."""
    return any("experts" in f"{name} {type(module).__name__}".lower() for name, module in backbone.named_modules())


def meta_backbone(name_or_path: str, trust_remote_code=False, **kwargs) -> PreTrainedModel:
    """The backbone's modules without any weights, from its config alone, for checks that need no numbers: an 8B model
    takes less than a second. Raises BadInput if it cannot have heads."""
    config = load_backbone_config(name_or_path, trust_remote_code=trust_remote_code, **kwargs)
    with reading_config(name_or_path), torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        check_backbone(backbone, backbone.get_output_embeddings())
    return backbone


@contextlib.contextmanager
def reading_config(name_or_path: str):
    """Makes one sentence of whatever a library raises over a config.json: it is somebody else's file, and a value that
    nobody expected ends in any kind of error."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"cannot use the backbone {name_or_path}: its config.json gives {type(error).__name__} "
            f"({first_line(error)}). It is damaged, or for another version of transformers"
        ) from error


def context_length(backbone: PreTrainedModel) -> int:
    """How many tokens it can read. Raises BadInput if its config does not say: it then has a kind of positions that
    decoding does not support (ALiBi)."""
    length = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        name = type(backbone).__name__
        raise BadInput(f"{name} has no max_position_embeddings: decoding does not know its kind of positions")
    return length


def stop_tokens(backbone) -> set[int]:
    """The tokens on which the model stops, as far as it names any."""
    ends = backbone.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])


def end_tokens(backbone) -> set[int]:
    """The same. Raises BadInput if the model names none."""
    ends = stop_tokens(backbone)
    if not ends:
        raise BadInput(f"{backbone.name_or_path} names no end-of-sequence token: no answer would ever end")
    return ends


def rope_follows_length(config) -> bool:
    """Whether RoPE frequencies depend on the length of the text, in any layer. transformers then reads the length in
    each pass, and a CUDA graph cannot hold that."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind.get("rope_type") for kind in (rope, *rope.values()) if isinstance(kind, dict)}
    return bool(kinds & {"dynamic", "longrope"})


def empty_backbone(config, dtype: torch.dtype, trust_remote_code=False) -> PreTrainedModel:
    """The backbone with uninitialised weights, which take no real memory until they are written; buffers are real."""
    with init_empty_weights():
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    for module in backbone.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Not left on meta: accelerate tells parameters apart by their address. It is 0 for all meta tensors, so
            # the optimiser would train only one of them.
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    return backbone


def use_liger(model: PreTrainedModel):
    """Liger's RMSNorm, RoPE and SwiGLU: a kernel each, on a GPU."""
    # By default Liger would also replace the forward of a whole model by one with its own loss.
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
