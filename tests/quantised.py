"""Backbones in few bits, for tests: their weights made whole again by the package that quantised them."""

import importlib.util

import pytest
import torch


def needs(package: str):
    """A mark for what needs a package of requirements-quantised.txt."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def whole(few, plain) -> dict[str, torch.Tensor]:
    """The state dict of `plain` with the weights that `few`, the same model in few bits, computes with."""
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for name, layer in few.named_modules():
        if type(layer).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            found = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif hasattr(getattr(layer, "weight", None), "dequantize") and hasattr(layer.weight, "__tensor_flatten__"):
            found = layer.weight.dequantize()
        else:
            continue
        state[f"{name}.weight"] = found.to(state[f"{name}.weight"])
    return state
