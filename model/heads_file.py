"""The heads on disk: one safetensors file and a config.json, named as the original Medusa and TGI expect.

    {h}.{l}.linear.weight, {h}.{l}.linear.bias   ResBlock l of head h (h = 0 is head 1)   [H, H], [H]
    {h}.{n}.weight                               its projection, n = number of ResBlocks  [V, H]

Other types of heads (model/path_heads.py) have `medusa_head_type` in config.json; k = h + 1 is how many tokens they
know:

    markov    {h}.{n}.weight                     with `medusa_rank` r in config.json      [V, H + r]
              {h}.table                          its row of a token                       [V, r]
    hydra     {h}.0.linear.weight                the first ResBlock's                     [H, (k + 1) H]

Heads of a draft vocabulary (model/vocabulary.py) have V' in the place of V in projections, `medusa_vocab_size` in
config.json, and

    token_map                                    which tokens they guess, ascending       [V'], int64

With a prefix layer (model/prefix.py) config.json has `medusa_prefix_layer`: true, and the file has

    prefix.layers.0...                           the layer, as the backbone's decoder names its own

No pickle, so loading a heads file cannot run code. Heads of other programs are read too (model/foreign.py).
"""

import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from common.errors import BadInput
from common.files import write_atomically
from model import foreign
from model.adapter import CONFIG
from model.config import MedusaConfig
from model.foreign import TOKEN_MAP, Foreign
from model.path_heads import HEAD_TYPES, make_heads
from model.prefix import PREFIX
from model.readable import make_readable

logger = logging.getLogger(__name__)

HEADS_FILE = "medusa_lm_head.safetensors"  # the name the original Medusa and TGI look for
HEADS_DIR = "medusa_heads"  # where a stage 2 directory keeps its heads, next to the backbone's own files


