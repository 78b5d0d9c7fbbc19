"""Run by test_engines.py: TGI's own Medusa model, over its Linear in a few lines.

    python tests/engines/tgi_heads.py SOURCE HEADS HIDDEN LOGITS

SOURCE holds text_generation_server/layers/medusa.py (the folder `server` of the repository).
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file


class Linear(torch.nn.Module):
    """FastLinear: weight and bias by their names in the file."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    @classmethod
    def load(cls, config, prefix, weights, bias):
        return cls(weights[f"{prefix}.weight"], weights[f"{prefix}.bias"] if bias else None)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def main(source: Path, heads: Path, hidden: Path, out: Path):
    config = json.loads((heads / "config.json").read_text())
    assert "architectures" not in config, "TGI would take the directory for a whole model"
    for name, contents in {
        "text_generation_server": {},
        "text_generation_server.utils": {},
        "text_generation_server.utils.speculate": {"get_speculate": lambda: config["medusa_num_heads"]},
        "text_generation_server.layers": {},
        "text_generation_server.layers.linear": {"FastLinear": Linear},
        "text_generation_server.layers.tensor_parallel": {
            "TensorParallelHead": None, "TensorParallelColumnLinear": None,
        },
    }.items():  # fmt: skip
        made = sys.modules[name] = ModuleType(name)
        made.__path__ = []
        vars(made).update(contents)
    name = "text_generation_server.layers.medusa"
    spec = importlib.util.spec_from_file_location(name, source / (name.replace(".", "/") + ".py"))
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    model = made.MedusaModel(None, config, load_file(heads / "medusa_lm_head.safetensors"))
    with torch.inference_mode():
        torch.save(model(torch.load(hidden)).transpose(0, 1).contiguous(), out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
