"""A draft vocabulary: heads that guess only V' of the V tokens, the most frequent ones (FR-Spec, arXiv 2502.14856).

With the 128,256 tokens of LLaMA-3 the projection has 525 of the 542 million weights of a head of one ResBlock, 97 %,
and so of its work. Most of a text is made of far fewer tokens. Where it goes on with another one, heads have no guess;
the backbone still chooses among all tokens.

`token_map`, int64 `[V']`, has the ids of these tokens. They ascend, so that the first of equal logits is the lowest id
here too. None stands for all tokens: then nothing is mapped.
"""

import torch

from conversations.targets import IGNORE


def to_draft(tokens: torch.Tensor, token_map: torch.Tensor | None) -> torch.Tensor:
    """Ids of tokens, in any shape -> their rows in the heads' projections, or IGNORE for those that are not among the
    V'."""
    if token_map is None:
        return tokens
    row = torch.searchsorted(token_map, tokens.contiguous()).clamp(max=len(token_map) - 1)
    return torch.where(token_map[row] == tokens, row, IGNORE)


def to_full(logits: torch.Tensor, token_map: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A head's logits `[..., V']` -> `[..., V]`, shape and dtype of `like`: -inf for the tokens it never guesses."""
    logits = logits.to(like.dtype)
    if token_map is None:
        return logits
    return torch.full_like(like, -torch.inf).index_copy(-1, token_map, logits)
