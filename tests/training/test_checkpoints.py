"""training/checkpoints.py in one process: runs that go on bit for bit, the best model, weights that are not finite."""

import json
import shutil

import pytest
import torch
from conftest import assert_same, logged, saved_state, weights

from training.trainer import MedusaTrainer


@pytest.mark.parametrize(
    "flags",
    [
        ("--medusa_only_heads", True),
        pytest.param(("--medusa_only_heads", False, "--gradient_accumulation_steps", 2), marks=pytest.mark.slow),
        pytest.param(("--medusa_only_heads", True, "--packing", True), marks=pytest.mark.slow),
        pytest.param(("--medusa_only_heads", True, "--lazy_preprocess", True), marks=pytest.mark.slow),
        pytest.param(("--medusa_return", False), marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_never_stopped_bit_for_bit(flags, train, tmp_path, monkeypatch):
    """Stopped in the second epoch, in the middle: weights, Adam, schedules, data order and logs go on the same."""
    common = (*flags, "--num_train_epochs", 2, "--save_steps", 1, "--medusa_scheduler", "linear", "--eval_holdout", 6)
    common += ("--eval_strategy", "steps", "--eval_steps", 2, "--per_device_train_batch_size", 6)
    whole = train(*common, output="whole")
    steps = len(logged(whole))
    stop_at = steps // 2 + 1
    assert steps % 2 == 0 and stop_at % (steps // 2) != 0  # not at the end of an epoch

    class Killed(Exception):
        pass

    start = MedusaTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == stop_at:
            raise Killed
        return start(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MedusaTrainer, "training_step", killed)
        with pytest.raises(Killed):
            train(*common, output="stopped")
    (tmp_path / "stopped" / f"checkpoint-{stop_at + 1}").mkdir()  # what a kill while writing can leave
    resumed = train(*common, "--resume_from_checkpoint", True, output="stopped")
    assert_same(weights(resumed), weights(whole))
    for key in ("loss", "learning_rate", "grad_norm", "head_1_loss", "eval_loss"):
        assert logged(resumed, key) == logged(whole, key)
    a, b = (saved_state(run / f"checkpoint-{steps}") for run in (resumed, whole))
    assert any("exp_avg_sq" in name for name in b)
    assert_same(a, b)


@pytest.mark.parametrize("stage", [1, 2])
def test_load_best_model_at_end(stage, train):
    """Best is made to mean the highest loss, so that it is not the last checkpoint."""
    out = train(
        "--max_steps", 6, "--save_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_holdout", 8,
        "--load_best_model_at_end", True, "--medusa_only_heads", stage == 1, "--greater_is_better", True,
    )  # fmt: skip
    best = json.loads((out / "trainer_state.json").read_text())["best_global_step"]
    assert best < 6
    if stage == 1:
        assert_same(weights(out), weights(out / f"checkpoint-{best}"))
    else:
        saved = saved_state(out / f"checkpoint-{best}")
        for name, tensor in weights(out).items():
            file, name = name.split(":")
            prefix = "model.backbone." if file == "model.safetensors" else "model.medusa_heads."
            assert torch.equal(tensor, saved[prefix + name])


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        train("--max_steps", 1, "--medusa_only_heads", True, "--learning_rate", 1e39)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("stage", [1, 2])
def test_rates_and_decay_given_on_a_resume_hold_from_there_on(stage, train, tmp_path, caplog):
    """As the advice after a NaN has it. With a rate of almost 0 no weight moves, whatever Adam's moments say; with a
    decay of 1 / rate and no gradient's step, AdamW makes every decayed weight 0 (w - rate x decay x w)."""
    flags = ("--medusa_only_heads", stage == 1, "--save_steps", 2, "--lr_scheduler_type", "constant")
    flags += ("--medusa_lr_multiplier", 1)
    out = train(*flags, "--max_steps", 2)
    before = weights(out) if stage == 1 else saved_state(out / "checkpoint-2")
    shutil.copytree(out, tmp_path / "decayed")
    resume = (*flags, "--resume_from_checkpoint", True, "--max_steps", 4)
    caplog.set_level("INFO")
    slow = train(*resume, "--learning_rate", 1e-30)
    assert "the learning rate is 1e-30 from here on, and was 0.01" in caplog.text
    assert logged(slow, "learning_rate") == pytest.approx([1e-2, 1e-2, 1e-30, 1e-30], rel=1e-6)
    after = weights(slow) if stage == 1 else saved_state(slow / "checkpoint-4")
    moved = [name for name in before if "exp_avg" not in name and "step" not in name]
    assert all(torch.equal(after[name], before[name]) for name in moved if before[name].is_floating_point())
    decayed = train(*resume, "--learning_rate", 1e-9, "--weight_decay", 1e9, output="decayed")
    matrix = next(tensor for name, tensor in weights(decayed).items() if name.endswith("0.0.linear.weight"))
    assert matrix.abs().max() < 1e-6


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_finished_run_that_is_made_longer_does_not_begin_with_a_rate_of_0(schedule, train):
    flags = ("--medusa_only_heads", True, "--save_steps", 4, "--lr_scheduler_type", schedule)
    out = train(*flags, "--max_steps", 4)
    before = weights(out)
    longer = train(*flags, "--max_steps", 5, "--save_steps", 1, "--resume_from_checkpoint", True)
    whole = train(*flags, "--max_steps", 5, output="whole")
    assert logged(longer, "learning_rate")[4:] == logged(whole, "learning_rate")[4:]
    names = [name for name in before if name.endswith("weight")]
    assert not any(torch.equal(weights(longer)[name], before[name]) for name in names)
