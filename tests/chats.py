"""Chat templates, turns and conversations that several tests of conversations/ use."""

import json

from datasets import Dataset

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
    return Dataset.from_list(
        [{"record": i, "messages": turns, "unfinished": i in unfinished} for i, turns in enumerate(conversations, 1)]
    )


# White space around an answer; each question equals its answer, so a search for the text would find the wrong one.
CHAT = chat("warm", " warm \n", "stone", "stone")
SYSTEM_CHAT = [turn("system", "cold moon"), *CHAT]
USER, ANSWER, SYSTEM = turn("user", "why"), turn("assistant", "cold"), turn("system", "moon")
NO_TURNS = "no turns under 'messages' or 'conversations'"
GOOD = [{"messages": chat("why é🌕", 'a "cold"\n')}, {"id": 2, "messages": chat("why", "warm")}]
FIRST, SECOND = map(json.dumps, GOOD)
SHORT, LONG = chat("why", "cold"), chat("why " * 30, "cold")
