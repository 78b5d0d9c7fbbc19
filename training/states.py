"""Stored hidden states: what store_states.py writes, and what train.py --states_path trains on.

DIR/plan.json                      what the states are of: model, data, chat template, dtype. Written first
DIR/train/00000.safetensors, ...   the rows in the order of the data set, one behind the other, without padding:
                                   hidden [N, H]; input_ids, labels [N] and lengths [R], int32; N tokens of R rows
DIR/eval/00000.safetensors, ...    the same of the rows to evaluate on, if there are any
DIR/index.json                     the plan, and size and checksum of each shard. Written last: it makes DIR whole
"""

import bisect
import hashlib
import json
import logging
from collections.abc import Iterator
from datetime import date as Date
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from common.errors import BadInput, first_line
from common.files import read_json, write_atomically
from conversations.options import parse_kwargs
from conversations.template import ChatTemplate

logger = logging.getLogger(__name__)

PLAN, INDEX, PARTS = "plan.json", "index.json", ("train", "eval")
DTYPES = {"bfloat16": "BF16", "float32": "F32"}  # as --dtype and as safetensors call them
KEYS = {"model_name_or_path", "model", "hidden_size", "dtype", "model_max_length", "date", "shards"}  # what is read
KEYS |= {"chat_template", "chat_template_kwargs"}
SAMPLE = 64  # rows of a matrix that a checksum or fingerprint reads, at equal distances


def sample(matrix) -> Iterator[bytes]:
    """The bytes of SAMPLE rows of `[N, ...]`, a tensor or a slice of safetensors' that is not read yet."""
    count = (matrix.shape if isinstance(matrix, torch.Tensor) else matrix.get_shape())[0]
    for i in sorted({i * (count - 1) // (SAMPLE - 1) for i in range(SAMPLE)}):
        yield matrix[i : i + 1].contiguous().view(torch.uint8).numpy().tobytes()


def fingerprint(backbone) -> str:
    """A hash that tells models apart by what a backbone without layers has: embeddings, last norm, lm_head. The same
    whatever dtype they were loaded in. Rows are sampled: a whole lm_head would take seconds."""
    found = hashlib.sha256()
    for weight in backbone.parameters():
        found.update(str(list(weight.shape)).encode())
        found.update(b"".join(sample(weight.detach().to("cpu", torch.bfloat16))))
    return found.hexdigest()


def template_hash(chat: ChatTemplate) -> str:
    return hashlib.sha256((chat.text + chat.tools_text).encode()).hexdigest()


def write_json(path: Path, value: dict):
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


# ---- shards ----


def open_shard(path: Path, shard: dict, plan: dict) -> safe_open:
    """A shard, mapped into memory. Raises BadInput unless it holds what the plan says, and, where `shard` has a
    checksum (the index's), unless it agrees."""
    rows, tokens, kind = shard["rows"], shard["tokens"], DTYPES[plan["dtype"]]
    expected = {"hidden": (kind, [tokens, plan["hidden_size"]]), "lengths": ("I32", [rows])}
    expected |= {"input_ids": ("I32", [tokens]), "labels": ("I32", [tokens])}
    again = "run store_states.py again with the flags of the first time: it makes that file anew"
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        whole = found == expected and shard.get("checksum") in (None, checksum(file))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path} ({first_line(error)}): {again}") from error
    if not whole:
        raise BadInput(f"{path} is not what was stored there: {again}")
    return file


def checksum(file: safe_open) -> str:
    """Of a shard: its lengths, tokens and labels, and a sample of its hidden states. All of them would take longer to
    read than the first steps take."""
    found = hashlib.sha256()
    for name in ("lengths", "input_ids", "labels"):
        found.update(file.get_tensor(name).numpy().tobytes())
    found.update(b"".join(sample(file.get_slice("hidden"))))
    return found.hexdigest()


class StoredRows(Dataset):
    """Rows of stored states, used as the tokenised data sets of conversations/rows.py are.

    `rows[i]` has `input_ids`, `labels` `[T]` (int32) and `hidden` `[T, H]`, in `dtype`. `rows["labels"]`, or another
    column, runs through all rows and does not read `hidden`. Only the pages of a shard that are asked for are read.
    """

    column_names = ("input_ids", "labels", "length")

    def __init__(self, directory: Path, shards: list[dict], plan: dict, dtype: torch.dtype):
        self.paths, self.dtype = [directory / shard["file"] for shard in shards], dtype
        files = [open_shard(path, shard, plan) for path, shard in zip(self.paths, shards, strict=True)]
        lengths = [file.get_tensor("lengths").numpy() for file in files]
        self.lengths: list[int] = np.concatenate(lengths).tolist()
        self.first_rows = np.cumsum([0, *map(len, lengths)]).tolist()  # of each shard
        self.starts = np.concatenate([np.cumsum(part) - part for part in lengths]).tolist()  # of each row in its shard
        self.checksum = "".join(shard["checksum"] for shard in shards)
        self.files: dict[int, safe_open] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}}  # a loader's process opens its own

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.lengths if key == "length" else self._column(key)
        number = bisect.bisect_right(self.first_rows, key) - 1
        file, start = self._file(number), self.starts[key]
        rows = slice(start, start + self.lengths[key])
        found = {name: file.get_slice(name)[rows].numpy() for name in ("input_ids", "labels")}
        return found | {"hidden": file.get_slice("hidden")[rows].to(self.dtype)}

    def _file(self, number: int) -> safe_open:
        if number not in self.files:
            self.files[number] = safe_open(self.paths[number], framework="pt")
        return self.files[number]

    def whole_columns(self, name: str) -> Iterator[np.ndarray]:
        """A column of each shard, its rows one behind the other."""
        for number in range(len(self.paths)):
            yield self._file(number).get_tensor(name).numpy()

    def _column(self, name: str) -> Iterator[np.ndarray]:
        for number, column in enumerate(self.whole_columns(name)):
            yield from np.split(column, self.starts[self.first_rows[number] + 1 : self.first_rows[number + 1]])


