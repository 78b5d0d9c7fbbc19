"""How often is head k right? Counts the rank of the right token among a head's guesses, on two texts:

reference text   the answers in given conversations
own text         the backbone's own greedy answers to the same questions

Heads that read the path to their guess are given the text's tokens: the rank of head k is that of a guess behind k
right ones. Decoding uses no other.

Rank 0 is a head's best guess. TOP stands for all ranks from TOP on, NO_TOKEN for a row whose target is past the end of
the text.
"""

from typing import cast

import torch
from tqdm import tqdm

from conversations.batches import Collator
from conversations.targets import IGNORE, shifted_targets
from decoding.acceptance import NO_TOKEN, NODES, TOP, acceptance, right_path, starts
from decoding.answers import answer_all
from decoding.growing import Adaptive, Growing
from medusa_model import MedusaModel
from model.heads import MedusaHead, Text, until
from model.loss import cap
from model.vocabulary import to_draft

TEMPERATURES = (0.7, 1.0, 1.4, 2.0)  # of the heads, to choose from for trees that are grown
ROWS = 512  # rows whose logits exist at once: 512 x 128256 x 4 bytes = 0.26 GB


def ranks(logits_of, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """rows `[R, ...]`, of which `logits_of` makes logits `[R, V]`; n targets per row `[R, n]` (IGNORE: none) -> their
    ranks `[R, n]`.

    The logits of a row are computed once for all its targets.
    """
    found = torch.empty_like(targets)
    for x, t, out in zip(rows.split(ROWS), targets.split(ROWS), found.split(ROWS), strict=True):
        logits = logits_of(x)
        for i, target in enumerate(t.split(1, dim=1)):
            mine = logits.gather(1, target.clamp(min=0))
            # bf16 logits tie: the lower token id then comes first, as in argmax. A NaN logit outranks every target.
            first = torch.arange(logits.shape[1], device=t.device) < target
            rank = (~(logits <= mine) | ((logits == mine) & first)).sum(1).clamp(max=TOP)
            out[:, i] = torch.where(target[:, 0] == IGNORE, NO_TOKEN, rank)
    return found


def ranks_ahead(labels: torch.Tensor, logits_of, shifts: range, token_map: torch.Tensor | None = None) -> torch.Tensor:
    """labels `[B, T]` -> `[B, T, len(shifts)]`: for each position and shift, the rank of the label that many positions
    ahead, or NO_TOKEN. `logits_of` makes logits of positions `[R]` of the batch laid flat. Under logits of a draft
    vocabulary, token_map, all other tokens have rank TOP."""
    targets = torch.stack([shifted_targets(labels, shift) for shift in shifts], dim=-1)
    guessed = to_draft(targets, token_map)
    found = torch.full_like(targets, NO_TOKEN)
    counts = (guessed != IGNORE).any(-1)
    found[counts] = ranks(logits_of, counts.flatten().nonzero()[:, 0], guessed[counts])
    return found.masked_fill((guessed == IGNORE) & (targets != IGNORE), TOP)


def ranks_of_heads(
    model: MedusaModel, hidden: torch.Tensor, text: Text | None, labels: torch.Tensor, before: bool = False
):
    """Ranks `[B, T, K+1]` of the label k + 1 positions ahead under head k; head 0 is the lm_head. hidden `[B, T, H]`
    and text: what `model.read` returns.

    before=True returns a pair: these, and the ranks of the same labels under untrained heads, which are copies of the
    lm_head.
    """
    shifts, states = range(1, len(model.medusa_heads) + 2), hidden.flatten(0, 1)
    seen = model.for_heads(hidden).flatten(0, 1)

    def logits_of(k: int):
        if k == 0:
            return lambda index: cap(model.lm_head(states[index]), model.softcap)
        head, ahead = cast(MedusaHead, model.medusa_heads[k - 1]), until(text, k)
        return lambda index: head.logits(seen[index], ahead and ahead.path(index), model.softcap)

    copies = ranks_ahead(labels, logits_of(0), shifts if before else shifts[:1])
    trained = [ranks_ahead(labels, logits_of(k), shifts[k : k + 1], model.token_map) for k in range(1, len(shifts))]
    found = torch.cat([copies[..., :1], *trained], dim=-1)
    return (found, copies) if before else found


def count(found: torch.Tensor) -> torch.Tensor:
    """Ranks `[..., heads]` -> int64 `[heads, TOP+1]`: how often each head has each rank."""
    counts = [torch.bincount(column + 1, minlength=TOP + 2) for column in found.flatten(0, -2).unbind(1)]
    return torch.stack(counts)[:, 1:]  # column 0 counts NO_TOKEN, which is -1


def shares(counts: torch.Tensor) -> list[list[float]]:
    """Counts `[heads, TOP+1]` -> top-1 to top-TOP accuracy, `[heads][TOP]`."""
    counts = counts.double()
    return (counts.cumsum(1)[:, :TOP] / counts.sum(1, keepdim=True).clamp(min=1)).tolist()


@torch.inference_mode()
def reference_text(model: MedusaModel, batches) -> dict:
    """-> {"rows": [K+1], "top": [K+1][TOP], "before": [K+1][TOP]}, index = head. `top` holds the top-1 to top-TOP
    accuracies, `before` those of untrained heads."""
    device, heads = model.lm_head.weight.device, len(model.medusa_heads) + 1
    top, before = (torch.zeros(heads, TOP + 1, dtype=torch.int64, device=device) for _ in range(2))
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None):
        read, labels = model.read(batch["input_ids"].to(device)), batch["labels"].to(device)
        for counts, found in zip((top, before), ranks_of_heads(model, *read, labels, before=True), strict=True):
            counts += count(found)
    return {"rows": top.sum(1).tolist(), "top": shares(top), "before": shares(before)}


