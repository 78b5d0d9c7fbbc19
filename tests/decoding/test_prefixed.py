"""decoding/prefixed.py: with a prefix layer heads guess what they do in training, and the text is the backbone's."""

import pytest
import torch
from decoders import DEVICE, PROMPTS, VOCAB, bushy, decode, greedy, make_model, random_tree

from decoding.accuracy import ranks_of_heads
from decoding.decoder import Decoder
from decoding.growing import Adaptive
from decoding.tree import chain

FIVE = [0, 2, 3, 5, 8]  # a draft vocabulary
kinds = pytest.mark.parametrize("kind", ["medusa", "markov", "hydra"])


def lean_on_attention(model):
    """A layer that says much of other tokens, or heads would hardly notice a wrong cache."""
    with torch.no_grad():
        model.prefix.get_submodule("layers.0.self_attn.o_proj").weight.mul_(3)


@kinds
@pytest.mark.parametrize("tokens", [None, FIVE])
@torch.no_grad()
def test_heads_guess_behind_the_text_as_they_do_in_training(tokens, kind):
    """Of each node: the rank-th best of its head's logits, as MedusaModel.forward has them on the text so far and the
    tokens on the way to the node."""
    model, passes = make_model(3, tokens, kind, prefix=True), []
    lean_on_attention(model)
    for size in (chain(3), bushy(3), random_tree(3, 12, 1, 5), Adaptive(9, 3)):
        decoder = Decoder(model, size, len(PROMPTS), 60, graph=False)  # or the next pass is under way already
        texts = [list(prompt) for prompt in PROMPTS]
        for new in decoder.run(PROMPTS, 12):
            for row, text in enumerate(texts):
                text += new[row]
                passes.append(len(new[row]))
                if not new[row] or len(text) == len(PROMPTS[row]) + 12:
                    continue
                tree, guesses = [part[row] for part in decoder.tree], decoder.tokens[row]
                for node in range(1, len(guesses)):
                    depth, rank = int(tree[1][node]), int(tree[2][node])
                    way = guesses[tree[4][node, 1:depth]].tolist()  # behind the root, up to the parent
                    ids = torch.tensor([text + way + [0] * 3], device=DEVICE)  # heads' paths must not leave the row
                    logits = model(ids).logits[depth, 0, len(text) - 2]
                    assert int(guesses[node]) == int(logits.topk(rank + 1).indices[rank])
    assert max(passes) > 1


@kinds
def test_greedy_decoding_is_lossless(kind):
    model = make_model(4, None, kind, prefix=True)
    want = [greedy(model.backbone, prompt, 25) for prompt in PROMPTS]
    for size in (chain(4), bushy(4, 2), random_tree(4, 20, 2), Adaptive(15, 4)):
        assert decode(Decoder(model, size, len(PROMPTS), 80), PROMPTS, 25)[0] == want
    assert decode(Decoder(model, [], len(PROMPTS), 80), PROMPTS, 25)[0] == want
    one = Decoder(model, bushy(4, 2), 1, 80)
    assert [decode(one, [prompt], 25)[0][0] for prompt in PROMPTS] == want


def test_the_prefix_layer_makes_a_difference():
    """Or nothing above is tested."""
    model = make_model(3, prefix=True)
    lean_on_attention(model)
    ids = torch.randint(VOCAB, (1, 12), device=DEVICE)
    with torch.no_grad():
        hidden = model.read(ids)[0]
        with_layer, alone = (ranks_of_heads(model, part, None, ids) for part in (hidden, hidden))
        assert torch.equal(with_layer, alone)
        model.prefix = None
        without = ranks_of_heads(model, hidden, None, ids)
    assert torch.equal(with_layer[..., 0], without[..., 0]) and not torch.equal(with_layer[..., 1:], without[..., 1:])


def test_the_backbone_is_left_as_it_was():
    model = make_model(2, prefix=True)
    before = model.backbone.config._attn_implementation, model.prefix.config._attn_implementation
    decode(Decoder(model, bushy(2), 1, 40), PROMPTS[:1], 5)
    assert (model.backbone.config._attn_implementation, model.prefix.config._attn_implementation) == before


@pytest.mark.gpu
@kinds
def test_the_kernels_decode_the_same(kind, monkeypatch):
    """fp32 with and without the attention kernel, and as a CUDA graph."""
    model = make_model(3, FIVE, kind, prefix=True)
    want = [greedy(model.backbone, prompt, 30) for prompt in PROMPTS]
    passes = []
    for graph, kernels in ((False, False), (False, True), (True, True)):
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr("decoding.decoder.can_run", lambda device, size: False)
            decoder = Decoder(model, bushy(3), len(PROMPTS), 80, graph=graph)
            passes.append([[len(row) for row in new] for new in decoder.run(PROMPTS, 30)])
            assert decode(decoder, PROMPTS, 30)[0] == want
    assert passes[0] == passes[1] == passes[2]  # the same guesses
