"""How conversations are stored: the columns of a dataset, and a short way from plain records to them."""

import json
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from datasets.features.features import register_feature

from conversations.records import FIELDS, TURNS
from conversations.turns import ROLES


@dataclass
class Messages:
    """A column of lists of messages. Role and content have places of their own, the rest of a message is JSON text."""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "more": pa.string()}))
    _type: str = field(default="Messages", init=False, repr=False)

    def __call__(self):
        return self.pa_type

    def encode_example(self, messages: list[dict]) -> list[dict]:
        stored = []
        for message in messages:
            more = {key: value for key, value in message.items() if key not in ("role", "content")}
            text = json.dumps(more, ensure_ascii=False) if more else None
            stored.append({"role": message["role"], "content": message["content"], "more": text})
        return stored

    def decode_example(self, stored: list[dict], token_per_repo_id=None) -> list[dict]:
        return [
            {"role": m["role"], "content": m["content"]} | (json.loads(m["more"]) if m["more"] else {}) for m in stored
        ]


@dataclass
class JsonText:
    """A column of JSON. (datasets.Json changes most numbers of 16 digits, and refuses those of more than 64 bits.)"""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="JsonText", init=False, repr=False)

    def __call__(self):
        return self.pa_type

    def encode_example(self, value) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def decode_example(self, text: str, token_per_repo_id=None):
        return json.loads(text)


with warnings.catch_warnings(action="ignore"):  # that it is experimental: datasets is pinned
    register_feature(Messages, "Messages")
    register_feature(JsonText, "JsonText")
FEATURES = datasets.Features(
    {
        "record": datasets.Value("int64"),  # 1-based, as a person counts, over all files of a source
        "messages": Messages(),
        "tools": JsonText(),
        "unfinished": datasets.Value("bool"),  # the last answer was cut off: its end is no end of turn
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "answer_ids": datasets.List(datasets.Value("int32")),
        "group": datasets.Value("string"),  # of a prompt: the kind of task, as benchmarks have it
    }
)
WRITTEN = ("user", "assistant", "system")  # roles of plain conversations; the last is allowed in front
NAMES = [name for name, role in ROLES.items() if role in WRITTEN]
CODES = np.array([*(WRITTEN.index(ROLES[name]) for name in NAMES), -1])  # of NAMES, and of all others


def to_table(numbers: list[int], conversations: list[dict]) -> pa.Table:
    rows = [
        conversation
        | {
            "record": number,
            "messages": FEATURES["messages"].encode_example(conversation["messages"]),
            "tools": FEATURES["tools"].encode_example(conversation["tools"]),
        }
        for number, conversation in zip(numbers, conversations, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)


def plain_table(numbers: np.ndarray, messages: pa.Array) -> pa.Table:
    columns = {"record": pa.array(numbers), "messages": messages, "unfinished": pa.repeat(False, len(numbers))}
    schema = FEATURES.arrow_schema
    nulls = {name: pa.nulls(len(numbers), schema.field(name).type) for name in schema.names if name not in columns}
    return pa.table(columns | nulls, schema=schema)


NULL_RECORD = re.compile(rb"^[ \t\r]*null", re.MULTILINE)


def read_plain(lines: bytes) -> tuple[np.ndarray, pa.Array] | None:
    """-> which records of these lines of JSON are plain, and the messages of those; None if that cannot be told.

    A plain record has questions and answers by turns, perhaps a system prompt in front, and no other field that
    `to_conversation` reads, which would keep them as they are. Most records of most files are plain. They never
    become objects of Python, which would take four times as long.
    """
    if any(nested * 50 in lines for nested in (b"]]", b"}}", b"]}", b"}]")):  # Arrow's parser would overflow its stack
        return None
    if NULL_RECORD.search(lines):  # at the start of one of its blocks, Arrow 26.0.1 dies of it
        return None
    try:
        table = pyarrow.json.read_json(pa.BufferReader(lines), pyarrow.json.ReadOptions(block_size=1 << 20))
        found = [_plain(batch) for batch in table.to_batches()]
    except pa.ArrowException:  # not JSON for Arrow, or records of several types: Python's own reader will say
        return None
    masks, messages = [pair[0] for pair in found if pair], [pair[1] for pair in found if pair]
    if len(masks) < len(found) or not found:
        return None
    return np.concatenate(masks), pa.concat_arrays(messages)


def _plain(batch: pa.RecordBatch) -> tuple[np.ndarray, pa.Array] | None:
    names = [name for name in batch.schema.names if name in TURNS]
    if len(names) != 1:
        return None
    turns = batch.column(names[0])
    if not pa.types.is_list(turns.type) or not pa.types.is_struct(turns.type.value_type):
        return None
    fields = {field.name for field in turns.type.value_type}
    role, content = ("role", "content") if {"role", "content"} <= fields else ("from", "value")
    offsets = turns.offsets.to_numpy()
    values = turns.values.slice(offsets[0], offsets[-1] - offsets[0])
    offsets = offsets - offsets[0]
    if not {role, content} <= fields or values.null_count or not len(values):
        return None
    parts = dict(zip((field.name for field in values.type), values.flatten(), strict=True))
    roles, texts = parts.pop(role), parts.pop(content)
    if roles.type != pa.string() or texts.type != pa.string():
        return None
    texts.validate(full=True)  # Arrow reads bytes that are no UTF-8

    def as_numpy(array: pa.Array) -> np.ndarray:
        return array.to_numpy(zero_copy_only=False)

    codes = CODES[as_numpy(pc.fill_null(pc.index_in(roles, pa.array(NAMES)), -1))]
    has_text = as_numpy(pc.fill_null(pc.and_(pc.not_equal(texts, ""), pc.invert(pc.utf8_is_space(texts))), False))
    lengths = np.diff(offsets)
    system = np.zeros(len(lengths), bool)
    system[lengths > 0] = codes[offsets[:-1][lengths > 0]] == 2
    place = np.arange(len(codes)) - np.repeat(offsets[:-1] + system, lengths)  # -1: a system prompt in front
    fine = has_text & (codes == np.where(place < 0, 2, place % 2))
    for other in parts.values():
        fine &= as_numpy(other.is_null())
    wrong = np.concatenate([[0], np.cumsum(~fine)])
    rounds = lengths - system
    plain = (wrong[offsets[1:]] == wrong[offsets[:-1]]) & (rounds > 0) & (rounds % 2 == 0)
    for name in FIELDS & set(batch.schema.names) - {names[0]}:
        plain &= as_numpy(batch.column(name).is_null())
    more = pa.nulls(len(codes), pa.string())
    written = pa.StructArray.from_arrays(
        [pa.array(WRITTEN).take(pa.array(codes.clip(0))), texts, more], ["role", "content", "more"]
    )
    messages = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), written)
    return plain, messages if plain.all() else messages.filter(pa.array(plain))
