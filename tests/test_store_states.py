"""store_states.py: what it stores, what it says before, and how it goes on after a stop."""

import datetime
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_backbone, make_conversations, make_tokenizer, write_jsonl
from stored import HELD_OUT, contents
from transformers import AutoModelForCausalLM

import store_states
from common.errors import BadInput
from medusa_model import MedusaModel
from training.states import StoredRows, read_index

SMALL = "training.store_plan.SHARD_BYTES"


def read(states, part="train", dtype=torch.float32) -> StoredRows:
    index = read_index(states)
    return StoredRows(states, index["shards"][part], index, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_states_are_those_of_each_row_alone(part, dtype, tolerance, store, model_dir, monkeypatch):
    monkeypatch.setattr(SMALL, 20_000)
    rows = read(store("--dtype", dtype, "--batch_size", 3, *HELD_OUT), part)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Liger's kernels are in by now, and only run there
    backbone = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).model.to(device)
    assert len(set(rows.lengths)) > 3
    for i in range(len(rows)):
        with torch.no_grad():
            ids = torch.tensor(rows[i]["input_ids"], device=device)[None].long()
            want = backbone(ids).last_hidden_state[0].float().cpu()
        torch.testing.assert_close(rows[i]["hidden"], want, rtol=tolerance, atol=tolerance)


def test_the_cut_into_files_changes_nothing(store, monkeypatch):
    whole = store(*HELD_OUT, output="whole")
    monkeypatch.setattr(SMALL, 20_000)
    cut = store(*HELD_OUT, output="cut")
    files = [sorted(path.name for path in states.rglob("*.safetensors")) for states in (whole, cut)]
    assert files[0] == ["00000.safetensors"] * 2 and len(files[1]) > 8
    sizes = [path.stat().st_size for path in cut.rglob("*.safetensors")]
    assert max(sizes) < 20_000 + 1_000  # and safetensors' header
    a, b = read(whole), read(cut)
    assert a.lengths == b.lengths
    for i in range(len(a)):
        assert all((a[i][key] == b[i][key]).all() for key in ("input_ids", "labels"))
        torch.testing.assert_close(a[i]["hidden"], b[i]["hidden"], rtol=2e-2, atol=2e-2)


def test_a_row_larger_than_a_file_has_one_of_its_own(store, monkeypatch):
    monkeypatch.setattr(SMALL, 1)
    rows = read(store())
    assert len(rows.paths) == len(rows) == 48


def test_short_rows_are_left_out_for_the_last_head(store, tmp_path):
    short = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}]
    data = write_jsonl(tmp_path / "short.jsonl", short + make_conversations(5))
    few = read(store("--data_path", data, "--medusa_num_heads", 30, output="few"))
    assert len(read(store("--data_path", data))) == 6 and len(few) < 6 and min(few.lengths) >= 32


# ---- what it will need ----


def test_the_need_is_said_before_anything_is_computed(store, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(SMALL, 20_000)
    loads = []
    monkeypatch.setattr(store_states, "load", lambda *args: loads.append(1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 10_000))
    with pytest.raises(BadInput, match=r"0\.000\d+ GB are still to be written, and the disk of .*states has 1e-05 GB"):
        store(*HELD_OUT)
    assert "tokens x 32 x 2 bytes = 0.000" in caplog.text and "files; 0 of them are there" in caplog.text
    assert not loads and not (tmp_path / "states").exists()


def test_exactly_enough_room_is_enough(store, monkeypatch, tmp_path):
    """The need leaves out safetensors' headers and the index: less than a millionth of real files."""
    usage, needs = namedtuple("usage", "total used free"), 0
    states = store(output="first")
    rows = read(states)
    needs = sum(rows.lengths) * (32 * 2 + 8) + len(rows) * 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, needs - 1))
    with pytest.raises(BadInput, match="GB free"):
        store()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, needs))
    store()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_states_that_are_no_numbers_are_not_stored(value, store, monkeypatch, tmp_path):
    monkeypatch.setattr(SMALL, 20_000)
    load, want = store_states.load, read(store(output="good"))
    start = want.first_rows[2]

    def spoilt(*args):
        model, original = load(*args), MedusaModel.last_hidden_state
        bad = torch.tensor(want[start + 1]["input_ids"])

        def last_hidden_state(self, ids, *rest):
            states = original(self, ids, *rest)
            for states_of_row, row in zip(states, ids.cpu(), strict=True):
                if torch.equal(row[: len(bad)], bad.to(row.dtype)):
                    states_of_row[3, 5] = value
            return states

        monkeypatch.setattr(MedusaModel, "last_hidden_state", last_hidden_state)
        return model

    monkeypatch.setattr(store_states, "load", spoilt)
    with pytest.raises(
        BadInput,
        match=r"of 1 tokens of train/00002\.safetensors are NaN or infinite, the first in row 1 .* in bfloat16",
    ):
        store()
    assert contents(tmp_path / "states").keys() == {"plan.json", *(f"train/0000{i}.safetensors" for i in range(2))}


def test_an_error_of_one_process_is_a_sentence_to_the_others(monkeypatch):
    said = []
    monkeypatch.setattr(store_states, "gather_object", lambda found: said.extend(found) or ["b", *found])
    with pytest.raises(KeyError), store_states.together():
        raise KeyError("a")
    with pytest.raises(BadInput, match="c"), store_states.together():
        raise BadInput("c")
    with pytest.raises(BadInput, match="b"), store_states.together():
        pass
    assert said == ["process 0 ended with KeyError: 'a'", "c", None]


