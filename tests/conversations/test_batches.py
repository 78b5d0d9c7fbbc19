"""batches: packing loses and mixes nothing, padding is known by length, steps are of about one length."""

import random
from types import SimpleNamespace

import pytest
import torch

from conversations.batches import Collator, ShuffledSampler, pack
from conversations.targets import IGNORE, shifted_targets

MAX_LENGTH = 64
KEYS = ("input_ids", "labels", "attention_mask")


def make_rows(lengths) -> dict:
    """Conversations of these lengths, no token twice, so that none can stand in for another; some are labels."""
    rng, rows, token = random.Random(0), {"input_ids": [], "labels": [], "length": list(lengths)}, 0
    for length in lengths:
        ids = list(range(token, token + length))
        token += length
        rows["input_ids"].append(ids)
        rows["labels"].append([i if rng.random() < 0.7 else IGNORE for i in ids])
    return rows


def random_lengths(count, longest) -> list[int]:
    rng = random.Random(1)
    return [rng.randint(2, longest) for _ in range(count)]


@pytest.fixture
def rows():
    return make_rows([*random_lengths(300, MAX_LENGTH), MAX_LENGTH])


def test_packed_rows_are_no_longer_than_allowed_and_almost_full(rows):
    lengths = [len(ids) for ids in pack(rows, MAX_LENGTH)["input_ids"]]
    assert max(lengths) <= MAX_LENGTH
    assert sum(lengths) > 0.95 * MAX_LENGTH * len(lengths)


def test_conversation_goes_into_the_fullest_row_it_fits():
    assert pack(make_rows([2, 7, 3, 6, 2]), 10)["length"] == [10, 10]  # 3 beside 6 would need a third row


def test_packed_rows_hold_every_conversation_whole(rows):
    packed = pack(rows, MAX_LENGTH)
    found = []
    for ids, labels, positions in zip(packed["input_ids"], packed["labels"], packed["position_ids"], strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end] == list(range(end - start))
            found.append((ids[start:end], labels[start:end]))
    assert sorted(found) == list(zip(rows["input_ids"], rows["labels"], strict=True))
    assert packed["length"] == [len(ids) for ids in packed["input_ids"]]


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_targets_never_cross_conversations(rows, shift):
    """Each packed token has the target it has in its conversation alone; tokens are unique, so they name the place."""
    packed = pack(rows, MAX_LENGTH)
    packed_rows = [{key: packed[key][i] for key in packed} for i in range(len(packed["length"]))]
    batch = Collator(pad_token_id=0)(packed_rows)
    targets = shifted_targets(batch["labels"], shift, batch["position_ids"])
    real = batch["attention_mask"].bool()
    alone = {}
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        alone |= zip(ids, shifted_targets(torch.tensor([labels]), shift)[0].tolist(), strict=True)
    assert dict(zip(batch["input_ids"][real].tolist(), targets[real].tolist(), strict=True)) == alone
    assert (targets[~real] == IGNORE).all()


@pytest.mark.parametrize(("longest", "pad_to", "width"), [(7, None, 8), (8, None, 8), (9, None, 16), (9, 24, 24)])
def test_rows_are_padded_to_a_multiple_of_8_or_as_asked(longest, pad_to, width):
    rows = [{"input_ids": [5] * length, "labels": [5] * length, "length": length} for length in (3, longest, 1)]
    batch = Collator(pad_token_id=0, pad_to=pad_to)(rows)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(KEYS, (3, width))
    assert batch["attention_mask"].sum(1).tolist() == [3, longest, 1]


def test_padding_is_on_the_right_and_known_by_length():
    pad = 9  # also a real token and a label, as where pad = EOS
    rows = [
        {"input_ids": [1, pad, 2, pad], "labels": [IGNORE, pad, IGNORE, pad], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [pad], "labels": [pad], "position_ids": [0]},
    ]
    batch = Collator(pad)(rows)
    assert batch["input_ids"].tolist() == [[1, pad, 2, pad, *[pad] * 4], [pad] * 8]
    assert batch["labels"].tolist() == [[IGNORE, pad, IGNORE, pad, *[IGNORE] * 4], [pad, *[IGNORE] * 7]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] + [0] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [0] * 8]
    assert all(value.dtype == torch.int64 for value in batch.values())


def order(lengths, rows_per_step=8, seed=0, epoch=0, grouped=True) -> list[int]:
    sampler = ShuffledSampler(len(lengths), rows_per_step, seed, lengths if grouped else None)
    sampler.set_epoch(epoch)
    return list(sampler)


