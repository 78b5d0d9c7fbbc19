"""conversations/labels.py: which tokens are labels. test_chat_templates.py has more templates."""

import itertools

import pytest
from chats import CHAT, GENERATION, PROMPT, SYSTEM_CHAT, TURNS, chat, labelled, make_chat, turn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversations.answers import NO_THOUGHTS, UNWRITTEN, find_quickly, find_rows
from conversations.batches import Collator
from conversations.labels import FOREIGN, check_template, encode, encode_all
from conversations.targets import IGNORE
from conversations.template import ChatTemplate

# Writes a think block, be it empty, but only in front of the last answer.
THINKS_LAST = TURNS.replace(
    "CONTENT", "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
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
    ],
    "mistral": ["<s>[INST] cold moon\n\nwarm [/INST]", ["Ġwarm", "</s>"], "[INST] stone [/INST]", ["Ġstone", "</s>"]],
    "gemma": [
        "<bos><start_of_turn>user\nwarm<end_of_turn>\n<start_of_turn>model\n",
        ["w", "a", "rm", "<end_of_turn>"],
        "\n<start_of_turn>user\nstone<end_of_turn>\n<start_of_turn>model\n",
        ["s", "tone", "<end_of_turn>"],
    ],
}


def messages_of(style):
    return CHAT if style == "gemma" else SYSTEM_CHAT


@pytest.mark.parametrize("style", GOLDEN)
def test_only_answers_and_their_ends_are_labels(style):
    assert labelled(messages_of(style), make_chat(style)) == [GOLDEN[style]]


@pytest.mark.parametrize("style", GOLDEN)
def test_tokens_are_the_templates_text_with_its_one_bos(style):
    chat = make_chat(style)
    ((ids, _),) = (row.values() for row in encode({"messages": CHAT}, chat, 1000))
    text = chat.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert chat.tokenizer.decode(ids) == text.rstrip("\n")  # a row stops with its last label
    if style != "chatml":  # ChatML has no BOS; this tokenizer's is the start of every turn
        assert [i for i, token in enumerate(ids) if token == chat.tokenizer.bos_token_id] == [0]


def test_a_single_rendering_gives_the_same_rows():
    for style, messages in itertools.product(GOLDEN, (CHAT, SYSTEM_CHAT, CHAT[:2], CHAT * 3)):
        if style == "gemma" and messages is SYSTEM_CHAT:
            continue
        conversation, chat = {"messages": messages}, make_chat(style)
        assert find_quickly(conversation, chat) == find_rows(conversation, chat)
    assert find_quickly({"messages": CHAT}, make_chat("chatml", THINKS_LAST)) is None  # it takes several rows


def test_generation_marks_that_are_right_are_no_matter(caplog):
    chat = make_chat("chatml", GENERATION + PROMPT)
    check_template(chat)
    assert labelled(SYSTEM_CHAT, chat) == [GOLDEN["chatml"]] and not caplog.records


def test_generation_marks_that_are_wrong_are_named_and_not_followed(caplog):
    """Here they leave the end out."""
    marks = GENERATION.replace("<|im_end|>{% endgeneration %}\n", "{% endgeneration %}<|im_end|>")
    chat = make_chat("chatml", marks + PROMPT)
    check_template(chat)
    assert (
        "they mark 'becausebecause' in a conversation of which 'because<|im_end|>because<|im_end|>' are" in caplog.text
    )
    assert labelled(SYSTEM_CHAT, chat) == [GOLDEN["chatml"]]


def test_white_space_that_a_tokenizer_drops_extends_no_label():
    words = ["[UNK]", "<|u|>", "<|a|>", "<|e|>", "red", "dog", "cat", "blue", "tree", "user", "asks", "more"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="<|e|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% generation %}{{ m.content + '<|e|>\\n' }}"
        "{% endgeneration %}{% else %}<|u|>{{ m.content }}<|e|>\\n{% endif %}{% endfor %}"
    )
    ((_, first, _, second),) = labelled(
        chat("user asks", "red dog ", "more cat", " blue tree"), ChatTemplate(tokenizer)
    )
    assert (first, second) == (["red", "dog", "<|e|>"], ["blue", "tree", "<|e|>"])


def test_template_that_writes_the_last_answer_differently():
    """Each answer is learnt where it is the last; the empty block is not the model's."""
    before, first, between, second = GOLDEN["chatml"]
    block, text = "<think>\n\n</think>\n\n", "".join(first).replace("Ġ", " ").replace("Ċ", "\n")
    golden = [[before + block, first], [before + text + between + block, second]]
    assert labelled(SYSTEM_CHAT, make_chat("chatml", THINKS_LAST + PROMPT)) == golden


def test_end_of_turn_stays_a_label_where_it_is_the_pad_token():
    chat_ = make_chat("llama3")
    assert chat_.tokenizer.pad_token_id == chat_.tokenizer.eos_token_id
    rows = [row for turns in (CHAT, chat("why", "cold")) for row in encode({"messages": turns}, chat_, 1000)]
    labels = Collator(chat_.tokenizer.pad_token_id)(rows)["labels"]
    assert (labels == chat_.tokenizer.eos_token_id).sum(1).tolist() == [2, 1]  # the answers' ends, not the padding


