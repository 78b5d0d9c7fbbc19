"""Loads conversations from a local .json or .jsonl file or a Hub dataset, and holds some out."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator

import datasets

from common.errors import BadInput, first_line
from conversations.records import read_records, to_messages

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "record": datasets.Value("int64"),  # 1-based, as a person counts
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "unfinished": datasets.Value("bool"),  # the last answer was cut off: its end is no end of turn
        "problem": datasets.Value("string"),  # why the record is skipped; "" if it is not
    }
)


def _to_row(record: object, index: int) -> dict:
    messages, problem = to_messages(record)
    unfinished = not problem and isinstance(record, dict) and bool(record.get("unfinished"))
    return {"record": index + 1, "messages": messages, "unfinished": unfinished, "problem": problem}


def _read_local(path: str, size: int, mtime: float) -> Iterator[dict]:
    # size and mtime make datasets' cache notice a changed file
    for index, record in enumerate(read_records(path)):
        yield _to_row(record, index)


def _read_hub(row, index: int) -> dict:
    return _to_row(dict(row), index)  # datasets.map passes a mapping that is not a dict


def load_conversations(data_path: str, cache_dir: str | None = None) -> datasets.Dataset:
    """All usable conversations of a local file or of the train split of a Hub dataset (column `messages`)."""
    if os.path.isfile(data_path):
        stat = os.stat(data_path)
        source = {"path": os.path.abspath(data_path), "size": stat.st_size, "mtime": stat.st_mtime}
        try:
            data = datasets.Dataset.from_generator(
                _read_local, features=FEATURES, gen_kwargs=source, cache_dir=cache_dir
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, BadInput) else error from None
    elif data_path.endswith((".json", ".jsonl")) or data_path.count("/") > 1 or data_path[:1] in ("", ".", "/", "~"):
        raise BadInput(f"there is no data file {data_path}")
    else:
        try:
            data = datasets.load_dataset(data_path, split="train", cache_dir=cache_dir)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise BadInput(
                f"{data_path} is no file here, and cannot be loaded from the Hub: {first_line(error)}"
            ) from error
        data = data.map(_read_hub, with_indices=True, features=FEATURES, remove_columns=data.column_names)
    return drop_problems(data, data_path)


def drop_problems(data: datasets.Dataset, name: str) -> datasets.Dataset:
    """Drops the records with a `problem` and logs how many there are of each kind. Raises BadInput if none is left."""
    problems = data["problem"]
    kinds: dict[str, list[int]] = {}
    for record, problem in zip(data["record"], problems, strict=True):
        if problem:
            kinds.setdefault(problem, []).append(record)
    for problem, records in kinds.items():
        logger.warning("%s: skipped %d records: %s (first: record %d)", name, len(records), problem, records[0])
    if sum(map(len, kinds.values())) == len(data):
        reasons = "; ".join(f"{problem} (record {records[0]})" for problem, records in kinds.items())
        raise BadInput(f"{name} holds no usable conversation: {reasons or 'it has no records'}")
    return data.select([i for i, problem in enumerate(problems) if not problem]) if kinds else data


def split_conversations(
    data: datasets.Dataset, eval_data: datasets.Dataset | None, holdout: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """-> (train, eval). Without eval_data, holds out the last `holdout` conversations (a share if below 1, else a
    number). Drops from train what is in eval too, so that the model never trains on it."""
    if eval_data is None:
        if not holdout >= 0:
            raise BadInput(f"--eval_holdout {holdout:g}: 0 or more")
        count = round(holdout * len(data)) if holdout < 1 else int(holdout)
        if holdout <= 0:
            return data, None
        if not 0 < count < len(data):
            raise BadInput(f"--eval_holdout {holdout:g} leaves nothing to train on or to evaluate of {len(data)}")
        data, eval_data = data.select(range(len(data) - count)), data.select(range(len(data) - count, len(data)))

    def digests(data: datasets.Dataset) -> list[bytes]:
        records = zip(data["messages"], data["unfinished"], strict=True)
        return [hashlib.sha1(json.dumps(record, sort_keys=True).encode()).digest() for record in records]

    held_out = set(digests(eval_data))
    keep = [i for i, digest in enumerate(digests(data)) if digest not in held_out]
    if len(keep) < len(data):
        logger.warning("left %d conversations out of training that are also held out", len(data) - len(keep))
        if not keep:
            raise BadInput("every training conversation is also held out: give more, or different files")
    return data.select(keep) if len(keep) < len(data) else data, eval_data
