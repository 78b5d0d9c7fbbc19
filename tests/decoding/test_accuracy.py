"""decoding/accuracy.py: the accuracies are those of a direct computation."""

import pytest
import torch
from conftest import make_backbone, randomise

from conversations.batches import Collator
from conversations.targets import IGNORE
from decoding import accuracy
from decoding.acceptance import NO_TOKEN, TOP, acceptance, right_path
from decoding.growing import Adaptive
from medusa_model import MedusaConfig, MedusaModel
from model.path_heads import HEAD_TYPES

HEADS = 3


def hits(logits, targets, n):
    """How many targets are among the n best tokens."""
    return (logits.topk(n).indices == targets[:, None]).any(1).sum().item()


def make_model(heads_std=None, tokens=None, kind="medusa", **kwargs):
    """In float64, so that no two logits tie and no order of summation changes a rank. tokens: what heads guess."""
    backbone, config = make_backbone(**kwargs).double(), MedusaConfig(medusa_num_heads=HEADS, medusa_head_type=kind)
    model = MedusaModel.from_backbone(backbone, config, token_map=tokens).eval()
    if heads_std:
        randomise(model.medusa_heads, heads_std)
    return model


def make_batches():
    """Three batches of uneven length; about a third of the labels do not count."""
    ids = [torch.randint(320, (4, length)) for length in (8, 24, 40)]
    return [{"input_ids": i, "labels": i.masked_fill(torch.rand(i.shape) < 0.3, IGNORE)} for i in ids]


@pytest.mark.parametrize("rows", [0, 1, accuracy.ROWS, accuracy.ROWS + 188])
def test_ranks_are_places_in_the_order_of_all_logits(rows):
    projection = torch.randn(50, 16, dtype=torch.float64)
    hidden, targets = torch.randn(rows, 16, dtype=torch.float64), torch.randint(50, (rows,))
    chunks = []

    def logits_of(x):
        chunks.append(len(x))
        return x @ projection.t()

    ranks = accuracy.ranks(logits_of, hidden, targets[:, None])[:, 0]
    logits = hidden @ projection.t()
    orders = logits.argsort(descending=True).tolist()
    assert ranks.tolist() == [min(order.index(t), TOP) for order, t in zip(orders, targets.tolist(), strict=True)]
    assert max(chunks) <= accuracy.ROWS and sum(chunks) == rows  # never the logits of all rows at once
    counts = accuracy.count(ranks[:, None])
    assert counts[0, :TOP].cumsum(0).tolist() == [hits(logits, targets, n) for n in range(1, TOP + 1)]
    assert counts.sum() == rows
    assert accuracy.shares(counts)[0] == [hits(logits, targets, n) / max(1, rows) for n in range(1, TOP + 1)]


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_untrained_heads_are_what_they_were_before(kind):
    result = accuracy.reference_text(make_model(kind=kind), make_batches())
    assert result["top"] == result["before"]
    assert all(before[-1] > 0 for before in result["before"])  # not equal because both are nothing


@pytest.mark.parametrize("kind", HEAD_TYPES)
@pytest.mark.parametrize("tokens", [None, torch.arange(5, 320, 5)])
def test_equals_a_direct_computation(tokens, kind):
    """Heads that read the path to their guess are given the text's, as the model's own forward gives it."""
    model, batches = make_model(0.2, tokens, kind), make_batches()
    result = accuracy.reference_text(model, batches)
    for k in range(HEADS + 1):
        guesses, copies, targets = [], [], []
        for batch in batches:
            logits, ahead = model(batch["input_ids"]).logits.detach()[:, :, : -(k + 1)], batch["labels"][:, k + 1 :]
            guesses.append(logits[k][ahead != IGNORE])
            copies.append(logits[0][ahead != IGNORE])
            targets.append(ahead[ahead != IGNORE])
        guesses, copies, targets = torch.cat(guesses), torch.cat(copies), torch.cat(targets)
        assert result["rows"][k] == len(targets) > 0
        for name, logits in (("top", guesses), ("before", copies)):
            want = [hits(logits, targets, n) / len(targets) for n in range(1, TOP + 1)]
            assert result[name][k] == pytest.approx(want)
    assert result["top"][1:] != result["before"][1:]
    assert tokens is None or all(top[-1] > 0 for top in result["top"])


def ranks_by_hand(model, prompt, answer):
    """The table `own_ranks` should give for one conversation, from all logits of the whole text. (They follow its true
    path: tests/model/test_path_heads.py.)"""
    text = prompt + answer
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[:, 0]
    orders = logits.argsort(descending=True).tolist()

    def rank(k, at):
        token = text[at + k]
        return min(orders[k][at - 1].index(token), TOP) if logits[k, at - 1, token].isfinite() else TOP

    return [
        [rank(k, at) if at + k < len(text) else NO_TOKEN for k in range(HEADS + 1)]
        for at in range(len(prompt), len(text))
    ]


SOME = (2, 3, 5, 8, 12)


