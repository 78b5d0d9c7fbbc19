"""Which guesses should one pass of the backbone check? Finds the best draft tree for the accuracies of trained heads.

    python evaluate.py out/heads --data_path chats.jsonl --eval_holdout 500
    python medusa_tree.py out/heads/accuracy.json --nodes 32 --output tree.json

The tree is written as a JSON list of rank paths, known as `medusa_choices`; decoding/tree.py explains it. generate.py
chooses a tree by itself: this is for one to look at, or to take to another program.
"""

import argparse
from collections import Counter
from pathlib import Path

from common import errors, terminal
from common.errors import BadInput
from common.terminal import markdown
from decoding.tree import (
    best_tree,
    expected_length,
    fastest,
    load_chance,
    measured_lengths,
    read_step_times,
    write_choices,
)


def main():
    terminal.start()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("accuracies", help="the JSON that evaluate.py wrote")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--nodes", type=int, help="the size of the tree; 32 is a start, the best one depends on the GPU")
    size.add_argument("--step_times", help="CSV with columns nodes and step_ms: take the size that decodes fastest")
    parser.add_argument("--output", help="write the tree there, as JSON")
    args = parser.parse_args()

    if args.nodes is not None and args.nodes < 0:
        raise BadInput(f"--nodes {args.nodes}: a tree has 0 nodes or more")
    chance, num_heads, ranks = load_chance(args.accuracies)
    if args.nodes is None:
        step_ms, lengths = read_step_times(args.step_times), measured_lengths(args.accuracies)
        nodes, choices, table = fastest(chance, num_heads, ranks, step_ms, lengths)
        print(markdown(table) + "\n")
    else:
        nodes, choices = args.nodes, best_tree(chance, num_heads, ranks, args.nodes)
    depths = Counter(map(len, choices)).values()  # paths are sorted by depth, so these are in order
    print(f"expected acceptance length: {expected_length(choices, chance):.3f} tokens per pass")
    print(f"{len(choices)} nodes of at most {nodes}; per depth:", ", ".join(map(str, depths)) or "none")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_choices(choices, args.output)


if __name__ == "__main__":
    errors.run(main)
