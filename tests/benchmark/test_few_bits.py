"""benchmark/few_bits.py on a CPU: a row for each combination, and a model's own figures."""

import math
import sys

import few_bits
import pytest
import setting
import torch
from conftest import make_conversations, write_jsonl
from csvs import rows_of
from quantised import needs
from transformers import AutoModelForCausalLM

from model.backbone import load_backbone

BOTH = [pytest.param("int8", marks=needs("torchao")), pytest.param("nf4", marks=needs("bitsandbytes"))]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the script -> its rows."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(*flags):
        out = tmp_path / "few_bits.csv"
        monkeypatch.setattr(sys, "argv", ["few_bits.py", "--out", str(out), *map(str, flags)])
        few_bits.main()
        return rows_of(out)

    return run


@pytest.mark.parametrize("kind", BOTH)
def test_random_weights_are_quantised_as_a_checkpoint_s_are(kind, model_dir):
    """Bit for bit, or the figures would be of something else than train.py does."""
    read = load_backbone(model_dir, bits=kind, dtype=torch.bfloat16)
    made = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(read.device)
    setting.quantise(made, kind)
    ids = torch.randint(0, 320, (2, 24), device=read.device)
    with torch.no_grad():
        assert torch.equal(made(ids).logits, read(ids).logits)


@pytest.mark.parametrize("kind", BOTH)
def test_a_row_for_each_combination(kind, bench):
    optims = ("adamw_torch:float32", "muon:float32", "adafactor:bfloat16")
    rows = bench("--smoke", "--kinds", kind, "bfloat16", "--optims", *optims, "--steps", 2, "--warmup", 1)
    assert [(row["backbone"], row["optim"]) for row in rows] == [
        (kind, optims[0]), ("bfloat16", optims[0]), (kind, optims[1]), (kind, optims[2])
    ]  # fmt: skip
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    first = [(row["first_loss"], row["grad_norm"]) for row in rows]
    assert first[0] == first[2] and first[0] != first[1]  # the same backbone, before anything was learnt


@pytest.mark.parametrize("kind", BOTH)
def test_what_a_model_says_in_few_bits(kind, bench, model_dir, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", make_conversations(12))
    whole, few = bench("--model", model_dir, "--data_path", data, "--kinds", kind)
    assert (whole["backbone"], few["backbone"]) == ("bfloat16", kind) and whole["rows"] == few["rows"]
    assert float(whole["agreement"]) == 1 and 0 < float(few["agreement"]) < 1
    assert float(few["perplexity"]) != float(whole["perplexity"]) > math.exp(2)


def test_what_cannot_work_is_refused(bench, capsys):
    for flags, sentence in (
        (("--model", "m"), "--model and --data_path go together"),
        (("--optims", "muon"), "each is name:dtype"),
    ):
        with pytest.raises(SystemExit):
            bench(*flags)
        assert sentence in capsys.readouterr().err
