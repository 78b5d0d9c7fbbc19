"""Heads in the files of other programs: their names, their keys, how they are started, and what they cannot load.

docs/engines.md says which versions were tried, and how.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file

from common.errors import BadInput
from common.files import write_atomically
from model.config import MedusaConfig
from model.foreign import TOKEN_MAP
from model.heads import MedusaHead
from model.path_heads import make_heads
from model.readable import make_readable

ORIGINAL = ("{h}.{n}.linear.{p}", "{h}.{n}.weight")
Tensors = dict[str, torch.Tensor]


class Engine(NamedTuple):
    file: str
    block: str  # name of ResBlock n's weight and bias p, in head h
    projection: str  # of head h, n ResBlocks
    config: Callable[[dict], dict]  # from ours
    start: Callable[[str, str, int], str]  # backbone, directory, number of heads -> command lines
    versions: str
    draft: bool = False  # whether it knows a token_map
    most_blocks: int | None = None


def _counts(config: dict) -> dict:
    keys = ("medusa_num_heads", "medusa_num_layers", "base_model_name_or_path", "hidden_size", "vocab_size")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _vllm(config: dict) -> dict:
    # A key with "num" and "heads" in it would overwrite num_heads, whatever it says.
    sizes = {key: config[key] for key in ("hidden_size", "vocab_size")}
    sizes |= {"num_heads": config["medusa_num_heads"], "num_hidden_layers": config["medusa_num_layers"]}
    sizes["truncated_vocab_size"] = config.get("medusa_vocab_size") or config["vocab_size"]
    flags = {"medusa_fc_bias": True, "original_lm_head": False}
    return {"architectures": ["MedusaModel"], "model_type": "medusa"} | sizes | flags


def _vllm_start(base: str, directory: str, heads: int) -> str:
    draft = {"method": "medusa", "model": directory, "num_speculative_tokens": heads}
    return f"vllm serve {base} --speculative-config {shlex.quote(json.dumps(draft))}"


ENGINES = {
    "vllm": Engine(
        *("model.safetensors", "blocks.{h}.layers.{n}.{p}", "lm_heads.{h}.weight", _vllm, _vllm_start),
        versions="vLLM up to 0.32; 0.33 has no Medusa any more",
        draft=True,
    ),
    "tgi": Engine(
        *("medusa_lm_head.safetensors", *ORIGINAL, _counts),
        lambda base, directory, heads: f"text-generation-launcher --model-id {directory} --speculate {heads}",
        versions="TGI at db931fc (2026-01-08)",
    ),
    "original": Engine(
        *("medusa_lm_head.pt", *ORIGINAL, _counts),
        lambda base, directory, heads: f"python -m medusa.inference.cli --model {directory}",
        versions="FasterDecoding/Medusa at e2a5d20 (2024-04-18) with transformers 4.34",
        most_blocks=1,  # its `[ResBlock] * n` is n times the same block
    ),
    "trtllm": Engine(
        *("medusa_lm_head.pt", *ORIGINAL),
        lambda config: _counts(config) | {"num_medusa_heads": config["medusa_num_heads"]},
        lambda base, directory, heads: (
            f"python examples/medusa/convert_checkpoint.py --model_dir {base} --medusa_model_dir {directory} "
            f"--num_medusa_heads {heads} --output_dir CHECKPOINT"
        ),
        versions="TensorRT-LLM's old backend (0.10 to 1.2); it has been removed from main in 2026",
    ),
    "mlc": Engine(
        *("pytorch_model.bin", "medusa_head.{h}.{n}.linear.{p}", "medusa_head.{h}.{n}.weight", _counts),
        lambda base, directory, heads: f"mlc_llm convert_weight {directory} --model-type medusa -o CONVERTED",
        versions="MLC-LLM at 79d603f (2026-07-23)",
    ),
}


def check(engine: Engine, name: str, config: dict):
    """Raises BadInput for heads that the engine would not load, or would load wrong. config: ours."""
    kind, layers = config["medusa_head_type"], config["medusa_num_layers"]
    if kind != "medusa" or config.get("medusa_prefix_layer"):
        what = f"{kind} heads" if kind != "medusa" else "a prefix layer"
        raise BadInput(
            f"--to {name}: {what} can be decoded with this repository alone; {name} knows medusa heads only"
        )
    if config.get("medusa_vocab_size") is not None and not engine.draft:
        raise BadInput(
            f"--to {name}: it has no reduced vocabulary, and these heads guess {config['medusa_vocab_size']} of "
            f"{config['vocab_size']} tokens: train heads without --medusa_vocab_size, or use --to vllm"
        )
    if engine.most_blocks is not None and layers > engine.most_blocks:
        raise BadInput(
            f"--to {name}: its code uses one ResBlock {layers} times where these heads have {layers}: train heads "
            "with --medusa_num_layers 1"
        )


def check_rope(backbone):
    """Raises BadInput for a backbone that the original's transformers 4.34 does not read. backbone: its config."""
    rope = getattr(backbone.get_text_config(), "rope_parameters", None) or {}
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "dynamic"):
        raise BadInput(
            f"--to original: its transformers 4.34 knows no RoPE of type {kind}, so it cannot read this backbone "
            "(LLaMA 3.1 and later)"
        )


