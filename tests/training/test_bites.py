"""What a one-line mistake would break without any other test noticing."""

import os
import time
from pathlib import Path

import pytest
from conftest import assert_same, logged, weights

from common.errors import BadInput
from common.files import publish
from training.arguments import TrainingArguments
from training.trainer import MedusaTrainer


def test_all_is_on_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    staging, final, events = tmp_path / "incomplete-checkpoint-1", tmp_path / "checkpoint-1", []
    (staging / "state").mkdir(parents=True)
    for name in ("run.json", "state/0.distcp", "state/.metadata"):
        (staging / name).write_text("x")
    everything = {staging, *staging.rglob("*")}
    rename = os.rename
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("renamed"), rename(*paths)))
    publish(staging, final)
    place = events.index("renamed")
    assert set(events[:place]) == everything and len(everything) == 5
    assert events[place + 1 :] == [tmp_path] and (final / "state" / ".metadata").is_file()


def test_push_to_hub_pushes_what_was_saved(train, monkeypatch):
    calls = []
    monkeypatch.setattr(MedusaTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(
        MedusaTrainer,
        "push_to_hub",
        lambda self, **call: calls.append((sorted(p.name for p in Path(self.args.output_dir).iterdir()), call)),
    )
    flags = ("--medusa_only_heads", True, "--max_steps", 1, "--save_strategy", "no")
    train(*flags, output="local")
    assert calls == []
    train(*flags, "--push_to_hub", True, "--hub_model_id", "me/heads", "--hub_strategy", "end", output="pushed")
    ((there, call),) = calls
    assert {"medusa_lm_head.safetensors", "config.json", "tokenizer.json"} <= set(there)
    assert call["commit_message"] == "Model save"


@pytest.mark.parametrize("asked", [None, {"sync_each_batch": False}])
def test_fsdp_reduces_gradients_of_each_micro_batch(asked, tmp_path, monkeypatch):
    """Or a rank would hold whole gradients. Who asks for that gets it."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = {} if asked is None else {"accelerator_config": {"gradient_accumulation_kwargs": asked}}
    args = TrainingArguments(
        output_dir=str(tmp_path), medusa_only_heads=True, report_to="none", use_cpu=True, **config
    )
    assert args.accelerator_config.gradient_accumulation_kwargs == (asked or {"sync_each_batch": True})


@pytest.mark.parametrize("lazy", [False, True])
def test_a_data_file_may_change_while_a_run_reads_its_own_copy(lazy, train, data_file, monkeypatch):
    """It trains on what it read when it began; a resume notices."""
    flags = ("--medusa_only_heads", True, "--max_steps", 4, "--save_steps", 2, "--lazy_preprocess", lazy)
    want, text = train(*flags, output="undisturbed"), Path(data_file).read_text()
    step = MedusaTrainer.training_step

    def spoil(self, *args, **kwargs):
        if self.state.global_step == 1:
            Path(data_file).write_text("\n".join(text.splitlines()[::2]))
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MedusaTrainer, "training_step", spoil)
        got = train(*flags, output="disturbed")
    assert_same(weights(got), weights(want))
    with pytest.raises(BadInput, match="checkpoint-4 was trained on other data"):
        train(*flags[:2], "--max_steps", 6, *flags[4:], "--resume_from_checkpoint", True, output="disturbed")


def test_a_clock_that_is_set_back(train, monkeypatch):
    flags = ("--medusa_only_heads", True, "--max_steps", 4, "--save_steps", 2)
    want, now, calls = train(*flags, output="undisturbed"), time.time, []
    monkeypatch.setattr(time, "time", lambda: now() - 3600 * (calls.append(1) or len(calls)))
    got = train(*flags, output="disturbed")
    assert_same(weights(got), weights(want))
    assert all(0 < seconds < 60 for seconds in logged(got, "step_time_s"))
    assert sorted(path.name for path in got.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
