"""--medusa_loss kl and lk: the heads learn the backbone's own distribution, and nothing else changes."""

import pytest
import torch
from conftest import TRITON, assert_same, logged, make_backbone, randomise, weights
from safetensors.torch import load_file

from common.errors import BadInput
from conversations.batches import Collator
from conversations.targets import IGNORE, shifted_targets
from medusa_model import MedusaConfig, MedusaModel
from model.teacher_loss import KINDS, reference
from training.trainer import MedusaTrainer

HEADS = 3


def make_model(stage: int, kind: str, tied=False) -> MedusaModel:
    model = MedusaModel.from_backbone(make_backbone(tied=tied), MedusaConfig(medusa_num_heads=HEADS))
    randomise(model.medusa_heads, 0.3)
    if stage == 1:
        model.freeze_backbone()
    model.medusa_loss = kind
    return model


def make_batch() -> dict:
    """Two packed rows, with prompts that are no labels."""
    ids = torch.randint(320, (2, 24))
    position_ids = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    labels = torch.where(torch.rand(2, 24) < 0.7, ids, IGNORE)
    return {"input_ids": ids, "labels": labels, "position_ids": position_ids.contiguous()}


def by_hand(model: MedusaModel, batch: dict, kind: str) -> torch.Tensor:
    """The heads' losses `[K]`, from all logits."""
    hidden = model.last_hidden_state(batch["input_ids"], position_ids=batch["position_ids"])
    losses = []
    for k, head in enumerate(model.medusa_heads, 1):
        targets = shifted_targets(batch["labels"], k + 1, batch["position_ids"])
        z, y = head(hidden)[:, :-k], model.lm_head(hidden.detach())[:, k:].detach()
        counts = targets[:, :-k] != IGNORE
        losses.append(reference(z[counts], y[counts], kind).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "tied"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
def test_losses_and_gradients_of_every_parameter(impl, stage, tied, kind):
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(stage, kind, tied).to(device)
    batch = {key: tensor.to(device) for key, tensor in make_batch().items()}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    want = by_hand(model, batch, kind)
    grads = torch.autograd.grad(want.sum(), list(parameters.values()), allow_unused=True)
    model.loss_impl = impl
    out = model(**batch, head_weights=[0.0] + [1.0] * HEADS)
    torch.testing.assert_close(out.head_losses[1:], want.detach(), rtol=1e-5, atol=1e-5)
    out.loss.backward()
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        grad = grad if grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found, grad, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(name.startswith("backbone") for name in parameters) == (stage == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_come_nearer_to_the_backbone_and_it_stays_as_it_is(kind, train, model_dir):
    rate = ("--learning_rate", 1e-2, "--lr_scheduler_type", "constant")
    flags = ("--medusa_only_heads", True, "--max_steps", 40, *rate)
    before = load_file(f"{model_dir}/model.safetensors")
    losses = logged(train(*flags, "--medusa_loss", kind), "head_1_loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert_same(load_file(f"{model_dir}/model.safetensors"), before)
    other = train(*flags, output="ce")
    assert logged(other, "head_1_loss") != losses


def test_accumulation_gives_the_same_update(train):
    flags = ("--medusa_only_heads", True, "--max_steps", 3, "--medusa_loss", "kl", "--optim", "sgd")
    whole = train(*flags, "--per_device_train_batch_size", 8, output="whole")
    parts = train(*flags, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, output="parts")
    assert_same(weights(whole), weights(parts), rtol=1e-4, atol=1e-6)


def test_another_loss_is_another_run(train):
    flags = ("--medusa_only_heads", True, "--max_steps", 2, "--save_steps", 1)
    train(*flags, "--medusa_loss", "kl")
    with pytest.raises(BadInput, match="was trained with --medusa_loss kl, not ce"):
        train(*flags, "--resume_from_checkpoint", True)


@pytest.mark.parametrize("packing", [False, True])
def test_all_rows_are_those_of_labels_everywhere(packing, train, monkeypatch):
    """What is evaluated stays the answers."""
    flags = ("--medusa_only_heads", True, "--max_steps", 4, "--medusa_loss", "kl", "--packing", packing)
    flags += ("--eval_holdout", 4, "--do_eval", True, "--logging_steps", 1)
    found = train(*flags, "--medusa_rows", "all", output="all")
    count, collate = MedusaTrainer.get_batch_samples, Collator.__call__

    def labels_everywhere(self, rows):
        return collate(self, [row | {"labels": row["input_ids"]} for row in rows] if collecting else rows)

    def training_only(self, *args):
        nonlocal collecting
        collecting = True
        try:
            return count(self, *args)
        finally:
            collecting = False

    collecting = False
    monkeypatch.setattr(Collator, "__call__", labels_everywhere)
    monkeypatch.setattr(MedusaTrainer, "get_batch_samples", training_only)
    want = train(*flags, output="want")
    monkeypatch.setattr(Collator, "__call__", collate)
    assert logged(train(*flags, output="answers"), "loss") != logged(want, "loss")
    assert_same(weights(found), weights(want))
    for key in ("loss", "head_1_top1", "eval_head_1_top1"):
        assert logged(found, key) == logged(want, key)


def test_all_rows_need_a_teacher_and_a_frozen_backbone(train):
    for flags in (("--medusa_only_heads", True), ("--medusa_loss", "kl")):
        with pytest.raises(BadInput, match="--medusa_rows all needs a teacher and a frozen backbone"):
            train("--medusa_rows", "all", *flags)


def test_without_heads_there_is_nobody_to_teach(train):
    with pytest.raises(BadInput, match="--medusa_loss kl is a loss of heads"):
        train("--medusa_return", False, "--medusa_loss", "kl")
