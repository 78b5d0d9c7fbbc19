"""Draft trees, the guesses that one pass of the backbone checks: finding the best, files, and the layout as tensors.

A tree is a list of rank paths, known as `medusa_choices`: `[0, 1]` is head 1's best token, then head 2's second best.
The root, the token that the backbone itself has just chosen, is not in the list, so with a tree of N nodes one pass
checks N + 1 tokens. The expected acceptance length is the number of tokens that a pass yields on average:
1 + the sum, over the tree's paths, of the chance that the whole path is right.
"""

import csv
import heapq
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import BadInput
from common.files import read_json, write_atomically

logger = logging.getLogger(__name__)

Choices = list[tuple[int, ...]]  # sorted by (length, path)
Chance = Callable[[tuple[int, ...]], float]  # that the whole path is right; never more than its parent's


def check(choices, num_heads: int | None = None, source: str = "the tree") -> Choices:
    """Checks a tree from outside and sorts it. `[]`, plain decoding, is a tree too. Raises BadInput if it is no list
    of rank paths, repeats a path, lacks a path's parent, or needs more heads than there are."""
    if not isinstance(choices, (list, tuple)):
        raise BadInput(f"{source} must be a list of paths such as [[0], [1], [0, 0]], not {str(choices)[:80]!r}")
    for i, path in enumerate(choices, start=1):
        if not (path and isinstance(path, (list, tuple)) and all(type(rank) is int and rank >= 0 for rank in path)):
            ranks_only = "must be a list of one or more ranks, whole numbers from 0, such as [0, 1]"
            raise BadInput(f"{source}: path {i} of {len(choices)} {ranks_only}, not {str(path)[:80]!r}")
    tree: Choices = []
    for path in sorted(sorted(map(tuple, choices)), key=len):
        problem, parent = None, path[:-1]
        if num_heads is not None and len(path) > num_heads:
            problem = f"a path of depth {len(path)} ({[*path]}), but there are {num_heads} heads: leave it out"
        elif tree and path == tree[-1]:
            problem = f"the path {[*path]} twice: leave one out"
        elif parent and parent not in tree:
            problem = f"the path {[*path]} without its parent {[*parent]}: add the parent"
        if problem:
            raise BadInput(f"{source} has {problem}")
        tree.append(path)
    return tree


def ranks(choices: Choices, tokens: int) -> int:
    """How many guesses of each head the tree has. Raises BadInput for more than the tokens that heads guess."""
    found = 1 + max((rank for choice in choices for rank in choice), default=-1)
    if found > tokens:
        raise BadInput(f"the tree has rank {found - 1}, but heads guess {tokens} tokens: leave it out")
    return found


def read_choices(path, num_heads: int | None = None) -> Choices:
    """Reads a JSON file with the list of lists that the original Medusa and TensorRT-LLM take as medusa_choices."""
    return check(read_json(path), num_heads, source=f"the tree {path}")


def write_choices(choices: Choices, path):
    write_atomically(Path(path), lambda temporary: temporary.write_text(json.dumps(choices) + "\n"))


def chain(num_heads: int) -> Choices:
    """Each head's best token and nothing else: K nodes for K heads."""
    return [(0,) * depth for depth in range(1, num_heads + 1)]


def independent(top: list[list[float]]) -> Chance:
    """Chances if heads are right or wrong independently of each other, as in "Searching for the optimized tree
    construction" of arXiv 2401.10774. top `[K+1][TOP]`: top-1 to top-TOP accuracies; row 0, the lm_head's, is unused.
    """
    # Heads are not independent. But for five heads on SmolLM2, trees built from counts of whole paths yielded no more:
    # 2.27 tokens per pass against 2.25 with 32 nodes, 1.92 against 1.95 with 8. Both promise too much, with 32 nodes
    # the counts by 12 % and these chances by 3 %: a decoder jumps over easy tokens, so most passes start at hard ones.
    exactly = [[upto - before for before, upto in pairwise([0.0, *row])] for row in top[1:]]

    def chance(path):
        share = 1.0 if len(path) <= len(exactly) else 0.0
        for rank, row in zip(path, exactly, strict=False):
            share *= row[rank] if rank < len(row) else 0.0
        return share

    return chance


def best_tree(chance: Chance, num_heads: int, ranks: int, nodes: int) -> Choices:
    """The tree of `nodes` nodes with the highest expected acceptance length, or a smaller one if fewer paths have a
    chance above 0. Of equal chances, shorter paths come first, then lower ranks."""
    # No path has a higher chance than its parent. So the N likeliest paths contain their own parents and form a tree,
    # and no other N paths have a higher sum. The heap yields paths in order of falling chance without listing them
    # all: a path that is not in it yet has an ancestor that is. Chances may rise with the rank, so all children go in.
    tree: Choices = []
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while heap and len(tree) <= nodes:
        _, depth, path = heapq.heappop(heap)
        tree.append(path)
        for child in ((*path, rank) for rank in range(ranks) if depth < num_heads):
            if (share := chance(child)) > 0:
                heapq.heappush(heap, (-share, depth + 1, child))
    return sorted(sorted(tree[1:]), key=len)  # without the root


def expected_length(choices: Choices, chance: Chance) -> float:
    """Expected acceptance length: tokens that one pass yields on average; 1 without a tree."""
    return 1.0 + sum(chance(path) for path in choices)


