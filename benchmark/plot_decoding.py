"""Pictures of decoding: tokens per second, the time of a pass, and two answers side by side as they come.

    python benchmark/plot_decoding.py --decoding A.csv B.csv --step_time C.csv --trace D.json --out docs/images

--decoding   decoding.png: tokens/s of plain decoding and of each tree, a panel per machine, a colour per label
--step_time  step_time.png: a pass against the guesses it checks, a line per number of heads, and the time that
             reading its bytes takes; a panel per model, GPU and length
--trace      decoding.gif: plain decoding on the left, with heads on the right; --slow_down F times as slow as it was

The files are those of benchmark/decoding.py and benchmark/step_time.py. Of several rows for one bar or point the last
counts.
"""

import argparse
import csv
import json
import re
import sys
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

GREY, ORANGE, BLUE = "#6b6b6b", "#d97706", "#0060a8"  # of different lightness too
COLORS = (BLUE, ORANGE, "#4d7c0f", "#9d174d", "#0f766e")
DECODING = ("label", "tree", "nodes", "tokens_per_s", "tokens_per_pass", "speed_up", "batch_size", "dtype", "machine")
STEP_TIME = ("model", "heads", "nodes", "length", "batch_size", "step_ms", "bandwidth_tb_s", "gpu")
STEP_TIME += ("floor_ms", "heads_floor_ms", "cache_gb")


def read(paths: list[Path], columns: tuple[str, ...]) -> list[dict]:
    """The rows of CSVs. Raises SystemExit if a file or a column is missing."""
    rows = []
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
    groups = {}
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
    groups = grouped([row for row in rows if row["step_ms"]], "model", "gpu", "length", "batch_size")
    if not groups:
        return None
    picture, all_axes = panels(len(groups))
    highest = max(float(row["step_ms"]) for mine in groups.values() for row in mine)
    numbers = sorted({int(row["heads"]) for mine in groups.values() for row in mine}, reverse=True)
    for axes, ((model, gpu, length, batch_size), mine) in zip(all_axes, groups.items(), strict=True):
        mine = {(int(row["heads"]), int(row["nodes"])): row for row in sorted(mine, key=lambda row: int(row["nodes"]))}
        plain, lines = None, {heads: [] for heads, _ in sorted(mine, reverse=True)}
        for (heads, nodes), row in mine.items():
            if nodes:
                lines[heads].append((nodes, float(row["step_ms"]), row))
            else:
                plain = row
        lines = {heads: points for heads, points in lines.items() if points}
        start = [(0, float(plain["step_ms"]), plain)] if plain else []
        nodes, _, most = zip(*(start + next(iter(lines.values()), [])), strict=True)
        reading = {
            "reading the backbone": [float(row["floor_ms"]) for row in most],
            "its keys and values": [float(row["cache_gb"]) / float(row["bandwidth_tb_s"]) for row in most],  # ms
            "the heads in use": [float(row["heads_floor_ms"]) for row in most],
        }
        axes.stackplot(nodes, *reading.values(), labels=reading, colors=("#c4c4c4", "#a3c2dc", "#f3c88f"))
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
    handles = {label: handle for of_panel in entries for handle, label in of_panel}
    picture.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    picture.supxlabel("on the points: tokens that a pass must yield to be as fast as plain decoding", fontsize=7.5)
    return picture


SIZE, MARGIN, TOP, BOTTOM = (900, 420), 16, 84, 36  # pixels; between TOP and BOTTOM are the answers
FRAMES, SHORTEST, LAST = 120, 50, 3000  # at most so many; ms of a frame at least, and of the last one
INK, GUESS = "#222222", BLUE


class Run(NamedTuple):
    """A part of an answer that one token brought, where it stands and when it came."""

    line: int
    x: float
    text: str
    color: str
    seconds: float


def runs(passes: list, font, width: int) -> list[Run]:
    """The whole answer, wrapped at words to `width` pixels, so that nothing moves while it comes."""
    chars = []  # (character, which token, its colour, its time)
    for number, (seconds, texts) in enumerate(passes):
        for i, text in enumerate(texts):
            color = GUESS if i < len(texts) - 1 else INK  # the last one is the backbone's own
            chars += [(char, (number, i), color, seconds) for char in text]
    found, line, x, at = [], 0, 0.0, 0
    for word in re.findall(r"\n|[^\S\n]+|\S+", "".join(char for char, *_ in chars)):
        of_word, at = chars[at : at + len(word)], at + len(word)
        if word == "\n" or (x + font.getlength(word) > width and x > 0):
            line, x = line + 1, 0.0
        if word.isspace() and x == 0:
            continue
        for (_, color, seconds), same in groupby(of_word, key=lambda char: char[1:]):
            text = "".join(char for char, *_ in same)
            found.append(Run(line, x, text, color, seconds))
            x += font.getlength(text)
    return found