def names(engine: Engine, config: dict) -> dict[str, str]:
    """Our name of each tensor -> the engine's."""
    heads, blocks = config["medusa_num_heads"], config["medusa_num_layers"]
    found: dict[str, str] = {}
    for h in range(heads):
        for n in range(blocks):
            found |= {f"{h}.{n}.linear.{p}": engine.block.format(h=h, n=n, p=p) for p in ("weight", "bias")}
        found[f"{h}.{blocks}.weight"] = engine.projection.format(h=h, n=blocks)
    return found | ({TOKEN_MAP: TOKEN_MAP} if config.get("medusa_vocab_size") is not None else {})


def write(engine: Engine, config: dict, tensors: Tensors, directory: Path):
    """The engine's files. tensors: by our names."""
    theirs = {name: tensors[ours].contiguous() for ours, name in names(engine, config).items()}
    directory.mkdir(parents=True, exist_ok=True)
    if engine.file.endswith(".safetensors"):
        write_atomically(directory / engine.file, lambda path: save_file(theirs, path, metadata={"format": "pt"}))
    else:
        write_atomically(directory / engine.file, lambda path: torch.save(theirs, path))
    text = json.dumps(engine.config(config), indent=2) + "\n"
    write_atomically(directory / "config.json", lambda path: path.write_text(text))
    make_readable(directory)


def logits(engine: Engine, config: dict, directory: Path, hidden: torch.Tensor) -> torch.Tensor:
    """What the engine's files say, computed as the engine does: hidden `[R, H]` -> `[K, R, V]` in fp32."""
    path = directory / engine.file
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    tensors = {name: tensor if name == TOKEN_MAP else tensor.float() for name, tensor in tensors.items()}
    found, blocks = [], config["medusa_num_layers"]
    for h in range(config["medusa_num_heads"]):
        x = hidden
        for n in range(blocks):
            weight, bias = (tensors[engine.block.format(h=h, n=n, p=p)] for p in ("weight", "bias"))
            x = x + torch.nn.functional.silu(x @ weight.T + bias)
        guessed = x @ tensors[engine.projection.format(h=h, n=blocks)].T
        if TOKEN_MAP in tensors:
            full = guessed.new_full((len(x), config["vocab_size"]), -torch.inf)
            full[:, tensors[TOKEN_MAP]] = guessed
            guessed = full
        found.append(guessed)
    return torch.stack(found)


@torch.inference_mode()
def difference(engine: Engine, config: dict, tensors: Tensors, directory: Path) -> float:
    """The largest difference between our heads' logits and those of the exported files, in parts of the largest logit,
    for 16 random hidden states in fp32."""
    tensors = dict(tensors)
    token_map = tensors.pop(TOKEN_MAP, None)
    heads = make_heads(MedusaConfig(**config))
    heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    hidden = torch.randn(16, config["hidden_size"], generator=torch.Generator().manual_seed(0))
    ours = torch.stack([cast(MedusaHead, head).logits(hidden, None) for head in heads])
    theirs = logits(engine, config, directory, hidden)
    theirs = theirs if token_map is None else theirs[..., token_map]
    return ((ours - theirs).abs().max() / ours.abs().max()).item()
