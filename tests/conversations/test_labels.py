"""conversations/: which tokens are labels, which records are refused, skipped and named, how files are read."""

import itertools
import json
import os

import pytest
from conftest import make_conversations, make_tokenizer, write_jsonl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from common.errors import BadInput
from conversations.batches import Collator
from conversations.labels import encode
from conversations.records import CUT_OFF, read_records, to_messages
from conversations.rows import prepare
from conversations.sources import load_conversations, split_conversations
from conversations.targets import IGNORE

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\nCONTENT<|im_end|>\n{% endfor %}"
# Qwen3 writes an empty think block, but only in front of the answer to the last question.
THINKS_LAST = TURNS.replace("CONTENT", "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
SHOUTS_WARM = TURNS.replace("CONTENT", "{{ m.content | replace('warm', 'WARM') }}")
GENERATION = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""  # the empty line: a line end right after a tag is dropped


def turn(role, content):
    return {"role": role, "content": content}


def chat(*contents) -> list[dict]:
    """User and assistant by turns."""
    return [turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def to_data(*conversations, unfinished=()) -> Dataset:
    """unfinished: the numbers of those that are."""
    return Dataset.from_list(
        [{"record": i, "messages": turns, "unfinished": i in unfinished} for i, turns in enumerate(conversations, 1)]
    )


def make_bos_tokenizer(style, template="file"):
    """Adds BOS to every text by itself, as LLaMA's, Mistral's and Gemma's do: a second BOS would show."""
    tokenizer = make_tokenizer(style, template)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def runs(out, tokenizer) -> list:
    """In their order: tokens that are no labels as one text, tokens that are as a list of token strings."""
    pairs, found = list(zip(out["input_ids"], out["labels"], strict=True)), []
    assert all(label in (IGNORE, token) for token, label in pairs)
    for is_label, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        ids = [token for token, _ in group]
        found.append(tokenizer.convert_ids_to_tokens(ids) if is_label else tokenizer.decode(ids))
    return found


# White space around an answer; each question equals its answer, so a search for the text would find the wrong one.
CHAT = chat("warm", " warm \n", "stone", "stone")
SYSTEM_CHAT = [turn("system", "cold moon"), *CHAT]
GOLDEN = {
    "llama3": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ncold moon<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwarm<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["w", "a", "rm", "<|eot_id|>"],
        "<|start_header_id|>user<|end_header_id|>\n\nstone<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["s", "tone", "<|eot_id|>"],
    ],
    "chatml": [
        "<|im_start|>system\ncold moon<|im_end|>\n<|im_start|>user\nwarm<|im_end|>\n<|im_start|>assistant\n",
        ["Ġwarm", "Ġ", "Ċ", "<|im_end|>"],  # the only one of the four that keeps the white space
        "\n<|im_start|>user\nstone<|im_end|>\n<|im_start|>assistant\n",
        ["s", "tone", "<|im_end|>"],
        "\n",
    ],
    "mistral": ["<s>[INST] cold moon\n\nwarm [/INST]", ["Ġwarm", "</s>"], "[INST] stone [/INST]", ["Ġstone", "</s>"]],
    "gemma": [
        "<bos><start_of_turn>user\nwarm<end_of_turn>\n<start_of_turn>model\n",
        ["w", "a", "rm", "<end_of_turn>"],
        "\n<start_of_turn>user\nstone<end_of_turn>\n<start_of_turn>model\n",
        ["s", "tone", "<end_of_turn>"],
        "\n",
    ],
}


@pytest.mark.parametrize("style", GOLDEN)
def test_only_answers_and_their_ends_are_labels(style):
    tokenizer, messages = make_bos_tokenizer(style), CHAT if style == "gemma" else SYSTEM_CHAT
    assert runs(encode(messages, tokenizer, 1000), tokenizer) == GOLDEN[style]


@pytest.mark.parametrize("style", GOLDEN)
def test_without_a_system_turn_the_labels_are_the_same(style):
    tokenizer = make_bos_tokenizer(style)
    start, *rest = runs(encode(CHAT, tokenizer, 1000), tokenizer)
    assert rest == GOLDEN[style][1:] and "cold moon" not in start


@pytest.mark.parametrize("style", GOLDEN)
def test_tokens_are_the_templates_text_with_its_one_bos(style):
    tokenizer = make_bos_tokenizer(style)
    ids = encode(CHAT, tokenizer, 1000)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    if style != "chatml":  # ChatML has no BOS; this tokenizer's is the start of every turn
        assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]


def test_generation_template_gives_the_same_labels():
    marked = make_bos_tokenizer("chatml", GENERATION)
    assert encode(SYSTEM_CHAT, marked, 1000) == encode(SYSTEM_CHAT, make_bos_tokenizer("chatml"), 1000)


