"""How often is head k right? The rank of the right token among a head's guesses, counted on two texts.

reference text   the answers of conversations that somebody wrote
own text         what the backbone itself answers, greedily, to the same questions

A rank is 0 for a head's best guess; TOP stands for all ranks from TOP on, NO_TOKEN for a place where the text has no
token for that head.
"""

import torch
from tqdm import tqdm

from conversations.batches import Collator
from conversations.targets import IGNORE, shifted_targets
from decoding.acceptance import NO_TOKEN, TOP, acceptance, right_path
from decoding.answers import answer_all
from medusa_model import MedusaModel
from model.heads import cap

ROWS = 512  # rows whose logits exist at once: 512 x 128256 x 4 bytes = 0.26 GB


def ranks(logits_of, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Ranks `[R, n]` of n targets for each row, `[R, n]` with IGNORE where there is none. hidden `[R, H]`.

    The logits of a row are computed once, however many targets it has.
    """
    found = torch.empty_like(targets)
    for x, t, out in zip(hidden.split(ROWS), targets.split(ROWS), found.split(ROWS), strict=True):
        logits = logits_of(x)
        for i, target in enumerate(t.split(1, dim=1)):
            mine = logits.gather(1, target.clamp(min=0))
            # bf16 logits tie; as argmax does, the lower token id of two comes first. Beside NaN nothing is right.
            first = torch.arange(logits.shape[1], device=t.device) < target
            rank = (~(logits <= mine) | ((logits == mine) & first)).sum(1).clamp(max=TOP)
            out[:, i] = torch.where(target[:, 0] == IGNORE, NO_TOKEN, rank)
    return found


def ranks_ahead(hidden: torch.Tensor, labels: torch.Tensor, logits_of, shifts: range) -> torch.Tensor:
    """hidden `[B, T, H]`, labels `[B, T]` -> `[B, T, len(shifts)]`: at each place, the ranks under `logits_of` of the
    labels that many places ahead; NO_TOKEN where there is none."""
    targets = torch.stack([shifted_targets(labels, shift) for shift in shifts], dim=-1)
    found = torch.full_like(targets, NO_TOKEN)
    counts = (targets != IGNORE).any(-1)
    found[counts] = ranks(logits_of, hidden[counts], targets[counts])
    return found


def ranks_of_heads(model: MedusaModel, hidden: torch.Tensor, labels: torch.Tensor, before: bool = False):
    """Ranks `[B, T, K+1]` of the label k + 1 places ahead under head k; head 0 is the lm_head.

    before: -> (these, the ranks `[B, T, K+1]` of the same labels under the lm_head: untrained heads are copies of it).
    """
    shifts = range(1, len(model.medusa_heads) + 2)
    copies = ranks_ahead(
        hidden, labels, lambda x: cap(model.lm_head(x), model.softcap), shifts if before else shifts[:1]
    )
    trained = [
        ranks_ahead(hidden, labels, lambda x, head=head: head(x, softcap=model.softcap), shifts[k : k + 1])
        for k, head in enumerate(model.medusa_heads, start=1)
    ]
    found = torch.cat([copies[..., :1], *trained], dim=-1)
    return (found, copies) if before else found


def count(found: torch.Tensor) -> torch.Tensor:
    """Ranks `[..., heads]` -> int64 `[heads, TOP+1]`: how often each head has each rank."""
    counts = [torch.bincount(column + 1, minlength=TOP + 2) for column in found.flatten(0, -2).unbind(1)]
    return torch.stack(counts)[:, 1:]  # without NO_TOKEN, which is -1


def shares(counts: torch.Tensor) -> list[list[float]]:
    """Counts `[heads, TOP+1]` -> `[heads][TOP]`: the shares of rank <= 1..TOP."""
    counts = counts.double()
    return (counts.cumsum(1)[:, :TOP] / counts.sum(1, keepdim=True).clamp(min=1)).tolist()


@torch.inference_mode()
def reference_text(model: MedusaModel, batches) -> dict:
    """-> {"rows": [K+1], "top": [K+1][TOP], "before": [K+1][TOP]}, index = head; accuracies of rank <= 1..TOP.
    `before`: of untrained heads."""
    device, heads = model.lm_head.weight.device, len(model.medusa_heads) + 1
    top, before = (torch.zeros(heads, TOP + 1, dtype=torch.int64, device=device) for _ in range(2))
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None):
        hidden, labels = model.last_hidden_state(batch["input_ids"].to(device)), batch["labels"].to(device)
        for counts, found in zip((top, before), ranks_of_heads(model, hidden, labels, before=True), strict=True):
            counts += count(found)
    return {"rows": top.sum(1).tolist(), "top": shares(top), "before": shares(before)}


def by_length(sequences: list[list[int]]) -> list[int]:
    """The order in which batches need little padding."""
    return sorted(range(len(sequences)), key=lambda i: len(sequences[i]))


@torch.inference_mode()
def own_ranks(model: MedusaModel, prompts, answers, collate: Collator, batch_size: int) -> list[torch.Tensor]:
    """One table `[n, K+1]` of ranks per prompt, n its answer's tokens: row t is read where the backbone chose token t,
    and has the ranks of token t under the lm_head, t + 1 under head 1, ...

    Heads would see the answer's first tokens from rows before, in the prompt, too; but no pass stands there.
    """
    device = model.lm_head.weight.device
    both = list(zip(prompts, answers, strict=True))
    rows = [{"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer} for prompt, answer in both]
    order, tables = by_length([row["input_ids"] for row in rows]), [None] * len(rows)
    for start in tqdm(range(0, len(rows), batch_size), desc="reading answers", unit="batch", disable=None):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen])
        hidden = model.last_hidden_state(batch["input_ids"].to(device))
        found = ranks_of_heads(model, hidden, batch["labels"].to(device)).cpu()
        for i, table in zip(chosen, found, strict=True):
            tables[i] = table[len(prompts[i]) - 1 :][: len(answers[i])]
    return tables


def own_text(model: MedusaModel, prompts, eos: set[int], max_new_tokens: int, collate, batch_size: int) -> dict:
    """`rows` and `top` as of `reference_text`, but on the backbone's own answers, and tokens per pass of trees
    (`acceptance`). Trees are chosen on the first half of the prompts and measured on the other half."""
    order, answers = by_length(prompts), [None] * len(prompts)
    found = answer_all(model, [prompts[i] for i in order], max_new_tokens, batch_size, eos)
    bar = tqdm(found, total=len(prompts), desc="answering", unit="prompt", disable=None)
    for i, answer in zip(order, bar, strict=True):
        answers[i] = answer
    tables = own_ranks(model, prompts, answers, collate, batch_size)
    half = len(tables) // 2  # no tree is judged on the text it was chosen for
    counts, choose = count(torch.cat(tables)), count(torch.cat(tables[: half or None]))
    texts = [[right_path(row) for row in table[:-1, 1:].tolist()] for table in tables[half:]]
    return {
        "conversations": len(tables),
        "max_new_tokens": max_new_tokens,
        "rows": counts.sum(1).tolist(),
        "top": shares(counts),
        "acceptance": acceptance(shares(choose), texts),
    }