def by_length(sequences: list[list[int]]) -> list[int]:
    """Indices, shortest first: batches in this order need little padding."""
    return sorted(range(len(sequences)), key=lambda i: len(sequences[i]))


def read_answers(model: MedusaModel, prompts, answers, collate: Collator, batch_size: int, doing: str):
    """Reads each prompt with its answer, batch by batch. -> the numbers of its rows, hidden and text as `model.read`
    returns them, and labels `[B, T]` of the answers."""
    device = model.lm_head.weight.device
    both = list(zip(prompts, answers, strict=True))
    rows = [{"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer} for prompt, answer in both]
    order = by_length([row["input_ids"] for row in rows])
    for start in tqdm(range(0, len(rows), batch_size), desc=doing, unit="batch", disable=None):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen])
        yield chosen, *model.read(batch["input_ids"].to(device)), batch["labels"].to(device)


@torch.inference_mode()
def own_ranks(model: MedusaModel, prompts, answers, collate: Collator, batch_size: int) -> list[torch.Tensor]:
    """One table `[n, K+1]` of ranks for each answer of n tokens. Row t belongs to the position where the backbone
    chose token t: the rank of token t under the lm_head, of token t + 1 under head 1, ...

    Heads also guess the answer's first tokens from the prompt. Those rows do not count: no pass starts there.
    """
    tables: dict[int, torch.Tensor] = {}
    for chosen, *read in read_answers(model, prompts, answers, collate, batch_size, "reading answers"):
        for i, table in zip(chosen, ranks_of_heads(model, *read).cpu(), strict=True):
            tables[i] = table[len(prompts[i]) - 1 :][: len(answers[i])]
    return [tables[i] for i in range(len(prompts))]


@torch.inference_mode()
def own_trees(model: MedusaModel, prompts, answers, size: Adaptive, collate: Collator, batch_size: int) -> list[dict]:
    """-> {"tree", "nodes", "length"} of `acceptance` for trees of up to so many nodes that each pass grows, on these
    answers. Raises BadInput for a beam of more tokens than heads guess."""
    most = size.candidates(len(model.medusa_heads))
    sizes = sorted({min(nodes, most) for nodes in NODES if nodes <= size.nodes})
    growing, texts = Growing(model, size._replace(nodes=sizes[-1])), []
    chunk = max(1, ROWS // size.beam)
    for _, hidden, _, labels in read_answers(model, prompts, answers, collate, batch_size, "growing trees"):
        ahead = torch.stack([shifted_targets(labels, shift) for shift in range(1, len(model.medusa_heads) + 2)], -1)
        for states, text in zip(model.for_heads(hidden), ahead, strict=True):
            passes = (text[:, :2] != IGNORE).all(1)  # a pass starts at every token but the last
            parts = zip(states[passes].split(chunk), text[passes].split(chunk), strict=True)
            texts += [torch.cat([growing.along(*part)[:, sizes].cpu() for part in parts])]
    rows = []
    for i, nodes in enumerate(sizes):
        roots = starts([text[:, i].tolist() for text in texts], int)
        rows.append({"tree": "adaptive", "nodes": nodes, "length": sum(map(len, texts)) / max(1, len(roots))})
    return rows


def own_answers(model: MedusaModel, prompts, max_new_tokens: int, batch_size: int, eos: set[int]) -> list[list[int]]:
    """The backbone's greedy answers, in the order of the prompts; prompts of like lengths are decoded together."""
    order = by_length(prompts)
    found = answer_all(model, [prompts[i] for i in order], max_new_tokens, batch_size, eos)
    bar = tqdm(found, total=len(prompts), desc="answering", unit="prompt", disable=None)
    answers = dict(zip(order, bar, strict=True))
    return [answers[i] for i in range(len(prompts))]


def own_text(model: MedusaModel, prompts, texts, max_new_tokens: int, collate, batch_size: int, beam: int = 0) -> dict:
    """texts: `own_answers` to the prompts, of at most max_new_tokens. -> `rows` and `top` as in `reference_text`, but
    on these, and the trees' `acceptance`. Trees are built from the first half of the prompts and measured on the
    second. beam: also of trees that each pass grows with this beam; the first half says with which temperature of the
    heads."""
    half = len(prompts) // 2
    result = figures(own_ranks(model, prompts, texts, collate, batch_size))
    if beam:

        def grown(part: slice, temperature: float) -> list[dict]:
            size = Adaptive(max(NODES), beam, temperature)
            return own_trees(model, prompts[part], texts[part], size, collate, batch_size)

        tried = {t: grown(slice(half or None), t) for t in TEMPERATURES}
        temperature = max(tried, key=lambda t: sum(row["length"] for row in tried[t]))
        for row, chosen in zip(grown(slice(half, None), temperature), tried[temperature], strict=True):
            result["acceptance"].append(row | {"expected": chosen["length"]})
        result["temperature"] = temperature
    return {"conversations": len(prompts), "max_new_tokens": max_new_tokens} | result


def figures(tables: list[torch.Tensor]) -> dict:
    """`rows`, `top` and `acceptance` of answers whose ranks are the tables `[n, K+1]` of `own_ranks`."""
    half = len(tables) // 2
    counts = count(torch.cat(tables))
    choose = count(torch.cat(tables[: half or None]))  # a single prompt serves as both halves
    texts = [[right_path(row) for row in table[:-1, 1:].tolist()] for table in tables]
    trees = acceptance(shares(choose), texts[half:], texts[: half or None])
    return {"rows": counts.sum(1).tolist(), "top": shares(counts), "acceptance": trees}
