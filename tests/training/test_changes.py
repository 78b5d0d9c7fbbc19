"""A resume says what changed: applied and logged, or refused by name; the log's window goes on; SIGTERM saves."""

import json
import os
import shutil
import signal

import pytest
from conftest import assert_same, logged, saved_state, weights

from common.errors import BadInput
from training.trainer import MedusaTrainer

COMMON = ("--medusa_only_heads", True, "--save_steps", 3)


def stop_at(monkeypatch, step, number):
    start = MedusaTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return start(self, *args, **kwargs)

    monkeypatch.setattr(MedusaTrainer, "training_step", training_step)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_bit_for_bit(train, tmp_path, monkeypatch, capsys):
    """At step 5, between two logs: the log's sums go on too."""
    flags = (*COMMON, "--max_steps", 8, "--logging_steps", 4, "--medusa_scheduler", "linear")
    whole = train(*flags, output="whole")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            train(*flags, output="stopped")
    assert ended.value.code == 143 and "go on from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    out = tmp_path / "stopped"
    assert (out / "checkpoint-6").is_dir() and not weights(out)
    shutil.copytree(out / "checkpoint-6", out / "checkpoint-9-bad")
    resumed = train(*flags, "--resume_from_checkpoint", True, output="stopped")
    assert_same(weights(resumed), weights(whole))
    for key in ("loss", "head_1_loss", "head_2_top1"):
        assert len(logged(whole, key)) == 2
        assert logged(resumed, key) == logged(whole, key)


def test_what_a_resume_applies_and_what_it_refuses(train, tmp_path, caplog):
    out = train(*COMMON, "--max_steps", 3)
    resume = (*COMMON, "--max_steps", 4, "--resume_from_checkpoint", True)
    for flag, value in (
        ("--seed", 7), ("--data_seed", 7), ("--packing", True), ("--lazy_preprocess", True),
        ("--lr_scheduler_type", "cosine"), ("--optim", "sgd"), ("--train_sampling_strategy", "sequential"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"trained with {'--data_seed|--seed' if 'seed' in flag else flag}"):
            train(*resume, flag, value)
    checkpoint, run = out / "checkpoint-3", json.loads((out / "checkpoint-3/run.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "out/best")
    with pytest.raises(BadInput, match="is of step 3: it was renamed"):
        train(*resume[:-1], out / "best")
    checkpoint.rename(out / "checkpoint-5")
    with pytest.raises(BadInput, match="is of step 3: it was renamed"):
        train(*resume)
    (out / "checkpoint-5").rename(checkpoint)
    (checkpoint / "run.json").write_text(json.dumps({"medusa_num_heads": 2}))
    with pytest.raises(BadInput, match="does not say batch: it is of another version"):
        train(*resume)
    (checkpoint / "run.json").write_text(json.dumps(run))
    caplog.set_level("INFO")
    train(*resume, "--medusa_heads_coefficient", 0.5)
    assert "--medusa_heads_coefficient is 0.5 from here on, and was 0.2" in caplog.text
    assert "--max_steps is 4 from here on, and was 3" in caplog.text


def test_a_checkpoint_of_stage_2_becomes_a_model(train):
    """A run that is resumed where it ends takes no step, and writes what a finished run leaves."""
    flags = ("--medusa_only_heads", False, "--max_steps", 2, "--save_steps", 2)
    out = train(*flags)
    saved, finished = saved_state(out / "checkpoint-2"), weights(out)
    for path in (out / "model.safetensors", out / "medusa_heads" / "medusa_lm_head.safetensors"):
        path.unlink()
    train(*flags, "--resume_from_checkpoint", True)
    assert_same(weights(out), finished)
    assert any(name.startswith("model.") for name in saved)


def test_the_best_model_needs_a_checkpoint_of_each_evaluation(train):
    with pytest.raises(BadInput, match="needs a checkpoint of each evaluation"):
        train(
            *("--load_best_model_at_end", True, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 2),
            *("--eval_holdout", 8, "--medusa_only_heads", True),
        )
