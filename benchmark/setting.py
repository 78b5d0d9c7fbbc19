"""What the benchmarks share: the model's shapes, the three implementations they compare, and the CSVs.

    hf      Hugging Face: plain torch, all logits of all heads at once, then one backward
    liger   Liger's default: its kernels, its fused loss per head in its own chunks, all heads, then one backward
    ours    this project: train.py as it is

All three compute the same losses of the same heads (the benchmarks compare them) with the same Trainer, data and
optimiser. In a group of processes hf and liger leave the heads in FSDP2's root unit, where modules stay by default.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed
from transformers.models.llama import modeling_llama

from common import provenance
from medusa_model import MedusaConfig, MedusaModel
from model import loss as head_loss
from model.bits import keep_exact
from model.heads import ResBlock
from model.path_heads import MarkovHead
from model.varlen import use_varlen
from training.states import StoredRows, checksum, open_shard
from training.trainer import MedusaTrainer

LLAMA3_8B: dict = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA3_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
LLAMA3_8B |= {"rope_theta": 500000.0, "tie_word_embeddings": False}
SMOLLM2: dict = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
SMOLLM2 |= {"rope_theta": 100000.0, "tie_word_embeddings": True}  # SmolLM2-135M
TINY = LLAMA3_8B | {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}

IMPLEMENTATIONS = ("hf", "liger", "ours")
CHUNK_ROWS = head_loss.CHUNK_ROWS
# Liger replaces these in transformers, so for every model of the process.
PLAIN_LLAMA = {name: getattr(modeling_llama, name) for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}


def set_sizes(options):
    """Sets `options.shape` and, if none were given, `options.lengths`: for an 8B model, or small ones for --smoke."""
    options.shape = TINY if options.smoke else LLAMA3_8B
    options.lengths = options.lengths or ([32, 64] if options.smoke else [1024, 2048, 4096, 8192])


def draft_tokens(shape: dict, size: int | None) -> torch.Tensor | None:
    """For --medusa_vocab_size: ids of tokens `[size]`, evenly spread over the vocabulary; None stands for all. Raises
    SystemExit if there are not so many."""
    if size is None:
        return None
    if not 0 < size < shape["vocab_size"]:
        sys.exit(f"--medusa_vocab_size {size}: from 1 to {shape['vocab_size'] - 1} tokens")
    return torch.arange(size) * shape["vocab_size"] // size


class AllAtOnceTrainer(MedusaTrainer):
    """`hf` and `liger`: every head forward, then one backward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.one_by_one = False
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        # Only the decoder's layers are units. Under FSDP1 the heads are too: a unit must have one dtype there, and the
        # root unit would have the frozen backbone's weights in bf16 and the heads' in fp32.
        if plugin is not None and plugin.fsdp_version == 2:
            plugin.transformer_cls_names_to_wrap = list(self.medusa.backbone._no_split_modules or [])


def trainer_class(implementation: str) -> type[MedusaTrainer]:
    return MedusaTrainer if implementation == "ours" else AllAtOnceTrainer


def choose_implementation(model: MedusaModel, implementation: str, device: torch.device, varlen: bool = False):
    """Sets the kernels of an implementation. Liger falls back to its own chunk size if asked for chunks of one row.
    varlen: attention of variable length. Raises SystemExit where it does not fit."""
    if varlen and not use_varlen(model.backbone, device, torch.bfloat16):
        raise SystemExit("attention of variable length does not fit here: see the log")
    head_loss.CHUNK_ROWS = 1 if implementation == "liger" else CHUNK_ROWS
    model.choose_kernels(implementation != "hf", device)


def without_liger():
    """Undoes `choose_implementation` of an earlier model. Call it before a model is built."""
    for name, value in PLAIN_LLAMA.items():
        setattr(modeling_llama, name, value)


