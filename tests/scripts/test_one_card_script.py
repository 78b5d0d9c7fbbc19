"""scripts/llama3_8b_medusa_24gb.sh without a GPU: what it would start, with flags that the four scripts take."""

import sys

import pytest
from conftest import ROOT

import distill
import evaluate
import generate
from training.arguments import parse

SCRIPT = ROOT / "scripts/llama3_8b_medusa_24gb.sh"


def commands(done) -> dict[str, list[str]]:
    """What it starts: the words of each command, by the script they begin with."""
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if not line.startswith("==")]
    assert [line[0] for line in lines] == ["distill.py", "train.py", "evaluate.py", "generate.py"]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def arguments(monkeypatch):
    """-> what a script makes of its words."""

    def parse_them(module, words):
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        return module.parse_arguments()

    return parse_them


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_from_answers_to_text_in_four_bits(start, arguments, shell, tmp_path):
    out = tmp_path / "heads"
    variables = {"OUTPUT_DIR": str(out), "MODEL": "mine", "PROMPT": "why", "LIMIT": "7"}
    found = commands(start("--medusa_num_heads", "3", script=SCRIPT, shell=shell, gpus=1, **variables))
    asked = arguments(distill, found["distill.py"])
    model, data, training = parse(found["train.py"])
    measured, decoded = arguments(evaluate, found["evaluate.py"]), arguments(generate, found["generate.py"])
    assert asked.backbone_dtype == training.bits == measured.backbone_dtype == decoded.backbone_dtype == "nf4"
    assert asked.model_name_or_path == model.model_name_or_path == "mine" and asked.limit == 7
    assert [str(asked.output)] == data.data_path == measured.data_path == [f"{out}-chats.jsonl"]
    assert data.eval_holdout == measured.eval_holdout == 200
    assert training.output_dir == measured.heads == decoded.heads == str(out)
    assert training.medusa_only_heads and training.bf16 and training.optim == "adamw_8bit"
    assert model.medusa_vocab_size == 32768 and model.medusa_num_heads == 3  # the flag that was appended
    assert decoded.prompt == ["why"] and decoded.compare and training.resume_from_checkpoint == "False"


def test_the_same_command_goes_on(start, tmp_path):
    out = tmp_path / "heads"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-500" / "run.json").write_text("{}")
    words = commands(start(script=SCRIPT, gpus=1, OUTPUT_DIR=str(out)))["train.py"]
    assert words[words.index("--resume_from_checkpoint") + 1] == "True"
    (out / "medusa_lm_head.safetensors").touch()  # what a run leaves that has ended
    done = start(script=SCRIPT, gpus=1, OUTPUT_DIR=str(out))
    assert done.returncode == 0 and "train.py" not in done.stdout and "generate.py" in done.stdout


def test_without_a_gpu_it_says_so(start):
    done = start(script=SCRIPT)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: no NVIDIA GPU found") and done.stderr.count("\n") == 1
