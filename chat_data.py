"""Conversations -> input_ids and labels in which only the assistant's tokens count.

Records are ShareGPT's (`conversations`: from / value) or chat (`messages`: role / content), from a local .json or
.jsonl file or from a Hub dataset. docs/data.md says what is skipped, what is refused and how batches are made.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
from jinja2 import TemplateError
from transformers import AutoTokenizer

from batches import pack
from errors import ACCESS, BadInput, first_line
from json_records import CUT_OFF, read_json
from medusa_loss import IGNORE

logger = logging.getLogger(__name__)

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
FEATURES = datasets.Features(
    {
        "record": datasets.Value("int64"),  # 1-based, as a person counts
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "unfinished": datasets.Value("bool"),  # the last answer was cut off, so its end is none
        "problem": datasets.Value("string"),  # why the record is skipped; "" if it is not
    }
)


def to_messages(record: object) -> tuple[list[dict], str]:
    """One record -> (`[{"role", "content"}, ...]`, ""), or ([], why it cannot be used).

    Assistant turns before the first question (ShareGPT has them where a long conversation was split) and
    questions after the last answer are left out.
    """
    if record is CUT_OFF:
        return [], "the file is cut off here"
    turns = record.get("messages") or record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        return [], "no turns under 'messages' or 'conversations'"
    if not isinstance(record.get("unfinished"), bool | None):  # None: a Hub dataset where only some records say it
        return [], "'unfinished' is not true or false"
    messages = []
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


def _to_row(record: object, index: int) -> dict:
    messages, problem = to_messages(record)
    unfinished = not problem and bool(record.get("unfinished"))
    return {"record": index + 1, "messages": messages, "unfinished": unfinished, "problem": problem}


def _read_local(path: str, size: int, mtime: float) -> Iterator[dict]:
    # size and mtime are only there to make datasets' cache notice a changed file
    for index, record in enumerate(read_json(path)):
        yield _to_row(record, index)


def _read_hub(row, index: int) -> dict:
    return _to_row(dict(row), index)  # datasets.map hands over a mapping of its own


def load_tokenizer(name_or_path: str, chat_template: str | None = None, **kwargs):
    """A fast tokenizer with a chat template, which is read from the file `chat_template` if given."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load a tokenizer from {name_or_path}: {first_line(error)} {ACCESS}") from error
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text()
    if tokenizer.chat_template is None:
        raise BadInput(
            f"the tokenizer of {name_or_path} has no chat template, so nobody can tell the assistant's tokens: pass "
            "one to train.py with --chat_template FILE (templates/ holds some)"
        )
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer of {name_or_path} is not a fast one: it does not say where its tokens lie")
    return tokenizer


def load_conversations(data_path: str, cache_dir: str | None = None) -> datasets.Dataset:
    """All usable conversations of a local file or of the train split of a Hub dataset (column `messages`)."""
    if os.path.isfile(data_path):
        stat = os.stat(data_path)
        source = {"path": os.path.abspath(data_path), "size": stat.st_size, "mtime": stat.st_mtime}
        try:
            data = datasets.Dataset.from_generator(
                _read_local, features=FEATURES, gen_kwargs=source, cache_dir=cache_dir
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, BadInput) else error from None
    elif data_path.endswith((".json", ".jsonl")) or data_path.count("/") > 1 or data_path[:1] in ("", ".", "/", "~"):
        raise BadInput(f"there is no data file {data_path}")
    else:
        try:
            data = datasets.load_dataset(data_path, split="train", cache_dir=cache_dir)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise BadInput(
                f"{data_path} is no file here, and cannot be loaded from the Hub: {first_line(error)}"
            ) from error
        data = data.map(_read_hub, with_indices=True, features=FEATURES, remove_columns=data.column_names)
    return drop_problems(data, data_path)


