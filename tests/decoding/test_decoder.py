"""decoding/decoder.py: decoding with a tree gives what plain decoding gives, only in fewer passes.

The vocabulary has 9 tokens, so that untrained guesses are right often enough to exercise every way through a tree.
"""

import copy
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_backbone, randomise
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from common.errors import BadInput
from decoding.answers import answer_all
from decoding.attention import TreeCache, attend
from decoding.decoder import Decoder, Sampling
from decoding.products import AllHeads, Products, sharing
from decoding.tree import chain
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import context_length, rope_follows_length

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 9
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6], [2, 2, 7, 7, 1, 0, 3]]


def make_model(heads=3, **kwargs) -> MedusaModel:
    model = MedusaModel.from_backbone(
        make_backbone(**{"vocab_size": VOCAB, "head_dim": 16} | kwargs), MedusaConfig(medusa_num_heads=heads)
    )
    randomise(model.medusa_heads, 0.5)
    return model.eval().to(DEVICE)


def bushy(heads, ranks=3):
    return [path for depth in range(1, heads + 1) for path in itertools.product(range(ranks), repeat=depth)]


def random_tree(heads, nodes, seed):
    """Any valid tree of so many nodes: each hangs on one that is there."""
    rng, paths = random.Random(seed), set()
    while len(paths) < (nodes if heads > 1 else min(nodes, VOCAB)):
        parent = rng.choice([(), *sorted(paths)])
        if len(parent) < heads:
            paths.add((*parent, rng.randrange(VOCAB)))
    return sorted(paths, key=lambda path: (len(path), path))


def greedy(backbone, prompt, max_new_tokens, eos=None) -> list[int]:
    """What transformers decodes, with the attention it calls eager."""
    backbone = copy.deepcopy(backbone)
    backbone.set_attn_implementation("eager")
    ids = torch.tensor([prompt], device=DEVICE)
    out = backbone.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def decode(decoder, prompts, max_new_tokens, eos=frozenset()):
    """-> (new tokens of each prompt, passes each took after the prefill)."""
    answers, passes = [[] for _ in prompts], [-1] * len(prompts)
    for new in decoder.run(prompts, max_new_tokens, eos):
        for row, tokens in enumerate(new):
            answers[row] += tokens
            passes[row] += bool(tokens)
    return answers, passes


@pytest.mark.parametrize("heads", range(1, 6))
def test_greedy_decoding_is_lossless(heads):
    model = make_model(heads)
    want = [greedy(model.backbone, prompt, 30) for prompt in PROMPTS]
    trees = [[], chain(heads), bushy(min(heads, 3)), *(random_tree(heads, 12, seed) for seed in range(4))]
    fewest = 30
    for tree in trees:
        answers, passes = decode(Decoder(model, tree, len(PROMPTS), 60), PROMPTS, 30)
        assert answers == want
        if not tree:
            assert passes == [29] * len(PROMPTS)
        fewest = min(fewest, *passes)
    assert fewest < 24  # or no guess was ever accepted, and nothing was tested


def test_a_row_alone_is_the_row_among_others():
    """Also where the decoder is used again: what is left in its cache must not matter."""
    model = make_model()
    answers, passes = decode(Decoder(model, bushy(3), 4, 60), PROMPTS, 30)
    decoder = Decoder(model, bushy(3), 1, 60)
    for row in (2, 1, 0, 3):
        assert decode(decoder, [PROMPTS[row]], 30) == ([answers[row]], [passes[row]])
    half_full = Decoder(model, bushy(3), 4, 60)
    for rows in ((0, 1, 2), (3, 2)):
        assert decode(half_full, [PROMPTS[row] for row in rows], 30)[0] == [answers[row] for row in rows]


