"""What scripts would start, and what accelerate makes of a command line."""

import os
import subprocess

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import ROOT

SCRIPT = ROOT / "scripts/llama3_8b_medusa.sh"


@pytest.fixture
def launch(monkeypatch):
    """What accelerate makes of a command line: the launcher it takes, its arguments, the processes' environment."""
    monkeypatch.chdir(ROOT)

    def run(*words):
        taken = []

        def take(name, prepare):
            monkeypatch.setattr(accelerate_launch, name, lambda args: taken.append((name, args, prepare(args))))

        take("multi_gpu_launcher", prepare_multi_gpu_env)
        take("simple_launcher", lambda args: prepare_simple_launcher_cmd_env(args)[1])
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
        return taken[0]

    return run


@pytest.fixture
def start(tmp_path):
    """Runs a script with `echo` in place of Python: it prints the command instead of starting it.

    gpus: how many nvidia-smi lists. programs: name=commands of others to put on PATH, other keywords are variables.
    """

    def run(*flags, shell="bash", script=SCRIPT, cwd=ROOT, gpus=0, programs=(), **variables):
        listing = "".join(f"echo 'GPU {i}: a GPU (UUID: GPU-{i})'\n" for i in range(gpus))
        for name, commands in {"nvidia-smi": listing, **dict(programs)}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "echo", "VENV": "none"} | variables
        return subprocess.run(
            [shell, script, *flags], capture_output=True, text=True, check=False, env=environment, cwd=cwd, timeout=20
        )

    return run
