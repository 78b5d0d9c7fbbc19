"""Heads that other programs wrote, read as if this project had: under its names, with sizes and counts.

    medusa_lm_head.pt or .safetensors     the original Medusa, TGI: our names, but no sizes in config.json
    ... with ResBlocks only               TGI's version 2, the original's later trainer: the lm_head is the projection
    blocks.{h}.layers.{l}, lm_heads.{h}   vLLM up to 0.32; with a token_map if they guess a part of the tokens
    medusa_head. or medusa_heads. before  a whole checkpoint of axolotl's fork or of ModelOpt, backbone included

Sizes and counts are those of the tensors. Where config.json counts otherwise, a line of the log says so: that of
medusa-vicuna-7b-v1.3 promises 2 heads, and its file has 5. Pickles are read by torch's list of what is harmless.
"""

import logging
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from common.errors import BadInput, first_line

logger = logging.getLogger(__name__)

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model*.safetensors", "pytorch_model*.bin")
PREFIX = re.compile(r"medusa_heads?\.")
BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)|blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
PROJECTION = re.compile(r"(\d+)\.\d+\.weight|lm_heads\.(\d+)\.weight")
TOKEN_MAP = "token_map"
COUNTS = {  # what others call them in config.json
    "medusa_num_heads": ("medusa_num_heads", "num_medusa_heads", "num_heads"),
    "medusa_num_layers": ("medusa_num_layers", "num_medusa_layers"),
}


class Foreign(NamedTuple):
    places: dict[str, tuple[Path, str]]  # our name -> file, name in it
    config: dict  # as our config.json
    whole: bool  # the backbone is there too


