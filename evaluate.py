"""How often is head k right? Top-1 to top-10 accuracy per head on held-out conversations.

    python evaluate.py out/heads --data_path chats.jsonl --eval_holdout 500

HEADS is what train.py left behind, stage 1 or stage 2. Give the same --data_path and --eval_holdout as for
training, and exactly the conversations that were held out are read. `before` is the accuracy of untrained heads,
which are copies of the lm_head: it guesses the next token, where head k is asked for the one k places later.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import errors
from batches import Collator
from chat_data import load_conversations, load_tokenizer, prepare, split_conversations
from medusa_checkpoint import find_heads, write_atomically
from medusa_loss import IGNORE, shifted_targets
from medusa_model import MedusaModel, cap

TOP = 10
ROWS = 512  # rows whose logits exist at once: 512 x 128256 x 4 bytes = 0.26 GB


def rank_counts(logits_of, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many targets `[R]` are the best, second best, ... TOPth best token: int64 `[TOP]`. hidden `[R, H]`."""
    counts = torch.zeros(TOP, dtype=torch.int64, device=hidden.device)
    for x, t in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits, t = logits_of(x), t[:, None]
        mine = logits.gather(1, t)
        # bf16 logits tie; as argmax does, the lower token id of two comes first
        first = torch.arange(logits.shape[1], device=t.device) < t
        ranks = ((logits > mine) | ((logits == mine) & first)).sum(1)
        counts += torch.bincount(ranks.clamp(max=TOP), minlength=TOP + 1)[:TOP]
    return counts


@torch.inference_mode()
def evaluate(model: MedusaModel, batches, progress=tqdm) -> dict:
    """-> {"rows": [K+1], "top": [K+1][TOP], "before": [K+1][TOP]}, index = head; accuracies of rank <= 1..TOP."""
    lm_head, heads, softcap = model.lm_head, model.medusa_heads, model.softcap
    device = lm_head.weight.device
    rows = torch.zeros(len(heads) + 1, dtype=torch.int64, device=device)
    top, before = (torch.zeros(len(heads) + 1, TOP, dtype=torch.int64, device=device) for _ in range(2))
    for batch in progress(batches, desc="evaluating", unit="batch"):
        hidden = model.last_hidden_state(batch["input_ids"].to(device))
        for k in range(len(heads) + 1):
            targets = shifted_targets(batch["labels"].to(device), k + 1)
            counts = targets != IGNORE
            x, t = hidden[counts], targets[counts]
            rows[k] += len(t)
            before[k] += rank_counts(lambda x: cap(lm_head(x), softcap), x, t)
            if k > 0:
                top[k] += rank_counts(lambda x, head=heads[k - 1]: head(x, softcap=softcap), x, t)
    top[0] = before[0]
    shares = [(counts.cumsum(1) / rows[:, None].clamp(min=1)).tolist() for counts in (top, before)]
    return {"rows": rows.tolist(), "top": shares[0], "before": shares[1]}


def table(result: dict) -> str:
    lines = [
        "| | rows | top-1 before | top-1 now | top-5 before | top-5 now |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for k, (rows, top, before) in enumerate(zip(result["rows"], result["top"], result["before"], strict=True)):
        name = "lm_head" if k == 0 else f"head {k}"
        lines.append(f"| {name} | {rows} | {before[0]:.3f} | {top[0]:.3f} | {before[4]:.3f} | {top[4]:.3f} |")
    return "\n".join(lines)


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", help="the --output_dir of a training run, or one of its checkpoints")
    parser.add_argument("--data_path", required=True, help="conversations, as for train.py")
    parser.add_argument("--eval_holdout", type=float, default=0, help="only the last N (a share if below 1)")
    parser.add_argument("--model_max_length", type=int, default=2048, help="longer conversations are cut")
    parser.add_argument("--batch_size", type=int, default=8, help="conversations at once")
    parser.add_argument("--base_model", help="the backbone, if it has moved since the heads were trained")
    parser.add_argument("--output_json", help="write the figures there")
    args = parser.parse_args()

    directory, stage2 = find_heads(args.heads)
    tokenizer = load_tokenizer(str(stage2 or directory))
    if args.output_json:
        Path(args.output_json).parent.mkdir(parents=True, exist_ok=True)
    data = load_conversations(args.data_path)
    if args.eval_holdout:
        data = split_conversations(data, None, args.eval_holdout)[1]
    model = MedusaModel.from_pretrained(
        args.heads, base_model_name_or_path=args.base_model, dtype=torch.bfloat16, heads_dtype=torch.bfloat16
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    min_length = len(model.medusa_heads) + 2
    data = prepare(data, args.data_path, tokenizer, args.model_max_length, min_length, by_length=True)
    collate = Collator(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    result = evaluate(model, DataLoader(data, args.batch_size, collate_fn=collate))
    print(table(result))
    if args.output_json:
        text = json.dumps({"heads": str(directory), "data_path": args.data_path} | result, indent=1) + "\n"
        write_atomically(Path(args.output_json), lambda path: path.write_text(text))


if __name__ == "__main__":
    errors.run(main)
