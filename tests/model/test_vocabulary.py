"""A draft vocabulary: heads that guess some of the tokens. Every way to their loss equals a direct computation."""

import pytest
import torch
from conftest import TRITON, make_backbone, randomise
from tiny import make_batch

from conversations.targets import IGNORE, shifted_targets
from medusa_model import MedusaConfig, MedusaModel
from model.vocabulary import to_draft, to_full

HEADS, VOCAB = 3, 90
TOKENS = torch.arange(0, VOCAB, 2)[:40]  # the even ones below 80
KINDS = ("ce", "kl", "lk")


def make_model(stage=1, kind="ce", tied=False, random=True, tokens=TOKENS, **kwargs) -> MedusaModel:
    config = MedusaConfig(medusa_num_heads=HEADS, **kwargs)
    model = MedusaModel.from_backbone(make_backbone(tied, vocab_size=VOCAB), config, token_map=tokens)
    if random:
        randomise(model.medusa_heads, 0.3)
    if stage == 1:
        model.freeze_backbone()
    model.medusa_loss = kind
    return model


def test_there_and_back():
    token_map = torch.tensor([0, 3, 4, 89])
    tokens = torch.tensor([[0, 1, 3], [89, IGNORE, 4], [88, 5, 2]])
    assert to_draft(tokens, token_map).tolist() == [[0, IGNORE, 1], [3, IGNORE, 2], [IGNORE] * 3]
    assert to_draft(tokens.t(), token_map).tolist() == [[0, 3, IGNORE], [IGNORE] * 3, [1, 2, IGNORE]]
    logits, like = torch.randn(2, 4), torch.zeros(2, VOCAB, dtype=torch.bfloat16)
    full = to_full(logits, token_map, like)
    assert torch.equal(full[:, token_map], logits.bfloat16()) and full.dtype == like.dtype
    assert full.isneginf().sum() == 2 * (VOCAB - 4)
    assert to_draft(tokens, None) is tokens and to_full(logits, None, logits) is logits


def test_untrained_heads_equal_the_lm_head_at_their_tokens():
    model, (ids, _) = make_model(random=False), make_batch()
    logits = model(ids).logits
    assert logits.shape == (HEADS + 1, *ids.shape, VOCAB)
    for head in logits[1:]:
        torch.testing.assert_close(head[..., TOKENS], logits[0][..., TOKENS], rtol=0, atol=1e-6)
        assert head.isneginf().sum() == ids.numel() * (VOCAB - len(TOKENS))
    assert not logits[0].isneginf().any()


def test_logits_are_differentiable_and_the_first_of_equal_ones_is_the_lowest_token():
    model, (ids, _) = make_model(), make_batch()
    logits = model(ids).logits
    logits[1:][..., TOKENS].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.medusa_heads.parameters())
    with torch.no_grad():
        model.medusa_heads[0][-1].weight.zero_()
        model.medusa_heads[0][-1].weight[[7, 3]] = 1.0
    out = model(ids).logits[1]
    assert set(out.argmax(-1).flatten().tolist()) <= {int(TOKENS[3]), int(TOKENS[0])}


def by_hand(model: MedusaModel, ids, labels, kind: str):
    """-> the heads' losses, right guesses and rows, `[K]` each, from all logits, with loops over rows."""
    hidden = model.last_hidden_state(ids)
    losses, right, rows = [], [], []
    for k, head in enumerate(model.medusa_heads, 1):
        targets, loss, correct = shifted_targets(labels, k + 1), 0.0 * hidden.sum(), 0
        logits, teacher = head(hidden.to(head[-1].weight.dtype)), model.lm_head(hidden.detach()).softmax(-1).detach()
        places = (targets != IGNORE).nonzero().tolist()
        for row, t in places:
            if (token := int(targets[row, t])) not in TOKENS.tolist():
                continue
            q = logits[row, t].softmax(-1)
            correct += int(TOKENS[q.argmax()]) == token
            if kind == "ce":
                loss = loss - q[TOKENS.tolist().index(token)].log()
                continue
            p = teacher[row, t + k][TOKENS]  # of all tokens, restricted to these
            p = p / p.sum()
            kl, accepted = (p * (p.log() - q.log())).sum(), torch.minimum(p, q).sum()
            share = 1.0 if kind == "kl" else torch.exp(-3 * accepted.detach())
            loss = loss + share * kl + (1 - share) * (1 - accepted)
        losses.append(loss / len(places))
        right.append(correct / len(places))
        rows.append(len(places))
    return torch.stack(losses), right, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "tied"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
