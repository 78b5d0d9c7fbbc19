"""Triton kernels for the steps in which a draft tree grows: three launches a level and two at the end, where torch has
some eighty, of at least 2 us each. decoding/candidates.py has the same in torch, and says what the arguments are.

Forward only. Grids depend on shapes, never on values on the device, so that a CUDA graph can hold them. Order is
complete: of equals the first comes first, and NaN is the lowest logit. So indices are valid whatever the heads say.
"""

import torch
import triton
import triton.language as tl

from decoding.candidates import Candidates
from decoding.tree import Layout

PART = 4096  # logits that a program reads

LOWEST = tl.constexpr(-1.0e38)  # of a logit; -inf is for what is not there or was taken already


@triton.jit
def _best_of_part(logits_ptr, values_ptr, tokens_ptr, lse_ptr, size, scale, SOFTCAP: tl.constexpr, COUNT: tl.constexpr,
                  PART: tl.constexpr):  # fmt: skip
    """Program (part, row): the COUNT highest of PART logits, the highest first, and the log of their sum of
    exponentials."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * PART + tl.arange(0, PART)
    x = tl.load(logits_ptr + row * size + token, mask=token < size, other=0.0).to(tl.float32)
    if SOFTCAP is not None:  # tanh(x) = 2 sigmoid(2 x) - 1
        x = SOFTCAP * (2 * tl.sigmoid(x * (2 / SOFTCAP)) - 1)
    x *= scale
    x = tl.where(x > LOWEST, tl.minimum(x, -LOWEST), LOWEST)  # NaN is the lowest
    x = tl.where(token < size, x, float("-inf"))
    to = row * tl.num_programs(0) + part
    highest = tl.max(x, 0)
    tl.store(lse_ptr + to, highest + tl.log(tl.sum(tl.exp(x - highest), 0)))
    for i in range(COUNT):
        value, place = tl.max(x, 0, return_indices=True)
        tl.store(values_ptr + to * COUNT + i, value)
        tl.store(tokens_ptr + to * COUNT + i, (part * PART + place).to(tl.int64))
        x = tl.where(token == part * PART + place, float("-inf"), x)


@triton.jit
def _ahead(chance, i, other, j):
    """How many of j stand before each i, likeliest first."""
    before = (other[None, :] > chance[:, None]) | ((other[None, :] == chance[:, None]) & (j[None, :] < i[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _best_of_parts(values_ptr, tokens_ptr, lse_ptr, map_ptr, logp_ptr, out_ptr, parts, COUNT: tl.constexpr,
                   PARTS: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """Program (row): the COUNT highest of all parts, as log-probabilities. PARTS, PLACES: parts and parts x COUNT, to
    a power of 2."""
    row, place, part = tl.program_id(0), tl.arange(0, PLACES), tl.arange(0, PARTS)
    values_ptr += row * parts * COUNT
    tokens_ptr += row * parts * COUNT
    x = tl.load(values_ptr + place, mask=place < parts * COUNT, other=float("-inf"))
    lse = tl.load(lse_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    highest = tl.max(lse, 0)
    total = highest + tl.log(tl.sum(tl.exp(lse - highest), 0))
    rank = tl.zeros([PLACES], tl.int32)
    for start in range(0, parts * COUNT, 32):  # of equals the first comes first: it has the smaller token
        j = start + tl.arange(0, 32)
        rank += _ahead(x, place, tl.load(values_ptr + j, mask=j < parts * COUNT, other=float("-inf")), j)
    mine = (rank < COUNT) & (place < parts * COUNT)
    token = tl.load(tokens_ptr + place, mask=mine, other=0)
    if map_ptr is not None:
        token = tl.load(map_ptr + token, mask=mine, other=0)
    tl.store(logp_ptr + row * COUNT + rank, tl.minimum(x - total, 0.0), mask=mine)
    tl.store(out_ptr + row * COUNT + rank, token, mask=mine)


def best(
    logits: torch.Tensor,
    count: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    token_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = logits.shape[-1]
    rows, parts = logits.numel() // size, triton.cdiv(size, PART)
    values = logits.new_empty(rows, parts, count, dtype=torch.float32)
    tokens, lse = torch.empty_like(values, dtype=torch.int64), values.new_empty(rows, parts)
    logp = values.new_empty(*logits.shape[:-1], count)
    out = torch.empty_like(logp, dtype=torch.int64)
    part = min(PART, triton.next_power_of_2(size))
    _best_of_part[(parts, rows)](
        logits.contiguous(),
        values,
        tokens,
        lse,
        size,
        1 / temperature,
        SOFTCAP=softcap,
        COUNT=count,
        PART=part,
        num_warps=8,
    )
    _best_of_parts[(rows,)](
        values, tokens, lse, token_map, logp, out, parts, COUNT=count, PARTS=triton.next_power_of_2(parts),
        PLACES=triton.next_power_of_2(parts * count),
    )  # fmt: skip
    return logp, out


@triton.jit
def _children(i, count, logp_ptr, logp_p, number_ptr, chance_ptr, W: tl.constexpr):
    """-> log-chance and parent's number of children i of a level; those that are not there have -inf."""
    mine = i < count
    parent = tl.load(number_ptr + i // W, mask=mine, other=0)
    logp = tl.load(logp_ptr + (i // W) * logp_p + i % W, mask=mine, other=float("-inf"))
    return tl.load(chance_ptr + parent) + logp, parent


@triton.jit(do_not_specialize=["first", "parents", "length", "candidates", "ids_b", "logp_b", "logp_p"])
def _branch(
    logp_ptr, best_ptr, ids_ptr, number_ptr, chance_ptr, token_ptr, parent_ptr, next_ids_ptr, next_ptr,
    first, parents, length, candidates, ids_b, logp_b, logp_p, W: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """Program (row). CHILDREN: those of the level, to a power of 2."""
    row, i, count = tl.program_id(0).to(tl.int64), tl.arange(0, CHILDREN), parents * W
    logp_ptr += row * logp_b
    number_ptr += row * parents
    chance_ptr += row * candidates
    chance, parent = _children(i, count, logp_ptr, logp_p, number_ptr, chance_ptr, W)
    place = tl.zeros([CHILDREN], tl.int32)
    for start in range(0, count, 32):
        j = start + tl.arange(0, 32)
        other, _ = _children(j, count, logp_ptr, logp_p, number_ptr, chance_ptr, W)
        place += _ahead(chance, i, other, j)
    mine = i < count
    token = tl.load(best_ptr + row * logp_b + (i // W) * logp_p + i % W, mask=mine, other=0)
    to = first + i
    tl.store(chance_ptr + to, chance, mask=mine)
    tl.store(token_ptr + row * candidates + to, token, mask=mine)
    tl.store(parent_ptr + row * candidates + to, parent, mask=mine)
    mine &= place < W
    tl.store(next_ptr + row * W + place, to.to(tl.int64), mask=mine)
    next_ids_ptr += (row * W + place) * (length + 1)
    for step in range(length):
        way = tl.load(ids_ptr + row * ids_b + (i // W) * length + step, mask=mine, other=0)
        tl.store(next_ids_ptr + step, way, mask=mine)
    tl.store(next_ids_ptr + length, token, mask=mine)


def branch(
    found: Candidates, first: int, logp: torch.Tensor, best: torch.Tensor, ids: torch.Tensor, number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, parents, length = ids.shape
    beam, shared = logp.shape[2], logp.shape[1] < parents
    next_ids, following = ids.new_empty(batch, beam, length + 1), ids.new_empty(batch, beam)
    _branch[(batch,)](
        logp, best, ids, number, *found, next_ids, following,
        first, parents, length, found.chance.shape[1], ids.stride(0), logp.stride(0), 0 if shared else beam,
        W=beam, CHILDREN=triton.next_power_of_2(parents * beam), num_warps=8,
    )  # fmt: skip
    return next_ids, following


@triton.jit
def _sort(chance_ptr, node_ptr, order_ptr, candidates, nodes, BLOCK: tl.constexpr):
    """Program (block of candidates, row): where each stands among all of them, likeliest first."""
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chance_ptr += row * candidates
    chance = tl.load(chance_ptr + i, mask=i < candidates, other=float("-inf"))
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, candidates, 4 * BLOCK):
        j = start + tl.arange(0, 4 * BLOCK)
        place += _ahead(chance, i, tl.load(chance_ptr + j, mask=j < candidates, other=float("-inf")), j)
    tl.store(node_ptr + row * candidates + i, place, mask=i < candidates)
    tl.store(order_ptr + row * nodes + place, i, mask=(i < candidates) & (place < nodes))


@triton.jit
def _lay(
    chance_ptr, token_ptr, number_ptr, node_ptr, order_ptr,
    out_ptr, share_ptr, parent_ptr, depth_ptr, rank_ptr, ancestors_ptr, path_ptr, candidates, nodes,
    W: tl.constexpr, LEVELS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Program (row): the first candidates of `order` as a tree. NODES: nodes, to a power of 2."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, NODES)
    mine, to = i < nodes, row * nodes + i
    number_ptr += row * candidates
    node_ptr += row * candidates
    number = tl.load(order_ptr + to, mask=mine, other=0).to(tl.int64)
    depth = tl.where(number > W, 2 + (number - 1 - W) // (W * W), tl.where(number > 0, 1, 0))
    tl.store(depth_ptr + to, depth.to(tl.int64), mask=mine)
    tl.store(rank_ptr + to, tl.where(number > 0, (number - 1) % W, 0).to(tl.int64), mask=mine)
    tl.store(share_ptr + to, tl.load(chance_ptr + row * candidates + number), mask=mine)
    tl.store(out_ptr + to, tl.load(token_ptr + row * candidates + number), mask=mine & (i > 0))
    up, way = i, path_ptr + to * LEVELS
    ancestors = i[:, None] == i[None, :]
    for step in tl.static_range(LEVELS):
        tl.store(way + depth - step, up.to(tl.int64), mask=mine & (step <= depth))
        tl.store(way + step, i.to(tl.int64), mask=mine & (step > depth))
        number = tl.load(number_ptr + number)
        up = tl.load(node_ptr + number)  # its parent; the root's is the root
        ancestors |= up[:, None] == i[None, :]
        if step == 0:
            tl.store(parent_ptr + to, up.to(tl.int64), mask=mine)
    to = ancestors_ptr + to[:, None] * nodes + i[None, :]
    tl.store(to, ancestors, mask=mine[:, None] & mine[None, :])


def lay(found: Candidates, beam: int, tokens: torch.Tensor, tree: Layout) -> torch.Tensor:
    (batch, nodes), candidates, block = tokens.shape, found.chance.shape[1], 32
    node = found.token.new_empty(batch, candidates, dtype=torch.int32)
    order, share = node.new_empty(batch, nodes), found.chance.new_empty(batch, nodes)
    _sort[(triton.cdiv(candidates, block), batch)](found.chance, node, order, candidates, nodes, BLOCK=block)
    _lay[(batch,)](
        found.chance, found.token, found.parent, node, order, tokens, share, *tree, candidates, nodes,
        W=beam, LEVELS=tree.path.shape[2], NODES=triton.next_power_of_2(nodes),
    )  # fmt: skip
    return share
