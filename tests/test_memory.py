"""benchmark/memory.py on a CPU: the real trainer as rank 0 of 8. What it measures needs a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import worker
worker.allow_fsdp_on_cpu()
import memory, medusa_fsdp
save = memory.MedusaTrainer._finalize_training
def shards(self, *args):
    held = sum(medusa_fsdp.local(p).numel() for p in self.medusa.parameters())
    print("held", held * 8 / sum(p.numel() for p in self.medusa.parameters()))
    return save(self, *args)
memory.MedusaTrainer._finalize_training = shards
memory.main()
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_of_eight(stage, tmp_path):
    paths = (ROOT / "tests", ROOT / "benchmark", ROOT)
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "ACCELERATE_USE_CPU": "true"}
    environment.pop("TRITON_INTERPRET", None)
    flags = f"--stage {stage} --tiny --heads 2 --lengths 16 32".split() + ["--out", tmp_path / "memory.csv"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    held = float(done.stdout.split("held ")[1].split()[0])
    assert held == pytest.approx(1.0, abs=0.01)  # an eighth of all weights, and shards are padded to whole rows
    with open(tmp_path / "memory.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["length"] for row in rows] == ["16", "32"]
    assert all(row["world_size"] == "8" and row["stage"] == str(stage) for row in rows)
    assert all(row["implementation"] == "chunked fsdp2" and row["versions"].startswith("torch ") for row in rows)
