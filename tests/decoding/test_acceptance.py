"""acceptance.py: tokens per pass against greedy decoding that really runs a model."""

from functools import cache
from itertools import product

import pytest
import torch
from conftest import make_backbone, randomise

from conversations.batches import Collator
from decoding.acceptance import NO_TOKEN, TOP, acceptance, acceptance_length, right_path
from decoding.accuracy import own_ranks
from decoding.tree import best_tree, chain, independent
from medusa_model import MedusaConfig, MedusaModel

HEADS = 3
TREES = {
    "none": [],
    "chain": chain(HEADS),
    "bushy": [path for depth in (1, 2, 3) for path in product(range(4), repeat=depth)],
    "lopsided": [(1,), (6,), (1, 0), (1, 9), (6, 2), (1, 9, 3)],
    "last ranks": [(TOP - 1,), (TOP - 1, TOP - 1)],
}
EOS = {5}
MAX_NEW = 25


def make_texts(count=20, rows=30):
    """Texts of random paths in which low ranks are frequent; some are empty."""
    ranks = lambda: (torch.rand(HEADS) ** 3 * (TOP + 1)).int().tolist()  # noqa: E731
    return [[right_path(ranks()) for _ in range(int(torch.randint(rows, ())))] for _ in range(count)] + [[]]


@pytest.mark.parametrize(
    ("ranks", "path"),
    [
        ([0, 3, 9], (0, 3, 9)),
        ([0, TOP, 2], (0,)),  # no guess reaches past a wrong one
        ([TOP, 0, 0], ()),
        ([4, NO_TOKEN, NO_TOKEN], (4,)),
        ([], ()),
    ],
)
def test_a_path_is_right_up_to_the_first_miss(ranks, path):
    assert right_path(ranks) == path


def decode_naively(choices, prompt, following, best_ranks):
    """Greedy decoding with a tree as a person would do it by hand: -> (new tokens, passes). No cache: every token is
    looked up by the whole text before it. A path is right if the backbone itself would say each of its tokens."""
    ended = lambda text: text[-1] in EOS or len(text) == len(prompt) + MAX_NEW  # noqa: E731
    text, passes = (*prompt, following(prompt)), 0
    while not ended(text):
        guesses = best_ranks(text[:-1])
        accepted = ()
        for path in choices:
            guess = tuple(guesses[depth][rank] for depth, rank in enumerate(path))
            right = all(following(text + guess[:depth]) == token for depth, token in enumerate(guess))
            if right and len(guess) > len(accepted):
                accepted = guess
        passes += 1
        for token in (*accepted, following(text + accepted)):
            if not ended(text):
                text = (*text, token)
    return list(text[len(prompt) :]), passes


def test_acceptance_length_is_what_greedy_decoding_yields():
    """Random heads and a vocabulary so small that they are right now and then."""
    model = MedusaModel.from_backbone(make_backbone(vocab_size=14).double(), MedusaConfig(medusa_num_heads=HEADS))
    randomise(model.eval().medusa_heads)

    @cache
    def logits(text):
        with torch.no_grad():
            return model(torch.tensor([text])).logits[:, 0, -1]

    def following(text):
        return logits(text)[0].argmax().item()

    def best_ranks(text):
        return logits(text)[1:].topk(TOP).indices.tolist()

    prompts = [tuple(torch.randint(14, (3 + i % 7,)).tolist()) for i in range(16)]
    answers = [decode_naively([], prompt, following, best_ranks)[0] for prompt in prompts]
    ends = [answer[-1] in EOS for answer in answers]
    assert any(ends) and not all(ends)  # texts end in both ways
    tables = own_ranks(model, [list(prompt) for prompt in prompts], answers, Collator(pad_token_id=0), 3)
    texts = [[right_path(row) for row in table[:-1, 1:].tolist()] for table in tables]
    lengths = {}
    for name, choices in TREES.items():
        tokens = passes = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            decoded, needed = decode_naively(choices, prompt, following, best_ranks)
            assert decoded == answer
            tokens, passes = tokens + len(decoded) - 1, passes + needed
        lengths[name] = tokens / passes
        assert acceptance_length(choices, texts) == pytest.approx(lengths[name], abs=1e-12), name
    assert lengths["none"] == 1 < lengths["chain"] < lengths["bushy"] and lengths["lopsided"] > 1
    depth_3 = acceptance_length(TREES["bushy"], texts) - acceptance_length(TREES["bushy"][: 4 + 16], texts)
    assert depth_3 > 0  # all heads were right in a row somewhere


def test_a_text_ends_in_the_middle_of_a_pass():
    """Five tokens after the first; the chain of three would have had more to give at the end."""
    sure = [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0), (0,)]
    assert acceptance_length(chain(3), [sure]) == 5 / 2
    assert acceptance_length(chain(1), [sure]) == 5 / 3
    assert acceptance_length(chain(3), [sure, sure[-1:]]) == (5 + 1) / (2 + 1)


def test_of_no_text_there_is_no_length():
    assert acceptance_length(chain(HEADS), [[], []]) == 0


def test_trees_are_chosen_by_accuracies_and_measured_on_texts():
    texts = make_texts()
    top = [[1.0] * TOP, *([0.3 + 0.05 * k + 0.05 * rank for rank in range(TOP)] for k in range(HEADS))]
    found, chance = acceptance(top, texts[1:], texts[:1]), independent(top)
    sizes = [("chain", HEADS), *(("best", nodes) for nodes in (4, 8, 16, 32, 63))]
    assert [(row["tree"], row["nodes"]) for row in found] == sizes
    for row, (name, nodes) in zip(found, sizes, strict=True):
        tree = chain(HEADS) if name == "chain" else best_tree(chance, HEADS, TOP, nodes)
        assert row["length"] == acceptance_length(tree, texts[1:]) > 1
        assert row["expected"] == acceptance_length(tree, texts[:1]) != row["length"]


def test_trees_end_where_no_more_paths_have_a_chance():
    found = acceptance([[1.0] * TOP, [0.6] * TOP, [0.4] * TOP], [[(0,), (0,)]], [])
    assert [(row["tree"], row["nodes"]) for row in found] == [("chain", 2), ("best", 2)]
    flat = [0.0, 0.2] + [0.5] * (TOP - 2)  # two ranks a head
    found = acceptance([flat, flat, flat], [[(0,), (0,)]], [])
    assert [row["nodes"] for row in found if row["tree"] == "best"] == [4, 6]
