"""Pictures of decoding: tokens per second, the time of a pass, and two answers side by side as they come.

    python benchmark/plot_decoding.py --decoding A.csv B.csv --step_time C.csv --trace D.json --out docs/images

--decoding   decoding.png: tokens/s of plain decoding and of each tree, a panel per machine, a colour per label
--step_time  step_time.png: a pass against the guesses it checks, a line per number of heads, and the time that
             reading its bytes takes; a panel per model, GPU and length
--trace      decoding.gif: plain decoding on the left, with heads on the right; --slow_down F times as slow as it was
             (drawn by benchmark/plot_trace.py)

The files are those of benchmark/decoding_speed.py and benchmark/step_time.py. Of several rows for one bar or point the
last counts.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plot_trace import animate, read_trace

GREY, ORANGE, BLUE = "#6b6b6b", "#d97706", "#0060a8"  # of different lightness too
COLORS = (BLUE, ORANGE, "#4d7c0f", "#9d174d", "#0f766e")
DECODING = ("label", "tree", "nodes", "tokens_per_s", "tokens_per_pass", "speed_up", "batch_size", "dtype", "machine")
STEP_TIME = (
    *("model", "heads", "nodes", "length", "batch_size", "step_ms", "bandwidth_tb_s", "gpu"),
    *("floor_ms", "heads_floor_ms", "cache_gb"),
)


def read(paths: list[Path], columns: tuple[str, ...]) -> list[dict]:
    """The rows of CSVs. Raises SystemExit if a file or a column is missing."""
    rows: list[dict] = []
    for path in paths:
        if not path.is_file():
            sys.exit(f"there is no file {path}")
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [key for key in columns if key not in (reader.fieldnames or ())]
            if missing:
                sys.exit(f"{path} cannot be drawn: it has no column {', '.join(missing)}")
            rows += reader
    return rows


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Rows by the values of some columns, in the order of the file."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def panels(count: int, stacked: bool = False) -> tuple[plt.Figure, list[plt.Axes]]:
    """A picture of several, side by side or, wider, one below the other."""
    size = (8, 4.4 * count) if stacked else (max(6.4, 5.2 * count), 4.8)
    picture = plt.figure(figsize=size, dpi=150, layout="constrained")
    axes = picture.subplots(*((count, 1) if stacked else (1, count)), squeeze=False).ravel()
    for one in axes:
        one.grid(axis="y", alpha=0.3)
        one.set_axisbelow(True)
    return picture, list(axes)


def of_batch(batch_size: str) -> str:
    return "" if batch_size == "1" else f", batch {batch_size}"


def tree_name(row: dict) -> str:
    return {"plain": "plain", "chain": f"chain\nof {row['nodes']}"}.get(row["tree"], row["nodes"])


def place(row: dict) -> tuple[bool, bool, int]:
    """To sort by: plain, the chain, the best trees."""
    return row["tree"] != "plain", row["tree"] != "chain", int(row["nodes"])


def decoding(rows: list[dict]) -> plt.Figure:
    """Bars of tokens/s by tree; on each how many times as fast as plain decoding, and the tokens per pass."""
    machines = grouped(rows, "machine", "dtype", "batch_size")
    names = list(dict.fromkeys(row["label"] for row in rows))
    picture, all_axes = panels(len(machines), stacked=len(names) > 1)
    for axes, ((machine, dtype, batch_size), of_machine) in zip(all_axes, machines.items(), strict=True):
        ticks = list(dict.fromkeys(map(tree_name, sorted(of_machine, key=place))))
        labels = grouped(of_machine, "label")
        width = 0.84 / len(labels)
        for i, ((label,), mine) in enumerate(labels.items()):
            mine = list({tree_name(row): row for row in mine}.values())
            at = [ticks.index(tree_name(row)) + (i - (len(labels) - 1) / 2) * width for row in mine]
            colors = [GREY if row["tree"] == "plain" and len(labels) == 1 else COLORS[i % len(COLORS)] for row in mine]
            bars = axes.bar(at, [float(row["tokens_per_s"]) for row in mine], width * 0.94, color=colors, label=label)
            texts = [f"{float(row['speed_up']):.2f} x\n{float(row['tokens_per_pass']):.2f}" for row in mine]
            texts = ["" if row["tree"] == "plain" else text for row, text in zip(mine, texts, strict=True)]
            axes.bar_label(bars, texts, fontsize=7.5 if len(labels) < 3 else 6, padding=2)
        axes.margins(y=0.12)  # room for the numbers
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel="guesses in the tree", ylabel="tokens/s", ylim=(0, None))
        axes.set_title(f"{machine}, {dtype}{of_batch(batch_size)}", fontsize=10)
        if len(labels) > 1:
            axes.legend(frameon=False, fontsize=8, loc="upper left")
            axes.margins(y=0.3)  # and for the legend
    picture.suptitle("Greedy decoding" + (f", {names[0]}" if len(names) == 1 else ""))
    picture.supxlabel("on the bars: times as fast as plain decoding, and tokens per pass", fontsize=7.5)
    return picture


def step_time(rows: list[dict]) -> plt.Figure | None:
    """The measured time of a pass, a line for each number of heads, over the stacked times of reading what the most
    heads need. On the points the break-even: tokens that a pass must yield to be worth it. None if no size has a time.
    """
    rows = [row for row in rows if row["step_ms"] and not row.get("medusa_vocab_size")]  # older files lack the second
    groups = grouped(rows, "model", "gpu", "length", "batch_size")
    if not groups:
        return None
    picture, all_axes = panels(len(groups))
    highest = max(float(row["step_ms"]) for mine in groups.values() for row in mine)
    numbers = sorted({int(row["heads"]) for mine in groups.values() for row in mine}, reverse=True)
    for axes, ((model, gpu, length, batch_size), of_panel) in zip(all_axes, groups.items(), strict=True):
        by_nodes = sorted(of_panel, key=lambda row: int(row["nodes"]))
        mine = {(int(row["heads"]), int(row["nodes"])): row for row in by_nodes}
        plain, lines = None, {heads: list[tuple]() for heads, _ in sorted(mine, reverse=True)}
        for (heads, nodes), row in mine.items():
            if nodes:
                lines[heads].append((nodes, float(row["step_ms"]), row))
            else:
                plain = row
        lines = {heads: points for heads, points in lines.items() if points}
        start = [(0, float(plain["step_ms"]), plain)] if plain else []
        read_nodes, _, most = zip(*(start + next(iter(lines.values()), [])), strict=True)
        reading = {
            "reading the backbone": [float(row["floor_ms"]) for row in most],
            "its keys and values": [float(row["cache_gb"]) / float(row["bandwidth_tb_s"]) for row in most],  # ms
            "the heads in use": [float(row["heads_floor_ms"]) for row in most],
        }
        axes.stackplot(read_nodes, *reading.values(), labels=reading, colors=("#c4c4c4", "#a3c2dc", "#f3c88f"))
        for i, (heads, points) in enumerate(lines.items()):
            x, ms, _ = zip(*(start + points), strict=True)
            label = f"{heads} head{'s' * (heads > 1)}, measured"
            axes.plot(x, ms, color=COLORS[numbers.index(heads) % len(COLORS)], marker="o", ms=4, lw=1.8, label=label)
            for n, time, _ in points if plain else []:
                at = (6, -3) if n == x[-1] else (0, 5) if i == 0 else None  # lines below the first: only at the end
                if at:
                    text = f"{time / start[0][1]:.2f}"
                    axes.annotate(text, (n, time), at, textcoords="offset points", fontsize=7.5, ha="left")
        if plain:
            axes.axhline(start[0][1], color=GREY, ls="--", lw=1, label="plain decoding, measured")
        axes.margins(x=0.12)
        axes.set(xlabel="guesses in the tree", ylabel="ms per pass", ylim=(0, highest * 1.15))
        model = {"llama3_8b": "LLaMA-3-8B shapes"}.get(model, model)
        axes.set_title(f"{model}, {int(length):,} tokens so far{of_batch(batch_size)}\n{gpu}", fontsize=10)
    picture.set_figwidth(5.2 * len(groups) + 2.8)  # beside the panels a legend
    entries = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in all_axes]
    handles = {label: handle for of_axes in entries for handle, label in of_axes}
    picture.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    picture.supxlabel("on the points: tokens that a pass must yield to be as fast as plain decoding", fontsize=7.5)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoding", type=Path, nargs="+", default=[], help="CSVs of benchmark/decoding_speed.py")
    parser.add_argument("--step_time", type=Path, nargs="+", default=[], help="CSVs of benchmark/step_time.py")
    parser.add_argument("--trace", type=Path, help="what benchmark/decoding_speed.py --trace wrote")
    parser.add_argument("--slow_down", type=float, default=1, help="of the animation; 1 is as fast as it was")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    args = parser.parse_args()
    if not args.slow_down > 0:
        parser.error("--slow_down must be above 0")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, paths, columns, draw in (
        ("decoding", args.decoding, DECODING, decoding),
        ("step_time", args.step_time, STEP_TIME, step_time),
    ):
        rows = read(paths, columns)
        picture = draw(rows) if rows else None
        if picture:
            picture.savefig(args.out / f"{name}.png", facecolor="white")
            plt.close(picture)
        elif paths:
            print(f"no row for {name}.png: skipped", file=sys.stderr)
    if args.trace:
        path = args.out / "decoding.gif"
        count = animate(read_trace(args.trace), path, args.slow_down)
        print(f"{path}: {count} frames, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
