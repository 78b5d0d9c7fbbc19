"""chat_data: which tokens are labels, which records are refused, skipped and named, how files are read."""

import itertools
import json
import os

import pytest
from conftest import make_conversations, make_tokenizer, write_jsonl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from batches import Collator
from chat_data import encode, load_conversations, prepare, read_json, split_conversations, to_messages
from errors import BadInput
from medusa_loss import IGNORE

STYLES = ["llama3", "chatml", "mistral", "gemma"]

CHATML_WITH_GENERATION = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}\
{{ message.content }}<|im_end|>{% endif %}

{% endfor %}"""
# Qwen3 writes an empty think block, but only in front of the answer to the last question.
THINKS_LAST = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}"""
SHOUTS = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content | upper if "warm" in message.content else message.content }}<|im_end|>
{% endfor %}"""


def chat(*contents, system=None) -> list[dict]:
    """Turns of user and assistant by turns."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


# White space around an answer; each question equals its answer, so a search for the text would find the wrong one.
CHAT = chat("warm", " warm \n", "stone", "stone")
SYSTEM_CHAT = chat("warm", " warm \n", "stone", "stone", system="cold moon")


def make_bos_tokenizer(style, template="file"):
    """Adds BOS to every text by itself, as LLaMA's, Mistral's and Gemma's do: a second BOS would show."""
    tokenizer = make_tokenizer(style, template)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def runs(out, tokenizer) -> list:
    """Tokens that are no labels as text, tokens that are as a list of token strings, in their order."""
    pairs = list(zip(out["input_ids"], out["labels"], strict=True))
    assert all(label in (IGNORE, token) for token, label in pairs)
    found = []
    for is_label, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        ids = [token for token, _ in group]
        found.append(tokenizer.convert_ids_to_tokens(ids) if is_label else tokenizer.decode(ids))
    return found


def to_data(*conversations) -> Dataset:
    return Dataset.from_list([{"record": i, "messages": turns} for i, turns in enumerate(conversations, 1)])


# --- which tokens are labels

GOLDEN = {
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwarm<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ["w", "a", "rm", "<|eot_id|>"],
        "<|start_header_id|>user<|end_header_id|>\n\nstone<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["s", "tone", "<|eot_id|>"],
    ],
    "chatml": [
        "<|im_start|>user\nwarm<|im_end|>\n<|im_start|>assistant\n",
        ["Ġwarm", "Ġ", "Ċ", "<|im_end|>"],  # this template keeps the white space
        "\n<|im_start|>user\nstone<|im_end|>\n<|im_start|>assistant\n",
        ["s", "tone", "<|im_end|>"],
        "\n",
    ],
    "mistral": ["<s>[INST] warm [/INST]", ["Ġwarm", "</s>"], "[INST] stone [/INST]", ["Ġstone", "</s>"]],
    "gemma": [
        "<bos><start_of_turn>user\nwarm<end_of_turn>\n<start_of_turn>model\n",
        ["w", "a", "rm", "<end_of_turn>"],
        "\n<start_of_turn>user\nstone<end_of_turn>\n<start_of_turn>model\n",
        ["s", "tone", "<end_of_turn>"],
        "\n",
    ],
}
SYSTEM_START = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ncold moon<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwarm<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\ncold moon<|im_end|>\n<|im_start|>user\nwarm<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] cold moon\n\nwarm [/INST]",
}


@pytest.mark.parametrize("style", STYLES)
def test_only_answers_and_their_ends_are_labels(style):
    tokenizer = make_bos_tokenizer(style)
    assert runs(encode(CHAT, tokenizer, 1000), tokenizer) == GOLDEN[style]


@pytest.mark.parametrize("style", SYSTEM_START)
def test_a_system_turn_is_no_label(style):
    tokenizer = make_bos_tokenizer(style)
    assert runs(encode(SYSTEM_CHAT, tokenizer, 1000), tokenizer) == [SYSTEM_START[style], *GOLDEN[style][1:]]


@pytest.mark.parametrize("style", STYLES)
def test_tokens_are_the_templates_text(style):
    tokenizer = make_bos_tokenizer(style)
    ids = encode(CHAT, tokenizer, 1000)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("style", ["llama3", "mistral", "gemma"])  # ChatML has no BOS
def test_exactly_one_bos(style):
    tokenizer = make_bos_tokenizer(style)
    ids = encode(CHAT, tokenizer, 1000)["input_ids"]
    assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]


