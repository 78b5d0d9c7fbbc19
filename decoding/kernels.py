"""Triton kernels for the attention of a pass. A pass has few rows, so it takes as long as reading weights and cache.

`tree_attention` is attention over a draft tree in one kernel, and a small second one, instead of nine. `write` puts
the keys and values of a pass into the cache. The matrix products are in decoding/products.py.

Forward only. Grids and splits depend on the shapes of the arguments, never on values on the device, so that a CUDA
graph can hold them.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # its tl.dot mistakes bf16 for integers


@triton.jit
def dot(a, b, total):
    """a @ b + total. fp32 is not rounded to the 10 bits of tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def scores_of(q, k, scaling, SOFTCAP: tl.constexpr):
    """Scores of queries `[R, D]` for keys `[S, D]`, as powers of 2: exp2 is one instruction."""
    scores = dot(q, tl.trans(k), None) * scaling
    if SOFTCAP is not None:  # tanh(x) = 2 sigmoid(2 x) - 1
        scores = SOFTCAP * (2 * tl.sigmoid(scores * (2 / SOFTCAP)) - 1)
    return scores * 1.4426950408889634  # log2(e)


@triton.jit
def add_values(scores, v, best, total, out):
    """A step of a softmax over blocks of keys: scores `[R, S]` and values `[S, D]` go into each row's highest score so
    far `[R]`, its sum of powers `[R]` and its sum of values `[R, D]`."""
    better = tl.maximum(best, tl.max(scores, 1))
    shift = tl.where(better == float("-inf"), 0.0, better)  # a row may have seen no key yet
    decay = tl.exp2(best - shift)
    scores = tl.exp2(scores - shift[:, None])
    return better, total * decay + tl.sum(scores, 1), dot(scores.to(v.dtype), v, out * decay[:, None])


def can_run(device: torch.device, size: int) -> bool:
    """Whether these kernels run there, with attention heads of this size."""
    return device.type == "cuda" and size >= 16 and size & (size - 1) == 0


class AttentionConfig(NamedTuple):
    rows: int  # of queries in a program, out of query heads x nodes
    keys: int  # that a program reads in one step
    splits: int  # how many programs share the keys
    warps: int
    stages: int


