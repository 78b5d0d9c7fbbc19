"""conversations/template.py: what a chat template is asked and told, and what it cannot write."""

import json
from datetime import date

import pytest
from chats import CALLS, CHAT, PROMPT, TURNS, chat, labelled, make_chat, turn

from common.errors import BadInput
from conversations.labels import check_template, encode
from conversations.template import Refusal


def test_a_template_that_cannot_write_a_plain_conversation_is_refused():
    with pytest.raises(BadInput, match="refuses it: needs a system turn: it has to write a question, an answer"):
        check_template(make_chat("chatml", "{{ raise_exception('needs a system turn') }}"))


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "w"}}]])
def test_a_template_that_loops_over_tools_given_none(tools):
    loops = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    (row,) = labelled(
        chat("why", "cold"), make_chat("chatml", loops + TURNS.replace("CONTENT", "{{ m.content }}")), tools=tools
    )
    assert row[1] == ["cold", "<|im_end|>"] and row[0].startswith("w<|im" if tools else "<|im")


def test_what_a_template_fails_on_is_said():
    chat_ = make_chat("chatml", TURNS.replace("CONTENT", "{{ m.content + 3 }}"))
    with pytest.raises(Refusal, match=r'the chat template fails on it: can only concatenate str \(not "int"\)'):
        encode({"messages": CHAT}, chat_, 1000)


def test_a_date_is_that_of_the_first_day():
    dated = "{{ strftime_now('%d %b %Y') }}|" + TURNS.replace("CONTENT", "{{ m.content }}")
    chats = [make_chat("chatml", dated, date=date(2026, 11, day)) for day in (25, 25, 26)]
    assert labelled(CHAT, chats[0])[0][0].startswith("25 Nov 2026|")
    assert chats[0].fingerprint == chats[1].fingerprint != chats[2].fingerprint
    plain = [make_chat("chatml", date=date(2026, 11, day)).fingerprint for day in (25, 26)]
    assert plain[0] == plain[1]  # a template that prints no date does not change


def test_kwargs_reach_the_template():
    asked = TURNS.replace("CONTENT", "{% if shout %}!{% endif %}{{ m.content }}")
    chats = [make_chat("chatml", asked, kwargs={"shout": shout}) for shout in (True, False)]
    assert [labelled(chat("why", "cold"), chat_)[0][0].count("!") for chat_ in chats] == [
        2,
        0,
    ]  # in front of both turns
    assert chats[0].fingerprint != chats[1].fingerprint


def test_arguments_of_calls_as_the_template_wants_them():
    turns = [
        turn("user", "why"),
        turn("assistant", "") | {"tool_calls": CALLS},
        turn("tool", "old"),
        turn("assistant", "cold"),
    ]
    for write in ("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"):
        template = TURNS.replace(
            "CONTENT", "{{ m.content }}{% for c in m.tool_calls or [] %}" + write + "{% endfor %}"
        )
        ((_, called, between, answer),) = labelled(turns, make_chat("chatml", template + PROMPT))
        text = "".join(called).replace("Ġ", " ")
        assert json.loads(text.removesuffix("<|im_end|>")) == {"city": "x"} and text.endswith("<|im_end|>")
        assert "old" in between and answer == ["cold", "<|im_end|>"]


ARGUMENTS = [{"on": True, "n": None}, {"a": {"b": [1, ""]}}, {"q": 'say "hi"\nC:\\x'}, {"q": ""}, {}]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=map(str, ARGUMENTS))
def test_calls_with_any_arguments_are_labels(arguments):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in "vw"]
    turns = [turn("user", "why"), turn("assistant", "") | {"tool_calls": calls}]
    write = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    chat_ = make_chat("chatml", TURNS.replace("CONTENT", "{{ m.content }}" + write) + PROMPT)
    ((_, called),) = labelled(turns, chat_)
    text = chat_.tokenizer.convert_tokens_to_string(called)
    assert text == "".join(json.dumps(call["function"], ensure_ascii=False) for call in calls) + "<|im_end|>"


@pytest.mark.parametrize("kept", ["", "(m.tool_calls or [])[:1]"], ids=["none", "the first alone"])
def test_calls_that_the_template_does_not_write_are_refused(kept):
    turns = [turn("user", "why"), turn("assistant", "") | {"tool_calls": CALLS * 2}, turn("tool", "old"), *CHAT[3:]]
    write = f"{{% for c in {kept} %}}{{{{ c }}}}{{% endfor %}}" if kept else ""
    with pytest.raises(Refusal, match="does not write the tool calls of an answer"):
        labelled(turns, make_chat("chatml", TURNS.replace("CONTENT", "{{ m.content }}" + write) + PROMPT))


def test_a_prompt_that_depends_on_words_is_seen_by_both_ways():
    """Some templates look for /no_think, and only in the prompt."""
    block = "{{ '<think></think>' if '/no_think' in messages[-1].content }}"
    chat_ = make_chat(
        "chatml", TURNS.replace("CONTENT", "{{ m.content }}") + PROMPT.replace("\n{% e", "\n" + block + "{% e")
    )
    for words, found in (("why", ""), ("why /no_think", "<think></think>")):
        (row,) = labelled(chat(words, "cold"), chat_)
        assert row[0].endswith("assistant\n" + found) and row[1] == ["cold", "<|im_end|>"]
