"""Which data is the same: what a checkpoint is resumed with, what ranks must agree in, what states were begun with."""

import hashlib
import time

import datasets
import numpy as np
import pytest

from common.errors import BadInput
from conversations.batches import ShuffledSampler
from training import run


def make(**changes) -> datasets.Dataset:
    """200 packed rows of 4 tokens. changes: by column, (row, place) of a number that is one more."""
    columns = {key: [[i, i + 1, i + 2, i + 3] for i in range(200)] for key in ("input_ids", "labels", "position_ids")}
    for key, (row, place) in changes.items():
        columns[key][row][place] += 1
    return datasets.Dataset.from_dict(columns | {"length": [4] * 200}).with_format("numpy")


@pytest.mark.parametrize("column", ["input_ids", "labels", "position_ids"])
def test_a_single_number_is_other_data(column):
    """Row 101 of 200 is none of about 64 that are equally far apart."""
    assert run.digest(make(**{column: (101, 2)})) != run.digest(make()) == run.digest(make())


def test_the_order_of_rows_is_data_and_the_tables_it_lies_in_are_not():
    data = make()
    assert run.digest(data.select([1, 0, *range(2, 200)])) != run.digest(data)
    parts = datasets.concatenate_datasets([data.select(range(70)), data.select(range(70, 200))])
    assert run.digest(parts.with_format("numpy")) == run.digest(data)


def test_ten_million_labels_take_a_second_or_two():
    ids = np.arange(10_000_000).reshape(-1, 1000)
    data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [1000] * len(ids)})
    start = time.process_time()
    run.digest(data)
    assert time.process_time() - start < 4  # 0.5 measured on one of 2 shared cores


def test_a_checkpoint_of_another_order_of_rows_is_not_resumed(train, monkeypatch):
    flags = ("--medusa_only_heads", True, "--max_steps", 4, "--save_steps", 2)
    train(*flags)
    monkeypatch.setattr(run, "ROW_ORDER", run.ROW_ORDER + 1)
    with pytest.raises(BadInput, match=r"checkpoint-4 was .* a version that drew its rows in another order"):
        train(*flags, "--resume_from_checkpoint", True)


def test_row_order_is_raised_with_the_order():
    """If this fails, the order of the training rows has changed: raise ROW_ORDER, and give the new hash here."""
    lengths = [i * 7 % 31 for i in range(90)]
    orders = [list(ShuffledSampler(90, 8, 3, of)) for of in (lengths, None)]
    found = hashlib.sha256(str(orders).encode()).hexdigest()[:16]
    assert (run.ROW_ORDER, found) == (2, "f46b9558c0794e53")