def test_losses_and_gradients_of_every_parameter(impl, stage, tied, kind):
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(stage, kind, tied).to(device)
    ids, labels = (tensor.to(device) for tensor in make_batch())
    labels[0, 7] = model(ids).logits[1, 0, 5].argmax()  # so that some guess is right
    want, right, rows = by_hand(model, ids, labels, kind)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(want.sum(), list(parameters.values()), allow_unused=True)
    model.loss_impl = impl
    out = model(ids, labels=labels, head_weights=[0.0] + [1.0] * HEADS)
    torch.testing.assert_close(out.head_losses[1:], want.detach(), rtol=1e-5, atol=1e-5)
    assert out.head_accuracies[1:].tolist() == pytest.approx(right) and sum(right) > 0
    assert out.head_sums[1:, 2].tolist() == rows  # also those whose target no head can guess
    inside = sum(int(torch.isin(shifted_targets(labels, k + 1), TOKENS.to(device)).sum()) for k in (1, 2, 3))
    assert 0 < inside < sum(rows)
    out.loss.backward()
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        grad = grad if grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found, grad, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
def test_bf16_is_near_fp32(impl, kind):
    """The same (bf16) weights; 8 bits a number: 3 % of a gradient's norm, twice that where the teacher's logits are
    rounded too."""
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(1, kind).to(device, torch.bfloat16)
    assert model.token_map.dtype == torch.int64
    ids, labels = (tensor.to(device) for tensor in make_batch())
    model.loss_impl = impl
    loss = model(ids, labels=labels).loss
    loss.backward()
    got = {name: p.grad.float() for name, p in model.medusa_heads.named_parameters()}
    model.zero_grad()
    want = by_hand(model.float(), ids, labels, kind)[0].sum()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=2e-2)
    for name, gradient in got.items():
        expected = model.medusa_heads.get_parameter(name).grad
        assert ((gradient - expected).norm() / expected.norm()).item() < (3e-2 if kind == "ce" else 6e-2), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_row_that_heads_can_guess_there_is_nothing_to_learn(kind):
    model, (ids, labels) = make_model(kind=kind), make_batch()
    out = model(ids, labels=torch.where(labels == IGNORE, IGNORE, 81))
    out.loss.backward()
    assert out.loss == 0 and (out.head_sums[1:, 2] > 0).all()
    assert all((p.grad == 0).all() for p in model.medusa_heads.parameters())


def test_products_are_of_the_rows_that_count(monkeypatch):
    """No product has a row for a target that no head can guess, or a column for a token that none does."""
    model, (ids, labels) = make_model(kind="kl"), make_batch()
    shapes = []
    loss = "model.heads.linear_teacher_loss"
    monkeypatch.setattr(loss, lambda x, w, taught, t, *_: shapes.append((len(x), *w.shape, *taught[1].shape)) or
                        (x.sum() * 0, torch.tensor(0)))  # fmt: skip
    model(ids, labels=labels)
    for k, shape in enumerate(shapes, 1):
        rows = int(torch.isin(shifted_targets(labels, k + 1), TOKENS).sum())
        assert shape == (rows, len(TOKENS), 32, len(TOKENS), 32)


def test_tokens_that_are_all_of_them_make_no_difference():
    """The map is then the identity: the same numbers as without one."""
    ids, labels = make_batch()
    losses = []
    for tokens in (None, torch.arange(VOCAB)):
        torch.manual_seed(0)
        losses.append(make_model(kind="kl", tokens=tokens)(ids, labels=labels).loss)
    torch.testing.assert_close(*losses)
