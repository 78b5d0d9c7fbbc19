"""conversations/labels.py with the behaviour of some sixty published chat templates: labels written by hand."""

import datetime
import logging

import pytest
from chats import chat

from conversations.labels import check_template, encode
from conversations.targets import IGNORE
from tests.conversations.chat_templates import suite

NO_END = {name for name, spec in suite.SPECS.items() if "no_end" in spec}
WRONG_MARKS = {"chatml_marked_wide", "chatml_marked_narrow", "chatml_marked_next", "smollm3", "smollm3_no_thinking"}


def labelled(name, case, chat_template) -> list[dict]:
    return encode(suite.conversation(name, case), chat_template, 10**6)


def texts(name, messages) -> list[list[tuple[bool, str]]]:
    """What `encode` makes of other conversations, decoded."""
    used = suite.chat_template(name)
    return [suite.decoded(row, used.tokenizer) for row in encode({"messages": messages}, used, 10**6)]


def tokens(rows, used) -> list[list[str]]:
    """The tokens of rows, labels in brackets."""
    return [
        [f"⟦{token}⟧" if label != IGNORE else token for token, label in zip(names, row["labels"], strict=True)]
        for row in rows
        for names in [used.tokenizer.convert_ids_to_tokens(row["input_ids"])]
    ]


@pytest.mark.parametrize(("name", "case"), [pytest.param(*pair, id="-".join(pair)) for pair in suite.cases()])
def test_labels_to_the_byte(name, case):
    chat_template, right = suite.chat_template(name), suite.compose(name, case)
    if right is None:
        with pytest.raises(ValueError, match="the chat template refuses it"):
            labelled(name, case, chat_template)
        return
    found = [suite.decoded(row, chat_template.tokenizer) for row in labelled(name, case, chat_template)]
    assert found == [suite.pieces(row) for row in right]


@pytest.mark.parametrize("kind", ["bpe", "words", "metaspace", "unigram"])
@pytest.mark.parametrize("name", suite.SPECS)
def test_labels_with_other_tokenizers(name, kind):
    """Tokens over the start of an answer, no tokens for white space, spaces as ▁, several tokens in one place."""
    chat_template = suite.chat_template(name, kind)
    for case in (case for template, case in suite.cases() if template == name):
        if right := suite.compose(name, case):
            rows = [suite.tokenised(row, chat_template.tokenizer) for row in right]
            found = labelled(name, case, chat_template)
            assert (case, tokens(found, chat_template)) == (case, tokens(rows, chat_template))


def test_every_template_is_tried():
    files = {path.stem for path in suite.FOLDER.glob("*.jinja")}
    assert files == {spec.get("file", name) for name, spec in suite.SPECS.items()} and len(files) >= 40


def test_a_token_over_the_start_of_an_answer_is_a_label():
    chat_template = suite.chat_template("vicuna_no_prompt", "bpe")
    (row,) = encode({"messages": chat("why", "cold")}, chat_template, 10**6)
    assert chat_template.tokenizer.convert_ids_to_tokens(row["input_ids"])[-3:] == [":", "Ġcold", "</s>"]
    assert row["labels"] == [IGNORE] * (len(row["labels"]) - 2) + row["input_ids"][-2:]


@pytest.mark.parametrize("name", sorted(suite.SPECS.keys() - {"deepseek_v31_thinking"}))
def test_what_is_unusual_about_a_template_is_said_once(name, caplog):
    with caplog.at_level(logging.WARNING):
        check_template(suite.chat_template(name))
    said = ["writes no end of turn" in caplog.text, "are not what the model writes" in caplog.text]
    assert said == [name in NO_END, name in WRONG_MARKS] and len(caplog.records) == sum(said)


def test_a_template_that_asks_for_the_date_gets_the_one_that_was_set():
    chat_template = suite.chat_template("llama31", kwargs=None, date=datetime.date(2025, 3, 1))
    (row,) = encode(suite.conversation("llama31", "one"), chat_template, 10**6)
    assert "Today is 01 Mar 2025\n" in chat_template.tokenizer.decode(row["input_ids"])


ONE_LEFT_OUT = chat("why", "cold", "how", "warm", "salt", "old")
ONE_LEFT_OUT[3]["train"] = False


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("chatml", ["cold<|im_end|>", "old<|im_end|>"]),
        ("glm4", ["cold<|user|>", "old<|user|>"]),
        ("qwen3", ["cold<|im_end|>", "old<|im_end|>"]),
        ("vicuna_no_prompt", ["cold</s>", "old</s>"]),
    ],
)
def test_an_answer_that_is_not_to_be_learnt_is_context(name, right):
    rows = texts(name, ONE_LEFT_OUT)
    assert [text for row in rows for is_label, text in row if is_label] == right
    assert all("warm" in "".join(text for _, text in row) for row in rows[-1:])


def test_a_row_stops_with_the_last_answer_that_is_learnt():
    assert texts("chatml", ONE_LEFT_OUT[:4]) == texts("chatml", ONE_LEFT_OUT[:2])