# ---- refused ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size", 0), "--batch_size and --medusa_num_heads must be 1 or more"),
        (("--medusa_num_heads", 0), "--batch_size and --medusa_num_heads must be 1 or more"),
        (("--model_max_length", 3), "--model_max_length 3: at least 4"),
        (("--model_max_length", 1000), "256 positions"),
        (("--data_path", None), "--data_path is missing"),
        (("--data_path", "nothing.jsonl"), r"no file or directory .nothing\.jsonl"),
        (("--eval_holdout", -1), "--eval_holdout -1"),
        (("--eval_split", "train"), "--eval_split train is what is trained on"),
        (("--model_name_or_path", "./nothing"), r"\./nothing"),
        (("--chat_template_kwargs", "{"), "--chat_template_kwargs"),
        (("--packing", True), "--packing"),
        (("--dtype", "float16"), "float16"),
    ],
)
def test_bad_flags_leave_nothing_behind(flags, message, store, tmp_path):
    with pytest.raises(BadInput, match=message):
        store(*flags)
    assert not (tmp_path / "states").exists()


def test_a_directory_of_something_else(store, tmp_path):
    (tmp_path / "states").mkdir()
    store()  # an empty one
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(BadInput, match=r"other is not empty, and store_states\.py did not write it"):
        store(output="other")


def test_an_output_that_is_a_file_or_below_one(store, tmp_path):
    (tmp_path / "file").write_text("a")
    for output in ("file", "file/below/it"):
        with pytest.raises(BadInput, match=rf"--output .*{output}: .*/file is a file, not a directory"):
            store(output=output)
    assert (tmp_path / "file").read_text() == "a"


@pytest.mark.parametrize("text", ["{}", "[]", '{"date": "2026-01-01"}'])
@pytest.mark.parametrize("name", ["plan.json", "index.json"])
def test_a_plan_or_index_of_something_else(name, text, store):
    states = store()
    (states / name).write_text(text)
    before = contents(states)
    with pytest.raises(BadInput, match=rf"{name} is not one that store_states\.py wrote"):
        store()
    assert contents(states) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--dtype", "float32"), "another --dtype"),
        (("--model_max_length", 32), "another --model_max_length"),
        (("--medusa_num_heads", 3), "another --medusa_num_heads"),
        (("--eval_holdout", 5), "other data"),
        (("--chat_template", "own.jinja"), "another --chat_template"),
        (("--chat_template_kwargs", '{"a": 1}'), "another --chat_template_kwargs"),
        (("--model_name_or_path", "model"), "another model"),
        (("--data_path", "other.jsonl"), "other data"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_states_of_another_run_are_not_mixed(finished, flags, named, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_backbone().save_pretrained("model")
    make_tokenizer("llama3").save_pretrained("model")
    write_jsonl(tmp_path / "other.jsonl", make_conversations(48, seed=1))
    says = "{% for m in messages %}<|start_header_id|>{{ m.role }} {{ m.content }}<|eot_id|>{% endfor %}"
    Path("own.jinja").write_text(says)
    states = store()
    if not finished:
        (states / "index.json").unlink()
    before = contents(states)
    with pytest.raises(BadInput, match=f"states was begun with {named}.*: use the same"):
        store(*flags)
    assert contents(states) == before


# ---- going on ----


def test_what_is_whole_is_not_made_again(store, model_dir, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    states = store()
    monkeypatch.setattr(store_states, "load", None)
    store("--batch_size", 2)
    assert f"{states} is whole: there is nothing left to store" in caplog.text
    (states / "index.json").unlink()  # killed just before the end
    before = contents(states)
    store()
    assert contents(states).items() >= before.items() and (states / "index.json").exists()
    shutil.move(model_dir, tmp_path / "moved")
    store("--model_name_or_path", tmp_path / "moved")


def test_a_full_disk(store, monkeypatch, tmp_path):
    monkeypatch.setattr(SMALL, 20_000)
    whole = contents(store(*HELD_OUT, output="whole"))
    calls, save_file = [], store_states.save_file

    def full(tensors, path, **how):
        calls.append(path)
        Path(path).touch()
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **how)

    monkeypatch.setattr(store_states, "save_file", full)
    with pytest.raises(
        BadInput, match=r"could not write .*00003\.safetensors: .*No space left.* the same command goes on"
    ):
        store(*HELD_OUT)
    found = contents(tmp_path / "states")
    assert found.keys() == {"plan.json", *(f"train/0000{i}.safetensors" for i in range(3))}
    store(*HELD_OUT)
    assert contents(tmp_path / "states") == whole and len(calls) == len(whole) - 2 + 1


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return cls(2031, 1, 2)


def test_on_the_next_day_it_goes_on_with_the_template_of_the_first(store, tmp_path, monkeypatch):
    monkeypatch.setattr(SMALL, 20_000)
    template = tmp_path / "dated.jinja"
    says = "{% for m in messages %}<|start_header_id|>{{ m.role }} {{ m.content }}<|eot_id|>{% endfor %}"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + says)
    states = store("--chat_template", template)
    before = contents(states)
    (states / "index.json").unlink()
    (states / "train" / "00001.safetensors").unlink()
    monkeypatch.setattr(store_states, "Date", Tomorrow)
    store("--chat_template", template)
    assert contents(states) == before
    store("--chat_template", template, output="new")
    assert read_index(tmp_path / "new")["date"] == "2031-01-02"


def test_the_day_is_that_of_the_first_process(store, monkeypatch):
    def gather(found):
        return [datetime.date(2031, 1, 2), *found] if isinstance(found[0], datetime.date) else found

    monkeypatch.setattr(store_states, "gather_object", gather)
    assert read_index(store())["date"] == "2031-01-02"
