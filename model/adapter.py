"""Backbones that are a peft adapter over another model (LoRA and its kin), merged when they are loaded."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.errors import BadInput, first_line
from common.files import read_json

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = "lora_"  # what peft's names of tensors have behind the layer's


def has_lora(backbone: torch.nn.Module) -> bool:
    """Whether it has adapters that are not merged: those of model/lora.py."""
    return "peft_config" in vars(backbone)


def trained_only(state_dict: dict) -> dict:
    """Without the backbone's own tensors, which adapters leave as they are. Its names begin with `backbone.`."""
    return {name: value for name, value in state_dict.items() if not name.startswith("backbone.") or LORA in name}


def base_of_adapter(directory: str) -> str | None:
    """The model that an adapter in a directory belongs to; None if there is no adapter. Raises BadInput if it names
    none. A model that may have to be fetched is named aloud: whoever wrote the config chose it."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        return None
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadInput(f"{path} names no base_model_name_or_path")
    if not os.path.isdir(base):
        logger.warning("the adapter in %s is of %s, no directory here: it is taken from the Hub", directory, base)
    return base


def load_merged(directory: str, base: str, load: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """load: makes the base model. Raises BadInput for an adapter that is damaged, or of another model, or no peft."""
    if not (Path(directory) / WEIGHTS).is_file():
        raise BadInput(f"{directory} has {CONFIG} and no {WEIGHTS}")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise BadInput(f"{directory} is an adapter, and needs peft: pip install -r requirements.txt") from error
    backbone = load(base)
    before = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    try:
        merged = PeftModel.from_pretrained(backbone, directory).merge_and_unload()
    except Exception as error:  # peft raises any kind for a config or tensors that do not fit
        raise BadInput(f"the adapter in {directory} does not fit to {base}: {first_line(error)}") from error
    if {name: tensor.shape for name, tensor in merged.state_dict().items()} != before:
        raise BadInput(f"the adapter in {directory} cannot be merged into {base}: it changes which weights there are")
    if not all(tensor.isfinite().all() for tensor in merged.state_dict().values() if torch.is_floating_point(tensor)):
        raise BadInput(f"the adapter in {directory} makes NaN or infinity of weights of {base}")
    return merged
