"""model/prefix.py: a decoder layer between backbone and heads, against the layer's formulas in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_backbone, randomise
from safetensors.torch import load_file, save_file
from setting import PLAIN_LLAMA
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, GPT2Config, Qwen3Config
from transformers.models.llama import modeling_llama

from common.errors import BadInput
from conversations.targets import IGNORE
from medusa_model import MedusaConfig, MedusaModel
from model.heads_file import HEADS_FILE
from model.prefix import make_prefix, run_prefix, use_liger_in_prefix

VOCAB, HIDDEN = 90, 32


def make_model(kind="medusa", stage=1, loss="ce", prefix=True, random=True) -> MedusaModel:
    config = MedusaConfig(medusa_num_heads=2, medusa_head_type=kind, medusa_rank=5, medusa_prefix_layer=prefix)
    model = MedusaModel.from_backbone(make_backbone(vocab_size=VOCAB), config)
    if random:
        randomise(model.medusa_heads, 0.2)
        randomise(model.prefix, 0.2)
    if stage == 1:
        model.freeze_backbone()
    model.medusa_loss = loss
    return model


def norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def by_hand(model: MedusaModel, hidden: torch.Tensor) -> torch.Tensor:
    """One conversation's hidden states `[T, H]` through the layer, position by position."""
    config, w = model.backbone.config, dict(model.prefix.named_parameters(prefix=""))
    w = {name.removeprefix("layers.0.").removesuffix(".weight"): tensor for name, tensor in w.items()}
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // heads
    x, eps, count = norm(hidden, w["input_layernorm"], config.rms_norm_eps), config.rms_norm_eps, len(hidden)
    theta = config.rope_parameters["rope_theta"]
    angle = torch.arange(count)[:, None] * theta ** (-torch.arange(0, size, 2) / size)

    def turned(states):  # [T, size]
        first, second = states.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    q, k, v = (x @ w[f"self_attn.{part}_proj"].T for part in "qkv")
    out = []
    for head in range(heads):
        mine = [
            part[:, slice(at * size, at * size + size)]
            for part, at in zip((q, k, v), (head, *[head // groups] * 2), strict=True)
        ]
        scores = turned(mine[0]) @ turned(mine[1]).T * size**-0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ mine[2])
    x = hidden + torch.cat(out, -1) @ w["self_attn.o_proj"].T
    y = norm(x, w["post_attention_layernorm"], eps)
    return x + (F.silu(y @ w["mlp.gate_proj"].T) * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T


@pytest.mark.parametrize(("stage", "kind", "loss"), [(1, "medusa", "kl"), (2, "medusa", "ce"), (2, "hydra", "lk")])
def test_losses_and_every_gradient_are_those_of_the_formulas(stage, kind, loss):
    """Packed rows: the layer does not look into another conversation."""
    model = make_model(kind, stage, loss).double()
    plain = copy.deepcopy(model)
    ids = torch.randint(VOCAB, (2, 20))
    labels = torch.where(torch.rand(2, 20) < 0.7, ids, IGNORE)
    cuts = (9, 12)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(20 - n)]) for n in cuts])
    out = model(ids, labels=labels, position_ids=positions)
    out.loss.backward()

    def pieced(self, hidden, **kwargs):
        return torch.stack(
            [
                torch.cat([by_hand(plain, part) for part in row.split([n, 20 - n])])
                for row, n in zip(hidden, cuts, strict=True)
            ]
        )

    plain.for_heads = pieced.__get__(plain)
    want = plain(ids, labels=labels, position_ids=positions)
    want.loss.backward()
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)  # RoPE's cosines are fp32
    for (name, got), (_, reference) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (got.grad is None) == (reference.grad is None) == (stage == 1 and name.startswith("backbone."))
        if got.grad is not None:
            assert reference.grad.abs().max() > 0
            torch.testing.assert_close(
                got.grad, reference.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_fresh_layer_changes_nothing_and_is_the_same_everywhere():
    with_layer = make_model(random=False)
    without = MedusaModel.from_backbone(with_layer.backbone, MedusaConfig(medusa_num_heads=2))
    ids = torch.randint(VOCAB, (2, 12))
    assert torch.equal(with_layer(ids).logits, without(ids).logits)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = make_prefix(with_layer.backbone, torch.float32, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), other in zip(with_layer.prefix.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and one.any() == (not name.endswith(("o_proj.weight", "down_proj.weight")))
    assert not any("embed" in name or name.startswith("norm") for name, _ in with_layer.prefix.named_parameters())


def test_padding_on_the_right_changes_no_token():
    model = make_model()
    hidden = torch.randn(2, 9, HIDDEN)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    got = run_prefix(model.prefix, hidden, attention_mask=mask)
    torch.testing.assert_close(got[0, :5], run_prefix(model.prefix, hidden[:1, :5])[0])
    torch.testing.assert_close(got[1], run_prefix(model.prefix, hidden[1:])[0])


def test_saved_and_loaded(tmp_path):
    model = make_model("hydra")
    model.config.base_model_name_or_path = "b"
    model.save_pretrained(tmp_path / "heads")
    tensors = load_file(tmp_path / "heads" / HEADS_FILE)
    names = {name for name in tensors if name.startswith("prefix.")}
    assert len(names) == 9 and "prefix.layers.0.self_attn.q_proj.weight" in names
    loaded = MedusaModel.from_pretrained(tmp_path / "heads", backbone=model.backbone)
    ids = torch.randint(VOCAB, (2, 12))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    make_model(prefix=False, random=False).save_pretrained(tmp_path / "without")
    assert "medusa_prefix_layer" not in (tmp_path / "without" / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("prefix.layers.0.mlp.up_proj.weight"), r"lacks tensor prefix\.layers\.0\.mlp\.up_proj"),
        (
            lambda t: t.update({"prefix.norm.weight": torch.ones(HIDDEN)}),
            "has prefix.norm.weight, and should hold the",
        ),
        (
            lambda t: t.update({"prefix.layers.0.input_layernorm.weight": torch.ones(4)}),
            r"shape \[4\], and this backb",
        ),
        (lambda t: t["prefix.layers.0.mlp.up_proj.weight"].fill_(torch.nan), "holds NaN or infinity"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("prefix.")], r"lacks tensor prefix\.layers\.0"),
    ],
)
def test_a_file_that_is_not_of_this_layer_is_refused(change, message, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / HEADS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / HEADS_FILE)
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_pretrained(tmp_path, backbone=model.backbone)