def random_model(
    shape: dict,
    heads: int,
    stage: int,
    dtype: torch.dtype,
    device: torch.device,
    draft: int | None = None,
    kind: str = "medusa",
    prefix: bool = False,
    bits: str | None = None,
) -> MedusaModel:
    """A MedusaModel with random weights, made on `device`, the same for the same arguments. draft: how many tokens the
    heads guess. kind: their type. prefix: whether they have a prefix layer. bits: of the backbone, as
    train.py's --backbone_dtype.

    The ResBlocks, and what heads keep of tokens, are random too. Heads start with zero ones, and then leaving one out
    would not show.
    """
    without_liger()
    set_seed(0)
    with torch.device(device):
        backbone = AutoModelForCausalLM.from_config(
            LlamaConfig(**shape), dtype=torch.bfloat16 if stage == 1 else dtype
        )
        quantise(backbone, bits)
        config, tokens = MedusaConfig(medusa_num_heads=heads, medusa_head_type=kind), draft_tokens(shape, draft)
        config.medusa_prefix_layer = prefix
        model = MedusaModel.from_backbone(backbone, config, dtype=dtype, token_map=tokens)
    with torch.no_grad():
        for module in model.medusa_heads.modules():
            if isinstance(module, ResBlock):
                module.linear.weight.normal_(std=shape["hidden_size"] ** -0.5)
            if isinstance(module, MarkovHead):
                module.table.normal_()
    if stage == 1:
        model.freeze_backbone()
    return model


def quantise(backbone: Any, bits: str | None):
    """The decoder's linear layers in few bits, in place: as transformers has them that it loads from a checkpoint."""
    if bits == "fp8":
        from model.fp8 import use_fp8

        use_fp8(backbone, backbone.device)
    elif bits == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(backbone.get_decoder(), Int8WeightOnlyConfig())
    elif bits == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        found = [(name, layer) for name, layer in backbone.get_decoder().named_modules() if type(layer) is nn.Linear]
        for name, layer in found:
            few = Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, device="meta"
            )
            how: Any = {"requires_grad": False, "compress_statistics": True, "quant_type": "nf4", "module": few}
            few.weight = Params4bit(layer.weight.data, **how).to(layer.weight.device)  # type: ignore[misc,unused-ignore]
            backbone.get_decoder().set_submodule(name, few)
        keep_exact(backbone)


def limit_memory(gib: float | None, parser: argparse.ArgumentParser):
    """torch.OutOfMemoryError where torch would take more of the GPU than that. Ends the script without a GPU."""
    if gib is None:
        return
    if not torch.cuda.is_available():
        parser.error("--limit_gib needs a GPU")
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole))


def random_rows(shape: dict, length: int, count: int, draft: int | None = None) -> list[dict]:
    """`count` conversations of random tokens, the same in every call. Every token but the first is a target, and one
    that heads of a draft vocabulary can guess: each row costs them all there is to do."""
    generator, guessed = torch.Generator().manual_seed(0), draft_tokens(shape, draft)
    tokens = torch.randint(0, draft or shape["vocab_size"], (count, length), generator=generator)
    tokens = tokens if guessed is None else guessed[tokens]
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def stored_rows(shape: dict, rows: list[dict], directory: Path) -> StoredRows:
    """The rows with random hidden states, in a shard in `directory`: read from there as --states_path reads them."""
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int32)
    hidden = torch.randn(ids.numel(), shape["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {"hidden": hidden, "input_ids": ids.flatten(), "labels": ids.flatten().clone()}
    save_file(tensors | {"lengths": torch.tensor([ids.shape[1]] * len(ids), dtype=torch.int32)}, directory / "0")
    plan = {"dtype": "bfloat16", "hidden_size": shape["hidden_size"]}
    shard = {"file": "0", "rows": len(ids), "tokens": ids.numel()}
    shard["checksum"] = checksum(open_shard(directory / "0", shard, plan))
    return StoredRows(directory, [shard], plan, torch.bfloat16)


def origin() -> dict:
    """The columns that say where a row comes from."""
    origin = {"gpu": provenance.gpu(), "versions": provenance.versions(), "commit": provenance.commit()}
    return origin | {"command": provenance.command()}


def append(path: Path, row: dict):
    """Adds one row to a CSV at once, so that a run that is cut off keeps what it has measured. Raises SystemExit if
    the file has other columns."""
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            sys.exit(f"{path} has other columns than this benchmark writes: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