def test_generation_template_may_rewrite_answers():
    """It says itself what the assistant's tokens are, so no answer has to be found again."""
    tokenizer = make_tokenizer("chatml", GENERATION.replace("%}{{ m.content }}", "%}{{ m.content | upper }}", 1))
    labels = runs(encode(chat("why", "i b"), tokenizer, 1000), tokenizer)[1::2]
    assert labels == [["I", "Ġ", "B", "<|im_end|>"]]


def test_template_that_writes_the_last_answer_differently():
    tokenizer = make_tokenizer("chatml", THINKS_LAST)
    before, first, between, second, end = GOLDEN["chatml"]
    golden = [before, first, between + "<think>\n\n</think>\n\n", second, end]
    assert runs(encode(SYSTEM_CHAT, tokenizer, 1000), tokenizer) == golden


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


def test_end_of_turn_stays_a_label_where_it_is_the_pad_token():
    tokenizer = make_tokenizer("llama3")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [encode(CHAT, tokenizer, 1000), encode(chat("why", "cold"), tokenizer, 1000)]
    labels = Collator(tokenizer.pad_token_id)(rows)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [2, 1]  # the answers' ends, none of the padding


def without_end(golden: list) -> list:
    """What is left of GOLDEN if the last answer is unfinished: nothing from its end-of-turn token on."""
    return [*golden[:3], golden[3][:-1]]


@pytest.mark.parametrize("style", GOLDEN)
def test_an_unfinished_answer_has_no_end(style):
    tokenizer, messages = make_bos_tokenizer(style), CHAT if style == "gemma" else SYSTEM_CHAT
    assert runs(encode(messages, tokenizer, 1000, unfinished=True), tokenizer) == without_end(GOLDEN[style])


def test_an_unfinished_answer_in_a_generation_template():
    """Whether the template counts the end of turn as the assistant's or not."""
    counts = make_bos_tokenizer("chatml", GENERATION)
    without = make_bos_tokenizer(
        "chatml", GENERATION.replace("<|im_end|>{% endgeneration %}\n", "{% endgeneration %}<|im_end|>")
    )
    start, first, between, second = without_end(GOLDEN["chatml"])
    assert runs(encode(SYSTEM_CHAT, counts, 1000, True), counts) == [start, first, between, second]
    golden = [start, first[:-1], "<|im_end|>" + between, second]
    assert runs(encode(SYSTEM_CHAT, without, 1000, True), without) == golden


@pytest.mark.parametrize("template", ["file", THINKS_LAST, GENERATION], ids=["spans", "thinks", "generation"])
@pytest.mark.parametrize("answer", ["cold", "cold ", "cold\n\n"])
def test_white_space_at_an_unfinished_end_is_left_out(answer, template):
    tokenizer = make_tokenizer("chatml", template)
    assert runs(encode(chat("why", answer), tokenizer, 1000, unfinished=True), tokenizer)[1:] == [["cold"]]


def test_a_token_that_reaches_beyond_an_unfinished_answer_is_left_out():
    tokenizer = make_tokenizer("chatml", TURNS.replace("CONTENT", "{{ m.content }}ater"))
    labels = [runs(encode(chat("why", "cold w"), tokenizer, 1000, flag), tokenizer)[1] for flag in (False, True)]
    assert labels == [["cold", "Ġwater", "<|im_end|>"], ["cold"]]


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


SHORT, LONG = chat("why", "cold"), chat("why " * 30, "cold")


@pytest.mark.parametrize("template", ["file", GENERATION], ids=["spans", "generation"])
@pytest.mark.parametrize("max_length", [3, 21, 1000])  # 21: in the middle of the first answer
@pytest.mark.parametrize("unfinished", [False, True])
def test_truncation_keeps_the_start(unfinished, template, max_length):
    tokenizer = make_tokenizer("chatml", template)
    whole, cut = (encode(CHAT, tokenizer, length, unfinished) for length in (10**6, max_length))
    assert cut == {key: tokens[:max_length] for key, tokens in whole.items()}


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


USER, ANSWER, SYSTEM = turn("user", "why"), turn("assistant", "cold"), turn("system", "moon")
NO_TURNS = "no turns under 'messages' or 'conversations'"
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


@pytest.mark.parametrize(("said", "flag"), [(True, True), (False, False), (None, False), ("absent", False)])
@pytest.mark.parametrize("form", ["chat", "ShareGPT"])
def test_unfinished_flag_of_a_record(form, said, flag, tmp_path):
    record = {"messages": [USER, ANSWER, USER]}  # the question behind the answer goes, the flag stays the answer's
    if form == "ShareGPT":
        record = {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "cold"}]}
    record |= {} if said == "absent" else {"unfinished": said}
    (row,) = load_conversations(write_jsonl(tmp_path / "chats.jsonl", [record]))
    assert row == {"record": 1, "messages": [USER, ANSWER], "unfinished": flag, "problem": ""}


