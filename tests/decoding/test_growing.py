"""decoding/growing.py: a tree for each pass, of the guesses that the heads find likeliest there."""

import random
from itertools import product

import pytest
import torch
from decoders import DEVICE, PROMPTS, VOCAB, assert_lossless, bushy, decode, greedy, make_model
from transformers import AutoModelForCausalLM, MistralConfig

from common.errors import BadInput
from conversations.batches import Collator
from decoding.accuracy import own_trees
from decoding.decoder import Decoder
from decoding.growing import Adaptive, Growing
from decoding.products import sharing
from decoding.sampling import Sampling
from decoding.tree import Layout, layout
from model.heads import Path
from model.path_heads import HEAD_TYPES

every = pytest.mark.parametrize("kind", HEAD_TYPES)
FIVE = [0, 2, 3, 5, 8]  # a draft vocabulary


def grow(model, size, hidden, roots):
    """-> tokens, tree and log-chances of each row. hidden `[B, H]`, roots `[B]`."""
    growing = Growing(model, size)
    tokens, tree = roots[:, None].repeat(1, size.nodes + 1), growing.room(len(roots))
    share = growing(hidden, tokens, tree)
    return tokens, tree, share


def likely(model, hidden, root, path, temperature=1.0) -> dict[int, float]:
    """Log-probability of each token behind a path of guesses, by the head whose turn it is. hidden `[H]`."""
    ids = torch.tensor([root, *path], device=DEVICE)
    head = model.medusa_heads[len(path)]
    embeds = model.get_input_embeddings()(ids) if head.reads_embeds else None
    logp = (head.logits(hidden, Path(ids, embeds), model.softcap) / temperature).log_softmax(-1).tolist()
    return dict(zip(range(VOCAB) if model.token_map is None else model.token_map.tolist(), logp, strict=True))


def plain_tree(model, hidden, root, size) -> dict[tuple[int, ...], float]:
    """Paths of tokens with their log-chances, as they are defined: likeliest first."""
    best = lambda chances, count: dict(sorted(chances.items(), key=lambda item: -item[1])[:count])  # noqa: E731
    parents, candidates = {(): 0.0}, {}
    for _ in model.medusa_heads:
        level = {}
        for path, chance in parents.items():
            children = best(likely(model, hidden, root, path, size.temperature), size.beam)
            level |= {(*path, token): chance + logp for token, logp in children.items()}
        parents = best(level, size.beam)
        candidates |= level
    return best(candidates, size.nodes)


def paths_of(tokens, tree: Layout) -> list[tuple[int, ...]]:
    """One row's nodes as paths of tokens, without the root; checks that all tensors of the tree say the same."""
    paths = [()]
    for node in range(1, len(tokens)):
        assert tree.parent[node] < node  # parents come first
        paths.append((*paths[tree.parent[node]], int(tokens[node])))
    index = {path: i for i, path in enumerate(paths)}
    assert len(index) == len(paths)  # no path twice
    for i, path in enumerate(paths):
        way = [index[path[:depth]] for depth in range(len(path) + 1)]
        assert tree.depth[i] == len(path)
        assert tree.path[i].tolist() == way + way[-1:] * (tree.path.shape[1] - len(way))
        assert tree.ancestors[i].nonzero()[:, 0].tolist() == sorted(way)
    return paths[1:]


def rows_of(tree: Layout) -> list[Layout]:
    return [Layout(*parts) for parts in zip(*tree, strict=True)]


@every
@pytest.mark.parametrize("tokens", [None, FIVE])
@torch.no_grad()
def test_a_tree_is_what_the_definition_says(kind, tokens):
    model = make_model(4, tokens, kind)
    model.softcap = (
        2.0 if kind == "medusa" else None
    )  # it changes chances; the others' loud logits it would make equal
    calls = []
    for head in model.medusa_heads:
        head.projection.register_forward_hook(lambda module, args, out: calls.append(module))
    for size in (Adaptive(1, 1), Adaptive(4, 1), Adaptive(12, 3), Adaptive(33, 5, 1.7), Adaptive(5, 4, 0.6)):
        hidden, roots = torch.randn(3, model.config.hidden_size, device=DEVICE), torch.tensor([3, 0, 7], device=DEVICE)
        calls.clear()
        guesses, tree, share = grow(model, size, hidden, roots)
        assert calls == [head.projection for head in model.medusa_heads]  # each once
        shapes = set()
        for state, root, mine, one, chance in zip(hidden, roots, guesses, rows_of(tree), share, strict=True):
            want = plain_tree(model, state, int(root), size)
            found = paths_of(mine, one)
            assert mine[0] == root and chance[0] == 0 and set(found) == want.keys()
            assert chance[1:].tolist() == pytest.approx([want[path] for path in found], rel=1e-4, abs=1e-4)
            shapes.add(tuple(one.parent.tolist()))
            for node, path in enumerate(found, 1):
                order = [*sorted((likely(model, state, int(root), path[:-1])).items(), key=lambda item: -item[1])]
                assert order[one.rank[node]][0] == path[-1]
        assert size.beam < 3 or len(shapes) > 1  # the rows have trees of their own


