"""training/trainer.py through the whole of train.py: what moves, and what must not make a difference."""

import pytest
import torch
import transformers
from conftest import TRITON, assert_same, logged, make_conversations, weights, write_jsonl
from transformers.models.llama.modeling_llama import LlamaMLP

from common.errors import BadInput
from medusa_model import MedusaModel
from training.arguments import TrainingArguments
from training.trainer import MedusaTrainer


@pytest.mark.parametrize(
    ("flags", "moves", "stays"),
    [
        (("--medusa_only_heads", True), "medusa_heads", "backbone"),
        (("--medusa_only_heads", False), "both", None),
        (("--medusa_only_heads", False, "--medusa_lr_multiplier", 0.0), "backbone", "medusa_heads"),
        (("--medusa_only_heads", False, "--medusa_heads_coefficient", 0.0), "backbone", "medusa_heads"),
        (("--medusa_return", False), "backbone", None),
    ],
)
def test_what_should_train_moves_and_the_rest_stays_bit_identical(flags, moves, stays, train, monkeypatch):
    kept = {}
    start = MedusaTrainer.train

    def remember(self, **kwargs):
        kept["before"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        result = start(self, **kwargs)
        kept["after"] = dict(self.model.named_parameters())
        return result

    monkeypatch.setattr(MedusaTrainer, "train", remember)
    train("--max_steps", 2, *flags)
    for name, before in kept["before"].items():
        same = torch.equal(before, kept["after"][name])
        assert same == (stays is not None and name.startswith(stays)), name
    assert any(name.startswith("medusa_heads") for name in kept["before"]) == (flags[0] != "--medusa_return")
    assert moves == "both" or not all(
        torch.equal(before, kept["after"][name]) for name, before in kept["before"].items() if name.startswith(moves)
    )


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        ("--use_liger", False),
        pytest.param(("--bf16", True), marks=TRITON),
        ("--bf16", True, "--use_liger", False),
    ],
)
def test_liger_equals_torch_through_the_whole_trainer(stage, flags, train):
    common = ("--max_steps", 4, "--medusa_only_heads", stage == 1, "--max_grad_norm", 0.5, "--medusa_num_layers", 2)
    want = logged(train(*common, output="want"))
    got = logged(train(*common, *flags, output="got", liger=True))
    assert got == pytest.approx(want, rel=2e-2 if "--bf16" in flags else 1e-5)
    assert ("--bf16" in flags) == (got != pytest.approx(want, rel=1e-5))  # bf16 did compute in bf16


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_makes_no_difference(stage, train):
    """Conversations are uneven: the mean of the micro-batches' means would be another number."""
    # Adam divides by the gradient's size: where that is a rounding error, a small epsilon makes a step of it.
    common = ("--max_steps", 4, "--medusa_only_heads", stage == 1, "--adam_epsilon", 1e-4)
    one = train(*common, "--per_device_train_batch_size", 8, output="one")
    four = train(*common, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, output="four")
    assert logged(four) == pytest.approx(logged(one), rel=1e-4)
    assert logged(four, "head_2_top1") == logged(one, "head_2_top1")
    assert logged(four, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    assert_same(weights(four), weights(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_head_after_the_other_equals_all_at_once(stage, train_both_ways):
    common = ("--max_steps", 4, "--medusa_only_heads", stage == 1, "--gradient_accumulation_steps", 2)
    one_by_one, plain = train_both_ways(*common)
    assert logged(plain) == pytest.approx(logged(one_by_one), rel=1e-5)
    assert logged(plain, "head_1_top1") == pytest.approx(logged(one_by_one, "head_1_top1"))
    assert_same(weights(plain), weights(one_by_one), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_packed_equals_unpacked(stage, train, model_dir, tmp_path):
    """One step over the same 24 conversations, once as 24 rows and once packed into fewer."""
    data = write_jsonl(tmp_path / "few.jsonl", make_conversations(24, seed=3))
    common = ("--data_path", data, "--max_steps", 1, "--medusa_only_heads", stage == 1, "--model_max_length", 200)
    packed = train(*common, "--packing", True, "--per_device_train_batch_size", 24, output="packed")
    unpacked = train(*common, "--per_device_train_batch_size", 24, output="unpacked")
    for key in ("loss", "head_1_loss", "head_2_loss", "grad_norm"):
        assert logged(packed, key) == pytest.approx(logged(unpacked, key), rel=1e-4)
    assert logged(packed, "head_2_top1") == logged(unpacked, "head_2_top1")
    assert logged(packed, "padded_tokens_per_s") != logged(unpacked, "padded_tokens_per_s")


def test_gradient_checkpointing_changes_no_number(train):
    common = ("--max_steps", 2, "--medusa_only_heads", False)
    recomputed = train(*common, "--gradient_checkpointing", True, output="recomputed")
    assert_same(weights(recomputed), weights(train(*common, output="kept")), rtol=1e-4, atol=1e-5)


def test_only_the_first_layers_are_recomputed(train, monkeypatch):
    forward, calls = LlamaMLP.forward, []

    def counted(self, x):
        if self.training:  # the run's judge evaluates
            calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    common = ("--max_steps", 2, "--medusa_only_heads", False, "--gradient_checkpointing", True)
    half = train(*common, "--gradient_checkpointing_layers", 1, output="half")
    first, second = calls[:2]
    assert calls == [first, second, first] * 2 and first is not second  # the first one again in the backward pass
    assert_same(weights(half), weights(train(*common, output="all")), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="the backbone has 2 layers"):
        train(*common, "--gradient_checkpointing_layers", 3, output="too-many")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    """Also with accumulation, where the NaN is in the first of two micro-batches."""
    loss, calls = MedusaModel.head_loss, []

    def spoiled(self, k, *args):
        out = loss(self, k, *args)
        if k == 2 and trainer_step() == 3 and not calls:
            calls.append(k)
            out = out._replace(loss_sum=out.loss_sum * torch.nan)
        return out

    trainers = []
    init = MedusaTrainer.__init__
    monkeypatch.setattr(
        MedusaTrainer, "__init__", lambda self, *a, **kw: (init(self, *a, **kw), trainers.append(self))[0]
    )
    trainer_step = lambda: trainers[-1].state.global_step  # noqa: E731
    monkeypatch.setattr(MedusaModel, "head_loss", spoiled)
    with pytest.raises(FloatingPointError, match="step 4: the loss of head 2 is nan"):
        train("--max_steps", 6, "--save_steps", 2, "--medusa_only_heads", True, "--gradient_accumulation_steps", 2)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    MedusaModel.from_pretrained(tmp_path / "out" / "checkpoint-2")


def test_one_process_uses_one_of_several_gpus(monkeypatch, tmp_path):
    """The Trainer would wrap the model in DataParallel and draw a batch for each GPU it sees."""
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    assert TrainingArguments(output_dir=str(tmp_path))._n_gpu == 1
