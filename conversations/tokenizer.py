"""Loads a tokenizer that can tell which tokens are the assistant's, and the tokens on which its model stops."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from common.errors import ACCESS, NO_CODE, BadInput, first_line
from conversations.thoughts import TAG


def load_tokenizer(name_or_path: str, chat_template: str | None = None, needs_template=True, **kwargs):
    """A fast tokenizer with a chat template: its own, or that of the file `chat_template`. needs_template=False takes
    any tokenizer, which is only copied."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **NO_CODE | kwargs)
        tokenizer("why", add_special_tokens=False)
    except Exception as error:  # of a damaged file, tokenizers and transformers raise any kind
        raise BadInput(f"cannot load a tokenizer from {name_or_path}: {first_line(error)} {ACCESS}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read --chat_template {chat_template}: {first_line(error)}") from error
    if not needs_template:
        return tokenizer
    if tokenizer.chat_template is None:
        raise BadInput(
            f"the tokenizer of {name_or_path} has no chat template, so nobody can tell the assistant's tokens: give "
            "one with --chat_template FILE (templates/ holds some)"
        )
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer of {name_or_path} is not a fast one: it does not say where its tokens lie")
    return tokenizer


def load_stops(name_or_path: str, **kwargs) -> set[int]:
    """The tokens on which the model stops, from its generation_config.json or else its config.json; none if neither
    names any."""
    for kind in (GenerationConfig, AutoConfig):
        try:
            ends = kind.from_pretrained(name_or_path, **NO_CODE | kwargs).eos_token_id
        except (OSError, ValueError, AttributeError):
            continue
        if ends is not None:
            return set(ends if isinstance(ends, list) else [ends])
    return set()


def to_words(ids: list[int], tokenizer) -> str:
    """Tokens as text, without special tokens. But tags of thoughts stay: in some tokenizers they are special too."""
    added = tokenizer.added_tokens_decoder
    left_out = {i for i, token in added.items() if token.special and not TAG.fullmatch(token.content)}
    return tokenizer.decode([i for i in ids if i not in left_out])