def test_generation_template_gives_the_same_labels():
    marked = make_bos_tokenizer("chatml", CHATML_WITH_GENERATION)
    assert encode(SYSTEM_CHAT, marked, 1000) == encode(SYSTEM_CHAT, make_bos_tokenizer("chatml"), 1000)


def test_template_that_writes_the_last_answer_differently():
    tokenizer = make_tokenizer("chatml", THINKS_LAST)
    start, first, between, second, end = GOLDEN["chatml"]
    # The block's last two line ends stay apart from the answer, so they are no labels.
    golden = [start, first, between + "<think>\n\n</think>\n\n", second, end]
    assert runs(encode(CHAT, tokenizer, 1000), tokenizer) == golden


def test_rewritten_answer_is_skipped(caplog):
    data = to_data(chat("why", "cold"), chat("why", "warm"), chat("why", "cold", "why", "warm"))
    assert len(prepare(data, "chats", make_tokenizer("chatml", SHOUTS), 1000)) == 1
    assert "chats: skipped 2 records: the chat template rewrites an answer (first: record 2)" in caplog.text


def test_template_that_refuses_a_record_skips_it(caplog):
    data = to_data(chat("why", "cold"), SYSTEM_CHAT)
    assert len(prepare(data, "chats", make_tokenizer("gemma"), 1000)) == 1
    assert "skipped 1 records: Gemma has no system turn (first: record 2)" in caplog.text


def test_end_of_turn_stays_a_label_where_it_is_the_pad_token():
    tokenizer = make_tokenizer("llama3")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [encode(CHAT, tokenizer, 1000), encode(chat("why", "cold"), tokenizer, 1000)]
    labels = Collator(tokenizer.pad_token_id)(rows)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [2, 1]  # the answers' ends, none of the padding


# --- length limits

SHORT, LONG = chat("why", "cold"), chat("why " * 30, "cold")


@pytest.mark.parametrize("template", ["file", CHATML_WITH_GENERATION], ids=["spans", "generation"])
@pytest.mark.parametrize("max_length", [3, 23, 24, 1000])  # 24: in the middle of the first answer
def test_truncation_keeps_the_start(template, max_length):
    tokenizer = make_tokenizer("chatml", template)
    whole, cut = encode(CHAT, tokenizer, 10**6), encode(CHAT, tokenizer, max_length)
    assert cut == {key: tokens[:max_length] for key, tokens in whole.items()}


def test_answer_cut_away_wholly_is_skipped_and_named(caplog):
    data = prepare(to_data(LONG, SHORT), "chats", make_tokenizer("chatml"), 40)
    assert len(data) == 1 and max(data["length"]) <= 40
    assert "chats: skipped 1 records: no assistant token within --model_max_length 40 (first: record 1)" in caplog.text


def test_nothing_left_is_refused():
    with pytest.raises(BadInput, match=r"chats holds no usable conversation: no assistant token .* \(record 1\)"):
        prepare(to_data(LONG, LONG), "chats", make_tokenizer("chatml"), 40)


def test_fewer_tokens_than_heads_look_ahead_is_skipped(caplog):
    tokenizer = make_tokenizer("chatml")
    length = len(encode(SHORT, tokenizer, 1000)["input_ids"])
    data = prepare(to_data(LONG, SHORT), "chats", tokenizer, 1000, min_length=length + 1)
    assert len(data) == 1 and data[0]["length"] > length
    assert f"fewer than {length + 1} tokens" in caplog.text and "(first: record 2)" in caplog.text
    assert len(prepare(to_data(LONG, SHORT), "chats", tokenizer, 1000, min_length=length)) == 2


# --- records to messages


def turn(role, content):
    return {"role": role, "content": content}


USER, ANSWER = turn("user", "why"), turn("assistant", "cold")
REFUSED = {
    "no turns": [{"messages": []}, {"id": 3}, {"messages": "why"}, "why", [USER, ANSWER]],
    "turn 2 is not an object": [{"messages": [USER, "cold"]}],
    "unknown role 'tool'": [{"messages": [USER, ANSWER, turn("tool", "42")]}],
    "unknown role None": [{"messages": [{"content": "why"}, ANSWER]}],
    "unknown role [1]": [{"messages": [turn([1], "why"), ANSWER]}],  # cannot be looked up in a dict
    "two user turns in a row": [{"messages": [USER, USER, ANSWER]}],
    "two assistant turns in a row": [{"messages": [USER, ANSWER, ANSWER]}],
    "a turn without text": [{"messages": [USER, turn("assistant", text)]} for text in ("", " \n", None, 42, ["cold"])],
    "a system turn that is not the first": [{"messages": [USER, ANSWER, turn("system", "cold"), USER, ANSWER]}],
    "no answer by the assistant": [{"messages": [USER]}, {"messages": [ANSWER]}, {"messages": [turn("system", "a")]}],
}


