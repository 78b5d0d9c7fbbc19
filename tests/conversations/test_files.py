"""conversations/files.py and json_files.py: files of every kind, and what is wrong with them."""

import csv
import gzip
import json
import random

import datasets
import pytest
from chats import FIRST, GOOD, SECOND, chat

from common.errors import BadInput
from conversations import json_files
from conversations.files import find_files, read_records
from conversations.records import CUT_OFF

FILES = {
    "array": f"[{FIRST}, {SECOND}]",
    "indented array": "\n " + json.dumps(GOOD, indent=2, ensure_ascii=False) + "\n",
    "lines": f"\n{FIRST}\n\n{SECOND}",
    "lines of DOS": f"{FIRST}\r\n{SECOND}\r\n",
    "objects": "\n".join(json.dumps(record, indent=2) for record in GOOD),
    "wrapped": json.dumps({"version": 1, "group": "mt", "data": GOOD}),
    "wrapped and indented": json.dumps({"data": GOOD}, indent=1) + "\n",
    "UTF-8 with a mark": f"\ufeff{FIRST}\n{SECOND}",
}


@pytest.fixture(params=["in one block", "in many blocks"])
def blocks(request, monkeypatch):
    if request.param == "in many blocks":
        monkeypatch.setattr(json_files, "BLOCK", 9)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_json_of_any_layout(tmp_path, text, packed, blocks):
    path = tmp_path / "chats.json"  # the content decides, not the name
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert list(read_records(str(path))) == GOOD


def test_packed_files_in_one(tmp_path):
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(f"{FIRST}\n".encode()) + gzip.compress(SECOND.encode()))
    assert list(read_records(str(path))) == GOOD


@pytest.mark.parametrize("text", [f"[{FIRST}, {SECOND}]", json.dumps(GOOD, indent=1)], ids=["line", "indented"])
def test_array_cut_off_anywhere_yields_its_whole_records(tmp_path, text, blocks):
    path = tmp_path / "chats.json"
    first = json.JSONDecoder().raw_decode(text, text.index("{"))[1]
    for cut in range(1, len(text)):
        path.write_text(text[:cut])
        whole = (cut >= first) + (cut > text.rindex("}"))  # only the ] is missing
        assert list(read_records(str(path))) == [*GOOD[:whole], CUT_OFF], text[:cut]


def test_lines_cut_off_anywhere_yield_their_whole_records(tmp_path, blocks):
    path, text = tmp_path / "chats.jsonl", f"{FIRST}\n{SECOND}\n"
    for cut in range(len(FIRST) + 2, len(text) - 2):
        path.write_text(text[:cut])
        assert list(read_records(str(path))) == [GOOD[0], CUT_OFF], text[:cut]


def test_array_cut_inside_a_character(tmp_path, blocks):
    path = tmp_path / "chats.json"
    path.write_bytes(f'[{FIRST}, {{"messages": [{{"content": "é'.encode()[:-1])
    assert list(read_records(str(path))) == [GOOD[0], CUT_OFF]


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_packed_file_cut_off(tmp_path, layout):
    path, packed = tmp_path / "chats.gz", gzip.compress((FILES[layout] + " " * 99).encode())
    path.write_bytes(packed[:-9])  # all the text may still be there, but its check sum is not
    assert list(read_records(str(path)))[-1] is CUT_OFF


def test_numbers_and_words_are_not_cut_between_blocks(tmp_path, blocks):
    path, records = tmp_path / "chats.json", [{"a": [1234567, True, None]}, 1234567, 12345.678]
    path.write_text(json.dumps(records))
    assert list(read_records(str(path))) == records


REFUSED = {
    "line": (f'{FIRST}\n\n{{"messages": oops}}\n{FIRST}\n', ", line 3: not valid JSON"),
    "last line": (f'{FIRST}\n{{"messages": oops}}', ", line 2: not valid JSON"),
    "only line": ('{"messages": oops}', ", line 1: not valid JSON"),
    "array": (f'[\n{FIRST},\n{{"messages": oops}},\n{FIRST}\n]', ", line 3: record 2 is not valid JSON"),
    "objects": (f'{json.dumps(GOOD[0], indent=1)}\n{{"messages": oops}}\n{{"a":\n1}}', "record 2 is not valid JSON"),
    "behind the array": (f"[{FIRST}]\n[{SECOND}]", ", line 1: the array ends here, but the file goes on"),
    "empty": ("", " is empty"),
    "blank": (" \n", " is empty"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), " is not UTF-8 text (byte 7)"),
    "latin-1 in a line": (
        f"{FIRST}\n".encode() + '{"a": "é"}\n'.encode("latin-1"),
        ", line 2: not UTF-8 text (byte 7 of it)",
    ),
    "UTF-16": (FIRST.encode("utf-16"), " is UTF-16 text, or no text at all"),
    "UTF-16 without a mark": (FIRST.encode("utf-16-le"), " is UTF-16 text, or no text at all"),
    "text": ("why is it so?", " is no file of conversations: it begins with 'why is it ', not with the [ or {"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        list(read_records(str(path)))
    assert str(error.value).startswith(str(path)) and message in str(error.value)


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"PAR1"], ids=["gzip", "parquet"])
def test_damaged_file_is_named(tmp_path, magic):
    path = tmp_path / "chats"
    path.write_bytes(magic + b"x" * 20)
    with pytest.raises(BadInput, match=f"cannot read {path}: "):
        list(read_records(str(path)))


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0c"])
def test_line_separators_inside_a_string_are_no_line_ends(tmp_path, character):
    path = tmp_path / "chats.jsonl"
    record = {"messages": chat(f"why{character}cold", "warm")}
    path.write_text(json.dumps(record, ensure_ascii=False).replace("\x0c", "\\f") + "\n", encoding="utf-8")
    assert list(read_records(str(path))) == [record]


