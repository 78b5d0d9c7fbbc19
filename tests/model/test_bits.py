"""bits.py: a backbone in few bits against plain torch with its weights made whole again; what is quantised, refused,
and what may not be told by its class."""

import pytest
import torch
from conftest import make_backbone, make_tokenizer, randomise
from quantised import needs, whole
from transformers import AutoConfig
from transformers.trainer_utils import set_seed

from callback import FlopCount
from common.errors import BadInput
from decoding.products import sharing
from medusa_model import MedusaConfig, MedusaModel
from model import bits
from model.backbone import load_backbone

KINDS = [pytest.param("int8", marks=needs("torchao")), pytest.param("nf4", marks=needs("bitsandbytes"))]
# int8 multiplies first and scales then, so it rounds otherwise than weights that are made whole.
TOLERANCE = {"nf4": {"float32": 1e-6, "bfloat16": 1e-2}, "int8": {"float32": 1e-5, "bfloat16": 3e-2}}


def error(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def with_heads(backbone, seed=0) -> MedusaModel:
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=2), dtype=torch.float32)
    set_seed(seed)
    randomise(model.medusa_heads)
    model.freeze_backbone()
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_heads_are_those_over_whole_weights(kind, dtype, model_dir):
    torch_dtype = getattr(torch, dtype)
    few, plain = (load_backbone(model_dir, bits=name, dtype=torch_dtype) for name in (kind, None))
    ids, device = torch.randint(0, 320, (2, 24)), few.device
    rounded = error(plain.model(ids).last_hidden_state, few.model(ids.to(device)).last_hidden_state.cpu())
    assert 0.002 < rounded < 1  # it is another model than the one that is not quantised
    plain.load_state_dict(whole(few, plain))
    ours, want = with_heads(few), with_heads(plain)
    losses = [model(ids.to(device), labels=ids.to(device)) for model, device in ((ours, device), (want, "cpu"))]
    for out in losses:
        out.loss.backward()
    tolerance = TOLERANCE[kind][dtype]
    torch.testing.assert_close(
        losses[0].head_losses.cpu(), losses[1].head_losses, rtol=tolerance, atol=0, equal_nan=True
    )
    for (name, a), b in zip(ours.medusa_heads.named_parameters(), want.medusa_heads.parameters(), strict=True):
        assert error(a.grad.cpu(), b.grad) <= tolerance, name
    assert not any(p.requires_grad or p.grad is not None for p in ours.backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_s_linear_layers_and_nothing_else(kind, model_dir):
    few, plain = (
        load_backbone(model_dir, bits=kind, dtype=torch.bfloat16),
        load_backbone(model_dir, dtype=torch.bfloat16),
    )
    found = [name for name, module in few.named_modules() if bits.is_in_few_bits(module)]
    assert len(found) == 2 * 7 and all(name.startswith("model.layers.") for name in found)
    assert torch.equal(few.lm_head.weight.cpu(), plain.lm_head.weight)
    assert not any(map(bits.is_in_few_bits, plain.modules()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_weight_takes(kind, tmp_path):
    make_backbone(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    layer = load_backbone(str(tmp_path), bits=kind, dtype=torch.bfloat16).model.layers[0].mlp.up_proj
    assert bits.held_bytes(torch.empty(3, 5, dtype=torch.bfloat16)) == 30
    # A byte, and scale and zero point of each of 128 rows; or half a byte, whose scales are no part of the parameter.
    least, most = {"int8": (64 * 128 + 2 * 128, 64 * 128 + 8 * 128), "nf4": (64 * 64, 64 * 64)}[kind]
    assert least <= bits.held_bytes(layer.weight) <= most


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_whole_model(kind, model_dir):
    few, plain = (with_heads(load_backbone(model_dir, bits=name, dtype=torch.bfloat16)) for name in (kind, None))
    assert FlopCount.of(few) == FlopCount.of(plain)


@needs("torchao")
def test_kernels_for_plain_weights_leave_int8_alone(model_dir):
    few = load_backbone(model_dir, bits="int8", dtype=torch.bfloat16)
    assert [layer for products in sharing(few) for layer in products.layers] == [few.lm_head]


@needs("bitsandbytes")
def test_a_checkpoint_that_is_quantised_already(model_dir, tmp_path):
    """Saved in nf4 and read again without a flag, it is the same model; a flag on top is refused."""
    load_backbone(model_dir, bits="nf4", dtype=torch.bfloat16).save_pretrained(tmp_path / "nf4")
    make_tokenizer("llama3").save_pretrained(tmp_path / "nf4")
    name = str(tmp_path / "nf4")
    first, again = (
        load_backbone(model_dir, bits="nf4", dtype=torch.bfloat16),
        load_backbone(name, dtype=torch.bfloat16),
    )
    ids = torch.randint(0, 320, (2, 24), device=first.device)
    assert torch.equal(first(ids).logits, again(ids).logits)
    assert bits.quantised_by(AutoConfig.from_pretrained(name)) == "bitsandbytes"
    with pytest.raises(BadInput, match="quantised already, by bitsandbytes: leave the flag out"):
        load_backbone(name, bits="nf4", dtype=torch.bfloat16)


def test_no_package(model_dir, monkeypatch):
    monkeypatch.setattr(bits.importlib.util, "find_spec", lambda name: None)
    for kind, package in bits.PACKAGES.items():
        with pytest.raises(BadInput, match=f"needs {package}, which is not installed: .*requirements-quantised.txt"):
            load_backbone(model_dir, bits=kind, dtype=torch.bfloat16)


def test_a_quantisation_without_its_package_is_one_sentence(model_dir):
    """What transformers says when it cannot read one comes with the name of the requirements."""
    config = AutoConfig.from_pretrained(model_dir)
    config.quantization_config = {"quant_method": "hqq", "quant_config": {}}
    config.save_pretrained(model_dir)
    with pytest.raises(BadInput, match=r"^cannot load the backbone .* in few bits: .*requirements-quantised.txt"):
        load_backbone(model_dir, dtype=torch.bfloat16)


def test_an_adapter_s_model(model_dir, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model_dir}"}}')
    with pytest.raises(BadInput, match=r"is an adapter, which is merged into whole weights: .* peft-merged"):
        load_backbone(str(tmp_path / "adapter"), bits="nf4", dtype=torch.bfloat16)
