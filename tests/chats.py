"""Chat templates, turns and conversations that several tests of conversations/ use."""

import json

from datasets import Dataset

from conversations.columns import FEATURES
from conversations.records import to_conversation

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\nCONTENT<|im_end|>\n{% endfor %}"
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
    rest = {"tools": None, "prompt_ids": None, "answer_ids": None}
    rows = [{"record": i, "messages": m, "unfinished": i in unfinished} for i, m in enumerate(conversations, 1)]
    return Dataset.from_list([row | rest for row in rows], features=FEATURES)


# White space around an answer; each question equals its answer, so a search for the text would find the wrong one.
CHAT = chat("warm", " warm \n", "stone", "stone")
SYSTEM_CHAT = [turn("system", "cold moon"), *CHAT]
USER, ANSWER, SYSTEM = turn("user", "why"), turn("assistant", "cold"), turn("system", "moon")
GOOD = [{"messages": chat("why é🌕", 'a "cold"\n')}, {"id": 2, "messages": chat("why", "warm")}]
FIRST, SECOND = map(json.dumps, GOOD)
SHORT, LONG = chat("why", "cold"), chat("why " * 30, "cold")

# Conversations in the normal form of conversations/records.py.
WHOLE = {"tools": None, "unfinished": False, "prompt_ids": None, "answer_ids": None}
ASKED = turn("user", "the cat")
RED = [ASKED, turn("assistant", "red dog")]
RED_PAIRS = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "red dog"}]
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "x", "degrees": 0.1234567890123456}}}
CALLED = [
    turn("user", "weather?"),
    turn("assistant", "") | {"tool_calls": [CALL]},
    turn("tool", "rain") | {"name": "w"},
    turn("assistant", "It rains."),
]
THOUGHT = [ASKED, turn("assistant", "red dog") | {"reasoning_content": "the cat sees"}]


def made(record, ask=False) -> dict:
    conversation, problem, dropped = to_conversation(record, ask)
    assert (problem, dropped) == ("", [])
    return conversation


def called(*turns, **call) -> dict:
    """A record that calls the tool in the given way."""
    return {"messages": [CALLED[0], {"role": "assistant"} | call, *turns, *CALLED[2:]]}
