"""Loads conversations from files, directories and the Hub into a dataset, and holds some out."""

import glob
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
from datasets.builder import Key

from common.errors import BadInput, first_line
from conversations.columns import FEATURES, plain_table, read_plain, to_table
from conversations.files import SUFFIXES, check_split, find_files, read_blocks, read_rows
from conversations.json_files import Lines, in_lists, parse_lines
from conversations.records import to_conversation
from conversations.summary import Summary
from conversations.version import code_version

logger = logging.getLogger(__name__)


def load_conversations(
    paths: str | list[str],
    summary: Summary | None = None,
    *,
    cache_dir: str | None = None,
    config: str | None = None,
    split: str | None = None,
    ask: bool = False,
) -> datasets.Dataset:
    """All usable conversations of files, directories, globs and Hub datasets, in the columns of
    `conversations.columns.FEATURES`; a row's `messages` are those of `conversations.records`.

    summary: is told what became of the records; without one, the table is logged. config: of a Hub dataset. split: of
    a Hub dataset or a directory (default: train); a file that is named has none. ask: see `to_conversation`. Raises
    BadInput if no record is left.

    They are stored in datasets' cache and mapped from there, so a set may be larger than memory. The first time it
    needs as much disk as the conversations' text, and a Hub dataset as much again twice, for its files and for
    datasets' own table of it. Stored ones are used if neither the files nor this folder's code have changed.
    """
    paths = [paths] if isinstance(paths, str) else paths
    if config and all(map(is_local, paths)):
        raise BadInput(f"--dataset_config {config}: {' '.join(paths)} is no Hub dataset, and has no configurations")
    inputs = [found for path in paths for found in find_inputs(path, config, split, cache_dir)]
    builder = Conversations(
        inputs=inputs, cache_dir=cache_dir, stamps=[_stamp(i) for i in inputs], ask=ask, code=code_version()
    )
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from None
        raise
    told = summary or Summary(" ".join(paths))
    told.add(json.loads(builder.info.description))
    if summary is None:
        logger.log(logging.WARNING if told.skipped or told.dropped else logging.INFO, "%s", told.table())
    told.check()
    return builder.as_dataset(split="train")


def is_local(path: str) -> bool:
    return glob.has_magic(path) or os.path.exists(os.path.expanduser(path))


def find_inputs(
    path: str, config: str | None, wanted: str | None, cache_dir: str | None
) -> list[str | datasets.Dataset]:
    """The files that a path stands for, or the table that datasets makes of it."""
    local, split = os.path.expanduser(path), wanted or "train"
    if os.path.isfile(local):
        if wanted:
            raise BadInput(f"{path} is a file, so it has no split {wanted!r}: name the file with that part instead")
        return [local]
    if any(os.path.isfile(os.path.join(local, name)) for name in ("dataset_dict.json", "state.json")):
        try:
            data = datasets.load_from_disk(local)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"cannot read the saved dataset {path}: {first_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            check_split(path, split, data)
            data = data[split]
        return [data]
    if os.path.isdir(local) or glob.has_magic(local):
        return [*find_files(local, split)]
    if local.endswith(SUFFIXES) or path.count("/") > 1 or path[:1] in ("", ".", "/", "~"):
        raise BadInput(f"there is no file or directory {path!r}")
    try:
        return [datasets.load_dataset(path, config, split=split, cache_dir=cache_dir)]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split()) or type(error).__name__  # it lists configs and splits on further lines
        raise BadInput(f"{path} is no file here, and cannot be loaded from the Hub: {why[:500]}") from error


def _stamp(found: str | datasets.Dataset) -> tuple:
    """What a cached copy must agree with."""
    if isinstance(found, datasets.Dataset):
        return ("table", found._fingerprint)
    stat = os.stat(found)
    return (os.path.abspath(found), stat.st_size, stat.st_mtime_ns)


@dataclass
class _Config(datasets.BuilderConfig):
    """Makes the name of the cached copy."""

    stamps: list | None = None
    ask: bool = False
    code: str = ""


