"""Makes a directory that transformers 5 and safetensors wrote readable for programs with an older transformers, and
for other users.

    config.json             transformers 4 looks for rope_theta, rope_scaling and torch_dtype. It takes RoPE's default
                            theta of 10,000 without a word if they are not there
    tokenizer_config.json   it does not know the class TokenizersBackend
    all files               safetensors makes its files readable for their owner only
"""

import json
import os
from pathlib import Path

from common.files import write_atomically


def with_old_names(config: dict) -> dict:
    """A config.json that says the same in the names of transformers 4 too."""
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = with_old_names(config["text_config"])
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if isinstance(by_layer := rope.get("full_attention"), dict):  # Gemma 3: other angles in layers with a window
        if isinstance(windowed := rope.get("sliding_attention"), dict):
            config["rope_local_base_freq"] = windowed.get("rope_theta")
        rope = by_layer
    kind = rope.get("rope_type", "default")
    config["rope_theta"] = rope.get("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    apart = ("rope_theta", "partial_rotary_factor")
    config["rope_scaling"] = None if kind == "default" else {key: x for key, x in rope.items() if key not in apart}
    return config


def with_old_class(config: dict) -> dict:
    """A tokenizer_config.json whose class transformers 4 knows under that name, and 5 as an alias."""
    return config | (
        {"tokenizer_class": "PreTrainedTokenizerFast"} if config.get("tokenizer_class") == "TokenizersBackend" else {}
    )


def make_readable(directory: Path):
    """Rewrites the configs there, and gives the files the mode that the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    for name, change in (("config.json", with_old_names), ("tokenizer_config.json", with_old_class)):
        if (path := directory / name).is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if (changed := change(config)) != config:
                text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
                write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)
