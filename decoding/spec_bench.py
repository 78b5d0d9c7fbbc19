"""Spec-Bench's table (hemingkx/Spec-Bench, evaluation/speed.py), counted as it counts: for each of its six groups and
overall, the mean of tokens over all passes, and the mean over questions of tokens per second, prefill included.

It differs in that only first turns are asked: a second question follows from an answer, of which there would be two.
"""

import json
from pathlib import Path

from common.errors import BadInput
from conversations.prompts import question
from decoding.answers import Decoded

GROUPS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")  # its categories


def read_questions(path: str) -> list[dict]:
    """Conversations with their `group`, of Spec-Bench's question.jsonl or of chat records with a `group`. Raises
    BadInput for a line that is neither."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read --spec_bench {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            group = record.get("group") or record["category"]
            group = "mt_bench" if group in MT_BENCH else group
            text = record["turns"][0] if "turns" in record else record["messages"][0]["content"]
            if group not in GROUPS or not isinstance(text, str):
                raise ValueError("no group or question of Spec-Bench")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BadInput(
                f"--spec_bench {path}: line {number} is no question of Spec-Bench (a category and turns, or a group "
                "and messages)"
            ) from error
        found.append(question(text) | {"group": group})
    if not found:
        raise BadInput(f"--spec_bench {path} is empty")
    return found


def speeds(run: Decoded) -> list[float]:
    """Tokens per second of each question, the prefill and its token included."""
    times = zip(run.answers, run.prefills, run.seconds, strict=True)
    return [len(answer) / (prefill + passes) for answer, prefill, passes in times]


def table(plain: Decoded, heads: Decoded, groups: list[str]) -> list[dict]:
    """A row for each group that is there, and one for all. groups: each question's."""
    rows = []
    for name in (*GROUPS, "overall"):
        numbers = [i for i, group in enumerate(groups) if name in (group, "overall")]
        if not numbers:
            continue
        base, found = plain.only(numbers), heads.only(numbers)
        pieces = [n for one in found.pieces for n in one]
        row = {"task": name, "questions": len(numbers), "mean accepted tokens": sum(pieces) / max(1, len(pieces))}
        fast, slow = (sum(speeds(run)) / len(numbers) for run in (found, base))
        rows.append(row | {"tokens/s": fast, "baseline tokens/s": slow, "speedup": fast / slow})
    return rows
