"""conversations/sources.py: files and the Hub, problems that are named, and what is held out of training."""

import os

import pytest
from chats import ANSWER, FIRST, GOOD, NO_TURNS, SHORT, USER, chat, to_data
from conftest import write_jsonl

from common.errors import BadInput
from conversations.sources import load_conversations, split_conversations


@pytest.mark.parametrize(("said", "flag"), [(True, True), (False, False), (None, False), ("absent", False)])
@pytest.mark.parametrize("form", ["chat", "ShareGPT"])
def test_unfinished_flag_of_a_record(form, said, flag, tmp_path):
    record = {"messages": [USER, ANSWER, USER]}  # the question behind the answer goes, the flag stays the answer's
    if form == "ShareGPT":
        record = {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "cold"}]}
    record |= {} if said == "absent" else {"unfinished": said}
    (row,) = load_conversations(write_jsonl(tmp_path / "chats.jsonl", [record]))
    assert row == {"record": 1, "messages": [USER, ANSWER], "unfinished": flag, "problem": ""}


@pytest.mark.parametrize("rest", [', {"messages": [{"role": "us', ", ", ', {"mes'], ids=["string", "comma", "key"])
def test_array_cut_off_is_said(tmp_path, caplog, rest):
    path = tmp_path / "chats.json"
    path.write_text(f"[{FIRST}{rest}")
    assert list(load_conversations(str(path))["messages"]) == [GOOD[0]["messages"]]
    assert f"{path}: skipped 1 records: the file is cut off here (first: record 2)" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{FIRST}\n\n{{"messages": oops}}\n{FIRST}\n', ", line 3: not valid JSON"),
        (f'[\n{FIRST},\n{{"messages": oops}},\n{FIRST}\n]', ", line 3: record 2 is not valid JSON"),
        ("", " is empty"),
        (" \n", " is empty"),
        ('{"a": "é"}'.encode("latin-1"), " is not UTF-8 text (byte 7)"),
    ],
    ids=["line", "array", "empty", "blank", "latin-1"],
)
def test_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        load_conversations(str(path))
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "./chats", "/no/such/chats", "a/b/chats"])
def test_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(BadInput, match=f"there is no data file {name}"):
        load_conversations(name)


def test_report_counts_each_problem_and_names_its_first_record(tmp_path, caplog):
    empty, twice = {"messages": []}, {"messages": [USER, USER]}
    path = write_jsonl(tmp_path / "chats.jsonl", [GOOD[0], empty, twice, GOOD[1], empty, empty])
    assert list(load_conversations(path)["record"]) == [1, 4]
    assert [record.getMessage() for record in caplog.records if record.name == "conversations.sources"] == [
        f"{path}: skipped 3 records: {NO_TURNS} (first: record 2)",
        f"{path}: skipped 1 records: two user turns in a row (first: record 3)",
    ]


def test_half_a_character_is_skipped_with_its_record(tmp_path, caplog):
    path = write_jsonl(tmp_path / "chats.jsonl", [*GOOD, {"messages": chat("why", "a\ud83d")}])
    assert len(load_conversations(path)) == 2
    assert "lone surrogate" in caplog.text


def test_changed_file_is_read_again(tmp_path):
    path = tmp_path / "chats.jsonl"
    for second, answer in enumerate(("cold", "warm")):  # the same size
        write_jsonl(path, [{"messages": chat("why", answer)}])
        os.utime(path, (second, second))  # a clock may be too coarse to tell the two writes apart
        assert load_conversations(str(path))[0]["messages"] == chat("why", answer)


def test_hub_dataset(tmp_path, monkeypatch, caplog):
    """A folder of that name stands in for the Hub: datasets loads both the same way."""
    (tmp_path / "chats").mkdir()
    write_jsonl(tmp_path / "chats" / "train.jsonl", [GOOD[0], GOOD[1] | {"unfinished": True}, {"messages": []}])
    monkeypatch.chdir(tmp_path)
    data = load_conversations("chats")
    assert list(data["messages"]) == [record["messages"] for record in GOOD]
    assert list(data["unfinished"]) == [False, True]  # the first does not say it
    assert "skipped 1 records: no turns" in caplog.text and "(first: record 3)" in caplog.text


TEN = [chat("why", f"{i}") for i in range(10)]


@pytest.mark.parametrize(("holdout", "count"), [(0, 0), (1, 1), (9, 9), (0.3, 3), (0.26, 3), (0.24, 2)])
def test_the_last_conversations_are_held_out(holdout, count, caplog):
    train, held_out = split_conversations(to_data(*TEN), None, holdout)
    assert list(train["messages"]) == TEN[: 10 - count]
    assert (list(held_out["messages"]) if count else held_out) == (TEN[10 - count :] or None)
    assert not caplog.records  # they were not in both parts


@pytest.mark.parametrize("holdout", [10, 11, 0.99, 0.01])
def test_holdout_that_leaves_nothing_is_refused(holdout):
    with pytest.raises(BadInput, match=f"--eval_holdout {holdout} leaves nothing"):
        split_conversations(to_data(*TEN), None, holdout)


def test_conversations_of_eval_data_are_taken_out_of_training(caplog):
    train, _ = split_conversations(to_data(*TEN), to_data(TEN[3], SHORT, TEN[7]), 0)
    assert list(train["messages"]) == [turns for i, turns in enumerate(TEN) if i not in (3, 7)]
    assert "left 2 conversations out of training" in caplog.text
    with pytest.raises(BadInput, match="every training conversation"):
        split_conversations(train, to_data(*TEN), 0)


def test_duplicates_of_held_out_conversations_are_taken_out_of_training():
    train, held_out = split_conversations(to_data(TEN[9], *TEN), None, 1)
    assert list(train["messages"]) == TEN[:9] and list(held_out["messages"]) == TEN[9:]


def test_a_finished_and_an_unfinished_conversation_are_two():
    train, _ = split_conversations(to_data(*TEN, unfinished=[4, 5]), to_data(*TEN[3:6], unfinished=[1]), 0)
    assert list(train["messages"]) == [*TEN[:3], TEN[4], *TEN[6:]]
