"""A frozen backbone in few bits (`--backbone_dtype`), quantised while it is loaded, and what is quantised already.

nf4   4.127 bits a weight (bitsandbytes): one of 16 values, times a scale of each 64 weights; the scales in 8 bits, 256
      of them with a scale in fp32.
int8  8 bits (torchao): a scale for each row of a weight.
fp8   no fewer bytes, but faster products (model/fp8.py).

Only the linear layers of the decoder are quantised. Embeddings and `lm_head`, which heads are copies of, stay.
Products of nf4 and int8 are in the dtype that the rest computes in.
"""

import argparse
import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig

from common.errors import BadInput

BITS = ("fp8", "int8", "nf4")
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
INSTALL = "pip install -r requirements-quantised.txt"


def add_bits_option(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--backbone_dtype",
        choices=BITS,
        help="the backbone in few bits: nf4 a quarter of the memory of bfloat16, int8 a half, fp8 only for heads that "
        "were trained so (default: as it is)",
    )


def quantised_by(config: PreTrainedConfig) -> str | None:
    """The method by which a checkpoint is quantised already, as its config.json has it; None if it is not."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    return str(found.get("quant_method") or "bitsandbytes")  # which wrote none once


def check_bits(bits: str | None, config: PreTrainedConfig, name: str):
    """Raises BadInput if a package is missing, or if the backbone `name` is quantised already. config: its own."""
    if bits is None:
        return
    if (method := quantised_by(config)) is not None:
        raise BadInput(f"--backbone_dtype {bits}: {name} is quantised already, by {method}: leave the flag out")
    package = PACKAGES.get(bits)
    if package is not None and importlib.util.find_spec(package) is None:
        raise BadInput(f"--backbone_dtype {bits} needs {package}, which is not installed: {INSTALL}")


def how_to_load(bits: str | None, config: PreTrainedConfig, dtype: torch.dtype | str) -> dict:
    """What `from_pretrained` is told. dtype: in which the rest is kept, and products are made. A backbone in few bits
    goes to the GPU, if there is one, weight by weight: it may be the only place where it can be quantised, and has no
    room for the whole."""
    how: dict[str, Any] = {}
    if bits == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif bits == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # not at the top: few need it

        how["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    if how or quantised_by(config) is not None:
        how["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    return how


def keep_exact(backbone: nn.Module):
    """On a CPU with AVX-512 in bf16, bitsandbytes would pack weights anew when they are first read in eval mode, with
    scales rounded to bf16: another model than the one that was quantised, and none if a layer's inputs are not a
    multiple of 64. Nothing changes on a GPU."""
    for layer in backbone.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # annotated as a module


def is_in_few_bits(layer: nn.Module) -> bool:
    """Whether its own weights are quantised: they are numbers of less than 16 bits, or a class of their own."""
    return any(
        hasattr(tensor, "__tensor_flatten__") or tensor.dtype.itemsize < 2
        for tensor in layer.parameters(recurse=False)
    )


def held_bytes(tensor: torch.Tensor) -> int:
    """What a weight takes, also in few bits (without nf4's scales, 0.016 bytes a weight)."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, made of several
        names, _ = tensor.__tensor_flatten__()
        return sum(held_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
