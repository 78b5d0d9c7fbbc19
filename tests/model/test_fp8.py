"""fp8.py: products in fp8 against fp32, what is replaced, and training with it. Triton's interpreter cuts where a GPU
rounds, so errors are twice as large on a CPU."""

import pytest
import torch
from conftest import TRITON, make_backbone, weights

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model import fp8

# Relative, of a rounded number: at most 1/16 (1/8 where it is cut), evenly spread.
ERROR = {"cpu": 0.1, "cuda": 0.045}


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_each_row_has_its_own_scale(device):
    x = torch.randn(19, 80, device=device).bfloat16() * 10.0 ** torch.arange(-9, 10, device=device)[:, None]
    x[5] = 0
    q, scale = fp8.scale_rows(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (19, 1) and scale.dtype == torch.float32
    errors = [error(*rows) for rows in zip(q.float() * scale, x.float(), strict=True)]
    assert not q[5].float().any() and max(errors[:5] + errors[6:]) < ERROR[device]
    assert q.float().abs().amax(1)[[0, 18]].tolist() == [448, 448]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_against_fp32(device, bias):
    layer = torch.nn.Linear(256, 96, bias=bias, device=device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 17, 256, device=device, dtype=torch.bfloat16)
    want = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    layer.__class__ = fp8.Fp8Linear
    got = layer(x)
    assert got.shape == (3, 17, 96) and got.dtype == torch.bfloat16
    assert 0.005 < error(got, want) < 1.5 * ERROR[device]  # two rounded factors; less would not be fp8


def test_the_decoder_s_linear_layers_and_nothing_else(device):
    model = MedusaModel.from_backbone(make_backbone().to(device), MedusaConfig(medusa_num_heads=2))
    model.backbone.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fp8.use_fp8(model.backbone, torch.device(device))
    changed = [name for name, module in model.named_modules() if isinstance(module, fp8.Fp8Linear)]
    assert len(changed) == 2 * 7 and all(name.startswith("backbone.model.layers.") for name in changed)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_hidden_states_stay_close(device):
    model = make_backbone(hidden_size=128, intermediate_size=256, initializer_range=0.05).bfloat16().to(device)
    ids = torch.randint(0, 320, (2, 24), device=device)
    model.requires_grad_(False)
    want = model.model(ids).last_hidden_state
    fp8.use_fp8(model, torch.device(device))
    assert 0.001 < error(model.model(ids).last_hidden_state, want) < 0.25


def test_odd_sizes_are_refused(device):
    with pytest.raises(BadInput, match="not a multiple of 16 wide"):
        fp8.use_fp8(make_backbone(intermediate_size=50), torch.device(device))


def test_no_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match="needs a GPU"):
        fp8.use_fp8(make_backbone(), torch.device("cpu"))


@TRITON
def test_training_with_it(train):
    """Heads learn from slightly other hidden states, and the saved heads are as usual."""
    flags = ("--max_steps", 2, "--medusa_only_heads", True, "--bf16", True, "--use_liger", False)
    plain = weights(train(*flags, output="plain", liger=True))
    rounded = weights(train(*flags, "--fp8_backbone", True, output="fp8", liger=True))
    assert plain.keys() == rounded.keys()
    differences = [(plain[name] - rounded[name]).abs().max().item() for name in plain]
    assert 0 < max(differences) <= 0.04  # two steps of Adam at 1e-2 go at most that far apart
