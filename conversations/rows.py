"""Conversations -> a dataset of tokenised rows, ready for `conversations.batches.Collator`."""

import hashlib
import json
import logging
import os
from collections import Counter
from functools import partial
from typing import Any

import datasets

from common.errors import BadInput
from conversations.batches import pack
from conversations.labels import check_template, encode_all
from conversations.summary import Summary
from conversations.targets import IGNORE
from conversations.template import ChatTemplate
from conversations.version import code_version

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "labels", "length", "record", "problem", "notes")


def encode_records(columns: dict, chat: ChatTemplate, max_length: int, min_length: int) -> dict:
    """`encode_all` for datasets.map. A record becomes one row or several; one that cannot be used becomes a row
    without tokens, with a `problem`. `notes` (JSON) stand in a record's first row."""
    records = columns["record"]
    keys = columns.keys() - {"record"}
    conversations = [{key: columns[key][i] for key in keys} for i in range(len(records))]
    found: dict[str, list] = {key: [] for key in COLUMNS}
    for record, encoded in zip(records, encode_all(conversations, chat, max_length), strict=True):
        rows, problem = encoded.rows, encoded.problem
        if not problem:
            rows = [row for row in rows if any(label != IGNORE for label in row["labels"][1:])]
            problem = "" if rows else f"no assistant token within --model_max_length {max_length}"
        if not problem:
            long = [row for row in rows if len(row["input_ids"]) >= min_length]
            short = f"fewer than {min_length} tokens: no row for the last head"
            problem = "" if long else short
            if long and len(long) < len(rows):
                encoded.notes[f"rows left out: {short}"] += len(rows) - len(long)
            rows = long
        notes = json.dumps(encoded.notes)
        for row in rows if not problem else [{"input_ids": [], "labels": []}]:
            values = (row["input_ids"], row["labels"], len(row["input_ids"]), record, problem, notes)
            for key, value in zip(COLUMNS, values, strict=True):
                found[key].append(value)
            notes = "{}"
    return found


def encode_lazily(columns: dict, **how) -> dict:
    """`encode_records` for Dataset.with_transform (`--lazy_preprocess`), on a batch of conversations. A record that
    cannot be used is logged when it is drawn, and becomes one token without a label: it does not change the loss. One
    of several rows makes its batch that much larger."""
    found = encode_records(columns, **how)
    for i, problem in enumerate(found["problem"]):
        if problem:
            logger.warning("record %d is left out of the loss: %s", found["record"][i], problem)
            found["input_ids"][i], found["labels"][i] = [0], [IGNORE]
    return {key: found[key] for key in ("input_ids", "labels")}


def prepare(
    data: datasets.Dataset,
    summary: Summary,
    chat: ChatTemplate,
    max_length: int,
    min_length: int = 2,
    lazy: bool = False,
    packing: bool = False,
    by_length: bool = False,
) -> datasets.Dataset:
    """Conversations -> a dataset of input_ids, labels (and position_ids if packed), ready for `batches.Collator`. The
    summary learns what became of the records. Raises BadInput if nothing is left.

    min_length: the tokens a conversation needs so that each of K heads has a target (K + 2).
    lazy: tokenise when a batch is drawn; lengths are not known then.
    packing: put several conversations into a row of max_length tokens.
    by_length: shortest first, so that batches in this order need little padding.
    """
    check_template(chat)
    how: dict[str, Any] = {"chat": chat, "max_length": max_length, "min_length": min_length}
    if lazy:
        first = encode_records(data[: min(20, len(data))], **how)["problem"]
        if all(first):
            raise BadInput(f"{summary.name}: none of the first {len(first)} conversations can be used: {first[0]}")
        summary.note(
            "of them tokenised when they are drawn: what is skipped or cut then is not in this table", len(data)
        )
        return data.with_transform(partial(encode_lazily, **how))
    workers = min(os.cpu_count() or 1, len(data) // 500)  # 500 records take less time than to start a process
    made_by = (data._fingerprint, code_version(), chat.fingerprint, max_length, min_length)
    fingerprint = hashlib.sha256(repr(made_by).encode()).hexdigest()[:32]
    data = data.map(
        encode_records,
        batched=True,
        batch_size=200,
        fn_kwargs=how,
        remove_columns=data.column_names,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=fingerprint,
        desc="tokenising",
    )
    data = keep_usable(data, summary)
    if packing:  # in one process: the rows do not depend on the machine
        data = data.map(
            pack,
            batched=True,
            batch_size=1000,
            fn_kwargs={"max_length": max_length},
            remove_columns=data.column_names,
            new_fingerprint=f"{fingerprint}-packed",
            desc="packing",
        )
    if by_length:
        lengths = list(data["length"])
        data = data.select(sorted(range(len(data)), key=lambda i: lengths[i]))
    return data.with_format("numpy")  # a row's tokens come as an array, not as a list of Python numbers


def keep_usable(data: datasets.Dataset, summary: Summary) -> datasets.Dataset:
    """The rows without a problem. Tells the summary of the others, and of all notes."""
    problems, notes = data["problem"][:], Counter[str]()
    for record, problem in zip(data["record"], problems, strict=True):
        if problem:
            summary.skip(problem, record)
    for text in data["notes"]:
        if text != "{}":
            notes.update(json.loads(text))
    for note, count in notes.items():
        summary.note(note, count)
    summary.check()
    keep = [i for i, problem in enumerate(problems) if not problem]
    summary.note("rows of tokens", len(keep))
    data = data.select(keep) if len(keep) < len(data) else data
    return data.remove_columns(["record", "problem", "notes"])