@every
@torch.no_grad()
def test_with_all_tokens_it_is_the_best_tree_there_is(kind):
    """Two heads and a beam of all tokens: every path is a candidate."""
    model, size = make_model(2, kind=kind), Adaptive(20, VOCAB)
    hidden = torch.randn(1, model.config.hidden_size, device=DEVICE)
    first = likely(model, hidden[0], 4, ())
    chances = {(a,): first[a] for a in range(VOCAB)}
    chances |= {(a, b): first[a] + likely(model, hidden[0], 4, (a,))[b] for a, b in product(range(VOCAB), repeat=2)}
    guesses, tree, _ = grow(model, size, hidden, torch.tensor([4], device=DEVICE))
    assert set(paths_of(guesses[0], rows_of(tree)[0])) == set(sorted(chances, key=lambda path: -chances[path])[:20])


@every
@pytest.mark.parametrize("size", [Adaptive(20, 4), Adaptive(4, 4)])
@torch.no_grad()
def test_where_all_are_equal_parents_come_first(kind, size):
    """Heads that say nothing, and heads so sure that a path is as likely as its beginning."""
    for loud in (0.0, 1e4):
        model = make_model(4, kind=kind)
        for head in model.medusa_heads:
            head.projection.weight.mul_(loud)
        hidden = torch.randn(3, model.config.hidden_size, device=DEVICE)
        guesses, tree, share = grow(model, size, hidden, torch.tensor([1, 2, 3], device=DEVICE))
        assert not loud or (share[:, 1:5] == 0).any()
        for mine, one in zip(guesses, rows_of(tree), strict=True):
            paths_of(mine, one)


@torch.no_grad()
def test_a_smaller_tree_is_the_beginning_of_a_larger_one():
    model = make_model(kind="hydra")
    hidden, root = torch.randn(4, model.config.hidden_size, device=DEVICE), torch.arange(4, device=DEVICE)
    large, small = (grow(model, Adaptive(nodes, 4), hidden, root) for nodes in (30, 9))
    assert torch.equal(large[0][:, :10], small[0])
    assert torch.equal(large[1].parent[:, :10], small[1].parent)


@every
@torch.no_grad()
def test_nothing_leaves_the_device(kind):
    """Else a CUDA graph could not hold it. Tensors of the meta device have no values that could leave."""
    model = make_model(3, FIVE, kind).to("meta")
    growing = Growing(model, Adaptive(12, 3))
    hidden, tokens = torch.empty(2, model.config.hidden_size), torch.empty(2, 13, dtype=torch.int64)
    growing(hidden.to("meta"), tokens.to("meta"), growing.room(2))


@every
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_greedy_decoding_is_lossless(kind, heads):
    model = make_model(heads, kind=kind)
    want = [greedy(model.backbone, prompt, 30) for prompt in PROMPTS]
    fewest = 30
    for size in (Adaptive(1, 1), Adaptive(3, 3), Adaptive(9 if heads == 1 else 30, VOCAB)):
        answers, passes = decode(Decoder(model, size, 3, 60), PROMPTS[:3], 30)
        assert answers == want[:3]
        assert decode(Decoder(model, size, 1, 60), PROMPTS[1:2], 30) == (answers[1:2], passes[1:2])
        fewest = min(fewest, *passes)
    assert fewest < 26  # or no guess was ever accepted, and nothing was tested


