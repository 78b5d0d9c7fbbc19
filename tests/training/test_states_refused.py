"""States that cannot be trained from, or not with these flags: one sentence each, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_backbone, make_tokenizer
from stored import offline

from common.errors import BadInput
from training.states import read_index


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--medusa_only_heads", False), "--states_path goes with --medusa_only_heads True"),
        (("--data_path", "d"), "--states_path has its conversations already.*leave out --data_path"),
        (("--eval_holdout", 3, "--train_split", "s"), "leave out --train_split and --eval_holdout"),
        (("--fp8_backbone", True, "--bf16", True), "--backbone_dtype fp8 does nothing with --states_path"),
        (("--lazy_preprocess", True), "--lazy_preprocess does nothing"),
        (("--packing", True), "--packing does nothing"),
        (("--model_max_length", 32), "stored with --model_max_length 64: leave it out"),
        (("--chat_template_kwargs", '{"a": 1}'), "stored with --chat_template_kwargs {}: leave it out"),
        (("--medusa_num_heads", 90), "--medusa_num_heads 90: head 90 needs rows of 92 tokens, and .* has one of"),
        (("--do_eval", True), "--do_eval asks for evaluation: .* where the states are stored"),
        (("--eval_strategy", "steps"), "--eval_strategy asks for evaluation: .* where the states are stored"),
        (("--states_path", "nowhere"), "--states_path nowhere: there are no states"),
        (("--states_path", "nowhere", "--eval_strategy", "steps"), "--states_path nowhere: there are no states"),
        (("--states_path", None), "--data_path is missing"),
    ],
)
def test_refused(flags, message, train, store, tmp_path):
    states = store()
    with pytest.raises(BadInput, match=message):
        train(*offline(states), *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kwargs", ["{}", ""])
def test_the_flags_of_the_first_time_are_accepted(kwargs, train, store):
    train(*offline(store()), "--model_max_length", 64, "--chat_template_kwargs", kwargs)


def test_an_empty_directory_is_nothing_to_evaluate_on(train, store):
    states = store()
    (states / "eval").mkdir()
    with pytest.raises(BadInput, match=r"--eval_strategy asks for evaluation: .* where the states are stored"):
        train(*offline(states), "--eval_strategy", "steps")
    assert (train(*offline(states)) / "config.json").is_file()


@pytest.mark.parametrize("text", ["{}", "[]", '{"date": "2026-01-01"}'])
def test_an_index_of_something_else(text, train, store):
    states = store()
    (states / "index.json").write_text(text)
    with pytest.raises(BadInput, match=r"index\.json is not one that store_states\.py wrote"):
        train(*offline(states))


def test_another_chat_template(train, store, tmp_path):
    says = "{% for m in messages %}<|start_header_id|>{{ m.role }} {{ m.content }}<|eot_id|>{% endfor %}"
    dated = tmp_path / "says.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + says)
    states = store("--chat_template", dated)
    index = read_index(states)
    assert index["date"] in json.dumps(index)
    with pytest.raises(BadInput, match=r"stored with another chat template than .* give --chat_template as you gave"):
        train(*offline(states))
    out = train(*offline(states), "--chat_template", dated)
    assert (out / "chat_template.jinja").read_text().strip() == dated.read_text()


def test_another_model(train, store, model_dir, tmp_path):
    states, other, moved = store(), tmp_path / "other", tmp_path / "moved"
    make_backbone().save_pretrained(other)
    make_tokenizer("llama3").save_pretrained(other)
    with pytest.raises(
        BadInput, match=r"stored with .*backbone, and .*other has other embeddings, last norm or lm_head"
    ):
        train(*offline(states), "--model_name_or_path", other)
    assert not (tmp_path / "out").exists()
    shutil.move(model_dir, moved)
    out = train(*offline(states), "--model_name_or_path", moved)
    assert json.loads((out / "config.json").read_text())["base_model_name_or_path"] == str(moved)


def cut_short(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path):
    """The last fifth, as a machine that lost its power may leave a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 4 // 5] + bytes(len(data) - len(data) * 4 // 5))


def exchange(path: Path):
    shutil.copy(path.with_name("00001.safetensors"), path)


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, zero, exchange])
def test_a_damaged_file_is_named_and_made_anew(damage, train, store, monkeypatch):
    monkeypatch.setattr("training.store_plan.SHARD_BYTES", 30_000)
    states = store()
    before = {path: path.read_bytes() for path in states.rglob("*") if path.is_file()}
    assert len(before) > 5
    damage(states / "train" / "00002.safetensors")
    with pytest.raises(BadInput, match=r"00002\.safetensors.* run store_states\.py again"):
        train(*offline(states))
    store()
    assert {path: path.read_bytes() for path in states.rglob("*") if path.is_file()} == before
    train(*offline(states))


def test_states_that_are_not_finished(train, store):
    states = store()
    (states / "index.json").unlink()
    with pytest.raises(BadInput, match=r"not finished: run store_states\.py again, it goes on"):
        train(*offline(states))
