"""One record, in any of the shapes that people publish -> the normal form of a conversation.

    {"messages": [message, ...], "tools": list | None, "unfinished": bool, "prompt_ids": list | None,
     "answer_ids": list | None, "group": str | None}
    message = {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str} and, only where given,
    reasoning_content, tool_calls, name, tool_call_id, and "train": False for an answer that is not to be learnt

`conversations/turns.py` reads single turns. docs/data.md lists the shapes, and what is skipped.
"""

from collections.abc import Iterable

from conversations.turns import Problem, check_characters, from_json, shown, to_message

CUT_OFF = object()  # what a reader yields last if the end of the file is missing
TURNS = ("messages", "conversations", "conversation")
QUESTION = ("instruction", "prompt", "question", "query", "input")
BELOW = ("input", "context")  # what may stand below a question
ANSWER = ("response", "output", "completion", "answer")
SYSTEM = ("system", "system_prompt")
IDS = ("prompt_ids", "answer_ids")
OTHERS = ("history", "tools", "unfinished")
FIELDS = {*TURNS, *QUESTION, *BELOW, *ANSWER, *SYSTEM, *IDS, *OTHERS}  # what a conversation is made of
READ = {*FIELDS, "group"}  # all that are read


def to_conversation(record: object, ask: bool = False) -> tuple[dict | None, str, list[str]]:
    """-> (the conversation, "", a reason for each turn that is left out), or (None, why it cannot be used, []).

    ask: the record is a prompt. It needs no answer, and the question behind its last answer stays.
    """
    if record is CUT_OFF:
        return None, "the file is cut off here", []
    if not isinstance(record, dict):
        return None, "a record that is no object", []
    try:
        turns = [to_message(turn, number) for number, turn in enumerate(find_turns(record, ask), 1)]
        messages, dropped = in_order(_with_system(turns, record), ask)
        if not isinstance(record.get("unfinished"), bool | None):  # None: where only some records of a table have it
            raise Problem("'unfinished' is not true or false")
        conversation = {
            "messages": messages,
            "tools": _tools(record),
            "unfinished": not ask and bool(record.get("unfinished")),
            **(dict.fromkeys(IDS) if ask else _token_ids(record)),
            "group": str(record["group"]) if ask and record.get("group") is not None else None,
        }
    except Problem as problem:
        return None, str(problem), []
    return conversation, "", dropped


def find_turns(record: dict, ask: bool) -> list:
    """The turns as the record has them, or made from its question and answer."""
    for field in TURNS:
        turns = from_json(record.get(field))
        if isinstance(turns, dict):
            turns = _rows(turns)
        if turns and not isinstance(turns, list):
            raise Problem(f"'{field}' is not a list of turns")
        if turns:
            return turns
    question, answer = _first(record, QUESTION), _first(record, ANSWER)
    if question is None or (answer is None and not ask):
        if empty := [field for field in TURNS if record.get(field) is not None]:
            raise Problem(f"no turns: '{empty[0]}' is empty")
        names = [shown(name) for name in sorted(map(str, record))]
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise Problem(f"no turns: its fields are {listed}" if names else "no turns: it has no fields")
    asked, said = _turns(record[question]), _turns(record[answer]) if answer else []
    if not asked:  # a text: what stands below it belongs to it
        below = [record.get(field) for field in BELOW if field != question]
        texts = [text for text in (record[question], *below) if isinstance(text, str) and text.strip()]
        asked = [{"role": "user", "content": "\n\n".join(texts)}]
    if answer and not said:
        said = [{"role": "assistant", "content": record[answer]}]
    return [*_history(record), *asked, *said]


def _rows(columns: dict) -> list | None:
    """`{"role": [...], "content": [...]}` -> one turn after another; None if it is no such thing."""
    columns = {name: column for name, column in columns.items() if column is not None}
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) > 1:
        raise Problem("the turns are an object, but not of lists of one length")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _first(record: dict, fields: Iterable[str]) -> str | None:
    """The first of these fields that has a text or turns."""
    return next((f for f in fields if isinstance(record.get(f), str | list) and record[f] != []), None)


def _turns(value: object) -> list:
    """A prompt or completion that is a list of turns; [] if it is a text. (Many an answer is a JSON list.)"""
    value = value if isinstance(value, list) else from_json(value)
    turns = value if isinstance(value, list) else []
    return turns if all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns) else []


def _history(record: dict) -> list[dict]:
    """Earlier rounds beside a question, as Alpaca has them: `[[question, answer], ...]`."""
    rounds = from_json(record.get("history")) or []
    if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise Problem("'history' is not a list of pairs of question and answer")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in rounds for role, text in zip(roles, pair, strict=True)]


def _with_system(messages: list[dict], record: dict) -> list[dict]:
    """The system prompt may stand beside the turns."""
    for field in SYSTEM:
        text = record.get(field)
        if text is None or (isinstance(text, str) and not text.strip()):
            continue
        if not isinstance(text, str):
            raise Problem(f"'{field}' is no text")
        check_characters(text)
        if not messages or messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": text}, *messages]
        elif messages[0]["content"] != text:
            raise Problem(f"'{field}' is not what the system turn says")
    return messages


def in_order(messages: list[dict], ask: bool) -> tuple[list[dict], list[str]]:
    """Leaves out what nobody asked for and what nobody answers. -> (messages, a reason for each that is left out)"""
    kept: list[dict] = []
    dropped: list[str] = []
    asked = False
    for message in messages:
        role = message["role"]
        before = kept[-1]["role"] if kept else ""
        if role in ("system", "developer"):
            if not message["content"] or not message["content"].strip():
                dropped.append(f"an empty {role} turn")
                continue
            if kept:
                raise Problem(f"a {role} turn that is not the first")
        elif role != "user" and not asked:  # ShareGPT has them where a long conversation was split
            who = "an answer" if role == "assistant" else "a tool's result"
            dropped.append(f"{who} before the first question")
            continue
        elif role == before and role != "tool":
            raise Problem(f"two {role} turns in a row")
        elif role == "tool" and before == "user":
            raise Problem("a tool turn right behind a user turn")
        asked = asked or role == "user"
        kept.append(message)
    if ask:
        if not asked:
            raise Problem("no question by the user")
        return kept, dropped
    answers = [number for number, message in enumerate(kept, 1) if message["role"] == "assistant"]
    if not answers:
        raise Problem("no answer by the assistant")
    for message in kept[answers[-1] :]:
        who = "a question" if message["role"] == "user" else "a tool's result"
        dropped.append(f"{who} after the last answer")
    kept = kept[: answers[-1]]
    learnt = [kept[number - 1] for number in answers if kept[number - 1].get("train", True)]
    if not learnt:
        raise Problem("no answer to learn: each has weight 0 or train false")
    if not any(m["content"].strip() or m.get("tool_calls") or m.get("reasoning_content") for m in learnt):
        raise Problem("no answer that says anything")
    return kept, dropped


def _tools(record: dict) -> list | None:
    tools = from_json(record.get("tools")) or None
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(from_json(tool), dict) for tool in tools):
        raise Problem("'tools' is not a list of objects")
    check_characters(tools)
    return [from_json(tool) for tool in tools]


def _token_ids(record: dict) -> dict[str, list[int] | None]:
    """The tokens of prompt and answer where the model itself wrote the record (`distill.py`)."""
    ids = {field: from_json(record.get(field)) for field in IDS}
    if ids == dict.fromkeys(IDS):
        return ids
    for tokens in ids.values():
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
            raise Problem("'prompt_ids' and 'answer_ids' are not two lists of token ids")
    return ids
