"""The benchmarks' CSVs as pictures: peak memory and tokens/s of the three implementations at each length.

    python benchmark/plot.py --memory A_memory.csv --throughput A_throughput.csv B_throughput.csv --out docs/images

Writes memory_Stage1_num_head_3.png and the like. A run ends where memory does, so lengths that are missing after an
OOM are drawn as OOM too, others as "not run". Of several rows for one bar (other options) the largest value counts.
"""

import argparse
import csv
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

LENGTHS = (1024, 2048, 4096, 8192)
IMPLEMENTATIONS = {  # label and colour; the colours differ in lightness too
    "hf": ("Hugging Face (all logits)", "#6b6b6b"),
    "liger": ("Liger's default", "#d97706"),
    "ours": ("this project", "#0060a8"),
}
KEYS = ("stage", "heads", "batch_size", "length", "implementation", "options", "gpu")
KINDS = {  # column drawn, other column needed, title, y axis, number format
    "memory": ("peak_gib", "world_size", "Peak memory per GPU", "GiB per GPU, peak", "{:.1f}"),
    "throughput": ("tokens_per_s", "data", "Training throughput", "tokens/s", "{:,.0f}"),
}


def is_drawn(kind: str, row: dict) -> bool:
    """Whether a row was measured under the conditions that the pictures state."""
    if row.get("medusa_vocab_size") or row.get("head_type", "medusa") != "medusa":  # older files lack these columns
        return False
    if kind == "memory":
        return (row["options"], row["batch_size"], row["world_size"]) == ("fsdp2", "4", "8")
    return (row["data"], row["batch_size"]) == ("random", "4") and "fp8" not in row["options"]


def read(kind: str, paths: list[Path]) -> list[dict]:
    """The rows to draw. Raises SystemExit if a file or a column is missing."""
    value, other = KINDS[kind][:2]
    rows = []
    for path in paths:
        if not path.is_file():
            sys.exit(f"there is no file {path}")
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [key for key in (*KEYS, value, other) if key not in (reader.fieldnames or ())]
            if missing:
                sys.exit(f"{path} is not a {kind} CSV: it has no column {', '.join(missing)}")
            rows += [row for row in reader if is_drawn(kind, row)]
    return rows


def bars(rows: list[dict], value: str) -> list[dict | str]:
    """For each length one implementation's row to draw, or the text to write instead of a bar."""
    found: list[dict | str] = []
    for length in map(str, LENGTHS):
        of_length = [row for row in rows if row["length"] == length]
        numbers = [row for row in of_length if row[value] != "OOM"]
        if numbers:
            found.append(max(numbers, key=lambda row: float(row[value])))
        else:
            found.append("OOM" if of_length or "OOM" in found[-1:] else "not run")
    return found


def figure(kind: str, rows: list[dict], stage: str, heads: str) -> plt.Figure | None:
    """Bars, grouped by length, readable on a light and on a dark page. None if there is nothing to draw."""
    value, _, title, ylabel, number = KINDS[kind]
    rows = [row for row in rows if (row["stage"], row["heads"]) == (stage, heads) and int(row["length"]) in LENGTHS]
    if not rows:
        return None
    picture, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    drawn, notes = [], []
    for i, (implementation, (label, color)) in enumerate(IMPLEMENTATIONS.items()):
        found = bars([row for row in rows if row["implementation"] == implementation], value)
        of_bars = [(x + (i - 1) * 0.28, row) for x, row in enumerate(found) if isinstance(row, dict)]
        drawn += [row for _, row in of_bars]
        container = axes.bar([x for x, _ in of_bars], [float(row[value]) for _, row in of_bars], 0.26, color=color)
        axes.bar_label(container, [number.format(bar.get_height()) for bar in container], fontsize=7.5, padding=2)
        for x, text in enumerate(found):
            if isinstance(text, str):
                style: dict[str, Any] = {"weight": "bold", "fontsize": 9} if text == "OOM" else {"fontsize": 8}
                at: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
                axes.annotate(text, (x + (i - 1) * 0.28, 0), rotation=90, color=color, **at, **style)
        if kind == "throughput":
            options = dict.fromkeys(row["options"] for _, row in of_bars if row["options"])
            notes += [f"{label}: {' / '.join(options)}"] if options else []
    axes.set_xticks(range(len(LENGTHS)), list(map(str, LENGTHS)))
    axes.margins(y=0.08)  # room for the numbers
    axes.set(xlabel="sequence length", ylabel=ylabel, xlim=(-0.5, len(LENGTHS) - 0.5), ylim=(0, None))
    axes.set_title(f"{title}, stage {stage}, {heads} heads", pad=28)
    patches = [Patch(color=color, label=label) for label, color in IMPLEMENTATIONS.values()]  # even those without bars
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    gpus = dict.fromkeys(row["gpu"] for row in drawn or rows)
    conditions = [" / ".join(gpus), "LLaMA-3-8B shapes", "batch 4"]
    conditions += ["one rank of 8" if kind == "memory" else "one GPU", "bf16", "AdamW"]
    conditions += ["gradient checkpointing"] if stage == "2" else []
    caption = [textwrap.fill(line, 125) for line in (", ".join(conditions), *notes)]
    picture.supxlabel("\n".join(caption), fontsize=7.5)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=Path, nargs="+", default=[], help=f"CSVs of benchmark/{kind}.py")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {kind: read(kind, getattr(args, kind)) for kind in KINDS}
    for kind, rows in tables.items():
        for stage, heads in (("1", "3"), ("1", "5"), ("2", "3"), ("2", "5")) if getattr(args, kind) else ():
            path = args.out / f"{kind}_Stage{stage}_num_head_{heads}.png"
            picture = figure(kind, rows, stage, heads)
            if picture is None:
                print(f"no row for {path.name}: skipped", file=sys.stderr)
            else:
                picture.savefig(path, facecolor="white")
                plt.close(picture)


if __name__ == "__main__":
    main()
