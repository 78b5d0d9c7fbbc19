"""decoding/kernels.py: attention over a tree, against plain torch in float64."""

import pytest
import torch
from conftest import TOLERANCE, assert_near

from decoding.kernels import AttentionConfig, attention_config, tree_attention, write
from model.loss import cap


def reference_tree_attention(
    query, keys, values, length, ancestors, depth, scaling, softcap=None, sliding_window=None
):
    """Every node with every place of the cache, in float64."""
    nodes, places, groups = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    keys, values = (x.double().nan_to_num().repeat_interleave(groups, 1) for x in (keys, values))
    behind = torch.arange(places, device=query.device) - length  # [B, S]
    node = behind.clamp(0, nodes - 1)
    seen = ancestors.gather(2, node[:, None].expand(-1, nodes, -1)) & (behind < nodes)[:, None]
    seen |= (behind < 0)[:, None]  # [B, n, S]
    if sliding_window is not None:
        at = torch.where(behind < 0, behind, depth.gather(1, node))
        seen &= depth[:, :, None] - at[:, None] < sliding_window
    scores = cap(query.double() @ keys.mT * scaling, softcap).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def random_trees(batch, nodes, device):
    """-> ancestors `[B, n, n]`, depth `[B, n]`, a tree for each row."""
    ancestors = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    for tree in ancestors:
        for node in range(1, nodes):
            tree[node] |= tree[torch.randint(node, ())]
    return ancestors.to(device), ancestors.sum(2).sub(1).to(device)


def random_pass(lengths, nodes, heads, kv_heads, size, places, dtype, device):
    """Arguments of tree_attention, strided as a decoder has them; what is behind the nodes in the cache is NaN."""
    batch = len(lengths)
    query = torch.randn(batch, nodes, heads, size, device=device).to(dtype).transpose(1, 2)
    cache = torch.randn(3, 2, batch, kv_heads, places, size, device=device).to(dtype)
    for row, length in enumerate(lengths):
        cache[:, :, row, :, length + nodes :] = torch.nan
    length = torch.tensor(lengths, device=device)[:, None]
    return query, cache[1, 0], cache[1, 1], length, *random_trees(batch, nodes, device), size**-0.5


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


def test_all_rows_may_have_one_tree(device):
    """In memory too, as a tree that never changes does."""
    *before, ancestors, depth, scaling = random_pass([5, 38], 9, 4, 2, 16, 64, torch.float32, device)
    assert not torch.equal(*ancestors)
    trees = ancestors[1].expand(2, 9, 9), depth[1].expand(2, 9)
    got = tree_attention(*before, *trees, scaling, sliding_window=5)
    assert_near(got, reference_tree_attention(*before, *trees, scaling, sliding_window=5))


def test_heads_of_an_odd_size_are_refused(device):
    with pytest.raises(ValueError, match="heads of 24"):
        tree_attention(*random_pass([1], 1, 2, 2, 24, 16, torch.float32, device))


@pytest.mark.parametrize(
    ("batch", "nodes", "places", "splits"),
    [(1, 1, 1024, 8), (1, 1, 8192, 16), (1, 17, 1024, 3), (1, 64, 1024, 1), (1, 64, 8192, 8), (8, 17, 1024, 1)],
)
def test_every_multiprocessor_has_something_to_read(batch, nodes, places, splits):
    """LLaMA-3-8B on 132 multiprocessors: as many splits as there is room for, or as there are steps in the cache."""
    config = attention_config(batch * 8, 4 * nodes, places, torch.empty(128, dtype=torch.bfloat16), 132, 232448)
    assert config.splits == splits
    assert batch * 8 * -(-4 * nodes // config.rows) * splits <= 132 or splits == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("shared", [232448, 166912, 101376, 65536])  # an H100, A100, RTX 4090, T4
def test_keys_and_values_fit_into_a_multiprocessor(size, dtype, shared):
    for rows in (1, 256):
        config = attention_config(8, rows, 65536, torch.empty(size, dtype=dtype), 132, shared)
        assert config.stages >= 2 and config.keys >= 16
        of_all_stages = config.stages * 2 * config.keys * size * dtype.itemsize
        assert of_all_stages <= shared


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
