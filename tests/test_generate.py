"""generate.py: what it prints is what was decoded, its flags change something, and bad input gets one sentence."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_backbone, make_tokenizer, randomise
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
from common.errors import BadInput
from conversations.prompts import question, tokenise
from conversations.template import ChatTemplate
from decoding import choosing
from medusa_model import MedusaConfig, MedusaModel
from model.heads_file import HEADS_FILE
from model.path_heads import HEAD_TYPES

HEADS = 3
PROMPTS = ["why is the moon cold", "how", "salt water and bread"]


@pytest.fixture(params=["stage1", "stage2", "few_tokens", "markov", "hydra"])
def heads_dir(request, model_dir, tmp_path):
    """What train.py leaves behind."""
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir),
        MedusaConfig(
            medusa_num_heads=HEADS, medusa_head_type=request.param if request.param in HEAD_TYPES else "medusa"
        ),
        token_map=torch.arange(1, 320, 4) if request.param == "few_tokens" else None,
    )
    randomise(model.medusa_heads, 0.05)
    model.backbone.generation_config.eos_token_id = make_tokenizer("llama3").eos_token_id
    if request.param != "stage2":
        model.freeze_backbone()
        model.backbone.save_pretrained(model_dir)
    directory = tmp_path / request.param
    model.save_pretrained(directory)
    make_tokenizer("llama3").save_pretrained(directory)
    return directory


@pytest.fixture
def stage1(tmp_path, model_dir):
    """Stage 1 alone, for what does not depend on the stage."""
    return heads_dir.__wrapped__(SimpleNamespace(param="stage1"), model_dir, tmp_path)


def run(monkeypatch, *argv) -> dict:
    figures = argv[0].parent / "figures.json"
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv), "--output_json", str(figures)])
    generate.main()
    return json.loads(figures.read_text())


def greedy(directory, prompt, max_new_tokens) -> str:
    """What transformers decodes with the backbone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backbone = MedusaModel.from_pretrained(directory).backbone
    ids = torch.tensor(tokenise([question(prompt)], ChatTemplate(tokenizer)))
    out = backbone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def write_accuracies(directory, share=0.9):
    """As evaluate.py leaves them: each head's best guess is nearly always right."""
    top = [[share + 0.01 * rank for rank in range(10)] for _ in range(HEADS + 1)]
    (directory / "accuracy.json").write_text(json.dumps({"top": top}))


def test_the_text_is_the_backbone_s(heads_dir, monkeypatch, capsys):
    tree = heads_dir.parent / "tree.json"
    tree.write_text("[[0], [1], [0, 0], [1, 0], [0, 0, 0]]")
    flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    want = [greedy(heads_dir, prompt, 12) for prompt in PROMPTS]
    streamed = run(monkeypatch, heads_dir, *flags, "--max_new_tokens", 12, "--tree", tree)
    printed = capsys.readouterr().out
    for text in want:
        assert text in printed
    together = run(monkeypatch, heads_dir, *flags, "--max_new_tokens", 12, "--tree", tree, "--batch_size", 2)
    assert streamed["answers"] == together["answers"] == want
    assert streamed["tree"] == [[0], [1], [0, 0], [1, 0], [0, 0, 0]]
    assert streamed["heads"]["tokens"] == together["heads"]["tokens"] > 0
    assert streamed["heads"]["tokens_per_pass"] == together["heads"]["tokens_per_pass"] >= 1


def test_compare_shows_both(stage1, monkeypatch, capsys):
    write_accuracies(stage1)
    result = run(monkeypatch, stage1, "--prompt", PROMPTS[0], "--max_new_tokens", 12, "--nodes", 6, "--compare")
    assert result["identical"] == 1
    assert result["plain"]["tokens_per_pass"] == 1
    assert result["speed_up"] == pytest.approx(result["heads"]["tokens_per_s"] / result["plain"]["tokens_per_s"])
    printed = capsys.readouterr().out
    assert "identical texts: 1 of 1" in printed
    assert f"speed-up: {result['speed_up']:.2f}" in printed
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 4
    assert len(result["tree"]) == 6
    depth = len(result["tree"][-1])
    assert f"{depth} head{'s' * (depth > 1)}, tree of 6" in printed


