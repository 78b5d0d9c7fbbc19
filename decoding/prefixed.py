"""The prefix layer (model/prefix.py) while decoding: it reads what was accepted, and has its own keys and values.

Guesses never go through it. Heads guess behind the last token of the text, so the layer only follows the text: after a
pass it reads the hidden states of the accepted tokens, one behind the other. Their number differs from pass to pass,
and shapes may not. So it always reads as many as a pass can accept. What is too much is written behind the text, where
the next pass overwrites it before anything reads it.
"""

import torch

from decoding.attention import TreeCache, tree_view
from decoding.tree import chain, for_rows, layout
from medusa_model import MedusaModel
from model.prefix import run_prefix


class Prefixed:
    """For a batch. most: tokens that a pass can accept. places: of the cache, int64 `[S]`: 0, 1, ..."""

    def __init__(self, model: MedusaModel, batch_size: int, most: int, places: torch.Tensor, kernels: bool):
        assert model.prefix is not None
        self.layer, self.places, self.kernels = model.prefix, places, kernels
        self.cache = TreeCache(1, len(places), kernels)
        self.chain = for_rows(layout(chain(most - 1)), batch_size, places.device)

    def prefill(self, hidden: torch.Tensor) -> torch.Tensor:
        """The prompts' hidden states `[B, T, H]`, padded on the right -> `[B, T, H]`."""
        self.cache.length = None
        return self.run(hidden, self.places[None, : hidden.shape[1]])

    def follow(self, hidden: torch.Tensor, length: torch.Tensor, context: int) -> torch.Tensor:
        """hidden `[B, most, H]` of the tokens behind the first length `[B, 1]` of the text -> `[B, most, H]`."""
        self.cache.length = length
        positions = (length + self.chain.depth).clamp(max=context - 1)
        return self.run(hidden, positions, **tree_view(self.chain, length, self.places, self.kernels))

    def run(self, hidden: torch.Tensor, positions: torch.Tensor, **view) -> torch.Tensor:
        how = {"position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        return run_prefix(self.layer, hidden, **how, **view)
