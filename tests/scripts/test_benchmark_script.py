"""scripts/benchmark.sh with `echo` in place of Python: what it would start, in which order."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

ORDER = [
    "benchmark/head_loss.py --out {csv}_head_loss.csv",
    "benchmark/throughput.py --stage 1 --out {csv}_throughput.csv",
    "benchmark/throughput.py --stage 2 --out {csv}_throughput.csv",
    "benchmark/throughput.py --stage 1 --implementations ours --heads 3 --lengths 2048 4096 8192 --fp8_backbone "
    "--out {csv}_throughput.csv",
    "benchmark/throughput.py --stage 1 --implementations ours --heads 5 --batch_size 1 --lengths 32768 65536 131072 "
    "--warmup 1 --steps 1 --out {csv}_throughput.csv",
    "benchmark/memory.py --stage 1 --out {csv}_memory.csv",
    "benchmark/memory.py --stage 2 --out {csv}_memory.csv",
    "benchmark/plot.py --memory {csv}_memory.csv --throughput {csv}_throughput.csv --out {images}",
]
CHATS = "benchmark/throughput.py --stage 1 --implementations ours --heads 5 --lengths 2048 --data_path my chats.jsonl"


@pytest.fixture
def start(tmp_path):
    def run(*flags, shell="bash", gpu=True, **variables):
        programs = {"nvidia-smi": "echo 'GPU 0: a GPU (UUID: GPU-0)'" if gpu else "exit 9", "date": "echo 2026-12-01"}
        for name, commands in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "VENV": "none"}
        environment |= {"PYTHON": "echo", "RESULTS": str(tmp_path / "results")} | variables
        command = [shell, ROOT / "scripts/benchmark.sh", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=20)

    return run


def started(done) -> list[str]:
    """The commands; each is announced before it runs."""
    assert done.returncode == 0 and not done.stderr, done
    *lines, last = done.stdout.splitlines()
    assert last.startswith("CSVs: ") and len(lines) % 2 == 0
    announced = [line.removeprefix("== python ") for line in lines[::2]]
    assert [line.removesuffix(" --smoke").rstrip() for line in lines[1::2]] == announced
    return [line.rstrip() for line in lines[1::2]]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_everything_in_order(start, tmp_path, shell):
    csv = tmp_path / "results/2026-12-01"
    assert started(start(shell=shell)) == [line.format(csv=csv, images="docs/images") for line in ORDER]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_smoke_needs_no_gpu_and_leaves_results_alone(start, tmp_path, shell):
    commands = started(start("--smoke", shell=shell, gpu=False))
    place = Path(re.search(r"--out (\S+)/2026", commands[0])[1])
    assert place.parent == tmp_path and place.is_dir() and place != tmp_path / "results"
    tiny = [line for line in ORDER if "fp8" not in line and "131072" not in line]
    wanted = [line.format(csv=place / "2026-12-01", images=place) for line in tiny]
    assert commands == [*(f"{line} --smoke" for line in wanted[:-1]), wanted[-1]]


def test_real_conversations(start, tmp_path):
    commands = started(start(DATA_PATH="my chats.jsonl", TOKENIZER="a model"))
    rest = f"--tokenizer a model --warmup 5 --steps 45 --out {tmp_path}/results/2026-12-01_throughput.csv"
    assert commands[5] == f"{CHATS} {rest}"
    assert len(commands) == len(ORDER) + 1


def test_layers_to_recompute(start):
    stage_2 = started(start(RECOMPUTED="0 0 5 20"))[2]
    assert "--stage 2 --recomputed_layers 0 0 5 20 --out" in stage_2


@pytest.mark.parametrize("name", ["head_loss", "throughput", "memory"])
def test_csvs_of_today_are_only_replaced_on_request(start, tmp_path, name):
    path = tmp_path / f"results/2026-12-01_{name}.csv"
    path.parent.mkdir()
    path.write_text("an earlier run's")
    done = start()
    assert done.returncode == 1 and not done.stdout and str(path) in done.stderr and "OVERWRITE=1" in done.stderr
    assert path.exists() and len(started(start(OVERWRITE="1"))) == len(ORDER) and not path.exists()


@pytest.mark.parametrize(
    ("flags", "settings", "part"),
    [
        ((), {"gpu": False}, "no NVIDIA GPU"),
        (("--fast",), {}, "--fast"),
        ((), {"DATA_PATH": "chats.jsonl"}, "TOKENIZER"),
    ],
)
def test_what_cannot_work_is_one_error(start, flags, settings, part):
    done = start(*flags, **settings)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout and len(lines) == 1 and part in lines[0], done


def test_it_stops_where_a_step_fails(start):
    done = start(PYTHON="false")
    assert done.returncode == 1 and done.stdout.count("==") == 1
