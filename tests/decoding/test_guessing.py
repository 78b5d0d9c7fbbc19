"""decoding/guessing.py: heads that read the path to their guess fill the tree level by level."""

import random

import pytest
import torch
from decoders import DEVICE, PROMPTS, VOCAB, assert_lossless, bushy, decode, greedy, make_model, random_tree

from decoding import tree as draft_tree
from decoding.decoder import Decoder
from decoding.guessing import Level, LevelByLevel, levels
from decoding.products import Products, sharing
from decoding.sampling import Sampling
from decoding.tree import chain, check, independent, layout
from model.heads import Path

both = pytest.mark.parametrize("kind", ["markov", "hydra"])
FIVE = [0, 2, 3, 5, 8]  # a draft vocabulary


def best_tree(heads, nodes):
    return draft_tree.best_tree(independent([[0.4, 0.6, 0.7, 0.75]] * (heads + 1)), heads, 4, nodes)


def plain_guesses(model, tree, hidden, root):
    """One text's guesses as they are defined: a node is the head's rank-th best, given the tokens of its ancestors.
    hidden `[H]`."""
    tokens = {(): root}
    for node in tree:
        ids = torch.tensor([tokens[node[:depth]] for depth in range(len(node))], device=hidden.device)
        head = model.medusa_heads[len(node) - 1]
        path = Path(ids, model.get_input_embeddings()(ids) if head.reads_embeds else None)
        guess = int(head.projection(head.inputs(hidden, path)).sort(descending=True).indices[node[-1]])
        tokens[node] = guess if model.token_map is None else int(model.token_map[guess])
    return [*tokens.values()]


@pytest.mark.parametrize("seed", range(5))
def test_levels_say_whose_children_the_nodes_are(seed):
    tree = random_tree(4, 20, seed)
    nodes, found = [(), *tree], levels(layout(tree))
    assert len(found) == max(map(len, tree))
    assert [node for level in found for node in nodes[level.nodes]] == tree
    for depth, level in enumerate(found, 1):
        children = nodes[level.nodes]
        parents = [nodes[i] for i in level.path[:, -1]]
        assert {len(node) for node in children} == {depth} and parents == sorted({node[:-1] for node in children})
        for parent, way in zip(parents, level.path.tolist(), strict=True):
            assert [nodes[i] for i in way] == [parent[:d] for d in range(depth)]
        ways = zip(level.parent.tolist(), level.rank.tolist(), strict=True)
        assert [(*parents[parent], rank) for parent, rank in ways] == children
        assert level.ranks == 1 + max(node[-1] for node in children)


def test_plain_decoding_has_no_levels():
    assert levels(layout([])) == []


@both
@pytest.mark.parametrize("tokens", [None, FIVE])
@torch.no_grad()
def test_guesses_are_what_the_definition_says(kind, tokens):
    model = make_model(4, tokens, kind)
    ranks = len(tokens or range(VOCAB))
    trees = [chain(4), bushy(3), best_tree(4, 25), *(random_tree(4, 20, seed, ranks) for seed in range(6))]
    calls = []
    for head in model.medusa_heads:
        head.projection.register_forward_hook(lambda module, args, out: calls.append(module))
    for tree in trees:
        decoder = Decoder(model, tree, 3, 60)
        decoder.tokens.random_(VOCAB)
        roots, hidden = decoder.tokens[:, 0].tolist(), torch.randn(3, model.config.hidden_size, device=DEVICE)
        calls.clear()
        decoder.guess(hidden)
        assert calls == [head.projection for head in decoder.heads]  # each once, however many nodes it guesses
        want = [plain_guesses(model, tree, row, root) for row, root in zip(hidden, roots, strict=True)]
        assert decoder.tokens.tolist() == want
        if tree == bushy(3):  # or all parents have the same children, and nothing is tested
            firsts = [{row[1 + tree.index((rank, 0))] for rank in range(3)} for row in want]
            assert max(map(len, firsts)) > 1


