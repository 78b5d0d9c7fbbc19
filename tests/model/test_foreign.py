"""model/foreign.py: heads in the layouts of other programs are the same heads, and what is wrong in them is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_backbone, randomise
from safetensors.torch import load_file, save_file

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.foreign import recognise
from model.heads_file import HEADS_FILE, find_heads, load_config, load_token_map, tokenizer_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two heads of two ResBlocks over a backbone directory, and their files."""
    place = tmp_path_factory.mktemp("foreign")
    make_backbone(vocab_size=90).save_pretrained(place / "backbone")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(place / "backbone")
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=2, medusa_num_layers=2))
    randomise(model.medusa_heads)
    model.freeze_backbone()
    model.save_pretrained(place / "heads")
    return model, place


ORIGINAL = {"medusa_num_heads": 2, "medusa_num_layers": 2}  # and base_model_name_or_path: no sizes


def renamed(tensors, block, projection):
    """vLLM's and others' names. block, projection: formats of head and layer."""
    out = {}
    for name, tensor in tensors.items():
        h, layer, *rest = name.split(".")
        out[block.format(h, layer, rest[-1]) if "linear" in rest else projection.format(h, layer)] = tensor
    return out


def write(directory: Path, config: dict, tensors: dict, file: str):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.save(tensors, directory / file) if file.endswith((".pt", ".bin")) else save_file(tensors, directory / file)
    return directory


def same(model, again):
    a, b = model.medusa_heads.state_dict(), again.medusa_heads.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    ids = torch.arange(7)[None] + 3
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("file", "block", "projection", "config"),
    [
        (HEADS_FILE, "{}.{}.linear.{}", "{}.{}.weight", ORIGINAL),
        ("medusa_lm_head.pt", "{}.{}.linear.{}", "{}.{}.weight", ORIGINAL),
        ("model.safetensors", "blocks.{}.layers.{}.{}", "lm_heads.{}.weight", {"num_heads": 2, "vocab_size": 90}),
        ("model.safetensors", "medusa_head.{}.{}.linear.{}", "medusa_head.{}.{}.weight", ORIGINAL),
        ("pytorch_model.bin", "medusa_heads.{}.{}.linear.{}", "medusa_heads.{}.{}.weight", {"medusa": ORIGINAL}),
    ],
)
def test_layouts_of_others(made, tmp_path, file, block, projection, config, caplog):
    model, place = made
    tensors = renamed(load_file(place / "heads" / HEADS_FILE), block, projection)
    directory = write(tmp_path / "theirs", config, tensors, file)
    again = MedusaModel.from_pretrained(directory, base_model_name_or_path=place / "backbone")
    same(model, again)
    assert "the tensors are of" not in caplog.text
    again.save_pretrained(tmp_path / "ours", include_backbone=False)
    assert load_file(tmp_path / "ours" / HEADS_FILE).keys() == load_file(place / "heads" / HEADS_FILE).keys()
    assert load_config(tmp_path / "ours")["vocab_size"] == 90 and load_config(tmp_path / "ours")["hidden_size"] == 32


def test_the_named_backbone_and_its_tokenizer_are_used(made, tmp_path):
    model, place = made
    config = ORIGINAL | {"base_model_name_or_path": str(place / "backbone")}
    directory = write(tmp_path / "theirs", config, load_file(place / "heads" / HEADS_FILE), "medusa_lm_head.pt")
    same(model, MedusaModel.from_pretrained(directory))
    assert tokenizer_of(*find_heads(directory), None) == str(place / "backbone")
    assert tokenizer_of(*find_heads(directory), "elsewhere") == "elsewhere"
    (directory / "tokenizer_config.json").write_text("{}")
    assert tokenizer_of(*find_heads(directory), "elsewhere") == str(directory)


def test_a_whole_checkpoint_has_its_backbone(made, tmp_path):
    """In two files, with an index, as an 8B model has them."""
    model, place = made
    directory = shutil.copytree(place / "backbone", tmp_path / "whole")
    tensors = renamed(
        load_file(place / "heads" / HEADS_FILE), "medusa_head.{}.{}.linear.{}", "medusa_head.{}.{}.weight"
    )
    mine = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": mine, "model-00002-of-00002.safetensors": tensors}
    for file, part in shards.items():
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((directory / "config.json").read_text()) | {"medusa_num_heads": 2}
    (directory / "config.json").write_text(json.dumps(config))
    assert find_heads(directory) == (directory, directory)
    same(model, MedusaModel.from_pretrained(directory))


def test_heads_that_share_the_lm_head(made, tmp_path):
    """TGI's version 2."""
    _model, place = made
    tensors = {k: v for k, v in load_file(place / "heads" / HEADS_FILE).items() if "linear" in k}
    directory = write(tmp_path / "theirs", ORIGINAL | {"version": "2"}, tensors, HEADS_FILE)
    again = MedusaModel.from_pretrained(directory, base_model_name_or_path=place / "backbone")
    expected = tensors | {f"{h}.2.weight": again.lm_head.weight for h in range(2)}
    found = again.medusa_heads.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("rows", ["few", "all"])