@pytest.mark.parametrize(
    ("problem", "record"), [(why, record) for why, records in REFUSED.items() for record in records]
)
def test_refused_records(problem, record):
    messages, found = to_messages(record)
    assert messages == [] and found.startswith(problem)


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "chatgpt", "bing", "bard", "model", "assistant"])
def test_sharegpt_record(user, assistant):
    turns = [("system", "a"), (user, "why"), (assistant, " cold ")]
    record = {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}
    assert to_messages(record) == ([turn("system", "a"), USER, turn("assistant", " cold ")], "")


def test_answers_before_the_first_question_and_questions_after_the_last_answer_are_dropped():
    assert to_messages({"messages": [ANSWER, ANSWER, USER, ANSWER, USER]}) == ([USER, ANSWER], "")
    system = turn("system", "a")
    assert to_messages({"messages": [system, ANSWER, USER, ANSWER, USER]}) == ([system, USER, ANSWER], "")


# --- files

GOOD = [{"messages": chat("why é🌕", 'a "cold"\n')}, {"id": 2, "messages": chat("why", "warm")}]
FIRST = json.dumps(GOOD[0])


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_array(tmp_path, indent, ascii_only):
    path = tmp_path / "chats.json"
    path.write_text(" \n" + json.dumps(GOOD, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    assert list(read_json(path)) == GOOD
    assert list(load_conversations(str(path))["messages"]) == [record["messages"] for record in GOOD]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json"])  # what it is, the first character says
def test_lines(tmp_path, name):
    path = tmp_path / name
    path.write_text(f"\n{FIRST}\n\n{json.dumps(GOOD[1])}")
    assert list(read_json(path)) == GOOD
    assert list(load_conversations(str(path))["messages"]) == [record["messages"] for record in GOOD]


def test_array_cut_off_anywhere_yields_its_whole_records(tmp_path):
    path, text, end_of_first = tmp_path / "chats.json", json.dumps(GOOD), len("[" + FIRST)
    for cut in range(1, len(text)):
        path.write_text(text[:cut])
        whole = (cut >= end_of_first) + (cut == len(text) - 1)  # only the ] is missing
        assert list(read_json(path)) == [*GOOD[:whole], None], text[:cut]


CUTS = {
    "in a string": ', {"messages": [{"role": "user", "content": "why th',
    "after a comma": ", ",
    "in a key": ', {"mes',
}


@pytest.mark.parametrize("rest", CUTS.values(), ids=CUTS)
def test_array_cut_off_is_said(tmp_path, caplog, rest):
    path = tmp_path / "chats.json"
    path.write_text("[" + FIRST + rest)
    assert len(load_conversations(str(path))) == 1
    assert f"{path}: skipped 1 records: the file is cut off here (first: record 2)" in caplog.text


BROKEN = {
    "jsonl": (f'{FIRST}\n\n{{"messages": oops}}\n{FIRST}\n', "line 3: not valid JSON"),
    "json": (f'[\n{FIRST},\n{{"messages": oops}},\n{FIRST}\n]', "line 3: record 2 is not valid JSON"),
}


@pytest.mark.parametrize("ending", BROKEN)
def test_syntax_error_names_file_and_line(tmp_path, ending):
    path, (text, where) = tmp_path / f"chats.{ending}", BROKEN[ending]
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        load_conversations(str(path))
    assert str(error.value).startswith(f"{path}, {where}")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), ('{"a": "é"}'.encode("latin-1"), r"not UTF-8 text \(byte 7\)")],
)
def test_unreadable_file(tmp_path, content, message):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{path} .*{message}"):
        load_conversations(str(path))


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "./chats", "/no/such/chats", "~/chats", "a/b/chats"])
def test_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(BadInput, match=f"there is no data file {name}"):
        load_conversations(name)


