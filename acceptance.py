"""How many tokens does a pass yield with a tree of guesses? Counted on texts that the backbone itself wrote greedily.

Greedy decoding with a tree is deterministic: a pass stands behind a token the backbone has chosen, the root, and
accepts the guesses that are the text's next tokens. So the ranks that the heads give to the tokens of a text say what
a decoder would yield on it, for any tree and without decoding.

A text is here a list of paths, one for each of its tokens but the last, which needs no pass: the longest path that is
right if that token is the root, as ranks of head 1, 2, ... The first token comes from reading the prompt.
"""

from collections import Counter
from itertools import takewhile

from medusa_tree import Choices, best_tree, chain, from_counts, independent

TOP = 10  # ranks 0..TOP-1 are told apart; TOP: not among the TOP best
NO_TOKEN = -1  # in the place of a rank: the text ends before that head's token
MOST_PATHS = 1000
NODES = (4, 8, 16, 32, 64)

Path = tuple[int, ...]


def right_path(ranks: list[int]) -> Path:
    """Of a row's ranks, head 1 first, those before the first guess that is not in reach: the longest right path."""
    return tuple(takewhile(lambda rank: 0 <= rank < TOP, ranks))


def path_shares(texts: list[list[Path]], most: int = MOST_PATHS) -> list[tuple[Path, float]]:
    """The share of rows at which all of a path is right, for the `most` frequent paths, the most frequent first.

    One denominator for all depths, the rows at which head 1 has a token to guess: so no path has a larger share than
    its parent, and a path's parent comes before it.
    """
    counts = Counter(path[:depth] for text in texts for path in text for depth in range(1, len(path) + 1))
    rows = sum(map(len, texts))
    frequent = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:most]
    return [(path, counts[path] / rows) for path in frequent]


def acceptance_length(choices: Choices, texts: list[list[Path]]) -> float:
    """Tokens per pass of greedy decoding with this tree, over all texts, as a decoder measures it: tokens after the
    first / passes after the prompt's. A text's end cuts its last pass short. 0 where there is no pass."""
    tree, passes = set(choices), 0
    for text in texts:
        root = 0
        while root < len(text):
            path = text[root]
            accepted = next((depth for depth in range(len(path), 0, -1) if path[:depth] in tree), 0)
            root += accepted + 1  # ... and the backbone's token behind them, the next root
            passes += 1
    return sum(map(len, texts)) / max(1, passes)


def acceptance(choose: list[list[Path]], top: list[list[float]], measure: list[list[Path]]) -> list[dict]:
    """-> [{"tree", "nodes", "length"}, ...]: tokens per pass on the texts `measure` with the chain and with the best
    trees of 4 to 64 nodes. Those are chosen for the texts `choose`, "joint" by how often whole paths are right there,
    "independent" by the heads' accuracies `top` `[K+1][TOP]` there. Where fewer paths than nodes are ever right, the
    tree that has them all is the last one."""
    num_heads = len(top) - 1
    trees = [("chain", chain(num_heads))]
    for name, chance in (("joint", from_counts(path_shares(choose))), ("independent", independent(top))):
        by_size = {len(tree): tree for tree in (best_tree(chance, num_heads, TOP, nodes) for nodes in NODES)}
        trees += [(name, tree) for tree in by_size.values()]
    return [{"tree": name, "nodes": len(tree), "length": acceptance_length(tree, measure)} for name, tree in trees]
