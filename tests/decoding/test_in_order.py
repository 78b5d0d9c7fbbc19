"""decoding/in_order.py: what a token gets is the same to the bit in every tree, and decoding with `agree` so too."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_near, randomise
from decoders import PROMPTS, bushy, decode, greedy, make_model, random_tree
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from common.errors import BadInput
from decoding import decoder as decoder_module
from decoding.decoder import Decoder
from decoding.growing import Adaptive
from decoding.in_order import PASS_ROWS, attention_in_order
from decoding.sampling import GREEDY, Sampling
from decoding.tree import chain, filled_up, layout
from medusa_model import MedusaConfig, MedusaModel
from model.loss import cap

TREES = {"chain": chain(5), "random": random_tree(4, 12, 0)}
# Around multiples of NEAR, where keys become far, and of SHARE.
LENGTHS = [0, 1, 15, 30, 33, 270, 287, 303]


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch):
    """Triton's interpreter multiplies with numpy, where an output's bits depend on its place. Here they do not, nor in
    a GPU's matrix units."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.add.reduce(a[:, :, None] * b[None], 1, dtype=dtype))


def make_pass(lengths, tree, dtype, device, heads=2, kv_heads=1, size=16, rows=None):
    """-> (query, keys, values, length, path, depth, nodes) for `attention_in_order`; behind the nodes all is NaN."""
    nodes, places = 1 + len(tree), max(lengths) + 1 + len(tree)
    tree = filled_up(layout(tree), rows or nodes + 2)
    query = torch.randn(len(lengths), len(tree.depth), heads, size, device=device).to(dtype).transpose(1, 2)
    keys, values = torch.randn(2, len(lengths), kv_heads, places, size, device=device).to(dtype)
    for row, length in enumerate(lengths):
        keys[row, :, length + nodes :] = values[row, :, length + nodes :] = torch.nan
    length = torch.tensor(lengths, device=device)[:, None]
    return query, keys, values, length, tree.path.to(device), tree.depth.to(device), nodes


def plain_pass(query, keys, values, length, path, depth, node):
    """One of the tokens in a pass of its own: the text ends with its ancestors."""
    deep = int(depth[node])
    keys, values = keys.clone(), values.clone()
    for row, place in enumerate(length[:, 0].tolist()):
        for cache in (keys, values):
            cache[row, :, place : place + deep + 1] = cache[row, :, place + path[node, : deep + 1]]
            cache[row, :, place + deep + 1 :] = torch.nan
    return query[:, :, node : node + 1], keys, values, length + deep, path[:1] * 0, depth[:1] * 0, 1


