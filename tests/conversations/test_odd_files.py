"""conversations/{files,json_files,sources}.py: files that nobody would write on purpose get one true sentence."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import GOOD, chat
from conftest import write_jsonl

from common.errors import BadInput
from conversations import sources
from conversations.sources import load_conversations
from conversations.summary import Summary


def test_a_text_of_brackets_is_a_text(tmp_path):
    """As a model writes that does not stop."""
    brackets = "[" * 3000
    path = write_jsonl(tmp_path / "chats.jsonl", [{"instruction": "why", "output": brackets}, GOOD[1]])
    assert load_conversations(path)["messages"][0] == chat("why", brackets)


@pytest.mark.parametrize("kind", ["lines", "array"])
@pytest.mark.parametrize(
    "odd",
    ["[" * 30000 + "]" * 30000, '{"a":' * 30000 + "1" + "}" * 30000, "1" * 5000],
    ids=["lists", "objects", "digits"],
)
def test_json_that_cannot_be_read_is_named(odd, kind, tmp_path):
    path, good = tmp_path / "chats.json", json.dumps(GOOD[1])
    bad = f'{{"messages": [], "extra": {odd}}}'
    path.write_text(f"{good}\n{bad}\n{good}\n" if kind == "lines" else f"[{good},\n{bad},\n{good}]")
    with pytest.raises(BadInput, match=r"chats.json, line 2.* JSON that cannot be read .*: delete it"):
        load_conversations(str(path))


def test_an_empty_shard_is_no_matter(tmp_path):
    turns = pa.array([GOOD[1]["messages"]])
    pq.write_table(pa.table({"messages": turns}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"messages": turns.slice(0, 0)}), tmp_path / "train-1.parquet")
    assert load_conversations(str(tmp_path))["messages"][:] == [GOOD[1]["messages"]]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('prompt,response\nq1,"a1\nq2,a2\nq3,a3\n', "line 4: unexpected end of data"),
        ("prompt,response,prompt\nq1,a1,q2\n", "the first line names a column twice"),
    ],
)
def test_a_csv_that_would_lose_records_is_refused(text, why, tmp_path):
    (tmp_path / "chats.csv").write_text(text)
    with pytest.raises(BadInput, match=f"chats.csv.*{why}"):
        load_conversations(str(tmp_path / "chats.csv"))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Dataset scripts are no longer supported"), datasets.exceptions.DatasetGenerationError("ragged")],
    ids=["script", "ragged"],
)
def test_what_the_hub_says_is_one_sentence(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sources.datasets, "load_dataset", fail)
    with pytest.raises(BadInput, match=f"a/b is no file here, and cannot be loaded from the Hub: {error}"):
        load_conversations("a/b")


def test_a_file_has_no_splits(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    with pytest.raises(BadInput, match="is a file, so it has no split 'test': name the file with that part"):
        load_conversations(path, split="test")


def test_many_kinds_are_ten_and_all_others():
    summary = Summary("chats", 100)
    for number in range(20):
        for _ in range(1 + number % 3):
            summary.skip(f"unknown role {number}", number + 1)
    lines = summary.table().splitlines()
    assert len(lines) == 4 + 10 + 1
    assert lines[-1].split("|")[1].strip() == "skipped: 10 other reasons"
    assert sum(int(line.split("|")[2]) for line in lines[4:]) == 100 - summary.used
    summary.read = 100 - summary.used
    with pytest.raises(BadInput, match=r"unknown role 2 \(record 3\).*10 other reasons \(record 1\)"):
        summary.check()


@pytest.mark.parametrize("text", ["null\n", "null", "\n  null\n{}", "null\nnull\n{}\n"])
def test_records_that_are_null(text, tmp_path):
    """Arrow's parser ends the whole process over a block that begins with one."""
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(BadInput):
        load_conversations(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path))
