"""The templates of this folder, what is right for each (expected.toml), and conversations and tokenizers to try."""

import itertools
import json
import re
from functools import cache
from pathlib import Path

import tomllib
from chats import chat, turn
from conftest import WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conversations.targets import IGNORE
from conversations.template import ChatTemplate

FOLDER = Path(__file__).parent
SPECS = tomllib.loads((FOLDER / "expected.toml").read_text(encoding="utf-8"))
TOOL = {"type": "function", "function": {"name": "w", "parameters": {}}}
PLAIN = {
    "one": chat("why", "cold moon"),
    "three": chat("why", "cold moon", "how", "warm", "salt", "old stone"),
    "system_one": [turn("system", "be old"), *chat("why", "cold moon")],
    "system_three": [turn("system", "be old"), *chat("why", "cold moon", "how", "warm", "salt", "old stone")],
    "empty": chat("why", "cold", "how", "", "salt", "old"),
    "white_space": chat("why", " cold\n", "how", "\n\nwarm  ", "salt", "old"),
    "emoji": chat("why 🌕", "🌙 é 👩‍🚀", "how", "ok 🌕"),
    "in_question": chat("is it cold or warm, cold", "cold", "cold", "cold"),
    "end_text": chat("why", "say {end} twice", "how", "warm"),
    "marks": chat("what is \ue0f70\ue0f7?", "\ue0f71\ue0f7 is \ue0f7", "how", "warm"),  # private-use characters
    "cut_off": chat("why", "cold", "how", "warm moon \n"),  # before its end: unfinished
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "w", "arguments": {"city": "x"}}}
TOOL_TURNS = [
    turn("user", "weather?"),
    turn("assistant", "") | {"tool_calls": [CALL]},
    turn("tool", "rain") | {"name": "w", "tool_call_id": CALL["id"]},
    turn("assistant", "It rains."),
]
SHAPED = {  # only for templates with rows for them: what is right depends on the template
    "think": chat("cat", "<think>\nsees\n</think>\n\ncold"),
    "think_two": chat("cat", "<think>\nsees\n</think>\n\ncold", "more", "<think>\nhm\n</think>\n\nwarm"),
    "reasoning": [turn("user", "cat"), turn("assistant", "cold") | {"reasoning_content": "sees"}],
    "reasoning_two": [
        *(turn("user", "cat"), turn("assistant", "cold") | {"reasoning_content": "sees"}),
        *(turn("user", "more"), turn("assistant", "warm") | {"reasoning_content": "hm"}),
    ],
    "think_empty": chat("cat", "<think>\n\n</think>\n\ncold"),
    "think_same": chat("cat", "<think>\ncold\n</think>\n\nIt is cold."),  # the thought's words in the answer too
    "unfinished": chat("cat", "<think>\nsees"),
    "tools": TOOL_TURNS,
    "tools_call_last": TOOL_TURNS[:2],
    "tools_think": [
        *(TOOL_TURNS[0], TOOL_TURNS[1] | {"reasoning_content": "sees"}),
        *(TOOL_TURNS[2], TOOL_TURNS[3] | {"reasoning_content": "hm"}),
    ],
}
STRIP = {"both": str.strip, "line ends in front": lambda text: text.lstrip("\n"), "": str}


def conversation(name: str, case: str) -> dict:
    """One of the conversations, as records.py makes them."""
    end = SPECS[name].get("end", SPECS[name]["eos"])
    messages = [m | {"content": m["content"].replace("{end}", end)} for m in (PLAIN | SHAPED)[case]]
    tools, unfinished = [TOOL] if case.startswith("tools") else None, case in ("cut_off", "unfinished")
    return {"messages": messages, "tools": tools, "unfinished": unfinished}


def cases() -> list[tuple[str, str]]:
    """All pairs of a template and a conversation that are tried."""
    return [
        (name, case)
        for name, spec in SPECS.items()
        for case in spec.get("only", [*PLAIN, *(c for c in SHAPED if c in spec.get("rows", {}))])
    ]


