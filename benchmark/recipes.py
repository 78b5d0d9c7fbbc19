"""Trains heads by several recipes from the same stored hidden states, and tells what each yields: tokens per pass.

    python store_states.py --model_name_or_path MODEL --data_path own.jsonl --eval_data_path held_out.jsonl --output S
    python benchmark/recipes.py --model MODEL --states S --recipes benchmark/recipes.txt --out FILE.csv

A recipe is a line `name: flags of train.py`; a line that starts with # is none, and one without a name (`: flags`)
holds for the recipes below it, up to the next such line. The states to evaluate on must be the backbone's own greedy
answers to prompts that nothing was trained on. Then the heads' ranks of their tokens say what a greedy decoder would
yield along them ("simulated"; decoding/acceptance.py): trees are chosen on one half and counted on the other.

    seconds         of training, without start and evaluation; with --at_once N, N trainings share the GPU
    top1            how often the best guess of each head is right
    chain, 8 ...    tokens per pass with the best guess of each head, and with trees of so many guesses
"""

import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from setting import append, origin

from conversations.batches import Collator
from conversations.targets import IGNORE
from decoding.acceptance import NODES
from decoding.accuracy import figures, ranks_of_heads
from medusa_model import MedusaModel
from model.backbone import load_backbone_config, load_without_layers
from training.states import StoredRows, read_index

ROOT = Path(__file__).parent.parent
ROWS = 16  # at once


def read_recipes(path: Path) -> list[tuple[str, list[str]]]:
    """-> (name, flags) of each. Raises SystemExit for a line without a colon, or a name that is there twice."""
    recipes: dict[str, list[str]] = {}
    shared: list[str] = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        if not colon or name.strip() in recipes:
            sys.exit(f"{path}: not `name: flags`, or the name of an earlier line: {line}")
        if name.strip():
            recipes[name.strip()] = [*shared, *shlex.split(flags)]  # of a flag given twice the last counts
        else:
            shared = shlex.split(flags)
    return list(recipes.items())


def train(options, name: str, flags: list[str]) -> tuple[Path, float]:
    """-> (the heads, seconds of training). Raises SystemExit with the end of its output if a training fails."""
    output = options.runs / name
    command = [sys.executable, str(ROOT / "train.py"), "--model_name_or_path", options.model]
    command += ["--states_path", str(options.states), "--output_dir", str(output), "--medusa_only_heads", "True"]
    command += ["--save_strategy", "no", "--do_eval", "False", "--report_to", "none", "--disable_tqdm", "True", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    state = json.loads((output / "trainer_state.json").read_text())
    return output, state["log_history"][-1]["train_runtime"]


@torch.inference_mode()
def tables(model: MedusaModel, rows: StoredRows) -> list[torch.Tensor]:
    """As decoding/accuracy.py's `own_ranks` has them: `[n, K+1]` for each stored row with an answer of n tokens."""
    found, device = [], model.lm_head.weight.device
    for start in range(0, len(rows), ROWS):
        batch = Collator(0)([rows[i] for i in range(start, min(start + ROWS, len(rows)))])
        read = model.read(batch["input_ids"].to(device), hidden=batch["hidden"].to(device))
        ranks = ranks_of_heads(model, *read, batch["labels"].to(device)).cpu()
        for labels, table in zip(batch["labels"], ranks, strict=True):
            places = (labels != IGNORE).nonzero()[:, 0]
            found.append(table[places - 1])  # the place before a token is where the backbone chose it
    return found


def measure(options, heads: Path) -> dict:
    """The columns of trained heads."""
    index = read_index(options.states)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = load_without_layers(options.model, load_backbone_config(options.model), dtype=dtype)
    model = MedusaModel.from_pretrained(heads, backbone=backbone, heads_dtype=dtype).to(device)
    rows = StoredRows(options.states, index["shards"]["eval"], index, dtype)
    found = figures(tables(model, rows))
    chain, *trees = found["acceptance"]
    columns = {"top1": " ".join(f"{top[0]:.4f}" for top in found["top"][1:]), "chain": f"{chain['length']:.3f}"}
    for nodes in NODES:  # poor heads have fewer paths with a chance: then the largest tree
        largest = max((tree for tree in trees if tree["nodes"] <= nodes), key=lambda tree: tree["nodes"])
        columns[str(nodes)] = f"{largest['length']:.3f}"
    return columns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the backbone")
    parser.add_argument(
        "--states", required=True, type=Path, help="what store_states.py wrote, with rows to evaluate on"
    )
    parser.add_argument("--recipes", required=True, type=Path)
    parser.add_argument("--runs", type=Path, default=Path("out/recipes"), help="where the heads go")
    parser.add_argument("--at_once", type=int, default=1, help="trainings that share the GPU")
    parser.add_argument("--out", required=True, type=Path, help="CSV to append to")
    options = parser.parse_args()
    source, writing = origin(), Lock()

    def one(recipe: tuple[str, list[str]]):
        name, flags = recipe
        heads, seconds = train(options, name, flags)
        with writing:  # loading sets torch's default dtype for a moment, in all threads
            row = (
                {"recipe": name, "seconds": f"{seconds:.0f}"} | measure(options, heads) | {"flags": shlex.join(flags)}
            )
            print(*(f"{key} {value}" for key, value in row.items() if key != "flags"), sep=", ", flush=True)
            append(options.out, row | source)

    with ThreadPoolExecutor(options.at_once) as pool:  # a recipe that fails ends the run when the others are through
        for done in [pool.submit(one, recipe) for recipe in read_recipes(options.recipes)]:
            done.result()


if __name__ == "__main__":
    main()