@both
@pytest.mark.parametrize("tokens", [None, FIVE])
@torch.no_grad()
def test_prefill_and_passes_guess_from_the_end_of_the_text(kind, tokens):
    model, tree = make_model(3, tokens, kind), best_tree(3, 12)
    decoder = Decoder(model, tree, len(PROMPTS), 60, graph=False)  # or the next pass is under way already
    texts, yielded = [list(prompt) for prompt in PROMPTS], set()
    for new in decoder.run(PROMPTS, 20):
        for row, text in enumerate(texts):
            text += new[row]
            yielded.add(len(new[row]))
            if new[row] and len(text) < len(PROMPTS[row]) + 20:
                hidden = model.last_hidden_state(torch.tensor([text[:-1]], device=DEVICE))[0, -1]
                assert decoder.tokens[row].tolist() == plain_guesses(model, tree, hidden, text[-1])
    assert max(yielded) > 1


@both
@torch.no_grad()
def test_nothing_leaves_the_device(kind):
    """Else a CUDA graph could not hold it. Tensors of the meta device have no values that could leave."""
    model = make_model(3, FIVE, kind).to("meta")
    fill = LevelByLevel(model, model.medusa_heads, layout(best_tree(3, 12)))
    for i, level in enumerate(fill.levels):
        fill.levels[i] = Level(*(part.to("meta") if isinstance(part, torch.Tensor) else part for part in level))
    fill(torch.empty(2, model.config.hidden_size, device="meta"), torch.empty(2, 13, dtype=torch.int64, device="meta"))


def test_heads_that_read_no_path_guess_the_same_either_way():
    for tokens in (None, FIVE):
        model = make_model(3, tokens)
        for tree in (chain(3), best_tree(3, 20), random_tree(3, 20, 1, 5)):
            decoder = Decoder(model, tree, 2, 60)
            assert decoder.by_level is None
            answers = decode(decoder, PROMPTS[:2], 20)
            decoder.by_level = LevelByLevel(model, decoder.heads, layout(check(tree)))
            assert decode(decoder, PROMPTS[:2], 20) == answers


@both
@pytest.mark.parametrize("heads", range(1, 6))
def test_greedy_decoding_is_lossless(kind, heads):
    model = make_model(heads, kind=kind)
    want = [greedy(model.backbone, prompt, 30) for prompt in PROMPTS]
    trees = [[], chain(heads), bushy(min(heads, 3)), best_tree(heads, 16)]
    fewest = 30
    for tree in [*trees, *(random_tree(heads, 12, seed) for seed in range(3))]:
        answers, passes = decode(Decoder(model, tree, len(PROMPTS), 60), PROMPTS, 30)
        assert answers == want
        fewest = min(fewest, *passes)
        assert decode(Decoder(model, tree, 1, 60), PROMPTS[1:2], 30) == (answers[1:2], passes[1:2])
    assert fewest < 24  # or no guess was ever accepted, and nothing was tested


