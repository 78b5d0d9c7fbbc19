"""Where the answers of a conversation stand in the text that the chat template writes.

What is learnt of an answer is what the model would write itself: all that the template writes behind the prompt for
that answer, up to the end of its turn. So each answer is looked at in the context in which it would be generated: the
template writes the turns before it as a prompt, and the same turns with the answer. Most templates go on writing a
turn as they did when it was the last, and the whole conversation is one row. Some do not: Qwen3 leaves thoughts out of
earlier answers, gpt-oss ends the last answer otherwise. Then the conversation becomes several rows, and each answer is
learnt in the one that is its own.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from conversations.ends import MARKS, find_context, marked
from conversations.template import ChatTemplate, Refusal
from conversations.thoughts import CLOSES, EMPTY, EMPTY_END, OPEN_END, TAG, split_thoughts, write_thoughts

NO_THOUGHTS = "answers without thoughts where the prompt asks for some"
UNWRITTEN = "answers whose thoughts the chat template does not write"


@dataclass(frozen=True)
class Answer:
    """One answer in its context."""

    text: str  # the prompt, the answer and its end
    start: int  # where in it begins what the model writes
    inner: str  # what of the text stands there too if more turns follow
    note: str = ""  # what a reader of the summary should know of it


@dataclass(frozen=True)
class Row:
    """A text, and the `[start, end)` characters in it that are labels. It stops with the last of them."""

    text: str
    spans: tuple[tuple[int, int], ...]


def find_answer(conversation: dict, number: int, chat: ChatTemplate) -> Answer:
    """The answer that is turn `number`. Raises Refusal, with the reason, if it cannot be told."""
    turns, tools = conversation["messages"], conversation.get("tools")
    message, note = turns[number], ""
    unfinished = number + 1 == len(turns) and bool(conversation.get("unfinished"))
    prompt, text = chat.context(turns[:number], tools), chat.render(turns[: number + 1], tools)
    body, end, inner = find_end(conversation, number, text, chat)
    kept = find_context(chat, turns[:number], tools, prompt, text)
    check_calls(turns[: number + 1], tools, text, chat)
    thoughts, said = split_thoughts(message)
    if thoughts.strip() and not (kept is not None and has_thoughts(body[len(kept) :], thoughts, said, prompt, kept)):
        # The template cuts thoughts from finished answers (DeepSeek-R1), or knows none (LLaMA 3).
        if message.get("tool_calls") or (message.get("reasoning_content") and not chat.styles):
            thoughts, note = "", UNWRITTEN
        else:
            prompt = EMPTY_END.sub("", prompt)
            written = write_thoughts(message, prompt, chat.styles, chat.lead, unfinished)
            return in_context(prompt, written, end, inner, unfinished)
    opened = OPEN_END.search(prompt)
    if not thoughts.strip() and opened:
        note = note or NO_THOUGHTS
    if kept is None:  # it writes the turns before the answer otherwise once that is there (Mistral with a system turn)
        whole = next((text for text in as_written(message["content"]) if body.endswith(text)), None)
        if whole is None or message.get("tool_calls"):
            raise Refusal("the chat template neither keeps the prompt in front of an answer nor the answer's text")
        prompt = prompt if thoughts.strip() else OPEN_END.sub("", prompt)
        return in_context(prompt, chat.lead + whole, end, inner, unfinished, note)
    start = len(kept)
    if unfinished:
        body = cut(body, start, thoughts, said)
    if not prompt.startswith(kept) or (not thoughts.strip() and EMPTY_END.search(prompt) and kept != prompt):
        # gpt-oss drops the thoughts of a call once it is answered; Gemma 4's prompt closes a thought that no finished
        # answer has.
        return in_context(prompt, body[start:], end, inner, unfinished, note)
    if text.startswith(chat.header, start):
        start += len(chat.header)
    if not thoughts.strip() and chat.styles:  # a block without thoughts is the template's, not the model's (Qwen3)
        begin = opened.start() if opened and kept == prompt else start
        if found := EMPTY.match(text, begin):
            is_lead = text.startswith(chat.lead, start) and EMPTY.fullmatch(text[begin:start] + chat.lead)
            start = start + len(chat.lead) if is_lead else found.end()
    return Answer(body, start, body, note) if unfinished else Answer(body + end, start, body + inner, note)


def check_calls(turns: list[dict], tools, text: str, chat: ChatTemplate):
    """Raises Refusal if the template leaves out a call of the last turn: if its text is the same without that call."""
    *before, message = turns
    calls = message.get("tool_calls", [])
    for i in range(len(calls)):
        left = calls[:i] + calls[i + 1 :]
        fewer = {key: value for key, value in message.items() if key != "tool_calls"}
        if left:
            fewer["tool_calls"] = left
        try:
            same = chat.render([*before, fewer], tools) == text
        except Refusal:  # it has nothing to write then
            same = False
        if same:
            raise Refusal("the chat template does not write the tool calls of an answer")


def find_end(conversation: dict, number: int, text: str, chat: ChatTemplate) -> tuple[str, str, str]:
    """-> (`text` up to the end of the answer's own words, its end, and its end if more turns follow)."""
    ends, turns, tools = chat.ends, conversation["messages"], conversation.get("tools")
    if not text.endswith(ends.after):  # the end of a tool call may differ from that of plain answers
        return text.removesuffix(ends.after[len(ends.last) :]).rstrip(), "", ""
    body, follows = text[: len(text) - len(ends.after)], turns[number + 1 : number + 2]
    if ends.borrowed and not follows and turns[number].get("tool_calls"):
        follows = [{"role": "tool", "content": "", "name": "", "tool_call_id": ""}]
    if ends.borrowed and follows:  # the marker of the role that does follow
        behind = chat.render([*turns[: number + 1], *follows], tools)[len(body) :]
        end = behind[: chat.first_stop(behind)] or ends.last
        return body, end, end
    return body, ends.last, ends.inner


def has_thoughts(written: str, thoughts: str, said: str, prompt: str, kept: str) -> bool:
    """Whether the template writes an answer with its thoughts, right behind a prompt that may have opened them but has
    not closed them."""
    before, found, behind = written.partition(thoughts.strip())
    as_is = not EMPTY_END.search(prompt) if kept == prompt else not OPEN_END.search(prompt)
    return bool(found) and as_is and not CLOSES.search(before) and said.strip() in behind


def in_context(prompt: str, written: str, end: str, inner: str, unfinished: bool, note: str = "") -> Answer:
    """An answer behind its prompt, where the template does not write the two together."""
    body = prompt + (written.rstrip() if unfinished else written)
    return Answer(body if unfinished else body + end, len(prompt), body + inner, note)


def as_written(content: str) -> tuple[str, ...]:
    """What templates make of a turn's text, as a rule."""
    return content, content.strip(), content.lstrip(), content.rstrip()


def cut(body: str, start: int, thoughts: str, said: str) -> str:
    """The text of an unfinished answer, so that the model learns no end where there was none. White space at its end
    goes too: it may be half a token. Raises Refusal if the template changes its text."""
    body = body.rstrip()
    if said.strip():
        found = len(body) if body.endswith(said.strip()) else -1
    else:
        at = body.rfind(thoughts.strip(), start) if thoughts.strip() else -1
        found = at + len(thoughts.strip()) if at >= 0 else -1
    if found < start:
        raise Refusal("the chat template rewrites an unfinished answer: where its text ends cannot be told")
    return body[:found]


def find_rows(conversation: dict, chat: ChatTemplate) -> tuple[list[Row], Counter[str]]:
    """-> (rows, notes). As few rows as possible: an answer joins the row of those before it if its context begins with
    what the model learnt there. Raises Refusal."""
    rows: list[Row] = []
    notes: Counter[str] = Counter()
    before = None
    for number, message in enumerate(conversation["messages"]):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        answer = find_answer(conversation, number, chat)
        spans: tuple[tuple[int, int], ...] = ((answer.start, len(answer.text)),)
        if before is not None and answer.text.startswith(before.inner):
            earlier = rows.pop().spans
            spans = (*earlier[:-1], (earlier[-1][0], len(before.inner)), *spans)
        rows.append(Row(answer.text, spans))
        notes.update([answer.note] if answer.note else [])
        before = answer
    return rows, notes


@dataclass(frozen=True)
class Plan:
    """How the template writes conversations of certain roles, if it writes all of one as a single row."""

    pieces: list[str]  # what stands before each turn's text, and behind the last
    spans: list[tuple[int, int, int]]  # a turn that is learnt; characters learnt before its text, and behind it
    prompt: list[str]  # the pieces of the prompt for the last answer
    notes: Counter[str]


@lru_cache(maxsize=4096)
def plan(chat: ChatTemplate, turns: tuple[tuple[str, bool], ...]) -> Plan | None:
    """`find_rows` of a conversation with a mark for each turn's text. turns: (role, whether it is learnt)."""
    conversation = marked(*(role for role, _ in turns))
    messages = [message | {"train": learnt} for message, (_, learnt) in zip(conversation, turns, strict=True)]
    try:
        (row, *more), notes = find_rows({"messages": messages}, chat)
        prompt = MARKS.split(chat.context(messages[:-1]))
    except Refusal:
        return None
    places = [(found.start(), found.end()) for found in MARKS.finditer(row.text)]
    pieces = MARKS.split(row.text)
    if more or len(places) != len(turns):
        return None
    starts = {start: i for i, (start, _) in enumerate(places)}
    spans = []
    for a, b in row.spans:
        turn = next((starts[start] for start in sorted(starts) if a <= start < b), -1)
        spans.append((turn, places[turn][0] - a, b - places[turn][1]))
    return Plan(pieces, spans, prompt, notes)


def interleave(pieces: list[str], words: list[str]) -> str | None:
    """What stands between marks, with words in their place."""
    if len(pieces) != len(words) + 1:
        return None
    return "".join(part for pair in zip(pieces, [*words, ""], strict=True) for part in pair)


def find_quickly(conversation: dict, chat: ChatTemplate) -> tuple[list[Row], Counter[str]] | None:
    """The same as `find_rows` from a single rendering, where a plan and plain texts allow it, else None. (And from one
    of the last prompt: some templates look for words such as /no_think there.)"""
    messages = conversation["messages"]
    while messages and (messages[-1]["role"] != "assistant" or messages[-1].get("train") is False):
        messages = messages[:-1]  # a row stops with the last answer that is learnt
    plain = not conversation.get("tools") and not conversation.get("unfinished") and bool(messages)
    if not plain or any(not m.keys() <= {"role", "content", "train"} or TAG.search(m["content"]) for m in messages):
        return None
    found = plan(chat, tuple((m["role"], m.get("train") is not False) for m in messages))
    if found is None:
        return None
    text, places = chat.render(messages), []
    at = len(found.pieces[0])
    if not text.startswith(found.pieces[0]):
        return None
    for message, behind in zip(messages, [*found.pieces[1:-1], chat.ends.after], strict=True):
        for written in as_written(message["content"]):
            if text.startswith(written + behind, at):
                break
        else:
            return None  # the template does something to the text
        places.append((at, at + len(written)))
        at += len(written + behind)
    if at != len(text):
        return None
    words = [text[start:end] for start, end in places[:-1]]
    if chat.context(messages[:-1]) != interleave(found.prompt, words):
        return None
    spans = [(places[turn][0] - before, places[turn][1] + behind) for turn, before, behind in found.spans]
    return [Row(text[: places[-1][1]] + found.pieces[-1], tuple(spans))], found.notes
