"""benchmark/head_loss.py at tiny sizes: its comparison of losses and gradients. What it measures needs a GPU."""

import pytest
import torch
from conftest import ROOT, TRITON
from csvs import rows_of, run

import model.loss


@pytest.fixture
def head_loss(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    monkeypatch.setattr("model.loss.CHUNK_ROWS", model.loss.CHUNK_ROWS)  # which the benchmark changes
    import head_loss

    return head_loss


@pytest.fixture
def smoke(head_loss, monkeypatch, tmp_path):
    """Runs it without Liger, with another function for `linear_cross_entropy` of impl chunked; returns the rows."""
    monkeypatch.setattr("head_loss.choose_impl", lambda *args: "chunked")

    def run(function):
        def patched(hidden, weight, targets, impl):
            use = function if impl == "chunked" else model.loss.linear_cross_entropy
            return use(hidden, weight, targets, impl)

        monkeypatch.setattr("head_loss.linear_cross_entropy", patched)
        monkeypatch.setattr("sys.argv", ["head_loss.py", "--smoke", "--out", str(tmp_path / "head_loss.csv")])
        head_loss.main()
        return rows_of(tmp_path / "head_loss.csv")

    return run


@TRITON
def test_every_implementation_is_a_row(head_loss, monkeypatch, tmp_path):
    monkeypatch.setattr(head_loss, "WARM_UPS", 0)
    rows = run(head_loss, monkeypatch, "--smoke", "--repeats", 1, "--out", tmp_path / "out.csv")
    assert [(row["rows"], row["implementation"], row["chunk_rows"]) for row in rows] == [
        ("64", "torch, all logits", "64"),
        ("64", "liger, default chunks", "8"),
        ("64", "liger, 16 rows a chunk", "16"),
        ("64", "liger, 32 rows a chunk", "32"),
        ("64", "chunked plain torch, 2048", "64"),
        ("128", "torch, all logits", "128"),
        ("128", "liger, default chunks", "16"),
        ("128", "liger, 16 rows a chunk", "16"),
        ("128", "liger, 32 rows a chunk", "32"),
        ("128", "chunked plain torch, 2048", "128"),
    ]
    columns = (
        "rows loss implementation chunk_rows ms tflops extra_gib loss_error grad_error gpu versions commit command"
    )
    assert list(rows[0]) == columns.split()
    for row in rows:
        assert float(row["ms"]) > 0 and float(row["loss_error"]) < 1e-3
        assert 0 < float(row["grad_error"]) < 2e-2  # bf16 against fp32: small, but not nothing


@pytest.mark.parametrize("factor", [1.03, float("nan")])
def test_a_wrong_gradient_ends_the_run(factor, smoke):
    def wrong(*args):
        loss, correct = model.loss.linear_cross_entropy(*args)
        return loss.detach() + factor * (loss - loss.detach()), correct  # the right loss, but for NaN

    with pytest.raises(SystemExit, match="chunked, 64 rows: not what plain torch computes"):
        smoke(wrong)


def test_out_of_memory_is_a_row(smoke):
    def run_out(*args):
        raise torch.OutOfMemoryError("from the test")

    rows = smoke(run_out)
    assert [row["extra_gib"] for row in rows] == ["0.00", "OOM", "0.00", "OOM"]
    assert [row["ms"] == "" for row in rows] == [False, True, False, True]


@TRITON
@pytest.mark.parametrize("asked", [1, 16, 32, 64])
def test_rows_in_ligers_chunks(asked, head_loss, monkeypatch):
    name, chunks = "liger_kernel.ops.fused_linear_cross_entropy.liger_cross_entropy_kernel", []
    from liger_kernel.ops.fused_linear_cross_entropy import liger_cross_entropy_kernel as kernel

    class Recorded:
        def __getitem__(self, grid):
            chunks.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(name, Recorded())
    monkeypatch.setattr("model.loss.CHUNK_ROWS", asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head_loss.forward_backward(*head_loss.make_inputs(head_loss.TINY, 72, device), "liger")
    assert max(chunks) == head_loss.liger_chunk(asked, 72, head_loss.TINY)
    assert sum(chunks) == 72