# ---- what train.py does with them ----


def read_plan(path: Path) -> dict:
    """plan.json or index.json. Raises BadInput if it is neither."""
    found = read_json(path)
    if not isinstance(found, dict) or not found.keys() >= KEYS:
        raise BadInput(f"{path} is not one that store_states.py wrote: name another directory, or store them again")
    return found


def read_index(directory: Path) -> dict:
    if not (directory / INDEX).is_file():
        if (directory / PLAN).is_file():
            raise BadInput(f"the states in {directory} are not finished: run store_states.py again, it goes on")
        raise BadInput(f"--states_path {directory}: there are no states, which store_states.py would have stored")
    return read_plan(directory / INDEX)


def load_states(model_args, data_args, chat: ChatTemplate, dtype: torch.dtype) -> tuple[Dataset, Dataset | None]:
    """-> (rows to train on, rows to evaluate on or None), with hidden states in `dtype`. Raises BadInput if the flags
    ask for other rows than were stored, or if a shard is damaged."""
    directory = Path(data_args.states_path)
    index = read_index(directory)
    check_flags(model_args, data_args, chat, index)
    parts = [StoredRows(directory, index["shards"][part], index, dtype) for part in PARTS if index["shards"][part]]
    shortest, heads = min(min(rows.lengths) for rows in parts), model_args.num_heads
    if shortest < heads + 2:
        raise BadInput(
            f"--medusa_num_heads {heads}: head {heads} needs rows of {heads + 2} tokens, and {directory} has one of "
            f"{shortest}: store the states again with this --medusa_num_heads, which leaves such rows out"
        )
    logger.info(
        "hidden states of %s in %s: %s", index["model_name_or_path"], index["dtype"],
        " and ".join(f"{len(r):,} rows ({sum(r.lengths):,} tokens) to {what}" for r, what in zip(
            parts, ("train on", "evaluate on"), strict=False)),
    )  # fmt: skip
    return parts[0], parts[1] if len(parts) > 1 else None


def check_flags(model_args, data_args, chat: ChatTemplate, index: dict):
    """Raises BadInput if a flag that decides what the rows are says something else than when they were stored."""
    kwargs = model_args.chat_template_kwargs
    then = ChatTemplate(chat.tokenizer, chat.stops, chat.kwargs, Date.fromisoformat(index["date"]))
    asked = {
        "--model_max_length": (data_args.model_max_length, index["model_max_length"]),
        "--chat_template_kwargs": (parse_kwargs(kwargs) if kwargs else None, index["chat_template_kwargs"]),
    }
    for flag, (now, stored) in asked.items():
        if now not in (None, stored):
            stored = stored if isinstance(stored, int) else json.dumps(stored)
            raise BadInput(f"the states in {data_args.states_path} were stored with {flag} {stored}: leave it out")
    if template_hash(then) != index["chat_template"]:  # the heads are saved with this tokenizer
        raise BadInput(
            f"the states in {data_args.states_path} were stored with another chat template than "
            f"{model_args.chat_template or chat.name} has: give --chat_template as you gave it to store_states.py"
        )


def check_model(states_path: str, name: str, found: str | None):
    """Raises BadInput, on every process, if the states are another model's. found: the fingerprint of the backbone
    `name`; None where a process does not read weights."""
    index = read_json(Path(states_path, INDEX))
    if any(other not in (None, index["model"]) for other in gather_object([found])):
        raise BadInput(
            f"the states in {states_path} were stored with {index['model_name_or_path']}, and {name} has other "
            "embeddings, last norm or lm_head: it is not the same model"
        )
