"""How good are the heads? Their accuracy on held-out conversations, and how many tokens a pass would yield with them.

    python evaluate.py out/heads --data_path chats.jsonl --eval_holdout 500

HEADS is what train.py left behind, stage 1 or stage 2. Give the same --data_path and --eval_holdout as for training,
and exactly the conversations that were held out are read. They give two texts:

reference  The conversations' answers. `before` is the accuracy of untrained heads, which are copies of the lm_head: it
           guesses the next token, where head k is asked for the one k places later.
own        What the backbone itself answers, greedily, to what comes before each conversation's first answer. Decoding
           accepts a guess if it is the backbone's own token, so this text says how fast the heads make it. Draft trees
           are chosen on the first half of the conversations and measured on the other half: tokens per pass, exactly
           what a greedy decoder would yield there, beside what the first half's accuracies had led to expect. With a
           single conversation, that one has to do for both.

Of a stage 2 by LoRA, or with --original MODEL, two more lines compare the backbone with the one it was trained from
(decoding/drift.py), and a verdict says whether it is still that model: as often right, and no more repetitive.

The figures go to HEADS/accuracy.json, where generate.py and medusa_tree.py read them, and a picture beside it.
"""

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from common import errors, terminal
from common.errors import BadInput
from common.files import check_can_write, write_atomically
from common.terminal import markdown
from conversations.batches import Collator
from conversations.options import add_options, parse_kwargs
from conversations.prompts import ask, tokenise
from conversations.rows import prepare
from conversations.sources import is_share_or_number, load_conversations, split_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate
from conversations.tokenizer import load_tokenizer
from decoding.acceptance import TOP
from decoding.accuracy import own_answers, own_text, reference_text
from decoding.decoder import Decoder
from decoding.drift import Asked, drift, original_of
from decoding.judge import check_pass
from decoding.loading import load_model
from medusa_model import MedusaModel
from model.adapter import base_of_adapter
from model.backbone import context_length, end_tokens, load_backbone, stop_tokens
from model.bits import add_bits_option
from model.heads_file import find_heads, tokenizer_of

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """Raises BadInput for impossible numbers, before anything loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("heads", help="the --output_dir of a training run, or one of its checkpoints")
    add("--data_path", required=True, nargs="+", help="conversations, as for train.py")
    add("--eval_split", help="the split of --data_path to read, instead of --train_split")
    add("--eval_holdout", type=float, default=0, help="only the last N (a share if below 1)")
    add("--model_max_length", type=int, help="longer conversations are cut (default: 2048, or the model's context)")
    add("--max_new_tokens", type=int, default=256, help="the backbone's answers are cut; 0: none")
    add(
        "--adaptive",
        type=int,
        default=0,
        metavar="W",
        help="also measure trees that each pass grows, with W parents a level and W children each, such as 8",
    )
    add("--batch_size", type=int, default=8, help="conversations at once")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of backbone and heads")
    add("--base_model", help="the backbone, if it has moved since the heads were trained")
    add("--original", help="stage 2: the model it began with, to compare with (default: the one an adapter is of)")
    add("--output_json", type=Path, help="write the figures there (default: HEADS/accuracy.json)")
    add_bits_option(parser)
    add_options(parser)
    args = parser.parse_args()
    if min(args.max_new_tokens, args.adaptive) < 0 or args.batch_size < 1 or (args.model_max_length or 1) < 1:
        raise BadInput(
            "--max_new_tokens and --adaptive must be 0 or more, --batch_size and --model_max_length 1 or more"
        )
    if not is_share_or_number(args.eval_holdout):
        raise BadInput(f"--eval_holdout {args.eval_holdout:g}: a share below 1, or a number of conversations")
    return args


def choose_length(asked: int | None, context: int) -> int:
    """How many tokens of a conversation are read. Raises BadInput if more are asked for than the model knows: it would
    answer with nonsense there, or not at all."""
    if (asked or 0) > context:
        raise BadInput(f"--model_max_length {asked}: the backbone knows {context} positions")
    return asked or min(2048, context)


def first_prompts(conversations, chat: ChatTemplate, longest: int) -> list[list[int]]:
    """Tokens of what comes before each conversation's first answer, as a prompt. Leaves out prompts of more than
    `longest` tokens and those that the chat template refuses."""
    asked = [conversation | {"messages": ask(conversation["messages"])} for conversation in conversations]
    refused: Counter[str] = Counter()  # `prepare` has named the reasons
    prompts = [prompt for prompt in tokenise(asked, chat, refused) if 0 < len(prompt) <= longest]
    if left_out := len(conversations) - len(prompts):
        logger.warning(
            "own text: left out %d of %d prompts, longer than %d tokens (--model_max_length or the model's context, "
            "less --max_new_tokens) or refused by the chat template",
            *(left_out, len(conversations), longest),
        )
    return prompts


def original_name(args, stage2: Path | None) -> str | None:
    """The model that stage 2 began with, as far as it is known. Raises BadInput if there was no stage 2."""
    if args.original and stage2 is None:
        raise BadInput(f"--original {args.original}: {args.heads} is of stage 1, whose backbone is what it was")
    if args.original or stage2 is None:
        return args.original
    base = base_of_adapter(str(stage2))
    return base and (args.base_model or base)


def head_names(result: dict) -> list[str]:
    return ["lm_head", *(f"head {k}" for k in range(1, len(result["top"])))]


def report(result: dict) -> str:
    """Tables: accuracy on the reference text; accuracy on the own text; tokens per pass."""

    def table(keys, rows) -> str:
        return markdown([dict(zip(keys, row, strict=True)) for row in rows])

    columns = zip(head_names(result), result["rows"], result["before"], result["top"], strict=True)
    cells = ((name, rows, b[0], t[0], b[4], t[4], t[9]) for name, rows, b, t in columns)
    keys = ("", "rows", "top-1 before", "top-1 now", "top-5 before", "top-5 now", "top-10 now")
    parts = [table(keys, cells)]
    if own := result.get("own"):
        own_columns = zip(head_names(result), own["rows"], own["top"], strict=True)
        own_cells = ((name, rows, t[0], t[4], t[9]) for name, rows, t in own_columns)
        parts.append(table(("own text", "rows", "top-1", "top-5", "top-10"), own_cells))
        trees = (row.values() for row in own["acceptance"])
        parts.append(table(("tree", "nodes", "tokens per pass", "expected"), trees))
    if found := result.get("drift"):
        names = [key for key in ("top1", "perplexity", "distinct_4") if key in found]
        both = (("original", "_original"), ("now", ""))
        parts.append(table(("lm_head", *names), ((name, *(found[key + end] for key in names)) for name, end in both)))
        parts.append(found["verdict"])
    return "\n\n".join(parts)


def draw(result: dict, path: Path):
    """A picture of the heads' accuracies, readable on a light and on a dark page."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: it needs matplotlib; pip install -r requirements-dev.txt")
        return
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes, own, n = figure.subplots(), result.get("own"), range(1, TOP + 1)
    for k, name in list(enumerate(head_names(result)))[1:]:
        if own:
            axes.plot(n, own["top"][k], color=f"C{k - 1}", lw=2, marker="o", ms=4, label=name)
        axes.plot(n, result["top"][k], color=f"C{k - 1}", lw=1, ls="--", label=None if own else name)
    axes.set(xlabel="n best guesses", ylabel="share of rows with the right token among them", xticks=n, ylim=(0, 1))
    axes.set_title("Accuracy of the heads on held-out conversations")
    axes.grid(alpha=0.3)
    title = "dashed: reference text"
    title = f"solid: own text\n{title}" if own else title
    figure.legend(title=title, loc="outside right upper", alignment="left", frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", facecolor="white"))


def measure(args, model: MedusaModel, original: MedusaModel | None, chat: ChatTemplate, data, summary) -> dict:
    """The figures of both texts. data: the conversations. original: what the backbone was trained from, or None."""
    context = context_length(model.backbone)
    max_length = choose_length(args.model_max_length, context)
    eos = set[int]()
    if args.max_new_tokens:  # these may refuse the backbone, so they come before anything is measured
        eos = end_tokens(model.backbone)
        check_pass(Decoder(model, [], 1, 1))
    collate = Collator.of(chat.tokenizer)
    min_length = len(model.medusa_heads) + 2
    rows = prepare(data, summary, chat, max_length, min_length, by_length=True)
    logger.info("%s", summary.table())
    batches, asked = DataLoader(rows, args.batch_size, collate_fn=collate), None
    result = reference_text(model, batches)
    if args.max_new_tokens:
        longest = max_length - args.max_new_tokens
        if prompts := first_prompts(data, chat, longest):
            asked = Asked(prompts, own_answers(model, prompts, args.max_new_tokens, args.batch_size, eos))
            result["own"] = own_text(model, *asked, args.max_new_tokens, collate, args.batch_size, args.adaptive)
    if original is not None:
        result["drift"] = drift(model, original, batches, asked, eos, args.max_new_tokens, collate, args.batch_size)
    return result


def main():
    terminal.start()
    args = parse_arguments()
    directory, stage2 = find_heads(args.heads)
    kwargs = parse_kwargs(args.chat_template_kwargs)
    tokenizer = load_tokenizer(tokenizer_of(directory, stage2, args.base_model), args.chat_template)
    output = args.output_json or Path(args.heads) / "accuracy.json"
    check_can_write(output.parent, "--output_json")
    summary, split = Summary(" ".join(args.data_path)), args.eval_split or args.train_split
    data = load_conversations(args.data_path, summary, config=args.dataset_config, split=split)
    if args.eval_holdout:
        logger.info("%s", summary.table())
        _, held_out = split_conversations(data, None, args.eval_holdout)
        assert held_out is not None
        data, summary = held_out, Summary("the held-out part", len(held_out))
    model = load_model(args.heads, args.base_model, args.dtype, args.backbone_dtype)
    original = None
    if (name := original_name(args, stage2)) is not None:
        original = original_of(load_backbone(name, dtype=getattr(torch, args.dtype)), model)
    chat = ChatTemplate(tokenizer, stop_tokens(model.backbone), kwargs)
    result = {"heads": str(directory), "data_path": " ".join(args.data_path)}
    result |= measure(args, model, original, chat, data, summary)
    print(report(result))
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda path: path.write_text(f"{{{text}}}\n"))
    draw(result, output.with_suffix(".png"))


if __name__ == "__main__":
    errors.run(main)
