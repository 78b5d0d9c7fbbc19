"""Tokens per second of real answers: plain decoding against trees of several sizes, all prompts greedily with each.

    python benchmark/decoding_speed.py out/heads --prompts chats.jsonl --skip 100 --limit 200 --out decoding.csv

A row per tree. `best` trees are the best for the chances in --accuracy, which evaluate.py measured; `chain` has each
head's best guess and no other. tokens and seconds are without the prefill, which yields the first token, and a warm-up
goes before the clock. passes and step_ms are of passes over the whole batch, tokens_per_pass is what one answer gets
from a pass, and expected_length what the chances promised: --skip the prompts that the tree was chosen on. speed_up is
tokens_per_s over that of plain decoding, measured first in the same run. identical: how many answers are plain
decoding's, token for token; in fp32 all, in bf16 a pass of many tokens rounds differently from a pass of one.

--trace FILE decodes one prompt again, plainly and with one tree, and keeps which pass yielded what and when, for
benchmark/plot_decoding.py to show.
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import setting
import torch

from common import errors
from common.errors import BadInput
from common.files import write_atomically
from conversations.prompts import question, read_prompts, tokenise
from conversations.template import ChatTemplate
from conversations.tokenizer import load_tokenizer
from decoding.answers import Decoded, decode
from decoding.comparison import token_texts
from decoding.decoder import Decoder, check_room
from decoding.tree import Chance, Choices, best_tree, chain, expected_length, load_chance
from medusa_model import MedusaModel
from model.backbone import context_length, end_tokens
from model.heads_file import find_heads

WARM_UP = 16  # tokens


def machine() -> str:
    """The GPU's name, or the CPU's and how many threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or a processor that does not say
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def make_tree(name: str, chance: Chance, heads: int, ranks: int) -> Choices:
    return chain(heads) if name == "chain" else best_tree(chance, heads, ranks, int(name))


def batch_passes(done: Decoded, batch_size: int) -> int:
    """Passes over whole batches: a batch runs as many as the answer that needs most."""
    counts = [len(pieces) for pieces in done.pieces]
    return sum(max(counts[start : start + batch_size]) for start in range(0, len(counts), batch_size))


def figures(done: Decoded, plain: Decoded, batch_size: int) -> dict:
    """A row's numbers. `plain`: plain decoding of the same prompts."""
    own, speed = done.figures(), plain.figures()["tokens_per_s"]
    passes = batch_passes(done, batch_size)
    if not passes or not speed:
        raise BadInput("no answer is longer than the first token, the prefill's: there is nothing to measure")
    return {
        "tokens": own["tokens"],
        "passes": passes,
        "seconds": f"{own['seconds']:.4f}",
        "tokens_per_s": f"{own['tokens_per_s']:.3f}",
        "tokens_per_pass": f"{own['tokens_per_pass']:.4f}",
        "step_ms": f"{own['seconds'] / passes * 1000:.4f}",
        "speed_up": f"{own['tokens_per_s'] / speed:.4f}",
        "identical": sum(a == b for a, b in zip(done.answers, plain.answers, strict=True)),
    }


def trace(decoder: Decoder, prompt: list[int], max_new_tokens: int, eos: set[int], tokenizer) -> list:
    """-> [[seconds since the first token, [text of each token]], ...]: the prefill's token, then one item per pass.
    The last text of a pass is the backbone's own token; those before it are accepted guesses."""
    for tokens in min(WARM_UP, max_new_tokens), max_new_tokens:
        events = [(time.perf_counter(), new) for (new,) in decoder.run([prompt], tokens, eos)]
    texts = iter(token_texts([token for _, new in events for token in new], tokenizer))
    return [[round(at - events[0][0], 6), [next(texts) for _ in new]] for at, new in events]


