"""Products of few rows as Triton kernels: a pass of decoding should take as long as reading the weights.

Layers that read the same input (queries, keys and values; gate and up) are one launch, and so are the same layers of
all heads. A kernel takes 2 us however small its weights are, and cuBLAS reads the 8 MB of an 8B model's keys in 8 us,
where an H100's memory needs 3. One row is read faster than by cuBLAS too: the 15 GB of an 8B model in 5.4 ms, not 6.0.
For several rows of large weights cuBLAS is as fast as any tile tried, and stays.

Forward only. Grids follow from shapes, never from values on the device, so that a CUDA graph can hold them.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import nn

from decoding.kernels import dot

MOST_ROWS = 64  # of a product that several layers share
MOST_BYTES = 2**26  # of their weights: larger ones are read as fast one by one


@triton.jit
def _layer(table_ptr, out_ptr, ALIGNED: tl.constexpr):
    """A program's layer -> (weights, bias, outputs, where they begin in all layers' outputs). Addresses are int64."""
    entry = table_ptr + 4 * tl.program_id(1)
    w_ptr = tl.load(entry).to(out_ptr.dtype)
    if ALIGNED:  # else loads would be of two bytes
        w_ptr = tl.multiple_of(w_ptr, 16)
    return w_ptr, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _bias(bias, out_ptr, n, N):
    """Zeros for a layer without one."""
    return tl.load(bias.to(out_ptr.dtype) + n, mask=(n < N) & (bias != 0), other=0.0).to(tl.float32)


@triton.jit
def _one_row(
    x_ptr, x_layer, table_ptr, out_ptr, K,
    RESIDUAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block, layer): BLOCK_N outputs of a layer. Each thread adds up its own inputs, all of them together at
    the end. RESIDUAL: x + silu(W x + b)."""
    w_ptr, bias, N, begin = _layer(table_ptr, out_ptr, ALIGNED)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += tl.program_id(1) * x_layer
    w_ptr += n.to(tl.int64)[:, None] * K
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, tl.where(tl.program_id(0) * BLOCK_N < N, K, 0), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        # A weight is read once: it should not push x out of the cache.
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
    """Program (block, layer): BLOCK_N outputs of each row of x `[M, K]`. A layer's outputs `[M, N]` lie together."""
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
    """Layers `[..., K]` -> `[..., N]`, each with its N, that are computed by one launch. Their weights must stay where
    they are."""

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
        self.x, self.ready = None, {}

    def take(self, x: torch.Tensor) -> bool:
        fits = x.dtype == self.dtype and not torch.is_grad_enabled()
        return fits and 0 < x.numel() <= self.most * self.inputs

    def of(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """One layer's outputs; the others' are kept until they are asked for, with this very x."""
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
        """All layers' outputs of the same x `[..., K]`, one layer's behind the other's."""
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
        """x `[K]`, contiguous, the same for all layers, or `[layers, K]` -> all layers' outputs, one behind the other.
        residual: x + silu(W x + b), a ResBlock."""
        out = x.new_empty(sum(self.sizes))
        # Of the tiles tried on an H100 the best but for 3 %; of short rows, for a large vocabulary, more at once.
        block, step = (16, 256) if self.inputs <= 1024 and max(self.sizes) >= 2**15 else (4, 1024)
        _one_row[(triton.cdiv(max(self.sizes), block), len(self.layers))](
            x, 0 if x.numel() == self.inputs else self.inputs, self.table, out, self.inputs,
            RESIDUAL=residual, ALIGNED=self.aligned, BLOCK_N=block, BLOCK_K=step, STAGES=3, num_warps=4,
        )  # fmt: skip
        return out


class FewRowsLinear(nn.Linear):
    """`nn.Linear` whose class was changed for decoding: weights and names stay. It computes with `products`."""

    products: Products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products.of(self, x) if self.products.take(x) else super().forward(x)


def sharing(module: nn.Module) -> list[Products]:
    """All linear layers in a module, those that read the same input together."""
    names = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    found = []
    for part in module.modules():
        layers = {name: layer for name, layer in part.named_children() if type(layer) is nn.Linear}
        for together in names:
            if all(name in layers for name in together):
                found.append([layers.pop(name) for name in together])
        found += [[layer] for layer in layers.values()]
    return [Products(layers) for layers in found]


class AllHeads:
    """Logits of all heads for one hidden state `[1, H]` -> `[1, heads, V]`, in a launch for each layer of them."""

    def __init__(self, heads):
        *blocks, projections = zip(*heads, strict=True)
        self.blocks = [Products([block.linear for block in layer]) for layer in blocks]
        self.projections = Products(list(projections))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        for products in self.blocks:
            hidden = products.one_row(hidden, residual=True).view(len(products.layers), -1)
        return self.projections.one_row(hidden).view(1, len(self.projections.layers), -1)
