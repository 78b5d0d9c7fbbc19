"""Do README.md and docs/ say what the raw files say? Computes each figure anew and looks for it in the text.

    python benchmark/check_figures.py

Prints a line for each claim and each table: OK, or what the raw data give and what the text says. Ends with status 1
if one differs. Needs nothing but Python. What has no raw file cannot be checked, such as the quickstart's figures.

claims.py has the claims.
"""

import re
import sys
from pathlib import Path

from claims import CLAIMS, TABLES

TEXTS = Path(__file__).resolve().parent.parent


def claim_problems(text: str, words: str, figures: list) -> list[str]:
    """Empty if the words stand in the text with these figures, else what stands there."""
    text, right = " ".join(text.replace("**", "").split()), words.format(*figures)
    if re.search(rf"(?<![\d.,]){re.escape(right)}(?!\d|[.,]\d)", text):
        return []
    shape = re.sub(r"\\{.*?\\}", r"[-.\\d][\\d.,]*", re.escape(words))
    found = re.search(shape, text)
    return [f"the raw data give it like that, the text says: {found[0]}" if found else "the text has no such words"]


def table_problems(text: str, headings: str, expected) -> list[str]:
    """What is wrong in the table with these headings, cell by cell. Rows are found by the beginning of their label."""
    tables = [[cells(line) for line in block.splitlines()] for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    tables = [table for table in tables if table[0] == cells(f"|{headings}|")]
    if len(tables) != 1:
        return [f"the text has {len(tables)} tables with the headings {headings!r}"]
    problems, (names, _, *left) = [], tables[0]
    for label, *right in expected:
        lines = [line for line in left if line[0].startswith(label)]
        if not lines:
            problems.append(f"there is no row {label!r}")
            continue
        left.remove(line := min(lines, key=lambda line: len(line[0])))
        for name, says, gives in zip(names[1:], line[1:], right, strict=True):
            if gives is not None and gives != says:
                problems.append(f"row {label!r}, column {name!r}: the raw data give {gives!r}, the text says {says!r}")
    return problems + [f"row {line[0]!r} is not in the raw data" for line in left]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("**", "").strip()[1:-1].split("|")]


def main() -> int:
    bad = total = 0
    for file in dict.fromkeys([*CLAIMS, *TABLES]):
        text = (TEXTS / file).read_text()
        for checks, problems in ((CLAIMS, claim_problems), (TABLES, table_problems)):
            for words, compute in checks.get(file, []):
                expected = list(compute())
                found = problems(text, words, expected)
                print(f"{'NO' if found else 'OK'} {file}: {words.format(*expected)}", *found, sep="\n     ")
                bad, total = bad + bool(found), total + 1
    print(f"{bad} of {total} differ from benchmark/results/" if bad else f"all {total} agree with benchmark/results/")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
