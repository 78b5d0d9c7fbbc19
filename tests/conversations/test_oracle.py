"""conversations/labels.py against a second, slower method that shares no code with it.

The method: each answer is replaced by others, and what changes in the template's text is where the answer stands. What
it begins with is told by the prompt that the template writes for it, and its end is the first end token behind it.
"""

import os
import re

import pytest

from conversations.labels import encode
from conversations.targets import IGNORE
from tests.conversations.chat_templates import suite

OTHERS = ("Xy", "7zQ")  # nothing in common at either end, neither with each other nor with what templates write
EMPTY = re.compile(r"\s*<think>\s*</think>\s*\Z")
THOUGHTS = ("reasoning", "reasoning_two")
# Where the method does not apply: GLM-4.5 writes no line end before an answer without text, Mistral drops the system
# turn from finished conversations, R1 and others the thoughts beside an answer. There only the labels written by hand
# are right. `open_last` has its end only between turns, and it is no token on which the model stops.
CANNOT = {("glm45", "empty")}
CANNOT |= {(name, case) for name in ("mistral_v3", "mistral_nemo") for case in ("system_one", "system_three")}
DROP_THOUGHTS = (
    "deepseek_r1",
    "deepseek_r1_first_release",
    "gemma4",
    "qwen3_no_thinking",
    "closes_empty_thought",
    "thought_tags",
)
CANNOT |= {(name, "reasoning") for name in DROP_THOUGHTS} | {("thought_tags", "reasoning_two")}


def common_start(a: str, b: str) -> str:
    return os.path.commonprefix([a, b])  # noqa: RUF071 (it is no path)


def common_end(a: str, b: str) -> str:
    return common_start(a[::-1], b[::-1])[::-1]


def end_of(after: str, tokenizer, stops, needs_stop: bool) -> str:
    """What of the text behind an answer is its end: up to the first token of those right behind it on which the model
    stops; the first of them all, if it stops on none and need not."""
    tokens = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found = re.match(rf"(\s*({'|'.join(map(re.escape, tokens))}))*", after)
    row = [(m.end(), m[1]) for m in re.finditer(rf"\s*({'|'.join(map(re.escape, tokens))})", found[0])]
    stop = [end for end, token in row if tokenizer.convert_tokens_to_ids(token) in stops]
    return after[: stop[0] if stop else row[0][0] if row and not needs_stop else 0]


def labels_by_trial(conversation, chat, tools=None) -> list[tuple[str, str]]:
    """(all that stands before it, the labelled text) of each answer. Raises LookupError where it cannot tell."""
    messages, tokenizer, kwargs, found = conversation["messages"], chat.tokenizer, chat.kwargs, []

    def render(turns, **more):
        named = [turn | {"thinking": turn.get("reasoning_content")} for turn in turns]
        return tokenizer.apply_chat_template(named, tools=tools, tokenize=False, **kwargs, **more)

    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:number]

        def say(content, *more, before=before, message=message):
            return render([*before, message | {"content": content}, *more])

        prompt, finished = render(before, add_generation_prompt=True), say(message["content"])
        head, tail = (common(*map(say, OTHERS)) for common in (common_start, common_end))
        if not (finished.startswith(head) and finished.endswith(tail) and len(head + tail) <= len(finished)):
            raise LookupError("the answer is not written like others")
        if message.get("reasoning_content", "") not in head[len(common_start(prompt, head)) :]:
            raise LookupError("the template drops thoughts")
        answer = finished[len(head) : len(finished) - len(tail)]
        end = end_of(tail, tokenizer, chat.stops, needs_stop=False)
        if not end:  # none at the end of a conversation: one may stand between turns
            question = {"role": "user", "content": OTHERS[0]}
            end = end_of(say(OTHERS[1], question).split(OTHERS[1])[-1], tokenizer, chat.stops, needs_stop=True)
        if conversation["unfinished"] and message is messages[-1]:
            answer, end = answer.rstrip(), ""
        if head.startswith(prompt):
            begins, block = head[len(prompt) :], EMPTY.search(head)
            no_prompt = render(before).startswith(prompt) and not common_end(prompt, finished).strip()
            is_header = no_prompt and begins.strip() and "reasoning_content" not in message
            context = head if is_header or (block and block.start() <= len(prompt)) else prompt
        elif re.fullmatch(r"<think>\s*|<thought>\s*", prompt[len(common_start(prompt, head)) :]):
            context = head  # asked to think, it did not
        elif prompt.startswith(head):
            context = head = prompt  # the prompt goes on where a finished answer does not
        else:
            raise LookupError("the prompt is not written like the start of a finished conversation")
        found.append((context, (head + answer + end)[len(context) :]))
    return [pair for pair in found if pair[1]]


def labels_of(rows, tokenizer) -> list[tuple[str, str]]:
    """What `encode` made, in the form of `labels_by_trial`."""
    found = []
    for row in rows:
        before = ""
        for is_label, text in suite.decoded(row, tokenizer):
            found += [(before, text)] if is_label else []
            before += text
    return found


def both(name, case):
    chat, conversation = suite.chat_template(name), suite.conversation(name, case)
    rows = encode(conversation, chat, 10**6)
    tools = [] if name == "tools_needed" else None
    return labels_by_trial(conversation, chat, tools), rows, chat.tokenizer


PAIRS = [
    (name, case)
    for name, case in suite.cases()
    if (case in suite.PLAIN or case in THOUGHTS) and (name, case) not in CANNOT and suite.compose(name, case)
    if name != "open_last"
]


@pytest.mark.parametrize("name", sorted({name for name, _ in PAIRS}))
def test_both_methods_find_the_same_labels(name):
    for case in (case for template, case in PAIRS if template == name):
        trial, rows, tokenizer = both(name, case)
        assert (case, labels_of(rows, tokenizer)) == (case, trial)


@pytest.mark.parametrize(("name", "case"), [pytest.param(*pair, id="-".join(pair)) for pair in sorted(CANNOT)])
def test_where_the_method_does_not_apply_it_says_so(name, case):
    with pytest.raises(LookupError):
        labels_by_trial(suite.conversation(name, case), suite.chat_template(name))


def test_the_method_applies_nearly_everywhere():
    assert len(PAIRS) > 650 and {name for name, _ in PAIRS} == suite.SPECS.keys() - {
        "deepseek_v31_thinking",
        "open_last",
    }


def wrong(row: dict, how: str) -> dict:
    """The row with one label too many or too few."""
    labels = list(row["labels"])
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    behind = next((i for i in range(first, len(labels)) if labels[i] == IGNORE), len(labels))
    at = {"header": first - 1, "start": first, "end": behind - 1, "next": behind}[how]
    labels[at] = row["input_ids"][at] if labels[at] == IGNORE else IGNORE
    return row | {"labels": labels}


@pytest.mark.parametrize("how", ["header", "start", "end", "next"])
@pytest.mark.parametrize("name", ["llama3_first_release", "chatml", "vicuna", "glm4", "mistral_nemo", "zephyr"])
def test_a_wrong_label_is_seen(name, how):
    trial, (row, *more), tokenizer = both(name, "three")
    assert labels_of([row, *more], tokenizer) == trial
    assert labels_of([wrong(row, how), *more], tokenizer) != trial


def test_a_wrong_context_is_seen():
    """Each answer of Qwen3's is right alone, but not in the text of the finished conversation."""
    trial, rows, tokenizer = both("qwen3", "three")
    right = labels_of(rows, tokenizer)
    assert right == trial
    joined = [(right[-1][0], label) for _, label in right]
    assert joined != trial
