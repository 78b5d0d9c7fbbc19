"""The raw files of benchmark/results/, and the figures that follow from them, for check_figures.py.

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
TAUGHT = "2026-11-26_teacher_loss_2_h100.csv"
SPEC, GROUPS = "2026-11-26_spec_bench_h100.json", "2026-11-26_four_head_types_spec_bench_h100.csv"
TYPES, TYPES_PASS = "2026-11-26_four_head_types_h100.json", "2026-11-26_head_types_step_time_h100.csv"
SPEC_GROUPS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
# Decoded over Spec-Bench with 32 guesses: heads and tree.
KINDS = {"medusa": "fixed", "hydra": "fixed", "hydra_prefix": "fixed", "hydra_prefix, grown": "adaptive"}
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


def taught(kind: str, key: str = "ms") -> float:
    name = "liger, 2048 rows a chunk" if kind == "ce" else "ours, 2048 rows a chunk"
    return row(TAUGHT, rows=8192, loss=kind, implementation=name)[key]


def of_types(key: str, group: str = "all") -> list[float]:
    """Of each of KINDS, over a group of Spec-Bench."""
    return [row(GROUPS, head_type=k.split(",")[0], tree=tree, group=group)[key] for k, tree in KINDS.items()]


def times_of_pass(group: str = "all") -> list[float]:
    """A pass of each of KINDS over a plain one: tokens per pass over the speed-up."""
    return [y / x for y, x in zip(of_types("tokens_per_pass", group), of_types("speed_up", group), strict=True)]


def of_trees(kind: str, tree: str, key: str = "length") -> dict[int, float]:
    """nodes -> tokens per pass on held-out prompts."""
    return {x["nodes"]: x[key] for x in load(TYPES)[kind]["own"]["acceptance"] if x["tree"] == tree}


def adapters(run: str) -> dict:
    """Of the first run of adapters: `l0`, without a KL, and `s1b`, the heads alone."""
    return load("2026-11-26_adapters_h100.json")[run]


def with_32(run: str) -> float:
    """Tokens per pass, simulated, of 32 guesses there."""
    return next(
        row["length"] for row in adapters(run)["own"]["acceptance"] if (row["tree"], row["nodes"]) == ("best", 32)
    )
