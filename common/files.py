"""Writes files whole or not at all: whenever the writer is stopped, a reader finds the old file or the new one."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from common.errors import BadInput, first_line


def write_atomically(path: Path, write):
    """Calls `write(temporary path)`, syncs the file to disk and renames it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    fsync(temporary)
    os.replace(temporary, path)


def check_can_write(path: str | Path, flag: str):
    """Raises BadInput if no directory `path` can be made and written into: it is a file, read-only or full. Tries it
    with a file that is gone at once, and makes no directory. flag: which one names it."""
    path = Path(path).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise BadInput(f"{flag} {path}: {there} is a file, not a directory: choose another")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{flag} {path}: cannot write into {there} ({first_line(error)}): choose another") from error


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
