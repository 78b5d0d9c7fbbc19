"""Local files of conversations: finding them, and reading their records, whatever kind they are."""

import csv
import glob
import logging
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

from common.errors import BadInput, first_line
from conversations.json_files import Lines, decode, in_lists, parse_lines, read_chunks, read_json
from conversations.records import IDS, READ

logger = logging.getLogger(__name__)
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")  # what is looked for in a directory


def find_files(path: str, split: str) -> list[str]:
    """The files of a directory or a glob that belong to a split: by datasets' rules, which go by the names of files
    and folders (train-00000.parquet, test/chats.jsonl). Without such names all files are `train`."""
    if os.path.isdir(path):
        files, root = None, path
    else:
        files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if not files:
            raise BadInput(f"no file matches {path}")
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    splits = find_splits(root)
    owner = {file: name for name, members in splits.items() for file in members}
    if files is None:
        if not splits:
            others = ", ".join(sorted(os.listdir(path))[:5]) or "nothing"
            raise BadInput(f"the directory {path} holds no data file ({', '.join(SUFFIXES)}), only {others}")
        check_split(path, split, splits)
        if orphans := _data_files("**", root) - owner.keys():
            logger.warning(
                "%s: %d files are not read, because their names tell no split as those of others do (%s)",
                *(path, len(orphans), min(orphans)),
            )
        return splits[split]
    found = {owner.get(os.path.abspath(file)) for file in files} - {None}
    if len(found) < 2:  # the pattern has chosen
        return files
    check_split(path, split, found)
    return [file for file in files if owner.get(os.path.abspath(file), split) == split]


def find_splits(directory: str) -> dict[str, list[str]]:
    """The data files of each split of a directory."""
    root = os.path.abspath(directory)
    try:
        patterns = get_data_patterns(glob.escape(root))
    except EmptyDatasetError:
        return {}
    found = {
        str(split): sorted(set().union(*(_data_files(p, root) for p in some))) for split, some in patterns.items()
    }
    return {split: files for split, files in found.items() if files}


def _data_files(pattern: str, root: str) -> set[str]:
    try:
        files = resolve_pattern(pattern, glob.escape(root))
    except FileNotFoundError:
        return set()
    return {file for file in files if file.lower().endswith(SUFFIXES)}


def check_split(name: str, split: str, splits):
    if split not in splits:
        raise BadInput(f"{name} has no split {split!r}: there is {', '.join(sorted(map(str, splits)))}")


def read_blocks(path: str) -> Iterator[Lines | list]:
    """The records of a file, in its order: lists of them, or lines of JSON that are not parsed yet. A file that is cut
    off yields its whole records, then CUT_OFF. Raises BadInput if it cannot be read."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            if not pq.read_metadata(path).num_rows:  # an empty shard
                return
            table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train", streaming=True)
            yield from in_lists(read_rows(table))
        elif path.lower().endswith((".csv", ".csv.gz")):
            yield from in_lists(_read_csv(path))
        else:
            yield from read_json(path)
    except (OSError, zlib.error, pa.ArrowException) as error:
        raise BadInput(f"cannot read {path}: {first_line(error)}") from error


def read_records(path: str) -> Iterator[object]:
    """The records of a file, one by one."""
    for block in read_blocks(path):
        yield from parse_lines(path, block) if isinstance(block, Lines) else block


def read_rows(table: datasets.Dataset | datasets.IterableDataset) -> Iterator[dict]:
    """The rows of a table, without the nulls that stand where a record does not have this field. Columns that nobody
    reads (pictures, say) are not decoded."""
    names = table.column_names or []
    wanted = [name for name in names if name in READ]
    for row in table.select_columns(wanted or names[:1]):
        yield dict.fromkeys(names) | without_nulls(dict(row))


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _read_csv(path: str) -> Iterator[dict]:
    """Every field stays a text, "42" and "NA" too: a reader that guesses types would lose such answers."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(_keep_line_ends(decode(path, read_chunks(path))), strict=True)  # an open quote is an error
    if len(set(rows.fieldnames or [])) < len(rows.fieldnames or []):
        raise BadInput(f"{path}: the first line names a column twice")
    while True:
        try:
            row: dict[Any, Any] | None = next(rows, None)
        except csv.Error as error:
            raise BadInput(f"{path}, line {rows.reader.line_num}: {error}") from error
        if row is None:
            return
        if None in row:
            raise BadInput(f"{path}, line {rows.line_num}: more fields than the first line names")
        for field in {"unfinished", *IDS} & row.keys():
            row[field] = {"": None, "true": True, "false": False}.get((row[field] or "").lower(), row[field])
        yield row


def _keep_line_ends(texts: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        *lines, rest = re.split(r"(?<=\n)", rest + text)
        yield from lines
    if rest:
        yield rest
