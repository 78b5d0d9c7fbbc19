"""The heads on disk: one safetensors file and a config.json, named as the original Medusa and TGI expect.

    {h}.{l}.linear.weight, {h}.{l}.linear.bias   ResBlock l of head h (h = 0 is head 1)   [H, H], [H]
    {h}.{n}.weight                               its projection, n = number of ResBlocks  [V, H]

No pickle, so loading a heads file cannot run code.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import BadInput
from common.files import write_atomically

HEADS_FILE = "medusa_lm_head.safetensors"  # the name the original Medusa and TGI look for
HEADS_DIR = "medusa_heads"  # where a stage 2 directory keeps its heads, next to the backbone's own files


def save_heads(state_dict: dict[str, torch.Tensor], config: dict, directory: Path):
    """Writes the heads file and its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_atomically(directory / HEADS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / "config.json", lambda path: path.write_text(text))


def find_heads(directory) -> tuple[Path, Path | None]:
    """-> (directory of the heads, stage 2 directory or None). A stage 2 directory is the trained backbone's
    checkpoint, with the heads in a subdirectory."""
    directory = Path(directory)
    if (directory / HEADS_DIR / HEADS_FILE).is_file():
        return directory / HEADS_DIR, directory
    if directory.name == HEADS_DIR and (directory.parent / "config.json").is_file():
        return directory, directory.parent
    if not (directory / HEADS_FILE).is_file():
        raise BadInput(f"there are no Medusa heads in {directory}: no {HEADS_FILE}, no {HEADS_DIR}/{HEADS_FILE}")
    return directory, None


def load_config(directory: Path) -> dict:
    """config.json of a heads directory. Raises BadInput if it is missing, broken, or not a config of heads."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {directory / 'config.json'}: {error}") from error
    keys = ("medusa_num_heads", "medusa_num_layers", "hidden_size", "vocab_size")
    for key in keys:
        if not isinstance(config.get(key), int):
            raise BadInput(f"{directory / 'config.json'} has no number {key}: it is not a config of Medusa heads")
    return config


def load_heads(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a heads directory. Raises BadInput unless the tensors are those that the config promises,
    with its shapes, and finite."""
    path, config = directory / HEADS_FILE, load_config(directory)
    try:
        state_dict = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    heads, layers = config["medusa_num_heads"], config["medusa_num_layers"]
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    expected = {f"{h}.{layers}.weight": [vocab, hidden] for h in range(heads)}
    for h in range(heads):
        for layer in range(layers):
            expected[f"{h}.{layer}.linear.weight"] = [hidden, hidden]
            expected[f"{h}.{layer}.linear.bias"] = [hidden]
    missing, extra = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    for problem, names in (("lacks tensor", missing), ("has an unexpected tensor", extra)):
        if names:
            raise BadInput(
                f"{path} {problem} {min(names)} ({len(names)} such in all): it does not hold the {heads} heads of "
                f"{layers} ResBlocks that the config.json beside it promises"
            )
    for name, tensor in state_dict.items():
        if list(tensor.shape) != expected[name]:
            raise BadInput(f"{path}: {name} has shape {list(tensor.shape)}, but config.json says {expected[name]}")
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity: take the heads of an earlier checkpoint")
    return config, state_dict
