"""decoding/attention.py: the cache of a tree, and attention that it does not know."""

import pytest
import torch
from decoders import DEVICE, VOCAB
from transformers import AutoModelForCausalLM, BloomConfig

from common.errors import BadInput
from decoding.attention import TreeCache, attend
from model.backbone import context_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache(dtype):
    """What a pass writes stands behind each row's length, and what is accepted moves, with sources and targets that
    overlap; nothing else changes."""
    layers, batch, heads, size, places = 2, 2, 3, 4, 20
    cache, expected = TreeCache(layers, places, kernels=False), torch.zeros(layers, 2, batch, heads, places, size)
    expected = expected.to(DEVICE, dtype)
    for lengths, count in ((None, 6), ([3, 6], 5)):
        cache.length = lengths and torch.tensor(lengths, device=DEVICE)[:, None]
        for layer in range(layers):
            new = torch.randn(2, batch, count, heads, size, device=DEVICE).to(dtype).transpose(2, 3)
            for row, start in enumerate(lengths or [0, 0]):
                expected[layer, :, row, :, start : start + count] = new[:, row]
            found = cache.update(*new, layer)
            assert all(map(torch.equal, found, expected[layer] if lengths else new))
    source, target = torch.tensor([[3, 5, 7], [6, 7, 9]], device=DEVICE), torch.tensor([[3, 4, 5], [6, 7, 8]])
    cache.move(source, target.to(DEVICE))
    before = expected.clone()
    for row, pairs in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        for old, new in zip(*pairs, strict=True):
            expected[:, :, row, :, new] = before[:, :, row, :, old]
    assert torch.equal(cache.states, expected)


def test_attention_it_does_not_know_is_refused():
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(BadInput, match="attention sinks"):
        attend(None, query, query, query, None, 1.0, s_aux=torch.zeros(2))
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(BadInput, match="BloomForCausalLM has no max_position_embeddings"):
        context_length(bloom)
