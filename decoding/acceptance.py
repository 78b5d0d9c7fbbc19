"""The acceptance length of a draft tree, counted on texts that the backbone wrote greedily, without decoding them.

Greedy decoding is deterministic. A pass starts at the root, a token that the backbone has chosen, and accepts the
guesses that are the next tokens of the text. So the ranks of the text's tokens under the heads are enough to tell what
a decoder would yield on it, with any tree.

A text is a list of rank paths here, one per token: the longest right path if that token is the root, as ranks under
head 1, 2, ... The last token has none, because no pass follows it. The prefill yields the first token.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import TypeVar

from decoding.tree import Choices, best_tree, chain, independent

TOP = 10  # ranks 0..TOP-1 are counted separately; TOP stands for all others
NO_TOKEN = -1  # instead of a rank: the text ends before that head's token
NODES = (4, 8, 16, 32, 63)  # 63 guesses and the root fill a tile of 64 rows

RankPath = tuple[int, ...]
Item = TypeVar("Item")


def right_path(ranks: list[int]) -> RankPath:
    """The longest right path: a row's ranks, head 1 first, up to the first that is not among the TOP best."""
    return tuple(takewhile(lambda rank: 0 <= rank < TOP, ranks))


def starts(texts: list[list[Item]], accepted: Callable[[Item], int]) -> list[Item]:
    """Of all tokens of the texts, those that are roots of a decoder's passes. accepted: how many guesses a pass would
    accept there."""
    found = []
    for text in texts:
        root = 0
        while root < len(text):
            found.append(text[root])
            root += accepted(text[root]) + 1  # the backbone's own token follows the accepted ones: the next root
    return found


def acceptance_length(choices: Choices, texts: list[list[RankPath]]) -> float:
    """Tokens per pass of greedy decoding with this tree over all texts. As in a real run, the prefill and its token do
    not count, and a text's end cuts its last pass short. 0 if there is no pass."""
    tree = set(choices)
    roots = starts(texts, lambda path: next((d for d in range(len(path), 0, -1) if path[:d] in tree), 0))
    return sum(map(len, texts)) / max(1, len(roots))


def acceptance(top: list[list[float]], texts: list[list[RankPath]], chosen_on: list[list[RankPath]]) -> list[dict]:
    """-> [{"tree", "nodes", "length", "expected"}, ...] for the chain and the best trees of 4 to 63 nodes. `top`
    `[K+1][TOP]` are the accuracies that the trees are built from. length: counted on the texts; expected: on those
    that `top` is of. If fewer paths than nodes have a chance above 0, the largest tree holds them all."""
    chance, num_heads = independent(top), len(top) - 1
    best = {len(tree): tree for tree in (best_tree(chance, num_heads, TOP, nodes) for nodes in NODES)}
    rows = []
    for name, tree in [("chain", chain(num_heads)), *(("best", tree) for tree in best.values())]:
        length, expected = acceptance_length(tree, texts), acceptance_length(tree, chosen_on)
        rows.append({"tree": name, "nodes": len(tree), "length": length, "expected": expected})
    return rows
