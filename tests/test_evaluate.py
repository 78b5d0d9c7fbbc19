"""evaluate.py: reads what training leaves behind, and prints, draws and writes what decoding/accuracy.py finds."""

import json
import logging
import os
import sys

import pytest
import torch
from conftest import make_conversations, make_tokenizer, randomise, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import evaluate
from common.errors import BadInput
from conversations.template import ChatTemplate
from medusa_model import MedusaConfig, MedusaModel

HEADS = 3
ENDS = list(range(1, 320, 24))  # a random model hardly ever says one given token, so many end an answer


def test_prompts_end_where_the_first_answer_begins(caplog):
    tokenizer = make_tokenizer("chatml")
    user, assistant = ({"role": role, "content": role[0]} for role in ("user", "assistant"))
    system, long = {"role": "system", "content": "warm"}, {"role": "user", "content": "bread " * 50}
    chats = [[user, assistant, user, assistant], [system, user, assistant], [long, assistant]]
    chats, chat = [{"messages": turns} for turns in chats], ChatTemplate(tokenizer)
    prompts = evaluate.first_prompts(chats, chat, 10**6)
    start = "<|im_start|>"
    assert [tokenizer.decode(prompt).replace(start + " ", start) for prompt in prompts[:2]] == [
        f"{start}user\nu<|im_end|>\n{start}assistant\n",
        f"{start}system\nwarm<|im_end|>\n{start}user\nu<|im_end|>\n{start}assistant\n",
    ]
    assert len(prompts) == 3 and not caplog.records
    assert evaluate.first_prompts(chats, chat, len(prompts[1])) == prompts[:2]
    (record,) = caplog.records
    assert f"left out 1 of 3 prompts, longer than {len(prompts[1])} tokens" in record.getMessage()


def test_a_prompt_that_the_template_refuses_is_left_out(caplog):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}the moon"
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    chats = [[{"role": "system", "content": "s"}, user, assistant], [user, assistant]]
    (prompt,) = evaluate.first_prompts([{"messages": turns} for turns in chats], ChatTemplate(tokenizer), 100)
    assert tokenizer.decode(prompt) == "the moon"
    assert "left out 1 of 2 prompts" in caplog.text


@pytest.fixture(params=["stage1", "stage2", "untrained", "few_tokens", "hydra"])
def heads_dir(request, model_dir, tmp_path):
    """What train.py leaves behind: heads (and the backbone, in stage 2) and the tokenizer."""
    GenerationConfig(eos_token_id=ENDS).save_pretrained(model_dir)
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir),
        MedusaConfig(medusa_num_heads=HEADS, medusa_head_type="hydra" if request.param == "hydra" else "medusa"),
        token_map=torch.arange(1, 320, 4) if request.param == "few_tokens" else None,
    )
    if request.param != "untrained":
        randomise(model.medusa_heads)
    if request.param != "stage2":
        model.freeze_backbone()
    directory = tmp_path / request.param
    model.save_pretrained(directory)
    make_tokenizer("llama3").save_pretrained(directory)
    return directory


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--max_new_tokens", "0", *map(str, argv)])
    evaluate.main()


def cells(text):
    """The rows of the Markdown tables in a text, without their headers."""
    tables = [part.split("\n")[2:] for part in text.strip().split("\n\n")]
    return [[line.strip("| ").split(" | ") for line in table] for table in tables]


