"""A Triton kernel for a ResBlock of few rows, as heads have them that guess level by level: product, bias, activation
and residual in one launch, where torch has three, and seven if the block reads the path's embeddings too. A launch
takes at least 2 us, and of a small model's block that is most of its time.

Forward only. Grids depend on shapes, never on values on the device, so that a CUDA graph can hold them.
"""

import torch
import triton
import triton.language as tl

from decoding.kernels import dot
from model.heads import ResBlock

MOST_ROWS = 64


@triton.jit(do_not_specialize=["rows", "each", "x_b", "x_p"])
def _block(
    x_ptr, more_ptr, w_ptr, bias_ptr, out_ptr, rows, each, x_b, x_p, H, MORE,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block): BLOCK_N outputs of all rows. Row m of x is row m % each of text m // each."""
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, ROWS)
    w_ptr += n.to(tl.int64)[:, None] * (H + MORE)
    x_ptr += (m // each) * x_b + (m % each) * x_p
    more_ptr += m.to(tl.int64) * MORE
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + k[None, :], mask=(n < H)[:, None] & (k < H)[None, :], other=0.0)
        x = tl.load(x_ptr[:, None] + k[None, :], mask=(m < rows)[:, None] & (k < H)[None, :], other=0.0)
        total = dot(x, tl.trans(w), total)
    for start in tl.range(0, MORE, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + H + k[None, :], mask=(n < H)[:, None] & (k < MORE)[None, :], other=0.0)
        x = tl.load(more_ptr[:, None] + k[None, :], mask=(m < rows)[:, None] & (k < MORE)[None, :], other=0.0)
        total = dot(x, tl.trans(w), total)
    total += tl.load(bias_ptr + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
    mine = (m < rows)[:, None] & (n < H)[None, :]
    x = tl.load(x_ptr[:, None] + n[None, :], mask=mine, other=0.0).to(tl.float32)
    tl.store(out_ptr + m[:, None].to(tl.int64) * H + n[None, :], x + total * tl.sigmoid(total), mask=mine)


def few_rows_block(block: ResBlock, x: torch.Tensor, embeds: torch.Tensor | None = None) -> torch.Tensor:
    """block(x, embeds): x `[B, P, H]`, of any strides but the last, embeds `[B, P, k, H]` or None -> `[B, P, H]`. More
    than MOST_ROWS rows, or another dtype than the weights', are left to torch."""
    weight = block.linear.weight
    batch, each, hidden = x.shape
    if not 0 < batch * each <= MOST_ROWS or x.dtype != weight.dtype:
        return type(block).forward(block, x, *(() if embeds is None else (embeds,)))
    x = x if x.stride(-1) == 1 else x.contiguous()
    more = x if embeds is None else embeds.to(x.dtype).contiguous()
    out = x.new_empty(x.shape)
    _block[(triton.cdiv(hidden, 16),)](
        x, more, weight, block.linear.bias, out, batch * each, each, *x.stride()[:2],
        hidden, weight.shape[1] - hidden, ROWS=max(16, triton.next_power_of_2(batch * each)), BLOCK_N=16,
        BLOCK_K=128, STAGES=4, num_warps=4,
    )  # fmt: skip
    return out
