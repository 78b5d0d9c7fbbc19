"""Runs a script of benchmark/ in this process, and reads and writes CSVs."""

import csv
import sys


def run(script, monkeypatch, *words) -> list[dict]:
    """Runs a script with these words -> the rows of its --out, the last word."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    try:
        script.main()
    finally:
        rows = rows_of(words[-1]) if words[-1].exists() else []
    return rows


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path
