"""model/path_heads.py: heads that read the path to their guess equal a computation by hand, row by row."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TRITON, make_backbone, randomise

from common.errors import BadInput
from conversations.targets import IGNORE
from medusa_model import MedusaConfig, MedusaModel
from model.heads import Text
from model.heads_file import load_heads
from model.path_heads import HEAD_TYPES, make_heads

HEADS, LAYERS, VOCAB, RANK, HIDDEN = 3, 2, 90, 5, 32
TOKENS = torch.arange(0, VOCAB, 2)[:40]  # the even ones below 80
KINDS, LOSSES = ("markov", "hydra"), ("ce", "kl", "lk")


def make_model(kind: str, stage=1, loss="ce", tied=False, tokens=None, layers=LAYERS, random=True, rank=RANK):
    config = MedusaConfig(medusa_num_heads=HEADS, medusa_num_layers=layers, medusa_head_type=kind, medusa_rank=rank)
    model = MedusaModel.from_backbone(make_backbone(tied, vocab_size=VOCAB), config, token_map=tokens)
    if random:
        randomise(model.medusa_heads, 0.2)
    if stage == 1:
        model.freeze_backbone()
    model.medusa_loss = loss
    return model


def make_batch() -> dict:
    """Two rows of two conversations each, with prompts and padding that are no labels."""
    ids = torch.randint(VOCAB, (2, 20))
    labels = torch.where(torch.rand(2, 20) < 0.7, ids, IGNORE)
    labels[1, 17:] = IGNORE
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(20 - n)]) for n in (9, 12)])
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def guess(model: MedusaModel, k: int, hidden: torch.Tensor, path: list[int]) -> torch.Tensor:
    """Logits `[V']` of head k at one position: hidden `[H]`, and the k tokens behind it."""
    weights, x = dict(model.medusa_heads[k - 1].named_parameters()), hidden
    assert len(path) == k
    embedding = model.backbone.get_input_embeddings().weight.detach()
    for layer in range(model.config.medusa_num_layers):
        read = x
        if model.config.medusa_head_type == "hydra" and layer == 0:
            read = torch.cat([x] + [embedding[token] for token in path])
        x = x + F.silu(weights[f"{layer}.linear.weight"] @ read + weights[f"{layer}.linear.bias"])
    if model.config.medusa_head_type == "markov":
        x = torch.cat([x, weights["table"][path[-1]]])
    return weights[f"{model.config.medusa_num_layers}.weight"] @ x


def by_hand(model: MedusaModel, batch: dict) -> tuple[torch.Tensor, list[int], list[int]]:
    """-> the heads' mean losses `[K]`, and how many guesses are right and how many rows there are."""
    ids, labels, positions = (batch[key].tolist() for key in ("input_ids", "labels", "position_ids"))
    how = {"position_ids": batch["position_ids"], "use_cache": False}  # a cache would hide that rows are packed
    hidden = model.backbone.get_decoder()(batch["input_ids"], **how).last_hidden_state
    tokens = list(range(VOCAB)) if model.token_map is None else model.token_map.tolist()
    losses, right, rows = [], [], []
    for k in range(1, HEADS + 1):
        loss, correct, count = 0.0 * hidden.sum(), 0, 0
        for row in range(len(ids)):
            for t in range(len(ids[0]) - k - 1):
                token = labels[row][t + k + 1]
                if token == IGNORE or positions[row][t + k + 1] != positions[row][t] + k + 1:
                    continue
                count += 1
                if token not in tokens:
                    continue
                q = guess(model, k, hidden[row, t], ids[row][t + 1 : t + k + 1]).softmax(-1)
                correct += tokens[q.argmax()] == token
                if model.medusa_loss == "ce":
                    loss = loss - q[tokens.index(token)].log()
                    continue
                p = (model.lm_head.weight.detach()[tokens] @ hidden[row, t + k].detach()).softmax(-1)
                kl, accepted = (p * (p.log() - q.log())).sum(), torch.minimum(p, q).sum()
                share = 1.0 if model.medusa_loss == "kl" else torch.exp(-3 * accepted.detach())
                loss = loss + share * kl + (1 - share) * (1 - accepted)
        losses, right, rows = [*losses, loss / count], [*right, correct], [*rows, count]
    return torch.stack(losses), right, rows


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["all", "some"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("stage", "tied"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_every_parameter(kind, impl, stage, tied, loss, tokens):
    """Also of the backbone's, whose embeddings get no gradient from what heads read of them."""
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(kind, stage, loss, tied, tokens).to(device)
    batch = {key: tensor.to(device) for key, tensor in make_batch().items()}
    want, right, rows = by_hand(model, batch)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(want.sum(), list(parameters.values()), allow_unused=True)
    model.loss_impl = impl
    out = model(**batch, head_weights=[0.0] + [1.0] * HEADS)
    torch.testing.assert_close(out.head_losses[1:], want.detach(), rtol=1e-5, atol=1e-5)
    assert out.head_sums[1:, 1:].tolist() == [list(pair) for pair in zip(right, rows, strict=True)] and min(rows) > 5
    out.loss.backward()
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert grad is not None or name.startswith("backbone"), name
        grad = grad if grad is not None else torch.zeros_like(parameter)
        assert not name.startswith("medusa_heads") or grad.any(), name
        torch.testing.assert_close(found, grad, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_fp32(kind, impl, loss):
    """The same (bf16) weights; 8 bits a number: 3 % of a gradient's norm, twice that where the teacher's logits are
    rounded too."""
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(kind, 1, loss, tokens=TOKENS).to(device, torch.bfloat16)
    batch = {key: tensor.to(device) for key, tensor in make_batch().items()}
    model.loss_impl = impl
    found = model(**batch).loss
    found.backward()
    got = {name: p.grad.float() for name, p in model.medusa_heads.named_parameters()}
    model.zero_grad()
    want = by_hand(model.float(), batch)[0].sum()
    want.backward()
    assert found.item() == pytest.approx(want.item(), rel=2e-2)
    for name, gradient in got.items():
        expected = model.medusa_heads.get_parameter(name).grad
        assert ((gradient - expected).norm() / expected.norm()).item() < (3e-2 if loss == "ce" else 6e-2), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_backbone_and_autocast(kind, dtype):
    """fp32 heads as stage 1 trains them: with and without autocast a loss near that of fp32, gradients in fp32."""
    model, batch = make_model(kind), make_batch()
    want = model(**batch).loss
    model.backbone.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=2e-2) and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.medusa_heads.parameters())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_behind_the_true_tokens(kind, layers):
    model, batch = make_model(kind, layers=layers, tokens=TOKENS), make_batch()
    ids, text = batch["input_ids"], model.read(batch["input_ids"])[1]
    logits = model(ids).logits
    hidden = model.last_hidden_state(ids)
    for k in range(1, HEADS + 1):
        for row in range(2):
            for t in range(20 - k):
                path = ids[row, t + 1 : t + k + 1]
                want = guess(model, k, hidden[row, t], path.tolist())
                torch.testing.assert_close(logits[k, row, t, TOKENS], want, rtol=1e-4, atol=1e-4)
                # and this is how decoding asks
                head = model.medusa_heads[k - 1]
                alone = head.projection(head.inputs(hidden[row, t], model.path(path)))
                torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-4)
    assert logits[1:].isfinite().sum() == HEADS * 40 * len(TOKENS)
    assert (text.embeds is None) == (kind == "markov")


