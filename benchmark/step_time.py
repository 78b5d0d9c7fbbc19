"""How long does a pass over a tree of N guesses take? Decoding with LLaMA-3-8B shapes, against reading the weights.

    python benchmark/step_time.py --length 512 7936 --out benchmark/results/step_time.csv

Weights and prompts are random, in bf16: a pass takes as long whatever they say. A row per length and tree size, which
is how many guesses a pass checks beside the token it stands on; 0 is plain decoding, without heads. step_ms is the
median of three measurements of --passes passes each, the copy of the new tokens to the CPU included, as decoding has
it; on a GPU a pass is one CUDA graph. A pass that takes ratio_to_plain times as long as plain decoding pays off when
it yields more tokens than that.

A pass cannot be faster than the memory is read. bandwidth_tb_s is that of a copy, read plus written bytes. weight_gb:
the backbone without the input embedding, of which a pass reads a few rows; floor_ms: the time to read that.
heads_gb, heads_floor_ms: the same of the heads that the tree uses, as many as it is deep. cache_gb: keys and values of
the prompt, read too: 2 x 32 layers x 8 heads x 128 x 2 bytes = 131 kB a token, so 0.07 GB of 512 tokens and 1.04 of
7,936. A size that fails leaves a row with `error` instead of a time.

The trees are the best for the accuracies that the original published for Vicuna. With several --heads there are trees
of each number; where fewer heads have fewer paths than --nodes, the tree of them all is taken. `medusa_tree.py
--step_times` reads a CSV with one length and one number of heads.
"""

import argparse
import gc
import time
from datetime import date
from itertools import accumulate
from pathlib import Path
from statistics import median

import setting
import torch

from common.errors import first_line
from decoding.decoder import Decoder
from decoding.growing import Adaptive
from decoding.tree import Choices, best_tree, independent
from medusa_model import MedusaModel
from model.path_heads import HEAD_TYPES

MODELS = {"llama3_8b": setting.LLAMA3_8B, "smollm2": setting.SMOLLM2, "tiny": setting.TINY}
# Top-1 and top-5 accuracy of heads 1 to 5 on Vicuna, as the original published them.
TOP1 = (0.560, 0.316, 0.201, 0.147, 0.118)
TOP5 = (0.780, 0.563, 0.417, 0.340, 0.300)
RANKS = 10
ANSWER = 256  # tokens that the cache has room for after the prompt


def shares(top1: float, top5: float) -> list[float]:
    """Top-1 to top-RANKS accuracy, if each rank's share is that of the rank before times a constant factor. Bisects
    for the factor that gives top1 and top5."""
    low, high = 0.0, 1.0
    for _ in range(50):
        factor = (low + high) / 2
        rows = list(accumulate(top1 * factor**rank for rank in range(RANKS)))
        low, high = (low, factor) if rows[4] > top5 else (factor, high)
    return rows


def tree(heads: int, nodes: int) -> Choices:
    top = [[1.0] * RANKS, *map(shares, TOP1, TOP5)]  # `independent` does not use row 0, the lm_head's
    return best_tree(independent(top), heads, RANKS, nodes)


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read plus written, the best of several."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, best, copies = source.clone(), 0.0, 10 if device.type == "cuda" else 1
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        synchronize(device)
        best = max(best, 2 * copies * source.nbytes / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def weight_bytes(model: MedusaModel) -> int:
    """Bytes that a plain pass reads: all weights of the backbone but the input embedding, unless the lm_head is tied
    to it."""
    embedding = model.get_input_embeddings().weight
    unread = 0 if embedding is model.lm_head.weight else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.backbone.parameters()) - unread


def heads_bytes(model: MedusaModel, depth: int) -> int:
    """Of so many heads, and the prefix layer before them. A pass reads only a few rows of a markov head's table."""
    parts = [*model.medusa_heads[:depth], *([model.prefix] if model.prefix is not None and depth else [])]
    return sum(p.nbytes for part in parts for name, p in part.named_parameters() if name != "table")


def cache_bytes(model: MedusaModel, length: int, batch_size: int) -> int:
    config = model.backbone.config
    size = config.hidden_size // config.num_attention_heads * model.lm_head.weight.itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * length * batch_size


