"""The raw files of benchmark/results/, and the figures and tables that follow from them, for check_figures.py.

Nothing but Python is needed: no torch, no pandas.
"""

import csv
import heapq
import json
import re
import statistics
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

LENGTHS = (1024, 2048, 4096, 8192)
NAMES = {"hf": "Hugging Face", "liger": "Liger's default", "ours": "this project"}
STEPS = {1: "throughput_h100.csv", 2: "throughput_h200.csv"}  # one GPU, by stage
PASS, OLD_PASS = "step_time_2_h100.csv", "step_time_h100.csv"
KERNELS, OLD_KERNELS = "pass_kernels_h100.txt", "pass_kernels_before_h100.txt"
MEMORY, OLD_MEMORY = "memory.csv", "2026-11-23_memory_h100.csv"
ONE_EPOCH, OWN = "2026-11-23_smollm2_sharegpt_accuracy.json", "smollm2_own_accuracy.json"
READING = "2026-11-26_reading_cpu.csv"
RUNS = "2026-11-23_smollm2_sharegpt_runs.csv"
GENTLE, RUINED = "stage2_2.5e-5_accuracy.json", "stage2_5e-4_accuracy.json"
SETS = {"ShareGPT": "smollm2_sharegpt_accuracy.json", "own answers, 3 ResBlocks": OWN}
SETS["own answers, 1 ResBlock"] = "smollm2_own_1_resblock_accuracy.json"

Row = dict[str, Any]


@cache
def parse(path: Path):
    """A CSV's rows as dicts with figures as floats, a JSON file's value, another file's text."""
    if not path.is_file():
        sys.exit(f"there is no raw file {path}")
    text = path.read_text()
    if path.suffix != ".csv":
        return json.loads(text) if path.suffix == ".json" else text
    reader = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    figure = re.compile(r"-?[\d.]+(e[-+]?\d+)?")
    found: list[Row] = [{key: float(x) if figure.fullmatch(x) else x for key, x in row.items()} for row in reader]
    for row in found:
        if row.get("useful_tflops") and row.get("ceiling_tflops"):
            row["of_ceiling"] = row["useful_tflops"] / row["ceiling_tflops"]
    return found


def load(file: str):
    """A raw file, of 2026-11-24 unless its name says another date."""
    return parse(RESULTS / (file if file.startswith("2026") else f"2026-11-24_{file}"))


def rows(file: str, **columns) -> list[dict]:
    return [row for row in load(file) if all(row[key] == value for key, value in columns.items())]


def row(file: str, **columns) -> dict:
    if len(found := rows(file, **columns)) == 1:
        return found[0]
    sys.exit(f"{file} has {len(found)} rows with {columns}, not one")


def median(file: str, key: str, less: str = "", **columns) -> float:
    """Of a column, or of what it has more than the column `less`."""
    return statistics.median(row[key] - (row[less] if less else 0) for row in rows(file, **columns))


def dot(*shares: float, digits: int = 3) -> str:
    """.293 .166; halves are rounded up."""
    return " ".join(f"{share + 1e-9:.{digits}f}".removeprefix("0") for share in shares)


# Figures that more than one claim needs


def peaks(stage: int, implementation: str = "ours") -> list[float]:
    """GiB of one rank of eight with 5 heads, for the lengths that fit, the shortest first."""
    found = rows(MEMORY, stage=stage, heads=5, implementation=implementation, world_size=8)
    return [row["peak_gib"] for row in found if row["peak_gib"] != "OOM"]


def steps(stage: int, heads: int, implementation: str, fp8: bool = False) -> dict[float, dict]:
    """length -> a whole step on one GPU, for the lengths that fit."""
    found = rows(STEPS[stage], heads=heads, implementation=implementation, data="random", batch_size=4)
    fits = [row for row in found if row["peak_gib"] != "OOM" and (row["options"] == "fp8 backbone") == fp8]
    return {row["length"]: row for row in fits}


def gains(stage: int, over: str) -> list[float]:
    """The smallest and the largest gain of speed over another implementation, of all lengths and numbers of heads."""
    pairs = [(steps(stage, heads, "ours"), steps(stage, heads, over)) for heads in (3, 5)]
    found = [ours[n]["tokens_per_s"] / other[n]["tokens_per_s"] for ours, other in pairs for n in other]
    return [min(found), max(found)]


def fp8_losses() -> list[float]:
    """The smallest and the largest share of its top-1 accuracy that a head loses, in percent."""
    bf16, fp8 = ([row["top1"] for row in rows("fp8_accuracy.csv", trained_with=kind)][1:] for kind in ("bf16", "fp8"))
    found = [100 * (1 - low / high) for low, high in zip(fp8, bf16, strict=True)]
    return [min(found), max(found)]


