"""benchmark/memory.py on a CPU: the real trainer as rank 0 of 8. What it measures needs a GPU."""

import re

import memory
import pytest
import worker
from conftest import rendezvous
from csvs import rows_of
from lab import FORK, wait

pytestmark = pytest.mark.processes
COLUMNS = "stage heads batch_size world_size length implementation medusa_vocab_size options group peak_gib "
COLUMNS += "resting_gib step_time_s tokens_per_s useful_tflops mfu gpu versions commit command"


@pytest.fixture
def start(lab, tmp_path):
    """Runs the script in a process for each environment, on a CPU: -> what each printed."""

    def run(*flags, environments=({},)):
        logs = [tmp_path / f"{rank}.log" for rank in range(len(environments))]
        common = {"ACCELERATE_USE_CPU": "true"}
        processes = [
            FORK.Process(target=worker.measure, args=(flags, log, common | environment))
            for log, environment in zip(logs, environments, strict=True)
        ]
        for process in processes:
            process.start()
        late, printed = wait(processes), [log.read_text() for log in logs]
        assert not late and not any(process.exitcode for process in processes), (late, *printed)
        return printed

    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_of_eight(stage, start, tmp_path):
    out = tmp_path / "memory.csv"
    flags = ["--heads", "1", "2", "--lengths", "16", "32", "48", "--implementations", "ours", "liger", "hf"]
    (printed,) = start("--stage", stage, *flags, "--out", out)
    models = [list(found) for found in re.findall(r"model (\S+) (\d) (\d)", printed)]
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


def test_offloading_is_for_one_head_after_the_other(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory.py", "--stage", "2", "--offload_activations"])
    with pytest.raises(SystemExit):
        memory.main()
    assert "--implementations ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "fsdp", "implementation", "draft"),
    [(1, 2, "ours", 100), (2, 2, "ours", ""), (1, 1, "hf", 100)],
)
def test_a_real_group(stage, fsdp, implementation, draft, start, tmp_path):
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
    ranks = [variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    printed, _ = start(*flags, environments=ranks)
    rows = rows_of(out)
    assert list(rows[0]) == COLUMNS.split() and [row["length"] for row in rows] == ["16", "24"]
    for row, length in zip(rows, (16, 24), strict=True):
        assert row["group"] == "real" and row["world_size"] == "2" and row["options"] == f"fsdp{fsdp}"
        assert row["medusa_vocab_size"] == str(draft)
        tokens = 2 * int(row["batch_size"]) * length  # of both ranks
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / float(row["step_time_s"]), rel=1e-3)
    losses = [float(loss) for loss in re.findall(r"'head_1_loss': '?([0-9.]+)", printed)]
    assert len(losses) == 4 and losses[1] < losses[0]  # random weights that learn; 0 and 1 are of one length
