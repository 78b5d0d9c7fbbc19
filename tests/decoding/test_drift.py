"""Is a trained backbone still what it was? The figures, counted one token after the other, and whole runs."""

import json
import math

import pytest
import torch
from conftest import make_backbone, make_tokenizer, randomise
from transformers import GenerationConfig

import evaluate
from common.errors import BadInput
from conversations.batches import Collator
from conversations.targets import IGNORE
from decoding.drift import Asked, distinct, original_of, own_drift, reference_drift, repetition, verdict
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import load_backbone
from model.lora import add_lora

ENDS = list(range(1, 320, 24))  # a random model hardly ever says one given token, so many end an answer


def two_models() -> tuple[MedusaModel, MedusaModel]:
    model = MedusaModel.from_backbone(make_backbone(), MedusaConfig(medusa_num_heads=1)).eval()
    return model, original_of(make_backbone(), model)


def test_reference_is_what_is_counted_by_hand():
    model, original = two_models()
    ids = torch.randint(320, (2, 12))
    batch = {"input_ids": ids, "labels": torch.where(torch.rand(2, 12) < 0.7, ids, IGNORE)}
    batch["labels"][0, 3:6] = model.backbone(ids).logits.argmax(-1)[0, 2:5]  # so that some are right
    found = reference_drift(model, original, [batch])
    for end, m in (("", model), ("_original", original)):
        logp, losses, right = m.backbone(ids).logits.log_softmax(-1), [], 0
        for b in range(2):
            for t in range(11):
                if (target := batch["labels"][b, t + 1]) != IGNORE:
                    losses.append(-logp[b, t, target].item())
                    right += int(logp[b, t].argmax() == target)
        assert found["rows"] == len(losses)
        assert found[f"perplexity{end}"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert found[f"top1{end}"] == pytest.approx(right / len(losses))
    assert found["top1"] > found["top1_original"]


def test_kl_is_what_is_counted_by_hand():
    model, original = two_models()
    asked = Asked([[5, 6, 7], [8, 9]], [[1, 2, 3], [4, 5, 6, 7]])
    each = []
    for prompt, answer in zip(*asked, strict=True):
        p, q = (m.backbone(torch.tensor([prompt + answer])).logits[0].log_softmax(-1) for m in (original, model))
        kl = (p.exp() * (p - q)).sum(-1)
        each += kl[len(prompt) - 1 : -1].tolist()
    assert len(each) == 7
    found = own_drift(model, original, asked, Collator(pad_token_id=0), 2)
    assert found == pytest.approx(sum(each) / 7, rel=1e-4)
    assert own_drift(model, model, asked, Collator(pad_token_id=0), 1) == pytest.approx(0, abs=1e-6)


def test_repeated_4_grams():
    assert distinct([1, 2, 3, 4, 1, 2, 3, 4, 1]) == 4 / 6
    assert distinct([1, 2, 3, 4]) == 1 and distinct([1, 2, 3]) is None
    found = repetition([[1] * 8, [1, 2, 3, 4, 5], [1]], [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 2, 3, 4]])
    # 1 in 5 and 1 in 1, against 1 in 1 and 1 in 2; the third has none. The differences are -.8 and .5.
    assert found["distinct_4"] == pytest.approx(0.6) and found["distinct_4_original"] == pytest.approx(0.75)
    assert found["noise"] == pytest.approx(0.65)
    assert repetition([[1]], [[1, 2, 3, 4]]) == {}


@pytest.mark.parametrize(
    ("now", "repeats", "text"),
    [
        (
            0.656,
            (0.90, 0.91, 0.01),
            "still the original: its lm_head is as often right, and it repeats itself no",
        ),
        (0.654, (0.90, 0.91, 0.01), "no longer the original: its lm_head is right 0.004 less often"),
        (0.700, (0.88, 0.91, 0.01), "no longer the original: it repeats itself more"),
        (0.600, (0.88, 0.91, 0.01), "right 0.058 less often and it repeats itself more"),
        (0.656, None, "still the original: its lm_head is as often right"),
    ],
)
def test_the_verdict(now, repeats, text):
    found = {"top1": now, "top1_original": 0.658}
    if repeats:
        found |= {"kl": 0.012} | dict(zip(("distinct_4", "distinct_4_original", "noise"), repeats, strict=True))
    said = verdict(found)
    assert text in said and "\n" not in said
    assert said.endswith(" (KL 0.012 a token)") == bool(repeats)


