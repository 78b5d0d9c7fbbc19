"""Guesses of heads that read the path to their guess: the tree is filled level by level.

Heads that read only a hidden state guess all at once, and all nodes of one depth and rank hold the same token
(decoding/decoder.py). Where head l also reads the tokens before its guess, every parent has children of its own. So
head 1 guesses behind the root, head 2 behind each of head 1's guesses, and so on: as many steps as the tree is deep.
In each, one head runs once over all parents, so a pass still reads each head's weights once.
"""

import torch
from torch import nn

from decoding.tree import Layout, levels
from medusa_model import MedusaModel
from model.heads import Path


class LevelByLevel:
    """Fills a tree. heads: as many as it is deep. Shapes are fixed and nothing leaves the device."""

    def __init__(self, model: MedusaModel, heads: nn.ModuleList, tree: Layout):
        self.model, self.heads, self.levels = model, heads, levels(tree)

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor):
        """hidden `[B, H]`: from where the root was chosen. tokens int64 `[B, n]`: the root is there, in column 0; the
        guesses are written into the others."""
        for head, level in zip(self.heads, self.levels, strict=True):
            best = self.logits(head, hidden, tokens[:, level.path]).topk(level.ranks).indices  # [B, P, ranks]
            if self.model.token_map is not None:
                best = self.model.token_map[best]
            tokens[:, level.nodes] = best[:, level.parent, level.rank]

    def logits(self, head, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """One head behind each parent: hidden `[B, H]`, path ids `[B, P, l]` -> `[B, P, V']`. Without the soft cap,
        which changes no order."""
        # What of a head reads h alone is computed P times, from weights that are read once. On a GPU the layers before
        # the projection are mostly launches, two or three of some us each a level. Those of h alone could run for
        # all heads in one launch, as AllHeads does, before the first level; the rest, table or embeddings and a small
        # product, could be one kernel a level.
        dtype, path = head.projection.weight.dtype, self.model.path(ids)
        if path is not None and path.embeds is not None:
            path = Path(path.ids, path.embeds.to(dtype))  # the backbone may be bf16 and the heads fp32
        rows = hidden.to(dtype)[:, None].expand(-1, ids.shape[1], -1)
        return head.projection(head.inputs(rows, path))