def unpickle(path: Path) -> dict[str, torch.Tensor]:
    """A pickle's tensors; they stay on disk until they are used. Raises BadInput for anything else."""
    try:
        # Files of torch before 1.6 are no archives, and cannot stay on disk.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle or archive raises any kind
        raise BadInput(f"{path} is damaged, or would run code if it were read: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise BadInput(f"{path} holds something else than named tensors")
    return found


def shapes(path: Path) -> dict[str, list[int]]:
    """Of all tensors of a file. Raises BadInput if it cannot be read."""
    if path.suffix != ".safetensors":
        return {name: list(tensor.shape) for name, tensor in unpickle(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path}: {first_line(error)}") from error


def our_names(names: list[str]) -> dict[str, str]:
    """our name -> name, of the tensors of heads among these. A projection's number follows those of the ResBlocks."""
    prefixed = [name for name in names if PREFIX.match(name)]
    ours: dict[str, str] = {}
    projections: dict[str, str] = {}
    for name in prefixed or names:
        bare = PREFIX.sub("", name)
        if match := BLOCK.fullmatch(bare):
            h, layer, kind = match.groups()[:3] if match[1] else match.groups()[3:]
            ours[f"{h}.{layer}.linear.{kind}"] = name
        elif match := PROJECTION.fullmatch(bare):
            if (h := match[1] or match[2]) in projections:
                raise BadInput(f"head {h} has two projections, {projections[h]} and {name}")
            projections[h] = name
        elif bare == TOKEN_MAP:
            ours[bare] = name
    layers = 1 + max((int(name.split(".")[1]) for name in ours if name != TOKEN_MAP), default=-1)
    return ours | {f"{h}.{layers}.weight": name for h, name in projections.items()}


def recognise(directory: Path, config: dict) -> Foreign | None:
    """What heads there are in a directory, if any. config: of its config.json, whatever that is. Raises BadInput for a
    file that cannot be read."""
    for pattern in FILES:
        found = [(path, shapes(path)) for path in sorted(directory.glob(pattern))]
        where = {name: (path, shape) for path, every in found for name, shape in every.items()}
        if names := our_names([*where]):
            whole = any("embed" in name for name in where)
            left = where.keys() - names.values() - {"lm_head.weight"}  # vLLM: the backbone's, beside the heads
            if left and not whole:
                raise BadInput(f"{directory} holds heads, and a tensor {min(left)} that no known kind of heads has")
            places = {ours: (where[name][0], name) for ours, name in names.items()}
            sizes = {ours: where[name][1] for ours, name in names.items()}
            return Foreign(places, complete(config, sizes, directory), whole)
    return None


def complete(config: dict, sizes: dict[str, list[int]], directory: Path) -> dict:
    """Our config.json for tensors of these sizes (by our names)."""
    numbers = [[int(x) for x in name.split(".")[:2]] for name in sizes if name != TOKEN_MAP]
    projected = {h: n for h, n in numbers if f"{h}.{n}.weight" in sizes}
    matrices = [size for name, size in sizes.items() if name.endswith("weight")]
    if not numbers or any(len(size) != 2 for size in matrices):
        raise BadInput(f"{directory} has tensors named as heads' that are no heads: a weight is not a matrix")
    blocks = 1 + max((n for h, n in numbers if f"{h}.{n}.weight" not in sizes), default=-1)
    counts = {"medusa_num_heads": 1 + max(h for h, _ in numbers), "medusa_num_layers": blocks}
    parts = [part for part in (config, config.get("medusa")) if isinstance(part, dict)]  # ModelOpt's are one deeper
    for key, names in COUNTS.items():
        says = next((part[name] for part in parts for name in names if isinstance(part.get(name), int)), counts[key])
        if says != counts[key]:
            logger.warning("%s: config.json says %s %d, the tensors are of %d", directory, key, says, counts[key])
    shape = sizes[f"{min(projected)}.{blocks}.weight"] if projected else matrices[0]
    vocab, draft = config.get("vocab_size"), sizes.get(TOKEN_MAP, [None])[0]
    if projected and draft is None:
        vocab = shape[0]
    mine = {"medusa_vocab_size": draft} if draft is not None and draft != vocab else {}
    mine |= {} if projected else {"shares_lm_head": True}
    base = {key: config[key] for key in ("base_model_name_or_path",) if isinstance(config.get(key), str)}
    return counts | {"hidden_size": shape[1], "vocab_size": vocab, "medusa_head_type": "medusa"} | base | mine


def read(foreign: Foreign) -> dict[str, torch.Tensor]:
    """Its tensors by our names. ResBlocks without any bias have zeros there: the same numbers. A token_map ascends,
    and projections follow it."""
    found: dict[str, torch.Tensor] = {}
    for path in {path for path, _ in foreign.places.values()}:
        here = {ours: name for ours, (place, name) in foreign.places.items() if place == path}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {ours: file.get_tensor(name) for ours, name in here.items()}
        else:
            tensors = unpickle(path)
            found |= {ours: tensors[name] for ours, name in here.items()}
    if not any(name.endswith("bias") for name in found):
        weights = {name: tensor for name, tensor in found.items() if name.endswith("linear.weight")}
        found |= {name.replace("weight", "bias"): x.new_zeros(len(x)) for name, x in weights.items()}
    if (token_map := found.pop(TOKEN_MAP, None)) is not None:
        token_map, order = token_map.long().sort()
        n = foreign.config["medusa_num_layers"]
        for name in [name for name in found if name.split(".")[1:] == [str(n), "weight"]]:
            rows = found[name]  # of the tokens of the map, or of all tokens
            if len(rows) != len(order) and not 0 <= token_map[0] <= token_map[-1] < len(rows):
                raise BadInput(f"the token_map names tokens outside of the {len(rows)} that {name} guesses")
            found[name] = rows[order] if len(rows) == len(order) else rows[token_map]
        if "medusa_vocab_size" in foreign.config:
            found[TOKEN_MAP] = token_map
        elif token_map.tolist() != [*range(len(token_map))]:
            raise BadInput("the token_map has as many tokens as the vocabulary, but not each once")
    return found
