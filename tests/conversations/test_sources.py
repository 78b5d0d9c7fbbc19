"""conversations/sources.py: from paths to a dataset, its cache, and what is held out of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from chats import ANSWER, CALLED, FIRST, GOOD, RED, SHORT, SYSTEM, TOOL, USER, WHOLE, chat, to_data, turn
from conftest import write_jsonl

from common.errors import BadInput
from conversations import sources
from conversations.sources import load_conversations, split_conversations
from conversations.summary import Summary

MESSAGES = [record["messages"] for record in GOOD]
IDS = {"prompt_ids": [1, 2], "answer_ids": [3]}


@pytest.mark.parametrize(("said", "flag"), [(True, True), (False, False), (None, False), ("absent", False)])
@pytest.mark.parametrize("form", ["chat", "ShareGPT"])
def test_unfinished_flag_of_a_record(form, said, flag, tmp_path):
    record = {"messages": [USER, ANSWER, USER]}  # the question behind the answer goes, the flag stays the answer's
    if form == "ShareGPT":
        record = {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "cold"}]}
    record |= {} if said == "absent" else {"unfinished": said}
    (row,) = load_conversations(write_jsonl(tmp_path / "chats.jsonl", [record]))
    assert row == {"record": 1, "messages": [USER, ANSWER]} | WHOLE | {"unfinished": flag}


RECORDS = [  # plain ones and others
    {"messages": RED, "id": 1},
    {"messages": [SYSTEM, *RED]},
    {"messages": CALLED, "tools": [TOOL], "unfinished": True} | IDS,
    {"messages": [USER, ANSWER | {"weight": 0}, *RED]},
    {"messages": [SYSTEM, SYSTEM, *RED]},
    {"messages": [SYSTEM, USER]},
    {"messages": RED, "system": "moon"},
    {"messages": RED, "unfinished": None, "system": None},
    {"messages": []},
    {"messages": None},
    {"messages": [None, USER, ANSWER]},
    {"messages": [USER, turn("assistant", None)]},
    {"messages": [USER, turn("assistant", "\u2003 \n")]},
    {"messages": [USER, turn(None, "why")]},
    {"messages": [ANSWER, USER]},
    {"messages": [USER, turn("narrator", "why")]},
    {"messages": [USER, turn("GPT", "cold")]},
    {"messages": chat('why "é🌕\\ \u0000\u2028\n\t', "/\x7f</s>")},
    {"messages": chat(*"abcdef")},
    {"messages": [USER, turn("assistant", ""), *RED]},
    *({"messages": chat(f"{i}", "warm")} for i in range(30)),
]


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escapes", "UTF-8"])
@pytest.mark.parametrize("some", [slice(None), slice(0, 2), slice(-30, None), slice(4, 6)])
def test_plain_lines_are_read_as_all_records_are(tmp_path, some, ascii_only, monkeypatch):
    """Lines of plain records take a short way; those of an array never do."""
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in [*RECORDS[some], *RECORDS[:1]]]
    (tmp_path / "lines.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "array.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    a, b = Summary("a"), Summary("b")
    data = load_conversations(str(tmp_path / "lines.jsonl"), a)
    assert list(data) == list(load_conversations(str(tmp_path / "array.json"), b))
    assert a.counts == b.counts and a.read == len(lines) and a.used == len(data)


def test_plain_lines_do_take_the_short_way(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "chats.jsonl", [*RECORDS[:2], *RECORDS[-30:]])
    monkeypatch.setattr(sources, "to_conversation", None)
    assert len(load_conversations(path)) == 32


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        {"messages": RED, "tools": [TOOL]},
        {"messages": RED, "system": "moon"},
        {"messages": RED, "unfinished": True},
        {"messages": RED} | IDS,
        {"conversations": RED, "messages": RED[:1]},
        {"messages": [RED[0] | {"name": "Ann"}, RED[1]]},
        {"messages": [turn(None, "2026-01-01"), turn("assistant", "2026-01-02")]},
        {"messages": [USER, turn("assistant", "2026-01-02")]},
        {"messages": RED, "big": 2**70},
    ],
)
def test_one_record_alone_is_read_as_in_an_array(tmp_path, record):
    found = []
    for name, text in (("lines.jsonl", json.dumps(record)), ("array.json", json.dumps([record]))):
        (tmp_path / name).write_text(text)
        try:
            found.append(list(load_conversations(str(tmp_path / name))))
        except BadInput as error:
            found.append(str(error).partition(" holds ")[2])
    assert found[0] == found[1]


def test_bytes_that_are_no_utf_8_are_refused_in_plain_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(f'{FIRST}\n{{"messages": {json.dumps(RED)}}}\n'.encode().replace(b"red dog", b"red \xe9dog"))
    with pytest.raises(BadInput, match="line 2: not UTF-8 text"):
        load_conversations(str(path))


def test_numbers_stay_as_they_are(tmp_path):
    call = {"type": "function", "function": {"name": "w", "arguments": {"x": 0.1234567890123456, "y": 2**70}}}
    record = {"messages": [USER, turn("assistant", "") | {"tool_calls": [call]}], "tools": [{"least": 1e-17}]}
    (row,) = load_conversations(write_jsonl(tmp_path / "chats.jsonl", [record]))
    assert row["messages"] == record["messages"] and row["tools"] == record["tools"]


@pytest.mark.parametrize("rest", [', {"messages": [{"role": "us', ", ", ', {"mes'], ids=["string", "comma", "key"])
def test_array_cut_off_is_said(tmp_path, rest):
    path = tmp_path / "chats.json"
    path.write_text(f"[{FIRST}{rest}")
    summary = Summary("chats")
    assert list(load_conversations(str(path), summary)["messages"]) == MESSAGES[:1]
    assert summary.skipped == {"the file is cut off here": [1, 2]}


def test_several_files_are_numbered_on(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [GOOD[0], {"messages": []}]) for i in range(2)]
    summary = Summary("chats")
    assert list(load_conversations(files, summary)["record"]) == [1, 3]
    assert (summary.read, summary.used) == (4, 2)
    assert summary.skipped == {"no turns: 'messages' is empty": [2, 2]}


def test_summary_is_the_same_from_the_cache(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [ANSWER, *RED, USER]}, {"messages": []}])
    first, second = Summary("chats"), Summary("chats")
    load_conversations(path, first)
    monkeypatch.setattr(sources, "read_blocks", None)
    load_conversations(path, second)
    assert first.counts == second.counts
    assert first.dropped == {"an answer before the first question": 1, "a question after the last answer": 1}


def test_an_update_of_the_code_reads_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    load_conversations(path)
    monkeypatch.setattr(sources, "code_version", lambda: "new")
    monkeypatch.setattr(sources, "read_blocks", lambda path: iter([[{"messages": RED}]]))
    assert list(load_conversations(path)["messages"]) == [RED]


def test_prompts_are_another_copy(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": RED}, {"messages": [USER]}])
    assert list(load_conversations(path)["messages"]) == [RED]
    assert list(load_conversations(path, ask=True)["messages"]) == [RED, [USER]]


def test_changed_file_is_read_again(tmp_path):
    path = tmp_path / "chats.jsonl"
    for second, answer in enumerate(("cold", "warm")):  # the same size
        write_jsonl(path, [{"messages": chat("why", answer)}])
        os.utime(path, (second, second))  # a clock may be too coarse to tell the two writes apart
        assert load_conversations(str(path))[0]["messages"] == chat("why", answer)


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "chats.parquet", "./chats", "/no/such/chats", "a/b/c"])
def test_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(BadInput, match=f"there is no file or directory '{name}'"):
        load_conversations(name)


def test_nothing_usable_is_refused_with_all_reasons(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [USER]}, {"text": 1}, {"messages": [USER]}])
    with pytest.raises(BadInput) as error:
        load_conversations(path)
    assert str(error.value) == (
        f"{path} holds no usable conversation: no answer by the assistant (record 1); no turns: its fields are "
        "'text' (record 2)"
    )


def test_without_a_summary_the_table_is_logged(tmp_path, caplog):
    path = write_jsonl(tmp_path / "chats.jsonl", [*GOOD, {"messages": chat("why", "a\ud83d")}])
    assert len(load_conversations(path)) == 2
    assert "records used" in caplog.text and "lone surrogate" in caplog.text and "first: record 3" in caplog.text


def test_hub_dataset(monkeypatch):
    """UltraChat's splits have names of their own. Nulls are where another record has something."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([GOOD[0] | {"id": 1, "unfinished": None}, GOOD[1] | {"unfinished": True}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_conversations("some/chats", config="default", split="train_sft")
    assert asked == [(("some/chats", "default"), {"split": "train_sft", "cache_dir": None})]
    assert list(data["messages"]) == MESSAGES and list(data["unfinished"]) == [False, True]


