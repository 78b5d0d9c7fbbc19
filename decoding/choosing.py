"""Which tree to decode with: what the flags name, or the fastest of some sizes, measured on this machine."""

import logging
from pathlib import Path

from common.errors import BadInput
from common.terminal import markdown
from decoding.acceptance import NODES
from decoding.decoder import Decoder
from decoding.growing import Adaptive
from decoding.tree import (
    Choices,
    best_tree,
    chain,
    fastest,
    load_chance,
    measured_lengths,
    measured_temperature,
    read_choices,
)
from medusa_model import MedusaModel

logger = logging.getLogger(__name__)

SIZES = (0, *NODES)  # of trees to choose from


def add_tree_options(parser):
    """--nodes, --tree, --adaptive and --agree, which `choose_tree` reads."""
    tree = parser.add_mutually_exclusive_group()
    tree.add_argument(
        "--nodes", type=int, help="guesses in the tree; 0: plain decoding (default: the fastest, measured)"
    )
    tree.add_argument("--tree", help="a tree of your own: a JSON list of rank paths (medusa_choices)")
    parser.add_argument(
        "--adaptive",
        type=int,
        metavar="W",
        help="each pass grows a tree of --nodes guesses, by what the heads say there: W parents a level, with W "
        "children each, such as 8",
    )
    parser.add_argument(
        "--agree",
        action="store_true",
        help="on a GPU: the same text with every tree and without, in bf16 too, for some time (see the docs)",
    )


def check_tree_options(args):
    """Raises BadInput for impossible numbers, before anything loads."""
    if (args.nodes or 0) < 0:
        raise BadInput(f"--nodes {args.nodes}: it must be 0 or more")
    if args.adaptive is not None and not args.nodes:
        raise BadInput("--adaptive needs the number of guesses: --nodes 32, for example")


def choose_tree(args, model: MedusaModel, prompt: list[int], max_length: int, batch_size: int) -> Choices | Adaptive:
    """The tree that the flags ask for: one that each pass grows, a file's, the best with --nodes, or the fastest of
    SIZES, measured here. args: those of `add_tree_options`, and `heads`, whose directory may have accuracy.json."""
    heads = len(model.medusa_heads)
    if args.tree:
        return read_choices(args.tree, heads)
    figures = Path(args.heads) / "accuracy.json"
    if args.adaptive is not None:
        return Adaptive(args.nodes, args.adaptive, measured_temperature(figures) if figures.is_file() else 1.0)
    if not figures.is_file():
        logger.warning(
            "%s is not there, so how often the heads are right is not known: a chain of %d guesses instead of a tree "
            "(run evaluate.py first)",
            *(figures, heads),
        )
        return chain(heads)[: args.nodes]
    chance, measured_heads, ranks = load_chance(figures)
    if measured_heads != heads:
        raise BadInput(f"{figures} is of {measured_heads} heads, but there are {heads}: run evaluate.py again")
    if args.nodes is not None:
        return best_tree(chance, heads, ranks, args.nodes)
    step_ms = {}
    for nodes in SIZES:
        tree = best_tree(chance, heads, ranks, nodes)
        decoder = Decoder(model, tree, batch_size, max_length, agree=args.agree)
        step_ms[nodes] = decoder.step_ms(prompt, passes=20 if decoder.device.type == "cuda" else 3)
    nodes, choices, table = fastest(chance, heads, ranks, step_ms, measured_lengths(figures))
    logger.info("one pass takes, on this machine, and is expected to yield:\n%s", markdown(table))
    logger.info("chosen: %s", f"a tree of {nodes} nodes" if nodes else "no tree: the heads do not pay here")
    return choices
