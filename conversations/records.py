"""Reads the records of a file of conversations, and the turns of each record.

There are two kinds of records: ShareGPT's (`conversations`: from / value) and chat (`messages`: role / content).
docs/data.md lists what is skipped and what is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import BadInput

CUT_OFF = object()  # what read_records yields last if the end of the array is missing
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}


def read_records(path: str) -> Iterator[object]:
    """The records of a JSON array (the file starts with "[") or of JSON lines.

    A cut-off array yields its complete records, then CUT_OFF. Raises BadInput on a syntax error.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
        text = data[: error.start].decode("utf-8-sig")  # cut in the middle of the last character
    if not text.strip():
        raise BadInput(f"{path} is empty: it should hold conversations, see docs/data.md")
    if text.lstrip()[0] != "[":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise BadInput(f"{path}, line {number}: not valid JSON ({error}): mend or delete it") from error
        return
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, end, number = text.index("[") + 1, len(text.rstrip()), 0
    while True:
        gap = between.match(text, at)
        assert gap  # the pattern matches any text
        at = gap.end()
        if at >= end:
            yield CUT_OFF
            return
        if text[at] == "]":
            if at + 1 < end:
                line_number = text.count("\n", 0, at) + 1
                raise BadInput(
                    f"{path}, line {line_number}: the array ends here, but the file goes on: keep one array a file"
                )
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # A cut can leave a string without end, an error at the very end, or half a word ("fal", "\\u00e").
            half_a_word = error.pos >= end - 6 and text[end - 1] not in "]}"
            if error.msg.startswith("Unterminated string") or error.pos >= end or half_a_word:
                yield CUT_OFF
                return
            where = f"{path}, line {error.lineno}: record {number + 1}"
            raise BadInput(f"{where} is not valid JSON ({error.msg}): mend or delete it") from error
        number += 1
        yield record


def to_messages(record: object) -> tuple[list[dict], str]:
    """One record -> (`[{"role", "content"}, ...]`, ""), or ([], why it cannot be used).

    Leaves out assistant turns before the first question (ShareGPT has them where a long conversation was split) and
    questions after the last answer.
    """
    if record is CUT_OFF:
        return [], "the file is cut off here"
    fields = record if isinstance(record, dict) else {}
    turns = fields.get("messages") or fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        return [], "no turns under 'messages' or 'conversations'"
    if not isinstance(fields.get("unfinished"), bool | None):  # None: a Hub dataset where only some records have it
        return [], "'unfinished' is not true or false"
    messages: list[dict] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            return [], f"turn {number} is not an object"
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            return [], f"unknown role {role!r}"
        if not isinstance(content, str) or not content.strip():
            return [], "a turn without text"
        if re.search("[\ud800-\udfff]", content):
            return [], "a turn with half a character (a lone surrogate)"
        role = ROLES[role]
        if role == "assistant" and not any(m["role"] == "user" for m in messages):
            continue
        if role == "system" and messages:
            return [], "a system turn that is not the first"
        if messages and messages[-1]["role"] == role:
            return [], f"two {role} turns in a row"
        messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages, "" if messages else "no answer by the assistant"