def test_what_json_allows_is_no_error(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"score": NaN, "id": 123456789012345678901234567890}\n{"score": -Infinity}\n')
    assert [record.get("id") for record in read_records(str(path))] == [123456789012345678901234567890, None]


def test_parquet_without_the_nulls_of_a_table(tmp_path):
    """A column has one type: Arrow adds to each record the fields of all others."""
    calls = [[{"name": "w", "arguments": {"city": "x"}}], [{"name": "v", "arguments": {"day": "y"}}]]
    rows = [{"messages": [{"role": "assistant", "tool_calls": call}], "score": 1} for call in calls]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chats[1].parquet")  # no pattern: a file of that name
    rows = [row | {"score": None} for row in rows]  # nobody reads it
    assert list(read_records(str(tmp_path / "chats[1].parquet"))) == rows


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_csv(tmp_path, packed, blocks):
    path = tmp_path / ("chats.csv.gz" if packed else "chats.csv")
    rows = [
        {"prompt": "how\nmany, é?", "completion": "42", "unfinished": "True"},
        {"prompt": 'a "word"', "completion": "NA", "unfinished": ""},
    ]
    with (gzip.open if packed else open)(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert list(read_records(str(path))) == [rows[0] | {"unfinished": True}, rows[1] | {"unfinished": None}]


def test_csv_with_too_many_fields(tmp_path):
    path = tmp_path / "chats.csv"
    path.write_text("prompt,completion\nwhy,cold,warm\n")
    with pytest.raises(BadInput, match="line 2: more fields than the first line names"):
        list(read_records(str(path)))


def make(directory, *names) -> list[str]:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(FIRST)
    return [str(directory / name) for name in names]


def test_a_directory_without_names_of_splits_is_all_train(tmp_path):
    files = make(tmp_path, "a.json", "b/c.jsonl", "d.parquet")
    make(tmp_path, "README.md", "notes.txt")
    assert find_files(str(tmp_path), "train") == files


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("chats_train.json", "chats_test.json"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ],
)
def test_names_of_splits(tmp_path, train, test):
    files = make(tmp_path, train, test)
    for split, file in zip(("train", "test"), files, strict=True):
        assert find_files(str(tmp_path), split) == [file]
        assert find_files(str(tmp_path / "**" / "*.*"), split) == [file]
        assert find_files(file.replace(split, f"{split[0]}*"), "train")  # the pattern has chosen
    with pytest.raises(BadInput, match="has no split 'dev': there is test, train"):
        find_files(str(tmp_path), "dev")


def test_files_of_no_split_are_named(tmp_path, caplog):
    files = make(tmp_path, "train.jsonl", "more.jsonl")
    assert find_files(str(tmp_path), "train") == files[:1]
    assert f"1 files are not read, because their names tell no split as those of others do ({files[1]})" in caplog.text
    assert find_files(str(tmp_path / "*"), "train") == sorted(files)


def test_nothing_found(tmp_path):
    with pytest.raises(BadInput, match=r"no file matches .*\*.jsonl"):
        find_files(str(tmp_path / "*.jsonl"), "train")
    with pytest.raises(BadInput, match=r"holds no data file \(.json, .*\), only nothing"):
        find_files(str(tmp_path), "train")
    make(tmp_path, "README.md", "notes.txt")
    with pytest.raises(BadInput, match=r"holds no data file \(.json, .*\), only README.md, notes.txt"):
        find_files(str(tmp_path), "train")


def test_a_large_record_is_not_parsed_over_and_over(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "BLOCK", 100)
    random.seed(1)
    record = {"a": [random.random() for _ in range(20_000)]}  # 4,000 blocks
    (tmp_path / "chats.json").write_text(json.dumps([record, record]))
    tries = []
    decode = json.JSONDecoder.raw_decode
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", lambda *args, **at: tries.append(1) or decode(*args, **at))
    assert list(read_records(str(tmp_path / "chats.json"))) == [record, record]
    assert len(tries) < 40
