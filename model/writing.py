"""What a MedusaModel leaves on disk: the heads alone, or the backbone with the heads beside it."""

from pathlib import Path
from typing import Any

import torch

from model.adapter import has_lora
from model.heads_file import HEADS_DIR, TOKEN_MAP, save_heads, under
from model.prefix import PREFIX
from model.readable import make_readable


def write_model(model: Any, directory: Path, state_dict: dict[str, torch.Tensor], include_backbone: bool, final=None):
    """model: a MedusaModel. state_dict: its unsharded tensors. include_backbone: writes the backbone, or its adapters
    if it has such, to `directory`, and the heads to `medusa_heads/` in it. final: where the caller will move the
    files, if not `directory`."""
    if include_backbone and has_lora(model.backbone):
        from model.lora import save_lora  # not at the top: peft takes a second to import, and few need it

        save_lora(model.backbone, under("backbone.", state_dict), directory)
    elif include_backbone:
        mine = under("backbone.", state_dict)
        for name, source in model.backbone.all_tied_weights_keys.items():
            mine[name] = mine[source]  # gathering untied them, and they would be written twice
        model.backbone.save_pretrained(directory, state_dict=mine)
        make_readable(directory)
    if len(model.medusa_heads) == 0:
        return
    config = model.config.to_dict()
    if include_backbone:
        config["base_model_name_or_path"] = str(Path(final or directory).resolve())
        directory = directory / HEADS_DIR
    tokens = {} if model.token_map is None else {TOKEN_MAP: model.token_map}
    prefix = {name: tensor for name, tensor in state_dict.items() if name.startswith(PREFIX)}
    save_heads(under("medusa_heads.", state_dict) | prefix | tokens, config, directory)
