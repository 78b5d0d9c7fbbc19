"""Draft trees that follow the moment: each pass grows its own, by what the heads say of their guesses right now.

A fixed tree spends its nodes by rank: head 1's third guess has its place, however sure the head is of its first. Here
a head's softmax says how likely each guess is, and a node's chance is the product along its path. So a tree is long
where the heads are sure, and wide where they are not (EAGLE-2, arXiv 2406.16858).

Level by level, the W likeliest nodes get their W likeliest children each. Of all these candidates the N likeliest are
the tree. No child is likelier than its parent, so the N likeliest are a tree, and the first M of them are the tree of
M nodes. Which tokens are accepted is decided as with any tree: the text is the backbone's own.
"""

from typing import Any, NamedTuple, cast

import torch

from common.errors import BadInput
from decoding import candidate_kernels, candidates
from decoding.guessing import head_logits
from decoding.tree import Layout
from medusa_model import MedusaModel
from model.heads import MedusaHead


class Adaptive(NamedTuple):
    """A tree that each pass grows, in place of Choices."""

    nodes: int  # N, without the root
    beam: int  # W
    temperature: float = 1.0  # of the heads: their logits are divided by it, above 1 where they are too sure

    def candidates(self, heads: int) -> int:
        """Of which the N likeliest are the tree: W of head 1, then W for each of W parents."""
        return self.beam * (1 + (heads - 1) * self.beam)


class Growing:
    """Grows a tree for each row of a batch: n = N + 1 nodes, the root first, the others by falling chance, so that
    each comes behind its parent. Shapes are fixed and nothing leaves the device. Raises BadInput for a beam of more
    tokens than heads guess, or more nodes than there are candidates."""

    def __init__(self, model: MedusaModel, size: Adaptive):
        self.candidates = size.candidates(len(model.medusa_heads))
        tokens = cast(MedusaHead, model.medusa_heads[0]).projection.out_features
        if not 1 <= size.beam <= tokens:
            raise BadInput(f"--adaptive {size.beam}: from 1 to {tokens}, as many tokens as the heads guess")
        if not 1 <= size.nodes <= self.candidates:
            raise BadInput(
                f"an adaptive tree of {size.nodes} guesses: with --adaptive {size.beam} these heads have 1 to "
                f"{self.candidates}"
            )
        self.model, self.heads, self.size = model, model.medusa_heads, size
        self.kernels = model.lm_head.weight.is_cuda

    def room(self, batch_size: int) -> Layout:
        """Memory for the trees of a batch."""
        nodes, room = self.size.nodes + 1, self.model.lm_head.weight.new_zeros
        parent, depth, rank = (room(batch_size, nodes, dtype=torch.int64) for _ in range(3))
        ancestors = room(batch_size, nodes, nodes, dtype=torch.bool)
        return Layout(parent, depth, rank, ancestors, room(batch_size, nodes, len(self.heads) + 1, dtype=torch.int64))

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor, tree: Layout) -> torch.Tensor:
        """hidden `[B, H]`: from where the roots were chosen. tokens int64 `[B, n]`: the roots are there, in column 0.
        Fills the other columns and the tree of each row. -> the logarithm of each node's chance `[B, n]`."""
        steps: Any = candidate_kernels if self.kernels else candidates
        batch, beam = len(tokens), self.size.beam
        room = tokens.new_zeros(2, batch, 1 + self.candidates)
        found, first = candidates.Candidates(hidden.new_zeros(room.shape[1:], dtype=torch.float32), *room), 1
        # Of the P parents of a level: the tokens on the way there `[B, P, l]`, and which candidates they are `[B, P]`.
        ids, number = tokens[:, :1, None], tokens.new_zeros(batch, 1)
        for head in self.heads:
            # Behind all parents a head that reads no path has the same guesses.
            logits = head_logits(self.model, head, hidden, ids if head.reads_path else ids[:, :1])
            logp, best = steps.best(logits, beam, self.size.temperature, self.model.softcap, self.model.token_map)
            following = first + number.shape[1] * beam
            ids, number = steps.branch(found, first, logp, best, ids, number)
            first = following
        return steps.lay(found, beam, tokens, tree)

    def along(self, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """What passes of greedy decoding would yield at R places of a text that is there already, without running
        them. hidden `[R, H]`; text int64 `[R, D+1]`: the root and the D tokens behind it, negative where it has ended.
        -> `[R, N+1]`, for trees of 0 to N nodes: how many guesses are accepted.
        """
        tree = self.room(len(text))
        tokens = text[:, :1].repeat(1, self.size.nodes + 1)
        self(hidden, tokens, tree)
        right = tokens == text.gather(1, tree.depth)
        accepted = ~(~right[:, None] & tree.ancestors).any(2)
        return torch.where(accepted, tree.depth, 0).cummax(1).values
