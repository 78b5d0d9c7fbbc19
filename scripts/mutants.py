"""Would the tests notice? Changes one thing in a file, runs the file's tests, and counts the changes they notice.

    python scripts/mutants.py                        all files of MODULES, 20 changes each
    python scripts/mutants.py decoding/tree.py --sample 50

A change is one of: a comparison turned round, + for -, * for /, `and` for `or`, a number one larger, a condition
negated, an index from the other end, True for False. Those that end in an endless loop count as noticed. Survivors are
printed; docs/log.md explains those of the last run.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULES = {  # and the tests that are meant to notice: few, because each change runs them
    "model/loss.py": "tests/model/test_loss.py tests/test_medusa_model.py",
    "model/teacher_loss.py": "tests/model/test_teacher_loss.py",
    "training/trainer.py": "tests/training/test_by_hand.py tests/training/test_trainer.py",
    "conversations/batches.py": "tests/conversations/test_batches.py",
    "decoding/tree.py": "tests/decoding/test_tree.py tests/decoding/test_choosing.py",
    "decoding/decoder.py": " ".join(f"tests/decoding/test_{name}.py" for name in ("decoder", "prefixed", "sampling")),
}
SECONDS = 240  # for the tests of one change
PAIRS: list[tuple[type, type]] = [
    (ast.Lt, ast.GtE),
    (ast.Gt, ast.LtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
]
PAIRS += [(ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div)]
OPPOSITE: dict[type, type] = dict(PAIRS) | {b: a for a, b in PAIRS} | {ast.FloorDiv: ast.Mult}


def places(tree: ast.AST) -> Iterator[tuple[Any, str]]:
    """What can be changed: a node, and what in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPPOSITE:
            yield node, "compare"
        elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPPOSITE:
            yield node, "op"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            yield node, "constant"
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.Compare):
            yield node, "test"


def changed(source: str, number: int) -> tuple[str, str]:
    """-> (the source with change `number`, the line before and after)."""
    tree = ast.parse(source)
    node, kind = list(places(tree))[number]
    before = copy.deepcopy(node)
    match kind:
        case "compare":
            node.ops = [OPPOSITE[type(node.ops[0])]()]
        case "op":
            node.op = OPPOSITE[type(node.op)]()
        case "constant":
            node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
        case "test":
            node.test = ast.UnaryOp(ast.Not(), node.test)
    ast.fix_missing_locations(tree)
    what = f"line {before.lineno}: {ast.unparse(before)[:90]!r} -> {ast.unparse(node)[:90]!r}"
    return ast.unparse(tree), what.replace("\n", " ")


def notices(room: Path, module: str, source: str) -> bool:
    """Whether the module's tests fail with this source. In a forked process: libraries are imported once."""
    original = (ROOT / module).read_text()
    (room / module).write_text(source)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(room)
        sys.path[:0] = [str(room), str(room / "tests"), str(room / "benchmark")]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        signal.alarm(SECONDS)
        import pytest

        os._exit(
            min(1, pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *MODULES[module].split()]))
        )
    _, status = os.waitpid(child, 0)
    (room / module).write_text(original)
    return status != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES), help=", ".join(MODULES))
    parser.add_argument("--sample", type=int, default=20, help="changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_once", type=int, default=2)
    options = parser.parse_args()
    import datasets  # noqa: F401 (here, and not in each child)
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    rooms: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.at_once):
            room = Path(place, str(number))
            shutil.copytree(
                ROOT, room, ignore=shutil.ignore_patterns(".git", ".venv", "models", "out", "*.png", ".*_cache")
            )
            rooms.put(room)

        def one(job: tuple[str, int]) -> tuple[str, bool, str]:
            module, number = job
            room = rooms.get()
            source, what = changed((ROOT / module).read_text(), number)
            noticed = notices(room, module, source)
            rooms.put(room)
            print(f"{'noticed ' if noticed else 'SURVIVES'} {module} {what}", flush=True)
            return module, noticed, what

        jobs = []
        for module in options.modules:
            every = range(len(list(places(ast.parse((ROOT / module).read_text())))))
            jobs += [(module, n) for n in random.Random(options.seed).sample(every, min(options.sample, len(every)))]
        with ThreadPoolExecutor(options.at_once) as pool:
            found = list(pool.map(one, jobs))
    for module in options.modules:
        results = [noticed for name, noticed, _ in found if name == module]
        print(f"{module}: {sum(results)} of {len(results)}")
    print(f"all: {sum(noticed for _, noticed, _ in found)} of {len(found)} changes are noticed")


if __name__ == "__main__":
    main()
