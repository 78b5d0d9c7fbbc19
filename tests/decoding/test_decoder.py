"""decoding/decoder.py: decoding with a tree gives what plain decoding gives, only in fewer passes."""

import random

import pytest
import torch
from conftest import randomise
from decoders import DEVICE, PROMPTS, VOCAB, assert_lossless, bushy, decode, greedy, make_model, random_tree
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from common.errors import BadInput
from decoding.decoder import Decoder
from decoding.products import AllHeads, Products, sharing
from decoding.sampling import Sampling
from decoding.tree import chain
from medusa_model import MedusaConfig, MedusaModel


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
    assert_lossless(rng, model, lambda: random_tree(len(model.medusa_heads), rng.randint(1, 30), seed))


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


def passes_of(text, tokens):
    """Passes after the first token, if all pairs of these tokens are guessed: each yields its own token, and before
    that up to two of them."""
    place, passes = 1, 0
    while place < len(text):
        guessed = next((n for n in (0, 1) if text[place + n : place + n + 1] and text[place + n] not in tokens), 2)
        place, passes = place + guessed + 1, passes + 1
    return passes


@pytest.mark.parametrize("seed", range(12))
def test_lossless_with_heads_that_guess_some_tokens(seed):
    """All pairs of these tokens are in the tree, so that exactly they are accepted, whatever the heads prefer."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokens = sorted(rng.sample(range(VOCAB), 1 + seed % 8))
    model = make_model(rng.randint(2, 4), tokens, tied=seed % 2 == 0)
    prompts = [rng.choices(range(VOCAB), k=rng.randint(1, 30)) for _ in range(4)]
    want = [greedy(model.backbone, prompt, 25) for prompt in prompts]
    decoder = Decoder(model, bushy(2, len(tokens)), 4, 60)
    answers, passes = decode(decoder, prompts, 25)
    assert answers == want and passes == [passes_of(text, tokens) for text in want]
    assert set(decoder.tokens[:, 1:].flatten().tolist()) == set(tokens)
    tree = random_tree(len(model.medusa_heads), rng.randint(1, 12), seed, len(tokens))
    assert decode(Decoder(model, tree, 4, 60), prompts, 25)[0] == want


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
    with pytest.raises(BadInput, match=r"the tree has rank 9, but heads guess 9 tokens"):
        Decoder(make_model(heads=2), [(0,), (VOCAB,)], 1, 20)
    with pytest.raises(BadInput, match=r"the tree has rank 2, but heads guess 2 tokens"):
        Decoder(make_model(2, [3, 7]), [(0,), (2,)], 1, 20)


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


def test_step_ms_is_a_time():
    decoder = Decoder(make_model(), bushy(3), 1, 40)
    assert 0.05 < decoder.step_ms(PROMPTS[0], 3) < 10_000  # ms
    assert int(decoder.length) == len(PROMPTS[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("tree", "tokens"), [([], None), (bushy(3), None), (bushy(3), [0, 2, 3, 5, 8])])
def test_bf16_on_a_gpu(tree, tokens):
    """Several rows are products of their own there, and a graph replays them as they are; heads of another type than
    the backbone's go the slow way."""
    model = make_model(tokens=tokens).to(torch.bfloat16)
    results = []
    for graph, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)):
        model.medusa_heads.to(dtype)
        decoder = Decoder(model, tree, 1, 80, graph=graph)
        assert decoder.kernels and bool(decoder.all_heads) == (bool(tree) and dtype == torch.bfloat16)
        results.append(decode(decoder, PROMPTS[:1], 60))
    assert results[0] == results[1]
    assert len(results[2][0][0]) == 60


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [None, [0, 2, 3, 5, 8]])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, True)])
def test_a_captured_pass_is_the_pass(sampling, tokens):
    model = make_model(tokens=tokens)
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


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("tree", "tokens"), [([], None), (bushy(2), None), (bushy(2), [0, 2, 3, 5, 8])])
def test_the_kernels_decode_the_same(tree, tokens, rows, monkeypatch):
    """On a GPU all tests of this file run through them; here Triton's interpreter does."""
    model, prompts, launches = make_model(2, tokens), PROMPTS[1 : 1 + rows], []
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
