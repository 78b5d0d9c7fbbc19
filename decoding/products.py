"""Triton kernels for matrix products of few rows: a decoding pass should take as long as reading the weights.

Layers that read the same input (queries, keys and values; gate and up) share one launch, and so do the same layers of
all heads. A kernel takes at least 2 us, however small its weights. For the 8 MB of key weights in a layer of an 8B
model cuBLAS takes 8 us, where an H100's memory needs 3. For one row these kernels are faster than cuBLAS too: 5.4 ms
instead of 6.0 for the 15 GB of an 8B model. For several rows of large weights cuBLAS is as fast as any tile tried, and
stays.

Forward only. Grids depend on shapes, never on values on the device, so that a CUDA graph can hold them.
"""

from itertools import accumulate
from typing import cast

import torch
import triton
import triton.language as tl
from torch import nn

from decoding.kernels import dot

MOST_ROWS = 64  # of x in a launch for several layers
MOST_BYTES = 2**26  # of their weights: larger layers are as fast one by one


@triton.jit
def _layer(table_ptr, out_ptr, ALIGNED: tl.constexpr):
    """A program's row of the table: weights, address of the bias, number of outputs, where they begin in `out`."""
    entry = table_ptr + 4 * tl.program_id(1)
    w_ptr = tl.load(entry).to(out_ptr.dtype)
    if ALIGNED:  # without this hint Triton loads two bytes at a time
        w_ptr = tl.multiple_of(w_ptr, 16)
    return w_ptr, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _bias(bias, out_ptr, n, N):
    """A layer's bias, or zeros if it has none."""
    return tl.load(bias.to(out_ptr.dtype) + n, mask=(n < N) & (bias != 0), other=0.0).to(tl.float32)


@triton.jit
def _one_row(
    x_ptr, x_layer, table_ptr, out_ptr, K,
    RESIDUAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block, layer): BLOCK_N outputs of a layer. Each thread sums over its own inputs; one reduction at the
    end adds the threads up. RESIDUAL: x + silu(W x + b)."""
    w_ptr, bias, N, begin = _layer(table_ptr, out_ptr, ALIGNED)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += tl.program_id(1) * x_layer
    w_ptr += n.to(tl.int64)[:, None] * K
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, tl.where(tl.program_id(0) * BLOCK_N < N, K, 0), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        # A weight is read only once, so it should not push x out of the GPU's cache.
        w = tl.load(
            w_ptr + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, 1) + _bias(bias, out_ptr, n, N)
    if RESIDUAL:
        out = out * tl.sigmoid(out) + tl.load(x_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + begin + n, out, mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _few_rows(
    x_ptr, table_ptr, out_ptr, M, K,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block, layer): BLOCK_N outputs for each row of x `[M, K]`. A layer's outputs are `[M, N]` in memory."""
    w_ptr, bias, N, begin = _layer(table_ptr, out_ptr, ALIGNED)
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, ROWS)
    w_ptr += n.to(tl.int64)[:, None] * K
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, tl.where(tl.program_id(0) * BLOCK_N < N, K, 0), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total = dot(x, tl.trans(w), total)
    total += _bias(bias, out_ptr, n, N)[None, :]
    mine = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + begin * M + m[:, None].to(tl.int64) * N + n[None, :], total, mask=mine)


