"""decoding/blocks.py: a ResBlock of few rows in one launch, against plain torch in float64."""

import copy

import pytest
import torch
from conftest import TOLERANCE, assert_near
from decoders import make_model

from decoding.attention import decoding
from decoding.blocks import MOST_ROWS, few_rows_block
from model.heads import ResBlock
from model.path_heads import FirstBlock


def make_block(hidden, k, device, dtype):
    block = FirstBlock(hidden, k) if k else ResBlock(hidden)
    torch.nn.init.normal_(block.linear.weight, std=0.1)
    torch.nn.init.normal_(block.linear.bias)
    return block.to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "parents", "hidden", "k"), [(1, 1, 48, 0), (1, 10, 139, 1), (3, 7, 48, 3), (2, 32, 150, 2)]
)
@torch.no_grad()
def test_a_block_equals_plain_torch(batch, parents, hidden, k, dtype, device):
    block = make_block(hidden, k, device, dtype)
    embeds = [torch.randn(batch, parents, k, hidden, device=device).to(dtype)] if k else []
    alone = torch.randn(batch, hidden, device=device).to(dtype)[:, None].expand(-1, parents, -1)  # one row a text
    strided = torch.randn(batch, parents, 2 * hidden, device=device).to(dtype)[..., ::2]
    plain = copy.deepcopy(block).double()
    for x in (alone, strided):
        got = few_rows_block(block, x, *embeds)
        assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
        assert_near(got, plain(x.double(), *(part.double() for part in embeds)))


@torch.no_grad()
def test_more_rows_and_another_dtype_are_left_to_torch():
    for k in (0, 2):
        block = make_block(16, k, "cpu", torch.float32)
        x = torch.randn(1, MOST_ROWS + 1, 16)
        embeds = [torch.randn(1, MOST_ROWS + 1, k, 16)] if k else []
        assert torch.equal(few_rows_block(block, x, *embeds), block(x, *embeds))
    with pytest.raises(RuntimeError, match="dtype"):
        few_rows_block(make_block(16, 0, "cpu", torch.float32), x.bfloat16())


@torch.no_grad()
def test_blocks_are_swapped_while_decoding_only():
    model = make_model(2, None, "hydra")
    blocks = [block for block in model.medusa_heads.modules() if isinstance(block, ResBlock)]
    assert len(blocks) >= 2
    with decoding(model, [], blocks):
        assert all(block.forward.func is few_rows_block for block in blocks)
    assert not any("forward" in vars(block) for block in blocks)
