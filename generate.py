"""Decodes with trained heads, and shows what they gain.

    python generate.py out/heads --prompt "Why is the sky blue?" --compare

HEADS is what train.py left behind. After evaluate.py the draft tree is the best one for the accuracies it measured, of
the size that is fastest on this machine; --nodes or --tree choose another. Greedy decoding (the default) and sampling
with --temperature give the backbone's own text, token by token or in distribution; docs/decoding.md explains both, and
--acceptance typical, which does not.
"""

import argparse
import json
import logging
import shutil
import textwrap
import time
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

import torch
from transformers import TextStreamer, set_seed

import errors
from acceptance import NODES
from backbone import context_length
from chat_data import load_tokenizer
from errors import BadInput
from medusa_checkpoint import find_heads, write_atomically
from medusa_decoder import Decoder, Sampling
from medusa_model import MedusaModel
from medusa_tree import Choices, best_tree, chain, fastest, load_chance, markdown, measured_lengths, read_choices
from prompts import check_room, end_tokens, read_prompts, tokenise

logger = logging.getLogger(__name__)

SIZES = (0, *NODES)  # of trees to choose from


@dataclass
class Decoded:
    """Answers and what they took. seconds and passes are counted after the prefill, which yields the first token."""

    name: str
    answers: list[list[int]] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)  # tokens that each pass added to each answer
    seconds: float = 0.0

    def figures(self) -> dict:
        """tokens and passes are without the prefill's; a pass over a batch is one pass for each row it advanced."""
        tokens, passes = sum(map(sum, self.pieces)), sum(map(len, self.pieces))
        return {
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_s": tokens / self.seconds if tokens else 0.0,
            "tokens_per_pass": tokens / passes if passes else 1.0,
        }


def decode(decoder: Decoder, prompts, max_new_tokens: int, eos: set[int], name: str, show=None) -> Decoded:
    """All prompts, batch by batch. show(tokens) gets what a pass adds to an answer, then None."""
    out, batch_size = Decoded(name), len(decoder.tokens)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers, pieces = [[] for _ in batch], [[] for _ in batch]
        clock = None
        for new in decoder.run(batch, max_new_tokens, eos):
            for row, tokens in enumerate(new):
                answers[row] += tokens
                if clock is not None and tokens:
                    pieces[row].append(len(tokens))
                if show and tokens:
                    show(tokens)
            clock = clock or time.perf_counter()
        out.seconds += time.perf_counter() - clock
        if show:
            show(None)
        out.answers += answers
        out.pieces += pieces
    return out


