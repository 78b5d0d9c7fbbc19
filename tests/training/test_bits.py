"""--backbone_dtype: a run over a backbone in few bits is the run over its weights made whole; resuming; what the other
scripts do with it; what is refused."""

import json

import pytest
import torch
from conftest import assert_same, logged, make_tokenizer, weights
from distilling import records
from quantised import needs, whole

import evaluate
import generate
from common.errors import BadInput
from model.backbone import load_backbone

pytest_plugins = ("distilling",)

KINDS = [pytest.param("int8", marks=needs("torchao")), pytest.param("nf4", marks=needs("bitsandbytes"))]
FLAGS = ("--medusa_only_heads", True, "--optim", "sgd", "--max_steps", 3, "--learning_rate", 0.1)


@pytest.fixture
def made_whole(model_dir, tmp_path):
    """-> the directory of a model whose weights are those of `model_dir` in few bits, made whole."""

    def make(kind) -> str:
        plain = load_backbone(model_dir, dtype=torch.float32)
        plain.load_state_dict(whole(load_backbone(model_dir, bits=kind, dtype=torch.float32), plain))
        plain.save_pretrained(tmp_path / f"whole-{kind}")
        make_tokenizer("llama3").save_pretrained(tmp_path / f"whole-{kind}")
        return str(tmp_path / f"whole-{kind}")

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [(), ("--medusa_loss", "kl"), ("--medusa_head_type", "hydra", "--packing", True)])
def test_a_run_is_the_one_over_whole_weights(kind, flags, train, made_whole):
    few = train(*FLAGS, *flags, "--backbone_dtype", kind, output="few")
    plain = train(*FLAGS, *flags, "--model_name_or_path", made_whole(kind), output="plain")
    assert logged(few) == pytest.approx(logged(plain), rel=1e-5)
    assert_same(weights(few), weights(plain), rtol=0, atol=1e-5)
    other = train(*FLAGS, *flags, output="other")
    assert logged(few) != pytest.approx(logged(other), rel=1e-4)
    assert not list(few.glob("model*.safetensors"))  # heads alone are left


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_one_that_never_stopped(kind, train):
    flags = ("--medusa_only_heads", True, "--backbone_dtype", kind, "--save_steps", 2, "--bf16", True)
    flags += ("--lr_scheduler_type", "constant")
    want = train(*flags, "--max_steps", 4, output="whole")
    first = train(*flags, "--max_steps", 2, output="cut")
    again = train(*flags, "--max_steps", 4, "--resume_from_checkpoint", True, output="cut")
    assert first == again and logged(again)[-2:] == logged(want)[-2:]
    assert_same(weights(again), weights(want))
    with pytest.raises(BadInput, match=f"backbone_dtype.*{kind}"):
        train(*flags, "--backbone_dtype", None, "--max_steps", 6, "--resume_from_checkpoint", True, output="cut")


@needs("bitsandbytes")
def test_a_checkpoint_that_is_quantised_already(train, model_dir, tmp_path):
    load_backbone(model_dir, bits="nf4", dtype=torch.float32).save_pretrained(tmp_path / "nf4")
    make_tokenizer("llama3").save_pretrained(tmp_path / "nf4")
    few = train(*FLAGS, "--backbone_dtype", "nf4", output="few")
    read = train(*FLAGS, "--model_name_or_path", tmp_path / "nf4", output="read")
    assert logged(few) == logged(read)
    heads = {name: tensor for name, tensor in weights(read).items()}
    assert_same(weights(few), heads)
    with pytest.raises(BadInput, match=r"quantised by bitsandbytes, and such weights do not train: .*stage 1"):
        train("--model_name_or_path", tmp_path / "nf4", "--max_steps", 1, output="stage2")


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_a_backbone_in_few_bits_stored(kind, train, store, made_whole):
    states = store("--backbone_dtype", kind, "--dtype", "float32")
    stored = train(*FLAGS, "--states_path", states, "--data_path", None, output="stored")
    assert logged(stored) == pytest.approx(logged(train(*FLAGS, "--backbone_dtype", kind, output="few")), rel=1e-5)
    assert json.loads((states / "index.json").read_text())["backbone_dtype"] == kind
    with pytest.raises(BadInput, match="begun with another --backbone_dtype"):
        store("--dtype", "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_text_with_heads_is_that_of_the_backbone_in_few_bits(kind, train, made_whole, tmp_path, monkeypatch):
    """Trained over it and decoded with it, heads change no token; and it is the text of its weights made whole."""
    out = train(*FLAGS, "--backbone_dtype", kind)
    texts = []
    for more in (("--backbone_dtype", kind), ("--base_model", made_whole(kind))):
        figures = tmp_path / "figures.json"
        argv = [out, "--prompt", "why is the moon cold", "--max_new_tokens", 24, "--nodes", 5, "--compare", *more]
        monkeypatch.setattr("sys.argv", ["generate.py", *map(str, argv), "--output_json", str(figures)])
        generate.main()
        found = json.loads(figures.read_text())
        assert found["identical"] == 1 and found["heads"]["passes"] > 0
        texts.append(found["answers"])
    assert texts[0] == texts[1] and texts[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_accuracies_are_those_over_whole_weights(kind, train, made_whole, data_file, tmp_path, monkeypatch):
    out, results = train(*FLAGS, "--backbone_dtype", kind), []
    for more in (("--backbone_dtype", kind), ("--base_model", made_whole(kind)), ()):
        argv = [out, "--data_path", data_file, "--max_new_tokens", 0, "--dtype", "float32", *more]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv), "--output_json", str(tmp_path / "a.json")])
        evaluate.main()
        results.append(json.loads((tmp_path / "a.json").read_text()))
    assert results[0]["top"] == results[1]["top"] != results[2]["top"]


@needs("bitsandbytes")
def test_answers_are_those_of_the_backbone_in_few_bits(ask, chat_dir, tmp_path):
    few = records(ask("few.jsonl", backbone_dtype="nf4"))
    plain = load_backbone(str(chat_dir), dtype=torch.bfloat16)
    plain.load_state_dict(whole(load_backbone(str(chat_dir), bits="nf4", dtype=torch.bfloat16), plain))
    plain.save_pretrained(tmp_path / "whole")
    make_tokenizer("llama3").save_pretrained(tmp_path / "whole")
    assert few == records(ask("whole.jsonl", model=tmp_path / "whole")) != records(ask("bf16.jsonl"))
    with pytest.raises(BadInput, match="made with backbone_dtype nf4, not None"):
        ask("few.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_weights_in_few_bits(kind, train, made_whole):
    """Stage 2 by LoRA: gradients go through the frozen weights, which are those that were made whole."""
    flags = ("--lora_rank", 4, "--preserve_coefficient", 2, *FLAGS[2:])
    few = train(*flags, "--backbone_dtype", kind, output="few")
    plain = train(*flags, "--model_name_or_path", made_whole(kind), output="plain")
    assert logged(few) == pytest.approx(logged(plain), rel=1e-5)
    assert_same(weights(few), weights(plain), rtol=0, atol=1e-5)
    assert any("lora_B" in name and tensor.any() for name, tensor in weights(few).items())
