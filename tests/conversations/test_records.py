"""conversations/records.py: which records are refused, and how files of JSON are read."""

import json

import pytest
from chats import ANSWER, FIRST, GOOD, NO_TURNS, SECOND, SYSTEM, USER, chat, turn

from common.errors import BadInput
from conversations.records import CUT_OFF, read_records, to_messages
from conversations.sources import load_conversations

REFUSED = [
    *((NO_TURNS, record) for record in ({"messages": []}, {"id": 3}, {"messages": "why"}, "why", [USER, ANSWER])),
    ("turn 2 is not an object", {"messages": [USER, "cold"]}),
    ("unknown role 'tool'", {"messages": [USER, ANSWER, turn("tool", "42")]}),
    ("unknown role None", {"messages": [{"content": "why"}, ANSWER]}),
    ("unknown role [1]", {"messages": [turn([1], "why"), ANSWER]}),  # cannot be looked up in a dict
    ("two user turns in a row", {"messages": [USER, USER, ANSWER]}),
    ("two assistant turns in a row", {"messages": [USER, ANSWER, ANSWER]}),
    *(("a turn without text", {"messages": [turn("user", text), ANSWER]}) for text in ("", " \n", None, 42, ["why"])),
    ("a system turn that is not the first", {"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]}),
    *(("'unfinished' is not true or false", {"messages": [USER, ANSWER], "unfinished": x}) for x in ("yes", "", 0, 1)),
    *(("no answer by the assistant", {"messages": [said]}) for said in (USER, ANSWER, SYSTEM)),
]


@pytest.mark.parametrize(("problem", "record"), REFUSED)
def test_refused_records(problem, record):
    assert to_messages(record) == ([], problem)


@pytest.mark.parametrize("assistant", ["gpt", "chatgpt", "bing", "bard", "model"])
def test_sharegpt_record(assistant):
    said = (("system", "moon"), ("human", "why"), (assistant, "cold"))
    turns = [{"from": role, "value": text} for role, text in said]
    assert to_messages({"id": "x", "conversations": turns}) == ([SYSTEM, USER, ANSWER], "")


@pytest.mark.parametrize("start", [[], [SYSTEM]])
def test_first_answers_and_last_question_are_dropped(start):
    turns = [*start, ANSWER, ANSWER, USER, ANSWER, USER]
    assert to_messages({"messages": turns}) == ([*start, USER, ANSWER], "")


FILES = {
    "array": f"[{FIRST}, {SECOND}]",
    "indented": "\n " + json.dumps(GOOD, indent=2, ensure_ascii=False) + "\n",
    "lines": f"\n{FIRST}\n\n{SECOND}",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_array_or_lines(tmp_path, text):
    path = tmp_path / "chats.json"  # whichever it is, the first character says
    path.write_text(text, encoding="utf-8")
    assert list(read_records(path)) == GOOD
    assert list(load_conversations(str(path))["messages"]) == [record["messages"] for record in GOOD]


def test_array_cut_off_anywhere_yields_its_whole_records(tmp_path):
    path, text = tmp_path / "chats.json", FILES["array"]
    for cut in range(1, len(text)):
        path.write_text(text[:cut])
        whole = (cut > len(FIRST)) + (cut == len(text) - 1)  # only the ] is missing
        assert list(read_records(path)) == [*GOOD[:whole], CUT_OFF], text[:cut]


def test_array_cut_inside_a_character(tmp_path):
    path = tmp_path / "chats.json"
    path.write_bytes(f'[{FIRST}, {{"messages": [{{"content": "é'.encode()[:-1])
    assert list(read_records(path)) == [GOOD[0], CUT_OFF]


def test_text_behind_the_array_is_refused(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(f"[{FIRST}]\n[{SECOND}]")
    with pytest.raises(BadInput, match="line 1: the array ends here"):
        list(read_records(path))


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0c"])
def test_line_separators_inside_a_string_are_no_line_ends(tmp_path, character):
    path = tmp_path / "chats.jsonl"
    record = {"messages": chat(f"why{character}cold", "warm")}
    path.write_text(json.dumps(record, ensure_ascii=False).replace("\x0c", "\\f") + "\n", encoding="utf-8")
    assert list(read_records(path)) == [record]
