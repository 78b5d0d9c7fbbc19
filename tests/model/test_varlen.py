"""model/varlen.py: packed rows give what their conversations give alone: losses, and gradients of every parameter."""

import pytest
import torch
import transformers
from odd import LLAMA, MAKE, make_odd

from medusa_model import MedusaConfig, MedusaModel
from model.varlen import TESTED, VARLEN, attend, misfit, misfit_of_config, places, starts_of, use_varlen

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = ((9, 1, 6), (5, 8))  # of two rows, the second with 3 tokens of padding
MAKE_DENSE = {
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def make(name: str, monkeypatch) -> MedusaModel:
    if name in MAKE_DENSE:
        more = {"sliding_window": None} | ({"head_dim": 16} if name == "qwen3" else {})
        monkeypatch.setitem(MAKE, name, lambda: MAKE_DENSE[name](**LLAMA, **more))
    torch.manual_seed(0)
    return MedusaModel.from_backbone(make_odd(name), MedusaConfig(medusa_num_heads=2)).train()


def batches(device=CPU):
    """The same conversations packed, with padding, and one by one."""
    generator = torch.Generator().manual_seed(1)
    parts = [[torch.randint(2, 320, (n,), generator=generator) for n in row] for row in LENGTHS]
    packed = {"input_ids": torch.zeros(2, 16), "position_ids": torch.zeros(2, 16), "labels": torch.full((2, 16), -100)}
    packed = {key: value.long() for key, value in packed.items()}
    for i, row in enumerate(parts):
        filled = slice(sum(map(len, row)))
        packed["input_ids"][i, filled] = packed["labels"][i, filled] = torch.cat(row)
        packed["position_ids"][i, filled] = torch.cat([torch.arange(len(part)) for part in row])
    alone = [{"input_ids": part[None].to(device), "labels": part[None].to(device)} for row in parts for part in row]
    return {key: value.to(device) for key, value in packed.items()}, alone


def losses(model: MedusaModel, batches: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums of losses over rows of all batches `[K + 1]`, and their gradients."""
    model.zero_grad()
    rows = torch.ones(model.num_losses, device=model.lm_head.weight.device)
    sums = 0
    for batch in batches:
        out = model(**batch, rows=rows)
        out.loss.backward()
        sums = sums + out.head_losses
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", TESTED)
def test_packed_is_unpacked(name, recompute, monkeypatch):
    model, (packed, alone) = make(name, monkeypatch), batches()
    want, gradients = losses(model, alone)
    assert misfit_of_config(model.backbone.config) is None
    model.backbone.set_attn_implementation(VARLEN)
    if recompute:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    found, mine = losses(model, [packed])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert mine.keys() == gradients.keys() and "backbone.model.layers.0.self_attn.q_proj.weight" in mine
    for key, gradient in gradients.items():
        assert (mine[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, key
    unpacked, _ = losses(model, alone)  # batches without places, of an evaluation
    torch.testing.assert_close(unpacked, want, rtol=1e-4, atol=1e-4)


def test_where_segments_begin():
    positions = torch.tensor([[0, 1, 2, 0, 0], [3, 4, 0, 1, 0]])
    assert starts_of(positions).tolist() == [0, 3, 4, 5, 7, 9, 10]
    assert starts_of(positions).dtype == torch.int32


def test_others_are_told_nothing_of_segments(monkeypatch):
    assert places(make("llama", monkeypatch).backbone, torch.arange(4)[None]).keys() == {"position_ids"}


@pytest.mark.parametrize(
    "kwargs", [{"sliding_window": 4}, {"softcap": 3.0}, {"dropout": 0.1}, {"s_aux": torch.zeros(1)}, {"mask": 1}]
)
def test_what_it_does_not_know_is_not_left_out(kwargs):
    states, mask = torch.zeros(1, 1, 4, 8), torch.ones(1, 4) if kwargs.pop("mask", None) else None
    with pytest.raises(ValueError, match="attention of variable length knows no"):
        attend(torch.nn.Module(), states, states, states, mask, **kwargs)


@pytest.mark.parametrize(
    "config, reason",
    [
        (transformers.MistralConfig(**LLAMA, sliding_window=8), "a sliding window"),
        (transformers.Gemma2Config(**LLAMA), "not tested with gemma2"),
        (transformers.LlamaConfig(**LLAMA, head_dim=288), "heads of 288 numbers"),
        (transformers.LlamaConfig(**LLAMA, attention_dropout=0.1), "dropout"),
        (transformers.LlamaConfig(**LLAMA, attn_implementation="eager"), "eager"),
    ],
)
def test_what_does_not_fit(config, reason):
    if config._attn_implementation is None:
        config._attn_implementation = "sdpa"
    assert reason in misfit_of_config(config)


def test_where_there_is_no_kernel():
    config = transformers.LlamaConfig(**LLAMA)
    assert "no kernel for cpu" in misfit(config, CPU, torch.bfloat16)
    assert "does not know float32" in misfit(config, CUDA, torch.float32)


@pytest.mark.gpu
def test_the_kernel(monkeypatch):
    """In bf16 by the kernel, against fp32 one by one: losses may part by 3 %, gradients by 10 % of their norm."""
    model, (packed, alone) = make("llama", monkeypatch).to(CUDA), batches(CUDA)
    want, gradients = losses(model, alone)
    model.backbone.set_attn_implementation(VARLEN)
    with torch.autocast("cuda", torch.bfloat16):
        found, mine = losses(model, [packed])
    torch.testing.assert_close(found, want, rtol=0.03, atol=0.03)
    for key, gradient in gradients.items():
        assert (mine[key] - gradient).norm() <= 0.1 * gradient.norm() + 1e-3, key


def test_use_varlen_says_what_it_did(monkeypatch, caplog):
    backbone = make("llama", monkeypatch).backbone
    caplog.set_level("INFO")
    assert not use_varlen(backbone, CPU, torch.bfloat16)
    assert backbone.config._attn_implementation == "sdpa" and "with a mask, slower" in caplog.text
    monkeypatch.setattr("model.varlen.misfit", lambda *_: None)
    assert use_varlen(backbone, CPU, torch.bfloat16) and "of variable length" in caplog.messages[-1]
    told = places(backbone, torch.tensor([[0, 1, 0]]))
    assert told["cu_seq_lens_q"].tolist() == [0, 2, 3] and told["max_length_k"] == 3
