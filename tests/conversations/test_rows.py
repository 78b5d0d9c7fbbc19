"""conversations/rows.py: which records become rows, the same whether eager, lazy, packed or by several processes."""

import pytest
from chats import CHAT, GENERATION, LONG, SHORT, SYSTEM_CHAT, TURNS, chat, to_data, turn
from conftest import make_conversations, make_tokenizer, write_jsonl

from common.errors import BadInput
from conversations.labels import encode
from conversations.rows import prepare
from conversations.sources import load_conversations
from conversations.targets import IGNORE

SHOUTS_WARM = TURNS.replace("CONTENT", "{{ m.content | replace('warm', 'WARM') }}")


@pytest.mark.parametrize(
    ("style", "template", "bad", "problem"),
    [
        ("chatml", SHOUTS_WARM, CHAT, "the chat template rewrites an answer: where it ends cannot be told"),
        ("gemma", "file", SYSTEM_CHAT, "Gemma has no system turn"),
    ],
    ids=["rewrites", "raises"],
)
def test_record_the_template_does_not_keep_is_skipped(style, template, bad, problem, caplog):
    tokenizer = make_tokenizer(style, template)
    data = prepare(to_data(chat("why", "cold"), bad, bad), "chats", tokenizer, 1000)
    assert len(data) == 1 and tokenizer.convert_tokens_to_ids("cold") in data[0]["labels"]
    assert f"chats: skipped 2 records: {problem} (first: record 2)" in caplog.text


def test_an_unfinished_answer_that_a_generation_template_rewrites_is_skipped(caplog):
    tokenizer = make_tokenizer("chatml", GENERATION.replace("%}{{ m.content }}", "%}{{ m.content | upper }}", 1))
    data = prepare(to_data(SHORT, SHORT, unfinished=[2]), "chats", tokenizer, 1000)
    assert len(data) == 1
    assert "rewrites an answer: where it ends cannot be told (first: record 2)" in caplog.text


PATHS = {"eager": {}, "lazy": {"lazy": True}, "packed": {"packing": True}, "by length": {"by_length": True}}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_unfinished_records_in_a_file(path, tmp_path):
    """Every answer but the unfinished ones, which are the last of their records, has its end among the tokens."""
    records = make_conversations(12)
    ends = sum(len(record["messages"]) // 2 for record in records)
    for record in records[::3]:
        record["unfinished"] = True
    data = load_conversations(write_jsonl(tmp_path / "chats.jsonl", records))
    tokenizer = make_tokenizer("llama3")
    rows = prepare(data, "chats", tokenizer, 1000, **path)[:]
    labels = [label for labels in rows["labels"] for label in labels]
    assert labels.count(tokenizer.eos_token_id) == ends - 4
    tokens = [token for ids in rows["input_ids"] for token in ids]
    assert tokens.count(tokenizer.eos_token_id) == 2 * ends - 4  # those of the questions are no labels


def test_answer_cut_away_wholly_is_skipped_and_named(caplog):
    data = prepare(to_data(LONG, SHORT), "chats", make_tokenizer("chatml"), 40)
    assert len(data) == 1 and data[0]["length"] < 40
    assert "chats: skipped 1 records: no assistant token within --model_max_length 40 (first: record 1)" in caplog.text
    with pytest.raises(BadInput, match=r"chats holds no usable conversation: no assistant token .* \(record 1\)"):
        prepare(to_data(LONG, LONG), "chats", make_tokenizer("chatml"), 40)


def test_fewer_than_min_length_tokens_is_skipped(caplog):
    data, tokenizer = to_data(LONG, SHORT), make_tokenizer("chatml")
    length = len(encode(SHORT, tokenizer, 1000)["input_ids"])
    assert len(prepare(data, "chats", tokenizer, 1000, min_length=length)) == 2
    assert len(prepare(data, "chats", tokenizer, 1000, min_length=length + 1)) == 1
    assert f"skipped 1 records: fewer than {length + 1} tokens" in caplog.text and "(first: record 2)" in caplog.text


def test_a_changed_flag_is_tokenised_again(tmp_path):
    path, tokenizer, lengths = tmp_path / "chats.jsonl", make_tokenizer("chatml"), []
    for unfinished in (False, True):
        write_jsonl(path, [{"messages": SHORT, "unfinished": unfinished}])
        lengths.append(prepare(load_conversations(str(path)), "chats", tokenizer, 1000)[0]["length"])
    assert lengths[0] - lengths[1] == 2  # <|im_end|> and the line end


def to_rows(rows):
    return [(list(row["input_ids"]), list(row["labels"])) for row in rows]


def test_lazy_gives_the_same_rows(data_file):
    data, tokenizer = load_conversations(data_file), make_tokenizer("llama3")
    eager, lazy = (prepare(data, "chats", tokenizer, 64, lazy=lazy) for lazy in (False, True))
    assert to_rows(lazy) == to_rows(eager) and len(eager) == 48


def test_several_processes_give_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # or a machine of one core would not get there
    data = load_conversations(write_jsonl(tmp_path / "chats.jsonl", make_conversations(1001)))
    tokenizer = make_tokenizer("llama3")
    prepared = prepare(data, "chats", tokenizer, 64)
    assert len(prepared.cache_files) == 2  # one from each process
    assert to_rows(prepared) == to_rows(encode(messages, tokenizer, 64) for messages in data["messages"])


def test_lazy_rows_that_cannot_be_used_count_nothing(caplog):
    data = to_data(chat("why", "warm"), [turn("system", "be terse"), *chat("why", "warm")])
    rows = prepare(data, "chats", make_tokenizer("gemma"), 100, lazy=True)[0:2]
    assert any(label != IGNORE for label in rows["labels"][0])
    assert rows["labels"][1] == [IGNORE]
    assert "record 2 is left out of the loss" in caplog.text


def test_by_length():
    data = to_data(chat("why", "warm salt water"), chat("why", "warm"), chat("why", "warm water"))
    lengths = prepare(data, "chats", make_tokenizer("llama3"), 100, by_length=True)["length"]
    assert list(lengths) == sorted(lengths) and len(set(lengths)) == 3
