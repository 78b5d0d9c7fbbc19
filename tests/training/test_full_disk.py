"""A disk that is full at each kind of write: one sentence, nothing half-written, and the run goes on afterwards.

In one process, with writes that raise what the system raises; test_resume.py has a real limit and several ranks."""

import errno
import os

import pytest
from conftest import assert_same, weights

from common import errors
from common.errors import BadInput
from training.trainer import MedusaTrainer

FLAGS = ("--medusa_only_heads", True, "--save_steps", 2, "--max_steps", 4)
WRITES = [
    "training.state.dcp.save",
    "training.checkpoints.torch.save",
    "model.heads_file.save_file",
    "common.files.fsync",
    "common.files.os.rename",
]


@pytest.mark.parametrize("call", WRITES)
def test_a_disk_that_is_full_at_the_second_checkpoint(call, train, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save = MedusaTrainer.save_checkpoint

    def save_checkpoint(self):
        if self.state.global_step == 2:
            return save(self)
        with monkeypatch.context() as patch:
            patch.setattr(call, lambda *args, **kwargs: (_ for _ in ()).throw(full))
            save(self)

    with monkeypatch.context() as patch:
        patch.setattr(MedusaTrainer, "save_checkpoint", save_checkpoint)
        with pytest.raises(BadInput, match=r"could not write incomplete-checkpoint-4 .*No space left"):
            train(*FLAGS, output="full")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["checkpoint-2", "train_command.txt"]
    resumed = train(*FLAGS, "--resume_from_checkpoint", True, output="full")
    assert_same(weights(resumed), weights(train(*FLAGS, output="whole")))


def test_any_other_write_is_one_line(capsys):
    def write(number):
        raise OSError(number, os.strerror(number), "out/train_command.txt")

    with pytest.raises(SystemExit, match=r"error: .*No space left.*out/train_command.txt.*free some space"):
        errors.run(lambda: write(errno.ENOSPC))
    with pytest.raises(OSError, match="Bad file descriptor"):
        errors.run(lambda: write(errno.EBADF))