class Products:
    """Layers that one launch computes from the same x: `[..., K]` -> `[..., N]`, each with its own N. Keeps the
    addresses of their weights, which must not move."""

    def __init__(self, layers: list[nn.Linear]):
        first = layers[0].weight
        self.layers, self.inputs, self.dtype = layers, layers[0].in_features, first.dtype
        self.sizes = [layer.out_features for layer in layers]
        addresses = [[layer.weight.data_ptr(), 0 if layer.bias is None else layer.bias.data_ptr()] for layer in layers]
        begins = accumulate(self.sizes, initial=0)
        rows = [[*two, size, begin] for two, size, begin in zip(addresses, self.sizes, begins, strict=False)]
        self.table = torch.tensor(rows, device=first.device)
        self.aligned = not any(weight % 16 for weight, _ in addresses) and first[0].nbytes % 16 == 0
        small = sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES
        self.most = MOST_ROWS if len(layers) > 1 and small and first.dtype.itemsize == 2 else 1
        self.x: torch.Tensor | None = None
        self.ready: dict[nn.Linear, torch.Tensor] = {}

    def take(self, x: torch.Tensor) -> bool:
        """Whether these kernels are used for x."""
        fits = x.dtype == self.dtype and not torch.is_grad_enabled()
        return fits and 0 < x.numel() <= self.most * self.inputs

    def of(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """One layer's outputs. Computes those of all layers and keeps the others for calls with this same x object."""
        if x is not self.x or layer not in self.ready:
            outs = self.outputs(x).split([x.numel() // self.inputs * size for size in self.sizes])
            shapes = ((*x.shape[:-1], size) for size in self.sizes)
            self.x = x
            self.ready = dict(zip(self.layers, map(torch.Tensor.view, outs, shapes), strict=True))
        out = self.ready.pop(layer)
        if not self.ready:
            self.x = None
        return out

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` -> the outputs of all layers, one layer after the other in one flat tensor."""
        rows, x = x.numel() // self.inputs, x.contiguous()
        if rows == 1:
            return self.one_row(x)
        out = x.new_empty(rows * sum(self.sizes))
        block = 16 if sum(self.sizes) < 2048 else 32
        _few_rows[(triton.cdiv(max(self.sizes), block), len(self.layers))](
            x, self.table, out, rows, self.inputs,
            ALIGNED=self.aligned, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_N=block, BLOCK_K=128, STAGES=4,
            num_warps=4,
        )  # fmt: skip
        return out

    def one_row(self, x: torch.Tensor, residual: bool = False) -> torch.Tensor:
        """Contiguous x, `[K]` for all layers or `[layers, K]` -> the outputs of all layers, as in `outputs`.
        residual: x + silu(W x + b), a ResBlock."""
        out = x.new_empty(sum(self.sizes))
        # Within 3 % of the best tiles tried on an H100. A large vocabulary with short rows needs more rows at once.
        block, step = (16, 256) if self.inputs <= 1024 and max(self.sizes) >= 2**15 else (4, 1024)
        _one_row[(triton.cdiv(max(self.sizes), block), len(self.layers))](
            x, 0 if x.numel() == self.inputs else self.inputs, self.table, out, self.inputs,
            RESIDUAL=residual, ALIGNED=self.aligned, BLOCK_N=block, BLOCK_K=step, STAGES=3, num_warps=4,
        )  # fmt: skip
        return out


class FewRowsLinear(nn.Linear):
    """What `decoding.attention.decoding` turns an `nn.Linear` into: same weights and names, computed by `products`."""

    products: Products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products.of(self, x) if self.products.take(x) else super().forward(x)


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is as it looks: torchao's int8 weights are of a class of their own."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def sharing(module: nn.Module) -> list[Products]:
    """All linear layers of a module; those that read the same input share a `Products`."""
    names = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    found = []
    for part in module.modules():
        layers = {name: cast(nn.Linear, layer) for name, layer in part.named_children() if is_plain(layer)}
        for together in names:
            if all(name in layers for name in together):
                found.append([layers.pop(name) for name in together])
        found += [[layer] for layer in layers.values()]
    return [Products(layers) for layers in found]


class AllHeads:
    """Logits of all heads: hidden `[1, H]` -> `[1, heads, V]`. One launch computes the same layer of all heads."""

    def __init__(self, heads):
        *blocks, projections = zip(*heads, strict=True)
        self.blocks = [Products([block.linear for block in layer]) for layer in blocks]
        self.projections = Products(list(projections))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        for products in self.blocks:
            hidden = products.one_row(hidden, residual=True).view(len(products.layers), -1)
        return self.projections.one_row(hidden).view(1, len(self.projections.layers), -1)
