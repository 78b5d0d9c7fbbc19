"""Medusa heads (arXiv 2401.10774, section 2.1.1): n ResBlocks and a projection of its own to the vocabulary each."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import nn

from conversations.targets import IGNORE
from model.config import MedusaConfig
from model.loss import cap, linear_cross_entropy
from model.teacher_loss import linear_teacher_loss


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


class Path(NamedTuple):
    """The tokens between a hidden state and a guess: head k reads h_t and may read the k tokens at t + 1 to t + k."""

    ids: torch.Tensor  # int64 `[..., k]`
    embeds: torch.Tensor | None  # `[..., k, H]`, of the backbone's input embedding; None where no head reads it


class Text(NamedTuple):
    """What a batch's paths are taken from: its true tokens, whatever heads would have guessed (teacher forcing)."""

    ids: torch.Tensor  # int64 `[B, T]`
    embeds: torch.Tensor | None  # `[B, T, H]`, without gradient; None where no head reads it
    ahead: int = 0  # k: how many tokens a path has

    def path(self, index: torch.Tensor) -> Path:
        """The paths of positions `[R]` of the batch laid flat. A position with a target has its path in its own
        conversation; another's may run into what comes next, or repeat the batch's last token."""
        steps = torch.arange(1, self.ahead + 1, device=index.device)
        places = (index[:, None] + steps).clamp(max=self.ids.numel() - 1)
        return Path(self.ids.flatten()[places], None if self.embeds is None else self.embeds.flatten(0, 1)[places])


def until(text: Text | None, k: int) -> Text | None:
    """The text for head k, if there is one."""
    return None if text is None else text._replace(ahead=k)


class Teacher(NamedTuple):
    """The backbone's own distribution, which a head is to learn: of the token at t + k + 1, as it is seen at t + k."""

    kind: str  # of `model.teacher_loss`
    hidden: torch.Tensor  # `[B, T, H]`
    weight: torch.Tensor  # `[V, H]`, of the lm_head; with a draft vocabulary its `[V', H]` rows
    ahead: int  # k


class HeadLoss(NamedTuple):
    """One head on one batch: summed loss (fp32 scalar), number of right top-1 guesses (int64 scalar), number of rows
    (with a draft vocabulary an int64 scalar).

    A tuple, so that FSDP finds the tensors in a head's output and attaches its hooks to them.
    """

    loss_sum: torch.Tensor
    correct: torch.Tensor
    rows: int | torch.Tensor

    def add_to(self, sums: torch.Tensor):
        """Adds the three to `sums` `[3]`. float64 is exact for counts; adding `rows`, a number, needs no transfer."""
        sums[0] += self.loss_sum.detach()
        sums[1] += self.correct
        sums[2] += self.rows


def projection_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    impl: str,
    softcap: float | None,
    inputs: Callable[[torch.Tensor, Path | None], torch.Tensor] | None = None,
    teacher: Teacher | None = None,
    text: Text | None = None,
) -> HeadLoss:
    """Loss of hidden `[B, T, H]` against targets `[B, T]`, or against the teacher's distribution. Rows whose target is
    IGNORE (prompts, padding, the end of a conversation) are dropped before anything is computed. inputs: what the
    weight multiplies, of hidden rows `[R, H]` and their paths in the text."""
    targets = targets.flatten()
    index = targets.ne(IGNORE).nonzero()[:, 0]
    rows = hidden.flatten(0, 1).index_select(0, index)
    if inputs is not None:
        rows = inputs(rows, None if text is None else text.path(index))
    if teacher is None:
        loss_sum, correct = linear_cross_entropy(rows, weight, targets[index], impl, softcap)
    else:  # a row has a target, so its conversation goes on beyond t + k
        taught = (teacher.hidden.flatten(0, 1).index_select(0, index + teacher.ahead), teacher.weight)
        loss_sum, correct = linear_teacher_loss(rows, weight, taught, targets[index], teacher.kind, impl, softcap)
    return HeadLoss(loss_sum, correct, len(index))


class MedusaHead(nn.Sequential):
    """n ResBlocks and a projection. Inference servers expect these parameter names: `{l}.linear.weight`,
    `{l}.linear.bias` and `{n}.weight`.

    `forward` computes the loss itself, so that under FSDP each head can be a unit of its own, whose weights are
    gathered only while it runs.

    Other types are in model/path_heads.py. reads_path: whether `inputs` reads a path; reads_embeds: its embeddings.
    """

    reads_path = reads_embeds = False

    def __init__(self, hidden_size: int, vocab_size: int, num_layers: int):
        blocks = [ResBlock(hidden_size) for _ in range(num_layers)]
        super().__init__(*blocks, nn.Linear(hidden_size, vocab_size, bias=False))

    @classmethod
    def of(cls, config: MedusaConfig, k: int) -> Self:
        """Head k."""
        return cls(*config.sizes)

    def reset_parameters(self, weight: torch.Tensor):
        """An untrained head: its logits are those of a projection with this weight `[V, H]`."""
        *blocks, projection = cast(Any, self)  # torch annotates its members as plain Modules
        for block in blocks:
            block.reset_parameters()
        projection.weight.copy_(weight)

    @property
    def projection(self) -> nn.Linear:
        return cast(nn.Linear, self[-1])

    def inputs(self, hidden: torch.Tensor, path: Path | None = None) -> torch.Tensor:
        """hidden `[..., H]` -> `[..., D]`, what the projection `[V, D]` reads (here D = H, and no path is read)."""
        for block in list(self)[:-1]:
            hidden = block(hidden)
        return hidden

    def forward(self, hidden, targets=None, impl="torch", softcap=None, teacher=None, text: Text | None = None):
        """hidden `[B, T, H]` -> logits `[B, T, V]`; with targets `[B, T]` (already shifted) -> HeadLoss.

        teacher: a Teacher, or None. text: where heads find their paths, if they read any.
        """
        weight = self.projection.weight
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)  # the backbone may be bf16 and the heads fp32
        if targets is not None:
            return projection_loss(hidden, targets, weight, impl, softcap, self.inputs, teacher, text)
        if text is None:
            return self.logits(hidden, None, softcap)
        every = torch.arange(text.ids.numel(), device=hidden.device)
        return self.logits(hidden.flatten(0, 1), text.path(every), softcap).unflatten(0, text.ids.shape)

    def logits(self, hidden: torch.Tensor, path: Path | None, softcap: float | None = None) -> torch.Tensor:
        """hidden `[..., H]` -> `[..., V]`."""
        return cap(self.projection(self.inputs(hidden, path)), softcap)


class MedusaHeads(nn.ModuleList):
    """Heads 1 to K, and the tokens that they guess: all (token_map is None), or draft_size of them
    (model/vocabulary.py). A slice has no map."""

    token_map: torch.Tensor | None

    def __init__(self, heads: Iterable[nn.Module], draft_size: int | None = None):
        super().__init__(heads)
        # A buffer moves to a device with its module. It is not persistent, because accelerate's FSDP2 can send only
        # parameters to the other ranks: every process puts it in, and the files have it by hand.
        tokens = None if draft_size is None else torch.empty(draft_size, dtype=torch.int64)
        self.register_buffer("token_map", tokens, persistent=False)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, token_map: torch.Tensor | None, fill: bool):
        """Puts the map in, and if `fill` makes all heads untrained ones over the lm_head's weight `[V, H]`."""
        if self.token_map is not None and token_map is not None:
            self.token_map.copy_(token_map)
            weight = weight[self.token_map] if fill else weight
        for head in self if fill else ():
            cast(MedusaHead, head).reset_parameters(weight)
