"""A run of train.py, computed again in plain torch from its batches: losses, clipping, rates and AdamW written out.

One process and several are compared with each other elsewhere. Both could be wrong in the same way; this cannot.
"""

import math

import pytest
import torch
from conftest import logged, randomise
from transformers import AutoModelForCausalLM

from medusa_model import MedusaConfig, MedusaModel
from training.trainer import MedusaTrainer, batch_counts

HEADS, STEPS, WARMUP = 2, 5, 2
RATE, MULTIPLIER, DECAY, CLIP, BETAS, EPSILON = 2e-3, 3.0, 0.2, 0.15, (0.8, 0.95), 1e-5
LAMBDA_0, LAMBDA_K = 0.6, 0.7
FLAGS = (
    *("--max_steps", STEPS, "--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2),
    *("--learning_rate", RATE, "--medusa_lr_multiplier", MULTIPLIER, "--weight_decay", DECAY, "--max_grad_norm", CLIP),
    *("--adam_beta1", BETAS[0], "--adam_beta2", BETAS[1], "--adam_epsilon", EPSILON, "--lr_scheduler_type", "cosine"),
    *("--warmup_steps", WARMUP, "--medusa_heads_coefficient", LAMBDA_0, "--medusa_decay_coefficient", LAMBDA_K),
    *("--save_strategy", "no"),
)
RAMP = {"constant": lambda x: 1.0, "linear": lambda x: x, "sine": lambda x: math.sin(math.pi / 2 * x)}  # of lambda_0


@pytest.fixture
def steps(monkeypatch):
    """The micro-batches of each optimiser step of the next run, as the trainer draws them."""
    seen, draw = [], MedusaTrainer.get_batch_samples

    def spy(self, *args):
        batches, rows = draw(self, *args)
        seen.append([{name: tensor.clone() for name, tensor in batch.items()} for batch in batches])
        return batches, rows

    monkeypatch.setattr(MedusaTrainer, "get_batch_samples", spy)
    return seen


def start(model_dir, directory):
    """Random heads on disk, and the model that has them."""
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=HEADS)
    )
    randomise(model.medusa_heads)
    model.save_pretrained(directory, include_backbone=False)
    return model


def losses(model, batch, kl=False) -> list[tuple[torch.Tensor, int, int]]:
    """Of the lm_head and each head: summed cross-entropy, over how many rows, and how many of them it gets right. kl:
    heads against the lm_head's distribution k places on, in all rows of a text."""
    hidden = model.backbone.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    found = []
    for k in range(HEADS + 1):
        if k == 0:
            logits = hidden @ model.backbone.lm_head.weight.T
        else:
            block, projection = model.medusa_heads[k - 1]
            x = hidden @ block.linear.weight.T + block.linear.bias
            logits = (hidden + x * torch.sigmoid(x)) @ projection.weight.T
        total, rows, right = torch.zeros(()), 0, 0
        for b, labels in enumerate(batch["labels"]):
            if kl:
                labels = batch["input_ids"][b].masked_fill(batch["attention_mask"][b] == 0, -100)
            for t in range(len(labels) - k - 1):
                if (target := labels[t + k + 1]) == -100:
                    continue
                logp = logits[b, t].log_softmax(-1)
                if kl and k:
                    teacher = (hidden[b, t + k] @ model.backbone.lm_head.weight.T).log_softmax(-1).detach()
                    total = total + (teacher.exp() * (teacher - logp)).sum()
                else:
                    total = total - logp[target]
                rows, right = rows + 1, right + int(logits[b, t].argmax() == target)
        found.append((total, rows, right))
    return found


def rate(step: int) -> float:
    """Of the schedule, before step 0, 1, ...: up in a line, down in a half cosine."""
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def by_hand(model, steps, stage: int, kl: bool, scheduler: str):
    """Trains the model in place. -> loss and norm of the gradient of each step, and of the heads' own losses and top-1
    accuracies those of head 1."""
    trained = {n: p for n, p in model.named_parameters() if stage == 2 or not n.startswith("backbone.")}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in trained.items()}
    found: tuple[list[float], ...] = [], [], [], []
    for number, batches in enumerate(steps):
        lambda_0 = LAMBDA_0 * RAMP[scheduler]((number + 1) / STEPS)
        each = [losses(model, batch, kl) for batch in batches]
        loss = torch.zeros(())
        for k in range(HEADS + 1):
            mean = sum(one[k][0] for one in each) / max(1, sum(one[k][1] for one in each))
            weight = lambda_0 * LAMBDA_K**k if k else float(stage == 2)
            loss = loss + weight * mean
        grads = dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))
        norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
        with torch.no_grad():
            for name, p in trained.items():
                g = grads[name] * min(1.0, CLIP / norm)
                lr = RATE * rate(number) * (1.0 if name.startswith("backbone.") else MULTIPLIER)
                if p.ndim == 2:  # matrices decay; norms and biases do not
                    p.mul_(1 - lr * DECAY)
                m, v = moments[name]
                m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
                v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
                m_hat, v_hat = m / (1 - BETAS[0] ** (number + 1)), v / (1 - BETAS[1] ** (number + 1))
                p.sub_(lr * m_hat / (v_hat.sqrt() + EPSILON))
        of_head_1 = [sum(float(one[1][i]) for one in each) for i in range(3)]
        figures = (loss.item(), norm, of_head_1[0] / of_head_1[1], of_head_1[2] / of_head_1[1])
        for column, figure in zip(found, figures, strict=True):
            column.append(figure)
    return found