def test_a_tree_that_each_pass_grows(stage1, monkeypatch, capsys):
    """It needs no evaluate.py."""
    asked = ("--prompt", PROMPTS[0], "--max_new_tokens", 12, "--nodes", 6)
    result = run(monkeypatch, stage1, *asked, "--adaptive", 4, "--compare")
    assert result["identical"] == 1 and result["tree"] == {"nodes": 6, "beam": 4, "temperature": 1.0}
    assert "3 heads, adaptive tree of 6" in capsys.readouterr().out
    (stage1 / "accuracy.json").write_text(json.dumps({"own": {"temperature": 1.4}}))
    assert run(monkeypatch, stage1, *asked, "--adaptive", 4)["tree"]["temperature"] == 1.4
    with pytest.raises(BadInput, match="--adaptive 321: from 1 to 320, as many tokens as the heads guess"):
        run(monkeypatch, stage1, *asked, "--adaptive", 321)
    for temperature in (0, -1.5, "warm"):
        (stage1 / "accuracy.json").write_text(json.dumps({"own": {"temperature": temperature}}))
        with pytest.raises(BadInput, match=rf"temperature {temperature!r}, which must be a number above 0"):
            run(monkeypatch, stage1, *asked, "--adaptive", 4)


def test_groups_of_prompts_have_a_table(stage1, monkeypatch, capsys, tmp_path):
    write_accuracies(stage1)
    names, file = ("qa", "sums", "qa", None), tmp_path / "prompts.jsonl"
    records = [{"prompt": PROMPTS[i % 2] + " why" * i} | ({"group": n} if n else {}) for i, n in enumerate(names)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = ("--prompts", file, "--max_new_tokens", 12, "--nodes", 6, "--compare")
    result = run(monkeypatch, stage1, *asked)
    assert [(row["group"], row["prompts"], row["identical"]) for row in result["groups"]] == [
        ("qa", 2, 2), ("sums", 1, 1), ("other", 1, 1)
    ]  # fmt: skip
    assert "| group" in capsys.readouterr().out
    passes = [row["tokens per pass"] for row in result["groups"]]
    assert min(passes) <= result["heads"]["tokens_per_pass"] <= max(passes)
    one = run(monkeypatch, stage1, "--prompt", records[1]["prompt"], *asked[2:])
    assert one["heads"]["tokens_per_pass"] == passes[1] and "groups" not in one


def test_nodes_and_what_is_chosen_without(stage1, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = ("--prompt", PROMPTS[0], "--max_new_tokens", 4)
    assert run(monkeypatch, stage1, *asked)["tree"] == [[0], [0, 0], [0, 0, 0]]
    assert "a chain of 3 guesses instead of a tree (run evaluate.py first)" in caplog.text
    write_accuracies(stage1)
    assert len(run(monkeypatch, stage1, *asked, "--nodes", 5)["tree"]) == 5
    assert run(monkeypatch, stage1, *asked, "--nodes", 0)["tree"] == []
    # Where reading weights is all, the largest tree; where every token costs, a small one; where it costs more: none.
    for per_token, nodes in ((0.0, 63), (5.0, 4), (20.0, 0)):
        monkeypatch.setattr(
            generate.Decoder, "step_ms", lambda self, prompt, passes, cost=per_token: 10 + cost * self.nodes
        )
        assert len(run(monkeypatch, stage1, *asked)["tree"]) == nodes
    assert "no tree: the heads do not pay here" in caplog.text


def test_agree_is_for_all_decoders(stage1, monkeypatch):
    """Also for those that measure how long a pass takes; whether they can is theirs to say."""
    write_accuracies(stage1)
    make, agreed = generate.Decoder, []

    def spy(*args, agree, **kwargs):
        agreed.append(agree)
        return make(*args, **kwargs)

    monkeypatch.setattr(generate, "Decoder", spy)
    monkeypatch.setattr(choosing, "Decoder", spy)
    monkeypatch.setattr(make, "step_ms", lambda *args, **kwargs: 10)
    run(monkeypatch, stage1, "--prompt", PROMPTS[0], "--max_new_tokens", 2, "--agree", "--compare")
    assert agreed == [True] * (len(choosing.SIZES) + 2)


def test_sampling_follows_the_seed(stage1, monkeypatch):
    write_accuracies(stage1)
    asked = ("--prompt", PROMPTS[0], "--max_new_tokens", 20, "--nodes", 6, "--temperature", 1)
    answers = {
        name: run(monkeypatch, stage1, *asked, *more)["answers"]
        for name, more in {
            "0": ("--seed", 0), "0 again": ("--seed", 0), "1": ("--seed", 1),
            "typical": ("--acceptance", "typical"),
            "narrow": ("--acceptance", "typical", "--epsilon", 0.9, "--delta", 0.99),
            "strict": ("--acceptance", "typical", "--epsilon", 0.9, "--delta", 0.5),
        }.items()
    }  # fmt: skip
    assert answers["0"] == answers["0 again"]
    assert len({tuple(answers[name]) for name in ("0", "1", "typical", "narrow", "strict")}) >= 4


def test_prompts_from_a_file(stage1, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = ("--prompts", tmp_path / "prompts.txt", "--max_new_tokens", 3, "--nodes", 0)
    assert len(run(monkeypatch, stage1, *asked)["answers"]) == 3
    assert len(run(monkeypatch, stage1, *asked, "--limit", 2)["answers"]) == 2


def test_spec_bench(stage1, monkeypatch, tmp_path, capsys):
    questions = [
        {"category": group, "turns": [text]} for group, text in zip(("math", "qa", "qa"), PROMPTS, strict=True)
    ]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    found = run(monkeypatch, stage1, "--spec_bench", tmp_path / "question.jsonl", "--max_new_tokens", 6, "--nodes", 3)
    assert [(row["task"], row["questions"]) for row in found["spec_bench"]] == [
        ("mt_bench", 1),
        ("qa", 2),
        ("overall", 3),
    ]
    assert found["spec_bench"][-1]["mean accepted tokens"] == pytest.approx(found["heads"]["tokens_per_pass"])
    assert found["spec_bench"][-1]["speedup"] > 0 and found["identical"] == 3
    assert "| mt_bench | 1 |" in capsys.readouterr().out.replace("  ", " ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to decode"),
        (["--spec_bench", "a", "--prompt", "b"], "--spec_bench asks its own questions"),
        (["--spec_bench", "missing.jsonl"], "cannot read --spec_bench missing.jsonl"),
        (["--prompt", "b", "--prompt", "a " * 300], "prompt 2 has .* tokens, but there is room for 256"),
        (["--prompt", "a", "--limit", "0"], "--limit must be 1 or more"),
        (["--prompt", "a", "--tree", "deep.json"], "there are 3 heads"),
        (["--prompt", "a", "--tree", "missing.json"], "missing.json"),
        (["--prompt", "a", "--batch_size", "0"], "must be 1 or more"),
        (["--prompt", "a", "--nodes", "-1"], "0 or more"),
        (["--prompt", "a", "--adaptive", "4"], "--adaptive needs the number of guesses"),
        (["--prompt", "a", "--adaptive", "4", "--nodes", "0"], "--adaptive needs the number of guesses"),
        (["--prompt", "a", "--acceptance", "typical"], "needs a --temperature"),
        (
            ["--prompt", "a", "--acceptance", "typical", "--temperature", "1", "--delta", "1"],
            "--delta between 0 and 1",
        ),
        (["--prompt", "a", "--agree", "--temperature", "1"], "--agree needs --temperature 0"),
        (["--prompts", "missing.txt"], "cannot read the prompts in missing.txt"),
    ],
)
def test_bad_flags(flags, message, stage1, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    with pytest.raises(BadInput, match=message):
        run(monkeypatch, stage1, *flags)


def test_a_tree_or_its_size(stage1, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, stage1, "--prompt", "a", "--tree", "tree.json", "--nodes", 3)
    assert "not allowed with argument" in capsys.readouterr().err


def test_heads_that_cannot_be_used(stage1, model_dir, monkeypatch, tmp_path):
    asked = ("--prompt", "a", "--max_new_tokens", 2, "--nodes", 0)
    with pytest.raises(BadInput, match="there are no Medusa heads in"):
        run(monkeypatch, tmp_path / "backbone", *asked)
    make_backbone(vocab_size=330).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match=r"made for vocab_size 320, but the backbone .*other has 330"):
        run(monkeypatch, stage1, *asked, "--base_model", tmp_path / "other")
    make_backbone(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(BadInput, match=r"made for hidden_size 32, but the backbone .*wide has 64"):
        run(monkeypatch, stage1, *asked, "--base_model", tmp_path / "wide")
    write_accuracies(stage1)
    figures = json.loads((stage1 / "accuracy.json").read_text())
    (stage1 / "accuracy.json").write_text(json.dumps({"top": figures["top"][:2]}))
    with pytest.raises(BadInput, match=r"is of 1 heads, but there are 3: run evaluate.py again"):
        run(monkeypatch, stage1, "--prompt", "a", "--nodes", 2)
    tensors = load_file(stage1 / HEADS_FILE)
    tensors["1.0.linear.bias"][3] = torch.nan
    save_file(tensors, stage1 / HEADS_FILE)
    with pytest.raises(BadInput, match=r"1\.0\.linear\.bias holds NaN"):
        run(monkeypatch, stage1, *asked)