def test_a_markov_head_of_no_resblock():
    model, batch = make_model("markov", layers=0), make_batch()
    out = model(**batch)
    torch.testing.assert_close(out.head_losses[1:], by_hand(model, batch)[0], rtol=1e-5, atol=1e-5)


def test_medusa_heads_read_no_path():
    model, batch = make_model("medusa"), make_batch()
    assert model.read(batch["input_ids"])[1] is None and model.path(batch["input_ids"]) is None
    assert not any(head.reads_path or head.reads_embeds for head in model.medusa_heads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_what_comes_next(kind):
    model, ids = make_model(kind), torch.arange(10).view(2, 5)
    path = model.read(ids)[1]._replace(ahead=3).path(torch.tensor([0, 6, 9]))
    assert path.ids.tolist() == [[1, 2, 3], [7, 8, 9], [9, 9, 9]]  # of the last one there is no more
    for found in (path, model.path(path.ids)):
        if kind == "hydra":
            embedding = model.get_input_embeddings().weight.detach()
            assert torch.equal(found.embeds, embedding[path.ids]) and not found.embeds.requires_grad
        else:
            assert found.embeds is None
    assert Text(ids, None, 1).path(torch.tensor([], dtype=torch.int64)).ids.shape == (0, 1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_row_gradients_are_zero_and_there(kind, loss):
    model, ids = make_model(kind, loss=loss), torch.randint(VOCAB, (2, 3))  # head 2 and 3 look further than that
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.head_losses[2:].tolist() == [0, 0] and out.loss.isfinite()
    assert all(not p.grad.any() for head in model.medusa_heads[1:] for p in head.parameters())


@pytest.mark.parametrize("kind", HEAD_TYPES)
@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["all", "some"])
def test_untrained_heads_guess_alike_and_learn(kind, tokens):
    """The same on every process; and no parameter is left without a gradient after the first step."""
    torch.manual_seed(0)
    medusa = make_model("medusa", tokens=tokens, random=False)
    torch.manual_seed(0)
    model, batch = make_model(kind, tokens=tokens, random=False), make_batch()
    torch.testing.assert_close(model(batch["input_ids"]).logits, medusa(batch["input_ids"]).logits, rtol=0, atol=1e-6)
    again = MedusaModel.from_backbone(model.backbone, MedusaConfig(**model.config.to_dict()), token_map=tokens)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.medusa_heads.parameters(), again.medusa_heads.parameters(), strict=True)
    )
    optimizer = torch.optim.SGD(model.medusa_heads.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.medusa_heads.parameters())


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_only_heads_that_know_the_path_learn_what_follows_it(kind):
    """Random tokens x, and f(x) after each: x, f(x), y, f(y), ... From x, f(x) is certain, and y is anybody's guess;
    so is f(y), unless y is known. Of the places where head 1 is asked for an f(y), a medusa head gets few."""
    torch.manual_seed(0)
    model, follower = make_model(kind, layers=1, random=False, rank=16), torch.randperm(20) + 20
    optimizer = torch.optim.Adam(model.medusa_heads[:1].parameters(), 1e-2)
    for _ in range(80):
        first = torch.randint(20, (16, 8))
        ids = torch.stack([first, follower[first]], -1).flatten(1)
        labels = torch.where(ids < 20, IGNORE, ids)
        optimizer.zero_grad()
        out = model(ids, labels=labels, head_weights=[0.0, 1.0, 0.0, 0.0])
        out.loss.backward()
        optimizer.step()
    assert (out.head_accuracies[1] > 0.95) if kind != "medusa" else (out.head_accuracies[1] < 0.3)


