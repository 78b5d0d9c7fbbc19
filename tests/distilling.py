"""A tiny chat model that answers, and distill.py run on it: fixtures, a plugin of the tests of distill.py."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_backbone, make_conversations, make_tokenizer

import distill

PROMPTS = [chat["messages"][0]["content"] for chat in make_conversations(10)]
ENDS = list(range(1, 320, 24))  # a random model hardly ever says one given token, so many end an answer


@pytest.fixture
def chat_dir(tmp_path) -> Path:
    """A tiny chat model that ends some of its answers after a few tokens, and never ends others."""
    backbone = make_backbone()
    backbone.generation_config.eos_token_id = ENDS
    backbone.save_pretrained(tmp_path / "chat")
    make_tokenizer("llama3").save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def ask(chat_dir: Path, tmp_path, monkeypatch):
    """-> a function that runs the script, and returns the file it wrote."""

    def run(name="out.jsonl", prompts=None, model=chat_dir, **flags) -> Path:
        if prompts is None:
            prompts = tmp_path / "prompts.txt"
            prompts.write_text("\n\n".join(f" {prompt} " for prompt in PROMPTS))
        flags = {"model_name_or_path": model, "prompts": prompts, "output": tmp_path / name} | flags
        flags = {"max_new_tokens": 12, "max_prompt_length": 100, "batch_size": 1} | flags
        argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", ["distill.py", *argv])
        distill.main()
        return tmp_path / name

    return run


def records(path: Path) -> list[dict]:
    """Without what they say of how they were made, so that those of other settings compare."""
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert all(record.pop("distilled")["temperature"] >= 0 for record in found)
    return found
