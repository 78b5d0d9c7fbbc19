"""decoding/products.py: products of few rows, several layers in one launch, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_near, make_backbone, randomise
from torch import nn

from decoding import products as products_module
from decoding.products import AllHeads, FewRowsLinear, Products, sharing
from model.heads import MedusaHead

LLAMA = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)), (4096, (128256,))]
SMALL = [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)), (576, (49152,))]


def make_layers(inputs, sizes, device, dtype=torch.float32, bias=True):
    """The second of several has no bias: Qwen2 has some for queries, keys and values only."""
    layers = [
        nn.Linear(inputs, size, bias=bias and i != 1, device=device, dtype=dtype) for i, size in enumerate(sizes)
    ]
    products = Products(layers)
    for layer in layers:
        layer.__class__, layer.products = FewRowsLinear, products
    return layers


def reference(layer, x):
    return F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "sizes"), [(139, (83,)), (2100, (8,)), (48, (64, 16, 16)), (139, (20, 83))])
@torch.no_grad()
def test_one_row_equals_plain_torch(inputs, sizes, dtype, device):
    layers = make_layers(inputs, sizes, device, dtype)
    x = torch.randn(1, 1, 2 * inputs, device=device).to(dtype)[..., ::2]  # strided, and no multiple of anything
    for layer in layers:
        got = layer(x)
        assert got.shape == (1, 1, layer.out_features) and got.dtype == dtype and got.is_contiguous()
        assert_near(got, reference(layer, x))


@pytest.mark.parametrize("rows", [2, 16, 33, 64])
@pytest.mark.parametrize(("inputs", "sizes"), [(48, (64, 16, 16)), (139, (20, 83)), (300, (70, 70))])
@torch.no_grad()
def test_several_rows_equal_plain_torch(inputs, sizes, rows, device, monkeypatch):
    layers = make_layers(inputs, sizes, device, torch.bfloat16)
    x = torch.randn(2, rows // 2, inputs, device=device).bfloat16() if rows % 2 == 0 else None
    x = torch.randn(1, rows, inputs, device=device).bfloat16() if x is None else x
    monkeypatch.setattr(products_module.nn.Linear, "forward", None)
    for layer in layers:
        got = layer(x)
        assert got.shape == (*x.shape[:-1], layer.out_features) and got.is_contiguous()
        assert_near(got, reference(layer, x))


@torch.no_grad()
def test_one_launch_for_all_layers_of_an_input(device, monkeypatch):
    """In whatever order they are asked, and never with what another input gave."""
    layers, launches = make_layers(32, (16, 24, 16), device), []
    outputs = Products.outputs
    monkeypatch.setattr(Products, "outputs", lambda self, x: launches.append(len(x)) or outputs(self, x))
    x, y = torch.randn(2, 1, 32, device=device)
    for order in ((0, 1, 2), (2, 0, 1)):
        for i in order:
            assert_near(layers[i](x), reference(layers[i], x))
    assert len(launches) == 2 and layers[0].products.x is None
    for i, z in ((0, x), (1, y), (0, y), (1, x), (1, x), (2, y)):
        assert_near(layers[i](z), reference(layers[i], z))


def test_other_products_are_torch_s(device, monkeypatch):
    """More rows than few, several of one layer or of large ones or in fp32, and anything that wants a gradient."""
    monkeypatch.setattr(Products, "outputs", None)
    several, bf16 = torch.randn(3, 16, device=device), torch.bfloat16
    with torch.no_grad():
        for sizes, x, most_bytes in (
            ((8, 8), torch.randn(65, 16, device=device, dtype=bf16), 2**26),
            ((8,), several.to(bf16), 2**26),
            ((8, 8), several.to(bf16), 511),
            ((8, 8), several, 2**26),
            ((8, 8), several[:0].to(bf16), 2**26),
        ):
            monkeypatch.setattr(products_module, "MOST_BYTES", most_bytes)
            layer = make_layers(16, sizes, device, x.dtype)[0]
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer = make_layers(16, (20,), device)[0]
    layer(torch.randn(1, 16, device=device)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_layers_that_share_their_input():
    backbone = make_backbone(tied=False)
    found = [[layer.out_features for layer in products.layers] for products in sharing(backbone)]
    layers = [layer for products in sharing(backbone) for layer in products.layers]
    assert sorted(map(id, layers)) == sorted(id(part) for part in backbone.modules() if type(part) is nn.Linear)
    config = backbone.config
    size = config.hidden_size // config.num_attention_heads
    attention = [config.hidden_size, *[config.num_key_value_heads * size] * 2]
    assert found.count(attention) == found.count([config.intermediate_size] * 2) == config.num_hidden_layers
    assert found.count([config.hidden_size]) == 2 * config.num_hidden_layers  # o_proj, down_proj
    assert found.count([config.vocab_size]) == 1 and len(found) == 4 * config.num_hidden_layers + 1


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "blocks"), [(1, 1), (3, 2), (2, 0)])
@torch.no_grad()
def test_all_heads_at_once(heads, blocks, dtype, device):
    heads = nn.ModuleList(MedusaHead(48, 101, blocks) for _ in range(heads)).to(device)
    randomise(heads, 0.3)
    hidden = torch.randn(1, 96, device=device)[:, ::2].to(dtype)
    got = AllHeads(heads.to(dtype))(hidden)
    want = torch.stack([head(hidden.double()) for head in heads.double()], 1)
    assert got.shape == (1, len(heads), 101) and got.dtype == dtype
    assert_near(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 9, 33, 64])
@pytest.mark.parametrize(("inputs", "sizes"), LLAMA + SMALL)
@torch.no_grad()
def test_products_of_real_shapes(inputs, sizes, rows):
    layers = make_layers(inputs, sizes, "cuda", torch.bfloat16, bias=False)
    x = torch.randn(1, rows, inputs, device="cuda", dtype=torch.bfloat16)
    for layer in layers:
        got, want = layer(x), [x[0].double() @ part.double().t() for part in layer.weight.split(8192)]
        assert_near(got[0], torch.cat(want, 1))
        assert torch.equal(got, layer(x.clone()))  # nothing depends on who comes first
