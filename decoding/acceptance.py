"""How many tokens does a pass yield with a tree of guesses? Counted on texts that the backbone itself wrote greedily.

Greedy decoding with a tree is deterministic: a pass stands behind a token the backbone has chosen, the root, and
accepts the guesses that are the text's next tokens. So the ranks that the heads give to the tokens of a text say what
a decoder would yield on it, for any tree and without decoding.

A text is here a list of paths, one for each of its tokens but the last, which needs no pass: the longest path that is
right if that token is the root, as ranks of head 1, 2, ... The first token comes from reading the prompt.
"""

from itertools import takewhile

from decoding.tree import Choices, best_tree, chain, expected_length, independent

TOP = 10  # ranks 0..TOP-1 are told apart; TOP: not among the TOP best
NO_TOKEN = -1  # in the place of a rank: the text ends before that head's token
NODES = (4, 8, 16, 32, 63)  # 63 guesses and the root fill a tile of 64 rows

RankPath = tuple[int, ...]


def right_path(ranks: list[int]) -> RankPath:
    """Of a row's ranks, head 1 first, those before the first guess that is not in reach: the longest right path."""
    return tuple(takewhile(lambda rank: 0 <= rank < TOP, ranks))


def acceptance_length(choices: Choices, texts: list[list[RankPath]]) -> float:
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


def acceptance(top: list[list[float]], texts: list[list[RankPath]]) -> list[dict]:
    """-> [{"tree", "nodes", "length", "expected"}, ...]: tokens per pass on these texts, and as expected, of the chain
    and of the best trees of 4 to 63 nodes for the accuracies `top` `[K+1][TOP]`. Where fewer paths than nodes have a
    chance, the tree that has them all is the last one."""
    chance, num_heads = independent(top), len(top) - 1
    best = {len(tree): tree for tree in (best_tree(chance, num_heads, TOP, nodes) for nodes in NODES)}
    rows = []
    for name, tree in [("chain", chain(num_heads)), *(("best", tree) for tree in best.values())]:
        length, expected = acceptance_length(tree, texts), expected_length(tree, chance)
        rows.append({"tree": name, "nodes": len(tree), "length": length, "expected": expected})
    return rows