def attention_config(
    programs: int, rows: int, places: int, key: torch.Tensor, processors: int, shared: int
) -> AttentionConfig:
    """programs: batch x key heads. rows: of queries that share a key head. places: positions in the cache. key `[D]`:
    one of its keys. processors: multiprocessors of the GPU. shared: bytes of shared memory in each.

    The best of those tried on an H100 with D = 64 and 128, 400 to 7,800 tokens in the cache, and 1 to 64 nodes. Blocks
    are small, unless many rows share many keys: each block reads the keys anew, and that would cost more.
    """
    block, keys, warps, stages = 16, min(len(key), 2**15 // key.nbytes), 4, 3
    if rows > 64 and places * key.nbytes > 2**20 and key.dtype.itemsize == 2:
        block, warps, stages = 128, 8, 2
    while keys > 16 and (stages * 2 * keys + block) * key.nbytes > shared:
        stages, keys = 2, keys if stages > 2 else keys // 2
    programs *= triton.cdiv(rows, block)
    splits = max(1, min(processors // programs, triton.cdiv(places, keys), 16))  # one program a multiprocessor
    return AttentionConfig(block, keys, splits, warps, stages)


@triton.jit(do_not_specialize=["nodes"])
def _attend(
    q_ptr, k_ptr, v_ptr, length_ptr, ancestors_ptr, depth_ptr, out_ptr, lse_ptr, scaling, nodes, kv_heads,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, v_b, v_h, v_s, a_b, d_b,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (row block, split, batch x key head). Row r is node r % nodes in query head r // nodes of GROUPS."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), tl.program_id(2) % kv_heads
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    mine, node, head = row < GROUPS * nodes, row % nodes, kv_head * GROUPS + row // nodes
    q = q_ptr + batch * q_b + head[:, None] * q_h + node[:, None] * q_n + d[None, :] * q_d
    q = tl.load(q, mask=mine[:, None], other=0.0)
    k_ptr += batch * k_b + kv_head * k_h
    v_ptr += batch * v_b + kv_head * v_h
    ancestors_ptr += batch * a_b
    depth_ptr += batch * d_b
    if WINDOW is not None:
        depth = tl.load(depth_ptr + node)

    length = tl.load(length_ptr + batch).to(tl.int32)
    end = length + nodes
    begin = 0 if WINDOW is None else tl.maximum(length - WINDOW + 1, 0)  # the root sees farthest back
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), splits) * KEYS
    begin += split * share
    best = tl.full([ROWS], float("-inf"), tl.float32)  # each row's highest score so far, as a power of 2
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(begin, tl.minimum(begin + share, end), KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < end
        k = tl.load(k_ptr + place[:, None] * k_s + d[None, :], mask=there[:, None], other=0.0)
        scores = scores_of(q, k, scaling, SOFTCAP)
        behind = place - length
        if WINDOW is not None:
            near = (depth[:, None] - behind[None, :] < WINDOW) | (behind >= 0)[None, :]
            scores = tl.where(near, scores, float("-inf"))
        if start + KEYS > length:
            new = there & (behind >= 0)
            seen = tl.load(ancestors_ptr + node[:, None] * nodes + behind[None, :], mask=new[None, :], other=0) != 0
            if WINDOW is not None:
                seen &= depth[:, None] - tl.load(depth_ptr + behind, mask=new, other=0)[None, :] < WINDOW
            scores = tl.where(seen | (behind < 0)[None, :], scores, float("-inf"))
        v = tl.load(v_ptr + place[:, None] * v_s + d[None, :], mask=there[:, None], other=0.0)
        best, total, out = add_values(scores, v, best, total, out)

    batches = tl.num_programs(2) // kv_heads
    to = ((split * batches + batch) * nodes + node) * (kv_heads * GROUPS) + head  # [splits, B, n, H]
    total = tl.where(total > 0, total, 1.0)
    if lse_ptr is not None:
        tl.store(lse_ptr + to, best + tl.log2(total), mask=mine)
        mine &= best > float("-inf")
    tl.store(out_ptr + to[:, None] * SIZE + d[None, :], out / total[:, None], mask=mine[:, None])


@triton.jit
def _combine(partial_ptr, lse_ptr, out_ptr, splits, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Program (row): merges its partial results, each a softmax over one split. SPLITS: splits, to a power of 2."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    lse = tl.load(lse_ptr + split * rows + row, mask=split < splits, other=float("-inf"))
    share = tl.exp2(lse - tl.max(lse, 0))
    there = (lse > float("-inf"))[:, None]  # a row that saw no key of a split wrote nothing for it
    partial = tl.load(partial_ptr + (split * rows + row)[:, None] * SIZE + d[None, :], mask=there, other=0.0)
    tl.store(out_ptr + row * SIZE + d, tl.sum(partial * share[:, None], 0) / tl.sum(share, 0))


def tree_attention(
    query, keys, values, length, ancestors, depth, scaling: float, softcap: float | None = None,
    sliding_window: int | None = None, config: AttentionConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the n nodes of a tree: query `[B, H, n, D]`, keys and values `[B, H_kv, S, D]` -> `[B, n, H, D]`.

    keys and values are the whole cache: the text in `[:length]`, the nodes in the n positions after it. length
    `[B, 1]` is int64, on the device. A node attends to the text and to the nodes in its row of ancestors `[B, n, n]`
    bool, itself among them. Its position in the text is length + depth `[B, n]`; with a sliding window it attends only
    to what is less than that many tokens before it. Trees are contiguous, and may all be one (a stride of 0). Only the
    filled part of the cache is read, once for all nodes and all query heads that share it.
    """
    batch, heads, nodes, size = query.shape
    kv_heads, places = keys.shape[1:3]
    if size != triton.next_power_of_2(size) or size < 16:
        raise ValueError(f"tree_attention: heads of {size}, not of a power of two from 16 on")
    groups = heads // kv_heads
    if config is None:
        chip = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
        # The driver takes 1 KB of each multiprocessor's shared memory.
        limits = (chip.multi_processor_count, chip.shared_memory_per_multiprocessor - 1024) if chip else (4, 2**17)
        config = attention_config(batch * kv_heads, groups * nodes, places, keys[0, 0, 0], *limits)
    out = query.new_empty(batch, nodes, heads, size)
    partial, lse = out, None
    if config.splits > 1:
        partial = out.new_empty(config.splits, *out.shape, dtype=torch.float32)
        lse = partial.new_empty(partial.shape[:-1])
    _attend[(triton.cdiv(groups * nodes, config.rows), config.splits, batch * kv_heads)](
        query, keys, values, length, ancestors, depth, partial, lse, scaling, nodes, kv_heads,
        *query.stride(), *keys.stride()[:3], *values.stride()[:3], ancestors.stride(0), depth.stride(0),
        GROUPS=groups, SIZE=size, SOFTCAP=softcap, WINDOW=sliding_window,
        ROWS=config.rows, KEYS=config.keys, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if lse is not None:
        padded = triton.next_power_of_2(config.splits)
        _combine[(batch * nodes * heads,)](partial, lse, out, config.splits, SIZE=size, SPLITS=padded)
    return out


@triton.jit(do_not_specialize=["nodes"])
def _write(
    k_ptr, v_ptr, keys_ptr, values_ptr, length_ptr, nodes, kv_heads, k_b, k_h, k_n, v_b, v_h, v_n, c_b, c_h, c_s,
    SIZE: tl.constexpr,
):  # fmt: skip
    node, head, d = tl.program_id(0), tl.program_id(1) % kv_heads, tl.arange(0, SIZE)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    to = batch * c_b + head * c_h + (tl.load(length_ptr + batch) + node) * c_s + d
    tl.store(keys_ptr + to, tl.load(k_ptr + batch * k_b + head * k_h + node * k_n + d))
    tl.store(values_ptr + to, tl.load(v_ptr + batch * v_b + head * v_h + node * v_n + d))


def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor):
    """Copies key and value `[B, H_kv, n, D]` to positions length .. length + n - 1 of keys and values
    `[B, H_kv, S, D]`, whose strides are the same."""
    batch, kv_heads, nodes, size = key.shape
    _write[(nodes, batch * kv_heads)](
        key, value, keys, values, length, nodes, kv_heads, *key.stride()[:3], *value.stride()[:3], *keys.stride()[:3],
        SIZE=size, num_warps=1,
    )  # fmt: skip
