"""training/sizes.py: weights against models that are made, and what layers keep against what autograd keeps."""

import pytest
import torch
import transformers

from model.lora import add_lora
from training.plan import Run, Step
from training.sizes import backbone_sizes

SIZES = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 224}
SIZES |= {"max_position_embeddings": 512}
KINDS = {
    "llama": lambda layers: transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1),
    "qwen2": lambda layers: transformers.Qwen2Config(**SIZES, num_hidden_layers=layers, num_key_value_heads=2),
    "qwen3": lambda layers: transformers.Qwen3Config(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, head_dim=32
    ),
    "mistral": lambda layers: transformers.MistralConfig(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, sliding_window=None
    ),
    "phi3": lambda layers: transformers.Phi3Config(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, pad_token_id=0
    ),
}


def saved_by_a_layer(kind: str, dtype, autocast: bool, rank: int | None = None, packed=False, tokens=256) -> float:
    """Bytes that autograd keeps for one more layer, without weights of the model."""
    found, ids = [], torch.zeros(1, tokens, dtype=torch.int64)
    places = torch.arange(tokens)[None] % (100 if packed else tokens)
    for layers in (1, 2):
        backbone = transformers.AutoModelForCausalLM.from_config(KINDS[kind](layers), dtype=dtype)
        if rank:
            add_lora(backbone, rank, 1, dtype=torch.float32)
        weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
        storages, alive = {}, []

        def keep(tensor, weights=weights, storages=storages, alive=alive):
            storage = tensor.untyped_storage()
            alive.append(tensor)  # or another could get the address
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            backbone.get_decoder()(ids, position_ids=places, use_cache=False)
        found.append(sum(storages.values()))
    return found[1] - found[0]


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast", "rank"),
    [
        *((kind, torch.float32, False, None) for kind in KINDS),
        ("llama", torch.bfloat16, False, None),
        ("llama", torch.float32, True, None),
        ("llama", torch.bfloat16, True, 2),
    ],
)
def test_what_autograd_keeps_of_a_layer(kind, dtype, autocast, rank, tmp_path):
    """On a CPU there are no kernels of Liger's: RMSNorm keeps its normed input too, and SwiGLU its SiLU. They are
    added here. Adapters freeze the norms, whose plain form keeps its input in fp32 instead. Phi 3's queries and keys
    are cut out of one product, which stays. The rest is small: two numbers a token of norms and attention, and copies
    of the adapters."""
    KINDS[kind](2).save_pretrained(tmp_path)
    backbone = backbone_sizes(str(tmp_path), rank)
    computed, trained = (2 if autocast or dtype == torch.bfloat16 else 4), (4 if dtype == torch.float32 or rank else 2)
    step = Step(Run(backbone, None, False, 1, 256, trained=trained, computed=computed))
    norms = backbone.norms + (kind == "qwen3") * 1.5 * 2  # and of queries and keys: 128 and 64 numbers of 64
    plain = norms * (step.unit if rank else step.stream) + 256 * 224 * computed
    if dtype == torch.bfloat16 and not rank:
        plain += norms * step.unit  # in fp32
    plain += 256 * (64 + 32) * computed * (kind == "phi3")
    kept = saved_by_a_layer(kind, dtype, autocast, rank)
    assert kept == pytest.approx(step.whole_layer() + plain, rel=0.05)
    assert kept >= step.whole_layer() + plain


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_packed_rows_cost_a_mask_in_each_layer(kind, tmp_path):
    """Of 256 x 256 numbers, and keys and values of 2 heads for the 4 of the queries."""
    KINDS[kind](2).save_pretrained(tmp_path)
    backbone = backbone_sizes(str(tmp_path))
    assert backbone.repeated == 2 * 2 * (32 if kind == "qwen3" else 16)
    kept = [saved_by_a_layer(kind, torch.float32, False, packed=packed) for packed in (False, True)]
    plan = [Step(Run(backbone, None, False, 1, 256, computed=4, packs=packs)).whole_layer() for packs in (False, True)]
    assert kept[1] - kept[0] == plan[1] - plan[0] == 4 * 256 * 256 + 256 * 4 * backbone.repeated


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_exactly(kind, tmp_path):
    KINDS[kind](2).save_pretrained(tmp_path)
    backbone = transformers.AutoModelForCausalLM.from_config(KINDS[kind](2))
    found = backbone_sizes(str(tmp_path))
    assert found.weights == backbone.num_parameters()
    assert found.layers == sum(p.numel() for p in backbone.model.layers.parameters())
    assert (found.hidden, found.vocab, found.depth, found.embeddings) == (64, 320, 2, 320 * 64)
    assert found.lm_head == (0 if backbone.config.tie_word_embeddings else 320 * 64)
    adapted = backbone_sizes(str(tmp_path), rank=2)
    assert adapted.adapters == 2 * found.a_rank and adapted.weights == found.weights
    assert backbone_sizes(str(tmp_path), 2, ["o_proj"]).adapters < adapted.adapters


def test_widths_by_hand(tmp_path):
    """Queries, keys and values of one product, 3 H, and H behind them; an MLP without a gate, 2 x 224."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    transformers.GPTNeoXConfig(**sizes, num_hidden_layers=2).save_pretrained(tmp_path)
    found = backbone_sizes(str(tmp_path))
    assert (found.products, found.mlp, found.widest) == (4 * 64 + 2 * 224, 2 * 224, 224)
    assert (found.norms, found.readers) == (2, 2)