@pytest.mark.parametrize("seed", range(12))
def test_lossless_on_many_models_and_prompts(seed):
    """Each seed has its own backbone, heads, prompts and tree, and one of the tokens ends the text."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = make_model(rng.randint(1, 5), tied=seed % 2 == 0)
    prompts = [rng.choices(range(VOCAB), k=rng.randint(1, 30)) for _ in range(4)]
    eos = rng.randrange(VOCAB)
    tree = random_tree(len(model.medusa_heads), rng.randint(1, 30), seed)
    want = [greedy(model.backbone, prompt, 25, eos) for prompt in prompts]
    assert decode(Decoder(model, tree, 4, 60), prompts, 25, {eos})[0] == want


def test_stops_at_an_eos_in_the_middle_of_a_pass():
    """With a tree of all pairs of tokens every pass yields three; each token of the text ends it once."""
    model = make_model(2)
    decoder = Decoder(model, bushy(2, VOCAB), 1, 60)
    places = set()
    for prompt in PROMPTS:
        (text,), (passes,) = decode(decoder, [prompt], 31)
        assert passes == 10
        for token in set(text):
            end = text.index(token)
            assert decode(decoder, [prompt], 31, {token})[0] == [text[: end + 1]]
            places.add((end + 2) % 3 if end else None)
    assert places >= {0, 1}  # the first and the second of three


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_max_new_tokens(max_new_tokens):
    model = make_model()
    answers, _ = decode(Decoder(model, bushy(3), 4, 80), PROMPTS, max_new_tokens)
    assert [len(answer) for answer in answers] == [max_new_tokens] * 4
    assert answers == [greedy(model.backbone, prompt, max_new_tokens) for prompt in PROMPTS]


def test_stops_where_the_context_ends():
    model = make_model(max_position_embeddings=32)
    answers, _ = decode(Decoder(model, bushy(3), 4, 32), PROMPTS, 40)
    assert [len(answer) + len(prompt) for answer, prompt in zip(answers, PROMPTS, strict=True)] == [32] * 4
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        assert answer == greedy(model.backbone, prompt, len(answer))
    with pytest.raises(BadInput, match=r"33 tokens .* do not fit into the context of the backbone, 32"):
        Decoder(model, [], 1, 33)
    for prompt, message in (([1] * 32, "prompt 2 has 32 tokens, but there is room for 32"), ([], "prompt 2 is empty")):
        with pytest.raises(BadInput, match=message):
            next(Decoder(model, [], 2, 32).run([[1], prompt], 5))


def test_trees_that_do_not_fit():
    with pytest.raises(BadInput, match="depth 3"):
        Decoder(make_model(heads=2), chain(3), 1, 20)
    with pytest.raises(BadInput, match=r"the tree has rank 9, but there are 9 tokens"):
        Decoder(make_model(heads=2), [(0,), (VOCAB,)], 1, 20)


def test_one_decoder_of_a_model_at_a_time():
    """Each puts its attention into the backbone, and the first to end would take it out under the other."""
    model = make_model()
    first, second = (Decoder(model, chain(2), 1, 40) for _ in range(2))
    running = first.run(PROMPTS[:1], 10)
    next(running)
    with pytest.raises(RuntimeError, match="has not ended yet"):
        next(second.run(PROMPTS[:1], 10))
    running.close()
    assert decode(second, PROMPTS[:1], 10)[0] == [greedy(model.backbone, PROMPTS[0], 10)]


def test_attention_it_does_not_know_is_refused():
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(BadInput, match="attention sinks"):
        attend(None, query, query, query, None, 1.0, s_aux=torch.zeros(2))
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(BadInput, match="BloomForCausalLM has no max_position_embeddings"):
        context_length(bloom)


def test_rope_that_follows_the_length():
    yarn, dynamic = ({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} for kind in ("yarn", "dynamic"))
    for parameters, follows in (
        (yarn, False),
        (dynamic, True),
        ({"full": yarn, "sliding": dynamic}, True),
        (None, False),
    ):
        assert rope_follows_length(SimpleNamespace(rope_parameters=parameters)) is follows


def test_the_cache_holds_what_a_prefill_would_put_there():
    model = make_model()
    decoder = Decoder(model, bushy(2, VOCAB), 1, 80)
    (answer,), (passes,) = decode(decoder, PROMPTS[2:3], 61)
    assert passes == 20
    length = int(decoder.length)
    text = (PROMPTS[2] + answer)[:length]
    fresh = Decoder(model, [], 1, 80)
    next(fresh.run([text], 1))
    got, want = (d.cache.states[..., : len(text), :] for d in (decoder, fresh))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.4,
}  # fmt: skip
TWO_HEADS = {k: v for k, v in SMALL.items() if k != "head_dim"} | {"num_attention_heads": 2, "num_key_value_heads": 1}
OTHERS = {
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "qwen2": Qwen2Config(**TWO_HEADS),
    "qwen2 sliding": Qwen2Config(**TWO_HEADS, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL),
    "gemma": GemmaConfig(**SMALL),
    "gemma2": Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=0.5),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=52, initializer_range=0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_lossless_for_other_backbones(name):
    """Sliding windows shorter than the text, bounded scores, norms of queries and keys, tied embeddings, learned
    positions."""
    model = MedusaModel.from_backbone(AutoModelForCausalLM.from_config(OTHERS[name]), MedusaConfig(medusa_num_heads=3))
    randomise(model.medusa_heads, 0.5)
    model.eval().to(DEVICE)
    before = model.backbone.config._attn_implementation
    want = [greedy(model.backbone, prompt, 40) for prompt in PROMPTS]
    longest = min(60, model.backbone.config.max_position_embeddings)  # of gpt2 52; guesses reach behind its table
    answers, passes = decode(Decoder(model, bushy(2, VOCAB), 4, longest), PROMPTS, 40)
    assert answers == want
    assert passes == [13] * 4  # three tokens each
    assert model.backbone.config._attn_implementation == before


def test_exact_sampling_draws_from_the_backbone():
    """Two tokens after the first, 8,000 times: as often as the product of the backbone's probabilities says."""
    model, temperature, rows, rounds = make_model(), 1.5, 1000, 8
    prompt = PROMPTS[0]
    chances = torch.zeros(VOCAB, VOCAB, VOCAB)
    with torch.inference_mode():
        for text in itertools.product(range(VOCAB), repeat=2):
            logits = model.backbone(torch.tensor([prompt + list(text)], device=DEVICE)).logits[0, -3:].cpu()
            p = (logits / temperature).softmax(-1)
            chances[text] = p[0, text[0]] * p[1, text[1]] * p[2]
    decoder = Decoder(model, bushy(2, 4), rows, 40, Sampling(temperature))
    counts, accepted = torch.zeros(VOCAB, VOCAB, VOCAB), 0
    for _ in range(rounds):
        answers, passes = decode(decoder, [prompt] * rows, 3)
        for answer in answers:
            counts[tuple(answer)] += 1
        accepted += 2 * rows - sum(passes)
    assert accepted > rows  # else the tree had no part in it
    total = rows * rounds
    frequent = chances * total > 5
    z = (counts - chances * total)[frequent] / (chances * (1 - chances) * total)[frequent].sqrt()
    assert frequent.sum() > 50
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean() < 1.25
    assert torch.isclose(counts[frequent].sum() / total, chances[frequent].sum(), atol=0.02)