def drop_problems(data: datasets.Dataset, name: str) -> datasets.Dataset:
    """Leaves out the records with a `problem`, and says how many there were of each kind. Raises if all have."""
    problems = data["problem"]
    kinds: dict[str, list[int]] = {}
    for record, problem in zip(data["record"], problems, strict=True):
        if problem:
            kinds.setdefault(problem, []).append(record)
    for problem, records in kinds.items():
        logger.warning("%s: skipped %d records: %s (first: record %d)", name, len(records), problem, records[0])
    if sum(map(len, kinds.values())) == len(data):
        reasons = "; ".join(f"{problem} (record {records[0]})" for problem, records in kinds.items())
        raise BadInput(f"{name} holds no usable conversation: {reasons or 'it has no records'}")
    return data.select([i for i, problem in enumerate(problems) if not problem]) if kinds else data


def split_conversations(
    data: datasets.Dataset, eval_data: datasets.Dataset | None, holdout: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """-> (train, eval). Without eval_data the last `holdout` conversations (a share if below 1, else a number)
    are held out. A conversation that is in both is taken out of train, so that eval is never trained on."""
    if eval_data is None:
        if not holdout >= 0:
            raise BadInput(f"--eval_holdout {holdout:g}: 0 or more")
        count = round(holdout * len(data)) if holdout < 1 else int(holdout)
        if holdout <= 0:
            return data, None
        if not 0 < count < len(data):
            raise BadInput(f"--eval_holdout {holdout:g} leaves nothing to train on or to evaluate of {len(data)}")
        data, eval_data = data.select(range(len(data) - count)), data.select(range(len(data) - count, len(data)))

    def digests(data: datasets.Dataset) -> list[bytes]:
        records = zip(data["messages"], data["unfinished"], strict=True)
        return [hashlib.sha1(json.dumps(record, sort_keys=True).encode()).digest() for record in records]

    held_out = set(digests(eval_data))
    keep = [i for i, digest in enumerate(digests(data)) if digest not in held_out]
    if len(keep) < len(data):
        logger.warning("left %d conversations out of training that are also held out", len(data) - len(keep))
        if not keep:
            raise BadInput("every training conversation is also held out: give more, or different files")
    return data.select(keep) if len(keep) < len(data) else data, eval_data


def assistant_spans(messages: list[dict], tokenizer) -> tuple[str, list[tuple[int, int]], int]:
    """The conversation as the chat template writes it, the `[start, end)` characters the assistant says, and where
    the last answer's text ends, without white space.

    Each answer is replaced by a mark and the conversation rendered once more: what stands between the marks is
    the template's own, so the answers' places follow exactly, whatever the template does around them (rendering
    turn by turn fails for templates that write a turn differently once another follows). A span takes in what
    the template puts behind every answer (the end-of-turn token), without the white space that follows it.
    Raises ValueError if the template does not keep the answers as they are.
    """
    mark = "\ue0f7{}\ue0f7"  # a private-use character: no template touches it
    marked, answers = [], []
    for message in messages:
        if message["role"] == "assistant":
            message, answer = message | {"content": mark.format(len(answers))}, message["content"]
            answers.append(answer)
        marked.append(message)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = re.split("\ue0f7\\d+\ue0f7", tokenizer.apply_chat_template(marked, tokenize=False))
    if len(pieces) != len(answers) + 1 or not text.startswith(pieces[0]):
        raise ValueError("the chat template does not write every turn")
    # What follows every answer, up to white space: "<|im_end|>" of "<|im_end|>\n", without an EOS that ends the text.
    end_of_turn = re.match(r"\s*\S*", os.path.commonprefix(pieces[1:]))[0]  # noqa: RUF071 (it is no path)
    spans, at = [], len(pieces[0])
    for answer, after in zip(answers, pieces[1:], strict=True):
        for written in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
            if text.startswith(written + after, at):
                break
        else:
            raise ValueError("the chat template rewrites an answer: where it ends cannot be told")
        end = at + len(written)
        spans.append((at, end + len(end_of_turn.rstrip())))
        at = end + len(after)
    return text, spans, len(text[:end].rstrip())


def encode(messages: list[dict], tokenizer, max_length: int, unfinished: bool = False) -> dict:
    """-> input_ids and labels `[T]`, T <= max_length; labels are IGNORE outside the assistant's turns.

    The template's text already holds the BOS token, so none is added. A template with `{% generation %}` says
    itself which tokens are the assistant's. unfinished: the tokens end with the last answer's text, so that nothing
    teaches an end where there was none; white space at its end goes too, it may be half a token.
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


def encode_record(row: dict, tokenizer, max_length: int, min_length: int) -> dict:
    """`encode` for datasets.map: a record that cannot be used gets a `problem` instead of an exception."""
    try:
        out, problem = encode(row["messages"], tokenizer, max_length, row["unfinished"]), ""
        if len(out["input_ids"]) < min_length:
            problem = f"fewer than {min_length} tokens: no row for the last head"
        elif all(label == IGNORE for label in out["labels"][1:]):
            problem = f"no assistant token within --model_max_length {max_length}"
    except (TemplateError, ValueError) as error:
        out, problem = {"input_ids": [], "labels": []}, f"{error}"
    return out | {"length": len(out["input_ids"]), "problem": problem}


def encode_lazily(rows: dict, tokenizer, max_length: int, min_length: int) -> dict:
    """`encode` for Dataset.with_transform (`--lazy_preprocess`), on a batch of rows. A record that cannot be used
    is logged when it is drawn, and becomes a row that counts nothing."""
    encoded = []
    for i, number in enumerate(rows["record"]):
        row = encode_record({key: column[i] for key, column in rows.items()}, tokenizer, max_length, min_length)
        if row["problem"]:
            logger.warning("record %d counts nothing: %s", number, row["problem"])
            row = {"input_ids": [0], "labels": [IGNORE]}
        encoded.append(row)
    return {key: [row[key] for row in encoded] for key in ("input_ids", "labels")}


def prepare(
    data: datasets.Dataset,
    name: str,
    tokenizer,
    max_length: int,
    min_length: int = 2,
    lazy: bool = False,
    packing: bool = False,
    by_length: bool = False,
) -> datasets.Dataset:
    """Conversations -> a dataset of input_ids, labels (and position_ids if packed), ready for `batches.Collator`.

    min_length: tokens a conversation needs so that each of K heads has a place to look at (K + 2).
    lazy: tokenise when a batch is drawn; nothing is known of the lengths then. packing: several conversations to
    a row of max_length tokens. by_length: shortest first, so that batches in this order need little padding.
    """
    limits = {"max_length": max_length, "min_length": min_length}
    if lazy:
        first = [encode_record(row, tokenizer, **limits)["problem"] for row in data.select(range(min(20, len(data))))]
        if all(first):
            raise BadInput(f"{name}: none of the first {len(first)} conversations can be used: {first[0]}")
        return data.with_transform(partial(encode_lazily, tokenizer=tokenizer, **limits))
    workers = min(os.cpu_count() or 1, len(data) // 500)  # starting a process costs more than 500 records
    common = {"num_proc": workers if workers > 1 else None}
    data = data.map(
        encode_record,
        fn_kwargs={"tokenizer": tokenizer, **limits},
        remove_columns=["messages", "unfinished"],
        desc="tokenising",
        **common,
    )
    data = drop_problems(data, name).remove_columns(["record", "problem"])
    if packing:
        data = data.map(
            pack,
            batched=True,
            batch_size=1000,
            fn_kwargs={"max_length": max_length},
            remove_columns=data.column_names,
            desc="packing",
            **common,
        )
    if by_length:
        lengths = list(data["length"])
        data = data.select(sorted(range(len(data)), key=lambda i: lengths[i]))
    return data.with_format("numpy")  # a row's tokens come as an array, not as a list of Python numbers
