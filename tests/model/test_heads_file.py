"""model/heads_file.py: what is on disk, and what is refused when it is read."""

import json

import pytest
import torch
import transformers
from conftest import make_backbone, randomise
from safetensors.torch import load_file, save_file
from tiny import make_model

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.heads_file import HEADS_FILE, save_heads


@pytest.fixture
def saved(tmp_path):
    """A stage 1 directory over a backbone directory."""
    make_backbone(vocab_size=90).save_pretrained(tmp_path / "backbone")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=2, medusa_num_layers=1))
    randomise(model.medusa_heads)
    model.freeze_backbone()
    model.save_pretrained(tmp_path / "heads")
    return model, tmp_path / "heads"


def test_stage_1_files(saved):
    _model, directory = saved
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", HEADS_FILE]
    tensors = load_file(directory / HEADS_FILE)
    assert sorted(tensors) == [
        "0.0.linear.bias", "0.0.linear.weight", "0.1.weight", "1.0.linear.bias", "1.0.linear.weight", "1.1.weight"
    ]  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert config["medusa_num_heads"] == 2 and config["medusa_num_layers"] == 1
    assert config["hidden_size"] == 32 and config["vocab_size"] == 90
    assert config["base_model_name_or_path"] == str(directory.parent / "backbone")
    assert "architectures" not in config


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stage_1_round_trip(saved):
    model, directory = saved
    assert same_weights(MedusaModel.from_pretrained(directory), model)


@pytest.mark.parametrize("tied", [False, True])
def test_stage_2_is_a_plain_checkpoint_with_heads_beside_it(tmp_path, tied):
    model = make_model(heads=2, tied=tied)
    model.save_pretrained(tmp_path / "out")
    ids = torch.randint(90, (1, 7))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is transformers.LlamaForCausalLM
    torch.testing.assert_close(plain(ids).logits, model(ids).logits[0], rtol=0, atol=1e-6)
    assert same_weights(MedusaModel.from_pretrained(tmp_path / "out"), model)
    assert same_weights(MedusaModel.from_pretrained(tmp_path / "out" / "medusa_heads"), model)


def test_a_moved_backbone_can_be_named(saved):
    model, directory = saved
    (directory.parent / "backbone").rename(directory.parent / "elsewhere")
    with pytest.raises(BadInput, match="backbone"):
        MedusaModel.from_pretrained(directory)
    again = MedusaModel.from_pretrained(directory, base_model_name_or_path=directory.parent / "elsewhere")
    assert same_weights(again, model)


def spoil(directory, change):
    tensors = load_file(directory / HEADS_FILE)
    change(tensors)
    save_file(tensors, directory / HEADS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.bias"), r"lacks tensor 1\.0\.linear\.bias"),
        (lambda t: t.update({"2.1.weight": torch.zeros(90, 32)}), r"unexpected tensor 2\.1\.weight"),
        (lambda t: t.update({"0.1.weight": torch.zeros(91, 32)}), r"0\.1\.weight has shape \[91, 32\].*\[90, 32\]"),
        (lambda t: t["1.1.weight"].view(-1)[7].fill_(torch.nan), r"1\.1\.weight holds NaN"),
    ],
)
def test_a_wrong_heads_file_is_refused_with_the_tensor_named(saved, change, message):
    spoil(saved[1], change)
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_pretrained(saved[1])


def test_a_heads_file_cut_off_is_refused(saved):
    path = saved[1] / HEADS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match=HEADS_FILE):
        MedusaModel.from_pretrained(saved[1])


@pytest.mark.parametrize("text", ["{", "{}", '{"medusa_num_heads": "two"}'])
def test_a_broken_config_is_refused(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        MedusaModel.from_pretrained(saved[1])


def test_no_heads_there(tmp_path):
    with pytest.raises(BadInput, match="no Medusa heads"):
        MedusaModel.from_pretrained(tmp_path)


def test_heads_of_another_backbone_are_refused(saved, tmp_path):
    make_backbone(vocab_size=91).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match=r"vocab_size 90.*91"):
        MedusaModel.from_pretrained(saved[1], base_model_name_or_path=tmp_path / "other")


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    model, directory = saved
    before = (directory / HEADS_FILE).read_bytes()

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("model.heads_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_heads(model.medusa_heads.state_dict(), model.config.to_dict(), directory)
    assert (directory / HEADS_FILE).read_bytes() == before
