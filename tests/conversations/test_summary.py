"""conversations/summary.py: what became of the records."""

import json

import pytest

from common.errors import BadInput
from conversations.summary import Summary


def make_summary() -> Summary:
    summary = Summary("chats.jsonl")
    summary.read = 1200
    for record in (7, 3, 9):
        summary.skip("unknown role 'a|b'", record)
    summary.skip("no answer by the assistant", 2)
    summary.drop("a question after the last answer")
    summary.drop("a question after the last answer", 4)
    summary.note("answers cut by --model_max_length 2048", 30)
    summary.note("answers cut by --model_max_length 2048", 3)
    return summary


def test_table():
    assert make_summary().used == 1196
    assert make_summary().table().split("\n") == [
        "| chats.jsonl                                      |       |                 |",
        "| ------------------------------------------------ | ----: | --------------- |",
        "| records read                                     | 1,200 |                 |",
        "| records used                                     | 1,196 |                 |",
        r"| skipped: unknown role 'a\|b'                     |     3 | first: record 3 |",
        "| skipped: no answer by the assistant              |     1 | first: record 2 |",
        "| turns left out: a question after the last answer |     5 |                 |",
        "| answers cut by --model_max_length 2048           |    33 |                 |",
    ]


def test_counts_survive_json_and_add_up():
    both = Summary("chats.jsonl")
    for _ in range(2):
        both.add(json.loads(json.dumps(make_summary().counts)))
    assert (both.read, both.used) == (2400, 2392)
    assert both.skipped == {"unknown role 'a|b'": [6, 3], "no answer by the assistant": [2, 2]}
    assert both.dropped == {"a question after the last answer": 10}
    assert both.notes == {"answers cut by --model_max_length 2048": 66}


def test_check():
    make_summary().check()
    summary = Summary("chats.jsonl")
    with pytest.raises(BadInput, match=r"chats.jsonl holds no usable conversation: it has no records"):
        summary.check()
    summary.read = 3
    for problem, record in (("a", 1), ("b", 2), ("a", 3)):
        summary.check()
        summary.skip(problem, record)
    with pytest.raises(BadInput) as error:
        summary.check()
    assert str(error.value) == "chats.jsonl holds no usable conversation: a (record 1); b (record 2)"
