"""Where a result comes from: commit, versions, GPU, command line; for train_command.txt and the benchmarks' CSVs."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "datasets")


def commit() -> str:
    """Full hash of the checked-out commit, and a note if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return "not a git checkout"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode != 0
    return found.stdout.strip() + (" with changes" if changed else "")


def versions() -> str:
    found = [f"python {sys.version.split()[0]}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue  # triton has no wheel for some platforms
    return ", ".join(found)


def gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def command() -> str:
    """The command line of this process, as a person would type it from the repository's root."""
    script = os.path.relpath(sys.argv[0], ROOT) if os.path.exists(sys.argv[0]) else sys.argv[0]
    return shlex.join(["python", script, *sys.argv[1:]])
