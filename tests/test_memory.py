"""benchmark/memory.py on a CPU: the real trainer as rank 0 of 8. What it measures needs a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import weakref
import torch, worker
worker.allow_fsdp_on_cpu()
import medusa_fsdp, medusa_loss, medusa_model, memory

link, loss, earlier = medusa_fsdp.link_units, medusa_model.linear_cross_entropy, []

def look(model):
    parameters = list(model.parameters())
    held = sum(medusa_fsdp.local(p).numel() for p in parameters) * 8 / sum(p.numel() for p in parameters)
    units = sum(isinstance(head, medusa_fsdp.FSDPModule) for head in model.medusa_heads)
    print("model", round(held, 2), units, sum(model() is not None for model in earlier), flush=True)
    earlier.append(weakref.ref(model))
    return link(model)

def run_out(hidden, weight, targets, *args):
    if medusa_loss.CHUNK_ROWS == 1 and len(targets) > 4 * 16:
        raise torch.OutOfMemoryError("from the test")
    return loss(hidden, weight, targets, *args)

medusa_fsdp.link_units, medusa_model.linear_cross_entropy = look, run_out
memory.main()
"""


def run(*flags):
    paths = (ROOT / "tests", ROOT / "benchmark", ROOT)
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "ACCELERATE_USE_CPU": "true"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, "--smoke", *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_of_eight(stage, tmp_path):
    out = tmp_path / "memory.csv"
    flags = ["--heads", "1", "2", "--lengths", "16", "32", "48", "--implementations", "ours", "liger", "hf"]
    done = run("--stage", stage, *flags, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    models = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("model ")]
    # An eighth of all weights, the heads that are units, and no model of before is still in memory.
    assert models == [["1.0", units, "0"] for units in "000012"]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    measured = [(row["implementation"], row["heads"], row["length"], row["peak_gib"]) for row in rows]
    expected = []
    for implementation in ("hf", "liger", "ours"):  # whatever the order of the flags: Liger's kernels stay
        for heads in "12":
            lengths = {"16": "0.00", "32": "0.00", "48": "0.00"}
            if implementation == "liger":  # memory ran out, which ends this combination only
                lengths = {"16": "0.00", "32": "OOM"}
            expected += [(implementation, heads, length, peak) for length, peak in lengths.items()]
    assert measured == expected
    columns = (
        "stage heads batch_size world_size length implementation options peak_gib resting_gib gpu versions commit"
    )
    assert list(rows[0]) == [*columns.split(), "command"]
    assert all(row["stage"] == str(stage) and row["world_size"] == "8" for row in rows)
    assert all(row["options"] == "fsdp2" and "torch " in row["versions"] for row in rows)


def test_offloading_is_for_one_head_after_the_other():
    done = run("--stage", 2, "--offload_activations")
    assert done.returncode == 2 and "--implementations ours" in done.stderr
