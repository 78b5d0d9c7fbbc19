"""Makes a directory that transformers 5 and safetensors wrote readable for programs with an older transformers, and
for other users.

    config.json             transformers 4 looks for rope_theta, rope_scaling and torch_dtype. It takes RoPE's default
                            theta of 10,000 without a word if they are not there
    tokenizer_config.json   it does not know the class TokenizersBackend
    *.safetensors           safetensors makes its files readable for their owner only
"""

import json
import stat
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
    """Rewrites the configs there, and gives safetensors' files the mode that the umask allows; no other files, and
    none elsewhere that a link leads to."""
    for name, change in (("config.json", with_old_names), ("tokenizer_config.json", with_old_class)):
        if (path := directory / name).is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if (changed := change(config)) != config:
                text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
                write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    for path in directory.glob("*.safetensors"):
        if path.is_file() and not path.is_symlink():
            probe = path.with_name(path.name + ".tmp")
            probe.touch()  # as any program's new file: os.umask can only be read by setting it, for all threads
            path.chmod(stat.S_IMODE(probe.stat().st_mode))
            probe.unlink()
