"""Is everything as fast as it was on this kind of GPU? Measures again, in about 2 minutes, and compares.

    python benchmark/baselines.py               # ends with an error if something is over 10 % slower
    python benchmark/baselines.py --update      # keeps today's figures as those to compare with

benchmark/baselines.json has the figures of each kind of GPU that was measured, with commit and versions. Each is one
number from the CSV of another benchmark, which runs here as its own process. A GPU may be a few percent slower than
another of its kind, so a smaller loss than 10 % is not an error, and a run on a busy machine says nothing.

--smoke takes small shapes and needs no GPU: does the script run?
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import setting
import torch
from decoding_speed import machine

from common.files import write_atomically

HERE = Path(__file__).parent
SLOWER = 1.10


class Figure(NamedTuple):
    column: str  # of the CSV
    row: int  # which of its rows, -1 for the last
    faster: bool  # whether more of it is better


RATE, PASS, PLAIN = Figure("tokens_per_s", -1, True), Figure("step_ms", -1, False), Figure("step_ms", 0, False)
TRAIN = "throughput.py --stage 1 --implementations ours"
LARGE, SMALL = "--heads 5 --lengths 2048", "--heads 2 --lengths 64 --smoke --steps 2 --warmup 1"
PATH_HEADS = "--medusa_head_type hydra --medusa_prefix_layer"
# What is run: a benchmark with its flags, those of --smoke, and its figures by the names they are kept under.
RUNS: list[tuple[str, str, dict[str, Figure]]] = [
    (f"{TRAIN} {LARGE}", f"{TRAIN} {SMALL}", {"stage 1, all tokens: tokens/s": RATE}),
    (
        f"{TRAIN} {LARGE} --medusa_vocab_size 32000",
        f"{TRAIN} {SMALL} --medusa_vocab_size 32",
        {"stage 1, 32,000 tokens: tokens/s": RATE},
    ),
    (
        "step_time.py --nodes 32 --medusa_vocab_size 32000",
        "step_time.py --nodes 8 --model tiny --heads 2 --length 16",
        {"plain pass, LLaMA-3-8B: ms": PLAIN, "32 guesses, medusa: ms": PASS},
    ),
    (
        f"step_time.py --nodes 32 --medusa_vocab_size 32768 --model smollm2 {PATH_HEADS} --adaptive 8",
        f"step_time.py --nodes 8 --model tiny --heads 2 --length 16 {PATH_HEADS} --adaptive 4",
        {"plain pass, SmolLM2: ms": PLAIN, "32 grown guesses, hydra and prefix: ms": PASS},
    ),
]


def measure(command: Sequence[str]) -> list[dict[str, str]]:
    """Runs a benchmark -> the rows of its CSV. Raises CalledProcessError if it fails: it has said why."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "rows.csv")
        subprocess.run([sys.executable, HERE / command[0], *command[1:], "--out", out], check=True)
        with out.open(newline="") as file:
            return list(csv.DictReader(file))


def differences(found: dict[str, float], known: dict[str, float], faster: dict[str, bool]) -> list[str]:
    """What is over 10 % slower than it was, or was not measured then: a sentence each."""
    said = []
    for name, value in found.items():
        if name not in known:
            said.append(f"{name}: {value:.6g}, and no figure to compare with: run --update")
        elif (slower := known[name] / value if faster[name] else value / known[name]) > SLOWER:
            said.append(f"{name}: {value:.6g}, {100 * (slower - 1):.0f} % slower than {known[name]:.6g}")
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="keep what is measured as the baseline of this GPU")
    parser.add_argument("--file", type=Path, default=HERE / "baselines.json", help="the baselines")
    parser.add_argument("--smoke", action="store_true", help="small shapes, to try the script itself")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.smoke):
        parser.error("there is no GPU: only --smoke runs without one")
    kinds = json.loads(options.file.read_text()) if options.file.exists() else {}
    kind = machine() + (", small shapes" if options.smoke else "")
    if kind not in kinds and not options.update:
        parser.error(
            f"{options.file.name} has no figures of {kind}, but of {', '.join(kinds) or 'none'}: run --update"
        )
    found, faster = {}, {}
    for command, small, figures in RUNS:
        rows = measure((small if options.smoke else command).split())
        for name, figure in figures.items():
            found[name], faster[name] = float(rows[figure.row][figure.column]), figure.faster
    before = kinds[kind]["figures"] if kind in kinds else {}
    for name, value in found.items():
        print(f"{name}: {value:.6g}" + (f", was {before[name]:.6g}" if name in before else ""), flush=True)
    if options.update:
        origin = setting.origin()
        kinds[kind] = {key: origin[key] for key in ("commit", "versions")} | {"figures": found}
        write_atomically(options.file, lambda path: path.write_text(json.dumps(kinds, indent=1) + "\n"))
    elif said := differences(found, before, faster):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()