def trial_ms(run: str) -> float:
    return 1000 * row("experiments_h100.csv", run=run)["step_time_s"]


def a_pass(nodes: int, heads: int = 5, file: str = PASS, length: int = 512) -> dict:
    """LLaMA-3-8B shapes. A tree of 63 guesses is four deep, so of five heads four are in use."""
    return row(file, heads=heads, nodes=nodes, length=length)


def small_pass(nodes: int, file: str = KERNELS) -> float:
    """ms, SmolLM2's shapes, five heads of three ResBlocks."""
    (ms,) = re.findall(rf"=== SmolLM2.* nodes {nodes} heads 5 .* step (\S+) ms", load(file))
    return float(ms)


def decoded(nodes: int, file: str = "decoding_h100.csv", label: str = "own answers") -> dict:
    return row(file, nodes=nodes, label=label)


def follows(nodes: int) -> float:
    """SmolLM2's speed-up by the newer engine's step times: a product, not a run."""
    return decoded(nodes)["tokens_per_pass"] * small_pass(0) / small_pass(nodes)


def simulated(file: str, nodes: int, tree: str = "independent") -> float:
    """Tokens per pass, counted on the backbone's own text."""
    return {(row["tree"], row["nodes"]): row["length"] for row in load(file)["own"]["acceptance"]}[tree, nodes]


@cache
def promised(file: str, heads: int, nodes: int) -> float:
    """Tokens per pass of the best tree if heads are right independently of each other, as in decoding/tree.py."""
    chances, level = [], [1.0]
    for ranks in load(file)["own"]["top"][1 : heads + 1]:
        level = [chance * (upto - below) for chance in level for below, upto in pairwise([0.0, *ranks])]
        chances += level
    return 1 + sum(heapq.nlargest(nodes, chances))


def own_top(file: str, rank: int = 1) -> str:
    """Each head's accuracy on the backbone's own text."""
    return dot(*(head[rank - 1] for head in load(file)["own"]["top"][1:]))


def lm_head(file: str) -> str:
    return dot(load(file)["top"][0][0])


def new_4_grams(model: str) -> str:
    texts = {text["model"]: text["distinct_4_grams_within_an_answer"] for text in load("stage2_texts.json")}
    return dot(texts[model], digits=2)


# Rows of tables


def lined(file: str, lines, *cells: str):
    """For each label and the one row of the file it stands for: what `cells` make of that row."""
    return [[label, *(cell.format(**row(file, **where)) for cell in cells)] for label, where in lines]


def grid(file: str, lines, keys, cell: str, key: str = "length", **where):
    """A column for each value of `key`. A run ends where memory does: what follows is out of memory too."""
    for label, of_line in lines:
        cells = []
        for value in keys:
            found = rows(file, **where, **of_line, **{key: value})
            lost = (found and found[0].get("peak_gib") == "OOM") or (not found and "OOM" in cells)
            cells.append("OOM" if lost else cell.format(**found[0]) if found else "")
        yield [label, *cells]


def step_table(stage: int):
    lines: list[tuple[str, Row]] = [
        (f"{heads} heads, {label}", {"heads": heads, "implementation": name} | ({"options": ""} if stage == 1 else {}))
        for heads in (3, 5)
        for name, label in NAMES.items()
    ]
    fp8 = ("3 heads, `--fp8_backbone`", {"heads": 3, "options": "fp8 backbone"})
    lines[3:3] = [fp8] if stage == 1 else []
    cell = "{tokens_per_s:,.0f}; {peak_gib:.1f}; {of_ceiling:.2f}"
    return grid(STEPS[stage], lines, LENGTHS, cell, data="random", batch_size=4)


def memory_table():
    for stage, heads in ((1, 3), (1, 5), (2, 3), (2, 5)):
        lines = [(label, {"implementation": name}) for name, label in NAMES.items()]
        lines[0] = (f"stage {stage}, {heads} heads: {lines[0][0]}", lines[0][1])
        yield from grid(MEMORY, lines, LENGTHS, "{peak_gib:.1f}", world_size=8, stage=stage, heads=heads)


