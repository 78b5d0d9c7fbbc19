"""decoding/judge.py: a pass over a draft tree has the logits of plain texts, or nothing is decoded."""

from functools import partial

import pytest
import torch
from decoders import DEVICE
from odd import make_odd

from common.errors import BadInput
from decoding.decoder import Decoder
from decoding.growing import Adaptive
from decoding.judge import check_pass
from decoding.sampling import Sampling
from medusa_model import MedusaConfig, MedusaModel

TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)]


def make(name, dtype=torch.float32, kind="medusa") -> MedusaModel:
    config = MedusaConfig(medusa_num_heads=2, medusa_head_type=kind)
    return MedusaModel.from_backbone(make_odd(name, dtype), config).eval().to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox", "opt", "mixtral", "qwen3_moe"])
def test_good_models_pass(name, dtype):
    model = make(name, dtype)
    for tree, length in ((TREE, 100), ([], 1), (TREE, 3)):
        check_pass(Decoder(model, tree, 2, length, graph=False))


@pytest.mark.parametrize("kind", ["medusa", "markov", "hydra"])
def test_every_type_of_heads_and_trees_that_grow_pass(kind):
    model = make("llama", kind=kind)
    for tree in (TREE, Adaptive(8, 3)):
        check_pass(Decoder(model, tree, 2, 100, graph=False))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("falcon", "takes no other attention"),
        ("falcon_h1 x 1", "decoding cannot run FalconH1ForCausalLM: .* IndexError .*not supported"),
        ("recurrent_gemma", "has no max_position_embeddings"),
    ],
)
def test_models_that_cannot_be_decoded_are_refused(name, sentence):
    with pytest.raises(BadInput, match=sentence):
        check_pass(Decoder(make(name), TREE, 1, 100, graph=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["depth", "ancestors"])
def test_wrong_places_and_masks_are_seen(wrong, dtype):
    decoder = Decoder(make("llama", dtype), TREE, 1, 100, graph=False)
    if wrong == "depth":
        decoder.read = partial(read_elsewhere, decoder, decoder.read)
    else:
        decoder.tree.ancestors.fill_(True)
    with pytest.raises(BadInput, match=r"differ by \d.*% of their spread"):
        check_pass(decoder)


def read_elsewhere(decoder, read):
    """With nodes far from where they belong: with random weights a place more or less is lost in bf16's rounding."""
    decoder.tree.depth.mul_(20)
    try:
        return read()
    finally:
        decoder.tree.depth.div_(20, rounding_mode="floor")


def test_no_random_number_is_taken():
    decoder = Decoder(make("llama"), [], 1, 100, Sampling(1.0), graph=False)
    torch.manual_seed(3)
    want = torch.rand(1, device=DEVICE)
    torch.manual_seed(3)
    check_pass(decoder)
    assert torch.equal(torch.rand(1, device=DEVICE), want)