def test_a_token_map_of_vllm(made, tmp_path, rows):
    """Its order is any; the projections have the rows of its tokens, or of all tokens."""
    model, place = made
    token_map = torch.tensor([21, 3, 89, 8])
    tensors = renamed(load_file(place / "heads" / HEADS_FILE), "blocks.{}.layers.{}.{}", "lm_heads.{}.weight")
    full = {name: tensors[name] for name in tensors if name.startswith("lm_heads")}
    few = {name: weight[token_map] for name, weight in full.items()}
    config = {"num_heads": 2, "vocab_size": 90, "truncated_vocab_size": 4}
    tensors = tensors | (few if rows == "few" else {}) | {"token_map": token_map}
    directory = write(tmp_path / "theirs", config, tensors, "model.safetensors")
    again = MedusaModel.from_pretrained(directory, base_model_name_or_path=place / "backbone")
    assert again.token_map.tolist() == [3, 8, 21, 89] == load_token_map(directory).tolist()
    ids = torch.arange(7)[None] + 3
    want = model(ids).logits[..., [3, 8, 21, 89]]
    torch.testing.assert_close(again(ids).logits[..., [3, 8, 21, 89]], want, rtol=0, atol=1e-5)


def test_wrong_counts_are_corrected_and_said(made, tmp_path, caplog):
    model, place = made
    config = {"medusa_num_heads": 5, "medusa_num_layers": 1}
    directory = write(tmp_path / "theirs", config, load_file(place / "heads" / HEADS_FILE), "medusa_lm_head.pt")
    same(model, MedusaModel.from_pretrained(directory, base_model_name_or_path=place / "backbone"))
    assert "config.json says medusa_num_heads 5, the tensors are of 2" in caplog.text
    assert "config.json says medusa_num_layers 1, the tensors are of 2" in caplog.text


def test_a_file_of_an_old_torch(made, tmp_path):
    model, place = made
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(ORIGINAL))
    tensors = load_file(place / "heads" / HEADS_FILE)
    torch.save(tensors, directory / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    same(model, MedusaModel.from_pretrained(directory, base_model_name_or_path=place / "backbone"))


def test_resblocks_without_a_bias(made, tmp_path):
    _model, place = made
    tensors = {k: v for k, v in load_file(place / "heads" / HEADS_FILE).items() if "bias" not in k}
    directory = write(tmp_path / "theirs", ORIGINAL, tensors, "medusa_lm_head.pt")
    again = MedusaModel.from_pretrained(directory, base_model_name_or_path=place / "backbone")
    for name, tensor in again.medusa_heads.state_dict().items():
        assert torch.equal(tensor, tensors[name] if name in tensors else torch.zeros(32)), name


class Planted:
    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


def test_refused(made, tmp_path, monkeypatch):
    _model, place = made
    monkeypatch.chdir(tmp_path)
    tensors = load_file(place / "heads" / HEADS_FILE)

    def says(name, config, tensors, file, message):
        with pytest.raises(BadInput, match=message):
            MedusaModel.from_pretrained(write(tmp_path / name, config, tensors, file), place / "backbone")

    half = {name: tensor for name, tensor in tensors.items() if name != "1.1.linear.bias"}
    says("lacks", ORIGINAL, half, "medusa_lm_head.pt", r"lacks tensor 1\.1\.linear\.bias")
    more = tensors | {"0.table": torch.zeros(90, 5)}
    says("extra", ORIGINAL, more, "medusa_lm_head.pt", r"a tensor 0\.table that no known kind of heads has")
    nan = tensors | {"0.2.weight": torch.full((90, 32), torch.nan)}
    says("nan", ORIGINAL, nan, "medusa_lm_head.pt", r"0\.2\.weight holds NaN")
    shape = tensors | {"1.0.linear.weight": torch.zeros(31, 32)}
    says("shape", ORIGINAL, shape, "medusa_lm_head.pt", r"1\.0\.linear\.weight has shape \[31, 32\]")
    no_code, no_tensors = "would run code", "something else than named tensors"
    for name, content, message in (("code", Planted(), no_code), ("list", [1, 2], no_tensors)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        torch.save(content, tmp_path / name / "medusa_lm_head.pt")
        with pytest.raises(BadInput, match=message):
            MedusaModel.from_pretrained(tmp_path / name, place / "backbone")
    assert not (tmp_path / "planted").exists()
    (tmp_path / "code" / "medusa_lm_head.pt").write_bytes(b"PK")
    with pytest.raises(BadInput, match=r"medusa_lm_head\.pt is damaged"):
        find_heads(tmp_path / "code")
    two = tensors | {"1.3.weight": torch.zeros(90, 32)}
    says("two", ORIGINAL, two, "medusa_lm_head.pt", r"head 1 has two projections")
    flat = tensors | {"0.2.weight": torch.zeros(90 * 32)}
    says("flat", ORIGINAL | {"medusa": [1]}, flat, "medusa_lm_head.pt", "a weight is not a matrix")
    for numbers, message in (([3, 8, 90], "outside of the 90"), ([*range(89), 88], "but not each once")):
        drafted = tensors | {"token_map": torch.tensor(numbers)}
        says(f"map-{len(numbers)}", ORIGINAL | {"vocab_size": 90}, drafted, "medusa_lm_head.pt", message)
    says("map-alone", ORIGINAL, {"token_map": torch.arange(3)}, "medusa_lm_head.pt", "no heads")
    with pytest.raises(BadInput, match="names no backbone"):
        MedusaModel.from_pretrained(write(tmp_path / "bare", ORIGINAL, tensors, "medusa_lm_head.pt"))
    with pytest.raises(BadInput, match=r"hf download .*medusa-vicuna-7b-v1\.3 --local-dir"):
        find_heads("FasterDecoding/medusa-vicuna-7b-v1.3")
    assert recognise(place / "backbone", {}) is None
