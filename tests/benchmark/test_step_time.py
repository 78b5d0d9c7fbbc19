"""benchmark/step_time.py on a CPU: its rows, and the sizes that fail."""

import sys

import pytest
import step_time
import torch
from csvs import rows_of

from decoding.decoder import Decoder
from decoding.tree import read_step_times

pytestmark = pytest.mark.usefixtures("plain_torch")
STEP_TIME = (
    "date commit model heads head_type prefix adaptive medusa_vocab_size nodes length batch_size agree step_ms "
)
STEP_TIME += "plain_ms ratio_to_plain floor_ms heads_floor_ms bandwidth_tb_s weight_gb heads_gb cache_gb error gpu "
STEP_TIME += "versions command"


def test_step_times(time_steps, tmp_path):
    rows = time_steps("--heads", 2, "--nodes", 8, 1, "--length", 20)
    assert [list(row) for row in rows] == [STEP_TIME.split()] * 3
    assert [row["nodes"] for row in rows] == ["0", "1", "8"]
    for row in rows:
        assert row["plain_ms"] == rows[0]["step_ms"] and row["versions"].startswith("python ") and not row["error"]
        assert float(row["ratio_to_plain"]) == pytest.approx(float(row["step_ms"]) / float(row["plain_ms"]), rel=1e-3)
    # bf16. Two layers: q and o 32 x 32, k and v 32 x 16, MLP 3 x 32 x 48, two norms; a norm; an lm_head of 320 x 32.
    weights = 2 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32 + 320 * 32)
    head, cache = 2 * (32 * 32 + 32 + 320 * 32), 2 * 2 * 2 * 16 * 20  # keys and values, 2 bytes, 2 layers, 16 numbers
    for row, heads in zip(rows, (0, 1, 2), strict=True):
        assert float(row["weight_gb"]) == pytest.approx(weights / 1e9, abs=1e-6)
        assert float(row["heads_gb"]) == pytest.approx(heads * head / 1e9, abs=1e-6)
        assert float(row["cache_gb"]) == pytest.approx(cache / 1e9, abs=1e-6)
        assert float(row["floor_ms"]) == pytest.approx(weights / 2e6 * 1e3, rel=1e-4)
        assert float(row["heads_floor_ms"]) == pytest.approx(heads * head / 2e6 * 1e3, rel=1e-4)
    assert read_step_times(tmp_path / "steps.csv").keys() == {0, 1, 8}


def test_heads_of_fewer_tokens(time_steps):
    rows = time_steps("--heads", 2, "--nodes", 8, "--length", 20, "--medusa_vocab_size", 48)
    assert [row["medusa_vocab_size"] for row in rows] == ["48", "48"] and not any(row["error"] for row in rows)
    assert float(rows[1]["heads_gb"]) == pytest.approx(2 * 2 * (32 * 32 + 32 + 48 * 32) / 1e9, abs=1e-6)
    with pytest.raises(SystemExit, match="--medusa_vocab_size 320: from 1 to 319 tokens"):
        time_steps("--medusa_vocab_size", 320)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_passes_that_agree_need_a_gpu(time_steps, tmp_path):
    with pytest.raises(SystemExit, match="1 sizes failed"):
        time_steps("--nodes", 0, "--length", 10, "--agree")
    assert ["True", "BadInput: --agree needs a GPU"] in [
        [row["agree"], row["error"].split(",")[0]] for row in rows_of(tmp_path / "steps.csv")
    ]


def test_heads_of_another_type_and_what_is_before_them(time_steps):
    """Of 32 columns and 320 tokens: markov heads read 256 numbers of their table beside the hidden state, hydra heads
    one and two embeddings. A prefix layer has the weights of a layer of the backbone."""
    block, tokens = 32 * 32 + 32, 320
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    sizes = {"markov": 2 * (block + tokens * (32 + 256)), "hydra": 2 * (block + tokens * 32) + 3 * 32 * 32 + layer}
    for kind, flags in (("markov", ("--adaptive", 3)), ("hydra", ("--medusa_prefix_layer",))):
        (*_, row) = time_steps("--heads", 2, "--nodes", 8, "--length", 20, "--medusa_head_type", kind, *flags)
        assert (row["head_type"], row["nodes"], row["error"]) == (kind, "8", "") and float(row["step_ms"]) > 0
        assert (row["adaptive"], row["prefix"]) == (("3", "") if kind == "markov" else ("", "True"))
        assert float(row["heads_gb"]) == pytest.approx(2 * sizes[kind] / 1e9, abs=1e-6)


