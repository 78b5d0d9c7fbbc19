"""Shows a person which tokens of a conversation are labels."""

import itertools
import os
import sys

from conversations.targets import IGNORE
from conversations.template import ChatTemplate

GREEN, INVERSE, DIM, PLAIN = "\033[32m", "\033[32;7m", "\033[2m", "\033[0m"


def show(rows, chat: ChatTemplate, count: int, out=None):
    """Prints the first `count` rows: labels in green, special tokens among them (ends of turns) inverse, all else
    dimmed. Without colours (no terminal, or NO_COLOR is set) labels stand between ⟦ and ⟧."""
    out = out or sys.stdout
    coloured = out.isatty() and "NO_COLOR" not in os.environ
    for number in range(min(count, len(rows))):
        row = rows[number]
        ids, labels = ([int(i) for i in row[key]] for key in ("input_ids", "labels"))
        print(f"--- row {number + 1}: {len(ids)} tokens, {len(ids) - labels.count(IGNORE)} labels", file=out)
        print(paint(ids, labels, chat, coloured), end="\n\n", file=out)


def paint(ids: list[int], labels: list[int], chat: ChatTemplate, coloured: bool) -> str:
    """One row as text."""
    parts = []
    for is_label, group in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE):
        text = chat.tokenizer.decode([token for token, _ in group])
        if not coloured:
            parts.append(f"⟦{text}⟧" if is_label else text)
            continue
        style = GREEN if is_label else DIM
        if is_label:
            text = chat.added.sub(lambda found: f"{INVERSE}{found[0]}{PLAIN}{GREEN}", text)
        parts.append(f"{style}{text}{PLAIN}")
    return "".join(parts)
