"""Heads that read the path to their guess, the tokens between their hidden state and what they guess.

Head k guesses the token at t + k + 1 from h_t. A Medusa head guesses it without knowing what stands at t + 1 to t + k,
so its guess has to fit every way there. In training the path is the text's; in decoding it is the branch of the tree.
docs/heads.md has the formulas.

A type is a class below and a line in HEAD_TYPES. It says what its projection reads (`inputs`), what it starts as
(`reset_parameters`: an untrained head of any type guesses as an untrained Medusa head does), and with which sizes it
is made (`of`). The file on disk and its checks follow from the names and shapes of its parameters.
"""

from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import BadInput
from model.config import MedusaConfig
from model.heads import MedusaHead, MedusaHeads, Path, ResBlock


class MarkovHead(MedusaHead):
    """The projection `[V', H + r]` reads the ResBlocks' output and, of the path's last token, its row of `table`
    `[V, r]`: a bias on the guesses, of rank r, that depends on the token before.

    Each head has a table of its own, though one for all would be smaller (V x r: 33 of the 0.54 billion numbers of an
    8B model's head). Heads are units under FSDP, and their backward passes run one after the other; a weight of all of
    them would have to stay whole beside them and could be reduced only after the last one.
    """

    reads_path = True

    def __init__(self, hidden_size: int, vocab_size: int, num_layers: int, table: tuple[int, int]):
        super().__init__(hidden_size, vocab_size, num_layers)
        self[-1] = nn.Linear(hidden_size + table[1], vocab_size, bias=False)
        self.table = nn.Parameter(torch.zeros(table))

    @classmethod
    def of(cls, config: MedusaConfig, k: int) -> Self:
        assert config.vocab_size is not None
        return cls(*config.sizes, table=(config.vocab_size, config.medusa_rank))

    def reset_parameters(self, weight: torch.Tensor):
        """The table starts at zero, so that tokens that training never shows change no guess. The projection's columns
        for it are random, or neither would have a gradient; the same on every process, of which each may make its own.
        Of this size, a logit moves about as far as the table's numbers do."""
        for block in list(self)[:-1]:
            cast(ResBlock, block).reset_parameters()
        hidden, columns = self.projection.weight.tensor_split([weight.shape[1]], 1)
        hidden.copy_(weight)
        columns.normal_(0, columns.shape[1] ** -0.5, generator=torch.Generator(columns.device).manual_seed(0))
        self.table.zero_()

    def inputs(self, hidden: torch.Tensor, path: Path | None = None) -> torch.Tensor:
        """hidden `[..., H]` -> `[..., H + r]`."""
        assert path is not None
        hidden = super().inputs(hidden)
        return torch.cat([hidden, F.embedding(path.ids[..., -1], self.table).to(hidden.dtype)], -1)


class FirstBlock(ResBlock):
    """h + SiLU(W [h; e_1; ...; e_k] + b), with W `[H, (k + 1) H]`. W and b start at zero."""

    def __init__(self, hidden_size: int, k: int):
        super().__init__(hidden_size)
        self.linear = nn.Linear((k + 1) * hidden_size, hidden_size)
        self.reset_parameters()

    def forward(self, x: torch.Tensor, embeds: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., H]`, embeds `[..., k, H]`. Two products: together their input would be copied first, and the
        embeddings' gradient computed, which nobody needs."""
        assert embeds is not None
        before = embeds.to(x.dtype).flatten(-2)
        own, others = self.linear.weight.split([x.shape[-1], before.shape[-1]], 1)
        return x + F.silu(F.linear(x, own, self.linear.bias) + F.linear(before, others))


class HydraHead(MedusaHead):
    """The first ResBlock reads the embeddings of the path's tokens too (Hydra, arXiv 2402.05109). They are the
    backbone's, and no gradient goes into them, not even in stage 2."""

    reads_path = reads_embeds = True

    def __init__(self, hidden_size: int, vocab_size: int, num_layers: int, k: int):
        if num_layers < 1:
            raise BadInput(
                f"hydra heads of {num_layers} ResBlocks: at least 1, which reads the tokens before the guess"
            )
        super().__init__(hidden_size, vocab_size, num_layers)
        self[0] = FirstBlock(hidden_size, k)

    @classmethod
    def of(cls, config: MedusaConfig, k: int) -> Self:
        return cls(*config.sizes, k=k)

    def inputs(self, hidden: torch.Tensor, path: Path | None = None) -> torch.Tensor:
        """hidden `[..., H]` -> `[..., H]`."""
        assert path is not None
        first, *blocks = list(self)[:-1]
        hidden = first(hidden, path.embeds)
        for block in blocks:
            hidden = block(hidden)
        return hidden


HEAD_TYPES: dict[str, type[MedusaHead]] = {"medusa": MedusaHead, "markov": MarkovHead, "hydra": HydraHead}


def make_heads(config: MedusaConfig) -> MedusaHeads:
    """Heads 1 to K, of the type and sizes that the config says. Raises BadInput for a type that does not exist."""
    if config.medusa_head_type not in HEAD_TYPES:
        raise BadInput(f"medusa_head_type {config.medusa_head_type}: there are {', '.join(HEAD_TYPES)}")
    heads = (HEAD_TYPES[config.medusa_head_type].of(config, k) for k in range(1, config.medusa_num_heads + 1))
    return MedusaHeads(heads, config.medusa_vocab_size)
