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

The figures go to HEADS/accuracy.json, for medusa_tree.py, and a picture beside it.
"""

import argparse
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.utils.data import DataLoader
from tqdm import tqdm

import errors
from acceptance import NO_TOKEN, TOP, acceptance, right_path
from backbone import context_length
from batches import Collator
from chat_data import load_conversations, load_tokenizer, prepare, split_conversations
from errors import BadInput
from medusa_checkpoint import find_heads, write_atomically
from medusa_decoder import answer_all
from medusa_loss import IGNORE, shifted_targets
from medusa_model import MedusaModel, cap
from medusa_tree import markdown
from prompts import ask, end_tokens, tokenise

logger = logging.getLogger(__name__)

ROWS = 512  # rows whose logits exist at once: 512 x 128256 x 4 bytes = 0.26 GB


def ranks(logits_of, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Ranks `[R]` of the targets `[R]`: 0 for the best token, TOP for all beyond the TOPth. hidden `[R, H]`."""
    found = torch.empty_like(targets)
    for x, t, out in zip(hidden.split(ROWS), targets.split(ROWS), found.split(ROWS), strict=True):
        logits, t = logits_of(x), t[:, None]
        mine = logits.gather(1, t)
        # bf16 logits tie; as argmax does, the lower token id of two comes first. Beside NaN nothing is right.
        first = torch.arange(logits.shape[1], device=t.device) < t
        out.copy_((~(logits <= mine) | ((logits == mine) & first)).sum(1).clamp(max=TOP))
    return found


def ranks_ahead(hidden: torch.Tensor, labels: torch.Tensor, logits_of: list, ahead: int = 1) -> torch.Tensor:
    """hidden `[B, T, H]`, labels `[B, T]` -> `[B, T, len(logits_of)]`: the ranks of the labels `ahead`, `ahead` + 1,
    ... places ahead under logits_of[0], [1], ...; NO_TOKEN where there is none."""
    found = labels.new_full((*labels.shape, len(logits_of)), NO_TOKEN)
    for i, logits in enumerate(logits_of):
        targets = shifted_targets(labels, ahead + i)
        counts = targets != IGNORE
        found[..., i][counts] = ranks(logits, hidden[counts], targets[counts])
    return found


def count(found: torch.Tensor) -> torch.Tensor:
    """Ranks `[..., heads]` -> int64 `[heads, TOP+1]`: how often each head has each rank."""
    counts = [torch.bincount(column + 1, minlength=TOP + 2) for column in found.flatten(0, -2).unbind(1)]
    return torch.stack(counts)[:, 1:]  # without NO_TOKEN, which is -1


def accuracy(counts: torch.Tensor) -> list[list[float]]:
    """Counts `[heads, TOP+1]` -> `[heads][TOP]`: the shares of rank <= 1..TOP."""
    counts = counts.double()
    return (counts.cumsum(1)[:, :TOP] / counts.sum(1, keepdim=True).clamp(min=1)).tolist()


def all_logits(model: MedusaModel) -> list:
    """K+1 functions hidden `[R, H]` -> logits `[R, V]`, index = head."""
    heads = [lambda x, head=head: head(x, softcap=model.softcap) for head in model.medusa_heads]
    return [lambda x: cap(model.lm_head(x), model.softcap), *heads]


@torch.inference_mode()
def evaluate(model: MedusaModel, batches, progress=tqdm) -> dict:
    """-> {"rows": [K+1], "top": [K+1][TOP], "before": [K+1][TOP]}, index = head; accuracies of rank <= 1..TOP."""
    logits, device = all_logits(model), model.lm_head.weight.device
    top, before = (torch.zeros(len(logits), TOP + 1, dtype=torch.int64, device=device) for _ in range(2))
    for batch in progress(batches, desc="evaluating", unit="batch"):
        hidden, labels = model.last_hidden_state(batch["input_ids"].to(device)), batch["labels"].to(device)
        top += count(ranks_ahead(hidden, labels, logits))
        before[1:] += count(ranks_ahead(hidden, labels, logits[:1] * len(model.medusa_heads), ahead=2))
    before[0] = top[0]
    return {"rows": top.sum(1).tolist(), "top": accuracy(top), "before": accuracy(before)}


def first_prompts(conversations: list[list[dict]], tokenizer, longest: int) -> list[list[int]]:
    """Tokens of what comes before each conversation's first answer, ready to be answered; those of more than `longest`
    tokens are left out, and what the chat template refuses."""
    prompts = []
    for messages in conversations:
        with suppress(TemplateError):  # `prepare` has said why
            prompts += tokenise([ask(messages)], tokenizer)
    prompts = [prompt for prompt in prompts if len(prompt) <= longest]
    if left_out := len(conversations) - len(prompts):
        logger.warning(
            "own text: left out %d of %d prompts, longer than %d tokens (--model_max_length or the model's context, "
            "less --max_new_tokens) or refused by the chat template",
            *(left_out, len(conversations), longest),
        )
    return prompts


def by_length(sequences: list[list[int]]) -> list[int]:
    """The order in which batches need little padding."""
    return sorted(range(len(sequences)), key=lambda i: len(sequences[i]))