@both
@pytest.mark.parametrize("seed", range(8))
def test_lossless_on_many_models_and_prompts(kind, seed):
    """Each seed has its own backbone, heads, prompts and tree, and one of the tokens ends the text."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokens = sorted(rng.sample(range(VOCAB), rng.randint(1, 8))) if seed % 2 else None
    model = make_model(rng.randint(1, 5), tokens, kind, tied=seed % 4 == 0)
    heads, ranks = len(model.medusa_heads), len(tokens or range(VOCAB))
    assert_lossless(rng, model, lambda: random_tree(heads, rng.randint(1, 30), seed, ranks))


@both
def test_all_pairs_of_tokens_are_all_guesses(kind):
    """Whatever the heads prefer, such a tree has the right path, so each pass yields three tokens."""
    model = make_model(2, kind=kind)
    answers, passes = decode(Decoder(model, bushy(2, VOCAB), 4, 60), PROMPTS, 31)
    assert answers == [greedy(model.backbone, prompt, 31) for prompt in PROMPTS] and passes == [10] * 4


@both
def test_heads_of_another_type_than_the_backbones(kind):
    model = make_model(3, kind=kind)
    model.medusa_heads.to(torch.bfloat16)
    answers, _ = decode(Decoder(model, bushy(3), 4, 60), PROMPTS, 20)
    assert answers == [greedy(model.backbone, prompt, 20) for prompt in PROMPTS]


def test_a_path_has_what_the_heads_read():
    ids = torch.tensor([[[1, 2], [3, 4]]], device=DEVICE)
    assert make_model().path(ids) is None
    assert make_model(kind="markov").path(ids) == (ids, None)
    model = make_model(kind="hydra")
    path = model.path(ids)
    assert (
        torch.equal(path.embeds, model.backbone.get_input_embeddings().weight[ids]) and not path.embeds.requires_grad
    )


@both
def test_step_ms_is_a_time(kind):
    decoder = Decoder(make_model(kind=kind), bushy(3), 2, 40)
    assert 0.05 < decoder.step_ms(PROMPTS[0], 3) < 10_000  # ms


@both
@pytest.mark.interpreter
@pytest.mark.parametrize(("tree", "rows"), [(chain(2), 1), (bushy(2), 1), (chain(2), 2)])
def test_the_kernels_decode_the_same(kind, tree, rows, monkeypatch):
    """On a GPU all tests of this file run through them; here Triton's interpreter does."""
    model, prompts, launched = make_model(2, FIVE, kind), PROMPTS[1 : 1 + rows], []
    want = decode(Decoder(model, tree, rows, 40), prompts, 8)
    decoder = Decoder(model, tree, rows, 40)
    decoder.kernels = decoder.cache.kernels = True
    decoder.products = sharing(model.backbone) + sharing(decoder.heads)
    one_row = Products.one_row
    monkeypatch.setattr(Products, "one_row", lambda self, x: launched.extend(self.layers) or one_row(self, x))
    assert decode(decoder, prompts, 8) == want
    first, second = (head.projection in launched for head in model.medusa_heads)
    assert (first, second) == (rows == 1, rows == 1 and tree == chain(2))
    assert {type(part) for part in model.modules() if isinstance(part, torch.nn.Linear)} == {torch.nn.Linear}


@both
@pytest.mark.gpu
@pytest.mark.parametrize("tree", [chain(3), bushy(3)])
def test_bf16_on_a_gpu(kind, tree):
    """Heads of another type than the backbone's too."""
    model, results = make_model(3, FIVE, kind).to(torch.bfloat16), []
    for graph, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)):
        model.medusa_heads.to(dtype)
        decoder = Decoder(model, tree, 1, 80, graph=graph)
        assert decoder.by_level and not decoder.all_heads
        results.append(decode(decoder, PROMPTS[:1], 60))
    assert results[0] == results[1]
    assert len(results[2][0][0]) == 60


@both
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [None, FIVE])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, True)])
def test_a_captured_pass_is_the_pass(kind, tokens, rows, sampling):
    """The graph, the same without it, and for greedy decoding transformers."""
    model, results = make_model(tokens=tokens, kind=kind), []
    for graph in (False, True):
        decoder = Decoder(model, bushy(3), rows, 80, sampling, graph=graph)
        torch.manual_seed(1)
        results.append(decode(decoder, PROMPTS[:rows], 60))
        results.append(decode(decoder, PROMPTS[: max(1, rows // 2)], 60))
        assert (decoder.graph is not None) == graph
    if sampling.temperature == 0:
        assert results[:2] == results[2:]
        assert results[0][0] == [greedy(model.backbone, prompt, 60) for prompt in PROMPTS[:rows]]
    assert min(min(passes) for _, passes in results) < 59