def tree_name(text: str) -> str:
    """For argparse: `chain`, or a number of nodes."""
    if text != "chain" and int(text) < 0:
        raise ValueError
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("heads", help="the --output_dir of a training run, or one of its checkpoints")
    add("--prompts", required=True, help="a .txt file, one a line; or conversations, whose first questions are asked")
    add("--skip", type=int, default=0, help="leave out the first so many prompts")
    add("--limit", type=int, default=200, help="of the others ask only the first so many")
    add("--accuracy", help="the JSON that evaluate.py wrote (default: HEADS/accuracy.json)")
    sizes = ["0", "chain", "4", "8", "16", "32", "63"]
    add("--nodes", type=tree_name, nargs="+", default=sizes, help="sizes of trees, or chain; 0, plain, is always run")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    add("--batch_size", type=int, default=1, help="prompts decoded at once")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of backbone and heads")
    add("--base_model", help="the backbone, if it has moved since the heads were trained")
    add("--label", help="what the heads are called (default: their directory's name)")
    add("--trace", type=Path, help="write there, as JSON, how one answer came about")
    add("--trace_prompt", help="the question for it (default: the first of the prompts)")
    add("--trace_nodes", type=tree_name, help="the tree for it (default: the one that was fastest)")
    add("--out", type=Path, required=True, help="CSV to append to")
    options = parser.parse_args()
    if options.skip < 0 or min(options.limit, options.batch_size) < 1 or options.max_new_tokens < 2:
        parser.error("--skip must be 0 or more, --limit and --batch_size 1 or more, --max_new_tokens 2 or more")

    directory, stage2 = find_heads(options.heads)
    asked = read_prompts(options.prompts)[options.skip :][: options.limit]
    if not asked:
        raise BadInput(f"{options.prompts} has no prompts behind the first {options.skip}: lower --skip")
    accuracy = options.accuracy or Path(options.heads) / "accuracy.json"
    chance, heads, ranks = load_chance(accuracy)
    chat = ChatTemplate(load_tokenizer(str(stage2 or directory)))
    dtype = getattr(torch, options.dtype)
    model = MedusaModel.from_pretrained(options.heads, options.base_model, dtype=dtype, heads_dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if len(model.medusa_heads) != heads:
        raise BadInput(f"{accuracy} is of {heads} heads, but {options.heads} has {len(model.medusa_heads)}")
    eos, context = end_tokens(model.backbone), context_length(model.backbone)

    def decoder(tree: Choices, prompts: list[list[int]], batch_size: int) -> Decoder:
        return Decoder(model, tree, batch_size, min(context, max(map(len, prompts)) + options.max_new_tokens))

    prompts, origin = tokenise(asked, chat), setting.origin()
    check_room(prompts, context)
    # Keyed by their nodes: where few paths have a chance, several sizes give the same tree.
    trees: dict[tuple[tuple[int, ...], ...], tuple[str, str, Choices]] = {}
    for name in dict.fromkeys(["0", *options.nodes]):
        tree = make_tree(name, chance, heads, ranks)
        kind = "chain" if name == "chain" else "best" if tree else "plain"
        trees.setdefault(tuple(tree), (name, kind, tree))
    plain, fastest = None, (0.0, "0")
    for name, kind, tree in trees.values():
        ready = decoder(tree, prompts, options.batch_size)
        decode(ready, prompts[:1], min(WARM_UP, options.max_new_tokens), eos, name)
        done = decode(ready, prompts, options.max_new_tokens, eos, name)
        del ready  # frees its cache before the next one is made
        plain = plain or done
        row = {
            "date": date.today().isoformat(),
            "commit": origin["commit"],
            "label": options.label or Path(options.heads).resolve().name,
            "tree": kind,
            "nodes": len(tree),
            "prompts": len(prompts),
            "batch_size": options.batch_size,
            "max_new_tokens": options.max_new_tokens,
            **figures(done, plain, options.batch_size),
            "expected_length": f"{expected_length(tree, chance):.4f}",
            "machine": machine(),
            "dtype": options.dtype,
            "versions": origin["versions"],
            "command": origin["command"],
        }
        setting.append(options.out, row)
        fastest = max(fastest, (float(row["tokens_per_s"]), name))
        keys = ("tree", "nodes", "tokens_per_s", "tokens_per_pass", "expected_length", "step_ms", "speed_up")
        print(*(f"{key} {row[key]}" for key in keys), f"identical {row['identical']} of {len(prompts)}", flush=True)
    if options.trace:
        traced = question(options.trace_prompt) if options.trace_prompt else asked[0]
        text, (prompt,) = traced["messages"][-1]["content"], tokenise([traced], chat)
        recorded = {"prompt": text, "machine": machine(), "label": row["label"], "command": origin["command"]}
        for key, name in (("plain", "0"), ("heads", options.trace_nodes or fastest[1])):
            tree = make_tree(name, chance, heads, ranks)
            passes = trace(decoder(tree, [prompt], 1), prompt, options.max_new_tokens, eos, chat.tokenizer)
            recorded[key] = {"nodes": len(tree), "passes": passes}
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.trace, lambda path: path.write_text(json.dumps(recorded) + "\n"))


if __name__ == "__main__":
    errors.run(main)
