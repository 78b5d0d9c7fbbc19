"""Fifty kills at random moments, and every run ends bit for bit as if it had never been killed. Minutes: by hand, with
`MEDUSA_KILLS=50 pytest tests/training/test_kills.py`; test_resume.py has each moment once."""

import os
import random
import signal

import pytest
from conftest import weights
from lab import CASES, STEPS, assert_identical

KILLS = int(os.environ.get("MEDUSA_KILLS", 0))
pytestmark = [pytest.mark.processes, pytest.mark.skipif(not KILLS, reason="takes minutes: MEDUSA_KILLS=50 runs it")]

MOMENTS = {  # and the highest n of its n-th call
    "training.trainer.MedusaTrainer.training_step": STEPS,
    "training.checkpoints.save_state": 3,
    "torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data": 3,
    "torch.distributed.checkpoint.filesystem.FileSystemWriter.finish": 3,
    "torch.save": 6,
    "common.files.fsync": 30,
    "training.checkpoints.publish": 3,
    "training.checkpoints.rotate_checkpoints": 3,
    "training.checkpoints.publish_files": 1,
    "common.files.os.replace": 6,
}


def test_many_kills(lab):
    rng, want, done, runs = random.Random(0), weights(lab.never_stopped("one process", "stage 1").out), 0, 0
    out = None
    while done < KILLS:
        call = rng.choice(list(MOMENTS))
        at = {"call": call, "nth": rng.randint(1, MOMENTS[call]), "signal": signal.SIGKILL}
        goes_on = out is not None and any(out.glob("checkpoint-*"))
        flags = CASES["stage 1"] | ({"--resume_from_checkpoint": True} if goes_on else {})
        run = lab.launch("one process", flags, at=at, out=out)
        out = run.out
        if run.codes == [-signal.SIGKILL]:
            done += 1
        else:  # it came to its end before
            assert run.codes == [0], run.logs[0][-2000:]
            assert_identical(weights(out), want)
            runs, out = runs + 1, None
    assert runs > 0
    print(f"{done} kills, {runs} runs that ended")
