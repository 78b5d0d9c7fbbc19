"""A process ends with what started it, and an error is one line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import errors

ROOT = Path(__file__).parent.parent
LAUNCHER = """
import subprocess, sys
code = "import errors, time; errors.end_with_launcher(); print(1, flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.read(1)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
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
        errors.run(interrupted)
    assert stop.value.code == 130 and "--resume_from_checkpoint True" in capsys.readouterr().err
