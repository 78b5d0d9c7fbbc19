"""Flags that the scripts share which render or load conversations. train.py has them too, in training/arguments.py."""

import argparse
import json

from common.errors import BadInput

HELP = {
    "chat_template": "Jinja file for a tokenizer that has no chat template, or the wrong one (templates/ holds some)",
    "chat_template_kwargs": "what the chat template can be told, as JSON: '{\"enable_thinking\": false}'",
    "dataset_config": "of a Hub dataset that has several",
    "train_split": "the split of a dataset or directory to read (default: train)",
}
RESERVED = {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"}


def add_options(parser: argparse.ArgumentParser):
    """Adds the flags to a script's own."""
    for name, text in HELP.items():
        parser.add_argument(f"--{name}", help=text)


def parse_kwargs(text: str | None) -> dict:
    """The value of --chat_template_kwargs. Raises BadInput if it is no JSON object."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise BadInput(f"--chat_template_kwargs {text} is not JSON ({error}): write '{{\"name\": true}}'") from error
    if not isinstance(found, dict):
        raise BadInput(f"--chat_template_kwargs {text} is no JSON object: write '{{\"name\": true}}'")
    if taken := RESERVED & found.keys():
        raise BadInput(f"--chat_template_kwargs {text}: {min(taken)!r} is not for the template to be told")
    return found
