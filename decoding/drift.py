"""Is a backbone that stage 2 has trained still the model that it was?

reference text   how often its `lm_head` is right, and its perplexity, beside the original's
own text         KL(p || q) a token, of the original's distribution p and its own q, along its own greedy answers;
                 and how many 4-grams of an answer are not there twice, beside those of the original's answers to the
                 same prompts: a model that repeats itself has fewer
"""

import math
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from common.errors import BadInput
from conversations.batches import Collator
from conversations.targets import shifted_targets
from decoding.accuracy import own_answers, read_answers
from medusa_model import MedusaConfig, MedusaModel
from model.heads import Teacher, projection_loss

LESS = 0.003  # of the reference's tokens right: more than this is a loss
NOISE = 2.0  # standard errors of a mean over prompts


class Asked(NamedTuple):
    """The prompts, and what the trained model answered to them."""

    prompts: list[list[int]]
    answers: list[list[int]]


def original_of(backbone, model: MedusaModel) -> MedusaModel:
    """The original, without heads. Raises BadInput if it is not a model of the same sizes as the trained one."""
    mine, its = (m.get_output_embeddings().weight.shape for m in (model.backbone, backbone))
    if mine != its:
        raise BadInput(
            f"{backbone.name_or_path} has an lm_head of {list(its)}, and the trained backbone one of {list(mine)}: it "
            "is not the model that this one was trained from"
        )
    original = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=0))
    return original.to(model.lm_head.weight.device).eval()  # type: ignore[arg-type]  # annotated without its self


@torch.inference_mode()
def reference_drift(model: MedusaModel, original: MedusaModel, batches: DataLoader) -> dict:
    """-> {"rows", "top1", "top1_original", "perplexity", "perplexity_original"} of the two `lm_head`s."""
    device = model.lm_head.weight.device
    sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
    for batch in batches:
        targets = shifted_targets(batch["labels"].to(device), 1)
        for m, row in zip((model, original), sums, strict=True):
            hidden = m.last_hidden_state(batch["input_ids"].to(device))
            projection_loss(hidden, targets, m.lm_head.weight, "chunked", m.softcap).add_to(row)
    rows, found = int(sums[0, 2]), dict[str, float]()
    for name, (loss, right, _) in zip(("", "_original"), sums.tolist(), strict=True):
        found |= {f"top1{name}": right / max(1, rows), f"perplexity{name}": math.exp(loss / max(1, rows))}
    return found | {"rows": rows}


@torch.inference_mode()
def own_drift(model: MedusaModel, original: MedusaModel, asked: Asked, collate: Collator, batch_size: int) -> float:
    """KL(p || q) a token, in nats, p the original's and q the model's, along the model's answers."""
    total = torch.zeros(3, dtype=torch.float64, device=model.lm_head.weight.device)
    what = (*asked, collate, batch_size, "comparing")
    pairs = zip(read_answers(model, *what), read_answers(original, *what), strict=True)
    for (_, hidden, _, labels), (_, before, _, _) in pairs:
        teacher, targets = Teacher("kl", before, original.lm_head.weight, 0), shifted_targets(labels, 1)
        weight = model.lm_head.weight
        projection_loss(hidden, targets, weight, "chunked", model.softcap, teacher=teacher).add_to(total)
    return (total[0] / total[2].clamp(min=1)).item()


def distinct(answer: list[int], n: int = 4) -> float | None:
    """The share of an answer's n-grams that are there for the first time. None if it has none."""
    grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(answers: list[list[int]], originals: list[list[int]]) -> dict:
    """-> {"distinct_4", "distinct_4_original", "noise"}: means over the prompts where both answers have a 4-gram, and
    the standard error of their difference. Empty if there are none."""
    pairs = [(distinct(a), distinct(b)) for a, b in zip(answers, originals, strict=True)]
    both = torch.tensor([pair for pair in pairs if None not in pair], dtype=torch.float64).reshape(-1, 2)
    apart = both[:, 0] - both[:, 1]
    if len(both) == 0:
        return {}
    now, before = both.mean(0).tolist()
    noise = (apart.std() / len(both) ** 0.5).item() if len(both) > 1 else math.inf
    return {"distinct_4": now, "distinct_4_original": before, "noise": noise}


def verdict(found: dict) -> str:
    """One line: what is worse than the original by more than LESS, or by more than noise."""
    worse = []
    if (lost := found["top1_original"] - found["top1"]) > LESS:
        worse.append(f"its lm_head is right {lost:.3f} less often")
    if found.get("distinct_4_original", 0) - found.get("distinct_4", 0) > NOISE * found.get("noise", math.inf):
        worse.append("it repeats itself more")
    kl = f" (KL {found['kl']:.3f} a token)" if "kl" in found else ""
    if worse:
        return f"no longer the original: {' and '.join(worse)}{kl}"
    what = "as often right" if "distinct_4" not in found else "as often right, and it repeats itself no more"
    return f"still the original: its lm_head is {what}{kl}"


def drift(model, original, batches, asked: Asked | None, eos, max_new_tokens: int, collate, size: int) -> dict:
    """All of it. asked: None if no own text was asked for. eos: tokens that end an answer. size: answers at once."""
    found = reference_drift(model, original, batches)
    if asked is not None:
        found["kl"] = own_drift(model, original, asked, collate, size)
        found |= repetition(asked.answers, own_answers(original, asked.prompts, max_new_tokens, size, eos))
    return found | {"verdict": verdict(found)}