@pytest.mark.parametrize(
    ("stage", "kl", "scheduler"), [(1, False, "linear"), (2, False, "sine"), (1, True, "constant")]
)
def test_a_run_is_what_is_computed_by_hand(stage, kl, scheduler, train, steps, model_dir, tmp_path):
    model = start(model_dir, tmp_path / "heads")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = (*FLAGS, "--medusa_scheduler", scheduler)
    flags += ("--medusa_loss", "kl", "--medusa_rows", "all") if kl else ()
    out = train(*flags, "--medusa_heads_path", tmp_path / "heads", "--medusa_only_heads", stage == 1)
    assert len(steps) == STEPS and all(len(batches) == 2 for batches in steps)
    loss, norm, head_1, top_1 = by_hand(model, steps, stage, kl, scheduler)
    assert logged(out) == pytest.approx(loss, rel=1e-5)
    assert logged(out, "grad_norm") == pytest.approx(norm, rel=1e-4) and max(norm) > CLIP
    assert logged(out, "head_1_loss") == pytest.approx(head_1, rel=1e-4)
    assert logged(out, "head_1_top1") == pytest.approx(top_1)
    got = MedusaModel.from_pretrained(out, None if stage == 2 else model_dir)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if stage == 2 or not name.startswith("backbone.")}
    for (name, ours), hand in zip(got.named_parameters(), model.parameters(), strict=True):
        if name in moved:
            torch.testing.assert_close(ours, hand, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(ours, before[name]), name


def test_data_seed_alone_decides_the_order(train, steps):
    def rows(**seeds):
        del steps[:]
        flags = [x for name, value in seeds.items() for x in (f"--{name}", value)]
        train("--max_steps", 2, "--save_strategy", "no", "--medusa_only_heads", True, *flags, output=str(seeds))
        return [batch["input_ids"].tolist() for batches in steps for batch in batches]

    first = rows(seed=1, data_seed=5)
    assert rows(seed=2, data_seed=5) == first != rows(seed=1, data_seed=6)
    assert rows(seed=5) == first


def test_an_evaluation_is_what_is_computed_by_hand(train, model_dir, monkeypatch, tmp_path):
    seen, start_of = [], MedusaTrainer.evaluation_loop

    def spy(self, dataloader, *args, **kwargs):
        seen[:] = [{name: tensor.clone() for name, tensor in batch.items()} for batch in dataloader]
        return start_of(self, dataloader, *args, **kwargs)

    monkeypatch.setattr(MedusaTrainer, "evaluation_loop", spy)
    model = start(model_dir, tmp_path / "heads")
    still = ("--learning_rate", 0.0, "--medusa_lr_multiplier", 1.0, "--eval_strategy", "steps", "--eval_steps", 1)
    flags = (*FLAGS, "--max_steps", 1, "--medusa_heads_path", tmp_path / "heads", "--eval_holdout", 7, *still)
    flags += ("--per_device_eval_batch_size", 3)
    out = train(*flags, "--medusa_only_heads", False)
    with torch.no_grad():
        each = [losses(model, batch) for batch in seen]
    total = 0.0
    for k in range(HEADS + 1):
        loss, rows, right = (sum(float(one[k][i]) for one in each) for i in range(3))
        assert logged(out, f"eval_head_{k}_loss")[0] == pytest.approx(loss / rows, rel=1e-5)
        assert logged(out, f"eval_head_{k}_top1")[0] == pytest.approx(right / rows)
        total += (LAMBDA_0 * LAMBDA_K**k if k else 1.0) * loss / rows
    assert logged(out, "eval_loss")[0] == pytest.approx(total, rel=1e-5) and len(seen) > 1


def test_adafactor_trains_in_one_process(train):
    out = train("--optim", "adafactor", "--max_steps", 2, "--save_strategy", "no", "--medusa_only_heads", True)
    assert len(set(logged(out))) == 2


def test_what_a_batch_holds_is_counted_by_hand():
    batch = {
        "labels": torch.tensor([[-100, 5, 6, 7, -100, -100], [-100, -100, 5, -100, -100, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]),
    }
    # A row of head k has its label k + 1 places on. Token p attends to p + 1 tokens: 1 + 2 + 3 + 4 and 1 + 2 + 3.
    assert batch_counts(batch, 2).tolist() == [4, 3, 1, 7, 12, 16]
    packed = batch | {"position_ids": torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 0, 0]])}
    assert batch_counts(packed, 2).tolist()[-3:] == [7, 12, 3 + 3 + 6]
