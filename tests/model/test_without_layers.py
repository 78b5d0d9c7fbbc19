"""A backbone without its layers: what heads need of it where hidden states are stored."""

import pytest
import torch
from conftest import assert_same, make_backbone
from safetensors.torch import load_file, save_file
from tiny import SMALL, make_batch, make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import load_without_layers
from training.states import fingerprint

KINDS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config, Gemma3TextConfig, Phi3Config]


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_without_layers(kind, tmp_path, caplog, capsys):
    """All that is left of it is as it was; nothing else is read, and nobody is warned of that."""
    sizes = SMALL | {"pad_token_id": 0, "eos_token_id": 1}
    if kind in (Qwen2Config, Phi3Config):
        del sizes["head_dim"]
    if kind in (Gemma2Config, Gemma3TextConfig):
        sizes["final_logit_softcapping"] = 5.0
    whole = AutoModelForCausalLM.from_config(kind(**sizes))
    whole.save_pretrained(tmp_path)
    if not whole.config.tie_word_embeddings:  # a tensor of a layer that cannot be read
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(name for name in tensors if ".layers.1." in name and tensors[name].dim() == 2)
        save_file(tensors | {name: torch.zeros(1, 1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    caplog.clear(), capsys.readouterr()
    cut = load_without_layers(str(tmp_path), AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    assert not caplog.records and "UNEXPECTED" not in capsys.readouterr().err
    assert len(cut.get_decoder().layers) == 0 and cut.name_or_path == str(tmp_path)
    left = dict(cut.named_parameters())
    assert_same(left, {name: p for name, p in whole.named_parameters() if ".layers." not in name})
    half = load_without_layers(str(tmp_path), AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    assert fingerprint(half) == fingerprint(cut)
    with torch.no_grad():
        cut.get_output_embeddings().weight[0] += 1
    assert fingerprint(half) != fingerprint(cut)

    models = []
    for backbone in (whole, load_without_layers(str(tmp_path), whole.config)):
        model = MedusaModel.from_backbone(backbone.float(), MedusaConfig(medusa_num_heads=3))
        model.freeze_backbone()
        model.medusa_loss = "kl"
        models.append(model)
    online, stored = models
    ids, labels = make_batch()
    hidden = online.last_hidden_state(ids)
    want = online(ids, labels=labels, head_weights=[1.0] * 4)
    got = stored(ids, labels=labels, head_weights=[1.0] * 4, hidden=hidden)
    want.loss.backward(), got.loss.backward()
    assert torch.equal(got.head_losses, want.head_losses) and online.softcap == stored.softcap
    for a, b in zip(stored.medusa_heads.parameters(), online.medusa_heads.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_backbone_that_lacks_its_lm_head(tmp_path):
    make_backbone().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"it has no tensor lm_head\.weight"):
        load_without_layers(str(tmp_path), AutoConfig.from_pretrained(tmp_path))


def test_stored_states_come_through_the_model_as_they_are():
    model, (ids, _) = make_model(), make_batch()
    hidden = torch.randn(*ids.shape, 32)
    assert model.last_hidden_state(ids, hidden=hidden) is hidden
    assert torch.equal(model(ids, hidden=hidden, output_hidden=True).last_hidden_state, hidden)
