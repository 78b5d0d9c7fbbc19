"""A checkpoint is data: whatever is planted in one, no code of it runs, and the sentence names the file."""

import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from common.errors import BadInput
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