def test_hub_dataset(tmp_path, monkeypatch, caplog):
    """A folder of that name stands in for the Hub: datasets loads both the same way."""
    (tmp_path / "chats").mkdir()
    write_jsonl(tmp_path / "chats" / "train.jsonl", [*GOOD, {"id": 3, "messages": []}])
    monkeypatch.chdir(tmp_path)
    assert list(load_conversations("chats")["messages"]) == [record["messages"] for record in GOOD]
    assert "skipped 1 records: no turns" in caplog.text and "(first: record 3)" in caplog.text


def test_report_counts_each_problem_and_names_its_first_record(tmp_path, caplog):
    empty, twice = {"messages": []}, {"messages": [USER, USER]}
    path = write_jsonl(tmp_path / "chats.jsonl", [GOOD[0], empty, twice, GOOD[1], empty, empty])
    assert list(load_conversations(path)["record"]) == [1, 4]
    said = [record.getMessage() for record in caplog.records if record.name == "chat_data"]
    assert said == [
        f"{path}: skipped 3 records: no turns under 'messages' or 'conversations' (first: record 2)",
        f"{path}: skipped 1 records: two user turns in a row (first: record 3)",
    ]


def test_file_without_a_usable_record_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": []}, {"messages": [USER]}])
    with pytest.raises(BadInput, match=r"no turns .* \(record 1\); no answer by the assistant \(record 2\)"):
        load_conversations(path)


def test_changed_file_is_read_again(tmp_path):
    path = tmp_path / "chats.jsonl"
    for answer in ("cold", "warm"):  # the same size
        write_jsonl(path, [{"messages": chat("why", answer)}])
        os.utime(path, (0, 1 if answer == "cold" else 2))  # a clock may be too coarse to tell the two writes apart
        assert load_conversations(str(path))[0]["messages"][1]["content"] == answer


# --- training and evaluation data

TEN = [chat("why", f"{i}") for i in range(10)]


@pytest.mark.parametrize(("holdout", "count"), [(0, 0), (1, 1), (3, 3), (0.3, 3), (0.25, 2), (9, 9)])
def test_the_last_conversations_are_held_out(holdout, count):
    train, held_out = split_conversations(to_data(*TEN), None, holdout)
    assert list(train["messages"]) == TEN[: 10 - count]
    assert (list(held_out["messages"]) if held_out else []) == TEN[10 - count :]


@pytest.mark.parametrize("holdout", [10, 11, 0.99, 0.01])
def test_holdout_that_leaves_nothing_is_refused(holdout):
    with pytest.raises(BadInput, match=f"--eval_holdout {holdout} leaves nothing"):
        split_conversations(to_data(*TEN), None, holdout)


def test_conversations_of_eval_data_are_taken_out_of_training(caplog):
    held_out = to_data(TEN[3], chat("new", "new"), TEN[7])
    train, evaluation = split_conversations(to_data(*TEN), held_out, 0)
    assert list(train["messages"]) == [turns for i, turns in enumerate(TEN) if i not in (3, 7)]
    assert list(evaluation["messages"]) == list(held_out["messages"])
    assert "left 2 conversations out of training" in caplog.text


def test_duplicates_of_held_out_conversations_are_taken_out_of_training():
    train, held_out = split_conversations(to_data(TEN[9], *TEN), None, 1)
    assert list(train["messages"]) == TEN[:9] and list(held_out["messages"]) == TEN[9:]


def test_eval_data_that_holds_all_of_training_is_refused():
    with pytest.raises(BadInput, match="every training conversation"):
        split_conversations(to_data(*TEN[:2]), to_data(*TEN), 0)


# --- the ways to prepare


def to_rows(data):
    return [(row["input_ids"], row["labels"]) for row in data]


def test_lazy_gives_the_same_rows():
    data, tokenizer = to_data(*(record["messages"] for record in make_conversations(40))), make_tokenizer("llama3")
    eager, lazy = prepare(data, "chats", tokenizer, 64), prepare(data, "chats", tokenizer, 64, lazy=True)
    assert to_rows(lazy) == to_rows(eager) and len(eager) == 40


def test_several_processes_give_the_same_rows_in_the_same_order(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # or a machine of one core would not get there
    conversations = [record["messages"] for record in make_conversations(1001)]
    tokenizer = make_tokenizer("llama3")
    data = prepare(to_data(*conversations), "chats", tokenizer, 64)
    encoded = [encode(messages, tokenizer, 64) for messages in conversations]
    assert to_rows(data) == [(row["input_ids"], row["labels"]) for row in encoded]