class Conversations(datasets.ArrowBasedBuilder):
    """Stores the usable conversations of its inputs. The counts of a Summary stand in the description, as JSON."""

    BUILDER_CONFIG_CLASS = _Config

    def __init__(self, inputs: list[str | datasets.Dataset], **options):
        self.inputs = inputs  # may be read; only their stamps make the cache's name
        super().__init__(**options)

    def _info(self):
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator("train")]

    def _generate_tables(self):
        summary = Summary("")
        for number, table in enumerate(_ahead(self._convert(summary))):
            yield Key(0, number), table
        self.info.description = json.dumps(summary.counts)

    def _convert(self, summary: Summary) -> Iterator[pa.Table]:
        for found in self.inputs:
            table = isinstance(found, datasets.Dataset)
            for block in _ahead(in_lists(read_rows(found)) if table else read_blocks(found)):
                yield _to_table(found, block, summary, self.config.ask)


def _ahead(items: Iterator) -> Iterator:
    """The same items, each made in another thread while the one before is used: a block is read while the last one is
    parsed and the one before that is written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _to_table(path, block: Lines | list, summary: Summary, ask: bool) -> pa.Table:
    """The usable conversations of a block, in its order. The summary counts all of its records."""
    plain = others = None
    if isinstance(block, Lines) and not ask and (plain := read_plain(block.data)):  # prompts are few, and have a group
        others = _others(block.data, plain[0])
    if others is None:
        plain, others = None, list(enumerate(parse_lines(path, block) if isinstance(block, Lines) else block))
    first, numbers, conversations = summary.read + 1, [], []
    for index, record in others:
        conversation, problem, dropped = to_conversation(record, ask)
        if conversation is None:
            summary.skip(problem, first + index)
        else:
            numbers.append(first + index)
            conversations.append(conversation)
        for reason in dropped:
            summary.drop(reason)
    summary.read += len(plain[0]) if plain else len(others)
    table = to_table(numbers, conversations)
    if not plain:
        return table
    plains = plain_table(first + np.flatnonzero(plain[0]), plain[1])
    return pa.concat_tables([plains, table]).sort_by("record") if numbers else plains


def _others(lines: bytes, plain: np.ndarray) -> list[tuple[int, object]] | None:
    """The records that are not plain, with their places; None if lines and records do not agree."""
    places = np.flatnonzero(~plain)
    if not len(places):
        return []
    texts = [line for line in lines.split(b"\n") if line.strip()]
    if len(texts) != len(plain):
        return None
    try:
        return [(int(place), json.loads(texts[place].decode())) for place in places]
    except (ValueError, RecursionError):
        return None


def is_share_or_number(holdout: float) -> bool:
    return 0 <= holdout < math.inf and (holdout < 1 or float(holdout).is_integer())


def split_conversations(
    data: datasets.Dataset, eval_data: datasets.Dataset | None, holdout: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """-> (train, eval). Without eval_data, holds out the last `holdout` conversations (a share if below 1, else a
    number). Drops from train what is in eval too, so that the model never trains on it."""
    if eval_data is None:
        if not is_share_or_number(holdout):
            raise BadInput(f"--eval_holdout {holdout:g}: a share below 1, or a number of conversations")
        count = round(holdout * len(data)) if holdout < 1 else int(holdout)
        if holdout <= 0:
            return data, None
        if not 0 < count < len(data):
            raise BadInput(f"--eval_holdout {holdout:g} leaves nothing to train on or to evaluate of {len(data)}")
        data, eval_data = data.select(range(len(data) - count)), data.select(range(len(data) - count, len(data)))
    held_out = set(_digests(eval_data))
    keep = [i for i, digest in enumerate(_digests(data)) if digest not in held_out]
    if len(keep) < len(data):
        logger.warning("left %d conversations out of training that are also held out", len(data) - len(keep))
        if not keep:
            raise BadInput("every training conversation is also held out: give more, or different files")
    return data.select(keep) if len(keep) < len(data) else data, eval_data


def _digests(data: datasets.Dataset) -> Iterator[bytes]:
    """Of all that a conversation is, but for its number."""
    for row in data.remove_columns("record"):
        yield hashlib.sha1(json.dumps(row, sort_keys=True).encode()).digest()
