"""What store_states.py is going to store: into which files, whether they are there, and whether the disk has room."""

import logging
import os
import shutil
from datetime import date as Date
from pathlib import Path

import torch

from common.errors import BadInput
from conversations.template import ChatTemplate
from training.run import digest
from training.states import PARTS, PLAN, fingerprint, open_shard, read_plan, template_hash

logger = logging.getLogger(__name__)

SHARD_BYTES = 10**9


def existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def begun(output: Path) -> dict:
    """The plan with which `output` was begun; {} if it is new. Raises BadInput if it cannot be written to."""
    if not (there := existing(output)).is_dir():
        raise BadInput(f"--output {output}: {there} is a file, not a directory")
    if (output / PLAN).is_file():
        return read_plan(output / PLAN)
    if there == output and any(path.name != f"{PLAN}.tmp" for path in output.iterdir()):  # that: killed at once
        raise BadInput(f"{output} is not empty, and store_states.py did not write it: choose another --output")
    return {}


def make_plan(store, data_args, chat: ChatTemplate, date: Date, backbone, rows: dict) -> dict:
    """What the states will be of. backbone: without its layers. rows: of each part."""
    dtype, name = getattr(torch, store.dtype), store.model_name_or_path
    hidden_size = backbone.get_output_embeddings().weight.shape[1]
    per_token = hidden_size * dtype.itemsize + 8
    return {
        "model_name_or_path": os.path.abspath(name) if os.path.isdir(name) else name,
        "model": fingerprint(backbone),
        "hidden_size": hidden_size,
        "dtype": store.dtype,
        "backbone_dtype": store.backbone_dtype,
        "model_max_length": data_args.model_max_length,
        "medusa_num_heads": store.medusa_num_heads,
        "chat_template": template_hash(chat),
        "chat_template_kwargs": chat.kwargs,
        "date": date.isoformat(),
        "data": [digest(part) for part in rows.values()],
        "shards": {
            part: cut(part, list(rows[part]["length"]), SHARD_BYTES // per_token) if part in rows else []
            for part in PARTS
        },
    }


def cut(part: str, lengths: list[int], most: int) -> list[dict]:
    """Consecutive rows, as many to a shard as have at most `most` tokens (or one that has more)."""
    shards: list[dict] = []
    for length in map(int, lengths):
        if not shards or shards[-1]["tokens"] + length > most:
            shards.append({"file": f"{part}/{len(shards):05}.safetensors", "rows": 0, "tokens": 0})
        shards[-1]["rows"] += 1
        shards[-1]["tokens"] += length
    return shards


def check_plan(output: Path, found: dict, plan: dict):
    """Raises BadInput if the states that stand in `output` are not those of the plan."""
    names = {
        "model": "another model (--model_name_or_path)",
        "data": "other data (--data_path, --eval_holdout or another of its flags)",
        "shards": "files of another size, as another version writes them",
    }
    for key, value in plan.items():
        if found.get(key) != value and key != "model_name_or_path":  # a model may have moved
            what = names.get(key, f"another --{key}")
            raise BadInput(f"{output} was begun with {what}: use the same, or another --output")


def all_shards(plan: dict) -> list[dict]:
    return [shard for shards in plan["shards"].values() for shard in shards]


def missing(output: Path, plan: dict) -> list[str]:
    """The files of the shards that are not there or not whole."""
    left = []
    for shard in all_shards(plan):
        try:
            open_shard(output / shard["file"], shard, plan)
        except BadInput:
            left.append(shard["file"])
    return left


def check_disk(output: Path, plan: dict, left: list[str]):
    """Logs what will be stored. Raises BadInput if the disk has less room than that."""
    width, size, shards = plan["hidden_size"], getattr(torch, plan["dtype"]).itemsize, all_shards(plan)
    tokens = sum(shard["tokens"] for shard in shards)
    needed = sum(s["tokens"] * (width * size + 8) + s["rows"] * 4 for s in shards if s["file"] in left)
    free = shutil.disk_usage(existing(output)).free
    what = f"{tokens:,} tokens x {width:,} x {size} bytes = {tokens * width * size / 1e9:,.4g} GB"
    logger.info("hidden states: %s in %d files; %d of them are there", what, len(shards), len(shards) - len(left))
    if needed > free:
        raise BadInput(
            f"the hidden states take {what} and 8 bytes a token more; {needed / 1e9:,.4g} GB are still to be written, "
            f"and the disk of {output} has {free / 1e9:,.4g} GB free: name another --output, or fewer conversations"
        )