def counters(passes: list, now: float) -> str:
    """What has come `now` seconds after the first token. The first is the prefill's and counts in no rate."""
    done = [(seconds, len(texts)) for seconds, texts in passes if seconds <= now]
    last, tokens = done[-1][0], sum(count for _, count in done)
    if len(done) == 1:
        return f"{tokens} token"
    rate, each = (tokens - done[0][1]) / last, (tokens - done[0][1]) / (len(done) - 1)
    return f"{tokens} tokens   {rate:.0f} tokens/s   {each:.2f} tokens per pass"


def frame(trace: dict, now: float, slow_down: float, fonts: dict) -> Image.Image:
    """Both answers, `now` seconds after their first tokens."""
    image = Image.new("RGB", SIZE, "white")
    draw, pane = ImageDraw.Draw(image), (SIZE[0] - 3 * MARGIN) // 2
    slowed = f", slowed down {slow_down:g} times" if slow_down != 1 else ""
    title = f"{trace['label']}, {trace['machine']}{slowed}"
    draw.text((MARGIN, 10), fit(title, fonts["bold"], SIZE[0] - 2 * MARGIN), INK, fonts["bold"])
    prompt = fit("Prompt: " + " ".join(trace["prompt"].split()), fonts["text"], SIZE[0] - 2 * MARGIN)
    draw.text((MARGIN, 32), prompt, GREY, fonts["text"])
    height = 19
    lines = (SIZE[1] - TOP - BOTTOM) // height
    names = "plain decoding", f"with heads: a tree of {trace['heads']['nodes']} guesses"
    for i, (key, name) in enumerate(zip(("plain", "heads"), names, strict=True)):
        left, passes = MARGIN + i * (pane + MARGIN), trace[key]["passes"]
        draw.text((left, 58), name, INK, fonts["bold"])
        if key == "heads":
            at = left + fonts["bold"].getlength(name + "  ")
            draw.text((at, 58), "(right ones in blue)", GUESS, fonts["text"])
        draw.line((left, TOP - 5, left + pane, TOP - 5), "#cccccc")
        there = [run for run in trace[key]["runs"] if run.seconds <= now]
        first = max(0, max((run.line for run in there), default=0) + 1 - lines)  # older ones have scrolled away
        for run in there:
            if run.line >= first:
                draw.text((left + run.x, TOP + (run.line - first) * height), run.text, run.color, fonts["text"])
        draw.text((left, SIZE[1] - BOTTOM + 10), counters(passes, now), INK, fonts["bold"])
        if now >= passes[-1][0] > 0:
            text = f"{passes[-1][0]:.2f} s"
            draw.text((left + pane - fonts["bold"].getlength(text), SIZE[1] - BOTTOM + 10), text, GREY, fonts["bold"])
    return image


def fit(text: str, font, width: int) -> str:
    """A text that may have to end earlier, in dots, not to be wider."""
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + " ...") > width:
        text = text[:-1]
    return text + " ..."


def animate(trace: dict, path: Path, slow_down: float) -> int:
    """Writes the GIF and returns the number of its frames."""
    # matplotlib's own DejaVu Sans, which has more letters than Pillow's own font
    files = {weight: findfont(FontProperties(weight=weight)) for weight in ("normal", "bold")}
    fonts = {"text": ImageFont.truetype(files["normal"], 14), "bold": ImageFont.truetype(files["bold"], 13)}
    for key in ("plain", "heads"):
        trace[key]["runs"] = runs(trace[key]["passes"], fonts["text"], (SIZE[0] - 3 * MARGIN) // 2)
    end = max(trace[key]["passes"][-1][0] for key in ("plain", "heads"))
    shown = end * slow_down * 1000
    each = 10 * ceil(max(SHORTEST, shown / (FRAMES - 1)) / 10)  # GIF counts in hundredths of a second
    count = 1 + ceil(shown / each)
    images = [frame(trace, min(end, i * each / slow_down / 1000), slow_down, fonts) for i in range(count)]
    last = images[-1].quantize(32, dither=Image.Dither.NONE)  # it has all the colours
    images = [image.quantize(palette=last, dither=Image.Dither.NONE) for image in images]
    durations = [each] * (count - 1) + [LAST]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    return count


def read_trace(path: Path) -> dict:
    """Raises SystemExit if it is not what benchmark/decoding.py wrote."""
    try:
        trace = json.loads(path.read_text())
        ok = all(trace[key]["passes"][0][1] and "nodes" in trace[key] for key in ("plain", "heads"))
        ok = ok and {"prompt", "label", "machine"} <= set(trace)
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, IndexError, TypeError):
        ok = False
    return trace if ok else sys.exit(f"{path} is no trace: make it with benchmark/decoding.py --trace")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoding", type=Path, nargs="+", default=[], help="CSVs of benchmark/decoding.py")
    parser.add_argument("--step_time", type=Path, nargs="+", default=[], help="CSVs of benchmark/step_time.py")
    parser.add_argument("--trace", type=Path, help="what benchmark/decoding.py --trace wrote")
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
