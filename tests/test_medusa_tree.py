"""medusa_tree.py: the command prints and writes the tree that decoding/tree.py finds."""

import json
import sys

import pytest

import medusa_tree
from common.errors import BadInput

TOP = [[1.0, 1.0, 1.0], [0.5, 0.7, 0.8], [0.4, 0.45, 0.6]]  # [K+1][ranks]
OWN_TOP = [[1.0, 1.0, 1.0], [0.6, 0.75, 0.8], [0.3, 0.4, 0.5]]
ACCEPTANCE = [
    {"tree": "chain", "nodes": 2, "length": 1.7, "expected": 1.78},
    {"tree": "best", "nodes": 4, "length": 1.75, "expected": 1.99},
    {"tree": "best", "nodes": 12, "length": 2.1, "expected": 2.2},
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script on a file of figures -> (what it prints, the tree it writes)."""
    figures, output = tmp_path / "accuracy.json", tmp_path / "trees" / "tree.json"
    figures.write_text(json.dumps({"top": TOP, "own": {"top": OWN_TOP, "acceptance": ACCEPTANCE}}))

    def run(*flags, figures=figures):
        argv = ["medusa_tree.py", figures, *flags, "--output", output]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        medusa_tree.main()
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


def test_main_finds_prints_and_writes_a_tree(run):
    out, tree = run("--nodes", 3)
    assert tree == [[0], [1], [0, 0]]
    assert f"expected acceptance length: {1 + 0.6 + 0.15 + 0.18:.3f} tokens per pass\n" in out
    assert "3 nodes of at most 3; per depth: 2, 1\n" in out


def test_main_says_when_the_tree_is_smaller(run):
    out, tree = run("--nodes", 32)
    assert len(tree) == 3 + 3 * 3 and {len(path) for path in tree} == {1, 2}
    assert "12 nodes of at most 32; per depth: 3, 9\n" in out


@pytest.mark.parametrize("tree_ms, want", [(12.5, [[0], [1], [0, 0], [0, 1]]), (20, [])])
def test_main_finds_the_fastest(run, tmp_path, tree_ms, want):
    """With the lengths that were measured, where they were."""
    times = tmp_path / "times.csv"
    times.write_text(f"gpu,nodes,step_ms\nx,0,10\nx,2,40\nx,4,{tree_ms}\n")
    out, tree = run("--step_times", times)
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert lines[0] == ["nodes", "step_ms", "length", "tokens_per_s"]
    assert lines[2] == ["0", "10.000", "1.000", "100.000"]
    assert lines[3][:3] == ["2", "40.000", f"{1 + 0.6 + 0.18:.3f}"]  # was not measured
    assert lines[4] == ["4", f"{tree_ms:.3f}", "1.750", f"{1750 / tree_ms:.3f}"]
    assert sorted(tree) == sorted(want)
    assert ("per depth: none" in out) == (want == [])


def test_main_refuses(run, tmp_path):
    with pytest.raises(BadInput, match=r"cannot read .*missing.json: .*No such file"):
        run("--nodes", 3, figures=tmp_path / "missing.json")
    with pytest.raises(BadInput, match=r"--nodes -1: a tree has 0 nodes or more"):
        run("--nodes=-1")
    with pytest.raises(SystemExit):
        run()  # neither --nodes nor --step_times