def test_trees_of_several_numbers_of_heads(time_steps):
    rows = time_steps("--heads", 1, 3, "--nodes", 4, 16, "--length", 10)
    assert [(row["heads"], row["nodes"]) for row in rows] == [
        ("3", "0"), ("3", "4"), ("3", "16"), ("1", "4"), ("1", "10"),
    ]  # fmt: skip
    read = [float(row["heads_gb"]) for row in rows]
    assert 0 == read[0] < read[3] == read[4] < read[2]
    assert {row["plain_ms"] for row in rows} == {rows[0]["step_ms"]}


def test_each_length_has_its_own_plain_pass(time_steps, monkeypatch):
    """A pass of n nodes that takes n + 1 ms per token of the prompt; every third measurement is an outlier."""
    calls = []

    def step_ms(self, prompt, passes):
        calls.append((passes, len(self.tokens), self.max_length - len(prompt)))
        return len(prompt) * self.nodes * (100 if len(calls) % 3 == 0 else 1)

    monkeypatch.setattr(Decoder, "step_ms", step_ms)
    rows = time_steps("--nodes", 0, 4, "--length", 10, 30, "--passes", 7, "--batch_size", 2)
    assert [float(row["step_ms"]) for row in rows] == [10, 50, 30, 150]
    assert [float(row["plain_ms"]) for row in rows] == [10, 10, 30, 30]
    assert [float(row["ratio_to_plain"]) for row in rows] == [1, 5, 1, 5]
    assert calls == [(7, 2, step_time.ANSWER)] * 12


def test_a_size_that_fails_is_a_row_and_the_next_one_runs(time_steps, monkeypatch):
    step_ms = Decoder.step_ms

    def full(self, prompt, passes):
        if self.nodes == (5 if len(prompt) == 10 else 1):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        return step_ms(self, prompt, passes)

    monkeypatch.setattr(Decoder, "step_ms", full)
    with pytest.raises(SystemExit, match="2 sizes failed: see the column error"):
        time_steps("--nodes", 4, 8, "--length", 10, 11)
    rows = rows_of(sys.argv[-1])
    assert [row["nodes"] for row in rows if row["error"]] == ["4", "0"]
    assert {row["error"] for row in rows} == {"", "OutOfMemoryError: CUDA out of memory."}
    assert [bool(row["step_ms"]) for row in rows] == [True, False, True, False, True, True]
    assert [bool(row["ratio_to_plain"]) for row in rows] == [True, False, True, False, False, False]


def test_trees_are_of_the_published_accuracies():
    for top1, top5 in zip(step_time.TOP1, step_time.TOP5, strict=True):
        rows = step_time.shares(top1, top5)
        steps = [b - a for a, b in zip([0, *rows], rows, strict=False)]
        assert rows[0] == pytest.approx(top1) and rows[4] == pytest.approx(top5) and rows[-1] < 1
        assert steps == pytest.approx([top1 * (steps[1] / steps[0]) ** rank for rank in range(10)])
    # 0.56 x 0.316 = 0.18 is more than head 1's second guess, 0.16, so the second node goes deeper
    assert step_time.tree(5, 2) == [(0,), (0, 0)] and step_time.tree(5, 3) == [(0,), (1,), (0, 0)]


def test_more_nodes_than_a_tree_can_have_are_refused(time_steps, capsys):
    with pytest.raises(SystemExit):
        time_steps("--heads", 1, "--nodes", 11)
    assert "--nodes 11: trees of 1 heads and 10 ranks have 10 nodes" in capsys.readouterr().err


def test_bandwidth_counts_what_is_read_and_written(monkeypatch):
    """A clock that says a second for each copy of 2^27 bytes."""
    clock = iter(range(100))
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(clock))
    assert step_time.bandwidth(torch.device("cpu")) == 2 * 2**27