def test_a_type_that_does_not_exist():
    with pytest.raises(BadInput, match="medusa_head_type eagle: there are medusa, markov, hydra"):
        MedusaModel.from_backbone(make_backbone(), MedusaConfig(medusa_head_type="eagle"))
    with pytest.raises(BadInput, match="hydra heads of 0 ResBlocks: at least 1"):
        make_heads(MedusaConfig(medusa_head_type="hydra", medusa_num_layers=0, hidden_size=4, vocab_size=9))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, stage, tmp_path):
    make_backbone(vocab_size=VOCAB).save_pretrained(tmp_path / "backbone")
    model = make_model(kind, stage, tokens=TOKENS)
    model.config.base_model_name_or_path = str(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "out")
    fields, tensors = load_heads(tmp_path / "out" if stage == 1 else tmp_path / "out" / "medusa_heads")
    assert fields["medusa_head_type"] == kind and fields.get("medusa_rank") == (RANK if kind == "markov" else None)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for k in range(1, HEADS + 1):
        width = (k + 1) * HIDDEN if kind == "hydra" else HIDDEN
        assert shapes.pop(f"{k - 1}.0.linear.weight") == [HIDDEN, width]
        assert shapes.pop(f"{k - 1}.1.linear.weight") == [HIDDEN, HIDDEN]
        assert all(shapes.pop(f"{k - 1}.{layer}.linear.bias") == [HIDDEN] for layer in range(LAYERS))
        assert shapes.pop(f"{k - 1}.2.weight") == [40, HIDDEN + (RANK if kind == "markov" else 0)]
        assert kind != "markov" or shapes.pop(f"{k - 1}.table") == [VOCAB, RANK]
    assert shapes == {"token_map": [40]}
    again = MedusaModel.from_pretrained(tmp_path / "out")
    ids = make_batch()["input_ids"]
    assert torch.equal(again(ids).logits[1:], model(ids).logits[1:]) or stage == 1  # there the backbone is another
    assert all(torch.equal(again.medusa_heads.state_dict()[name], t) for name, t in tensors.items() if name[0] != "t")
