"""decode_kernels.py: attention over a tree and products of few rows, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from decode_kernels import AttentionConfig, OneRowLinear, attention_config, tree_attention, write
from medusa_model import cap

# Relative. bf16 has 8 bits: at most 2^-9 from rounding what comes out, as much from the softmax's weights, and twice
# that in Triton's interpreter, which cuts where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LLAMA = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)]
SMALL = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip(
            "no CUDA device" if request.param == "cuda" else "Triton's interpreter is off where there is a GPU"
        )
    return request.param


def assert_near(got, want):
    """In norm, over all of it and over the worst row."""
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=want.norm() / want.numel() ** 0.5)
    assert error.max() < TOLERANCE[got.dtype]


def reference_tree_attention(
    query, keys, values, length, ancestors, depth, scaling, softcap=None, sliding_window=None
):
    """Every node with every place of the cache, in float64."""
    nodes, places, groups = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    keys, values = (x.double().nan_to_num().repeat_interleave(groups, 1) for x in (keys, values))
    behind = torch.arange(places, device=query.device) - length  # [B, S]
    node = behind.clamp(0, nodes - 1)
    seen = ancestors[:, node].transpose(0, 1) & (behind < nodes)[:, None] | (behind < 0)[:, None]  # [B, n, S]
    if sliding_window is not None:
        at = torch.where(behind < 0, behind, depth[node])
        seen &= depth[:, None] - at[:, None] < sliding_window
    scores = cap(query.double() @ keys.mT * scaling, softcap).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def random_tree(nodes, device):
    """-> ancestors `[n, n]`, depth `[n]`."""
    ancestors = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        ancestors[node] |= ancestors[torch.randint(node, ())]
    return ancestors.to(device), ancestors.sum(1).sub(1).to(device)


def random_pass(lengths, nodes, heads, kv_heads, size, places, dtype, device):
    """Arguments of tree_attention, strided as a decoder has them; what is behind the nodes in the cache is NaN."""
    batch = len(lengths)
    query = torch.randn(batch, nodes, heads, size, device=device).to(dtype).transpose(1, 2)
    cache = torch.randn(3, 2, batch, kv_heads, places, size, device=device).to(dtype)
    for row, length in enumerate(lengths):
        cache[:, :, row, :, length + nodes :] = torch.nan
    length = torch.tensor(lengths, device=device)[:, None]
    return query, cache[1, 0], cache[1, 1], length, *random_tree(nodes, device), size**-0.5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", [None, AttentionConfig(16, 16, splits=1, warps=4, stages=2)])
@pytest.mark.parametrize(("nodes", "groups"), [(1, 1), (1, 4), (3, 2), (9, 4)])  # the last: three blocks of rows
def test_attention_equals_plain_torch(nodes, groups, config, dtype, device):
    arguments = random_pass([1, 38], nodes, 2 * groups, 2, 32, 64, dtype, device)
    got = tree_attention(*arguments, config=config)
    assert got.shape == (2, nodes, 2 * groups, 32) and got.dtype == dtype and got.is_contiguous()
    assert_near(got, reference_tree_attention(*arguments))


@pytest.mark.parametrize("splits", [1, 3, 7])
def test_splits_that_have_no_keys(splits, device):
    """One key, then 17, for up to 7 programs: most have nothing to say, and none says NaN."""
    for length, nodes in ((0, 1), (9, 8)):
        arguments = random_pass([length], nodes, 4, 2, 16, 48, torch.float32, device)
        got = tree_attention(*arguments, config=AttentionConfig(16, 16, splits, warps=4, stages=2))
        assert_near(got, reference_tree_attention(*arguments))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 2, 5, 30])
@pytest.mark.parametrize("splits", [1, 2])
def test_softcap_and_sliding_window(splits, window, softcap, device):
    arguments = random_pass([3, 49], 9, 4, 2, 16, 64, torch.float32, device)
    assert arguments[5].max() >= 2  # deeper than the smallest window, which hides the root from some nodes
    config = AttentionConfig(16, 16, splits, warps=4, stages=2)
    got = tree_attention(*arguments, softcap=softcap, sliding_window=window, config=config)
    assert_near(got, reference_tree_attention(*arguments, softcap, window))


def test_heads_of_an_odd_size_are_refused(device):
    with pytest.raises(ValueError, match="heads of 24"):
        tree_attention(*random_pass([1], 1, 2, 2, 24, 16, torch.float32, device))


@pytest.mark.parametrize(
    ("batch", "nodes", "splits"), [(1, 1, 32), (1, 17, 6), (1, 64, 4), (4, 1, 8), (8, 17, 1), (16, 64, 1)]
)
def test_every_multiprocessor_has_something_to_read(batch, nodes, splits):
    """LLaMA-3-8B on 132 multiprocessors: as many splits as there is room for, or as there are steps in the cache."""
    config = attention_config(batch * 8, 4 * nodes, 1024, torch.empty(128, dtype=torch.bfloat16), 132)
    assert config.splits == splits
    resident = 2 if nodes < 64 else 1
    assert batch * 8 * -(-4 * nodes // config.rows) * splits <= resident * 132 or splits == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(83, 139), (8, 2100), (1, 16)])
@torch.no_grad()
def test_one_row_equals_plain_torch(outputs, inputs, bias, dtype, device):
    layer = OneRowLinear(inputs, outputs, bias=bias, device=device, dtype=dtype)
    x = torch.randn(1, 1, 2 * inputs, device=device).to(dtype)[..., ::2]  # strided, and no multiple of anything
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    got = layer(x)
    assert got.shape == (1, 1, outputs) and got.dtype == dtype and got.is_contiguous()
    assert_near(got, want)


def test_other_products_are_torch_s(device, monkeypatch):
    """Several rows, and anything that wants a gradient."""
    layer = OneRowLinear(16, 20, device=device)
    monkeypatch.setattr("decode_kernels._one_row", None)
    with torch.no_grad():
        x = torch.randn(2, 16, device=device)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(torch.randn(1, 16, device=device)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_keys_and_values_are_written_behind_the_text(dtype, device):
    cache = torch.randn(3, 2, 2, 4, 20, 16, device=device).to(dtype)
    want, length = cache.clone(), torch.tensor([[5], [0]], device=device)
    key, value = (torch.randn(2, 3, 4, 16, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    for row, start in enumerate((5, 0)):
        want[1, 0, row, :, start : start + 3] = key[row]
        want[1, 1, row, :, start : start + 3] = value[row]
    write(key, value, cache[1, 0], cache[1, 1], length)
    assert torch.equal(cache, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("outputs", "inputs"), LLAMA + SMALL)
@torch.no_grad()
def test_one_row_of_real_shapes(outputs, inputs):
    x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
    layer = OneRowLinear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    got = layer(x)
    assert_near(got, torch.cat([x.double() @ part.double().t() for part in layer.weight.split(8192)], 1))
    assert torch.equal(got, layer(x))  # nothing depends on who comes first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("nodes", [1, 17, 64, 65])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (9, 3, 64), (8, 4, 256)])
def test_attention_in_a_graph_follows_the_length(heads, kv_heads, size, nodes):
    """The graph is captured at one length and replayed at others."""
    arguments = random_pass([900, 900], nodes, heads, kv_heads, size, 1024, torch.bfloat16, "cuda")
    arguments[1].nan_to_num_(), arguments[2].nan_to_num_()
    length = arguments[3]
    tree_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tree_attention(*arguments)
    for lengths in ([[1], [512]], [[959], [64]], [[300], [301]]):
        length.copy_(torch.tensor(lengths))
        graph.replay()
        assert_near(got, reference_tree_attention(*arguments))