def padding(lengths, indices, rows_per_step=8) -> int:
    """Tokens of padding if each step is padded to its longest row."""
    steps = [[lengths[i] for i in indices[k : k + rows_per_step]] for k in range(0, len(indices), rows_per_step)]
    return sum(max(step) * len(step) - sum(step) for step in steps)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 799, 800, 801, 1000])  # incomplete steps, pools (of 400), both
@pytest.mark.parametrize("grouped", [True, False])
def test_sampler_draws_every_row_once(count, grouped):
    lengths = random_lengths(count, 500)
    assert sorted(order(lengths, grouped=grouped)) == list(range(count))
    assert len(ShuffledSampler(count, 8, 0)) == count


@pytest.mark.parametrize("grouped", [True, False])
def test_order_depends_on_seed_and_epoch_alone(grouped):
    """And no two seeds share an order: a second epoch is not the first one of the next seed."""
    lengths = random_lengths(1000, 500)
    assert order(lengths, seed=1, epoch=2, grouped=grouped) == order(lengths, seed=1, epoch=2, grouped=grouped)
    runs = [(seed, epoch) for seed in range(-1, 5) for epoch in range(5)]
    assert len({tuple(order(lengths, seed=seed, epoch=epoch, grouped=grouped)) for seed, epoch in runs}) == 30


def test_the_rows_that_are_left_over_are_any_rows():
    """Not the shortest or the longest: over many epochs their mean is that of all."""
    lengths = random_lengths(407, 500)
    last = [order(lengths, epoch=epoch)[400:] for epoch in range(60)]
    mean = sum(lengths[i] for rows in last for i in rows) / (60 * 7)
    assert abs(mean / (sum(lengths) / 407) - 1) < 0.15 and len({i for rows in last for i in rows}) > 200


@pytest.mark.parametrize("count", [1000, 1001, 1007])  # a last step of one row must not shift the others
def test_little_padding_compared_with_random_order(count):
    lengths = random_lengths(count, 500)
    shuffled = random.Random(2).sample(range(count), count)
    assert padding(lengths, order(lengths)) < 0.1 * padding(lengths, shuffled)


def test_steps_are_not_in_order_of_length():
    """Or an epoch would begin with all the long conversations."""
    lengths = random_lengths(400, 500)
    longest = [max(lengths[i] for i in order(lengths)[k : k + 8]) for k in range(0, 400, 8)]
    assert longest[:10] != sorted(longest, reverse=True)[:10]


def test_conversations_of_a_step_change_from_epoch_to_epoch():
    """Sorted as a whole, the rows of a step would be the same neighbours in each."""
    lengths = random_lengths(2000, 10**6)  # hardly two are alike
    first, second = (
        {frozenset(indices[k : k + 4]) for k in range(0, 2000, 4)}
        for indices in (order(lengths, 4, epoch=epoch) for epoch in (0, 1))
    )
    assert len(first & second) < 5


def test_the_order_of_a_seed_never_changes():
    """A checkpoint goes on in the order it began with: another one needs another ROW_ORDER (training/run.py)."""
    lengths = [(7 * i) % 23 for i in range(437)]  # three pools
    grouped, plain = (order(lengths, 4, seed=3, epoch=1, grouped=grouped) for grouped in (True, False))
    assert grouped[:6] + grouped[200:206] == [284, 21, 435, 67, 59, 13, 309, 332, 345, 322, 354, 239]
    assert plain[:6] + plain[200:206] == [425, 424, 379, 156, 124, 179, 100, 10, 71, 56, 347, 126]


@pytest.mark.parametrize(("pad", "eos", "used"), [(5, 7, 5), (None, 7, 7), (None, None, 0)])
def test_padding_is_the_tokenizers(pad, eos, used):
    collate = Collator.of(SimpleNamespace(pad_token_id=pad, eos_token_id=eos))
    batch = collate([{"input_ids": [1, 2], "labels": [1, 2]}])
    assert batch["input_ids"].tolist() == [[1, 2] + [used] * 6]


def test_states_of_a_single_row_are_padded_too():
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "hidden": torch.ones(3, 5, dtype=torch.bfloat16)}
    batch = Collator(0)([row])
    assert batch["hidden"].dtype == torch.bfloat16 and batch["hidden"].shape == (1, 8, 5)
    assert batch["hidden"][0].sum(1).tolist() == [5, 5, 5, 0, 0, 0, 0, 0]
