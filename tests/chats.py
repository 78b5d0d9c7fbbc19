"""Chat templates, turns and conversations that several tests of conversations/ use."""

import itertools
import json

from conftest import make_tokenizer
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from conversations.columns import FEATURES
from conversations.labels import encode
from conversations.records import to_conversation
from conversations.targets import IGNORE
from conversations.template import ChatTemplate

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
    rest = {"tools": None, "prompt_ids": None, "answer_ids": None, "group": None}
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
WHOLE = {"tools": None, "unfinished": False, "prompt_ids": None, "answer_ids": None, "group": None}
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


CALLS = [{"type": "function", "function": {"name": "w", "arguments": {"city": "x"}}}]
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def make_chat(style, template="file", stops=(), **kwargs) -> ChatTemplate:
    """Its tokenizer adds BOS to every text by itself, as LLaMA's, Mistral's and Gemma's do: a second would show."""
    tokenizer = make_tokenizer(style, template)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(list(stops)), **kwargs)


def runs(row, tokenizer) -> list:
    """In their order: tokens that are no labels as one text, tokens that are as a list of token strings."""
    pairs, found = list(zip(row["input_ids"], row["labels"], strict=True)), []
    assert all(label in (IGNORE, token) for token, label in pairs)
    for is_label, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        ids = [token for token, _ in group]
        found.append(tokenizer.convert_ids_to_tokens(ids) if is_label else tokenizer.decode(ids))
    return found


def labelled(messages, chat, **more) -> list[list]:
    """`runs` of each row."""
    return [runs(row, chat.tokenizer) for row in encode({"messages": messages} | more, chat, 1000)]
