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
from model.heads_file import HEADS_FILE, load_token_map, save_heads


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


@pytest.mark.parametrize("stage", [1, 2])
def test_a_draft_vocabulary_is_in_the_heads_file(stage, tmp_path):
    make_backbone(vocab_size=90).save_pretrained(tmp_path / "backbone")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    tokens = torch.tensor([3, 8, 21, 89])
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=2), token_map=tokens)
    randomise(model.medusa_heads)
    if stage == 1:
        model.freeze_backbone()
    model.save_pretrained(tmp_path / "out")
    heads = tmp_path / "out" if stage == 1 else tmp_path / "out" / "medusa_heads"
    assert json.loads((heads / "config.json").read_text())["medusa_vocab_size"] == 4
    tensors = load_file(heads / HEADS_FILE)
    assert torch.equal(tensors["token_map"], tokens) and tensors["1.1.weight"].shape == (4, 32)
    again = MedusaModel.from_pretrained(tmp_path / "out")
    assert torch.equal(again.token_map, tokens) and same_weights(again, model)
    again.save_pretrained(tmp_path / "again", include_backbone=False)
    assert (tmp_path / "again" / HEADS_FILE).read_bytes() == (heads / HEADS_FILE).read_bytes()


@pytest.fixture
def reduced(saved):
    """`saved`, with heads that guess 4 tokens."""
    model, directory = saved
    tokens = torch.tensor([3, 8, 21, 89])
    model = MedusaModel.from_backbone(model.backbone, MedusaConfig(medusa_num_heads=2), token_map=tokens)
    model.save_pretrained(directory, include_backbone=False)
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("token_map"), "lacks tensor token_map .* a draft vocabulary of 4 tokens"),
        (lambda t: t.update({"token_map": torch.tensor([3, 8, 21])}), r"token_map has shape \[3\].*says \[4\]"),
        (lambda t: t.update({"token_map": torch.tensor([3, 8, 21, 89]).int()}), "token_map is torch.int32"),
        (lambda t: t.update({"token_map": torch.tensor([3, 8, 8, 89])}), "token_map does not ascend"),
        (lambda t: t.update({"token_map": torch.tensor([3, 8, 21, 90])}), "tokens outside of the 90"),
        (lambda t: t.update({"token_map": torch.tensor([-1, 8, 21, 89])}), "tokens outside of the 90"),
        (lambda t: t.update({"0.1.weight": torch.zeros(90, 32)}), r"shape \[90, 32\].*says \[4, 32\]"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(reduced, change, message):
    spoil(reduced, change)
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_pretrained(reduced)


def test_the_tokens_alone_are_read_and_checked(reduced, saved):
    assert load_token_map(reduced).tolist() == [3, 8, 21, 89]
    for tokens, message in (([3, 8, 21], r"token_map is torch.int64 \[3\], but"), ([9, 8, 21, 89], "does not ascend")):
        spoil(reduced, lambda t, tokens=tokens: t.update({"token_map": torch.tensor(tokens)}))
        with pytest.raises(BadInput, match=message):
            load_token_map(reduced)
    spoil(reduced, lambda t: t.pop("token_map"))
    with pytest.raises(BadInput, match=r"cannot read .*token_map"):
        load_token_map(reduced)
    saved[0].save_pretrained(reduced, include_backbone=False)
    assert load_token_map(reduced) is None


def test_tokens_that_the_config_does_not_name(saved):
    spoil(saved[1], lambda t: t.update({"token_map": torch.arange(4)}))
    with pytest.raises(BadInput, match=r"has an unexpected tensor token_map .* 90 tokens"):
        MedusaModel.from_pretrained(saved[1])


@pytest.mark.parametrize("size", [0, 90, "many"])
def test_a_draft_vocabulary_is_a_part_of_the_whole(reduced, size):
    config = json.loads((reduced / "config.json").read_text())
    (reduced / "config.json").write_text(json.dumps(config | {"medusa_vocab_size": size}))
    with pytest.raises(BadInput, match=f"medusa_vocab_size {size} is no part of 90 tokens"):
        MedusaModel.from_pretrained(reduced)


@pytest.fixture(params=["markov", "hydra"])
def reading(saved, request):
    """`saved`, with heads that read the path to their guess. -> (their type, the directory)"""
    model, directory = saved
    config = MedusaConfig(medusa_num_heads=2, medusa_head_type=request.param, medusa_rank=5)
    model = MedusaModel.from_backbone(model.backbone, config)
    randomise(model.medusa_heads)
    model.save_pretrained(directory, include_backbone=False)
    return request.param, directory


def test_heads_of_another_type_than_the_config_says(reading, saved):
    kind, directory = reading
    config = json.loads((directory / "config.json").read_text())
    messages = {
        ("markov", "medusa"): r"has an unexpected tensor 0\.table .* the 2 medusa heads",
        ("markov", "hydra"): r"has an unexpected tensor 0\.table .* the 2 hydra heads",
        ("hydra", "medusa"): r"linear\.weight has shape \[32, ..\], but .* says \[32, 32\], for medusa heads",
        ("hydra", "markov"): r"lacks tensor 0\.table .* the 2 markov heads",
    }
    for other in {"medusa", "markov", "hydra"} - {kind}:
        (directory / "config.json").write_text(json.dumps(config | {"medusa_head_type": other, "medusa_rank": 5}))
        with pytest.raises(BadInput, match=messages[kind, other]):
            MedusaModel.from_pretrained(directory)
    del config["medusa_head_type"]  # as it is without one: medusa
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=messages[kind, "medusa"]):
        MedusaModel.from_pretrained(directory)
    if kind == "markov":
        (directory / "config.json").write_text(json.dumps(config | {"medusa_head_type": kind, "medusa_rank": 6}))
        with pytest.raises(BadInput, match=r"has shape \[90, .*\], but config.json says \[90, .*\], for markov heads"):
            MedusaModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"medusa_head_type": "eagle"}, "medusa_head_type eagle is not one of medusa, markov, hydra"),
        ({"medusa_head_type": ["hydra"]}, "is not one of medusa"),
        ({"medusa_head_type": "markov", "medusa_rank": None}, "has no number medusa_rank"),
        ({"medusa_head_type": "markov", "medusa_rank": 0}, "has no number medusa_rank"),
        ({"medusa_head_type": "hydra", "medusa_num_layers": 0}, "hydra heads of 0 ResBlocks"),
        ({"medusa_num_layers": -1}, "has no number medusa_num_layers"),
    ],
)
def test_a_type_that_cannot_be(reading, change, message):
    _kind, directory = reading
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_pretrained(directory)


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
