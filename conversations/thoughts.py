"""Thoughts of reasoning models: where they stand in an answer, and in a prompt that opens or closes them."""

import re

TAGS = (  # each opened and closed in the same style
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_OPEN, _CLOSE = ("|".join(re.escape(tags[i]) for tags in TAGS) for i in range(2))
OPENS = re.compile(rf"\s*(?:{_OPEN})\s*")  # at the start of an answer
CLOSES = re.compile(rf"(?:{_CLOSE})")
TAG = re.compile(rf"{_OPEN}|{_CLOSE}")
OPEN_END = re.compile(rf"(?:{_OPEN})\s*\Z")  # a prompt that lets the model begin with a thought
EMPTY = re.compile(rf"\s*(?:{_OPEN})?\s*(?:{_CLOSE})\n*")  # a block without a thought
EMPTY_END = re.compile(rf"\s*(?:{_OPEN})?\s*(?:{_CLOSE})\s*\Z")  # a prompt that asks for no thought


def split_thoughts(message: dict) -> tuple[str, str]:
    """-> (thoughts, what is said): from `reasoning_content`, or from tags at the start of the content. An open tag
    that is never closed holds the whole content: the answer was cut off inside its thoughts."""
    content = message["content"]
    if message.get("reasoning_content", "").strip():
        return message["reasoning_content"], content
    opened, closed = OPENS.match(content), CLOSES.search(content)
    if closed:
        return content[opened.end() if opened else 0 : closed.start()], content[closed.end() :]
    return (content[opened.end() :], "") if opened else ("", content)


def write_thoughts(message: dict, prompt: str) -> str:
    """The answer as a model writes it that thinks first, behind a prompt that may have opened the thought already."""
    opened = OPEN_END.search(prompt)
    if message.get("reasoning_content", "").strip():
        tags = next((tags for tags in TAGS if opened and tags[0] in opened[0]), TAGS[0])
        body = f"{tags[0]}\n{message['reasoning_content'].strip()}\n{tags[1]}\n\n{message['content']}"
    else:
        body = message["content"]
    return OPENS.sub("", body, count=1) if opened and OPENS.match(body) else body
