"""evaluate.py: the accuracies are those of a direct computation, and the script reads what training leaves behind."""

import json
import sys

import pytest
import torch
from conftest import make_backbone, make_conversations, make_tokenizer, randomise, write_jsonl
from transformers import AutoModelForCausalLM

import evaluate
from errors import BadInput
from medusa_loss import IGNORE
from medusa_model import MedusaConfig, MedusaModel

HEADS = 3


def quiet(batches, **_):
    return batches


def hits(logits, targets, n):
    """How many targets are among the n best tokens."""
    return (logits.topk(n).indices == targets[:, None]).any(1).sum().item()


def make_model(heads_std=None):
    """In float64, so that no two logits tie and no order of summation changes a rank."""
    model = MedusaModel.from_backbone(make_backbone().double(), MedusaConfig(medusa_num_heads=HEADS)).eval()
    if heads_std:
        randomise(model.medusa_heads, heads_std)
    return model


def make_batches():
    """Three batches of uneven length; about a third of the labels do not count."""
    ids = [torch.randint(320, (4, length)) for length in (8, 24, 40)]
    return [{"input_ids": i, "labels": i.masked_fill(torch.rand(i.shape) < 0.3, IGNORE)} for i in ids]


@pytest.mark.parametrize("rows", [0, 1, evaluate.ROWS, evaluate.ROWS + 188])
def test_rank_counts_are_top_k_accuracies(rows):
    projection = torch.randn(50, 16, dtype=torch.float64)
    hidden, targets = torch.randn(rows, 16, dtype=torch.float64), torch.randint(50, (rows,))
    counts = evaluate.rank_counts(lambda x: x @ projection.t(), hidden, targets)
    logits = hidden @ projection.t()
    assert counts.cumsum(0).tolist() == [hits(logits, targets, n) for n in range(1, evaluate.TOP + 1)]


def test_untrained_heads_are_what_they_were_before():
    result = evaluate.evaluate(make_model(), make_batches(), quiet)
    assert result["top"] == result["before"]
    assert all(before[-1] > 0 for before in result["before"])  # not equal because both are nothing


def test_equals_a_direct_computation():
    model, batches = make_model(heads_std=0.2), make_batches()
    result = evaluate.evaluate(model, batches, quiet)
    for k in range(HEADS + 1):
        guesses, copies, targets = [], [], []
        for batch in batches:
            logits, ahead = model(batch["input_ids"]).logits.detach()[:, :, : -(k + 1)], batch["labels"][:, k + 1 :]
            guesses.append(logits[k][ahead != IGNORE])
            copies.append(logits[0][ahead != IGNORE])
            targets.append(ahead[ahead != IGNORE])
        guesses, copies, targets = torch.cat(guesses), torch.cat(copies), torch.cat(targets)
        assert result["rows"][k] == len(targets) > 0
        for name, logits in (("top", guesses), ("before", copies)):
            want = [hits(logits, targets, n) / len(targets) for n in range(1, evaluate.TOP + 1)]
            assert result[name][k] == pytest.approx(want)
    assert result["top"][1:] != result["before"][1:]


@pytest.fixture(params=["stage1", "stage2"])
def heads_dir(request, model_dir, tmp_path):
    """What train.py leaves behind: heads (and the backbone, in stage 2) and the tokenizer."""
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=HEADS)
    )
    randomise(model.medusa_heads)
    if request.param == "stage1":
        model.freeze_backbone()
    directory = tmp_path / request.param
    model.save_pretrained(directory)
    make_tokenizer("llama3").save_pretrained(directory)
    return directory


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()


def test_main_prints_the_table_and_writes_the_figures(heads_dir, data_file, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    run(monkeypatch, heads_dir, "--data_path", data_file, "--output_json", figures)
    result = json.loads(figures.read_text())
    assert result["top"][1:] != result["before"][1:]  # the saved heads were read, not untrained ones made
    assert (result["heads"], result["data_path"]) == (str(evaluate.find_heads(heads_dir)[0]), data_file)
    lines = capsys.readouterr().out.strip().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| lm_head", "| head 1", "| head 2", "| head 3"]
    for k, line in enumerate(lines):
        rows, *shares = line.strip("| ").split(" | ")[1:]
        top, before = result["top"][k], result["before"][k]
        assert int(rows) == result["rows"][k] > 0
        assert shares == [f"{share:.3f}" for share in (before[0], top[0], before[4], top[4])]


def test_holdout_is_the_end_of_the_file(heads_dir, tmp_path, monkeypatch):
    chats, results = make_conversations(20), []
    for name, records, more in (("all", chats, ["--eval_holdout", 8]), ("last", chats[-8:], [])):
        data, figures = write_jsonl(tmp_path / f"{name}.jsonl", records), tmp_path / f"{name}.json"
        run(monkeypatch, heads_dir, "--data_path", data, "--output_json", figures, *more)
        results.append(json.loads(figures.read_text()) | {"data_path": None})
    assert results[0] == results[1]


def test_a_backbone_that_has_moved(heads_dir, model_dir, data_file, tmp_path, monkeypatch, capsys):
    moved = (tmp_path / "backbone").rename(tmp_path / "moved")
    if heads_dir.name == "stage1":
        with pytest.raises(BadInput, match=model_dir):
            run(monkeypatch, heads_dir, "--data_path", data_file)
    run(monkeypatch, heads_dir, "--data_path", data_file, "--base_model", moved)
    assert "| head 3 |" in capsys.readouterr().out


def test_a_directory_without_heads(model_dir, data_file, monkeypatch):
    with pytest.raises(BadInput, match=f"no Medusa heads in {model_dir}"):
        run(monkeypatch, model_dir, "--data_path", data_file)


def test_of_tied_logits_the_first_token_is_the_guess():
    """As argmax does it; bf16 logits tie in one row of twenty."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    ranks = [evaluate.rank_counts(lambda _: logits, torch.zeros(1, 2), torch.tensor([t])).tolist() for t in range(4)]
    assert [rank.index(1) for rank in ranks] == [2, 0, 1, 3]
