"""decoding/tree.py: the trees are the best there are, and their tensors say what the list of paths says."""

import json
import random
from itertools import combinations, product

import pytest
import torch

from common.errors import BadInput
from decoding import tree as draft_tree
from decoding.tree import best_tree, chain, check, expected_length, fastest, independent, layout

TOP = [  # [K+1][ranks]; head 2 is more often right with its third guess than with its second
    [1.0, 1.0, 1.0],
    [0.5, 0.7, 0.8],
    [0.4, 0.45, 0.6],
]


def all_paths(num_heads, ranks):
    return [path for depth in range(1, num_heads + 1) for path in product(range(ranks), repeat=depth)]


def all_trees(num_heads, ranks, nodes):
    """Every set of `nodes` paths that holds the parent of each."""
    for paths in combinations(all_paths(num_heads, ranks), nodes):
        if all(len(path) == 1 or path[:-1] in paths for path in paths):
            yield list(paths)


def random_top(rng, num_heads, ranks):
    """Accuracies `[K+1][ranks]` that grow by a random amount from rank to rank, in no order."""
    parts = [[rng.random() for _ in range(ranks + 1)] for _ in range(num_heads + 1)]
    return [[sum(row[: r + 1]) / sum(row) for r in range(ranks)] for row in parts]


def random_chance(rng, num_heads, ranks):
    """Chances that no product of accuracies gives: each path has a random share of its parent's."""
    shares = {(): 1.0}
    for path in all_paths(num_heads, ranks):
        shares[path] = shares[path[:-1]] * rng.random()
    return shares.__getitem__


def random_tree(rng, num_heads, ranks, nodes):
    tree = [()]
    while len(tree) <= nodes:
        child = (*rng.choice(tree), rng.randrange(ranks))
        if len(child) <= num_heads and child not in tree:
            tree.append(child)
    return check(tree[1:])


