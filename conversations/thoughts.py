"""Thoughts of reasoning models: where they stand in an answer, and in a prompt that opens or closes them."""

import re

STYLES = (  # what stands before a thought and behind it, as the models write it
    ("<think>\n", "\n</think>\n\n"),
    ("<thinking>\n", "\n</thinking>\n\n"),
    ("<thought>\n", "\n</thought>\n\n"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
)
_OPEN, _CLOSE = ("|".join(re.escape(style[i].strip()) for style in STYLES) for i in range(2))
TAG = re.compile(rf"{_OPEN}|{_CLOSE}")
OPENS = re.compile(rf"\s*(?:{_OPEN})\s*")  # at the start of an answer
CLOSES = re.compile(rf"(?:{_CLOSE})")
OPEN_END = re.compile(rf"(?:{_OPEN})\s*\Z")  # a prompt that lets the model begin with a thought
EMPTY = re.compile(rf"\s*(?:{_OPEN})?\s*(?:{_CLOSE})\n*")  # a block without a thought
EMPTY_END = re.compile(rf"(?:{_OPEN})?\s*(?:{_CLOSE})\s*\Z")  # a prompt that asks for no thought


def styles_in(template: str) -> tuple[tuple[str, str], ...]:
    """The styles of which a template writes at least the end."""
    return tuple(style for style in STYLES if style[1].strip() in template)


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


def is_foreign(content: str, styles) -> bool:
    """Whether the first tag of a content is of none of these styles."""
    found = TAG.search(content)
    return found is not None and found[0] not in {tag.strip() for style in styles for tag in style}


def write_thoughts(message: dict, prompt: str, styles, lead: str, unfinished: bool) -> str:
    """The answer as a model writes it that thinks first, behind a prompt that may have opened the thought already. In
    the first of the styles, or the prompt's; lead: what the template writes before what is said."""
    opened = OPEN_END.search(prompt)
    if message.get("reasoning_content", "").strip() or (styles and is_foreign(message["content"], styles)):
        thoughts, said = split_thoughts(message)
        used = [style for style in STYLES if opened and opened[0].strip() == style[0].strip()]
        opens, closes = [*used, *styles, *STYLES][0]
        between = lead if lead.strip() and not EMPTY.match(lead) else ""
        body = opens + thoughts.strip()
        if said.strip() or not unfinished:  # else it was cut off while it thought
            body += closes + between + said.lstrip("\n")
    else:
        body = message["content"]
    return OPENS.sub("", body, count=1) if opened and OPENS.match(body) else body
