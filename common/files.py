"""Writes files whole or not at all: whenever the writer is stopped, a reader finds the old file or the new one."""

import json
import os
import shutil
from pathlib import Path

from common.errors import BadInput


def write_atomically(path: Path, write):
    """Calls `write(temporary path)`, syncs the file to disk and renames it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    fsync(temporary)
    os.replace(temporary, path)


def fsync(path: Path):
    """Waits until a file, or a directory's list of entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error


def start_over(directory: Path):
    """Makes an empty directory, deleting what was there."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def publish(staging: Path, final: Path):
    """Renames a finished directory once everything in it is on disk."""
    for path in (*staging.rglob("*"), staging):
        fsync(path)
    if final.exists():  # not complete, or the run would have resumed from it
        shutil.rmtree(final)
    os.rename(staging, final)
    fsync(final.parent)


def publish_files(staging: Path, final: Path):
    """Moves the files of a finished directory into `final`, every config.json last: a reader that finds it finds the
    rest."""
    paths = sorted((p for p in staging.rglob("*") if p.is_file()), key=lambda p: (p.name == "config.json", p))
    for path in paths:
        fsync(path)
    (final / "config.json").unlink(missing_ok=True)
    for path in paths:
        target = final / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        fsync(target.parent)
    shutil.rmtree(staging)
