"""A Medusa head (arXiv 2401.10774, section 2.1.1): n ResBlocks and a projection to the vocabulary of its own."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from conversations.targets import IGNORE
from model.loss import linear_cross_entropy


class ResBlock(nn.Module):
    """x + SiLU(W x + b), `[..., H]` -> `[..., H]`. W and b start at zero: an untrained block changes nothing."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))


class HeadLoss(NamedTuple):
    """One head on one batch: summed loss (fp32 scalar), right top-1 guesses (int64 scalar), number of rows.

    A tuple, so that FSDP finds the tensors in a head's output and hangs its hooks on them.
    """

    loss_sum: torch.Tensor
    correct: torch.Tensor
    rows: int

    def add_to(self, sums: torch.Tensor):
        """Adds the three to `sums` `[3]`, float64: exact for counts, and no copy from the host for `rows`."""
        sums[0] += self.loss_sum.detach()
        sums[1] += self.correct
        sums[2] += self.rows


def projection_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    impl: str,
    softcap: float | None,
    blocks: nn.Module | None = None,
) -> HeadLoss:
    """Loss of hidden `[B, T, H]` against targets `[B, T]`, only on the rows that count (target not IGNORE).

    A prompt, padding or the end of a conversation gives no row, and none of its products is computed.
    """
    targets = targets.flatten()
    index = targets.ne(IGNORE).nonzero()[:, 0]
    rows = hidden.flatten(0, 1).index_select(0, index)
    if blocks is not None:
        rows = blocks(rows)
    loss_sum, correct = linear_cross_entropy(rows, weight, targets[index], impl, softcap)
    return HeadLoss(loss_sum, correct, len(index))


class MedusaHead(nn.Sequential):
    """n ResBlocks and a projection. Its parameters are named as servers expect: `{l}.linear.weight`,
    `{l}.linear.bias` and `{n}.weight`.

    The loss is computed in here, not by the caller, so that under FSDP a head can be a unit of its own whose
    weights are whole only while it runs.
    """

    def __init__(self, hidden_size: int, vocab_size: int, num_layers: int):
        blocks = [ResBlock(hidden_size) for _ in range(num_layers)]  # not [block] * n: that shares one block
        super().__init__(*blocks, nn.Linear(hidden_size, vocab_size, bias=False))

    def forward(self, hidden, targets=None, impl="torch", softcap=None):
        """hidden `[B, T, H]` -> logits `[B, T, V]`; with targets `[B, T]` (already shifted) -> HeadLoss."""
        *blocks, projection = self
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(projection.weight.dtype)  # a bf16 backbone under fp32 heads
        if targets is not None:
            return projection_loss(hidden, targets, projection.weight, impl, softcap, nn.Sequential(*blocks))
        return cap(projection(nn.Sequential(*blocks)(hidden)), softcap)


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma 2's bound on the logits; nothing for everybody else."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
