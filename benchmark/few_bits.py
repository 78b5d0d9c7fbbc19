"""What a frozen backbone in few bits, and optimisers that keep less, gain and cost: a row for each combination.

    python benchmark/few_bits.py --limit_gib 23 --out benchmark/results/few_bits.csv
    python benchmark/few_bits.py --model models/SmolLM2-135M-Instruct --data_path chats.jsonl --out accuracy.csv

The first command trains heads beside a backbone of LLaMA-3-8B's shapes with random weights, in stage 1: tokens/s and
peak memory (benchmark/throughput.py measures a row). By default five heads guess 32,768 tokens, for one conversation
of 2,048 tokens at a time. --optims names optimisers, each with the dtype of the trained weights: adamw_8bit:float32.
Where memory runs out, the row says OOM.

The second command asks a real model in each of --kinds: its perplexity, how often its lm_head is right, and how often
it says what it says in bfloat16 (agreement), over the conversations' answers. It needs no GPU.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import setting
import throughput
import torch
from torch.utils.data import DataLoader

from conversations.batches import Collator
from conversations.rows import prepare
from conversations.sources import load_conversations
from conversations.summary import Summary
from conversations.targets import IGNORE, shifted_targets
from conversations.template import ChatTemplate
from conversations.tokenizer import load_stops, load_tokenizer
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import load_backbone
from model.bits import BITS

KINDS = ("bfloat16", *BITS)
OPTIMS = ["adamw_torch_fused:float32", "adamw_torch_8bit:float32", "adamw_8bit:float32", "muon:float32"]
OPTIMS += ["adamw_torch_8bit:bfloat16:bf16_stochastic_round=True"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of the backbone")
    optims_help = "name:dtype, or name:dtype:--optim_args; all with the first of --kinds, the first with all"
    parser.add_argument("--optims", nargs="+", default=OPTIMS, help=optims_help)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--medusa_vocab_size", type=int, help="default: 32768; --smoke: 64; 0: all tokens")
    parser.add_argument("--length", type=int, help="default: 2048; --smoke: 32")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--limit_gib", type=float, help=throughput.LIMIT)
    parser.add_argument("--model", help="a real model's directory: measure what it says, not speed")
    parser.add_argument("--data_path", help="for --model: conversations")
    parser.add_argument("--conversations", type=int, default=200, help="of --data_path, the first so many")
    parser.add_argument("--smoke", action="store_true", help="a model of 30,000 weights, to try the script itself")
    parser.add_argument("--out", type=Path, required=True, help="CSV to append to")
    options = parser.parse_args()
    if bool(options.model) != bool(options.data_path):
        parser.error("--model and --data_path go together")
    if any(optim.count(":") not in (1, 2) for optim in options.optims):
        parser.error(f"--optims {' '.join(options.optims)}: each is name:dtype or name:dtype:--optim_args")
    if options.model:
        return accuracy(options)
    setting.limit_memory(options.limit_gib, parser)
    combinations = [(kind, options.optims[0]) for kind in options.kinds]
    combinations += [(options.kinds[0], optim) for optim in options.optims[1:]]
    for kind, optim in combinations:
        row = {"backbone": kind, "optim": optim, "heads": options.heads} | speed(options, kind, optim)
        finish(options, row, ("backbone", "optim", "tokens_per_s", "peak_gib"))


def finish(options, row: dict, shown: tuple):
    setting.append(options.out, row | setting.origin())
    print(*(row[name] for name in shown), flush=True)


def speed(options, kind: str, optim: str) -> dict:
    """The figures of one training run."""
    name, dtype, *optim_args = optim.split(":")
    length = options.length or (32 if options.smoke else 2048)
    draft = (64 if options.smoke else 32768) if options.medusa_vocab_size is None else options.medusa_vocab_size
    run = argparse.Namespace(**vars(options), stage=1, learning_rate=1e-4, stored_states=None)
    run.shape, run.trace = setting.TINY if options.smoke else setting.LLAMA3_8B, None
    run.medusa_vocab_size = draft or None
    run.medusa_head_type, run.dtype, run.optim, run.optim_args = "medusa", dtype, name, ":".join(optim_args) or None
    run.backbone_dtype = None if kind == "bfloat16" else kind
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"medusa_vocab_size": run.medusa_vocab_size or "", "length": length, "batch_size": options.batch_size}
    (data, rows), *_ = throughput.random_tokens(run, length).items()
    try:
        figures = throughput.train(run, "ours", options.heads, length, 0, data, rows, device)
    except torch.OutOfMemoryError:
        figures = throughput.OOM
    gc.collect()
    torch.cuda.empty_cache()
    return sizes | {"limit_gib": options.limit_gib or "", "steps": options.steps} | figures


def accuracy(options):
    """A row for each kind: what the model says in it."""
    chat = ChatTemplate(load_tokenizer(options.model), load_stops(options.model))
    data = load_conversations(options.data_path)
    data = data.select(range(min(options.conversations, len(data))))
    rows = prepare(data, Summary(options.data_path, len(data)), chat, max_length=options.length or 2048, min_length=2)
    batches = [*DataLoader(rows, options.batch_size, collate_fn=Collator.of(chat.tokenizer))]
    before = None
    for kind in ("bfloat16", *(kind for kind in options.kinds if kind != "bfloat16")):
        loss, right, guesses = ask(options.model, None if kind == "bfloat16" else kind, batches)
        before = guesses if before is None else before
        same = (guesses == before).double().mean().item()
        row = {
            "backbone": kind,
            "rows": len(guesses),
            "perplexity": f"{loss.exp().item():.4f}",
            "top1": f"{right:.4f}",
        }
        finish(options, row | {"agreement": f"{same:.4f}"}, ("backbone", "perplexity", "top1"))


@torch.no_grad()
def ask(name: str, bits: str | None, batches: list[dict]) -> tuple[torch.Tensor, float, torch.Tensor]:
    """-> the mean loss, the share of right guesses, and all guesses."""
    backbone = load_backbone(name, bits=bits, dtype=torch.bfloat16)
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=0)).eval()
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"  # Any: `to` is annotated without its self
    model.to(device)
    losses, rights, guesses = [], [], []
    for batch in batches:
        targets = shifted_targets(batch["labels"].to(device), 1, None)
        logits = model(input_ids=batch["input_ids"].to(device)).logits[0][targets != IGNORE].float()
        targets = targets[targets != IGNORE]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
        guesses.append(logits.argmax(-1).cpu())
        rights.append(guesses[-1] == targets.cpu())
    return torch.cat(losses).double().mean(), torch.cat(rights).double().mean().item(), torch.cat(guesses)


if __name__ == "__main__":
    main()
