"""Low-rank adapters (LoRA, arXiv 2106.09685) on the backbone, through peft: its own weights stay as they are.

Each chosen linear layer W x gets B A x * alpha / rank beside it. B starts at zero: untrained, it changes nothing.
Only A and B train. They are saved as a peft adapter, and merged into W when the model is loaded (model/adapter.py).
"""

import contextlib
import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from common.errors import BadInput, first_line
from common.files import write_atomically
from model.adapter import LORA, WEIGHTS
from model.readable import make_readable

ALL_LINEAR = "all-linear"  # peft's word: all but the lm_head


def add_lora(
    backbone: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    seed: int = 0,
):
    """Puts adapters into the backbone, in place, and freezes all else of it. targets: the ends of the names of linear
    layers (default: all but the lm_head). dtype: of the adapters (default: their layer's). seed: of A, so that all
    processes begin with the same. Raises BadInput if targets name no linear layer, or the lm_head or embeddings."""
    wanted = list(targets) or ALL_LINEAR
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted)  # type: ignore[arg-type]
    name = backbone.name_or_path or ""
    config.base_model_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
    ends = {id(backbone.get_input_embeddings()), id(backbone.get_output_embeddings())}
    layers = {name: module for name, module in backbone.named_modules() if name}
    for target in targets:
        found = [layer for name, layer in layers.items() if name == target or name.endswith("." + target)]
        if not found or not all(isinstance(layer, nn.Linear) for layer in found):
            linear = sorted({name.split(".")[-1] for name, layer in layers.items() if isinstance(layer, nn.Linear)})
            raise BadInput(f"--lora_target_modules {target}: no linear layer; {type(backbone).__name__} has {linear}")
        if any(id(layer) in ends for layer in found):
            raise BadInput(
                f"--lora_target_modules {target}: heads begin as copies of the lm_head, which stays as it is"
            )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, backbone)
    except (ValueError, TypeError) as error:
        raise BadInput(f"peft cannot put adapters into {type(backbone).__name__}: {first_line(error)}") from error
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(LORA in name)
        if LORA in name and dtype is not None:
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def adapters_off(backbone: nn.Module):
    """While inside, the backbone computes what it did before it had adapters, bit for bit, without dropout.

    Not by peft's own switch, which sets requires_grad of all adapters to False for that time; FSDP2 keeps copies of
    that flag. Here they run, times zero, and no parameter is touched.
    """
    training = backbone.training
    backbone.eval()
    try:
        with rescale_adapter_scale(backbone, 0.0):
            yield
    finally:
        backbone.train(training)


def save_lora(backbone: PreTrainedModel, state_dict: dict[str, torch.Tensor], directory: Path):
    """Writes a peft adapter. state_dict: unsharded tensors named as in the backbone; others than adapters' are
    ignored."""
    directory.mkdir(parents=True, exist_ok=True)
    config: Any = copy.copy(backbone.peft_config["default"])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    config.save_pretrained(directory)
    found = get_peft_model_state_dict(backbone, state_dict=state_dict)
    # As `PeftModel.save_pretrained` names them, which wraps the model twice.
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    write_atomically(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    make_readable(directory)
