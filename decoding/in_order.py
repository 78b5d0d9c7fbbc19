"""Attention that adds up in the order of the text: a token's result does not depend on the tree that it is checked in.

A sum of rounded numbers depends on its order. torch chooses other kernels for a pass of one row than for one of many.
So with `agree` all passes have PASS_ROWS rows: each product and norm is the same kernel, and computes a row by itself.
That leaves attention. `decoding.kernels.tree_attention` adds up keys as they lie in the cache, and shares them among
more programs where there are fewer rows. Here all follows from a token's own position p:

- Keys before `far(p)`, which is NEAR to 2 NEAR - 1 back, are in the text whatever the tree, as no tree is deeper than
  NEAR. They are added up in blocks and shares that begin at fixed positions, in tiles of one size.
- The others, up to 2 NEAR, may lie in the text or among the nodes. Each node fetches its own, in the order of their
  positions, and adds them up by itself.
- Shares are merged in the order of the text.

A score is a sum over the head's dimensions, so it does not matter in which column of a tile its key is. What is masked
adds zero, and that changes nothing. Nor does the row of a tile matter: a GPU's matrix units compute each output by
itself. The tests compare bits.

Forward only. Grids depend on shapes, never on values on the device, so that a CUDA graph can hold them.
"""

import torch
import triton
import triton.language as tl

from common.errors import BadInput
from decoding.kernels import add_values, scores_of
from decoding.tree import Layout

PASS_ROWS = 64  # of every pass, so that all else in it runs the same kernels: a tile of a matrix product
NEAR = 16  # the deepest tree
ROWS = 64  # of queries in a program: query heads x nodes
SHARE = 256  # keys of a program: with fewer a long text has many shares to merge, with more a short one few programs
STEP_BYTES = 2**14  # of keys, and as many of values, that a program reads in one step


def check_can_agree(tree: Layout, kernels: bool, greedy: bool, rope_moves: bool, grown: bool = False):
    """Raises BadInput where texts could not agree. kernels: whether they run here. rope_moves: RoPE depends on the
    length of the text. grown: in each pass anew, so that it is not filled up."""
    nodes, depth = len(tree.depth), tree.path.shape[1] - 1
    for wrong, need in (
        (not kernels, "a GPU, and attention heads of a power of two from 16 on: try --dtype float32 without it"),
        (nodes > PASS_ROWS, f"a tree of at most {PASS_ROWS - 1} guesses, and this one has {nodes - 1}"),
        (grown and nodes < PASS_ROWS, f"--nodes {PASS_ROWS - 1} with --adaptive: its passes have {PASS_ROWS} rows"),
        (depth > NEAR, f"a tree at most {NEAR} guesses deep, and this one is {depth} deep"),
        (not greedy, "--temperature 0: how many random numbers are drawn depends on the tree"),
        (rope_moves, "a backbone whose RoPE does not change with the length of the text"),
    ):
        if wrong:
            raise BadInput(f"--agree needs {need}")


