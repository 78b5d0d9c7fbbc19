"""conversations/rows.py: which records become rows, the same whether eager, lazy, packed or by several processes."""

import datasets
import pytest
from chats import CHAT, LONG, SHORT, SYSTEM_CHAT, TURNS, chat, to_data, turn
from conftest import make_conversations, make_tokenizer, write_jsonl

from common.errors import BadInput
from conversations import rows, version
from conversations.labels import encode
from conversations.rows import prepare
from conversations.sources import load_conversations
from conversations.summary import Summary
from conversations.targets import IGNORE
from conversations.template import ChatTemplate

# Writes the last answer in its own way, so that each answer takes a row of its own.
LAST = TURNS.replace(
    "CONTENT", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
) + ("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def template(style, text="file") -> ChatTemplate:
    return ChatTemplate(make_tokenizer(style, text))


def prepared(data, style, max_length, text="file", **how) -> tuple[datasets.Dataset, Summary]:
    summary = Summary("chats", len(data))
    return prepare(data, summary, template(style, text), max_length, **how), summary


def to_rows(rows):
    return [(list(row["input_ids"]), list(row["labels"])) for row in rows]


def test_record_the_template_refuses_is_skipped():
    data, summary = prepared(to_data(chat("why", "cold"), SYSTEM_CHAT, SYSTEM_CHAT), "gemma", 1000)
    assert len(data) == 1 and make_tokenizer("gemma").convert_tokens_to_ids("cold") in data[0]["labels"]
    assert summary.skipped == {"the chat template refuses it: Gemma has no system turn": [2, 2]}
    assert summary.used == 1 and "| records used" in summary.table()


def test_an_unfinished_answer_that_a_template_rewrites_is_skipped():
    shouts = TURNS.replace("CONTENT", "{{ m.content | upper }}")
    data, summary = prepared(to_data(SHORT, SHORT, unfinished=[2]), "chatml", 1000, shouts)
    assert len(data) == 1  # a finished one is learnt as the template writes it
    reason = "the chat template rewrites an unfinished answer: where its text ends cannot be told"
    assert summary.skipped == {reason: [1, 2]}


PATHS = {"eager": {}, "lazy": {"lazy": True}, "packed": {"packing": True}, "by length": {"by_length": True}}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_unfinished_records_in_a_file(path, tmp_path):
    """Every answer but the unfinished ones, which are the last of their records, has its end among the tokens."""
    records = make_conversations(12)
    ends = sum(len(record["messages"]) // 2 for record in records)
    for record in records[::3]:
        record["unfinished"] = True
    data = load_conversations(write_jsonl(tmp_path / "chats.jsonl", records))
    rows, end = prepared(data, "llama3", 1000, **path)[0][:], make_tokenizer("llama3").eos_token_id
    labels = [label for labels in rows["labels"] for label in labels]
    assert labels.count(end) == ends - 4
    tokens = [token for ids in rows["input_ids"] for token in ids]
    assert tokens.count(end) == 2 * ends - 4  # those of the questions are no labels


def test_answer_cut_away_wholly_is_skipped_and_named():
    data, summary = prepared(to_data(LONG, SHORT), "chatml", 40)
    assert len(data) == 1 and data[0]["length"] < 40
    assert summary.skipped == {"no assistant token within --model_max_length 40": [1, 1]}
    assert summary.notes == {"answers cut by --model_max_length 40": 1, "rows of tokens": 1}
    with pytest.raises(BadInput, match=r"chats holds no usable conversation: no assistant token .* \(record 1\)"):
        prepared(to_data(LONG, LONG), "chatml", 40)


def test_fewer_than_min_length_tokens_is_skipped():
    data = to_data(LONG, SHORT)
    (row,) = encode({"messages": SHORT}, template("chatml"), 1000)
    length = len(row["input_ids"])
    assert len(prepared(data, "chatml", 1000, min_length=length)[0]) == 2
    rows, summary = prepared(data, "chatml", 1000, min_length=length + 1)
    assert len(rows) == 1 and summary.skipped == {f"fewer than {length + 1} tokens: no row for the last head": [1, 2]}


def test_rows_that_are_too_short_are_counted():
    long = prepared(to_data(CHAT), "chatml", 1000, LAST)[0]["length"][1]
    data, summary = prepared(to_data(CHAT), "chatml", 1000, LAST, min_length=long)
    assert list(data["length"]) == [long] and summary.used == 1
    assert summary.notes == {
        f"rows left out: fewer than {long} tokens: no row for the last head": 1,
        "rows of tokens": 1,
    }


def test_a_conversation_may_become_several_rows():
    data, summary = prepared(to_data(CHAT, SHORT), "chatml", 1000, LAST)
    texts = [make_tokenizer("chatml").decode([i for i in row["labels"] if i != IGNORE]) for row in data]
    assert texts == [" warm \n<|im_end|>", "stone<|im_end|>", "cold<|im_end|>"]
    assert summary.used == 2 and summary.notes == {"rows of tokens": 3}
    lazy, _ = prepared(to_data(CHAT, SHORT), "chatml", 1000, LAST, lazy=True)
    assert to_rows(lazy.__getitems__([0, 1])) == to_rows(data)  # as a DataLoader draws a batch


def test_a_changed_flag_is_tokenised_again(tmp_path):
    path, lengths = tmp_path / "chats.jsonl", []
    for unfinished in (False, True):
        write_jsonl(path, [{"messages": SHORT, "unfinished": unfinished}])
        lengths.append(prepared(load_conversations(str(path)), "chatml", 1000)[0][0]["length"])
    assert lengths[0] - lengths[1] == 1  # <|im_end|>


@pytest.mark.parametrize("changed", ["code", "template", "tokenizer", "stops", "nothing"])
def test_cached_rows_are_used_again_only_if_nothing_changed(changed, tmp_path, monkeypatch):
    """datasets itself does not look into imported functions."""
    data = load_conversations(write_jsonl(tmp_path / "chats.jsonl", make_conversations(5)))
    first, chat_template = prepared(data, "llama3", 64)[0], template("llama3")
    if changed == "code":
        monkeypatch.setattr(rows, "code_version", lambda: "newer")
    elif changed == "template":
        chat_template = template("llama3", TURNS.replace("CONTENT", "{{ m.content }}"))
    elif changed == "tokenizer":
        chat_template.tokenizer.add_tokens(["warm salt"])
    elif changed == "stops":
        chat_template = ChatTemplate(make_tokenizer("llama3"), {3})
    again = prepare(data, Summary("chats", 5), chat_template, 64)
    assert (again.cache_files == first.cache_files) == (changed == "nothing")


def test_the_code_version_follows_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    (tmp_path / "labels.py").write_text("a = 1")
    before = version.code_version()
    assert before == version.code_version()
    (tmp_path / "labels.py").write_text("a = 2")
    assert version.code_version() != before


def test_lazy_gives_the_same_rows(data_file):
    data = load_conversations(data_file)
    eager, lazy = (prepared(data, "llama3", 64, lazy=lazy)[0] for lazy in (False, True))
    assert to_rows(lazy) == to_rows(eager) and len(eager) == 48


def test_several_processes_give_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    data = load_conversations(write_jsonl(tmp_path / "chats.jsonl", make_conversations(1001)))
    made = {}
    for cores in (1, 2):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        for packing in (False, True):
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"{cores}{packing}")
            monkeypatch.setattr(rows, "code_version", lambda cores=cores, packing=packing: f"{cores}{packing}")
            made[cores, packing] = prepared(data, "llama3", 64, packing=packing)[0]
    assert len(made[2, False].cache_files) == 2  # one from each process
    assert to_rows(made[2, False]) == to_rows(made[1, False])
    assert to_rows(made[2, True]) == to_rows(made[1, True])
    turns = ({"messages": messages} for messages in data["messages"])
    assert to_rows(made[1, False]) == to_rows(row for turn in turns for row in encode(turn, template("llama3"), 64))


def test_lazy_rows_that_cannot_be_used_count_nothing(caplog):
    data = to_data(chat("why", "warm"), [turn("system", "be terse"), *chat("why", "warm")])
    found = prepared(data, "gemma", 100, lazy=True)[0][0:2]
    assert any(label != IGNORE for label in found["labels"][0])
    assert found["labels"][1] == [IGNORE]
    assert "record 2 is left out of the loss" in caplog.text


def test_by_length():
    data = to_data(chat("why", "warm salt water"), chat("why", "warm"), chat("why", "warm water"))
    lengths = prepared(data, "llama3", 100, by_length=True)[0]["length"]
    assert list(lengths) == sorted(lengths) and len(set(lengths)) == 3
