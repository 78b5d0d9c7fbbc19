"""Conversations -> a dataset of tokenised rows, ready for `conversations.batches.Collator`."""

import logging
import os
from functools import partial
from typing import Any

import datasets
from jinja2 import TemplateError

from common.errors import BadInput
from conversations.batches import pack
from conversations.labels import encode
from conversations.sources import drop_problems
from conversations.targets import IGNORE

logger = logging.getLogger(__name__)


def encode_record(row: dict, tokenizer, max_length: int, min_length: int) -> dict:
    """`encode` for datasets.map. A record that cannot be used gets a `problem` instead of an exception."""
    try:
        out, problem = encode(row["messages"], tokenizer, max_length, row["unfinished"]), ""
        if len(out["input_ids"]) < min_length:
            problem = f"fewer than {min_length} tokens: no row for the last head"
        elif all(label == IGNORE for label in out["labels"][1:]):
            problem = f"no assistant token within --model_max_length {max_length}"
    except (TemplateError, ValueError) as error:
        out, problem = {"input_ids": [], "labels": []}, f"{error}"
    return out | {"length": len(out["input_ids"]), "problem": problem}


def encode_lazily(rows: dict, tokenizer, max_length: int, min_length: int) -> dict:
    """`encode` for Dataset.with_transform (`--lazy_preprocess`), on a batch of rows. A record that cannot be used is
    logged when it is drawn, and becomes one token without a label: it does not change the loss."""
    encoded = []
    for i, number in enumerate(rows["record"]):
        row = encode_record({key: column[i] for key, column in rows.items()}, tokenizer, max_length, min_length)
        if row["problem"]:
            logger.warning("record %d is left out of the loss: %s", number, row["problem"])
            row = {"input_ids": [0], "labels": [IGNORE]}
        encoded.append(row)
    return {key: [row[key] for row in encoded] for key in ("input_ids", "labels")}


def prepare(
    data: datasets.Dataset,
    name: str,
    tokenizer,
    max_length: int,
    min_length: int = 2,
    lazy: bool = False,
    packing: bool = False,
    by_length: bool = False,
) -> datasets.Dataset:
    """Conversations -> a dataset of input_ids, labels (and position_ids if packed), ready for `batches.Collator`.

    min_length: the tokens a conversation needs so that each of K heads has a target (K + 2).
    lazy: tokenise when a batch is drawn; lengths are not known then.
    packing: put several conversations into a row of max_length tokens.
    by_length: shortest first, so that batches in this order need little padding.
    """
    limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length}
    if lazy:
        first = [encode_record(row, tokenizer, **limits)["problem"] for row in data.select(range(min(20, len(data))))]
        if all(first):
            raise BadInput(f"{name}: none of the first {len(first)} conversations can be used: {first[0]}")
        return data.with_transform(partial(encode_lazily, tokenizer=tokenizer, **limits))
    workers = min(os.cpu_count() or 1, len(data) // 500)  # 500 records take less time than to start a process
    common = {"num_proc": workers if workers > 1 else None}
    data = data.map(
        encode_record,
        fn_kwargs={"tokenizer": tokenizer, **limits},
        remove_columns=["messages", "unfinished"],
        desc="tokenising",
        **common,
    )
    data = drop_problems(data, name).remove_columns(["record", "problem"])
    if packing:
        data = data.map(
            pack,
            batched=True,
            batch_size=1000,
            fn_kwargs={"max_length": max_length},
            remove_columns=data.column_names,
            desc="packing",
            **common,
        )
    if by_length:
        lengths = list(data["length"])
        data = data.select(sorted(range(len(data)), key=lambda i: lengths[i]))
    return data.with_format("numpy")  # a row's tokens come as an array, not as a list of Python numbers