def stream(tokenizer):
    """-> a function for `decode` that prints answers word by word."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    return lambda tokens: streamer.end() if tokens is None else streamer.put(torch.tensor(tokens))


def choose_tree(args, model: MedusaModel, prompt: list[int], max_length: int) -> Choices:
    """The tree the flags ask for: from a file, the best of --nodes, or the fastest of SIZES, measured here."""
    heads = len(model.medusa_heads)
    if args.tree:
        return read_choices(args.tree, heads)
    figures = Path(args.heads) / "accuracy.json"
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
        decoder = Decoder(model, best_tree(chance, heads, ranks, nodes), args.batch_size, max_length)
        step_ms[nodes] = decoder.step_ms(prompt, passes=20 if decoder.device.type == "cuda" else 3)
    nodes, choices, table = fastest(chance, heads, ranks, step_ms, measured_lengths(figures))
    logger.info("one pass takes, on this machine, and is expected to yield:\n%s", markdown(table))
    logger.info("chosen: %s", f"a tree of {nodes} nodes" if nodes else "no tree: the heads do not pay here")
    return choices


def token_texts(tokens: list[int], tokenizer) -> list[str]:
    """What each token adds to the text; a letter of several tokens comes with the last of them."""
    texts, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if end < len(tokens):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(shown) :])
        shown = text if len(text) > len(shown) else shown
    return texts


def pieces_of(answer: list[int], lengths: list[int], tokenizer, mark: str) -> str:
    """An answer's text with a mark between what different passes yielded."""
    texts = iter(token_texts(answer, tokenizer))
    return mark.join("".join(islice(texts, length)) for length in (1, *lengths))


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns."""
    width = (width - 3) // 2
    columns = []
    for text in (left, right):
        lines = (textwrap.wrap(line, width, drop_whitespace=False) or [""] for line in text.splitlines())
        columns.append([line for wrapped in lines for line in wrapped])
    return "\n".join(f"{a:{width}} | {b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))


def compare(plain: Decoded, heads: Decoded, tokenizer, dtype: torch.dtype, greedy: bool) -> tuple[str, dict]:
    """What the heads gained, for the terminal and as figures."""
    rows = [{"decoding": one.name} | one.figures() for one in (plain, heads)]
    speed_up = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"] if rows[0]["tokens_per_s"] else 1.0
    same = [a == b for a, b in zip(plain.answers, heads.answers, strict=True)]
    text = [markdown(rows), f"speed-up: {speed_up:.2f}"]
    if greedy:
        text.append(f"identical texts: {sum(same)} of {len(same)}")
        if not all(same) and dtype != torch.float32:
            text.append(
                f"(in {str(dtype).removeprefix('torch.')} a pass of one token and a pass of many round differently, "
                "so where two tokens are almost equally likely either may win: --dtype float32 decides it)"
            )
    left = f"{plain.name}\n\n" + tokenizer.decode(plain.answers[0], skip_special_tokens=True)
    right = f"{heads.name}; | between passes\n\n" + pieces_of(heads.answers[0], heads.pieces[0], tokenizer, "|")
    text.append("\n" + side_by_side(left, right, shutil.get_terminal_size((120, 40)).columns))
    return "\n".join(text), {"speed_up": speed_up, "identical": sum(same), "plain": rows[0], "heads": rows[1]}


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("heads", help="the --output_dir of a training run, or one of its checkpoints")
    add("--prompt", action="append", default=[], help="what to ask; may be given several times")
    add("--prompts", help="a .txt file, one prompt a line; or conversations, whose first questions are asked")
    add("--limit", type=int, help="ask only the first so many")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    add("--batch_size", type=int, default=1, help="prompts decoded at once")
    tree = parser.add_mutually_exclusive_group()
    tree.add_argument(
        "--nodes", type=int, help="guesses in the tree; 0: plain decoding (default: the fastest, measured)"
    )
    tree.add_argument("--tree", help="a tree of your own: a JSON list of rank paths (medusa_choices)")
    add("--temperature", type=float, default=0.0, help="0 is greedy: the most likely token; above, tokens are drawn")
    add(
        "--acceptance", choices=("exact", "typical"), default="exact", help="typical: more guesses pass (see the docs)"
    )
    add("--epsilon", type=float, default=0.09, help="typical: always likely enough is a probability above it")
    add("--delta", type=float, default=0.3, help="typical: or one above delta * exp(-entropy)")
    add("--seed", type=int, default=0, help="of the drawing")
    add("--compare", action="store_true", help="decode plainly too, by the same code, and show both side by side")
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--base_model", help="the backbone, if it has moved since the heads were trained")
    add("--output_json", help="write answers and figures there")
    args = parser.parse_args()
    counts = [args.max_new_tokens, args.batch_size] + [args.limit] * (args.limit is not None)
    if min(counts) < 1 or (args.nodes or 0) < 0 or args.temperature < 0:
        raise BadInput(
            "--max_new_tokens, --batch_size and --limit must be 1 or more, --nodes and --temperature 0 or more"
        )
    if args.acceptance == "typical" and (args.temperature == 0 or not 0 < args.delta < 1 or not args.epsilon > 0):
        raise BadInput(
            "--acceptance typical needs a --temperature, an --epsilon above 0 and a --delta between 0 and 1"
        )

    directory, stage2 = find_heads(args.heads)
    texts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not texts:
        raise BadInput("nothing to decode: give --prompt TEXT or --prompts FILE")
    tokenizer = load_tokenizer(str(stage2 or directory))
    prompts = tokenise([[{"role": "user", "content": text}] for text in texts[: args.limit]], tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    model = MedusaModel.from_pretrained(
        args.heads, base_model_name_or_path=args.base_model, dtype=dtype, heads_dtype=dtype
    ).to(device)
    context = context_length(model.backbone)
    check_room(prompts, context)
    max_length = min(context, max(map(len, prompts)) + args.max_new_tokens)
    choices = choose_tree(args, model, prompts[0], max_length)
    sampling = Sampling(args.temperature, args.acceptance == "typical", args.epsilon, args.delta)
    eos = end_tokens(model.backbone)
    # A batch's answers would mix on the terminal, and with --compare it would slow down one of the two.
    show = stream(tokenizer) if args.batch_size == 1 and not args.compare else None
    runs = []
    for tree in [[]] * args.compare + [choices]:
        name = f"{len(tree[-1])} heads, tree of {len(tree)}" if tree else "plain"
        set_seed(args.seed)
        decoder = Decoder(model, tree, args.batch_size, max_length, sampling)
        runs.append(decode(decoder, prompts, args.max_new_tokens, eos, name, show))
    result = {"tree": choices, "answers": [tokenizer.decode(a, skip_special_tokens=True) for a in runs[-1].answers]}
    if args.compare:
        text, figures = compare(*runs, tokenizer, dtype, greedy=args.temperature == 0)
        print(text)
        result |= figures
    else:
        if show is None:
            print("\n\n".join(result["answers"]))
        figures = runs[-1].figures()
        print("\n{tokens_per_s:.1f} tokens/s, {tokens_per_pass:.2f} tokens per pass".format(**figures))
        result["heads"] = figures
    if args.output_json:
        path = Path(args.output_json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    errors.run(main)
