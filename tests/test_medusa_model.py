"""medusa_model.py, model/heads.py and model/heads_file.py: what heads compute, what trains, and what is on disk."""

import json

import pytest
import torch
import transformers
from conftest import make_backbone, randomise
from safetensors.torch import load_file, save_file

from common.errors import BadInput
from conversations.targets import IGNORE
from medusa_model import MedusaConfig, MedusaModel
from model.heads import ResBlock
from model.heads_file import HEADS_FILE, save_heads

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
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


def make_model(heads=3, layers=1, tied=False, random=True) -> MedusaModel:
    model = MedusaModel.from_backbone(
        make_backbone(tied, vocab_size=90), MedusaConfig(medusa_num_heads=heads, medusa_num_layers=layers)
    )
    if random:
        randomise(model.medusa_heads)
    return model


def make_batch():
    """Two rows; the first 4 labels and the padding of the second do not count."""
    ids = torch.randint(90, (2, 14))
    labels = ids.clone()
    labels[:, :4] = IGNORE
    labels[1, 10:] = IGNORE
    return ids, labels


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


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_heads_equal_the_lm_head_and_the_backbone_is_untouched(family):
    backbone = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    ids = torch.randint(90, (2, 11))
    want = backbone(ids).logits
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=2, medusa_num_layers=2))
    logits = model(ids).logits
    assert logits.shape == (3, 2, 11, 90)
    torch.testing.assert_close(logits[0], want, rtol=0, atol=1e-6)
    assert torch.equal(logits[1], logits[0]) and torch.equal(logits[2], logits[0])
    # and the loss of head 0 is what the backbone itself calls its loss (soft-capped or not)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.head_losses[0], backbone(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "chunked", "liger"])
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


@pytest.mark.parametrize("impl", ["torch", "chunked", "liger"])
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


def test_resblocks_are_separate_and_start_at_zero():
    model = make_model(heads=2, layers=2, random=False)
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    assert len({id(block.linear.weight) for block in blocks}) == len(blocks) == 4
    assert all(not p.any() for block in blocks for p in block.parameters())


def test_only_counting_rows_enter_a_head():
    model = make_model()
    ids, labels = make_batch()
    seen = []
    model.medusa_heads[1][0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    out = model.head_loss(2, model.last_hidden_state(ids), labels)
    assert out.rows == 10 + 6  # labels 4..13 and 4..9, each three places before
    assert seen == [(16, 32)]


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
    out = [model.head_loss(k, model.last_hidden_state(packed, position_ids=positions), packed, positions)
           for k in range(4)]  # fmt: skip
    for k in range(4):
        alone = [model.head_loss(k, model.last_hidden_state(ids), ids) for ids in (first, second)]
        assert out[k].rows == sum(one.rows for one in alone) == (9 - k - 1) + (5 - k - 1)
        torch.testing.assert_close(out[k].loss_sum, sum(one.loss_sum for one in alone), rtol=1e-5, atol=1e-4)


def test_head_without_a_row_has_loss_zero_and_zero_gradients():
    model = make_model()
    ids = torch.randint(90, (2, 3))  # head 2 and 3 look further than that
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.head_losses[2:].tolist() == [0, 0] and out.loss.isfinite()
    for parameter in model.medusa_heads[2].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_fp32_heads_on_a_bf16_backbone():
    model = MedusaModel.from_backbone(
        make_backbone(vocab_size=90).bfloat16(), MedusaConfig(medusa_num_heads=2), dtype=torch.float32
    )
    model.freeze_backbone()
    assert model.medusa_heads[0][-1].weight.dtype == torch.float32
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    assert model.medusa_heads[0][-1].weight.grad.dtype == torch.float32


# ---- files ----


@pytest.fixture
def saved(tmp_path):
    """A stage 1 directory over a backbone directory."""
    make_backbone(vocab_size=90).save_pretrained(tmp_path / "backbone")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=2, medusa_num_layers=1))
    randomise(model.medusa_heads)
    model.freeze_backbone()
    model.save_pretrained(tmp_path / "heads")
    return model, tmp_path / "heads"