@pytest.fixture(
    params=[(None, "medusa"), (SOME, "medusa"), (None, "hydra"), (SOME, "markov")],
    ids=["all tokens", "some", "hydra", "markov, some"],
)
def answered(request):
    """-> a model with so few tokens that its heads are often right, 11 prompts of uneven lengths, and answers."""
    prompts, answers = (
        [torch.randint(14, (int(length),)).tolist() for length in torch.randint(low, 24, (11,))] for low in (3, 1)
    )
    prompts[4], answers[4], answers[5] = prompts[4] + [0] * 60, answers[4][:1], answers[5] + answers[6] * 3
    tokens, kind = request.param
    tokens = None if tokens is None else torch.tensor(tokens)
    return make_model(0.2, tokens, kind, vocab_size=14), prompts, answers


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_own_ranks_equal_those_of_one_text_after_the_other(answered, batch_size):
    tables = accuracy.own_ranks(*answered, Collator(pad_token_id=0), batch_size)
    wanted = [ranks_by_hand(answered[0], *pair) for pair in zip(*answered[1:], strict=True)]
    assert [table.tolist() for table in tables] == wanted
    assert {rank for table in wanted for row in table for rank in row} == {NO_TOKEN, *range(TOP + 1)}
    guessed = {rank for table in wanted for row in table for rank in row[1:]}
    assert answered[0].token_map is None or guessed == {NO_TOKEN, *range(5), TOP}


def own(answered, monkeypatch, count=None, beam=0):
    """own_text with the fixture's answers in the place of the model's."""
    model, prompts, answers = (answered[0], *(items[:count] for items in answered[1:]))

    def answer_all(asked_model, asked, max_new_tokens, batch_size, eos):
        assert (asked_model, max_new_tokens, batch_size, eos) == (model, 99, 4, {7})
        assert sorted(map(len, asked)) == list(map(len, asked))  # little padding
        yield from (answers[prompts.index(prompt)] for prompt in asked)

    monkeypatch.setattr(accuracy, "answer_all", answer_all)
    texts = accuracy.own_answers(model, prompts, 99, 4, {7})
    assert texts == list(answers)
    result = accuracy.own_text(model, prompts, texts, 99, Collator(pad_token_id=0), 4, beam)
    tables = [ranks_by_hand(model, *pair) for pair in zip(prompts, answers, strict=True)]
    return result, tables, [[right_path(row[1:]) for row in table[:-1]] for table in tables]


def shares(tables):
    """[K+1][TOP] accuracies of tables, counted."""
    columns = [[row[k] for table in tables for row in table if row[k] != NO_TOKEN] for k in range(HEADS + 1)]
    return [[sum(rank < n for rank in column) / len(column) for n in range(1, TOP + 1)] for column in columns]


def test_own_text_chooses_trees_on_one_half_and_measures_on_the_other(answered, monkeypatch):
    result, tables, texts = own(answered, monkeypatch)
    assert result["conversations"] == 11 and result["max_new_tokens"] == 99
    assert result["rows"] == [sum(row[k] != NO_TOKEN for table in tables for row in table) for k in range(HEADS + 1)]
    assert result["top"] == [pytest.approx(row) for row in shares(tables)]
    want = acceptance(shares(tables[:5]), texts[5:], texts[:5])
    assert result["acceptance"] == want != acceptance(shares(tables[5:]), texts[:5], texts[5:])
    assert want != acceptance(shares(tables), texts, texts) and want[-1]["length"] > 1


def test_trees_that_are_grown_are_measured_on_the_same_half(answered, monkeypatch):
    (fixed, *_), (result, *_) = (own(answered, monkeypatch, beam=beam) for beam in (0, 3))
    model, prompts, answers = answered
    fixed, grown = fixed["acceptance"], result["acceptance"]

    def on(part, temperature):
        size = Adaptive(63, 3, temperature)
        return accuracy.own_trees(model, prompts[part], answers[part], size, Collator(pad_token_id=0), 20)

    lengths = [sum(row["length"] for row in on(slice(5), t)) for t in accuracy.TEMPERATURES]
    assert lengths[accuracy.TEMPERATURES.index(result["temperature"])] == pytest.approx(max(lengths), abs=1e-9)
    want = on(slice(5, None), result["temperature"])
    assert grown[: len(fixed)] == fixed and len(grown) == len(fixed) + len(want)
    for row, wanted, chosen in zip(grown[len(fixed) :], want, on(slice(5), result["temperature"]), strict=True):
        assert row.pop("tree") == wanted.pop("tree") == "adaptive"
        assert row == pytest.approx(wanted | {"expected": chosen["length"]}, rel=1e-5)
    assert want[-1]["length"] > 1


def test_a_single_conversation_has_to_do_for_both(answered, monkeypatch):
    result, tables, texts = own(answered, monkeypatch, count=1)
    assert result["acceptance"] == acceptance(shares(tables), texts, texts)
    assert result["acceptance"][-1]["length"] > 1


def test_of_tied_logits_the_first_token_is_the_guess():
    """As argmax does it; bf16 logits tie in one row of twenty."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert [accuracy.ranks(lambda _: logits, torch.zeros(1, 2), torch.tensor([[t]])).item() for t in range(4)] == [
        *(2, 0, 1, 3)
    ]


def test_of_a_broken_model_nothing_is_right():
    logits = torch.tensor([[torch.nan, torch.nan, 3.0, 0.0] + [torch.nan] * 12])
    assert accuracy.ranks(lambda _: logits, torch.zeros(1, 2), torch.tensor([[0]])).item() == TOP
