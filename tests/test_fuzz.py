"""Whatever is in the files and flags, a script trains, or says one sentence: no traceback. hypothesis makes them up.

FUZZ=20 runs 20 times as many cases. A case that fails is printed; give it a row in test_doors.py.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import types
import typing
import warnings

import pytest
from conftest import make_backbone, make_conversations, make_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import set_seed

import train as script
from common.errors import BadInput
from conversations.options import parse_kwargs
from conversations.prompts import read_prompts
from conversations.rows import prepare
from conversations.sources import load_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate
from conversations.tokenizer import load_tokenizer
from decoding.tree import load_chance, read_choices
from medusa_model import MedusaConfig, MedusaModel
from training.arguments import DataArguments, ModelArguments, TrainingArguments, parse

TIMES = float(os.environ.get("FUZZ", 1))


def cases(count: int):
    """The same cases each time, unless there are more of them than usual."""
    return settings(
        max_examples=math.ceil(count * TIMES),
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    set_seed(0)
    root = tmp_path_factory.mktemp("fuzz")
    backbone = make_backbone()
    backbone.save_pretrained(root / "model")
    make_tokenizer("llama3").save_pretrained(root / "model")
    config = MedusaConfig(medusa_num_heads=2, base_model_name_or_path=str(root / "model"))
    model = MedusaModel.from_backbone(backbone, config)
    model.freeze_backbone()
    model.save_pretrained(root / "heads")
    write_jsonl(root / "chats.jsonl", make_conversations(12))
    return root


def says(what, *args, **kwargs):
    """Calls it. A refusal has to be one line."""
    try:
        return what(*args, **kwargs)
    except BadInput as refusal:
        assert str(refusal).strip() and "\n" not in str(refusal).strip(), str(refusal)


# ---- conversations ----
KEYS = (
    "messages",
    "conversations",
    "role",
    "from",
    "content",
    "value",
    "text",
    "type",
    "tools",
    "tool_calls",
    "prompt",
)
KEYS += (
    "response",
    "reasoning_content",
    "prompt_ids",
    "answer_ids",
    "unfinished",
    "system",
    "id",
    "group",
    "function",
)
WORDS = (
    "user",
    "assistant",
    "human",
    "gpt",
    "system",
    "tool",
    "why",
    "",
    " ",
    "<|eot_id|>",
    "<think>",
    "a\u0000b",
    "\ud83c",
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 400), st.floats(), st.sampled_from(WORDS), st.text(max_size=8)
)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(WORDS[:6]) | PLAIN, "content": st.sampled_from(WORDS) | JSON},
    optional={"reasoning_content": JSON, "tool_calls": JSON, "name": PLAIN},
)
RECORD = st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=5) | JSON},
    optional={"tools": JSON, "prompt_ids": JSON, "answer_ids": JSON, "unfinished": JSON, "group": JSON},
)
GOOD = make_conversations(1)[0]


@cases(40)
@given(records=st.lists(RECORD | JSON, min_size=1, max_size=5), good=st.booleans(), cut=st.integers(0, 3))
def test_conversations(place, records, good, cut):
    text = "".join(json.dumps(record) + "\n" for record in [*records, *([GOOD] if good else [])])
    (place / "fuzz.jsonl").write_text(text[: len(text) - cut])
    chat = ChatTemplate(make_tokenizer("llama3"))

    def read():
        summary = Summary("fuzz")
        data = load_conversations([str(place / "fuzz.jsonl")], summary, cache_dir=str(place / "cache"))
        rows = prepare(data, summary, chat, 64, 3)
        assert all(len(row["input_ids"]) == len(row["labels"]) <= 64 for row in rows) and summary.table()

    says(read)
    says(read_prompts, str(place / "fuzz.jsonl"))


@cases(150)
@given(data=st.binary(max_size=60))
def test_files_of_any_bytes(place, data):
    for name in ("bytes.jsonl", "bytes.json", "bytes.csv", "bytes.jsonl.gz", "bytes.parquet", "bytes.txt"):
        (place / name).write_bytes(data)
    says(load_conversations, [str(place / "bytes.jsonl")], Summary("bytes"), cache_dir=str(place / "cache"))
    says(read_prompts, str(place / "bytes.txt"))


# ---- configs ----
ODD = st.one_of(
    PLAIN, st.sampled_from((-1, 0, 1, 7, 33, 1e9, "x", [], {}, [1], {"rope_type": "x"}, {"rope_theta": None}))
)


def mutated(path, changes: dict, drop: set) -> str:
    found = json.loads(path.read_text())
    names = sorted(found)
    for number, value in changes.items():
        found[names[number % len(names)]] = value
    for number in drop:
        found.pop(names[number % len(names)], None)
    return json.dumps(found)


CHANGES = {
    "changes": st.dictionaries(st.integers(0, 40), ODD, min_size=1, max_size=2),
    "drop": st.sets(st.integers(0, 40), max_size=1),
}


@cases(60)
@given(**CHANGES)
def test_a_backbone_s_config(place, changes, drop):
    from training.build import check_before_data

    directory = place / "odd"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(mutated(place / "model" / "config.json", changes, drop))
    says(check_before_data, str(directory), make_tokenizer("llama3"), 64)


@cases(15)
@given(**CHANGES, file=st.sampled_from(("tokenizer.json", "tokenizer_config.json")))
def test_a_tokenizer(place, changes, drop, file):
    shutil.copytree(place / "model", place / "odd-tokenizer", dirs_exist_ok=True)
    (place / "odd-tokenizer" / file).write_text(mutated(place / "model" / file, changes, drop))
    tokenizer = says(load_tokenizer, str(place / "odd-tokenizer"))
    if tokenizer:
        chat = says(ChatTemplate, tokenizer)
        data = load_conversations([str(place / "chats.jsonl")], Summary("good"), cache_dir=str(place / "cache"))
        says(lambda: chat and prepare(data, Summary("good"), chat, 64, 3))


@cases(40)
@given(**CHANGES)
def test_the_config_of_heads(place, changes, drop):
    directory = place / "odd-heads"
    directory.mkdir(exist_ok=True)
    (directory / "medusa_lm_head.safetensors").write_bytes(
        (place / "heads" / "medusa_lm_head.safetensors").read_bytes()
    )
    (directory / "config.json").write_text(mutated(place / "heads" / "config.json", changes, drop))
    says(MedusaModel.from_pretrained, directory, str(place / "model"))


@cases(150)
@given(value=JSON | st.lists(st.lists(st.integers(-1, 12), max_size=4), max_size=6), top=JSON)
def test_trees_accuracies_and_template_options(place, value, top):
    (place / "tree.json").write_text(json.dumps(value))
    (place / "accuracy.json").write_text(json.dumps({"top": value, "own": {"top": top}}))
    says(read_choices, str(place / "tree.json"), 3)
    says(load_chance, place / "accuracy.json")
    says(parse_kwargs, json.dumps(value))


# ---- flags ----
NUMBERS = st.sampled_from(("0", "1", "2", "-1", "3.5", "nan", "inf", "-inf", "1e-3", "1e30", "99999999999", "x", ""))
SKIP = {  # those that reach out of this process, or only change where things go
    "output_dir", "logging_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_revision",
    "model_name_or_path", "data_path", "cache_dir", "use_cpu", "fsdp", "fsdp_config", "deepspeed", "debug",
    "resume_from_checkpoint", "trust_remote_code", "accelerator_config", "parallelism_config", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "ddp_backend", "seed", "data_seed", "local_rank",
    "use_liger_kernel",
}  # fmt: skip
FLAGS = {
    field.name: field
    for cls in (ModelArguments, DataArguments, TrainingArguments)
    for field in dataclasses.fields(cls)
    if field.init and field.name not in SKIP
}


def values(field) -> st.SearchStrategy:
    """Words for a flag: mostly of its type, sometimes nonsense."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    if choices := field.metadata.get("choices"):
        return st.sampled_from([*choices, "x"])
    if bool in kinds:
        return st.sampled_from(("True", "False"))
    return (
        NUMBERS
        if {int, float} & set(kinds)
        else st.sampled_from(("no", "steps", "epoch", "x", "0", "linear", "nan", "{}"))
    )


CALL = st.lists(st.sampled_from(sorted(FLAGS)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values(FLAGS[name]) for name in names})
)


@cases(250)
@given(flags=CALL)
def test_flags(place, flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        says(parse, ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "out", *words])


@cases(20)
@given(flags=CALL)
def test_whole_runs(place, flags):
    """Two steps with these flags, or a sentence. A step may give NaN, which has a sentence of its own."""
    number = sum(1 for _ in place.glob("run-*"))
    fixed = {
        "model_name_or_path": "model",
        "data_path": "chats.jsonl",
        "output_dir": f"run-{number}",
        "max_steps": "2",
    }
    fixed |= {"model_max_length": "64", "medusa_num_heads": "2", "cache_dir": "cache", "disable_tqdm": "True"}
    words = [word for name, value in (fixed | flags | {"max_steps": "2"}).items() for word in (f"--{name}", value)]
    (place / f"run-{number}").mkdir()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(place)
        patch.setattr(sys, "argv", ["train.py", *words])
        patch.delenv("TRITON_INTERPRET", raising=False)
        try:
            says(script.main)
        except FloatingPointError as error:
            assert "the loss of head" in str(error)
