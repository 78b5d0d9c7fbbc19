"""A checkpoint is data: whatever is planted in one, no code of it runs, and the sentence names the file."""

import contextlib
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from common.errors import BadInput
from conversations.tokenizer import load_stops, load_tokenizer
from medusa_model import MedusaModel
from model.backbone import load_backbone
from model.heads_file import load_heads, save_heads
from training.state import load_state, save_state


class Planted:
    """Unpickled by the wrong reader, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def trained():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr("training.state._state", lambda model, optimizer, weights: whole(model, optimizer))
    model, optimizer = trained()
    save_state(tmp_path / "state", model, optimizer, True)
    return tmp_path / "state"


def whole(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    from training.state import FLAT

    moments = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {"model": get_model_state_dict(model), "optimizer": moments}


def read(directory):
    model, optimizer = trained()
    with torch.no_grad():
        model.weight.zero_()
    load_state(directory, model, optimizer, True)
    return model, optimizer


def test_what_was_saved_is_read(saved):
    model, optimizer = read(saved)
    want, its_optimizer = trained()
    assert torch.equal(model.weight, want.weight)
    state, wanted = optimizer.state[model.weight], its_optimizer.state[want.weight]
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "payload",
    [
        lambda path: pickle.dumps(Planted(path)),
        lambda path: pickle.dumps({"state_dict_metadata": [Planted(path)]}, protocol=0),
        lambda path: b'cbuiltins\neval\n(S\'__import__("os").mkdir(' + repr(str(path)).encode() + b")'\ntR.",
        lambda path: b"ctorch\nload\n(S'x'\ntR.",
        lambda path: b"\x80\x04\x8c\x05torch\x8c\x0aos.getpid\x0a\x93)R.",  # a dotted name under an allowed module
        lambda path: pickle.dumps([1, 2]),
        lambda path: b"",
        lambda path: b"\x80\x05garbage",
    ],
)
def test_a_planted_list(payload, saved, tmp_path):
    (saved / ".metadata").write_bytes(payload(tmp_path / "ran"))
    with pytest.raises(BadInput, match=r"cannot read .*state: "):
        read(saved)
    assert not (tmp_path / "ran").exists()


def test_a_planted_list_is_as_hostile_as_it_means_to_be(saved, tmp_path):
    (saved / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with contextlib.suppress(Exception, CheckpointException):  # torch's own reader
        dcp.load(whole(*trained()), checkpoint_id=saved)
    assert (tmp_path / "ran").exists()


def planted_value(saved, payload: bytes, name="optimizer.param_groups.weight.lr"):
    """Puts `payload` where the value `name` is: behind the end of the shard, and its place into the list."""
    path = saved / ".metadata"
    found = FileSystemReader(saved).read_metadata()
    (info,) = (info for index, info in found.storage_data.items() if index.fqn == name)
    shard = saved / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(payload)
    shard.write_bytes(shard.read_bytes() + payload)
    path.write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("name", ["optimizer.param_groups.weight.lr", "model.weight"])
def test_a_planted_value_in_a_shard(name, saved, tmp_path):
    buffer = io.BytesIO()
    torch.save(Planted(tmp_path / "ran"), buffer)
    planted_value(saved, buffer.getvalue(), name)
    with pytest.raises(BadInput, match=r"cannot read .*state: "):
        read(saved)
    assert not (tmp_path / "ran").exists()
    model, optimizer = trained()
    if name != "model.weight":  # torch's own reader runs it, so the file is as hostile as it means to be
        dcp.load(whole(model, optimizer), checkpoint_id=saved)
        assert (tmp_path / "ran").exists()


def test_a_shard_elsewhere(saved):
    found = FileSystemReader(saved).read_metadata()
    next(iter(found.storage_data.values())).relative_path = "../elsewhere"
    (saved / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(BadInput, match="outside of the checkpoint"):
        read(saved)


@pytest.mark.parametrize(
    ("load", "files"),
    [
        (load_backbone, ["config.json"]),
        (load_tokenizer, ["config.json", "tokenizer_config.json"]),
        (load_stops, ["config.json"]),
    ],
)
def test_code_of_a_model_runs_only_with_the_flag(load, files, model_dir, tmp_path, monkeypatch):
    """Where nothing is said, transformers asks at the terminal, and runs it at a y."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks at the terminal"))
    path = Path(model_dir)
    (path / "planted.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\n")
    for name in files:
        classes = {
            "AutoConfig": "planted.A",
            "AutoModelForCausalLM": "planted.A",
            "AutoTokenizer": ["planted.A", None],
        }
        fields = json.loads((path / name).read_text()) | {"model_type": "planted", "auto_map": classes}
        (path / name).write_text(json.dumps(fields))
    (path / "generation_config.json").unlink(missing_ok=True)
    with contextlib.suppress(BadInput):
        load(model_dir)
    assert not (tmp_path / "ran").exists()


def heads(directory, base, **fields):
    config = {"medusa_num_heads": 1, "medusa_num_layers": 0, "hidden_size": 4, "vocab_size": 6} | fields
    save_heads({"0.0.weight": torch.ones(6, 4)}, config | {"base_model_name_or_path": base}, directory)
    return directory


def test_a_config_cannot_have_heads_made_without_end(tmp_path):
    for field in ("medusa_num_heads", "medusa_num_layers"):
        with pytest.raises(BadInput, match="1 tensors, too few for"):
            load_heads(heads(tmp_path, "model", **{field: 10**12}))


def test_a_backbone_of_the_hub_is_named_before_it_is_fetched(tmp_path, monkeypatch, caplog):
    def fetch(base, **kwargs):
        assert "are of someone/model, no directory here" in caplog.text
        raise BadInput(f"offline: {base}")

    monkeypatch.setattr("medusa_model.load_backbone", fetch)
    with pytest.raises(BadInput, match="offline: someone/model"):
        MedusaModel.from_pretrained(heads(tmp_path, "someone/model"))
    with pytest.raises(BadInput, match="names no backbone"):
        MedusaModel.from_pretrained(heads(tmp_path, None))