@pytest.fixture
def adapted(model_dir, tmp_path):
    """Heads beside an adapter."""
    GenerationConfig(eos_token_id=ENDS).save_pretrained(model_dir)
    model = MedusaModel.from_backbone(load_backbone(model_dir), MedusaConfig(medusa_num_heads=2))
    randomise(model.medusa_heads)
    add_lora(model.backbone, 4, 8)
    model.save_pretrained(tmp_path / "adapted")
    make_tokenizer("llama3").save_pretrained(tmp_path / "adapted")
    return model, tmp_path / "adapted"


def run(monkeypatch, *argv):
    words = ["evaluate.py", *argv, "--max_new_tokens", 12, "--dtype", "float32", "--eval_holdout", 8]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    evaluate.main()


def test_an_adapter_is_compared_with_its_model(adapted, model_dir, data_file, tmp_path, monkeypatch, capsys):
    model, directory = adapted
    run(monkeypatch, directory, "--data_path", data_file)  # an adapter that is not trained yet
    found = json.loads((directory / "accuracy.json").read_text())["drift"]
    assert found["top1"] == found["top1_original"] and abs(found["kl"]) < 1e-6 and found["noise"] == 0
    assert "\nstill the original: " in capsys.readouterr().out
    randomise(model.backbone.model.layers[1].mlp.up_proj.lora_B)
    model.save_pretrained(directory)
    run(monkeypatch, directory, "--data_path", data_file)
    changed = json.loads((directory / "accuracy.json").read_text())["drift"]
    assert changed["kl"] > 0.01 and changed["perplexity"] != changed["perplexity_original"]
    assert changed["perplexity_original"] == found["perplexity"]
    shown = capsys.readouterr().out
    assert f"| original | {changed['top1_original']:.3f} | {changed['perplexity_original']:.3f} | " in shown
    assert shown.strip().endswith(changed["verdict"])
    moved = (tmp_path / "backbone").rename(tmp_path / "moved")
    run(monkeypatch, directory, "--data_path", data_file, "--base_model", moved)
    assert json.loads((directory / "accuracy.json").read_text())["drift"] == changed


def test_a_full_stage_2_is_compared_on_request(model_dir, data_file, tmp_path, monkeypatch):
    GenerationConfig(eos_token_id=ENDS).save_pretrained(model_dir)
    model = MedusaModel.from_backbone(load_backbone(model_dir), MedusaConfig(medusa_num_heads=2))
    with torch.no_grad():
        model.lm_head.weight[:160] += 0.3
    model.save_pretrained(tmp_path / "out")
    make_tokenizer("llama3").save_pretrained(tmp_path / "out")
    run(monkeypatch, tmp_path / "out", "--data_path", data_file)
    assert "drift" not in json.loads((tmp_path / "out" / "accuracy.json").read_text())
    run(monkeypatch, tmp_path / "out", "--data_path", data_file, "--original", model_dir)
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["drift"]["kl"] > 0.001


def test_refused(model_dir, data_file, tmp_path, monkeypatch):
    model = MedusaModel.from_backbone(load_backbone(model_dir), MedusaConfig(medusa_num_heads=2))
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    with pytest.raises(BadInput, match="is of stage 1, whose backbone is what it was"):
        run(monkeypatch, tmp_path / "heads", "--data_path", data_file, "--original", model_dir)
    with pytest.raises(BadInput, match="it is not the model that this one was trained from"):
        original_of(make_backbone(hidden_size=16), model)
