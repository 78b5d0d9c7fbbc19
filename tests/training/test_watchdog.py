"""training/watchdog.py: a process that hangs is named, and none is left waiting."""

import re
import signal
import time

import pytest
from lab import STAGE_1

from training.watchdog import sentence


@pytest.mark.processes
@pytest.mark.parametrize("hangs", [0, 1])
def test_a_process_that_hangs_is_named(hangs, lab):
    """Process 0 holds the place where they met; without it the other can only say that nobody answers."""
    at = {"call": "training.trainer.MedusaTrainer.training_step", "nth": 2, "signal": signal.SIGSTOP}
    start = time.monotonic()
    run = lab.launch("FSDP2", STAGE_1 | {"--ddp_timeout": 6}, at=at, on=hangs)
    assert time.monotonic() - start < 60
    left = 1 - hangs
    assert run.codes[left] == 1 and run.codes[hangs] == -signal.SIGKILL  # by the launcher
    said = [line for log in run.logs for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search(
        rf"no progress for 5 s in step 2: .* number {hangs} \(from 0\) does not", said[0]
    )
    assert "Traceback" not in run.logs[left]


def test_sentences():
    assert "number 1, 3 (from 0) does not answer" in sentence(10, {0: 4, 2: 4}, 4)
    assert "step 5: number 1 (from 0) is still in step 4" in sentence(10, {0: 5, 1: 4}, 2)
    assert "wait for each other" in sentence(10, {0: 5, 1: 5}, 2)