def save_heads(state_dict: dict[str, torch.Tensor], config: dict, directory: Path):
    """Writes the heads file and its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_atomically(directory / HEADS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / "config.json", lambda path: path.write_text(text))
    make_readable(directory)


def find_heads(directory) -> tuple[Path, Path | None]:
    """-> (directory of the heads, the trained backbone's directory or None). In a stage 2 directory the heads are in a
    subdirectory of the backbone's checkpoint, in a whole checkpoint of others among its tensors."""
    directory = Path(directory)
    if (directory / HEADS_DIR / HEADS_FILE).is_file():
        return directory / HEADS_DIR, directory
    if directory.name == HEADS_DIR and any((directory.parent / name).is_file() for name in ("config.json", CONFIG)):
        return directory, directory.parent
    if not directory.is_dir():
        raise BadInput(
            f"there is no directory {directory}: if these are heads of the Hub, fetch them with `hf download "
            f"{directory} --local-dir heads` and give that directory"
        )
    if (directory / HEADS_FILE).is_file():
        return directory, None
    if (found := of_others(directory, {})) is None:
        raise BadInput(
            f"there are no Medusa heads in {directory}: no {HEADS_FILE}, no {HEADS_DIR}/{HEADS_FILE}, and none in the "
            "files of other programs (medusa_lm_head.pt, model*.safetensors, pytorch_model*.bin)"
        )
    return directory, directory if found.whole else None


def of_others(directory: Path, config: dict) -> Foreign | None:
    """What another program has written there, or None. config: its config.json, where ours has sizes."""
    sized = "medusa_head_type" in config or {"hidden_size", "vocab_size"} <= config.keys()
    return None if sized and (directory / HEADS_FILE).is_file() else foreign.recognise(directory, config)


def tokenizer_of(heads_dir: Path, backbone_dir: Path | None, base_model: str | None) -> str:
    """Where the tokenizer is: in the backbone's directory or with the heads, or else with the backbone that
    --base_model or config.json names."""
    place = backbone_dir or heads_dir
    if (place / "tokenizer_config.json").is_file() or (place / "tokenizer.json").is_file():
        return str(place)
    return base_model or base_of(MedusaConfig(**load_config(heads_dir)), heads_dir)


def read_config(directory: Path) -> dict:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {directory / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{directory / 'config.json'} is not a config of Medusa heads")
    return config


def load_config(directory: Path) -> dict:
    """config.json of a heads directory, completed from the tensors if another program wrote it. Raises BadInput if it
    is missing, broken, or not a config of heads."""
    config = read_config(directory)
    if (found := of_others(directory, config)) is not None:
        config = found.config
    kind = config.setdefault("medusa_head_type", "medusa")
    if kind not in tuple(HEAD_TYPES):
        raise BadInput(f"{directory / 'config.json'}: medusa_head_type {kind} is not one of {', '.join(HEAD_TYPES)}")
    keys = ["medusa_num_heads", "medusa_num_layers", "hidden_size", "vocab_size"]
    if config.get("shares_lm_head"):
        keys.remove("vocab_size")  # the backbone's, whatever it is
    for key in (*keys, *(["medusa_rank"] if kind == "markov" else [])):
        if type(config.get(key)) is not int or config[key] < (key != "medusa_num_layers"):
            raise BadInput(f"{directory / 'config.json'} has no number {key}: it is not a config of Medusa heads")
    if not isinstance(config.get("medusa_prefix_layer", False), bool):
        raise BadInput(f"{directory / 'config.json'}: medusa_prefix_layer is neither true nor false")
    draft = config.get("medusa_vocab_size")
    if draft is not None and not (type(draft) is int and 0 < draft < config["vocab_size"]):
        raise BadInput(
            f"{directory / 'config.json'}: medusa_vocab_size {draft} is no part of {config['vocab_size']} tokens"
        )
    return config


def load_heads(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a heads directory. Raises BadInput unless the tensors are those that the config promises,
    with its shapes, and finite."""
    path, config = directory / HEADS_FILE, load_config(directory)
    others = of_others(directory, read_config(directory))
    try:
        state_dict = foreign.read(others) if others else load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    heads, layers, kind = (config[f"medusa_{name}"] for name in ("num_heads", "num_layers", "head_type"))
    draft = config.get("medusa_vocab_size")
    if heads * max(1, layers) > len(state_dict):  # or a config could have heads made without end
        raise BadInput(f"{path} has {len(state_dict)} tensors, too few for {heads} heads of {layers} ResBlocks")
    shares = bool(config.get("shares_lm_head"))
    with torch.device("meta"):  # names and shapes only
        made = make_heads(MedusaConfig(**config | ({"vocab_size": 1} if shares else {}))).state_dict()
    expected = {name: list(tensor.shape) for name, tensor in made.items() if not shares or "linear" in name}
    if draft is not None:
        expected[TOKEN_MAP] = [draft]
    if config.get("medusa_prefix_layer"):  # which ones they are depends on the backbone: `load_prefix` checks it
        expected |= {name: list(tensor.shape) for name, tensor in state_dict.items() if name.startswith(PREFIX)}
    missing, extra = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    for problem, names in (("lacks tensor", missing), ("has an unexpected tensor", extra)):
        if names:
            tokens = f"{config['vocab_size']} tokens" if draft is None else f"a draft vocabulary of {draft} tokens"
            raise BadInput(
                f"{path} {problem} {min(names)} ({len(names)} such in all): it does not hold the {heads} {kind} heads "
                f"of {layers} ResBlocks and {tokens} that the config.json beside it promises"
            )
    for name, tensor in state_dict.items():
        if list(tensor.shape) != expected[name]:
            says = f"{expected[name]}, for {kind} heads"
            raise BadInput(f"{path}: {name} has shape {list(tensor.shape)}, but config.json says {says}")
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity: take the heads of an earlier checkpoint")
    if draft is not None:
        check_token_map(path, state_dict[TOKEN_MAP], config)
    return config, state_dict


def base_of(config: MedusaConfig, heads_dir: Path) -> str:
    """The backbone that a heads directory names. One that may have to be fetched is named first, aloud: whoever wrote
    config.json chose it. Raises BadInput if none is named."""
    base = config.base_model_name_or_path
    if not base:
        raise BadInput(f"{heads_dir / 'config.json'} names no backbone: give it with --base_model")
    if not os.path.isdir(base):
        logger.warning("the heads in %s are of %s, no directory here: it is taken from the Hub", heads_dir, base)
    return str(base)


def load_token_map(directory: Path) -> torch.Tensor | None:
    """The tokens that the heads in a directory guess, int64 `[V']`, or None for all. Reads no other tensor."""
    path, config = directory / HEADS_FILE, load_config(directory)
    if config.get("medusa_vocab_size") is None:
        return None
    if (others := of_others(directory, read_config(directory))) is not None:
        return foreign.read(others)[TOKEN_MAP]
    try:
        with safe_open(path, framework="pt") as file:
            token_map = file.get_tensor(TOKEN_MAP)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    check_token_map(path, token_map, config)
    return token_map


def check_token_map(path: Path, token_map: torch.Tensor, config: dict):
    """Raises BadInput unless it holds V' ids of tokens, as integers, each higher than the one before."""
    size, vocab_size = config["medusa_vocab_size"], config["vocab_size"]
    if token_map.dtype != torch.int64 or list(token_map.shape) != [size]:
        what = f"{token_map.dtype} {list(token_map.shape)}"
        raise BadInput(f"{path}: {TOKEN_MAP} is {what}, but config.json needs torch.int64 [{size}]")
    if not (token_map.diff() > 0).all():
        raise BadInput(f"{path}: {TOKEN_MAP} does not ascend: each token must stand there once, the lowest id first")
    if token_map[0] < 0 or token_map[-1] >= vocab_size:
        raise BadInput(f"{path}: {TOKEN_MAP} names tokens outside of the {vocab_size} of the vocabulary")


def under(prefix: str, state_dict: dict) -> dict:
    """The entries whose names start with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
