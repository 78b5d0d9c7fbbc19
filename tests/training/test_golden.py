"""Losses of short runs, as plain torch computed them in fp32 on a CPU once. CPU and GPU must still agree with them.

The CPU goes the same way again: nothing may change. A GPU takes bf16 and every fused kernel, and may differ by what
bf16 rounds. UPDATE_GOLDEN=1 writes the CPU's losses; say in the commit why they changed.
"""

import json
import os

import pytest
import torch
from conftest import ROOT, logged, make_backbone, make_tokenizer

GOLDEN = ROOT / "tests" / "golden" / "losses.json"
STAGE_1, KL = ("--medusa_only_heads", True), ("--medusa_loss", "kl", "--medusa_vocab_size", 256)
RUNS = {
    "stage 1": STAGE_1,
    "stage 1, fp8": STAGE_1,
    "stage 1, packed": (*STAGE_1, "--packing", True, "--model_max_length", 128),
    "markov, kl": (*STAGE_1, *KL, "--medusa_head_type", "markov", "--medusa_rank", 32),
    "hydra, prefix layer, kl": (*STAGE_1, *KL, "--medusa_head_type", "hydra", "--medusa_prefix_layer", True),
    "stage 2": ("--medusa_scheduler", "linear", "--learning_rate", 1e-3),
}
# Relative. The losses' own bf16 would be 4e-3; what they are summed from rounds to both sides. A product in fp8 has an
# error of .037 (docs/log.md).
CPU, GPU, FP8 = 1e-4, 5e-3, 4e-2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def wide(tmp_path):
    """As wide as a Triton kernel's block, so that a GPU runs what it runs for a large model."""
    size = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "initializer_range": 0.08}
    make_backbone(**size).save_pretrained(tmp_path / "wide")
    make_tokenizer("llama3").save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_as_they_were(name, device, train, wide):
    flags = ["--model_name_or_path", wide, "--max_steps", 12, "--learning_rate", 3e-3, "--seed", 7, *RUNS[name]]
    if device == "cpu":
        flags += ["--use_cpu", True, "--use_liger", False]
    else:
        flags += ["--bf16", True, "--fp8_backbone", "fp8" in name]
    out = train(*flags, liger=device == "cuda")
    found = [logged(out, f"head_{k}_loss") for k in (1, 2)]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN") and device == "cpu":
        golden[name] = [[round(loss, 5) for loss in losses] for losses in found]
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(losses)}" for name, losses in sorted(golden.items()))
        GOLDEN.write_text(f"{{\n{rows}\n}}\n")
    tolerance = CPU if device == "cpu" else FP8 if "fp8" in name else GPU
    torch.testing.assert_close(torch.tensor(found), torch.tensor(golden[name]), rtol=tolerance, atol=0)
    assert all(losses[-1] < 0.9 * losses[0] for losses in found)  # they train: or any golden loss would do
