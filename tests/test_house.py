"""The house keeps its order: arrows between folders point one way, no circles, no long files."""

import ast

import pytest
from conftest import ROOT

FOLDERS = ("common", "conversations", "model", "training", "decoding")
ENTRY_POINTS = ("train", "evaluate", "generate", "distill", "medusa_tree")
MAY_IMPORT = {
    "common": {"common"},
    "conversations": {"conversations", "common"},
    "model": {"model", "conversations", "common"},
    "medusa_model": {"model", "conversations", "common"},
    "callback": {"common"},
    "training": {"training", "medusa_model", "callback", "model", "conversations", "common"},
    "decoding": {"decoding", "medusa_model", "model", "conversations", "common"},
}
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(path) -> set[str]:
    """The project's modules that a file imports, as `folder.module` or `module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & NAMES.keys()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_arrows_point_one_way(name):
    part = name.split(".")[0]
    allowed = MAY_IMPORT.get(part, {"training", "decoding", *MAY_IMPORT})  # an entry point: all but another one
    assert {module.split(".")[0] for module in imports(NAMES[name])} <= allowed
    if part == "model" or name == "medusa_model":
        assert {m for m in imports(NAMES[name]) if m.startswith("conversations")} <= {"conversations.targets"}


def test_nothing_imports_an_entry_point():
    benchmarks = list((ROOT / "benchmark").glob("*.py"))
    assert len(benchmarks) > 5
    for path in [*FILES, *benchmarks]:
        assert not imports(path) & set(ENTRY_POINTS), path


def test_there_is_no_circle():
    left = {name: imports(path) - {name} for name, path in NAMES.items()}
    while free := [name for name, of in left.items() if not of & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_file_is_long(name):
    assert len(NAMES[name].read_text().splitlines()) <= 300
