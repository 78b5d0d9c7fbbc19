"""Prompts: from a file or a conversation, and as tokens."""

from pathlib import Path

from common.errors import BadInput
from conversations.sources import load_conversations


def read_prompts(path: str) -> list[str]:
    """The lines of a .txt file, or the first question of each conversation in a .json or .jsonl file. Raises BadInput
    if there are none."""
    if path.endswith((".json", ".jsonl")):
        conversations = load_conversations(path)["messages"]
        return [next(m["content"] for m in messages if m["role"] == "user") for messages in conversations]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the prompts in {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path} holds no prompts: write one a line")
    return prompts


def ask(messages: list[dict]) -> list[dict]:
    """The turns before the first answer."""
    return messages[: next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))]


def tokenise(conversations: list[list[dict]], tokenizer) -> list[list[int]]:
    """Each conversation as tokens, up to where the assistant's answer begins."""
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
