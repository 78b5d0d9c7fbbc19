"""The frozen backbone's matrix products in 8-bit floating point (`--backbone_dtype fp8`, stage 1).

An H100 multiplies fp8 twice as fast as bf16. An fp8 number (e4m3) has 3 mantissa bits and is at most 448. So each row
of the input (a token) and each row of the weight (an output) is first scaled to its own range. The weights stay in
bf16 and are scaled again in each step. That takes 7 ms (7 B x 3 bytes at 3 TB/s), and FSDP, checkpoints and evaluation
need no change. Only the decoder's linear layers use fp8; norms, attention, embeddings and the heads do not.
"""

import logging
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from transformers import PreTrainedModel

from common.errors import BadInput

logger = logging.getLogger(__name__)

LARGEST = tl.constexpr(448.0)  # of torch.float8_e4m3fn


@triton.jit
def _scale_rows(x_ptr, q_ptr, scale_ptr, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / LARGEST
    tl.store(q_ptr + row * columns + column, (x / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, scale)


def scale_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[R, C]` -> fp8 `[R, C]` and fp32 scales `[R, 1]`, whose product is x, rounded. Reads each x once."""
    x = x.contiguous()
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    _scale_rows[(len(x),)](x, q, scale, x.shape[1], BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return q, scale


class Fp8Linear(nn.Linear):
    """`[..., in]` -> `[..., out]` in bf16. For frozen layers: it has no backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        rows, row_scales = scale_rows(rows)
        weight, weight_scales = scale_rows(self.weight)
        by_row = F.ScalingType.RowWise
        # use_fast_accum: the matrix unit sums with fewer bits than fp32. Without it the products take 1.2 times as
        # long on an H100.
        out = F.scaled_mm(
            rows, weight.t(), row_scales, by_row, weight_scales.t(), by_row,
            bias=self.bias, output_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return out.view(*x.shape[:-1], -1)


def use_fp8(backbone: PreTrainedModel, device: torch.device):
    """Makes the decoder's linear layers Fp8Linear; their weights and names stay. Raises BadInput if fp8 cannot run."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BadInput("--backbone_dtype fp8 needs a GPU with fp8 products (H100 and later)")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise BadInput(
            f"--backbone_dtype fp8: a {torch.cuda.get_device_name(device)} has no fp8 products (H100 and later do)"
        )
    layers = [m for m in backbone.get_decoder().modules() if type(m) is nn.Linear]
    odd = [layer for layer in layers if layer.in_features % 16 or layer.out_features % 16]
    if odd:
        raise BadInput(f"--backbone_dtype fp8: {odd[0]} is not a multiple of 16 wide, which fp8 products must be")
    for layer in layers:
        layer.__class__ = Fp8Linear
    logger.info("fp8: %d linear layers of the backbone", len(layers))