def compose(name: str, case: str) -> list[str] | None:
    """The rows that are right, with ⟦labels⟧; None if the template has no place for a system turn."""
    spec, messages = SPECS[name], conversation(name, case)["messages"]
    if case in spec.get("rows", {}):
        return [row.replace("{tool}", json.dumps(TOOL)) for row in spec["rows"][case]]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    if system is not None and "start_system" not in spec:
        return None
    start = spec["start"] if system is None else spec["start_system"]
    first = spec.get("user_first", spec["user"])
    first = first if system is None else spec.get("user_system", first)
    asked = [first, *itertools.repeat(spec["user"], len(messages) // 2 - 1)]
    rows, before = [], start
    for piece, question, answer in zip(asked, messages[::2], messages[1::2], strict=True):
        before += piece.replace("{}", question["content"])
        said = STRIP[spec.get("trim", "")](answer["content"])
        row = before + spec["answer"].replace("{}", said)
        if case == "cut_off" and answer is messages[-1]:
            row = before + spec["answer"].partition("{}")[0] + said.rstrip() + "⟧"
        before += spec.get("history", spec["answer"]).replace("{}", said)
        rows = [*rows, row] if "history" in spec else [row]
    return [row.replace("{system}", system or "") for row in rows]


def pieces(row: str) -> list[tuple[bool, str]]:
    """A row with ⟦labels⟧ -> (is it a label, text) in turns, up to the last label."""
    parts = [(bool(i % 2), text) for i, text in enumerate(re.split("[⟦⟧]", row)) if text]
    groups = itertools.groupby(parts, key=lambda part: part[0])  # a label may be empty
    found = [(is_label, "".join(text for _, text in group)) for is_label, group in groups]
    return found[: 1 + max((i for i, (is_label, _) in enumerate(found) if is_label), default=-1)]


def decoded(row: dict, tokenizer) -> list[tuple[bool, str]]:
    """The tokens of a row in the form of `pieces`."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (IGNORE, token) for token, label in pairs)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    return [(is_label, tokenizer.decode([token for token, _ in group])) for is_label, group in groups]


def tokenised(row: str, tokenizer) -> dict:
    """What the labels of a row with ⟦labels⟧ are for any tokenizer: the tokens that have a labelled character."""
    text, labelled = "", set()
    for is_label, piece in pieces(row):
        labelled |= set(range(len(text), len(text) + len(piece))) if is_label else set()
        text += piece
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = [not labelled.isdisjoint(range(a, b)) for a, b in out["offset_mapping"]]
    return {
        "input_ids": out["input_ids"],
        "labels": [i if c else IGNORE for i, c in zip(out["input_ids"], counts, strict=True)],
    }


def _bytes(split: str | None = None) -> Tokenizer:
    """Byte-level BPE. split: a pattern whose matches are cut off first."""
    tokenizer = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return tokenizer


def _words() -> Tokenizer:
    """Whole words and signs; white space has no token."""
    text = " ".join(path.read_text(encoding="utf-8") for path in (*FOLDER.glob("*.jinja"), FOLDER / "expected.toml"))
    words = sorted({*re.findall(r"\w+|[^\w\s]+", text), *WORDS})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _metaspace() -> Tokenizer:
    """Like LLaMA 2's: spaces become ▁ before anything else, a text begins with one, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces_of = [*model["vocab"], *(f"<0x{i:02X}>" for i in range(256))]
    vocab, merges = {piece: i for i, piece in enumerate(pieces_of)}, [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram() -> Tokenizer:
    """The same, but unknown characters in a row are one unit: several tokens that lie in the same place."""
    words = ["▁", *(chr(i) for i in range(33, 127)), *(f"▁{word}" for word in WORDS)]
    pieces_of = [("<unk>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256)), *((word, -5.0) for word in words)]
    tokenizer = _metaspace()
    tokenizer.model = models.Unigram(pieces_of, unk_id=0, byte_fallback=True)
    return tokenizer


MAKERS = {  # bytes: no token reaches over the start of an answer, so that decoding tells labels to the byte
    "bytes": lambda: _bytes(r"\s|\w+"),
    "bpe": _bytes,
    "words": _words,
    "metaspace": _metaspace,
    "unigram": _unigram,
}


@cache
def _trained(kind: str) -> str:
    return MAKERS[kind]().to_str()


@cache
def chat_template(name: str, kind: str = "bytes", **changes) -> ChatTemplate:
    """The code under test with a template of this folder. changes: other ChatTemplate arguments."""
    spec = SPECS[name]
    raw = Tokenizer.from_str(_trained(kind))
    raw.add_tokens([AddedToken(word, normalized=False) for word in spec.get("words", [])])
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in spec["tokens"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=spec.get("bos"), eos_token=spec["eos"], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (FOLDER / f"{spec.get('file', name)}.jinja").read_text(encoding="utf-8")
    stops = frozenset(tokenizer.convert_tokens_to_ids(spec.get("stops", [spec["eos"]])))
    return ChatTemplate(tokenizer, **{"stops": stops, "kwargs": spec.get("kwargs")} | changes)