@triton.jit
def _far(position, NEAR: tl.constexpr):
    return tl.maximum(position // NEAR - 1, 0) * NEAR


@triton.jit(do_not_specialize=["nodes", "depth_b"])
def _text(
    q_ptr, k_ptr, v_ptr, length_ptr, depth_ptr, out_ptr, lse_ptr, scaling, nodes, kv_heads,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, v_b, v_h, v_s, depth_b,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    NEAR: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Program (row block, share, batch x key head): its share of the far keys. Row r is node r % nodes in query head
    r // nodes of GROUPS."""
    share, batches = tl.program_id(1), tl.num_programs(2) // kv_heads
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), tl.program_id(2) % kv_heads
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    mine, node, head = row < GROUPS * nodes, row % nodes, kv_head * GROUPS + row // nodes
    q = q_ptr + batch * q_b + head[:, None] * q_h + node[:, None] * q_n + d[None, :] * q_d
    q = tl.load(q, mask=mine[:, None], other=0.0)
    k_ptr += batch * k_b + kv_head * k_h
    v_ptr += batch * v_b + kv_head * v_h

    length = tl.load(length_ptr + batch).to(tl.int32)
    position = length + tl.load(depth_ptr + batch * depth_b + node).to(tl.int32)
    far = _far(position, NEAR)
    begin, end = share * SHARE, tl.minimum(share * SHARE + SHARE, tl.max(far, 0))
    if WINDOW is not None:  # the root sees farthest back
        begin = tl.maximum(begin, tl.maximum(length - WINDOW + 1, 0) // KEYS * KEYS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(begin, end, KEYS):
        place = start + tl.arange(0, KEYS)
        there = (place < end)[:, None]
        k = tl.load(k_ptr + place[:, None] * k_s + d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + place[:, None] * v_s + d[None, :], mask=there, other=0.0)
        seen = place[None, :] < far[:, None]
        if WINDOW is not None:
            seen &= position[:, None] - place[None, :] < WINDOW
        scores = tl.where(seen, scores_of(q, k, scaling, SOFTCAP), float("-inf"))
        best, total, out = add_values(scores, v, best, total, out)

    to = ((share * batches + batch) * nodes + node) * (kv_heads * GROUPS) + head  # [shares, B, n, H]
    total = tl.where(total > 0, total, 1.0)
    tl.store(lse_ptr + to, best + tl.log2(total), mask=mine)
    mine &= best > float("-inf")
    tl.store(out_ptr + to[:, None] * SIZE + d[None, :], out / total[:, None], mask=mine[:, None])


@triton.jit(do_not_specialize=["nodes", "depth_b", "path_b", "path_n"])
def _near(
    q_ptr, k_ptr, v_ptr, length_ptr, depth_ptr, path_ptr, partial_ptr, lse_ptr, out_ptr, scaling, nodes, kv_heads,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, v_b, v_h, v_s, depth_b, path_b, path_n,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    NEAR: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Program (row of the pass, batch x key head): its node's near keys, and then the shares of `_text`. Row g of the
    tile is query head g of GROUPS. Rows behind the nodes fill up the pass: they get zeros."""
    node, rows, batches = tl.program_id(0), tl.num_programs(0), tl.num_programs(1) // kv_heads
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads
    group, d = tl.arange(0, ROWS), tl.arange(0, SIZE)
    mine, head = group < GROUPS, kv_head * GROUPS + group
    q = q_ptr + batch * q_b + head[:, None] * q_h + node * q_n + d[None, :] * q_d
    q = tl.load(q, mask=mine[:, None], other=0.0)
    k_ptr += batch * k_b + kv_head * k_h
    v_ptr += batch * v_b + kv_head * v_h

    length = tl.load(length_ptr + batch).to(tl.int32)
    position = length + tl.load(depth_ptr + batch * depth_b + node).to(tl.int32)
    position = tl.where(node < nodes, position, -1)
    far = _far(position, NEAR)
    at = far + tl.arange(0, 2 * NEAR)
    there = at <= position
    if WINDOW is not None:
        there &= position - at < WINDOW
    behind = at - length
    new = tl.load(path_ptr + batch * path_b + node * path_n + behind, mask=there & (behind >= 0), other=0)
    place = tl.where(behind < 0, at, length + new.to(tl.int32))
    k = tl.load(k_ptr + place[:, None] * k_s + d[None, :], mask=there[:, None], other=0.0)
    v = tl.load(v_ptr + place[:, None] * v_s + d[None, :], mask=there[:, None], other=0.0)
    scores = tl.where(there[None, :], scores_of(q, k, scaling, SOFTCAP), float("-inf"))
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, SIZE], tl.float32)
    best, total, out = add_values(scores, v, best, total, out)

    for share in tl.range(0, tl.cdiv(far, SHARE), num_stages=4):
        to = ((share * batches + batch) * nodes + node) * (kv_heads * GROUPS) + head
        lse = tl.load(lse_ptr + to, mask=mine, other=float("-inf"))
        saw = mine & (lse > float("-inf"))  # a window may hide a share
        partial = tl.load(partial_ptr + to[:, None] * SIZE + d[None, :], mask=saw[:, None], other=0.0)
        better = tl.maximum(best, lse)
        decay, weight = tl.exp2(best - better), tl.exp2(lse - better)
        best, total = better, total * decay + weight
        out = out * decay[:, None] + partial * weight[:, None]
    to = (batch * rows + node) * (kv_heads * GROUPS) + head
    out /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + to[:, None] * SIZE + d[None, :], out, mask=mine[:, None])


def attention_in_order(
    query, keys, values, length, path, depth, nodes: int, scaling: float, softcap: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """As `tree_attention`, for the first `nodes` of the R rows of a pass: query `[B, H, R, D]` -> `[B, R, H, D]`. The
    other rows get zeros.

    path `[R, P]` or `[B, R, P]`: the places behind the text of a node's ancestors, from the root on, and of the node
    itself at its depth `[R]` or `[B, R]`, NEAR at most. keys and values `[B, H_kv, S, D]` are the whole cache, length
    `[B, 1]` is int64.
    """
    batch, heads, rows, size = query.shape
    kv_heads, places = keys.shape[1:3]
    groups, shares = heads // kv_heads, triton.cdiv(places, SHARE)
    step = max(16, min(64, STEP_BYTES // keys[0, 0, 0].nbytes))
    path, depth = path.expand(batch, rows, -1), depth.expand(batch, rows)
    out = query.new_empty(batch, rows, heads, size)
    partial = out.new_empty(shares, batch, nodes, heads, size, dtype=torch.float32)
    lse = partial.new_empty(partial.shape[:-1])
    strides = *query.stride(), *keys.stride()[:3], *values.stride()[:3], depth.stride(0)
    shape = dict(GROUPS=groups, SIZE=size, SOFTCAP=softcap, WINDOW=sliding_window, NEAR=NEAR, SHARE=SHARE)
    _text[(triton.cdiv(groups * nodes, ROWS), shares, batch * kv_heads)](
        query, keys, values, length, depth, partial, lse, scaling, nodes, kv_heads, *strides,
        ROWS=ROWS, KEYS=step, num_warps=4, num_stages=2, **shape,
    )  # fmt: skip
    _near[(rows, batch * kv_heads)](
        query, keys, values, length, depth, path, partial, lse, out, scaling, nodes, kv_heads,
        *strides, *path.stride()[:2], ROWS=max(16, triton.next_power_of_2(groups)), num_warps=4, **shape,
    )  # fmt: skip
    return out
