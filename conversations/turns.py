"""One turn of a record, as people write it -> a message in the normal form of `conversations/records.py`."""

import json
from typing import Any

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "function_response", "tool_response", "tool_result"), "tool"
    ),
    "system": "system",
    "developer": "developer",
}
CALLS = ("function_call", "tool_call")  # roles whose text is the JSON of calls
TEXT_PARTS = (None, "text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")


class Problem(ValueError):
    """Why a record cannot be used: few words, the same for all records of a kind."""


def to_message(turn: object, number: int) -> dict:
    """Raises Problem. number: the turn's place, from 1."""
    turn = from_json(turn)
    if not isinstance(turn, dict):
        raise Problem(f"turn {number} is not an object")
    said_role = _first(turn, "role", "from")
    role = said_role.strip().lower() if isinstance(said_role, str) else None
    text = _first(turn, "content", "value")
    if role in CALLS:
        message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": as_calls(text)}
    elif role in ROLES:
        message = {"role": ROLES[role]} | as_text(text)
    else:
        raise Problem(f"unknown role {shown(said_role)}")
    if message["role"] == "assistant":
        message |= _said_by_assistant(turn)
    for field in ("name", "tool_call_id"):
        if isinstance(turn.get(field), str):
            message[field] = turn[field]
    if message["content"] is None:  # right for calls, and for thoughts alone
        if not message.get("tool_calls") and not message.get("reasoning_content"):
            raise Problem("a turn without text")
        message["content"] = ""
    if message["role"] == "user" and not message["content"].strip():
        raise Problem("a turn without text")
    check_characters(message["content"])
    if len(message) > 2:
        check_characters(message)
    return message


def _first(turn: dict, *names: str):
    """The first of these fields that is there; a table has the others as null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _said_by_assistant(turn: dict) -> dict:
    """What only an assistant's turn has: thoughts, calls, and whether they are to be learnt."""
    said: dict[str, Any] = {}
    for field in REASONING:
        if turn.get(field) and "reasoning_content" not in said:
            if not isinstance(turn[field], str):
                raise Problem(f"'{field}' is no text")
            said["reasoning_content"] = turn[field]
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls:
        said["tool_calls"] = as_calls(calls)
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise Problem(f"a turn of weight {shown(weight)}: only 0 and 1 are known")
    for field in ("train", "training"):
        if not isinstance(turn.get(field), bool | None):
            raise Problem(f"'{field}' of a turn is {shown(turn[field])}, not true or false")
    if weight == 0 or turn.get("train") is False or turn.get("training") is False:
        said["train"] = False
    return said


def as_text(content: object) -> dict:
    """-> content (None if there is none), and reasoning_content if there are parts with thoughts."""
    if content is None or isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise Problem("a turn whose text is no string")
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in TEXT_PARTS and isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning"):
            thought = part.get("thinking", part.get("text"))
            if not isinstance(thought, str):
                raise Problem(f"a part of type {kind!r} without text")
            thoughts.append(thought)
        else:
            raise Problem(f"a turn with a part of type {shown(kind)}, which is no text")
    thought = {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return {"content": "".join(texts) if texts else None} | thought


def as_calls(calls: object) -> list[dict]:
    """Calls of tools, as OpenAI writes them; also one call alone, without its wrapper, or as JSON text."""
    calls = from_json(calls)
    found = []
    for call in [calls] if isinstance(calls, dict) else calls if isinstance(calls, list) else [None]:
        call = from_json(call)
        function = from_json(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Problem("a call of a tool that has no name, or is no JSON")
        arguments = function.get("arguments", function.get("parameters"))
        parsed = from_json(arguments)
        if arguments is None:
            arguments = {}
        elif isinstance(parsed, dict):
            arguments = parsed
        elif not isinstance(arguments, str):
            raise Problem("a call of a tool whose arguments are no object")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(
            {"type": "function"} | identity | {"function": {"name": function["name"], "arguments": arguments}}
        )
    return found


def from_json(value: Any) -> Any:
    """What a JSON text of a list or an object holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_characters(value: object):
    """Half a character (a lone surrogate, as a cut leaves it) cannot be written as UTF-8."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise Problem("a turn with half a character (a lone surrogate)") from error


def shown(value: object) -> str:
    """A value in a sentence: whole if it is short."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
