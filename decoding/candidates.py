"""The steps in which a draft tree grows (decoding/growing.py), in torch: for CPUs, and what the kernels of
decoding/candidate_kernels.py are compared with."""

from typing import NamedTuple

import torch

from decoding.tree import Layout
from model.loss import cap


class Candidates(NamedTuple):
    """All that a tree may be made of: number 0 is the root; its W children follow, then W of each of W parents, level
    by level. `[B, C]` each."""

    chance: torch.Tensor  # fp32; the logarithm of the chance that the whole path is right; the root's is 0
    token: torch.Tensor  # int64
    parent: torch.Tensor  # int64: its number; the root's is 0


def best(
    logits: torch.Tensor,
    count: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    token_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits `[..., V']` -> the `count` likeliest tokens of each row, the likeliest first: log-probabilities
    `[..., count]` fp32, never above 0, and tokens int64, by the map if there is one."""
    # Not above 0 in floating point either: the sum of exponentials has a term of 1.
    logp, tokens = (cap(logits.float(), softcap) / temperature).log_softmax(-1).topk(count)
    return logp, tokens if token_map is None else token_map[tokens]


def likeliest(chance: torch.Tensor, count: int) -> torch.Tensor:
    """`[B, C]` -> indices of the `count` highest of each row `[B, count]`. Of equals the first comes first."""
    return chance.argsort(dim=1, descending=True, stable=True)[:, :count]


def branch(
    found: Candidates, first: int, logp: torch.Tensor, best: torch.Tensor, ids: torch.Tensor, number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A level's P parents branch: their W children each become candidates, from number `first` on. logp and best
    `[B, P, W]`, as the function `best` gives them, or `[B, 1, W]` where all parents have the same; ids `[B, P, l]`:
    the tokens from the root to each parent; number `[B, P]`: which candidates they are. -> ids and number of the next
    parents, the W likeliest children, the likeliest first."""
    chance = found.chance.gather(1, number)[:, :, None] + logp
    parts = chance, best, number[:, :, None]
    chance, token, parent = (part.expand(chance.shape).flatten(1) for part in parts)
    for room, part in zip(found, (chance, token, parent), strict=True):
        room[:, first : first + part.shape[1]] = part
    beam = best.shape[2]
    chosen = likeliest(chance, beam)
    way = ids.gather(1, (chosen // beam)[:, :, None].expand(-1, -1, ids.shape[2]))
    return torch.cat([way, token.gather(1, chosen)[:, :, None]], 2), chosen + first


def lay(found: Candidates, beam: int, tokens: torch.Tensor, tree: Layout) -> torch.Tensor:
    """The n likeliest candidates become the tree: fills `tree` and, but for the root, tokens `[B, n]`. Of equals the
    first comes first, which is the parent. -> their log-chances `[B, n]`."""
    (batch, nodes), levels = tokens.shape, tree.path.shape[2]
    numbers = torch.arange(nodes, device=tokens.device).expand(batch, -1)
    order = likeliest(found.chance, nodes)
    node = torch.zeros_like(found.parent).scatter_(1, order, numbers)  # candidate -> node
    tokens[:, 1:] = found.token.gather(1, order)[:, 1:]
    tree.parent.copy_(node.gather(1, found.parent.gather(1, order)))
    tree.depth.copy_(torch.where(order > beam, 2 + (order - 1 - beam) // beam**2, order.clamp(max=1)))
    tree.rank.copy_((order - 1).clamp(min=0) % beam)
    way = [numbers]  # up the tree: each node, its parent, and so on; above the root is the root
    for _ in range(levels - 1):
        way.append(tree.parent.gather(1, way[-1]))
    up = torch.stack(way, 2)
    tree.ancestors.zero_().scatter_(2, up, True)
    steps = tree.depth[:, :, None] - torch.arange(levels, device=tokens.device)
    tree.path.copy_(up.gather(2, steps.clamp(min=0)))
    return found.chance.gather(1, order)
