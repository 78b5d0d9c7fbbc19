"""Where the answers of a chat template begin and end: found out from conversations in which each turn is a mark."""

import itertools
import os
import re
from dataclasses import dataclass

from common.errors import BadInput
from conversations.thoughts import EMPTY_END, OPEN_END

MARK = "\ue0f7{}\ue0f7"  # of a private-use character: nothing that a template would change
MARKS = re.compile(MARK.format(r"\d+"))


@dataclass(frozen=True)
class Ends:
    """What a template writes behind an answer's text."""

    after: str  # behind the last answer of a conversation: all of it
    last: str  # what of it the model writes itself, and so learns: up to its end-of-turn token
    inner: str  # the same, if another turn follows
    borrowed: bool  # there is no end of turn: the model stops on the marker of the next role
    follows: str  # all that stands between an answer and the next question


def marked(*roles: str) -> list[dict]:
    """A conversation of these roles; turn i has mark i as its text."""
    return [{"role": role, "content": MARK.format(i)} for i, role in enumerate(roles)]


QUESTION, ONE, TWO = (marked(*("user", "assistant", "user", "assistant")[:count]) for count in (1, 2, 4))


def shared(texts: list[str]) -> str:
    """What all of them begin with."""
    return os.path.commonprefix(texts)  # noqa: RUF071 (they are no paths)


def find_ends(chat) -> Ends | None:
    """Compares what the template writes behind an answer that ends the conversation and behind one that a question
    follows. What they share, up to its last whole token and no further than the model stops, is the end of turn. None
    if the template does not write every turn."""
    start, *alone = MARKS.split(chat.render(ONE))
    pieces = MARKS.split(chat.render(TWO))
    if len(pieces) != 5 or len(alone) != 2:
        return None
    after, follows = alone[1], pieces[2]
    header = header_of(chat, follows, start)
    own = chat.whole(shared([after, follows]))
    if stop := chat.first_stop(own):
        own = own[:stop]
    elif header:
        own = chat.whole(own[:header])
    else:  # the next turn begins as the conversation does
        bos = chat.tokenizer.bos_token
        opens = next((found[0] for found in chat.added.finditer(start) if found[0] != bos), "")
        own = chat.whole(own.partition(opens)[0]) or own if opens else own
    if own:
        # An EOS may close the conversation. The model writes it only if it has not stopped before.
        closes = 0 if chat.first_stop(own, chat.stops) else chat.first_stop(after, chat.stops)
        return Ends(after, after[:closes] or own, own, False, follows)
    last = after[: chat.first_stop(after)]
    if last:  # the last answer ends otherwise than the others
        return Ends(after, last, follows[: chat.first_stop(follows[:header])] or last, False, follows)
    if not follows[:header].strip():
        header = 0
    between = follows[: chat.first_stop(follows[:header] if header else follows)] or chat.whole(follows[:header])
    return Ends(after, between, between, bool(between) and not header, follows)


def header_of(chat, follows: str, start: str) -> int:
    """Where the header of a question begins in what stands between an answer and that question. start: what stands
    before the first question, so the header and whatever begins a conversation. 0: all of it is the header, or a
    system turn stands at the start, so that its end and the answer's cannot be told apart."""
    edges = {0, *(at for found in chat.added.finditer(start) for at in found.span())}
    cuts = {0, len(follows), *(at for found in chat.added.finditer(follows) for at in found.span())}
    at, left = len(follows), len(start)
    for end, begin in itertools.pairwise(sorted(cuts, reverse=True)):
        if not start[:left].endswith(follows[begin:end]) or left - (end - begin) not in edges:
            return at if at < len(follows) else 0
        at, left = begin, left - (end - begin)
    return 0


def closing(chat) -> str:
    """What the template writes behind the last turn of a finished conversation: an EOS or nothing."""
    try:
        ends = chat.ends
        rest = ends.after[len(ends.inner if ends.after.startswith(ends.inner) else ends.last) :]
    except BadInput:  # a template that does not write every turn can still write prompts
        return ""
    return rest if chat.first_stop(rest) == len(rest) else ""


def find_context(chat, before: list[dict], tools, prompt: str, text: str) -> str | None:
    """What the finished text keeps of the prompt. Or of the same turns without their thoughts: some templates drop
    those once the answer is there. None if it keeps neither."""
    if text.startswith(prompt):
        return prompt
    for shorter in (OPEN_END.sub("", prompt), EMPTY_END.sub("", prompt)):  # of a thought that it opens or closes
        if text.startswith(shorter):
            return shorter
    same = shared([prompt, text])
    if not prompt[len(same) :].strip():
        return same
    if any("reasoning_content" in message for message in before):
        bare = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in before]
        if text.startswith(context := chat.context(bare, tools)):
            return context
    return None


def find_lead(chat) -> str:
    """What the template writes between the prompt for an answer and the answer's text."""
    text = chat.render(ONE)
    kept = find_context(chat, QUESTION, None, chat.context(QUESTION), text)
    lead, found, _ = text[len(kept or "") :].partition(ONE[1]["content"])
    return lead if found and kept is not None else ""


def is_header(chat, lead: str) -> bool:
    """Whether that is the answer's header: in a template that heeds no wish for a prompt, unless it always closes with
    the header of the next answer, asked or not."""
    if chat.asks or not lead.strip():
        return False
    finished = (chat.render(turns, generate=True).removesuffix(chat.closing) for turns in (QUESTION, ONE))
    close = shared([text[::-1] for text in finished])[::-1].split(MARK[-1])[-1]
    return not close.strip() or chat.ends.follows.startswith(close)
