"""Tokenised conversations -> batches with little padding: packing, padding on the right, grouping by length."""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from conversations.targets import IGNORE


def pack(rows: dict, max_length: int) -> dict:
    """Packs conversations into rows of at most max_length tokens, for datasets.map. Best fit: the longest conversation
    first, each into the fullest row that still has room for it."""
    bins: list[list[int]] = []  # the conversations of each
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), the fullest first
    for index in sorted(range(len(rows["length"])), key=lambda i: -rows["length"][i]):
        place = bisect_left(rooms, (rows["length"][index], 0))
        room, number = rooms.pop(place) if place < len(rooms) else (max_length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        insort(rooms, (room - rows["length"][index], number))
    packed: dict[str, list] = {
        key: [[token for i in members for token in rows[key][i]] for members in bins]
        for key in ("input_ids", "labels")
    }
    packed["position_ids"] = [[p for i in members for p in range(rows["length"][i])] for members in bins]
    packed["length"] = [sum(rows["length"][i] for i in members) for members in bins]
    return packed


class Collator:
    """Rows -> `input_ids`, `labels`, `attention_mask` `[B, T]`, `position_ids` if the rows are packed, and `hidden`
    `[B, T, H]` if they have stored states. Pads on the right to `pad_to`, or to the longest row, rounded up to a
    multiple of 8 for the matrix units.

    Padding is known by length, never by token id: where pad = EOS, a real end of turn stays a label. The mask only
    serves to count tokens. With padding on the right causal attention needs none, and is faster without.
    """

    def __init__(self, pad_token_id: int, pad_to: int | None = None):
        self.pad_token_id, self.pad_to = pad_token_id, pad_to

    @classmethod
    def of(cls, tokenizer) -> "Collator":
        """Pads with the tokenizer's pad token; without one, with any token: padding is no label."""
        return cls(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = self.pad_to or -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "position_ids": 0}
        batch = {key: torch.full((len(rows), longest), value) for key, value in fill.items() if key in rows[0]}
        batch["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            for key in fill.keys() & row.keys():
                batch[key][i, :length] = torch.tensor(row[key])
        if "hidden" in rows[0]:
            batch["hidden"] = rows[0]["hidden"].new_zeros(len(rows), longest, rows[0]["hidden"].shape[-1])
            for states, row in zip(batch["hidden"], rows, strict=True):
                states[: len(row["hidden"])] = row["hidden"]
        return batch


class ShuffledSampler(Sampler):
    """A random order. With lengths, one in which the rows of an optimiser step are about equally long, to save
    padding: it cuts the shuffled rows into pools of 50 steps, sorts each pool by length, cuts it into steps, and
    shuffles those.

    The rows of the last, incomplete step are drawn before anything is sorted, or they would be the shortest of every
    epoch. The order depends on seed and epoch alone, so a resumed run draws the same batches. Their sum would not do
    as the seed of an epoch: a run with the next seed would have this run's second epoch as its first.
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int, lengths: list[int] | None = None):
        self.rows, self.rows_per_step, self.seed, self.lengths, self.epoch = rows, rows_per_step, seed, lengths, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        order = torch.randperm(self.rows, generator=generator).tolist()
        lengths, size = self.lengths, self.rows_per_step
        if lengths is None:
            return iter(order)
        whole = self.rows // size * size
        order, rest, pool = order[:whole], order[whole:], 50 * size
        parts = (sorted(order[start : start + pool], key=lambda i: -lengths[i]) for start in range(0, whole, pool))
        order = [i for part in parts for i in part]
        steps = torch.randperm(whole // size, generator=generator).tolist()
        return iter([i for step in steps for i in order[step * size : (step + 1) * size]] + rest)
