"""conversations/preview.py and options.py: what a person sees of the labels, and what a person may tell a template."""

import io

import pytest
from chats import chat
from conftest import make_tokenizer

from common.errors import BadInput
from conversations.labels import encode
from conversations.options import parse_kwargs
from conversations.preview import show
from conversations.template import ChatTemplate

PROMPT = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(out, count=5) -> str:
    template = ChatTemplate(make_tokenizer("chatml"))
    rows = [
        row
        for turns in (chat("why", "cold"), chat("why", "moon"))
        for row in encode({"messages": turns}, template, 99)
    ]
    show(rows, template, count, out)
    return out.getvalue()


def test_labels_stand_in_brackets():
    tokens = len(encode({"messages": chat("why", "cold")}, ChatTemplate(make_tokenizer("chatml")), 99)[0]["input_ids"])
    assert shown(io.StringIO(), 1) == f"--- row 1: {tokens} tokens, 2 labels\n{PROMPT}⟦cold<|im_end|>⟧\n\n"
    assert shown(io.StringIO()).count("---") == 2  # there are no more


def test_labels_are_green_and_ends_of_turns_stand_out_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(Terminal(), 1)
    assert f"\033[2m{PROMPT}\033[0m\033[32mcold\033[32;7m<|im_end|>\033[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown(Terminal(), 1)


def test_kwargs_of_a_template():
    assert parse_kwargs('{"enable_thinking": false}') == {"enable_thinking": False}
    assert parse_kwargs(None) == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [("thinking=1", "is not JSON"), ("[1]", "is no JSON object"), ('{"tokenize": 1}', "'tokenize' is not for")],
)
def test_kwargs_that_are_no_object_are_refused(text, why):
    with pytest.raises(BadInput, match=why):
        parse_kwargs(text)