def reference(query, keys, values, length, scaling, softcap=None, sliding_window=None):
    """Of plain passes, in float64: `[B, 1, H, D]`."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.double().nan_to_num().repeat_interleave(groups, 1) for x in (keys, values))
    back = length - torch.arange(keys.shape[2], device=length.device)
    seen = (back >= 0) & (back < (sliding_window or keys.shape[2] + 1))
    scores = cap(query[:, :, :1].double() @ keys.mT * scaling, softcap).masked_fill(~seen[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tree", TREES)
def test_a_token_gets_the_same_in_a_tree_and_alone(tree, dtype, device):
    arguments = make_pass(LENGTHS, TREES[tree], dtype, device)
    nodes = arguments[-1]
    got = attention_in_order(*arguments, 0.5)
    assert got.shape == (len(LENGTHS), nodes + 2, 2, 16) and got.dtype == dtype and got.is_contiguous()
    assert not got[:, nodes:].any()
    for node in (0, nodes - 1):
        alone = plain_pass(*arguments[:-1], node)
        want = attention_in_order(*alone, 0.5)
        assert torch.equal(got[:, node], want[:, 0])
        assert_near(want, reference(*alone[:4], 0.5))


@pytest.mark.parametrize(("window", "softcap"), [(None, 0.7), (3, None), (20, 0.7), (70, None)])
def test_softcap_and_sliding_window(window, softcap, device):
    """Windows that hide some near keys, all far ones, and the first of two shares."""
    arguments = make_pass([2, 40, 300], TREES["chain"], torch.bfloat16, device, heads=4, kv_heads=2)
    got = attention_in_order(*arguments, 0.5, softcap, window)
    for node in (0, 5):
        alone = plain_pass(*arguments[:-1], node)
        assert_near(got[:, node : node + 1], reference(*alone[:4], 0.5, softcap, window))
        assert torch.equal(got[:, node], attention_in_order(*alone, 0.5, softcap, window)[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (9, 3, 64), (8, 4, 256), (20, 1, 64)])
def test_a_token_gets_the_same_on_a_gpu(heads, kv_heads, size):
    """Shapes of real models, many lengths."""
    lengths = [*range(40), *range(240, 320), 1023, 1040]
    arguments = make_pass(lengths, random_tree(4, 63, 1), torch.bfloat16, "cuda", heads, kv_heads, size, rows=64)
    got = attention_in_order(*arguments, size**-0.5)
    for node in range(0, 64, 9):
        alone = plain_pass(*arguments[:-1], node)
        want = attention_in_order(*alone, size**-0.5)
        assert torch.equal(got[:, node], want[:, 0])
        assert_near(want, reference(*alone[:4], size**-0.5))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256), (576, 49152)]
)
@torch.no_grad()
def test_a_row_of_a_product_does_not_depend_on_its_place(inputs, outputs):
    """What `agree` takes for granted of torch: products of as many rows, each row by itself."""
    x, weight = (torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16) for rows in (PASS_ROWS, outputs))
    want = F.linear(x, weight)
    for shift in range(1, PASS_ROWS):
        assert torch.equal(F.linear(x.roll(shift, 0), weight).roll(-shift, 0), want)
    alone = torch.zeros_like(x)
    alone[0] = x[5]
    assert torch.equal(F.linear(alone, weight)[0], want[5])


SMALL = {
    "vocab_size": 7, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
BACKBONES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, sliding_window=100, query_pre_attn_scalar=64, attn_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=7, n_embd=512, n_layer=2, n_head=8, n_positions=512, initializer_range=0.1),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "batch", "graph"), [("medusa", 1, False), ("hydra", 1, True), ("medusa", 2, True)])
@pytest.mark.parametrize("name", BACKBONES)
def test_decoding_agrees_in_bf16(name, kind, batch, graph):
    """Tokens, and the bits of keys and values. With all pairs of tokens in the tree a pass yields three."""
    backbone = AutoModelForCausalLM.from_config(BACKBONES[name])
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=3, medusa_head_type=kind))
    randomise(model.medusa_heads, 0.5)
    model.eval().to("cuda", torch.bfloat16)
    prompts, first = [[1, 2, 3] * 11, [4, 5]][:batch], None
    for tree in ([], bushy(2, 7), chain(3), random_tree(3, 63, 0, 7), Adaptive(63, 6)):
        decoder = Decoder(model, tree, batch, 400, graph=graph, agree=True)
        answers, passes = decode(decoder, prompts, 256)
        bits = [decoder.cache.states[:, :, row, :, : len(prompt) + 255] for row, prompt in enumerate(prompts)]
        first = first or (answers, bits)
        assert answers == first[0] and all(map(torch.equal, bits, first[1]))
        assert tree != bushy(2, 7) or passes == [85] * batch


@pytest.mark.slow
@pytest.mark.interpreter
def test_decoding_with_agree_is_decoding(monkeypatch):
    """Rows that fill up a pass change nothing. Here Triton's interpreter runs the attention, in passes of few rows."""
    monkeypatch.setattr(decoder_module, "can_run", lambda device, size: True)
    model = make_model(2, num_hidden_layers=1)
    assert Decoder(model, chain(2), 1, 40, agree=True).tokens.shape == (1, PASS_ROWS)
    monkeypatch.setattr(decoder_module, "PASS_ROWS", 8)
    want = [greedy(model.backbone, PROMPTS[2], 8)]
    for tree in ([], bushy(2, 2)):
        answers, passes = decode(Decoder(model, tree, 1, 40, agree=True), PROMPTS[2:3], 8)
        assert answers == want and (passes < [7]) == bool(tree)


def test_rows_that_fill_up_a_pass():
    found = filled_up(layout([(0,)]), 4)
    alone = [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False] * 3 + [True],
    ]
    assert [tensor.tolist() for tensor in found] == [
        [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], alone, [[0, 0], [0, 1], [2, 2], [3, 3]]
    ]  # fmt: skip
    assert all(map(torch.equal, filled_up(layout([(0,)]), 2), layout([(0,)])))


def test_what_cannot_agree_is_refused(monkeypatch):
    model = make_model(2)
    with pytest.raises(BadInput, match="--agree needs a GPU, and attention heads of a power of two"):
        Decoder(make_model(head_dim=24), [], 1, 40, agree=True)  # on a GPU too
    monkeypatch.setattr(decoder_module, "can_run", lambda device, size: True)
    for tree, sampling, message in (
        (Adaptive(62, 8), GREEDY, "--nodes 63 with --adaptive: its passes have 64 rows"),
        (bushy(2, 8), GREEDY, "a tree of at most 63 guesses, and this one has 72"),
        ([], Sampling(1.0), "--temperature 0"),
    ):
        with pytest.raises(BadInput, match=f"--agree needs {message}"):
            Decoder(model, tree, 1, 40, sampling, agree=True)
    with pytest.raises(BadInput, match="at most 16 guesses deep, and this one is 17 deep"):
        Decoder(make_model(17), chain(17), 1, 40, agree=True)
    with pytest.raises(BadInput, match="whose RoPE does not change"):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        Decoder(make_model(rope_parameters=rope), [], 1, 40, agree=True)