def fastest(chance: Chance, num_heads: int, ranks: int, step_ms: dict[int, float], lengths: dict | None = None):
    """-> (N, tree, table): the tree size in step_ms that yields most tokens per second, its tree, a row per size.

    step_ms: N -> ms of a pass with N nodes, not empty; 0 is plain decoding. lengths: N -> measured acceptance length.
    Where that is missing, the expected length is used.
    """
    trees = {nodes: best_tree(chance, num_heads, ranks, nodes) for nodes in sorted(step_ms)}
    table = []
    for nodes, tree in trees.items():
        ms, length = step_ms[nodes], (lengths or {}).get(len(tree), expected_length(tree, chance))
        table.append({"nodes": nodes, "step_ms": ms, "length": length, "tokens_per_s": 1000 * length / ms})
    nodes = max(table, key=lambda row: row["tokens_per_s"])["nodes"]  # the smallest of equally fast ones
    return nodes, trees[nodes], table


class Layout(NamedTuple):
    """A tree as tensors for n = N + 1 nodes: node 0 is the root, the others follow in the order of Choices."""

    parent: torch.Tensor  # int64 [n]; the root's is 0
    depth: torch.Tensor  # int64 [n]; the root's is 0
    rank: torch.Tensor  # int64 [n]; the root's is 0
    ancestors: torch.Tensor  # bool [n, n]; [i, j]: j is i or an ancestor of i, so i may attend to j
    path: torch.Tensor  # int64 [n, D+1], D the tree's depth; [i, d]: i's ancestor at depth d, and i itself from there


def layout(choices: Choices) -> Layout:
    """choices must be as `check` returns them."""
    nodes = [(), *choices]
    index = {node: i for i, node in enumerate(nodes)}
    path = torch.tensor([[index[node[:d]] for d in range(len(nodes[-1]) + 1)] for node in nodes])
    return Layout(
        parent=torch.tensor([index[node[:-1]] for node in nodes]),
        depth=torch.tensor([len(node) for node in nodes]),
        rank=torch.tensor([node[-1] if node else 0 for node in nodes]),
        ancestors=torch.zeros(len(nodes), len(nodes), dtype=torch.bool).scatter_(1, path, True),
        path=path,
    )


def for_rows(tree: Layout, batch_size: int, device: torch.device) -> Layout:
    """The same tree for each row of a batch, on a device: `[B, ...]`, of one memory."""
    return Layout(*(part.to(device).expand(batch_size, *part.shape) for part in tree))


def filled_up(tree: Layout, nodes: int) -> Layout:
    """The tree with rows of no meaning behind it, up to `nodes`: each is alone, at the root's depth."""
    alone = torch.arange(len(tree.depth), nodes, device=tree.depth.device)
    zeros = torch.zeros_like(alone)
    return Layout(
        torch.cat([tree.parent, zeros]),
        torch.cat([tree.depth, zeros]),
        torch.cat([tree.rank, zeros]),
        torch.block_diag(tree.ancestors, torch.eye(len(alone), dtype=torch.bool, device=alone.device)),
        torch.cat([tree.path, alone[:, None].expand(-1, tree.path.shape[1])]),
    )


def load_chance(path) -> tuple[Chance, int, int]:
    """-> (chance, heads, ranks) from evaluate.py's JSON. Takes the accuracies on the backbone's own text if there are
    any, because that is the text heads have to guess; else those on the reference text. Raises BadInput for a file
    without accuracies."""
    data = read_json(path)
    try:
        own = (data.get("own") or {}).get("top")
        top = own or data["top"]
        (ranks,) = {len(row) for row in top}
        if len(top) < 2 or not all(0 <= low <= high <= 1 for row in top for low, high in pairwise([0, *row])):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} does not hold the accuracies of heads: make it with evaluate.py") from error
    logger.info("accuracies of the heads: on %s text", "the backbone's own" if own else "the reference")
    return independent(top), len(top) - 1, ranks


def measured_lengths(path) -> dict[int, float]:
    """nodes -> acceptance length of the best trees, as evaluate.py measured it on the backbone's own text; empty if it
    did not."""
    rows = (read_json(path).get("own") or {}).get("acceptance", [])
    return {row["nodes"]: row["length"] for row in rows if row["tree"] == "best" and row["length"]}  # 0: no passes


def measured_temperature(path) -> float:
    """Of the heads, for trees that each pass grows; 1 if evaluate.py did not measure such trees. Raises BadInput for
    what is none."""
    found = (read_json(path).get("own") or {}).get("temperature", 1.0)
    if not isinstance(found, float) or found <= 0:
        raise BadInput(f"{path} has temperature {found!r}, which must be a number above 0: make it with evaluate.py")
    return found


def read_step_times(path) -> dict[int, float]:
    """nodes -> step_ms, from a CSV with these two columns. Raises BadInput for any other file."""
    try:
        with open(path, newline="") as file:
            rows = [(int(row["nodes"]), float(row["step_ms"])) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f"cannot read {path} ({error}): it must be a CSV with columns nodes and step_ms") from error
    if not rows or len(dict(rows)) < len(rows) or any(nodes < 0 or not 0 < ms < float("inf") for nodes, ms in rows):
        raise BadInput(f"{path} must have rows, with nodes from 0, each number once, and step_ms above 0")
    return dict(rows)
