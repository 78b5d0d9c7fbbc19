"""medusa_model.py: what heads compute, what trains."""

import pytest
import torch
import transformers
from conftest import TRITON, make_backbone
from tiny import SMALL, make_batch, make_model

from conversations.targets import IGNORE
from medusa_model import MedusaConfig, MedusaModel
from model.path_heads import HEAD_TYPES

FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL),
    "gemma": transformers.GemmaConfig(**SMALL),
    "gemma2": transformers.Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**SMALL),
}


def plain_loss(model, ids, labels, weights):
    """The definition, in a few lines of plain torch: ResBlocks, projection, shift, mean over rows."""
    hidden = model.backbone.model(ids).last_hidden_state
    losses = []
    for k in range(len(model.medusa_heads) + 1):
        x = hidden[:, : -(k + 1)]
        if k == 0:
            logits = model.backbone.lm_head(x)
        else:
            *blocks, projection = model.medusa_heads[k - 1]
            for block in blocks:
                x = x + torch.nn.functional.silu(x @ block.linear.weight.t() + block.linear.bias)
            logits = x @ projection.weight.t()
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, k + 1 :].flatten(), ignore_index=IGNORE)
        )
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)), losses


@pytest.mark.parametrize("kind", HEAD_TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_heads_equal_the_lm_head_and_the_backbone_is_untouched(family, kind):
    backbone = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    ids = torch.randint(90, (2, 11))
    want = backbone(ids).logits
    config = MedusaConfig(medusa_num_heads=2, medusa_num_layers=2, medusa_head_type=kind)
    model = MedusaModel.from_backbone(backbone, config)
    logits = model(ids).logits
    assert logits.shape == (3, 2, 11, 90)
    torch.testing.assert_close(logits[0], want, rtol=0, atol=1e-6)
    # A markov head's products are wider by columns that meet zeros, and sum up in another order.
    torch.testing.assert_close(logits[1:], logits[:1].expand(2, -1, -1, -1), rtol=0, atol=1e-6 * (kind == "markov"))
    # and the loss of head 0 is what the backbone itself calls its loss (soft-capped or not)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.head_losses[0], backbone(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_every_gradient_equal_the_definition(impl, layers, stage, tied):
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(layers=layers, tied=tied).to(device)
    ids, labels = (tensor.to(device) for tensor in make_batch())
    weights = [1.0 if stage == 2 else 0.0, 0.5, 0.25, 0.125]
    if stage == 1:
        model.freeze_backbone()
    want_loss, want_losses = plain_loss(model, ids, labels, weights)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    want = torch.autograd.grad(want_loss, [p for p in model.parameters() if p.requires_grad])
    model.loss_impl = impl
    out = model(ids, labels=labels, head_weights=weights)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want_loss, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(out.head_losses[1:], torch.stack(want_losses[1:]), rtol=2e-5, atol=1e-5)
    assert (
        out.head_losses[0].isnan()
        if stage == 1
        else out.head_losses[0].item() == pytest.approx(want_losses[0].item(), rel=2e-5)
    )
    for name, gradient in zip(names, want, strict=True):
        got = model.get_parameter(name).grad
        assert got is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("liger", marks=TRITON)])
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_loss_and_every_gradient_are_near_the_definition_in_fp32(impl, stage):
    """Same (bf16) weights, products in bf16 against fp32: 8 bits a number, so 3 % of a gradient's norm."""
    device = "cuda" if impl == "liger" and torch.cuda.is_available() else "cpu"
    model = make_model(layers=2).to(device, torch.bfloat16)
    ids, labels = (tensor.to(device) for tensor in make_batch())
    if stage == 1:
        model.freeze_backbone()
    weights = [1.0 if stage == 2 else 0.0, 0.5, 0.25, 0.125]
    model.loss_impl = impl
    out = model(ids, labels=labels, head_weights=weights)
    out.loss.backward()
    got = {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.float()
    want_loss = plain_loss(model, ids, labels, weights)[0]
    want_loss.backward()
    assert out.loss.item() == pytest.approx(want_loss.item(), rel=1e-2)
    for name, gradient in got.items():
        want = model.get_parameter(name).grad
        assert ((gradient - want).norm() / want.norm()).item() < 3e-2, name


def test_stage_1_frozen_backbone_has_no_gradient_and_stays_in_eval_mode():
    model = make_model()
    model.freeze_backbone()
    model.train()
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert not model.backbone.training and model.medusa_heads.training
    assert not model.last_hidden_state(ids).requires_grad  # so nothing was kept for a backward


def test_accuracy_is_the_share_of_right_rows():
    model = make_model()
    ids, labels = make_batch()
    out = model(ids, labels=labels)
    logits = model(ids).logits
    for k in range(4):
        shift = k + 1
        counts = labels[:, shift:] != IGNORE
        right = (logits[k, :, :-shift].argmax(-1) == labels[:, shift:])[counts].float().mean()
        assert out.head_accuracies[k] == pytest.approx(right.item())


def test_left_padding_needs_and_gets_its_attention_mask():
    model = make_model().eval()
    ids = torch.randint(90, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    logits = model(padded, attention_mask=mask, position_ids=(torch.arange(9) - 3).clamp(min=0)[None]).logits
    torch.testing.assert_close(logits[:, :, 3:], model(ids).logits, rtol=1e-4, atol=1e-4)


def test_packed_rows_equal_the_conversations_alone():
    """The backbone's mask and the heads' targets both keep conversations of one row apart."""
    model = make_model()
    first, second = torch.randint(90, (1, 9)), torch.randint(90, (1, 5))
    packed, positions = torch.cat([first, second], 1), torch.tensor([[*range(9), *range(5)]])
    out = [model.head_loss(k, *[model.last_hidden_state(packed, position_ids=positions)] * 2, packed, None, positions)
           for k in range(4)]  # fmt: skip
    for k in range(4):
        alone = [model.head_loss(k, *[model.last_hidden_state(ids)] * 2, ids, None) for ids in (first, second)]
        assert out[k].rows == sum(one.rows for one in alone) == (9 - k - 1) + (5 - k - 1)
        torch.testing.assert_close(out[k].loss_sum, sum(one.loss_sum for one in alone), rtol=1e-5, atol=1e-4)


def test_fp32_heads_on_a_bf16_backbone():
    model = MedusaModel.from_backbone(
        make_backbone(vocab_size=90).bfloat16(), MedusaConfig(medusa_num_heads=2), dtype=torch.float32
    )
    model.freeze_backbone()
    assert model.medusa_heads[0][-1].weight.dtype == torch.float32
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    assert model.medusa_heads[0][-1].weight.grad.dtype == torch.float32
