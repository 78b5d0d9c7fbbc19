"""train.py, evaluate.py and generate.py take heads that another program wrote, as they are."""

import json
import sys

import pytest
import torch
from conftest import assert_same
from safetensors.torch import load_file

import evaluate
import generate
from model.heads_file import HEADS_FILE


@pytest.fixture
def theirs(train, model_dir, tmp_path):
    """-> (heads in the original's file, with a wrong count, without sizes and tokenizer; their tensors)"""
    tensors = load_file(train("--medusa_only_heads", True, "--max_steps", 4, output="first") / HEADS_FILE)
    directory = tmp_path / "theirs"
    directory.mkdir()
    torch.save(tensors, directory / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 5, "medusa_num_layers": 1, "base_model_name_or_path": model_dir}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, tensors


@pytest.mark.parametrize("stage", [1, 2])
def test_training_starts_from_them(theirs, train, stage):
    directory, tensors = theirs
    still = ("--learning_rate", 0.0, "--medusa_lr_multiplier", 1.0)
    out = train(
        "--medusa_heads_path", directory, "--medusa_only_heads", stage == 1, "--max_steps", 1, *still, output="next"
    )
    heads = out if stage == 1 else out / "medusa_heads"
    assert_same(load_file(heads / HEADS_FILE), tensors)


def test_they_are_evaluated_and_decode(theirs, data_file, monkeypatch, caplog):
    directory, _ = theirs
    flags = ("--data_path", data_file, "--max_new_tokens", "8", "--dtype", "float32", "--model_max_length", "64")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(directory), *map(str, flags)])
    evaluate.main()
    assert "config.json says medusa_num_heads 5, the tensors are of 2" in caplog.text
    assert len(json.loads((directory / "accuracy.json").read_text())["top"]) == 3
    figures = directory / "figures.json"
    flags = ("--prompt", "why is the moon cold", "--max_new_tokens", "12", "--compare", "--output_json", figures)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(directory), "--nodes", "4", *map(str, flags)])
    generate.main()
    assert json.loads(figures.read_text())["identical"] == 1
