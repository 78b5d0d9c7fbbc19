"""Guesses of heads that read the path to their guess: the tree is filled level by level.

Heads that read only a hidden state guess all at once, and all nodes of one depth and rank hold the same token
(decoding/decoder.py). Where head l also reads the tokens before its guess, every parent has children of its own. So
head 1 guesses behind the root, head 2 behind each of head 1's guesses, and so on: as many steps as the tree is deep.
In each, one head runs once over all parents, so a pass still reads each head's weights once.
"""

from typing import NamedTuple

import torch
from torch import nn

from decoding import candidate_kernels
from decoding.tree import Layout
from medusa_model import MedusaModel
from model.heads import Path


class Level(NamedTuple):
    """The nodes at depth l, which head l guesses. They have P parents, and head l answers all of them at once."""

    nodes: slice  # the C nodes of this depth: they follow each other
    path: torch.Tensor  # int64 [P, l]; the nodes from the root to each parent
    ranks: int  # the best guesses that are needed behind each parent
    parent: torch.Tensor  # int64 [C]; which of the P
    rank: torch.Tensor  # int64 [C]


def levels(tree: Layout) -> list[Level]:
    """Of depth 1, 2, ...; none of an empty tree."""
    found = []
    for depth in range(1, tree.path.shape[1]):
        (nodes,) = torch.where(tree.depth == depth)
        parents, parent = tree.parent[nodes].unique(return_inverse=True)
        rank = tree.rank[nodes]
        places = slice(int(nodes[0]), int(nodes[-1]) + 1)
        found.append(Level(places, tree.path[parents, :depth], int(rank.max()) + 1, parent, rank))
    return found


def head_logits(model: MedusaModel, head, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One head behind each parent: hidden `[B, H]`, path ids `[B, P, l]` -> `[B, P, V']`. Without the soft cap,
    which changes no order."""
    # Layers that read h alone run here for P equal rows: that costs little more than one row, and no launch.
    dtype, path = head.projection.weight.dtype, model.path(ids)
    if path is not None and path.embeds is not None:
        path = Path(path.ids, path.embeds.to(dtype))  # the backbone may be bf16 and the heads fp32
    rows = hidden.to(dtype)[:, None].expand(-1, ids.shape[1], -1)
    return head.projection(head.inputs(rows, path))


def best_tokens(logits: torch.Tensor, count: int, token_map: torch.Tensor | None) -> torch.Tensor:
    """logits `[..., V']` -> the `count` likeliest tokens `[..., count]`, the likeliest first."""
    if logits.is_cuda:  # torch's topk of so few long rows takes several launches
        return candidate_kernels.best(logits, count, token_map=token_map)[1]
    best = logits.topk(count).indices
    return best if token_map is None else token_map[best]


class LevelByLevel:
    """Fills a tree. heads: as many as it is deep. Shapes are fixed and nothing leaves the device."""

    def __init__(self, model: MedusaModel, heads: nn.ModuleList, tree: Layout):
        self.model, self.heads, self.levels = model, heads, levels(tree)

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor):
        """hidden `[B, H]`: from where the root was chosen. tokens int64 `[B, n]`: the root is there, in column 0; the
        guesses are written into the others."""
        for head, level in zip(self.heads, self.levels, strict=True):
            logits = head_logits(self.model, head, hidden, tokens[:, level.path])
            best = best_tokens(logits, level.ranks, self.model.token_map)  # [B, P, ranks]
            tokens[:, level.nodes] = best[:, level.parent, level.rank]
