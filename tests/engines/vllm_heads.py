"""Run by test_engines.py: vLLM's own Medusa model and config, over what else of vLLM they need, in a few lines.

    python tests/engines/vllm_heads.py SOURCE HEADS HIDDEN LOGITS

SOURCE holds vllm/model_executor/models/medusa.py and vllm/transformers_utils/configs/medusa.py of one version.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file


class Rows(torch.nn.Module):
    """ParallelLMHead on one GPU: it takes weights of its own number of rows only."""

    def __init__(self, rows, hidden_size, prefix="", org_num_embeddings=None, **kwargs):
        super().__init__()
        self.rows = org_num_embeddings or rows
        self.weight = torch.nn.Parameter(torch.empty(self.rows, hidden_size), requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, param, loaded):
        assert loaded.shape[0] == self.rows, f"{loaded.shape[0]} rows, not {self.rows}"
        param.data.copy_(loaded)


class Product:
    """LogitsProcessor on one GPU."""

    def __init__(self, vocab_size, org_vocab_size=None, scale=1.0):
        self.size, self.scale = org_vocab_size or vocab_size, scale

    def __call__(self, head, hidden):
        return (hidden @ head.weight.T)[..., : self.size] * self.scale


def module(name: str, **contents):
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)


def load(source: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, source / (name.replace(".", "/") + ".py"))
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def main(source: Path, heads: Path, hidden: Path, out: Path):
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.models"):
        module(name)
    for name in ("vllm.model_executor.model_loader", "vllm.transformers_utils", "vllm.transformers_utils.configs"):
        module(name)
    module("vllm.config", VllmConfig=object)
    module("vllm.model_executor.layers.logits_processor", LogitsProcessor=Product)
    module("vllm.model_executor.layers.vocab_parallel_embedding", ParallelLMHead=Rows, DEFAULT_VOCAB_PADDING_SIZE=64)
    copy = lambda param, loaded: param.data.copy_(loaded)  # noqa: E731
    module("vllm.model_executor.model_loader.weight_utils", default_weight_loader=copy)
    module("vllm.model_executor.models.utils", maybe_prefix=lambda prefix, name: name)
    module("vllm.transformers_utils.utils", without_trust_remote_code=lambda kwargs: kwargs)
    config = load(source, "vllm.transformers_utils.configs.medusa").MedusaConfig.from_pretrained(heads)
    settings = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config))
    model = load(source, "vllm.model_executor.models.medusa").Medusa(
        vllm_config=SimpleNamespace(speculative_config=settings)
    )
    found = model.load_weights(load_file(next(heads.glob("*.safetensors"))).items())
    print("loaded", len(found))
    with torch.inference_mode():
        torch.save(torch.stack(model.compute_logits(model(torch.load(hidden)))), out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