def measure(
    model: MedusaModel, choices: Choices | Adaptive, prompt: list[int], batch_size: int, passes: int, agree: bool
) -> float:
    """ms of a pass: the median of three measurements."""
    decoder = Decoder(model, choices, batch_size, len(prompt) + ANSWER, agree=agree)
    return median(decoder.step_ms(prompt, passes) for _ in range(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3_8b", help="shapes; tiny: to try the script itself")
    parser.add_argument("--heads", type=int, nargs="+", choices=range(1, len(TOP1) + 1), default=[5])
    parser.add_argument("--medusa_head_type", choices=HEAD_TYPES, default="medusa")
    parser.add_argument("--medusa_prefix_layer", action="store_true", help="heads with a prefix layer")
    parser.add_argument("--adaptive", type=int, help="trees that each pass grows from so many parents a level")
    parser.add_argument("--medusa_vocab_size", type=int, help="heads guess so many tokens (default: all)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 1, 15, 16, 31, 32, 63, 64], help="0 is always run")
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="of the prompt in the cache, in tokens")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts decoded at once")
    parser.add_argument("--agree", action="store_true", help="passes whose text does not depend on the tree")
    parser.add_argument("--passes", type=int, help="of one measurement (default: 50 on a GPU, else 3)")
    parser.add_argument("--out", type=Path, required=True, help="CSV to append to")
    options = parser.parse_args()
    if min(*options.length, options.batch_size, 1 if options.passes is None else options.passes) < 1:
        parser.error("--length, --batch_size and --passes must be 1 or more")
    if min(options.nodes) < 0:
        parser.error("--nodes must be 0 or more")
    most, sizes = max(options.heads), sorted({0, *options.nodes})
    if len(tree(most, sizes[-1])) < sizes[-1]:
        room = len(tree(most, sizes[-1]))
        parser.error(f"--nodes {sizes[-1]}: trees of {most} heads and {RANKS} ranks have {room} nodes")
    trees: dict[tuple[int, int], Choices] = {(most, 0): []}  # by heads and nodes
    for heads in sorted(set(options.heads), reverse=True):
        trees |= {(heads, len(tree(heads, nodes))): tree(heads, nodes) for nodes in sizes[1:]}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passes = options.passes or (50 if device.type == "cuda" else 3)
    origin, speed = setting.origin(), bandwidth(device)
    torch.cuda.empty_cache()  # the 2 GiB that `bandwidth` copied
    shape, draft = MODELS[options.model], options.medusa_vocab_size
    kind, prefix = options.medusa_head_type, options.medusa_prefix_layer
    model = setting.random_model(shape, most, 1, torch.bfloat16, device, draft, kind, prefix)
    weights = weight_bytes(model)
    failed = 0
    for length in options.length:
        (row,) = setting.random_rows(shape, length, 1)
        plain = None
        for (heads, nodes), choices in trees.items():
            ms, error, read = None, "", heads_bytes(model, max(map(len, choices), default=0))
            size: Choices | Adaptive = choices
            if options.adaptive and nodes:  # it may be as deep as there are heads
                size, read = Adaptive(nodes, options.adaptive), heads_bytes(model, most)
            try:
                ms = measure(model, size, row["input_ids"], options.batch_size, passes, options.agree)
            except Exception as problem:  # the other sizes should still run
                error = f"{type(problem).__name__}: {first_line(problem)}"
                failed += 1
            gc.collect()
            torch.cuda.empty_cache()
            plain = ms if nodes == 0 else plain
            figures = {
                "date": date.today().isoformat(),
                "commit": origin["commit"],
                "model": options.model,
                "heads": heads,
                "head_type": kind,
                "prefix": prefix or "",
                "adaptive": options.adaptive or "",
                "medusa_vocab_size": draft or "",
                "nodes": nodes,
                "length": length,
                "batch_size": options.batch_size,
                "agree": options.agree or "",
                "step_ms": f"{ms:.4f}" if ms else "",
                "plain_ms": f"{plain:.4f}" if plain else "",
                "ratio_to_plain": f"{ms / plain:.4f}" if ms and plain else "",
                "floor_ms": f"{weights / speed * 1e3:.4f}",
                "heads_floor_ms": f"{read / speed * 1e3:.4f}",
                "bandwidth_tb_s": f"{speed / 1e12:.4f}",
                "weight_gb": f"{weights / 1e9:.6f}",
                "heads_gb": f"{read / 1e9:.6f}",
                "cache_gb": f"{cache_bytes(model, length, options.batch_size) / 1e9:.6f}",
                "error": error,
            }
            setting.append(options.out, figures | {key: origin[key] for key in ("gpu", "versions", "command")})
            keys = ("length", "heads", "nodes", "step_ms", "ratio_to_plain", "floor_ms", "heads_floor_ms", "error")
            print(*(f"{key} {figures[key]}" for key in keys if figures[key] != ""), flush=True)
    if failed:
        raise SystemExit(f"{failed} sizes failed: see the column error of {options.out}")


if __name__ == "__main__":
    main()