def rank_table():
    pairs = ((1, 3), (1, 5), (2, 3), (2, 5))
    lines: list[tuple[str, Row]] = [
        (f"stage {stage}, {heads} heads", {"stage": stage, "heads": heads}) for stage, heads in pairs
    ]
    yield from grid(MEMORY, lines, LENGTHS, "{peak_gib:.2f}", implementation="ours")
    lines = [("stage 1, 5 heads, `fsdp1.yaml`", {"implementation": "liger fsdp1"})]
    lines += [("stage 2, 5 heads, `--offload_activations True`", {"implementation": "liger fsdp2 offload"})]
    yield from grid(OLD_MEMORY, lines, LENGTHS, "{peak_gib:.2f}")


def loss_table():
    names = {f"Liger, {size:,} rows": f"liger, {size} rows a chunk" for size in LENGTHS}
    names |= {"torch": "torch, all logits", "Liger's default": "liger, default chunks"}
    names["plain torch in chunks"] = "chunked plain torch, 2048"
    lines = [(label, {"implementation": name}) for label, name in names.items()]
    return grid("head_loss_h100.csv", lines, (4096, 8192, 16384), "{ms:.1f}; {extra_gib:.2f}", key="rows")


TAUGHT = "2026-11-26_teacher_loss_h100.csv"


def taught_table():
    ours = "ours, 2048 rows a chunk"
    lines = [("ce, Liger, 2,048 rows", {"loss": "ce", "implementation": "liger, 2048 rows a chunk"})]
    lines += [(f"{kind}, 2,048 rows", {"loss": kind, "implementation": ours}) for kind in ("kl", "lk")]
    lines += [("kl, all logits", {"loss": "kl", "implementation": "torch, all logits"})]
    lines += [("kl, plain torch", {"loss": "kl", "implementation": "chunked plain torch, 2048"})]
    return grid(TAUGHT, lines, (4096, 8192, 16384), "{ms:.1f}; {extra_gib:.2f}", key="rows")


def taught(kind: str, key: str = "ms") -> float:
    name = "liger, 2048 rows a chunk" if kind == "ce" else "ours, 2048 rows a chunk"
    return row(TAUGHT, rows=8192, loss=kind, implementation=name)[key]


def pays_table():
    yield ["plain", "0", f"{a_pass(0)['step_ms']:.2f}", "1", "1", "1"]
    for heads, nodes in ((1, 10), (2, 16), (2, 63), (3, 16), (3, 32), (3, 63), (5, 63)):
        found, length = a_pass(nodes, heads), promised(OWN, heads, nodes)
        figures = (found["step_ms"], found["ratio_to_plain"], length, length / found["ratio_to_plain"])
        yield ["4 or 5" if heads == 5 else str(heads), str(nodes), *(f"{figure:.2f}" for figure in figures)]


def log_table():
    for n in (450, 1900, 4100):
        one, two = (rows("stage1_and_2_h100.csv", stage=stage, step=n) for stage in (1, 2))
        heads = [dot(*(row[f"head_{k}_top1"] for row in found for k in range(1, 5))) for found in (one, two)]
        yield [f"{n:,}", *heads, dot(*(row["head_0_top1"] for row in two))]


def stage_2_table():
    for rate, file in (("5e-4", RUINED), ("2.5e-5", GENTLE)):
        lengths = [simulated(file, 3, "chain"), *(simulated(file, nodes, "best") for nodes in (8, 32, 63))]
        yield [f"lr {rate}", own_top(file), dot(*lengths, digits=2), new_4_grams(f"stage 2, lr {rate}")]


def faster_table():
    yield ["plain", "1", "1", f"{small_pass(0, OLD_KERNELS):.3f}", f"{small_pass(0):.3f}", "1"]
    for n in (32, 63):
        figures = [f"{decoded(n)[key]:.2f}" for key in ("tokens_per_pass", "speed_up")]
        figures += [f"{small_pass(n, file):.3f}" for file in (OLD_KERNELS, KERNELS)]
        yield [f"{n} guesses", *figures, f"{follows(n):.2f}"]


def cpu_table():
    nodes = {"plain": 0, "chain": 3} | {f"{n} guesses": n for n in (4, 8, 16, 32)}
    cells = ("{tokens_per_s:.1f}", "{tokens_per_pass:.2f}", "{step_ms:.1f}", "{speed_up:.2f}")
    lines = [(label, {"nodes": n}) for label, n in nodes.items()]
    return lined("decoding_cpu.csv", lines, *cells, "{identical:.0f} of {prompts:.0f}")


def held_out_table():
    both = zip(load(ONE_EPOCH)["before"], load(ONE_EPOCH)["top"], strict=True)
    for k, (old, new) in enumerate(both):
        yield [f"head {k}" if k else "lm_head", *map(dot, (old[0], new[0], old[4], new[4], new[9]))]
