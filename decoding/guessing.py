"""Guesses of heads that read the path to their guess: the tree is filled level by level.

Heads that read only a hidden state guess all at once, and all nodes of one depth and rank hold the same token
(decoding/decoder.py). Where head l also reads the tokens before its guess, every parent has children of its own. So
head 1 guesses behind the root, head 2 behind each of head 1's guesses, and so on: as many steps as the tree is deep.
In each, one head runs once over all parents, so a pass still reads each head's weights once.
"""

from typing import NamedTuple

import torch
from torch import nn

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
    # One row (one text, one parent) takes the Triton kernel of decoding/products.py, more rows cuBLAS. Room for
    # later: layers that read h alone run here for P equal rows, a level at a time. They could run for one row and
    # all heads in one launch, as in AllHeads, before the first level. What is left of a level before its
    # projection (a table or embeddings, a small product, an activation) could be one kernel: now it is a few, of
    # at least 2 us each.
    dtype, path = head.projection.weight.dtype, model.path(ids)
    if path is not None and path.embeds is not None:
        path = Path(path.ids, path.embeds.to(dtype))  # the backbone may be bf16 and the heads fp32
    rows = hidden.to(dtype)[:, None].expand(-1, ids.shape[1], -1)
    return head.projection(head.inputs(rows, path))


class LevelByLevel:
    """Fills a tree. heads: as many as it is deep. Shapes are fixed and nothing leaves the device."""

    def __init__(self, model: MedusaModel, heads: nn.ModuleList, tree: Layout):
        self.model, self.heads, self.levels = model, heads, levels(tree)

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor):
        """hidden `[B, H]`: from where the root was chosen. tokens int64 `[B, n]`: the root is there, in column 0; the
        guesses are written into the others."""
        for head, level in zip(self.heads, self.levels, strict=True):
            logits = head_logits(self.model, head, hidden, tokens[:, level.path])
            best = logits.topk(level.ranks).indices  # [B, P, ranks]
            if self.model.token_map is not None:
                best = self.model.token_map[best]
            tokens[:, level.nodes] = best[:, level.parent, level.rank]