def paper_bound(logits, sampling):
    """p and min(epsilon, delta * exp(-entropy)), as the paper has it."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    entropy = -(p * p.log()).sum()
    return p, min(sampling.epsilon, sampling.delta * torch.exp(-entropy).item())


@pytest.mark.parametrize("epsilon, delta", [(0.09, 0.3), (0.3, 0.9), (0.02, 0.05)])
def test_typical_acceptance_is_the_papers(epsilon, delta):
    """Each pass accepts the longest way whose tokens are all typical, and none other; of equal ones the likeliest."""
    model, sampling = make_model(), Sampling(1.0, True, epsilon, delta)
    tree = bushy(3)
    decoder = Decoder(model, tree, 1, 80, sampling, graph=False)  # or the next pass is under way already
    text, lengths, refused = list(PROMPTS[0]), [], 0
    generator = decoder.run([PROMPTS[0]], 60)
    text += next(generator)[0]
    for _ in range(10):
        guesses = decoder.tokens[0].tolist()
        assert guesses[0] == text[-1]
        ways = {}
        for path in [(), *tree]:
            tokens = [guesses[1 + tree.index(path[:depth])] for depth in range(1, len(path) + 1)]
            logits = model.backbone(torch.tensor([text + tokens], device=DEVICE)).logits[0, -len(tokens) - 1 :].cpu()
            chances, fine = 1.0, True
            for token, row in zip(tokens, logits, strict=False):
                p, bound = paper_bound(row, sampling)
                fine, chances = fine and p[token] > bound, chances * p[token].item()
            refused += not fine
            if fine:
                ways[tuple(tokens)] = (len(tokens), chances, *paper_bound(logits[-1], sampling))
        want = max(ways, key=lambda way: ways[way][:2])
        (new,) = next(generator)
        assert tuple(new[:-1]) == want
        p, bound = ways[want][2:]
        assert p[new[-1]] > bound  # the token behind them is drawn from the typical ones
        text += new
        lengths.append(len(new))
    assert max(lengths) > 1
    assert refused > 0


def test_a_lower_temperature_is_less_random():
    model = make_model()
    colder = [decode(Decoder(model, bushy(3), 64, 40, Sampling(t)), [PROMPTS[0]] * 64, 20)[0] for t in (0.01, 3.0)]
    assert [len(set(map(tuple, answers))) > 32 for answers in colder] == [False, True]


def test_answer_all_is_plain_decoding_batch_by_batch():
    model = make_model(heads=0)
    prompts = [PROMPTS[i % 4] + [i % VOCAB] for i in range(7)]
    want = [greedy(model.backbone, prompt, 20, eos=3) for prompt in prompts]
    assert list(answer_all(model, prompts, 20, 3, {3})) == want
    assert {len(answer) for answer in want} != {20}
    assert list(answer_all(model, [], 20, 3, {3})) == []


def test_step_ms_is_a_time():
    decoder = Decoder(make_model(), bushy(3), 1, 40)
    assert 0 < decoder.step_ms(PROMPTS[0], 3) < 10_000
    assert int(decoder.length) == len(PROMPTS[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache(dtype):
    """What a pass writes stands behind each row's length, and what is accepted moves, with sources and targets that
    overlap; nothing else changes."""
    layers, batch, heads, size, places = 2, 2, 3, 4, 20
    cache, expected = TreeCache(layers, places, kernels=False), torch.zeros(layers, 2, batch, heads, places, size)
    expected = expected.to(DEVICE, dtype)
    for lengths, count in ((None, 6), ([3, 6], 5)):
        cache.length = lengths and torch.tensor(lengths, device=DEVICE)[:, None]
        for layer in range(layers):
            new = torch.randn(2, batch, count, heads, size, device=DEVICE).to(dtype).transpose(2, 3)
            for row, start in enumerate(lengths or [0, 0]):
                expected[layer, :, row, :, start : start + count] = new[:, row]
            found = cache.update(*new, layer)
            assert all(map(torch.equal, found, expected[layer] if lengths else new))
    source, target = torch.tensor([[3, 5, 7], [6, 7, 9]], device=DEVICE), torch.tensor([[3, 4, 5], [6, 7, 8]])
    cache.move(source, target.to(DEVICE))
    before = expected.clone()
    for row, pairs in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        for old, new in zip(*pairs, strict=True):
            expected[:, :, row, :, new] = before[:, :, row, :, old]
    assert torch.equal(cache.states, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tree", [[], bushy(3)])
def test_bf16_on_a_gpu(tree):
    """Several rows are products of their own there, and a graph replays them as they are; heads of another type than
    the backbone's go the slow way."""
    model = make_model().to(torch.bfloat16)
    results = []
    for graph, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)):
        model.medusa_heads.to(dtype)
        decoder = Decoder(model, tree, 1, 80, graph=graph)
        assert decoder.kernels and bool(decoder.all_heads) == (bool(tree) and dtype == torch.bfloat16)
        results.append(decode(decoder, PROMPTS[:1], 60))
    assert results[0] == results[1]
    assert len(results[2][0][0]) == 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, True)])
