"""Accuracy per head over a training run: trainer_state.json -> CSV -> picture.

    python benchmark/accuracy.py out/heads benchmark/results/NAME.csv docs/images/NAME.png "TITLE"

Training accuracy comes from rows that the heads have not seen before (within one epoch). Held-out accuracy is there
for the steps at which the run evaluated. With "-" instead of a run directory, draws the CSV that is there.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("step", "tokens_per_s", "step_time_s", "mfu", "peak_allocated_gib", "learning_rate")


def write_csv(run: Path, path: Path):
    """One row per log entry: COLUMNS and every loss and accuracy of a head."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    history = [entry for entry in history if any("head_" in key for key in entry)]
    columns = [*COLUMNS, *sorted({key for entry in history for key in entry if "head_" in key})]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for entry in history:
            writer.writerow({key: round(value, 5) if key in columns else value for key, value in entry.items()})


def draw(path: Path, picture: Path, title: str):
    """A line (training) and dots (held out) per head, readable on a light and on a dark page."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    heads = sorted(int(key.split("_")[1]) for key in rows[0] if key.startswith("head_") and key.endswith("_top1"))
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for k in (k for k in heads if k > 0):
        for prefix, style in (("", {"lw": 1.8}), ("eval_", {"marker": "o", "ls": "", "ms": 5})):
            key = f"{prefix}head_{k}_top1"
            points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
            if points:
                label = f"head {k}" if not prefix else None
                axes.plot(*zip(*points, strict=True), color=f"C{k - 1}", label=label, **style)
    axes.set(xlabel="optimiser step", ylabel="top-1 accuracy", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(title="line: training\ndots: held out", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(picture, facecolor="white")


if __name__ == "__main__":
    run, csv_path, picture, title = sys.argv[1:5]
    if run != "-":
        write_csv(Path(run), Path(csv_path))
    draw(Path(csv_path), Path(picture), title)
