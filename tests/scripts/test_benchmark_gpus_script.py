"""scripts/benchmark_gpus.sh with `echo` in place of Python: what it would start. Its --smoke runs are made by hand."""

import os
import subprocess

import pytest
from conftest import ROOT

LAUNCH = "scripts/launch.py --quiet --config_file"


@pytest.fixture
def start(tmp_path):
    def run(*flags, shell="bash", gpus=8, **variables):
        listed = "".join(f"echo 'GPU {n}: a GPU (UUID: GPU-{n})'\n" for n in range(gpus))
        for name, commands in {"nvidia-smi": listed or "exit 9", "date": "echo 2026-12-01"}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "VENV": "none"}
        environment |= {"PYTHON": "echo", "RESULTS": str(tmp_path)} | variables
        command = [shell, ROOT / "scripts/benchmark_gpus.sh", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=20)

    return run


def started(done) -> list[str]:
    assert done.returncode == 0 and not done.stderr, done
    return [line.rstrip() for line in done.stdout.splitlines() if not line.startswith("==")]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(("stage", "fsdp"), [("1", "2"), ("2", "1")])
def test_compare(start, tmp_path, stage, fsdp, shell):
    script = f"{LAUNCH} configs/fsdp{fsdp}.yaml --num_processes 8 benchmark/memory.py --stage {stage}"
    assert started(start("compare", stage, FSDP=fsdp, shell=shell)) == [
        f"{script} --out {tmp_path}/2026-12-01_gpus_compare.csv --heads {heads} --implementations {implementation}"
        for heads in (3, 5)
        for implementation in ("ours", "liger", "hf")
    ]


@pytest.mark.parametrize(
    ("stage", "gpus", "counts"), [("1", 8, "1248"), ("1", 3, "12"), ("2", 8, "48"), ("2", 5, "4")]
)
def test_scaling(start, stage, gpus, counts):
    commands = started(start("scaling", stage, gpus=gpus))
    assert [command.split("--num_processes ")[1][0] for command in commands] == list(counts)
    assert all(f"--stage {stage}" in command and command.endswith("--lengths 2048") for command in commands)


def test_smoke_needs_no_gpu_and_leaves_results_alone(start, tmp_path):
    commands = started(start("compare", "1", "--smoke", gpus=0))
    assert len(commands) == 6
    for command in commands:
        assert "configs/cpu.yaml --num_processes 2 benchmark/memory.py" in command and command.endswith("--smoke")
        assert f"--out {tmp_path}/tmp." in command


def test_out_of_memory_in_one_measurement_does_not_end_the_others(start, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\ncase "$*" in *hf*) exit 1 ;; esac\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    done = start("compare", "1", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 0 and done.stderr.count("this one failed") == 2 and done.stdout.count("ours") == 4


def test_where_all_fail_the_script_does(start):
    done = start("compare", "1", PYTHON="false")
    assert done.returncode == 1 and done.stderr.endswith("no measurement succeeded\n")


def test_hidden_gpus_do_not_count(start):
    commands = started(start("compare", "1", CUDA_VISIBLE_DEVICES="0,3"))
    assert len(commands) == 6 and all("--num_processes 2 " in command for command in commands)


@pytest.mark.parametrize(
    ("flags", "settings", "part"),
    [
        ((), {}, "usage"),
        (("compare", "3"), {}, "usage"),
        (("compare", "1", "--fast"), {}, "usage"),
        (("compare", "1"), {"FSDP": "3"}, "FSDP"),
        (("compare", "1"), {"gpus": 1}, "there are 1"),
        (("compare", "1"), {"NUM_GPUS": "9"}, "there are 8"),
        (("compare", "1"), {"NUM_GPUS": "all"}, "'all'"),
        (("scaling", "2"), {"gpus": 3}, "4 GPUs or more"),
        (("resume", "1"), {"MODEL": "nowhere"}, "nowhere"),
        (("resume", "1"), {"PYTHON": "false", "MODEL": "."}, "training failed"),
    ],
)
def test_what_cannot_work_is_one_error(start, flags, settings, part):
    done = start(*flags, **settings)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and part in lines[0], done
