"""export.py: each engine finds its own names, files and keys, and what it cannot load is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same, make_tokenizer, randomise, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model import engines
from model.heads_file import HEADS_FILE

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
BLOCK = {"weight": "0.0.linear.weight", "bias": "0.0.linear.bias"}


@pytest.fixture
def heads(model_dir, tmp_path):
    """-> a function that writes heads over `model_dir` and returns their directory."""

    def write(layers=1, kind="medusa", token_map=None, name="heads"):
        backbone = AutoModelForCausalLM.from_pretrained(model_dir)
        config = MedusaConfig(medusa_num_heads=2, medusa_num_layers=layers, medusa_head_type=kind)
        model = MedusaModel.from_backbone(backbone, config, token_map=token_map)
        randomise(model.medusa_heads)
        model.freeze_backbone()
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(heads, to, *flags):
        output = tmp_path / f"to-{to}"
        argv = ["export.py", heads, "--to", to, "--output", output, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        export.main()
        return output

    return run


def read(directory, file) -> dict:
    path = directory / file
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("to", "file", "names", "keys", "command"),
    [
        (
            "vllm",
            "model.safetensors",
            {"1.0.linear.weight": "blocks.1.layers.0.weight", "1.0.linear.bias": "blocks.1.layers.0.bias",
             "1.1.weight": "lm_heads.1.weight"},
            {"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": 32, "vocab_size": 320,
             "truncated_vocab_size": 320, "num_heads": 2, "num_hidden_layers": 1, "medusa_fc_bias": True,
             "original_lm_head": False},
            '"method": "medusa"',
        ),
        ("tgi", HEADS_FILE, {"1.1.weight": "1.1.weight"}, None, "text-generation-launcher --model-id"),
        ("original", "medusa_lm_head.pt", {"1.1.weight": "1.1.weight"}, None, "python -m medusa.inference.cli"),
        ("trtllm", "medusa_lm_head.pt", {"1.0.linear.bias": "1.0.linear.bias"}, None, "--num_medusa_heads 2"),
        ("mlc", "pytorch_model.bin", {"1.1.weight": "medusa_head.1.1.weight",
                                      "1.0.linear.bias": "medusa_head.1.0.linear.bias"},
         None, "mlc_llm convert_weight"),
    ],
)  # fmt: skip
def test_names_files_and_keys(to, file, names, keys, command, heads, run, model_dir, capsys):
    source = heads()
    out = run(source, to, "--verify")
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {file, "config.json"} | TOKENIZER
    mine, theirs = load_file(source / HEADS_FILE), read(out, file)
    assert len(theirs) == len(mine) == 6
    for ours, name in names.items():
        assert torch.equal(theirs[name], mine[ours])
    config = json.loads((out / "config.json").read_text())
    counts = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": model_dir}
    counts |= {"hidden_size": 32, "vocab_size": 320} | ({"num_medusa_heads": 2} if to == "trtllm" else {})
    assert config == (keys or counts)
    assert command in said and "differ by" in said and str(out) in said
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer("llama3").chat_template
    assert_same(MedusaModel.from_pretrained(out, model_dir).medusa_heads.state_dict(), mine)  # and back


def test_a_draft_vocabulary(heads, run, model_dir, caplog):
    source = heads(token_map=torch.tensor([3, 8, 21, 89]))
    out = run(source, "vllm", "--verify")
    tensors = load_file(out / "model.safetensors")
    assert tensors["token_map"].tolist() == [3, 8, 21, 89] and tensors["lm_heads.0.weight"].shape == (4, 32)
    config = json.loads((out / "config.json").read_text())
    assert config["truncated_vocab_size"] == 4 and config["vocab_size"] == 320
    assert "vLLM 0.29 to 0.32" in caplog.text
    assert MedusaModel.from_pretrained(out, model_dir).token_map.tolist() == [3, 8, 21, 89]
    for to in ("tgi", "original", "trtllm", "mlc"):
        with pytest.raises(BadInput, match=f"--to {to}: it has no reduced vocabulary"):
            run(source, to)


def test_dtype_and_base_model(heads, run):
    out = run(heads(layers=2), "tgi", "--dtype", "bfloat16", "--base_model", "org/name", "--verify")
    assert {tensor.dtype for tensor in load_file(out / HEADS_FILE).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["base_model_name_or_path"] == "org/name"


def test_refused_and_nothing_written(heads, run, tmp_path, monkeypatch):
    def says(message, *call):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BadInput, match=message):
            run(*call)
        assert sorted(tmp_path.rglob("*")) == before

    says("one ResBlock 2 times where these heads have 2", heads(layers=2, name="two"), "original")
    says("hydra heads can be decoded with this repository alone", heads(kind="hydra", name="hydra"), "vllm")
    plain = heads(name="plain")
    shared = {k: v for k, v in load_file(plain / HEADS_FILE).items() if "linear" in k}
    (tmp_path / "shared").mkdir()
    torch.save(shared, tmp_path / "shared" / "medusa_lm_head.pt")
    (tmp_path / "shared" / "config.json").write_text('{"base_model_name_or_path": "org/name"}')
    for to in ("tgi", "hub"):
        says("share the lm_head", tmp_path / "shared", to)
    says("belong to --to hub", plain, "vllm", "--repo_id", "a/b")
    says("--verify compares files of an engine", plain, "hub", "--verify")
    says("is no checkpoint of stage 2", plain, "hf")
    says("no Medusa heads", tmp_path, "tgi")
    run(plain, "tgi")
    says("is there and not empty", plain, "tgi")
    (tmp_path / "to-mlc").write_text("a file")
    says("is there and not empty", plain, "mlc")


def test_a_rope_that_the_original_does_not_know(heads, run, model_dir, tmp_path):
    source, path = heads(), Path(model_dir, "config.json")
    config = json.loads(path.read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    path.write_text(json.dumps(config | {"rope_parameters": rope | {"original_max_position_embeddings": 64}}))
    with pytest.raises(BadInput, match="no RoPE of type llama3"):
        run(source, "original")
    assert not (tmp_path / "to-original").exists()
    run(source, "tgi")


def test_a_dtype_that_cannot_hold_the_heads(heads, run, tmp_path):
    source = heads()
    tensors = load_file(source / HEADS_FILE)
    tensors["1.1.weight"][3, 4] = 1e5
    save_file(tensors, source / HEADS_FILE)
    with pytest.raises(BadInput, match=r"--dtype float16 cannot hold 1\.1\.weight"):
        run(source, "tgi", "--dtype", "float16")
    assert not (tmp_path / "to-tgi").exists()
    run(source, "tgi", "--dtype", "bfloat16")


def test_a_card_names_no_directory(heads, run, tmp_path):
    with pytest.raises(BadInput, match="a directory here: give --base_model NAME"):
        run(heads(), "hub")
    assert not (tmp_path / "to-hub").exists()


def test_verify_notices_other_heads(heads, run, monkeypatch, tmp_path):
    write = engines.write

    def spoil(engine, config, tensors, directory):
        write(engine, config, tensors | {"1.0.linear.bias": torch.zeros(32)}, directory)

    monkeypatch.setattr(engines, "write", spoil)
    with pytest.raises(BadInput, match="does not hold the same heads, and was removed"):
        run(heads(), "vllm", "--verify")
    assert not (tmp_path / "to-vllm").exists()


def test_a_card_for_the_hub(heads, run, monkeypatch, capsys):
    source = heads(kind="hydra")
    top = [[0.9] * 10, [0.61, 0.7, 0.8, 0.81, 0.82, *[0.9] * 5], [0.5] * 10]
    tree = {"tree": "best", "nodes": 32, "length": 2.8432, "expected": 2.9}
    (source / "accuracy.json").write_text(json.dumps({"own": {"top": top, "acceptance": [tree]}}))
    (source / "train_command.txt").write_text("train.py --medusa_head_type hydra\ncommit: abc\n")
    calls = []
    monkeypatch.setattr("model.card.HfApi.create_repo", lambda self, name, exist_ok: calls.append(name) or "URL")
    monkeypatch.setattr("model.card.HfApi.upload_folder", lambda self, **call: calls.append(call["folder_path"]))
    out = run(source, "hub", "--repo_id", "me/heads", "--licence", "apache-2.0", "--base_model", "org/name")
    assert calls == ["me/heads", out] and "uploaded to URL" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for words in (
        'base_model: "org/name"', 'license: "apache-2.0"', "2 heads (hydra) of 1 ResBlocks", "320 of 320 tokens",
        "| 1 | 0.610 | 0.820 |", "| best | 32 | 2.84 |", "train.py --medusa_head_type hydra\ncommit: abc",
    ):  # fmt: skip
        assert words in card, words
    assert (out / HEADS_FILE).is_file() and (out / "accuracy.json").is_file()
    assert json.loads((out / "config.json").read_text())["medusa_head_type"] == "hydra"

    def refuse(self, name, exist_ok):
        raise ValueError("401 Unauthorized")

    monkeypatch.setattr("model.card.HfApi.create_repo", refuse)
    out.rename(out.with_name("before"))
    with pytest.raises(BadInput, match=r"the upload failed \(401 Unauthorized\)"):
        run(source, "hub", "--repo_id", "me/heads", "--base_model", "org/name")


@pytest.mark.parametrize("flags", [(), ("--medusa_vocab_size", 40, "--medusa_head_type", "hydra")])
def test_a_checkpoint_of_stage_2_becomes_a_model(flags, train, run, tmp_path):
    """The last checkpoint is what the run saved at its end."""
    out = train("--medusa_only_heads", False, "--max_steps", 2, "--save_steps", 1, *flags)
    model = run(out / "checkpoint-2", "hf")
    assert_same(weights(model), weights(out))
    assert AutoTokenizer.from_pretrained(model).chat_template == make_tokenizer("llama3").chat_template
    run(out / "checkpoint-1", "hf", "--output", tmp_path / "first")
    first, last = (MedusaModel.from_pretrained(directory) for directory in (tmp_path / "first", out))
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight)


@pytest.fixture
def adapter(model_dir, tmp_path):
    """A directory with a random LoRA of `model_dir` and two heads. -> (the directory, the model with its adapter)"""
    from peft import LoraConfig, get_peft_model

    backbone = AutoModelForCausalLM.from_pretrained(model_dir)
    lora = get_peft_model(backbone, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lora.save_pretrained(tmp_path / "lora")
    plain = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=2)
    )
    randomise(plain.medusa_heads)
    plain.save_pretrained(tmp_path / "lora" / "medusa_heads", include_backbone=False)
    make_tokenizer("llama3").save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", lora, plain


def test_an_adapter_becomes_a_plain_model(adapter, run):
    directory, lora, plain = adapter
    ids = torch.arange(12)[None] + 3
    with torch.inference_mode():
        want = lora(ids).logits
        assert (want - plain(ids).logits[0]).abs().max() > 0.1
        again = MedusaModel.from_pretrained(directory)  # evaluate.py, generate.py and serve.py load it so
        torch.testing.assert_close(again(ids).logits[0], want, rtol=0, atol=1e-5)
        out = run(directory, "peft-merged")
        assert not (out / "adapter_config.json").exists()
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, want, rtol=0, atol=1e-5)
    assert_same(MedusaModel.from_pretrained(out).medusa_heads.state_dict(), plain.medusa_heads.state_dict())
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer("llama3").chat_template


def test_adapters_that_do_not_fit(adapter, run, heads, tmp_path, monkeypatch):
    directory, _, _ = adapter
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    with pytest.raises(BadInput, match="is no peft adapter"):
        run(heads(name="plain"), "peft-merged")
    for change, message in (
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"target_modules": ["no_such"]}, "does not fit to"),
        ({"r": 5}, "does not fit to"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=message):
            run(directory, "peft-merged")
    path.write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(BadInput, match="needs peft"):
            run(directory, "peft-merged")
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no adapter_model\.safetensors"):
        run(directory, "peft-merged")
    assert not (tmp_path / "to-peft-merged").exists()