@torch.inference_mode()
def own_ranks(model: MedusaModel, prompts, answers, collate: Collator, batch_size: int, progress=tqdm) -> list:
    """One table `[n, K+1]` of ranks per prompt, n its answer's tokens: row t is read where the backbone chose token t,
    and has the ranks of token t under the lm_head, t + 1 under head 1, ...

    Heads would see the answer's first tokens from rows before, in the prompt, too; but no pass stands there.
    """
    logits, device = all_logits(model), model.lm_head.weight.device
    both = list(zip(prompts, answers, strict=True))
    rows = [{"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer} for prompt, answer in both]
    order, tables = by_length([row["input_ids"] for row in rows]), [None] * len(rows)
    for start in progress(range(0, len(rows), batch_size), desc="reading answers", unit="batch"):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen])
        hidden = model.last_hidden_state(batch["input_ids"].to(device))
        for i, found in zip(chosen, ranks_ahead(hidden, batch["labels"].to(device), logits).cpu(), strict=True):
            tables[i] = found[len(prompts[i]) - 1 :][: len(answers[i])]
    return tables


def own_text(model: MedusaModel, prompts, eos: set[int], max_new_tokens, collate, batch_size, progress=tqdm) -> dict:
    """`own` in the JSON: `rows` and `top` as of `evaluate`, but on the backbone's answers, and tokens per pass of
    trees (`acceptance`)."""
    order, answers = by_length(prompts), [None] * len(prompts)
    found = answer_all(model, [prompts[i] for i in order], max_new_tokens, batch_size, eos)
    for i, answer in zip(order, progress(found, total=len(prompts), desc="answering", unit="prompt"), strict=True):
        answers[i] = answer
    tables = own_ranks(model, prompts, answers, collate, batch_size, progress)
    half = len(tables) // 2  # no tree is judged on the text it was chosen for
    counts, choose = count(torch.cat(tables)), count(torch.cat(tables[: half or None]))
    texts = [[right_path(row) for row in table[:-1, 1:].tolist()] for table in tables[half:]]
    return {
        "conversations": len(tables),
        "max_new_tokens": max_new_tokens,
        "rows": counts.sum(1).tolist(),
        "top": accuracy(counts),
        "acceptance": acceptance(accuracy(choose), texts),
    }


def head_names(result: dict) -> list[str]:
    return ["lm_head", *(f"head {k}" for k in range(1, len(result["top"])))]


def report(result: dict) -> str:
    """Tables: accuracy on the reference text; on the own text; tokens per pass."""
    columns = zip(head_names(result), result["rows"], result["before"], result["top"], strict=True)
    keys = ("", "rows", "top-1 before", "top-1 now", "top-5 before", "top-5 now", "top-10 now")
    cells = ((name, rows, b[0], t[0], b[4], t[4], t[9]) for name, rows, b, t in columns)
    parts = [[dict(zip(keys, row, strict=True)) for row in cells]]
    if own := result.get("own"):
        columns = zip(head_names(result), own["rows"], own["top"], strict=True)
        keys = ("own text", "rows", "top-1", "top-5", "top-10")
        parts.append([dict(zip(keys, (name, n, t[0], t[4], t[9]), strict=True)) for name, n, t in columns])
        keys = ("tree", "nodes", "tokens per pass", "expected")
        parts.append([dict(zip(keys, row.values(), strict=True)) for row in own["acceptance"]])
    return "\n\n".join(map(markdown, parts))


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


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", help="the --output_dir of a training run, or one of its checkpoints")
    parser.add_argument("--data_path", required=True, help="conversations, as for train.py")
    parser.add_argument("--eval_holdout", type=float, default=0, help="only the last N (a share if below 1)")
    parser.add_argument("--model_max_length", type=int, default=2048, help="longer conversations are cut")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="the backbone's answers are cut; 0: none")
    parser.add_argument("--batch_size", type=int, default=8, help="conversations at once")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of backbone and heads")
    parser.add_argument("--base_model", help="the backbone, if it has moved since the heads were trained")
    parser.add_argument("--output_json", type=Path, help="write the figures there (default: HEADS/accuracy.json)")
    args = parser.parse_args()

    if args.max_new_tokens < 0 or args.batch_size < 1:
        raise BadInput("--max_new_tokens must be 0 or more, --batch_size 1 or more")
    directory, stage2 = find_heads(args.heads)
    tokenizer = load_tokenizer(str(stage2 or directory))
    output = args.output_json or Path(args.heads) / "accuracy.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise BadInput(f"cannot write into {output.parent}: name another place with --output_json")
    data = load_conversations(args.data_path)
    if args.eval_holdout:
        data = split_conversations(data, None, args.eval_holdout)[1]
    dtype = getattr(torch, args.dtype)
    model = MedusaModel.from_pretrained(args.heads, args.base_model, dtype=dtype, heads_dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.max_new_tokens:  # refused before anything is measured
        context, eos = context_length(model.backbone), end_tokens(model.backbone)
    collate = Collator(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    min_length = len(model.medusa_heads) + 2
    rows = prepare(data, args.data_path, tokenizer, args.model_max_length, min_length, by_length=True)
    result = {"heads": str(directory), "data_path": args.data_path}
    result |= evaluate(model, DataLoader(rows, args.batch_size, collate_fn=collate))
    if args.max_new_tokens:
        longest = min(args.model_max_length, context) - args.max_new_tokens
        if prompts := first_prompts(data["messages"], tokenizer, longest):
            result["own"] = own_text(model, prompts, eos, args.max_new_tokens, collate, args.batch_size)
    print(report(result))
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    write_atomically(output, lambda path: path.write_text(f"{{{text}}}\n"))
    draw(result, output.with_suffix(".png"))


if __name__ == "__main__":
    errors.run(main)
