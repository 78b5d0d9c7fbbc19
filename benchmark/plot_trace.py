"""The animation of plot_decoding.py: two answers to one prompt side by side, as they came, as a GIF.

It draws what `benchmark/decoding_speed.py --trace D.json` wrote: for plain decoding and for decoding with heads the
tokens of each pass and the seconds after the first token. The whole answer is laid out once, so that nothing moves
while it comes, and each frame shows the tokens that were there at its time. A run of its own:

    python benchmark/plot_decoding.py --trace D.json --slow_down 2 --out docs/images
"""

import json
import re
import sys
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import NamedTuple

from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, TOP, BOTTOM = (900, 420), 16, 84, 36  # pixels; between TOP and BOTTOM are the answers
FRAMES, SHORTEST, LAST = 120, 50, 3000  # at most so many; ms of a frame at least, and of the last one
INK, GUESS, GREY = "#222222", "#0060a8", "#6b6b6b"


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
    """Raises SystemExit if it is not what benchmark/decoding_speed.py wrote."""
    try:
        trace = json.loads(path.read_text())
        ok = all(trace[key]["passes"][0][1] and "nodes" in trace[key] for key in ("plain", "heads"))
        ok = ok and {"prompt", "label", "machine"} <= set(trace)
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, IndexError, TypeError):
        ok = False
    return trace if ok else sys.exit(f"{path} is no trace: make it with benchmark/decoding_speed.py --trace")
