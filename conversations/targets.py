"""What head k has to predict at each position: the labels, shifted by k + 1."""

import torch

IGNORE = -100  # a position with this target is no row: it does not change loss, gradient or count


def shifted_targets(labels: torch.Tensor, shift: int, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """`[B, T]` labels -> `[B, T]` targets: target[t] = label[t + shift], or IGNORE where there is none.

    In packed rows `position_ids` `[B, T]` restart at each conversation. Where they do not advance by `shift`, the
    label belongs to another conversation and is no target.
    """
    targets = torch.full_like(labels, IGNORE)
    if labels.shape[1] > shift:
        ahead = labels[:, shift:]
        if position_ids is not None:
            same = position_ids[:, shift:] == position_ids[:, :-shift] + shift
            ahead = ahead.masked_fill(~same, IGNORE)
        targets[:, :-shift] = ahead
    return targets


def count_rows(targets: torch.Tensor) -> torch.Tensor:
    """The number of rows in `targets`, as an int64 scalar: fp32 (let alone bf16) could not count them exactly."""
    return targets.ne(IGNORE).sum()