@pytest.mark.parametrize("model", ["independent", "any"])
@pytest.mark.parametrize("num_heads, ranks", [(1, 5), (2, 3), (3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_no_tree_of_this_size_is_better(model, num_heads, ranks, seed):
    rng = random.Random(seed)
    if model == "independent":
        chance = independent(random_top(rng, num_heads, ranks))
    else:
        chance = random_chance(rng, num_heads, ranks)
    for nodes in range(6):
        tree = best_tree(chance, num_heads, ranks, nodes)
        assert len(tree) == nodes and check(tree, num_heads) == tree
        best = max(expected_length(other, chance) for other in all_trees(num_heads, ranks, nodes))
        assert expected_length(tree, chance) == pytest.approx(best, abs=1e-12)


def test_the_chances_are_those_of_the_model():
    chance = independent(TOP)
    assert chance((0,)) == 0.5
    assert chance((2, 1)) == pytest.approx(0.1 * 0.05)
    assert [chance(path) for path in ((3,), (0, 3), (0, 0, 0))] == [0, 0, 0]  # no such rank, no such head


def test_if_only_the_first_guess_is_ever_right_the_best_tree_is_the_chain():
    chance = independent([[1.0] * 10, [0.6] * 10, [0.5] * 10, [0.1] * 10])
    assert chain(3) == [(0,), (0, 0), (0, 0, 0)]
    assert best_tree(chance, 3, 10, 3) == chain(3)
    assert best_tree(chance, 3, 10, 50) == chain(3)  # no other path has a chance
    assert best_tree(chance, 2, 10, 50) == chain(2)  # only two heads, although the third would be right


def test_of_equal_chances_short_paths_and_low_ranks_come_first():
    def always(path):
        return 1.0

    assert best_tree(always, 3, 2, 3) == [(0,), (1,), (0, 0)]
    assert best_tree(always, 3, 2, 14) == all_paths(3, 2)


def test_expected_length_is_what_a_simulation_yields():
    """Tokens of one pass: the root and the longest path of the tree whose guesses are all right."""
    rng, tree = random.Random(0), check([[0], [1], [2], [0, 0], [0, 2], [1, 0]])
    tokens, passes = 0, 40_000
    for _ in range(passes):
        draws = [rng.random() for _ in TOP[1:]]
        right = tuple(sum(draw >= share for share in row) for draw, row in zip(draws, TOP[1:], strict=True))
        tokens += 1 + max((len(path) for path in tree if path == right[: len(path)]), default=0)
    length = expected_length(tree, independent(TOP))
    assert length == pytest.approx(1 + 0.5 + 0.2 + 0.1 + 0.5 * (0.4 + 0.15) + 0.2 * 0.4)
    assert tokens / passes == pytest.approx(length, abs=0.015)  # three standard errors


@pytest.mark.parametrize(
    "step_ms, fast",
    [
        ({0: 10.0, 2: 10.1, 4: 10.2, 8: 30.0}, 4),  # a tree is almost free until it is not
        ({8: 30.0, 4: 10.2, 2: 10.1, 0: 10.0}, 4),  # in any order
        ({0: 10.0, 2: 11.0, 4: 20.0}, 2),
        ({0: 10.0, 2: 30.0, 4: 40.0}, 0),
        ({4: 10.0, 2: 30.0}, 4),
    ],
)
def test_the_fastest_size(step_ms, fast):
    chance = independent(TOP)
    nodes, tree, table = fastest(chance, 2, 3, step_ms)
    assert (nodes, tree) == (fast, best_tree(chance, 2, 3, fast))
    assert [row["nodes"] for row in table] == sorted(step_ms)
    for row in table:
        length = 1.0 if row["nodes"] == 0 else expected_length(best_tree(chance, 2, 3, row["nodes"]), chance)
        assert (row["step_ms"], row["length"]) == (step_ms[row["nodes"]], length)
        assert row["tokens_per_s"] == pytest.approx(length / (row["step_ms"] / 1000))


def test_a_size_that_yields_no_more_is_not_faster():
    nodes, tree, _ = fastest(independent([[1.0], [0.5], [0.5]]), 2, 1, {64: 10.0, 2: 10.0})
    assert (nodes, tree) == (2, chain(2))


def test_lengths_that_were_measured_count():
    """Expected is 1.9 for the chain of two; measured, it yields less than plain decoding in the same time."""
    chance = independent([[1.0], [0.6], [0.5]])
    step_ms, lengths = {0: 10.0, 1: 11.0, 2: 14.0}, {2: 1.3, 8: 9.0}
    assert fastest(chance, 2, 1, step_ms)[0] == 1
    assert [row["length"] for row in fastest(chance, 2, 1, step_ms, {})[2]] == pytest.approx([1, 1.6, 1.9])
    _, _, table = fastest(chance, 2, 1, step_ms, lengths)
    assert [row["length"] for row in table] == pytest.approx([1, 1.6, 1.3])
    assert fastest(chance, 2, 1, {0: 10.0, 2: 14.0})[0] == 2
    assert fastest(chance, 2, 1, {0: 10.0, 2: 14.0}, lengths)[:2] == (0, [])
    # asked for 8 nodes there are only two paths with a chance, and of such a tree the length was measured
    assert fastest(chance, 2, 1, {8: 14.0}, lengths)[2][0]["length"] == 1.3


def test_written_as_the_original_writes_it(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text("[[0], [0, 0], [1], [0, 1], [0, 0, 0], [1, 0]]")
    tree = draft_tree.read_choices(file, num_heads=3)
    assert tree == [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    draft_tree.write_choices(tree, str(file))
    assert file.read_text() == "[[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]\n"
    assert draft_tree.read_choices(str(file)) == tree
    draft_tree.write_choices([], file)
    assert draft_tree.read_choices(file, num_heads=0) == []


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"0": 1}, "the tree must be a list of paths such as [[0], [1], [0, 0]], not \"{'0': 1}\""),
        ("[[0]]", "the tree must be a list of paths such as [[0], [1], [0, 0]], not '[[0]]'"),
        ([[0], 1], "the tree: path 2 of 2 must be a list of one or more ranks"),
        ([[0], []], "the tree: path 2 of 2 must be a list of one or more ranks"),
        ([[-1]], "the tree: path 1 of 1 must be a list of one or more ranks"),
        ([[0.0]], "whole numbers from 0, such as [0, 1], not '[0.0]'"),
        ([[False]], "whole numbers from 0, such as [0, 1], not '[False]'"),
        (["0"], "the tree: path 1 of 1 must be a list of one or more ranks"),
        ([[0], [0, 1], [0]], "the tree has the path [0] twice: leave one out"),
        ([[0], [1, 0]], "the tree has the path [1, 0] without its parent [1]: add the parent"),
        ([[0], [0, 0, 0]], "the tree has the path [0, 0, 0] without its parent [0, 0]: add the parent"),
        (chain(4), "the tree has a path of depth 4 ([0, 0, 0, 0]), but there are 3 heads: leave it out"),
    ],
)
def test_a_tree_that_is_none(choices, message):
    with pytest.raises(BadInput) as error:
        check(choices, num_heads=3)
    assert message in str(error.value)


def test_what_is_just_allowed():
    assert check([*chain(3), [4]], num_heads=3) == [(0,), (4,), (0, 0), (0, 0, 0)]
    assert check([], num_heads=0) == []


def test_a_tree_file_that_is_none(tmp_path):
    file = tmp_path / "tree.json"
    with pytest.raises(BadInput, match=f"cannot read {file}: .*No such file"):
        draft_tree.read_choices(file)
    file.write_text("[[0], [1]")
    with pytest.raises(BadInput, match=f"cannot read {file}: .*delimiter"):
        draft_tree.read_choices(file)
    file.write_text("[[0], [0, 0]]")
    with pytest.raises(BadInput, match=f"the tree {file} has a path of depth 2 .*there are 1 heads"):
        draft_tree.read_choices(file, num_heads=1)


@pytest.mark.parametrize("seed", range(5))
def test_layout_is_the_tree(seed):
    tree = random_tree(random.Random(seed), num_heads=4, ranks=4, nodes=20)
    nodes, found = [(), *tree], layout(tree)
    deepest = max(map(len, tree))
    assert found.path.shape == (21, deepest + 1) and found.ancestors.shape == (21, 21)
    assert [tensor.dtype for tensor in found] == [torch.int64] * 3 + [torch.bool, torch.int64]
    for i, node in enumerate(nodes):
        assert found.depth[i] == len(node)
        assert nodes[found.parent[i]] == node[:-1]
        assert found.rank[i] == (node[-1] if node else 0)
        above = [node[: len(other)] == other for other in nodes]
        assert found.ancestors[i].tolist() == above and sum(above) == len(node) + 1
        for d in range(deepest + 1):
            assert found.path[i, d] == (nodes.index(node[:d]) if d <= len(node) else i)


def test_layout_of_plain_decoding_is_the_root():
    found = layout([])
    assert [tensor.tolist() for tensor in found] == [[0], [0], [0], [[True]], [[0]]]


OWN_TOP = [[1.0, 1.0, 1.0], [0.6, 0.75, 0.8], [0.3, 0.4, 0.5]]
ACCEPTANCE = [
    {"tree": "chain", "nodes": 2, "length": 1.7, "expected": 1.78},
    {"tree": "best", "nodes": 4, "length": 1.75, "expected": 1.99},
    {"tree": "best", "nodes": 12, "length": 2.1, "expected": 2.2},
]


@pytest.mark.parametrize(
    "more, want",
    [({"own": {"top": OWN_TOP}}, 0.6 * 0.1), ({}, 0.5 * 0.15), ({"own": None}, 0.5 * 0.15), ({"own": {}}, 0.5 * 0.15)],
)
def test_which_accuracies_are_read(tmp_path, more, want):
    file = tmp_path / "accuracy.json"
    file.write_text(json.dumps({"heads": "out/heads", "rows": [9, 9, 9], "top": TOP, "before": TOP} | more))
    chance, num_heads, ranks = draft_tree.load_chance(file)
    assert chance((0, 2)) == pytest.approx(want)
    assert (num_heads, ranks) == (2, 3)
    assert draft_tree.measured_lengths(file) == {}


def test_which_lengths_are_read(tmp_path):
    """Of the best trees alone; 0 stands where there was no pass to measure."""
    file = tmp_path / "accuracy.json"
    rows = [*ACCEPTANCE, {"tree": "best", "nodes": 63, "length": 0, "expected": 2.3}]
    file.write_text(json.dumps({"top": TOP, "own": {"top": OWN_TOP, "acceptance": rows}}))
    assert draft_tree.measured_lengths(file) == {4: 1.75, 12: 2.1}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"rows": [1, 2]},
        {"top": []},
        {"top": [[0.5, 0.6]]},  # the lm_head's alone
        {"top": [[0.5, 0.6], [0.5]]},
        {"top": [[0.5, 0.6], [0.5, 1.1]]},
        {"top": [[0.5, 0.6], [0.5, float("nan")]]},
        {"top": [[0.5, 0.6], [0.5, 0.4]]},  # not cumulative
        {"top": [[0.5, 0.6], [0.5, "0.6"]]},
        {"top": TOP, "own": {"top": [[0.5, 0.6], [0.5]]}},
        {"top": TOP, "own": [3]},
    ],
)
def test_a_file_without_accuracies(tmp_path, data):
    file = tmp_path / "accuracy.json"
    file.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=f"{file} does not hold the accuracies of heads: make it with evaluate.py"):
        draft_tree.load_chance(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must have rows"),
        ("nodes,step_ms\n", "must have rows, with nodes from 0, each number once, and step_ms above 0"),
        ("nodes,ms\n0,10\n", r"\('step_ms'\): it must be a CSV with columns nodes and step_ms"),
        ("nodes,step_ms\n0,fast\n", r"could not convert .* it must be a CSV with columns nodes and step_ms"),
        ("nodes,step_ms\n0\n", "it must be a CSV with columns nodes and step_ms"),
        ("nodes,step_ms\n0,0\n", "step_ms above 0"),
        ("nodes,step_ms\n0,nan\n", "step_ms above 0"),
        ("nodes,step_ms\n0,inf\n", "step_ms above 0"),
        ("nodes,step_ms\n-1,5\n", "nodes from 0"),
        ("nodes,step_ms\n4,5\n4,6\n", "each number once"),
    ],
)
def test_step_times_that_are_none(tmp_path, text, message):
    file = tmp_path / "times.csv"
    with pytest.raises(BadInput, match=f"cannot read {file} .*No such file"):
        draft_tree.read_step_times(file)
    file.write_text(text)
    with pytest.raises(BadInput, match=f"{file}.*{message}"):
        draft_tree.read_step_times(file)
