"""The house keeps its order: arrows between folders point one way, no circles, no long files, no old names."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

FOLDERS = ("common", "conversations", "model", "training", "decoding", "serving", "benchmark")
ENTRY_POINTS = {"train", "evaluate", "generate", "serve", "export", "distill", "store_states", "medusa_tree"}
# What a folder, or a module of the top level, may import beside itself. Whatever is not here may import all but an
# entry point: entry points themselves and benchmarks.
MAY_IMPORT = {
    "common": set(),
    "conversations": {"common"},
    "model": {"conversations.targets", "common"},
    "medusa_model": {"model", "conversations.targets", "common"},
    "callback": {"common"},
    "training": {"medusa_model", "model", "conversations", "common", "callback"},
    "decoding": {"medusa_model", "model", "conversations", "common"},
    "serving": {"decoding", "medusa_model", "model", "conversations", "common"},
}
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
LONGEST = 300  # lines
# Modules before there were folders. The log, the changelog and the records of runs tell of their time.
OLD = "chat_data|medusa_trainer|medusa_fsdp|medusa_checkpoint|medusa_decoder|medusa_attention|"
OLD += "decode_kernels|decode_products|training_state|json_records"
HISTORY = ("docs/log.md", "CHANGELOG.md", "benchmark/results/", "tests/test_house.py")


def imported(path) -> set[str]:
    """The project's modules that a file imports, as `folder.module` or `module`, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found |= {
        f"benchmark.{name}" for name in found if path.parent.name == "benchmark"
    }  # they are scripts, side by side
    return found & MODULES.keys()


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def test_imports_are_seen():
    assert {"common.errors", "training.run"} <= IMPORTS["train"]
    assert {"benchmark.setting", "decoding.decoder"} <= IMPORTS["benchmark.step_time"]
    assert all(any(name.startswith(f"{folder}.") for name in MODULES) for folder in FOLDERS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_an_entry_point(name):
    assert not IMPORTS[name] & ENTRY_POINTS


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_between_folders_point_one_way(name):
    folder = name.split(".")[0]
    if folder in MAY_IMPORT:
        allowed = MAY_IMPORT[folder] | {folder}
        assert [found for found in IMPORTS[name] if not {found, found.split(".")[0]} & allowed] == []


def test_there_is_no_circle():
    left = {name: modules - {name} for name, modules in IMPORTS.items()}
    while free := [name for name, modules in left.items() if not modules & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def files() -> list[str]:
    """All that git has, and what is new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    return sorted(name for name in set(listed.stdout.splitlines()) if (ROOT / name).is_file())


def test_no_file_is_long():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in files() if name.endswith((".py", ".sh"))}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_old_module_is_named():
    old, found = re.compile(rf"\b({OLD})\b"), []
    for name in files():
        if not name.startswith(HISTORY):
            lines = (ROOT / name).read_bytes().decode("utf-8", "replace").splitlines()
            found += [f"{name}:{number}: {line}" for number, line in enumerate(lines, 1) if old.search(line)]
    assert found == []
