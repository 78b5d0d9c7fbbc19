"""Loads a tokenizer that can tell which tokens are the assistant's."""

from pathlib import Path

from transformers import AutoTokenizer

from common.errors import ACCESS, BadInput, first_line


def load_tokenizer(name_or_path: str, chat_template: str | None = None, **kwargs):
    """A fast tokenizer with a chat template: its own, or that of the file `chat_template`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load a tokenizer from {name_or_path}: {first_line(error)} {ACCESS}") from error
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text()
    if tokenizer.chat_template is None:
        raise BadInput(
            f"the tokenizer of {name_or_path} has no chat template, so nobody can tell the assistant's tokens: pass "
            "one to train.py with --chat_template FILE (templates/ holds some)"
        )
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer of {name_or_path} is not a fast one: it does not say where its tokens lie")
    return tokenizer
