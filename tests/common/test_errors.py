"""A process ends with what started it, and an error is one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common import errors
from training.checkpoints import read_run

LAUNCHER = """
import subprocess, sys
code = "from common import errors; import time; errors.end_with_launcher(); print(1, flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.read(1)
print(child.pid, flush=True)
child.wait()
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's")


@pytest.mark.processes
@linux
def test_a_killed_launcher_leaves_no_training_behind():
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, env=environment, text=True)
    child = Path("/proc") / launcher.stdout.readline().strip()
    assert child.exists()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while child.exists() and "zombie" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "zombie" in (child / "status").read_text()


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        errors.run(interrupted, if_interrupted=": go on like this")
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted: go on like this\n"


def test_out_of_memory_is_one_line():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")

    with pytest.raises(SystemExit) as stop:
        errors.run(full, if_out_of_memory="Take less.")
    assert stop.value.code == "error: out of GPU memory (CUDA out of memory. Tried to). Take less."


def processes_of(word: str) -> list[int]:
    """Those with `word` in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@pytest.mark.processes
@linux
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_a_job_dies_as_a_whole(victim, model_dir, data_file, tmp_path):
    """accelerate launch with two ranks: SIGKILL to one process leaves none, and the checkpoints."""
    out = tmp_path / "a-job-to-kill"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "cpu.yaml"]
    train = [ROOT / "train.py", "--model_name_or_path", model_dir, "--data_path", data_file, "--output_dir", out]
    train += ["--cache_dir", tmp_path / "cache", "--medusa_only_heads", "True", "--medusa_num_heads", "1"]
    train += ["--model_max_length", "64", "--max_steps", "100000", "--save_steps", "1", "--save_total_limit", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        command = [*launch, "--num_processes", "2", "--main_process_port", "0", *train]
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
    # The second or a later one: with --save_total_limit 2 the second is gone again after a moment.
    wait_for(lambda: any(int(path.name.split("-")[1]) >= 2 for path in out.glob("checkpoint-*")))
    ranks = [pid for pid in processes_of(str(out)) if pid != launcher.pid]
    assert len(ranks) == 2
    os.kill(launcher.pid if victim == "the launcher" else ranks[1], signal.SIGKILL)
    assert launcher.wait(60) != 0
    wait_for(lambda: not processes_of(str(out)))
    assert read_run(max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))) is not None