def test_hub_error_is_told_in_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadInput) as error:
        load_conversations("some/chats")
    assert str(error.value) == (
        "some/chats is no file here, and cannot be loaded from the Hub: Config name is missing. Please pick one "
        "among: ['a', 'b']"
    )


def test_saved_dataset_and_its_splits(tmp_path):
    train, test = (datasets.Dataset.from_list([{"messages": turns}]) for turns in (RED, SHORT))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert list(load_conversations(str(tmp_path / "one"))["messages"]) == [RED]
    assert list(load_conversations(str(tmp_path / "two"))["messages"]) == [RED]
    assert list(load_conversations(str(tmp_path / "two"), split="test")["messages"]) == [SHORT]
    with pytest.raises(BadInput, match="two has no split 'dev': there is test, train"):
        load_conversations(str(tmp_path / "two"), split="dev")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path, layout):
    record, path = json.dumps({"conversations": chat("why " * 1000, "cold " * 1000)}), tmp_path / "chats.json"
    between = "\n" if layout == "lines" else ",\n"
    path.write_text(("" if layout == "lines" else "[") + between.join([record] * 10_000))  # 90 MB
    code = (
        "import resource, sys; from conversations.sources import load_conversations as load\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); assert len(load(sys.argv[1], cache_dir=sys.argv[2])) == 10_000; print(peak() - before)"
    )
    run = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    grown = subprocess.run(run, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    assert int(grown) << 10 < 2 * path.stat().st_size


def test_damaged_saved_dataset_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(BadInput, match=f"cannot read the saved dataset {tmp_path}: "):
        load_conversations(str(tmp_path))


def test_configuration_of_a_file_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    with pytest.raises(BadInput, match=r"--dataset_config default: .* is no Hub dataset"):
        load_conversations(path, config="default")


def test_parquet_and_lines_of_a_directory(tmp_path):
    datasets.Dataset.from_list([{"messages": RED}]).to_parquet(tmp_path / "train-0.parquet")
    write_jsonl(tmp_path / "train-1.jsonl", GOOD)
    write_jsonl(tmp_path / "test-0.jsonl", [{"messages": SHORT}])
    assert list(load_conversations(str(tmp_path))["messages"]) == [RED, *MESSAGES]
    assert list(load_conversations(str(tmp_path / "*"), split="test")["messages"]) == [SHORT]


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