@every
@pytest.mark.parametrize("seed", range(4))
def test_lossless_on_many_models_and_prompts(kind, seed):
    """Each seed has its own backbone, heads, prompts and tree, and one of the tokens ends the text."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokens = sorted(rng.sample(range(VOCAB), rng.randint(2, 8))) if seed % 2 else None
    model = make_model(rng.randint(1, 5), tokens, kind, tied=seed % 4 == 0)

    def size() -> Adaptive:
        one = Adaptive(1, rng.randint(2, len(tokens or range(VOCAB))))
        return one._replace(nodes=rng.randint(1, min(40, one.candidates(len(model.medusa_heads)))))

    assert_lossless(rng, model, size)


@every
def test_all_pairs_of_tokens_are_all_guesses(kind):
    """Whatever the heads prefer, such a tree has the right path, so each pass yields three tokens."""
    model = make_model(2, kind=kind)
    answers, passes = decode(Decoder(model, Adaptive(VOCAB + VOCAB**2, VOCAB), 4, 60), PROMPTS, 31)
    assert answers == [greedy(model.backbone, prompt, 31) for prompt in PROMPTS] and passes == [10] * 4


def test_a_sliding_window_follows_the_trees_of_the_rows():
    model = make_model(2)
    config = MistralConfig(**model.backbone.config.to_diff_dict() | {"sliding_window": 4, "head_dim": 16})
    model.backbone = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    answers, passes = decode(Decoder(model, Adaptive(60, VOCAB), 4, 60), PROMPTS, 30)
    assert answers == [greedy(model.backbone, prompt, 30) for prompt in PROMPTS] and max(passes) < 25


def test_heads_of_another_type_than_the_backbones():
    model = make_model(3, kind="hydra")
    model.medusa_heads.to(torch.bfloat16)
    answers, _ = decode(Decoder(model, Adaptive(20, 5), 4, 60), PROMPTS, 20)
    assert answers == [greedy(model.backbone, prompt, 20) for prompt in PROMPTS]


@every
def test_a_walk_along_answers_yields_what_decoding_does(kind):
    """No decoder runs, and the tokens per pass are those of one."""
    model = make_model(3, FIVE if kind == "markov" else None, kind)
    rows = None
    for nodes in (4, 16, 32):
        answers, passes = decode(Decoder(model, Adaptive(nodes, 5, 1.5), 4, 60), PROMPTS, 25)
        rows = rows or own_trees(model, PROMPTS, answers, Adaptive(63, 5, 1.5), Collator(pad_token_id=0), 3)
        (row,) = (row for row in rows if row["nodes"] == nodes)
        assert row["tree"] == "adaptive" and row["length"] == pytest.approx(4 * 24 / sum(passes))
    assert [row["nodes"] for row in rows] == [4, 8, 16, 32, 55]  # 5 + 25 + 25 candidates, no 63
    assert rows[-1]["length"] > 1.2


def test_trees_that_cannot_be():
    model = make_model(2, FIVE)
    for size, message in (
        (Adaptive(4, 6), "--adaptive 6: from 1 to 5, as many tokens as the heads guess"),
        (Adaptive(4, 0), "--adaptive 0: from 1 to 5"),
        (Adaptive(7, 2), "tree of 7 guesses: with --adaptive 2 these heads have 1 to 6"),
        (Adaptive(0, 2), "tree of 0 guesses"),
    ):
        with pytest.raises(BadInput, match=message):
            Decoder(model, size, 1, 40)


@every
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, True)])
def test_drawing_takes_the_trees_of_the_rows(kind, sampling):
    """A tree of all pairs has the token that is drawn, whatever it is, so it accepts two guesses in every pass; also
    of typical ones, since some token always is typical."""
    decoder = Decoder(make_model(2, kind=kind), Adaptive(VOCAB + VOCAB**2, VOCAB), 4, 60, sampling)
    assert decode(decoder, PROMPTS, 31)[1] == [10] * 4


@pytest.mark.interpreter
def test_the_kernels_decode_the_same():
    """On a GPU all tests of this file run through them; here Triton's interpreter does."""
    model, size = make_model(2, FIVE, "hydra"), Adaptive(8, 3)
    want = decode(Decoder(model, size, 2, 40), PROMPTS[1:3], 6)
    decoder = Decoder(model, size, 2, 40)
    decoder.kernels = decoder.cache.kernels = decoder.growing.kernels = True
    decoder.products = sharing(model.backbone) + sharing(decoder.heads)
    assert decode(decoder, PROMPTS[1:3], 6) == want


def test_a_tree_that_is_fixed_is_one_for_all_rows():
    tree = Decoder(make_model(), bushy(3), 4, 60).tree
    assert all(part.stride(0) == 0 and part.shape[0] == 4 for part in tree)
    assert all(map(torch.equal, (part[3].cpu() for part in tree), layout(bushy(3))))


@every
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, True)])
def test_a_captured_pass_is_the_pass(kind, rows, sampling):
    """The graph, the same without it, and for greedy decoding transformers."""
    model, results = make_model(tokens=FIVE, kind=kind), []
    for graph in (False, True):
        decoder = Decoder(model, Adaptive(30, 5), rows, 80, sampling, graph=graph)
        torch.manual_seed(1)
        results.append(decode(decoder, PROMPTS[:rows], 60))
        results.append(decode(decoder, PROMPTS[: max(1, rows // 2)], 60))
        assert (decoder.graph is not None) == graph
    if sampling.temperature == 0:
        assert results[:2] == results[2:]
        assert results[0][0] == [greedy(model.backbone, prompt, 60) for prompt in PROMPTS[:rows]]