@pytest.mark.parametrize("start", [[], [SYSTEM]])
def test_first_answers_and_last_question_are_dropped(start):
    turns = [*start, ANSWER, ANSWER, USER, ANSWER, USER]
    assert to_messages({"messages": turns}) == ([*start, USER, ANSWER], "")


GOOD = [{"messages": chat("why é🌕", 'a "cold"\n')}, {"id": 2, "messages": chat("why", "warm")}]
FIRST, SECOND = map(json.dumps, GOOD)
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


def test_changed_file_is_read_again(tmp_path):
    path = tmp_path / "chats.jsonl"
    for second, answer in enumerate(("cold", "warm")):  # the same size
        write_jsonl(path, [{"messages": chat("why", answer)}])
        os.utime(path, (second, second))  # a clock may be too coarse to tell the two writes apart
        assert load_conversations(str(path))[0]["messages"] == chat("why", answer)


def test_a_changed_flag_is_tokenised_again(tmp_path):
    path, tokenizer, lengths = tmp_path / "chats.jsonl", make_tokenizer("chatml"), []
    for unfinished in (False, True):
        write_jsonl(path, [{"messages": SHORT, "unfinished": unfinished}])
        lengths.append(prepare(load_conversations(str(path)), "chats", tokenizer, 1000)[0]["length"])
    assert lengths[0] - lengths[1] == 2  # <|im_end|> and the line end


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


def test_hub_dataset(tmp_path, monkeypatch, caplog):
    """A folder of that name stands in for the Hub: datasets loads both the same way."""
    (tmp_path / "chats").mkdir()
    write_jsonl(tmp_path / "chats" / "train.jsonl", [GOOD[0], GOOD[1] | {"unfinished": True}, {"messages": []}])
    monkeypatch.chdir(tmp_path)
    data = load_conversations("chats")
    assert list(data["messages"]) == [record["messages"] for record in GOOD]
    assert list(data["unfinished"]) == [False, True]  # the first does not say it
    assert "skipped 1 records: no turns" in caplog.text and "(first: record 3)" in caplog.text


def test_an_eos_behind_the_whole_text_is_no_end_of_turn():
    tokenizer = make_tokenizer("chatml", TURNS.replace("CONTENT", "{{ m.content }}") + "{{ eos_token }}")
    labelled = runs(encode(chat("why", "cold", "why", "cold"), tokenizer, 1000), tokenizer)[1::2]
    assert labelled == [["cold", "<|im_end|>"]] * 2


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0c"])
def test_line_separators_inside_a_string_are_no_line_ends(tmp_path, character):
    path = tmp_path / "chats.jsonl"
    record = {"messages": chat(f"why{character}cold", "warm")}
    path.write_text(json.dumps(record, ensure_ascii=False).replace("\x0c", "\\f") + "\n", encoding="utf-8")
    assert list(read_records(path)) == [record]


def test_half_a_character_is_skipped_with_its_record(tmp_path, caplog):
    path = write_jsonl(tmp_path / "chats.jsonl", [*GOOD, {"messages": chat("why", "a\ud83d")}])
    assert len(load_conversations(path)) == 2
    assert "lone surrogate" in caplog.text


def test_array_cut_inside_a_character(tmp_path):
    path = tmp_path / "chats.json"
    path.write_bytes(f'[{FIRST}, {{"messages": [{{"content": "é'.encode()[:-1])
    assert list(read_records(path)) == [GOOD[0], CUT_OFF]


def test_text_behind_the_array_is_refused(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(f"[{FIRST}]\n[{SECOND}]")
    with pytest.raises(BadInput, match="line 1: the array ends here"):
        list(read_records(path))


def test_lazy_rows_that_cannot_be_used_count_nothing(caplog):
    data = to_data(chat("why", "warm"), [turn("system", "be terse"), *chat("why", "warm")])
    rows = prepare(data, "chats", make_tokenizer("gemma"), 100, lazy=True)[0:2]
    assert any(label != IGNORE for label in rows["labels"][0])
    assert rows["labels"][1] == [IGNORE]
    assert "record 2 counts nothing" in caplog.text


def test_by_length():
    data = to_data(chat("why", "warm salt water"), chat("why", "warm"), chat("why", "warm water"))
    lengths = prepare(data, "chats", make_tokenizer("llama3"), 100, by_length=True)["length"]
    assert list(lengths) == sorted(lengths) and len(set(lengths)) == 3
