"""A conversation -> input_ids, and labels that are set on the assistant's tokens only."""

import os
import re

from conversations.targets import IGNORE


def assistant_spans(messages: list[dict], tokenizer) -> tuple[str, list[tuple[int, int]], int]:
    """The conversation as the chat template writes it, the `[start, end)` characters of each answer, and where the
    text of the last answer ends, without white space at its end.

    The conversation is rendered a second time with a mark in place of each answer. The text between the marks is the
    template's own, and gives the exact place of every answer. (Rendering turn by turn fails for templates that write
    a turn differently once another follows.) A span includes what the template writes after every answer (the
    end-of-turn token), but not the white space after that. Raises ValueError if the template changes an answer.
    """
    mark = "\ue0f7{}\ue0f7"  # a private-use character: no template touches it
    marked: list[dict] = []
    answers: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            message, answer = message | {"content": mark.format(len(answers))}, message["content"]
            answers.append(answer)
        marked.append(message)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = re.split("\ue0f7\\d+\ue0f7", tokenizer.apply_chat_template(marked, tokenize=False))
    if len(pieces) != len(answers) + 1 or not text.startswith(pieces[0]):
        raise ValueError("the chat template does not write every turn")
    # What follows every answer, up to white space: "<|im_end|>" of "<|im_end|>\n". An EOS that only ends the text is
    # not part of it.
    end_of_turn = re.match(r"\s*\S*", os.path.commonprefix(pieces[1:]))  # noqa: RUF071 (it is no path)
    assert end_of_turn  # the pattern matches any text
    spans, at = [], len(pieces[0])
    for answer, after in zip(answers, pieces[1:], strict=True):
        for written in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
            if text.startswith(written + after, at):
                break
        else:
            raise ValueError("the chat template rewrites an answer: where it ends cannot be told")
        end = at + len(written)
        spans.append((at, end + len(end_of_turn[0].rstrip())))
        at = end + len(after)
    return text, spans, len(text[:end].rstrip())


def encode(messages: list[dict], tokenizer, max_length: int, unfinished: bool = False) -> dict:
    """-> input_ids and labels `[T]`, T <= max_length. Labels are IGNORE outside the assistant's turns.

    The template's text already has the BOS token, so none is added. A template with `{% generation %}` itself says
    which tokens are the assistant's. unfinished: cut after the text of the last answer, so that the model does not
    learn an end where there was none. White space at that end is cut too: it may be half a token.
    """
    marks_answers = re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template())
    if unfinished or not marks_answers:
        text, spans, answers_end = assistant_spans(messages, tokenizer)
    if marks_answers:
        out = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, counts = out["input_ids"], out["assistant_masks"]
    else:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, counts, span = out["input_ids"], [], 0
        for start, end in out["offset_mapping"]:
            while span < len(spans) and spans[span][1] <= start:
                span += 1
            counts.append(span < len(spans) and max(end, start + 1) > spans[span][0])
    if unfinished:
        max_length = min(max_length, sum(end <= answers_end for _, end in out["offset_mapping"]))
    ids, counts = ids[:max_length], counts[:max_length]
    return {"input_ids": ids, "labels": [i if c else IGNORE for i, c in zip(ids, counts, strict=True)]}
