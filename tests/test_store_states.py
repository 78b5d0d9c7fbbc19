"""store_states.py: what it stores, what it says before, and how it goes on after a stop."""

import datetime
import logging
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_backbone, make_conversations, make_tokenizer, write_jsonl
from stored import HELD_OUT
from transformers import AutoModelForCausalLM

import store_states
from common.errors import BadInput
from training.states import StoredRows, read_index

SMALL = "training.store_plan.SHARD_BYTES"


def read(states, part="train", dtype=torch.float32) -> StoredRows:
    index = read_index(states)
    return StoredRows(states, index["shards"][part], index, dtype)


def contents(states) -> dict[str, bytes]:
    return {path.relative_to(states).as_posix(): path.read_bytes() for path in states.rglob("*") if path.is_file()}


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


# ---- several processes, and a kill ----


@pytest.fixture
def start(lab, tmp_path):
    """Runs store_states.py in processes of its own, on the lab's conversations: -> the directory, codes and logs."""

    def run(output="states", kind="one process", **how):
        flags = {"--output": tmp_path / output, "--cache_dir": tmp_path / "cache", **how.pop("flags", {})}
        done = lab.launch(kind, flags, argv=lab.store_argv, shard_bytes=20_000, **how)
        return tmp_path / output, done.codes, done.logs

    return run


@pytest.mark.processes
def test_two_processes_take_files_in_turn(start):
    one, *_ = start("one")
    two, codes, logs = start("two", "DDP")
    assert codes == [0, 0] and contents(two) == contents(one)
    written = [[line.split(":")[0] for line in log.splitlines() if " files" in line[-9:]] for log in logs]
    assert "train/00000.safetensors" in written[0] and "train/00001.safetensors" not in written[0]
    assert "is whole: train with --states_path" in logs[0]


@pytest.mark.processes
@pytest.mark.parametrize("call", ["store_states.compute", "store_states.save_file", "common.files.os.replace"])
def test_killed_at_any_moment_it_goes_on_to_the_same_files(call, start):
    whole, *_ = start("whole")
    states, codes, _ = start(at={"call": call, "nth": 4, "signal": signal.SIGKILL})
    assert codes == [-signal.SIGKILL] and not (states / "index.json").exists()
    assert 1 <= len(list(states.rglob("*.safetensors"))) <= 4
    written = {path: path.stat().st_mtime_ns for path in states.rglob("*.safetensors")}
    _, codes, _ = start()
    assert codes == [0] and contents(states) == contents(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


@pytest.mark.processes
def test_ctrl_c(start):
    _, codes, logs = start(at={"call": "store_states.compute", "nth": 3, "signal": signal.SIGINT})
    assert codes == [130] and "interrupted: the same command goes on after the last whole file" in logs[0]


@pytest.mark.processes
def test_processes_with_different_data(start, lab):
    _, codes, logs = start(kind="DDP", rank_1={"--data_path": lab.root / "other.jsonl"})
    assert codes[1] == 1 and "was begun with other data" in logs[1]
