"""Decodes with trained heads, and shows what they gain.

    python generate.py out/heads --prompt "Why is the sky blue?" --compare

HEADS is what train.py left behind. After evaluate.py the draft tree is the best one for the accuracies it measured, of
the size that is fastest on this machine; --nodes or --tree choose another. Greedy decoding (the default) and sampling
with --temperature give the backbone's own text, token by token or in distribution. --acceptance typical does not;
docs/decoding.md explains all three.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from common import errors, terminal
from common.errors import BadInput
from common.files import check_can_write, write_atomically
from common.terminal import markdown
from conversations.options import add_options, parse_kwargs
from conversations.prompts import question, read_prompts, tokenise, with_system
from conversations.template import ChatTemplate
from conversations.tokenizer import load_tokenizer
from decoding.answers import Decoded, decode
from decoding.choosing import add_tree_options, check_tree_options, choose_tree
from decoding.comparison import by_group, compare
from decoding.decoder import Decoder, check_room
from decoding.growing import Adaptive
from decoding.judge import check_pass
from decoding.loading import load_model
from decoding.sampling import Sampling
from decoding.spec_bench import read_questions, table
from decoding.tree import Choices
from medusa_model import MedusaModel
from model.backbone import context_length, end_tokens
from model.bits import add_bits_option
from model.heads_file import find_heads, tokenizer_of

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """Raises BadInput for impossible numbers, before anything loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("heads", help="the --output_dir of a training run, or one of its checkpoints")
    add("--prompt", action="append", default=[], help="what to ask; may be given several times")
    add("--prompts", help="a .txt file, one prompt a line; or conversations, asked up to their first answer")
    add("--spec_bench", metavar="FILE", help="Spec-Bench's question.jsonl: --compare, with its table by task")
    add("--limit", type=int, help="ask only the first so many")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    add("--batch_size", type=int, default=1, help="prompts decoded at once")
    add_tree_options(parser)
    add("--temperature", type=float, default=0.0, help="0 is greedy: the most likely token; above, tokens are drawn")
    add(
        "--acceptance", choices=("exact", "typical"), default="exact", help="typical: more guesses pass (see the docs)"
    )
    add("--epsilon", type=float, default=0.09, help="typical: always likely enough is a probability above it")
    add("--delta", type=float, default=0.3, help="typical: or one above delta * exp(-entropy)")
    add("--seed", type=int, default=0, help="of the drawing")
    add(
        "--compare",
        action="store_true",
        help="decode plainly too, by the same code, and show both side by side; prompts with a field `group` also get "
        "a table by group",
    )
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--base_model", help="the backbone, if it has moved since the heads were trained")
    add("--output_json", type=Path, help="write answers and figures there")
    add("--system", help="a system turn for prompts that have none")
    add_bits_option(parser)
    add_options(parser)
    args = parser.parse_args()
    counts = [args.max_new_tokens, args.batch_size] + [args.limit] * (args.limit is not None)
    if min(counts) < 1 or args.temperature < 0:
        raise BadInput("--max_new_tokens, --batch_size and --limit must be 1 or more, --temperature 0 or more")
    check_tree_options(args)
    if args.acceptance == "typical" and (args.temperature == 0 or not 0 < args.delta < 1 or not args.epsilon > 0):
        raise BadInput(
            "--acceptance typical needs a --temperature, an --epsilon above 0 and a --delta between 0 and 1"
        )
    if args.agree and args.temperature > 0:
        raise BadInput("--agree needs --temperature 0: how many random numbers are drawn depends on the tree")
    if not args.prompt and not args.prompts and not args.spec_bench:
        raise BadInput("nothing to decode: give --prompt TEXT or --prompts FILE")
    if args.spec_bench and (args.prompt or args.prompts or args.batch_size > 1):
        raise BadInput("--spec_bench asks its own questions, one at a time: leave out --prompt(s) and --batch_size")
    args.compare |= bool(args.spec_bench)
    return args


def stream(tokenizer):
    """-> a function for `decode` that prints answers word by word."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    return lambda tokens: streamer.end() if tokens is None else streamer.put(torch.tensor(tokens))


def decode_all(
    args, model: MedusaModel, tokenizer, prompts: list[list[int]]
) -> tuple[Choices | Adaptive, list[Decoded]]:
    """-> (the tree, [the run with it]); with --compare, a plain run comes first in the list."""
    context = context_length(model.backbone)
    check_room(prompts, context)
    max_length = min(context, max(map(len, prompts)) + args.max_new_tokens)
    choices, eos = choose_tree(args, model, prompts[0], max_length, args.batch_size), end_tokens(model.backbone)
    sampling = Sampling(args.temperature, args.acceptance == "typical", args.epsilon, args.delta)
    # The answers of a batch would mix on the terminal, and printing would distort --compare.
    show = stream(tokenizer) if args.batch_size == 1 and not args.compare else None
    runs: list[Decoded] = []
    trees: list[Choices | Adaptive] = [[], choices] if args.compare else [choices]
    for tree in trees:
        set_seed(args.seed)
        decoder = Decoder(model, tree, args.batch_size, max_length, sampling, agree=args.agree)
        depth, kind = decoder.most - 1, "adaptive tree" if isinstance(tree, Adaptive) else "tree"
        name = f"{depth} head{'s' * (depth > 1)}, {kind} of {decoder.real - 1}" if depth else "plain"
        check_pass(decoder)
        runs.append(decode(decoder, prompts, args.max_new_tokens, eos, name, show))
    return choices, runs


def main():
    terminal.start()
    args = parse_arguments()
    directory, stage2 = find_heads(args.heads)
    if args.output_json:
        check_can_write(args.output_json.parent, "--output_json")
    kwargs = parse_kwargs(args.chat_template_kwargs)
    questions = [question(text) for text in args.prompt]
    if args.prompts:
        questions += read_prompts(args.prompts, config=args.dataset_config, split=args.train_split)
    if args.spec_bench:
        questions = read_questions(args.spec_bench)
    tokenizer = load_tokenizer(tokenizer_of(directory, stage2, args.base_model), args.chat_template)
    chat = ChatTemplate(tokenizer, kwargs=kwargs)
    prompts = tokenise([with_system(asked, args.system) for asked in questions[: args.limit]], chat)
    model = load_model(args.heads, args.base_model, args.dtype, args.backbone_dtype)
    choices, runs = decode_all(args, model, tokenizer, prompts)
    answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in runs[-1].answers]
    tree = choices._asdict() if isinstance(choices, Adaptive) else choices
    result: dict[str, Any] = {"tree": tree, "answers": answers}
    if args.compare:
        plain, heads = runs
        text, figures = compare(plain, heads, tokenizer, model.lm_head.weight.dtype, greedy=args.temperature == 0)
        print(text)
        result |= figures
        groups = [asked.get("group") or "other" for asked in questions[: args.limit]]
        if args.spec_bench:
            result["spec_bench"] = table(plain, heads, groups)
            print("\nSpec-Bench, first turns, counted as it counts:\n" + markdown(result["spec_bench"]))
        elif set(groups) != {"other"}:
            result["groups"] = by_group(plain, heads, groups)
            print("\n" + markdown(result["groups"]))
    else:
        if args.batch_size > 1:  # not printed word by word
            print("\n\n".join(answers))
        figures = runs[-1].figures()
        print("\n{tokens_per_s:.1f} tokens/s, {tokens_per_pass:.2f} tokens per pass".format(**figures))
        result["heads"] = figures
    if args.output_json:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output_json, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    errors.run(main)
