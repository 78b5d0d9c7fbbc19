"""A conversation -> rows of tokens, with labels on what the model would write itself (conversations/answers.py)."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.errors import BadInput
from conversations.answers import Row, find_quickly, find_rows
from conversations.targets import IGNORE
from conversations.template import ChatTemplate, Refusal
from conversations.tokenizer import to_words

logger = logging.getLogger(__name__)

GENERATION = re.compile(r"\{%-?\s*generation\b")
FOREIGN = "records whose tokens are another tokenizer's, or not of all answers: tokenised anew from their text"


def recorded(conversation: dict, tokenizer, max_length: int) -> dict | None:
    """The row of a record that holds the tokens which the model read and wrote (distill.py's), or None if they are not
    this tokenizer's, or if the record has other answers than that one."""
    answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
    if len(answers) > 1 or answers[0].get("train") is False:
        return None
    prompt, answer = list(conversation["prompt_ids"]), list(conversation["answer_ids"])
    if not answer or not 0 <= min(prompt + answer) <= max(prompt + answer) < len(tokenizer):
        return None
    # The last token may be the end, or half a character.
    content = conversation["messages"][-1]["content"].strip()
    texts = [to_words(ids, tokenizer) for ids in (answer, answer[:-1])]
    said = [text.strip() for whole in texts for text in (whole, whole.rstrip("\ufffd"))]
    if not any(text and content.endswith(text) for text in said):
        return None
    row = {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}
    return {key: tokens[:max_length] for key, tokens in row.items()} | {"cut": len(prompt + answer) > max_length}


def first_token(out, row: int, char: int, length: int) -> int:
    """The first token of a row that has this character of its text, or one behind it."""
    tokens = (out.char_to_token(row, at) for at in range(char, length))
    return next((token for token in tokens if token is not None), len(out["input_ids"][row]))


def tokenise(rows: list[Row], chat: ChatTemplate, max_length: int) -> Iterator[dict]:
    """-> input_ids `[T]`, T <= max_length, labels, and how many answers are cut, of each row. A token is a label if it
    has a character of a span. (Read from where the tokens lie in the text: a tokenizer that drops white space has no
    token there, and nothing else is drawn in.)"""
    if not rows:
        return
    texts = [row.text for row in rows]
    out = chat.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for i, row in enumerate(rows):
        ids, cut = out["input_ids"][i], 0
        labels = [IGNORE] * len(ids)
        for start, end in row.spans:
            first, behind = (first_token(out, i, char, len(row.text)) for char in (start, end))
            while start < end and behind < len(ids) and out.token_to_chars(i, behind).start < end:
                behind += 1
            labels[first:behind] = ids[first:behind]
            cut += behind > max_length
        yield {"input_ids": ids[:max_length], "labels": labels[:max_length], "cut": cut}


@dataclass
class Encoded:
    """What became of one conversation. A row has input_ids and labels `[T]`, T <= max_length; labels are IGNORE
    outside of what the model writes itself."""

    rows: list[dict]
    problem: str = ""  # why there are none
    notes: Counter[str] = field(default_factory=Counter)


def encode_all(conversations: list[dict], chat: ChatTemplate, max_length: int) -> list[Encoded]:
    """All rows of many conversations: the tokenizer is fast on many texts at once."""
    results, texts, counts = [Encoded([]) for _ in conversations], [], []
    for conversation, result in zip(conversations, results, strict=True):
        found: list[Row] = []
        if conversation.get("answer_ids"):
            row = recorded(conversation, chat.tokenizer, max_length)
            result.rows += [row] if row else []
            result.notes.update([] if row else [FOREIGN])
        if not result.rows:
            try:
                found, notes = find_quickly(conversation, chat) or find_rows(conversation, chat)
                result.notes.update(notes)
            except Refusal as refusal:
                result.problem = str(refusal)
        texts += found
        counts.append(len(found))
    tokens = tokenise(texts, chat, max_length)
    for result, count in zip(results, counts, strict=True):
        result.rows += itertools.islice(tokens, count)
        if cut := sum(row.pop("cut") for row in result.rows):
            result.notes[f"answers cut by --model_max_length {max_length}"] += cut
    return results


def encode(conversation: dict, chat: ChatTemplate, max_length: int) -> list[dict]:
    """The rows of one conversation. Raises Refusal."""
    (result,) = encode_all([conversation], chat, max_length)
    if result.problem:
        raise Refusal(result.problem)
    return result.rows


def check_template(chat: ChatTemplate):
    """Says once what is unusual about the template. Raises BadInput if it cannot write a plain conversation."""
    turns = [{"role": role, "content": text} for role, text in (("user", "why"), ("assistant", "because"))] * 2
    try:
        ends, rows = chat.ends, encode({"messages": turns}, chat, 10**6)
    except Refusal as refusal:
        raise BadInput(f"{refusal}: it has to write a question, an answer, a question and an answer") from refusal
    if not ends.last:
        logger.warning(
            "the chat template of %s writes no end of turn on which the model stops: behind an answer stands %r. So "
            "heads do not learn where answers end",
            *(chat.name, ends.follows),
        )
    if chat.asks_the_clock:
        logger.warning(
            "the chat template of %s prints the day in a format that it works out itself, so it cannot be kept: a run "
            "that is resumed on another day will have other data, and be refused",
            chat.name,
        )
    if GENERATION.search(chat.text):
        check_marks(chat, turns, rows)


def check_marks(chat: ChatTemplate, turns: list[dict], rows: list[dict]):
    """Says if the template's own marks are not the labels of these turns' rows."""
    if len(rows) > 1:  # as several rows they cannot be compared with one text
        turns = turns[:2]
        rows = encode({"messages": turns}, chat, 10**6)
    out = chat.apply(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, is_marked in zip(out["input_ids"], out["assistant_masks"], strict=True) if is_marked]
    labels = [label for label in rows[0]["labels"] if label != IGNORE]
    if marked != labels:
        marked, labels = (chat.tokenizer.decode(ids) for ids in (marked, labels))
        logger.warning(
            "the {%% generation %%} marks in the chat template of %s are not what the model writes, and are not "
            "followed: they mark %r in a conversation of which %r are labels",
            *(chat.name, marked, labels),
        )
