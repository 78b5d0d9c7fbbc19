"""benchmark/memory.py on a CPU: the real trainer as rank 0 of 8. What it measures needs a GPU."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, rendezvous
from csvs import rows_of

pytestmark = pytest.mark.processes
COLUMNS = "stage heads batch_size world_size length implementation medusa_vocab_size options group peak_gib "
COLUMNS += "resting_gib step_time_s tokens_per_s useful_tflops mfu gpu versions commit command"
SCRIPT = """
import weakref
import torch, fsdp_on_cpu
fsdp_on_cpu.allow_fsdp_on_cpu()
import memory
from model import heads, loss
from training import fsdp

link, cross_entropy, earlier = fsdp.link_units, heads.linear_cross_entropy, []

def look(model):
    parameters = list(model.parameters())
    held = sum(fsdp.local(p).numel() for p in parameters) * 8 / sum(p.numel() for p in parameters)
    units = sum(isinstance(head, fsdp.FSDPModule) for head in model.medusa_heads)
    print("model", round(held, 2), units, sum(model() is not None for model in earlier), flush=True)
    earlier.append(weakref.ref(model))
    return link(model)

def run_out(hidden, weight, targets, *args):
    if loss.CHUNK_ROWS == 1 and len(targets) > 4 * 16:
        raise torch.OutOfMemoryError("from the test")
    return cross_entropy(hidden, weight, targets, *args)

fsdp.link_units, heads.linear_cross_entropy = look, run_out
memory.main()
"""


def start(*flags, **variables):
    paths = (ROOT / "tests", ROOT / "benchmark", ROOT)
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "ACCELERATE_USE_CPU": "true"} | variables
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, "--smoke", *map(str, flags)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_of_eight(stage, tmp_path):
    out = tmp_path / "memory.csv"
    flags = ["--heads", "1", "2", "--lengths", "16", "32", "48", "--implementations", "ours", "liger", "hf"]
    process = start("--stage", stage, *flags, "--out", out)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    models = [line.split()[1:] for line in printed.splitlines() if line.startswith("model ")]
    # An eighth of all weights, the heads that are units, and no model of before is still in memory.
    assert models == [["1.0", units, "0"] for units in "000012"]
    rows = rows_of(out)
    measured = [(row["implementation"], row["heads"], row["length"], row["peak_gib"]) for row in rows]
    expected = []
    for implementation in ("hf", "liger", "ours"):  # whatever the order of the flags: Liger's kernels stay
        for heads in "12":
            lengths = {"16": "0.00", "32": "0.00", "48": "0.00"}
            if implementation == "liger":  # memory ran out, which ends this combination only
                lengths = {"16": "0.00", "32": "OOM"}
            expected += [(implementation, heads, length, peak) for length, peak in lengths.items()]
    assert measured == expected
    assert list(rows[0]) == COLUMNS.split()
    assert all(row["group"] == "fake" and row["step_time_s"] == row["tokens_per_s"] == "" for row in rows)
    assert all(row["stage"] == str(stage) and row["world_size"] == "8" for row in rows)
    assert all(row["options"] == "fsdp2" and "torch " in row["versions"] for row in rows)


def test_offloading_is_for_one_head_after_the_other():
    process = start("--stage", 2, "--offload_activations")
    _, errors = process.communicate()
    assert process.returncode == 2 and "--implementations ours" in errors


@pytest.mark.parametrize(
    ("stage", "fsdp", "implementation", "draft"),
    [(1, 2, "ours", 100), (2, 2, "ours", ""), (1, 1, "hf", 100), (1, 1, "ours", "")],
)
def test_a_real_group(stage, fsdp, implementation, draft, tmp_path):
    """Two ranks, as accelerate launch starts them: both train, and one writes."""
    out = tmp_path / "real.csv"
    variables = rendezvous() | {
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(fsdp),
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_USE_ORIG_PARAMS": "true",
    }
    flags = ("--stage", stage, "--heads", 1, "--lengths", 16, 24, "--implementations", implementation, "--out", out)
    flags += ("--medusa_vocab_size", draft) if draft else ()
    ranks = [start(*flags, RANK=str(rank), LOCAL_RANK=str(rank), **variables) for rank in range(2)]
    try:
        printed = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [errors[-3000:] for _, errors in printed]
    rows = rows_of(out)
    assert list(rows[0]) == COLUMNS.split() and [row["length"] for row in rows] == ["16", "24"]
    for row, length in zip(rows, (16, 24), strict=True):
        assert row["group"] == "real" and row["world_size"] == "2" and row["options"] == f"fsdp{fsdp}"
        assert row["medusa_vocab_size"] == str(draft)
        tokens = 2 * int(row["batch_size"]) * length  # of both ranks
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / float(row["step_time_s"]), rel=1e-3)
    losses = [float(loss) for loss in re.findall(r"'head_1_loss': '?([0-9.]+)", printed[0][0] + printed[0][1])]
    assert len(losses) == 4 and losses[1] < losses[0]  # random weights that learn; 0 and 1 are of one length
