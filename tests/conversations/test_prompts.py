"""conversations/prompts.py: what is asked."""

import pytest
from chats import ANSWER, CALLED, RED, SYSTEM, TOOL, USER, WHOLE, turn
from conftest import write_jsonl

from common.errors import BadInput
from conversations.prompts import read_prompts
from conversations.summary import Summary


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"messages": [SYSTEM, USER, ANSWER, *RED]}, WHOLE | {"messages": [SYSTEM, USER]}),
        ({"messages": [SYSTEM, USER]}, WHOLE | {"messages": [SYSTEM, USER]}),
        ({"messages": CALLED, "tools": [TOOL]}, WHOLE | {"messages": CALLED[:1], "tools": [TOOL]}),
        ({"prompt": "why", "system": "moon"}, WHOLE | {"messages": [SYSTEM, USER]}),
        ({"messages": [USER, ANSWER], "unfinished": True, "prompt_ids": [1]}, WHOLE | {"messages": [USER]}),
    ],
)
def test_what_stands_before_the_first_answer_is_asked(tmp_path, record, asked):
    assert read_prompts(write_jsonl(tmp_path / "chats.jsonl", [record])) == [asked]


def test_lines_end_at_line_ends_only(tmp_path):
    path, summary = tmp_path / "prompts.txt", Summary("prompts")
    path.write_bytes("\ufeff why\u2028so?\x0cAnd\x85here?\r\n\n  \ncold\r\n".encode())
    said = [prompt["messages"] for prompt in read_prompts(str(path), summary)]
    assert said == [[turn("user", "why\u2028so?\x0cAnd\x85here?")], [turn("user", "cold")]]
    assert read_prompts(str(path))[1] == WHOLE | {"messages": [turn("user", "cold")]}
    assert summary.used == 2


def test_a_record_without_a_question_is_counted(tmp_path):
    path, summary = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [SYSTEM]}, {"prompt": "why"}]), Summary("x")
    assert [prompt["messages"] for prompt in read_prompts(path, summary)] == [[USER]]
    assert summary.skipped == {"no question by the user": [1, 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "holds no prompts: write one a line"),
        ("é".encode("latin-1"), "cannot read the prompts in "),
        ("why".encode("utf-16"), "is UTF-16 text"),
        (None, "cannot read the prompts in .*No such file"),
    ],
    ids=["empty", "latin-1", "UTF-16", "none"],
)
def test_bad_file_of_prompts(tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_prompts(str(tmp_path / "prompts.txt"))