def test_a_captured_pass_is_the_pass(sampling):
    model = make_model()
    results = []
    for graph in (False, True):
        decoder = Decoder(model, bushy(3), 4, 80, sampling, graph=graph)
        torch.manual_seed(1)
        results.append(decode(decoder, PROMPTS, 60))
        results.append(decode(decoder, PROMPTS[:2], 60))
        assert (decoder.graph is not None) == graph
    if sampling.temperature == 0:
        assert results[:2] == results[2:]
    assert all(min(passes) < 55 for _, passes in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tree", [[], bushy(2)])
def test_the_kernels_decode_the_same(tree, rows, monkeypatch):
    """On a GPU all tests of this file run through them; here Triton's interpreter does."""
    model, prompts, launches = make_model(2), PROMPTS[1 : 1 + rows], []
    want = decode(Decoder(model, tree, rows, 40), prompts, 8)
    decoder = Decoder(model, tree, rows, 40)
    assert not decoder.kernels and not decoder.products and not decoder.all_heads
    decoder.kernels = decoder.cache.kernels = True
    decoder.products = sharing(model.backbone)
    decoder.all_heads = AllHeads(decoder.heads) if tree and rows == 1 else None
    one_row = Products.one_row
    monkeypatch.setattr(Products, "one_row", lambda *args, **kwargs: launches.append(1) or one_row(*args, **kwargs))
    assert decode(decoder, prompts, 8) == want
    assert bool(launches) == (rows == 1)
    assert {type(part) for part in model.modules() if isinstance(part, torch.nn.Linear)} == {torch.nn.Linear}
