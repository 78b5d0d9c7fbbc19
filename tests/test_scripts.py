"""scripts/llama3_8b_medusa.sh without a GPU: what it would start, under sh as under bash."""

import os
import subprocess
from pathlib import Path

import pytest

from arguments import parse

SCRIPT = Path(__file__).parent.parent / "scripts" / "llama3_8b_medusa.sh"


def start(*flags, shell="bash", **variables):
    """Runs the script with `echo` in place of Python: it prints the command instead of starting it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NUM_GPUS", "MODEL")}
    environment |= {"PYTHON": "echo"} | variables
    return subprocess.run([shell, SCRIPT, *flags], capture_output=True, text=True, check=False, env=environment)


def flags_of(done):
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    return parse(words[words.index("train.py") + 1 :])


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_stage_1_on_one_gpu(shell):
    done = start(shell=shell, NUM_GPUS="1")
    model, data, training = flags_of(done)
    assert done.stdout.startswith("train.py") and "accelerate" not in done.stdout
    assert training.medusa_only_heads and training.learning_rate == 1e-3 and training.medusa_lr_multiplier == 1
    assert model.medusa_num_heads == 5 and training.bf16 and training.warmup_steps == 0.1
    assert data.eval_holdout == 500 and training.output_dir == "out/llama3_8b_medusa_stage1"


@pytest.mark.parametrize("flags", [("--medusa_only_heads", "False"), ("--medusa_only_heads=False",)])
def test_stage_2_has_learning_rates_of_its_own(flags):
    done = start(*flags, NUM_GPUS="1")
    training = flags_of(done)[2]
    assert not training.medusa_only_heads and training.gradient_checkpointing
    assert training.learning_rate == 1e-5 and training.medusa_lr_multiplier == 50
    assert training.output_dir.endswith("stage2") and "171 GB" in done.stderr


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        (("--medusa_only_heads", "TRUE"), 1),
        (("--medusa_only_heads", "y"), 1),
        (("--medusa_only_heads", "--packing", "True"), 1),
        (("--medusa-only-heads", "no"), 2),
        (("--medusa_only_heads", "0"), 2),
    ],
)
def test_every_spelling_the_parser_takes_means_the_same_to_the_script(flags, stage):
    training = flags_of(start(*flags, NUM_GPUS="1"))[2]
    assert training.medusa_only_heads == (stage == 1)
    assert training.learning_rate == (1e-3 if stage == 1 else 1e-5)


def test_several_gpus_go_through_accelerate():
    words = start(NUM_GPUS="8").stdout.split()
    assert words[words.index("--num_processes") + 1] == "8" and words.index("train.py") > words.index("--multi_gpu")


def test_appended_flags_and_variables_win():
    done = start("--medusa_num_heads", "3", "--learning_rate", "5e-4", NUM_GPUS="1", MODEL="mine", MAX_LENGTH="4096")
    model, data, training = flags_of(done)
    assert model.medusa_num_heads == 3 and training.learning_rate == 5e-4
    assert model.model_name_or_path == "mine" and data.model_max_length == 4096


def test_neither_true_nor_false():
    assert start("--medusa_only_heads", "maybe", NUM_GPUS="1").returncode == 1


def test_without_a_gpu_it_says_so():
    done = start(NUM_GPUS="0")
    assert done.returncode == 1 and done.stderr.startswith("error: no NVIDIA GPU") and not done.stdout