def test_tensors_of_a_layer_that_the_config_does_not_have_are_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"medusa_prefix_layer": true,', ""))
    with pytest.raises(BadInput, match=r"has an unexpected tensor prefix\.layers\.0"):
        MedusaModel.from_pretrained(tmp_path, backbone=model.backbone)
    (tmp_path / "config.json").write_text(config.replace('"medusa_prefix_layer": true', '"medusa_prefix_layer": 3'))
    with pytest.raises(BadInput, match="medusa_prefix_layer is neither true nor false"):
        MedusaModel.from_pretrained(tmp_path, backbone=model.backbone)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "pad_token_id": 0}
LLAMA_LIKE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}


@pytest.mark.parametrize("config", [Qwen3Config(**LLAMA_LIKE), Gemma2Config(**LLAMA_LIKE)])
def test_other_architectures(config):
    backbone = AutoModelForCausalLM.from_config(config)
    prefix = make_prefix(backbone, torch.float32, "cpu")
    randomise(prefix, 0.2)
    hidden = torch.randn(1, 7, 32)
    out = run_prefix(prefix, hidden)
    assert not torch.allclose(out, hidden, atol=0.1)
    hidden[0, 5] += 1  # causal
    changed = (run_prefix(prefix, hidden) - out).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("config", [FalconConfig(**SIZES), GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)])
def test_an_architecture_that_it_does_not_know_is_refused(config):
    with pytest.raises(BadInput, match=rf"--medusa_prefix_layer.* of {type(config).__name__[:4]}.*: leave it out"):
        make_prefix(AutoModelForCausalLM.from_config(config), torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_computes_the_same(dtype, monkeypatch):
    for name, plain in PLAIN_LLAMA.items():  # Liger replaces them for all models, and an earlier test may have let it
        monkeypatch.setattr(modeling_llama, name, plain)
    prefix = make_prefix(make_backbone(vocab_size=VOCAB), dtype, "cuda")
    randomise(prefix, 0.2)
    hidden = torch.randn(2, 7, HIDDEN, device="cuda").requires_grad_()

    def run():
        out = run_prefix(prefix, hidden).float()
        names = ["hidden", *dict(prefix.named_parameters())]
        return out, dict(
            zip(names, torch.autograd.grad(out.pow(2).sum(), [hidden, *prefix.parameters()]), strict=True)
        )

    want, grads = run()
    use_liger_in_prefix(prefix)
    layer = prefix.layers[0]
    for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
        assert module.forward.__func__ is not type(module).forward
    out, found = run()
    rtol = 1e-5 if dtype == torch.float32 else 3e-2  # bf16: three sums of rounded products lie behind each other
    pairs = {"out": (out, want)} | {name: (found[name], grads[name]) for name in grads}
    for name, (a, b) in pairs.items():
        assert (a - b).norm() <= rtol * b.norm(), name


@pytest.mark.gpu
def test_where_it_is_made_changes_nothing():
    backbone = make_backbone(vocab_size=VOCAB)
    here = make_prefix(backbone, torch.float32, "cpu")
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    with torch.device("cuda"):
        there = make_prefix(backbone.to("cuda"), torch.float32, "cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        assert other.is_cuda and torch.equal(one, other.cpu())