def test_main_prints_the_table_and_writes_the_figures(heads_dir, data_file, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "new" / "figures.json"
    run(monkeypatch, heads_dir, "--data_path", data_file, "--output_json", figures)
    result = json.loads(figures.read_text())
    # the saved heads were read, not untrained ones made
    assert (result["top"][1:] != result["before"][1:]) == (heads_dir.name != "untrained")
    assert (result["heads"], result["data_path"]) == (str(evaluate.find_heads(heads_dir)[0]), data_file)
    assert "own" not in result  # --max_new_tokens 0
    (table,) = cells(capsys.readouterr().out)
    assert [line[0] for line in table] == ["lm_head", "head 1", "head 2", "head 3"]
    for k, (_, rows, *shares) in enumerate(table):
        top, before = result["top"][k], result["before"][k]
        assert int(rows) == result["rows"][k] > 0
        assert shares == [f"{share:.3f}" for share in (before[0], top[0], before[4], top[4], top[9])]
    assert sorted(path.name for path in figures.parent.iterdir()) == ["figures.json", "figures.png"]


def test_own_text_is_what_the_backbone_says(heads_dir, data_file, monkeypatch, capsys, caplog):
    """Against transformers' generate, one prompt after the other."""
    backbone = AutoModelForCausalLM.from_pretrained(
        heads_dir if heads_dir.name == "stage2" else heads_dir / "../backbone"
    )
    tokenizer, tokens, cut = AutoTokenizer.from_pretrained(heads_dir), [], 0
    chats = make_conversations(48)[-12:]
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat["messages"][:1], add_generation_prompt=True)["input_ids"]
        ids, flags = torch.tensor([prompt]), {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
        out = backbone.generate(ids, attention_mask=torch.ones_like(ids), **flags)
        tokens.append(out.shape[1] - len(prompt))
        cut += tokens[-1] == 20
    assert 0 < cut < 12  # answers end in both ways
    with caplog.at_level(logging.INFO):
        flags = ("--data_path", data_file, "--eval_holdout", 12, "--dtype", "float32", "--max_new_tokens", 20)
        run(monkeypatch, heads_dir, *flags, "--adaptive", 3)
    assert "left out" not in caplog.text
    result = json.loads((heads_dir / "accuracy.json").read_text())
    assert result.keys() == {"heads", "data_path", "rows", "top", "before", "own"}
    found = result["own"]
    assert found.keys() == {"conversations", "max_new_tokens", "rows", "top", "acceptance", "temperature"}
    assert found["conversations"] == 12
    assert found["rows"] == [sum(max(0, n - k) for n in tokens) for k in range(HEADS + 1)]
    assert found["top"][0][0] == 1  # the backbone's own words, greedily
    sizes = [row["nodes"] for row in found["acceptance"] if row["tree"] == "adaptive"]
    assert sizes == [4, 8, 16, 21]  # 3 candidates of head 1, 9 of each other
    fixed = len(found["acceptance"]) - 4
    assert [row["tree"] for row in found["acceptance"]] == ["chain", *["best"] * (fixed - 1), *["adaptive"] * 4]
    assert found["acceptance"][0]["nodes"] == HEADS
    _, words, trees = cells(capsys.readouterr().out)
    for k, line in enumerate(words):
        top = found["top"][k]
        shares = [f"{top[rank]:.3f}" for rank in (0, 4, 9)]
        assert line == ["lm_head" if k == 0 else f"head {k}", str(found["rows"][k]), *shares]
    shown = [(row["tree"], row["nodes"], row["length"], row["expected"]) for row in found["acceptance"]]
    assert trees == [[tree, str(n), f"{length:.3f}", f"{expected:.3f}"] for tree, n, length, expected in shown]
    assert (heads_dir / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(heads_dir.glob("*.tmp"))


@pytest.mark.parametrize("heads_dir", ["stage1"], indirect=True)
def test_prompts_that_leave_no_room_for_an_answer(heads_dir, data_file, monkeypatch, capsys, caplog):
    """The backbone reads 256 tokens."""
    run(monkeypatch, heads_dir, "--data_path", data_file, "--max_new_tokens", 250)
    assert "left out 48 of 48 prompts, longer than 6 tokens" in caplog.text
    assert "own" not in json.loads((heads_dir / "accuracy.json").read_text())
    assert len(cells(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("heads_dir", ["stage1"], indirect=True)
def test_without_matplotlib_only_the_picture_is_missing(heads_dir, data_file, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(monkeypatch, heads_dir, "--data_path", data_file)
    assert "requirements-dev.txt" in caplog.text
    assert (heads_dir / "accuracy.json").is_file() and not (heads_dir / "accuracy.png").exists()


@pytest.mark.parametrize("flags", [("--max_new_tokens", -1), ("--batch_size", 0), ("--adaptive", -1)])
def test_flags_that_mean_nothing(flags, monkeypatch):
    with pytest.raises(BadInput, match=flags[0]):
        run(monkeypatch, "heads", "--data_path", "chats.jsonl", *flags)


@pytest.mark.parametrize("heads_dir", ["stage1"], indirect=True)
def test_a_directory_that_cannot_be_written_is_noticed_first(heads_dir, monkeypatch):
    monkeypatch.setattr("common.files.os.fsync", lambda descriptor: os.write(-1, b""))
    with pytest.raises(BadInput, match=rf"--output_json {heads_dir}: cannot write into"):
        run(monkeypatch, heads_dir, "--data_path", "missing.jsonl")


def test_holdout_is_the_end_of_the_file(heads_dir, tmp_path, monkeypatch):
    chats, results = make_conversations(20), []
    for name, records, more in (("all", chats, ["--eval_holdout", 8]), ("last", chats[-8:], [])):
        data, figures = write_jsonl(tmp_path / f"{name}.jsonl", records), tmp_path / f"{name}.json"
        run(monkeypatch, heads_dir, "--data_path", data, "--output_json", figures, *more)
        results.append(json.loads(figures.read_text()) | {"data_path": None})
    assert results[0] == results[1]


def test_a_backbone_that_has_moved(heads_dir, model_dir, data_file, tmp_path, monkeypatch, capsys):
    moved = (tmp_path / "backbone").rename(tmp_path / "moved")
    if heads_dir.name != "stage2":
        with pytest.raises(BadInput, match=model_dir):
            run(monkeypatch, heads_dir, "--data_path", data_file)
    run(monkeypatch, heads_dir, "--data_path", data_file, "--base_model", moved)
    assert "| head 3 |" in capsys.readouterr().out


def test_a_directory_without_heads(model_dir, data_file, monkeypatch):
    with pytest.raises(BadInput, match=f"no Medusa heads in {model_dir}"):
        run(monkeypatch, model_dir, "--data_path", data_file)