def test_stage_1_files(saved):
    _model, directory = saved
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", HEADS_FILE]
    tensors = load_file(directory / HEADS_FILE)
    assert sorted(tensors) == [
        "0.0.linear.bias", "0.0.linear.weight", "0.1.weight", "1.0.linear.bias", "1.0.linear.weight", "1.1.weight"
    ]  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert config["medusa_num_heads"] == 2 and config["medusa_num_layers"] == 1
    assert config["hidden_size"] == 32 and config["vocab_size"] == 90
    assert config["base_model_name_or_path"] == str(directory.parent / "backbone")
    assert "architectures" not in config


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stage_1_round_trip(saved):
    model, directory = saved
    assert same_weights(MedusaModel.from_pretrained(directory), model)


@pytest.mark.parametrize("tied", [False, True])
def test_stage_2_is_a_plain_checkpoint_with_heads_beside_it(tmp_path, tied):
    model = make_model(heads=2, tied=tied)
    model.save_pretrained(tmp_path / "out")
    ids = torch.randint(90, (1, 7))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is transformers.LlamaForCausalLM
    torch.testing.assert_close(plain(ids).logits, model(ids).logits[0], rtol=0, atol=1e-6)
    assert same_weights(MedusaModel.from_pretrained(tmp_path / "out"), model)
    assert same_weights(MedusaModel.from_pretrained(tmp_path / "out" / "medusa_heads"), model)


def test_a_moved_backbone_can_be_named(saved):
    model, directory = saved
    (directory.parent / "backbone").rename(directory.parent / "elsewhere")
    with pytest.raises(BadInput, match="backbone"):
        MedusaModel.from_pretrained(directory)
    again = MedusaModel.from_pretrained(directory, base_model_name_or_path=directory.parent / "elsewhere")
    assert same_weights(again, model)


def spoil(directory, change):
    tensors = load_file(directory / HEADS_FILE)
    change(tensors)
    save_file(tensors, directory / HEADS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.bias"), r"lacks tensor 1\.0\.linear\.bias"),
        (lambda t: t.update({"2.1.weight": torch.zeros(90, 32)}), r"unexpected tensor 2\.1\.weight"),
        (lambda t: t.update({"0.1.weight": torch.zeros(91, 32)}), r"0\.1\.weight has shape \[91, 32\].*\[90, 32\]"),
        (lambda t: t["1.1.weight"].view(-1)[7].fill_(torch.nan), r"1\.1\.weight holds NaN"),
    ],
)
def test_a_wrong_heads_file_is_refused_with_the_tensor_named(saved, change, message):
    spoil(saved[1], change)
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_pretrained(saved[1])


def test_a_heads_file_cut_off_is_refused(saved):
    path = saved[1] / HEADS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match=HEADS_FILE):
        MedusaModel.from_pretrained(saved[1])


@pytest.mark.parametrize("text", ["{", "{}", '{"medusa_num_heads": "two"}'])
def test_a_broken_config_is_refused(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        MedusaModel.from_pretrained(saved[1])


def test_no_heads_there(tmp_path):
    with pytest.raises(BadInput, match="no Medusa heads"):
        MedusaModel.from_pretrained(tmp_path)


def test_heads_of_another_backbone_are_refused(saved, tmp_path):
    make_backbone(vocab_size=91).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match=r"vocab_size 90.*91"):
        MedusaModel.from_pretrained(saved[1], base_model_name_or_path=tmp_path / "other")


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    model, directory = saved
    before = (directory / HEADS_FILE).read_bytes()

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("model.heads_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_heads(model.medusa_heads.state_dict(), model.config.to_dict(), directory)
    assert (directory / HEADS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.PhiConfig(**{key: value for key, value in SMALL.items() if key != "head_dim"}), "bias"),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling"),
    ],
)
def test_backbones_whose_logits_are_something_else_are_refused(config, message):
    backbone = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_backbone(backbone, MedusaConfig())