@pytest.mark.parametrize("style", GOLDEN)
def test_an_unfinished_answer_has_no_end(style):
    *start, last = GOLDEN[style]
    assert labelled(messages_of(style), make_chat(style), unfinished=True) == [[*start, last[:-1]]]


@pytest.mark.parametrize("template", ["file", THINKS_LAST + PROMPT, GENERATION + PROMPT])
@pytest.mark.parametrize("answer", ["cold", "cold ", "cold\n\n"])
def test_white_space_at_an_unfinished_end_is_left_out(answer, template):
    ((_, last),) = labelled(chat("why", answer), make_chat("chatml", template), unfinished=True)
    assert last == ["cold"]


@pytest.mark.parametrize("max_length", [3, 21, 1000])  # 21: in the middle of the first answer
@pytest.mark.parametrize("unfinished", [False, True])
def test_truncation_keeps_the_start(unfinished, max_length):
    conversation, chat = {"messages": CHAT, "unfinished": unfinished}, make_chat("chatml")
    (whole,), (cut,) = (encode(conversation, chat, length) for length in (10**6, max_length))
    assert cut == {key: tokens[:max_length] for key, tokens in whole.items()}
    (result,) = encode_all([conversation], chat, max_length)
    expected = {3: 2, 21: 2, 1000: 0}[max_length]
    assert dict(result.notes) == ({f"answers cut by --model_max_length {max_length}": expected} if expected else {})


def test_an_eos_behind_the_whole_text_is_no_end_of_turn():
    chat_ = make_chat("chatml", TURNS.replace("CONTENT", "{{ m.content }}") + "{{ eos_token }}")
    ((_, first, _, second),) = labelled(chat("why", "cold", "why", "cold"), chat_)
    assert first == second == ["cold", "<|im_end|>"]


def test_an_answer_that_is_not_to_be_learnt():
    turns = [*CHAT[:1], CHAT[1] | {"train": False}, *CHAT[2:]]
    (text, second), (_, first, *_) = labelled(turns, make_chat("llama3"))[0], GOLDEN["llama3"]
    assert second == GOLDEN["llama3"][3] and text.count("<|eot_id|>") == 3 and "warm<|eot_id|>" in text
    turns = [*CHAT[:3], CHAT[3] | {"train": False}]
    assert labelled(turns, make_chat("llama3"))[0][1:] == [first]  # and nothing behind it


def test_a_template_without_an_end_is_named(caplog):
    chat_ = make_chat("llama3", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    check_template(chat_)
    assert "writes no end of turn on which the model stops: behind an answer stands '\\nuser: '" in caplog.text


def test_a_question_with_private_use_characters():
    turns = chat("why \ue0f70\ue0f7", "cold", "\ue0f71\ue0f7", "warm")
    assert [found[1:] for found in labelled(turns, make_chat("mistral"))] == [
        [["Ġcold", "</s>"], "[INST] \ue0f71\ue0f7 [/INST]", ["Ġwarm", "</s>"]]
    ]


def test_recorded_tokens_are_trained_on_as_they_are():
    chat_ = make_chat("llama3")
    ids = lambda text: chat_.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    record = {
        "messages": chat("why", "cold moon"),
        "prompt_ids": ids("a prompt of its own"),
        "answer_ids": ids("cold moon"),
    }
    for end, unfinished in ([], True), ([chat_.tokenizer.eos_token_id], False):
        (row,) = encode(record | {"answer_ids": record["answer_ids"] + end, "unfinished": unfinished}, chat_, 1000)
        assert row["input_ids"] == record["prompt_ids"] + record["answer_ids"] + end
        assert row["labels"] == [IGNORE] * len(record["prompt_ids"]) + record["answer_ids"] + end


@pytest.mark.parametrize("answer_ids", [[1, 2, 3], [10**6]])
def test_recorded_tokens_of_another_tokenizer_are_counted_and_made_anew(answer_ids):
    chat_ = make_chat("llama3")
    (found,) = encode_all([{"messages": CHAT, "prompt_ids": [3], "answer_ids": answer_ids}], chat_, 1000)
    assert found.rows == encode({"messages": CHAT}, chat_, 1000) and dict(found.notes) == {FOREIGN: 1}


@pytest.mark.parametrize("messages", [CHAT, [CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]])
def test_recorded_tokens_of_one_answer_among_several_are_not_used(messages):
    record = {
        "messages": messages,
        "prompt_ids": [3],
        "answer_ids": make_chat("llama3").tokenizer("stone").input_ids[1:],
    }
    (found,) = encode_all([record], make_chat("llama3"), 1000)
    assert dict(found.notes) == {FOREIGN: 1} and found.rows == encode(
        {"messages": messages}, make_chat("llama3"), 1000
    )


def test_thoughts_that_cannot_be_written_and_missing_ones_are_counted():
    thinking = turn("assistant", "cold") | {"reasoning_content": "the moon"}
    (found,) = encode_all([{"messages": [turn("user", "why"), thinking]}], make_chat("llama3"), 1000)
    assert dict(found.notes) == {UNWRITTEN: 1}
    opens = TURNS.replace("CONTENT", "{{ m.content }}") + PROMPT.replace("nt\n", "nt\n<think>\n")
    (found,) = encode_all([{"messages": CHAT}], make_chat("chatml", opens), 1000)
    assert dict(found.notes) == {NO_THOUGHTS: 2}
