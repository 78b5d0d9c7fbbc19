"""The flags that evaluate.py, generate.py and distill.py share: of chat templates and of datasets."""

import json
import sys

import pytest
import torch
from conftest import make_conversations, make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

import evaluate
import generate
from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel

SAYS = "{% for m in messages %}{{ m.role }} {{ m.content }}<|eot_id|>{% endfor %}"
THINKS = SAYS + "{% if add_generation_prompt %}assistant {{ '<think>' if think else '' }}{% endif %}"


@pytest.fixture
def heads(model_dir, tmp_path):
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=2)
    )
    model.freeze_backbone()
    model.save_pretrained(tmp_path / "heads")
    make_tokenizer("llama3").save_pretrained(tmp_path / "heads")
    return tmp_path / "heads"


@pytest.fixture
def asked(heads, monkeypatch):
    """Runs generate.py up to decoding; -> the texts of its prompts."""

    def run(*argv) -> list[str]:
        found = []

        def decode_all(args, model, tokenizer, prompts):
            found.extend(map(tokenizer.decode, prompts))
            raise BadInput("enough")

        monkeypatch.setattr(generate, "decode_all", decode_all)
        monkeypatch.setattr(sys, "argv", ["generate.py", str(heads), *map(str, argv)])
        with pytest.raises(BadInput, match="enough"):
            generate.main()
        return found

    return run


def test_what_is_asked(asked, tmp_path):
    (tmp_path / "thinks.jinja").write_text(THINKS)
    system = {"role": "system", "content": "be old"}
    turns = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "cold"}]
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"messages": [system, *turns]}, {"messages": turns[:1]}])
    flags = ("--chat_template", tmp_path / "thinks.jinja", "--system", "be new")
    end = "<|eot_id|>"
    assert asked("--prompt", "why", "--prompts", prompts, *flags) == [
        f"system be new{end}user why{end}assistant ",
        f"system be old{end}user how{end}assistant ",
        f"system be new{end}user how{end}assistant ",
    ]
    (thinking,) = asked("--prompt", "why", *flags[:2], "--chat_template_kwargs", json.dumps({"think": True}))
    assert thinking == f"user why{end}assistant <think>"


def test_lines_of_prompts_end_at_line_ends_only(asked, tmp_path):
    (tmp_path / "p.txt").write_bytes("why\u2028cold\r\nhow\x0cold\n".encode())
    assert [text.count("<|start_header_id|>user") for text in asked("--prompts", tmp_path / "p.txt")] == [1, 1]


@pytest.mark.parametrize(("flags", "rows"), [((), 3), (("--eval_split", "test"), 2), (("--train_split", "test"), 2)])
def test_a_split_is_evaluated(flags, rows, heads, tmp_path, monkeypatch):
    directory, out = tmp_path / "set", tmp_path / "figures.json"
    directory.mkdir()
    conversations = make_conversations(5)
    write_jsonl(directory / "train.jsonl", conversations[:3])
    write_jsonl(directory / "test.jsonl", conversations[3:])
    read = []
    monkeypatch.setattr(evaluate, "measure", lambda args, model, original, chat, data, *_: read.append(data) or {})
    monkeypatch.setattr(evaluate, "report", lambda result: "")
    monkeypatch.setattr(evaluate, "draw", lambda result, path: None)
    argv = [heads, "--data_path", directory, "--output_json", out, *flags]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()
    assert [len(data) for data in read] == [rows]


def test_a_template_of_ones_own_is_evaluated(heads, data_file, tmp_path, monkeypatch):
    """Its labels, with the end tokens of the backbone."""
    (tmp_path / "says.jinja").write_text(SAYS)
    chats = []
    monkeypatch.setattr(evaluate, "measure", lambda args, model, original, chat, data, *_: chats.append(chat) or {})
    monkeypatch.setattr(evaluate, "report", lambda result: "")
    monkeypatch.setattr(evaluate, "draw", lambda result, path: None)
    argv = [heads, "--data_path", data_file, "--chat_template", tmp_path / "says.jinja"]
    argv += ["--chat_template_kwargs", '{"a": 1}', "--output_json", tmp_path / "figures.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()
    (chat,) = chats
    eos = torch.tensor([AutoModelForCausalLM.from_pretrained(heads / "../backbone").generation_config.eos_token_id])
    assert (chat.text, chat.kwargs, sorted(chat.stops)) == (SAYS, {"a": 1}, eos.flatten().tolist())
