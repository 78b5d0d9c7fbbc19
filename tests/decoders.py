"""A tiny model whose guesses are right often enough to exercise every way through a tree, trees, and plain decoding.

The vocabulary has 9 tokens, for several tests of decoding/.
"""

import copy
import itertools
import random

import torch
from conftest import make_backbone, randomise

from decoding.decoder import Decoder
from medusa_model import MedusaConfig, MedusaModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 9
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6], [2, 2, 7, 7, 1, 0, 3]]


LOUD = 100  # so that guesses depend on the path as much as on the hidden state


def make_model(heads=3, tokens=None, kind="medusa", prefix=False, **kwargs) -> MedusaModel:
    """tokens: the only ones that heads guess. kind: of the heads. prefix: whether they have a prefix layer."""
    model = MedusaModel.from_backbone(
        make_backbone(**{"vocab_size": VOCAB, "head_dim": 16} | kwargs),
        MedusaConfig(medusa_num_heads=heads, medusa_head_type=kind, medusa_rank=5, medusa_prefix_layer=prefix),
        token_map=None if tokens is None else torch.tensor(tokens),
    )
    randomise(model.medusa_heads, 0.5)
    if prefix:
        randomise(model.prefix, 0.5)
    for head in model.medusa_heads:
        with torch.no_grad():
            if kind == "markov":
                head.table.mul_(LOUD)
            elif kind == "hydra":
                head[0].linear.weight[:, model.config.hidden_size :].mul_(LOUD)
    return model.eval().to(DEVICE)


def bushy(heads, ranks=3):
    return [path for depth in range(1, heads + 1) for path in itertools.product(range(ranks), repeat=depth)]


def random_tree(heads, nodes, seed, ranks=VOCAB):
    """Any valid tree of so many nodes: each hangs on one that is there."""
    rng, paths = random.Random(seed), set()
    while len(paths) < min(nodes, sum(ranks**depth for depth in range(1, heads + 1))):
        parent = rng.choice([(), *sorted(paths)])
        if len(parent) < heads:
            paths.add((*parent, rng.randrange(ranks)))
    return sorted(paths, key=lambda path: (len(path), path))


def greedy(backbone, prompt, max_new_tokens, eos=None) -> list[int]:
    """What transformers decodes, with the attention it calls eager."""
    backbone = copy.deepcopy(backbone)
    backbone.set_attn_implementation("eager")
    ids = torch.tensor([prompt], device=DEVICE)
    out = backbone.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def assert_lossless(rng, model, size):
    """Of random prompts, where one of the tokens ends the text. size: makes the tree when they are drawn."""
    prompts = [rng.choices(range(VOCAB), k=rng.randint(1, 30)) for _ in range(4)]
    eos = rng.randrange(VOCAB)
    want = [greedy(model.backbone, prompt, 25, eos) for prompt in prompts]
    assert decode(Decoder(model, size(), 4, 60), prompts, 25, {eos})[0] == want


def decode(decoder, prompts, max_new_tokens, eos=frozenset()):
    """-> (new tokens of each prompt, passes each took after the prefill)."""
    answers, passes = [[] for _ in prompts], [-1] * len(prompts)
    for new in decoder.run(prompts, max_new_tokens, eos):
        for row, tokens in enumerate(new):
            answers[row] += tokens
            passes[row] += bool(tokens)
    return answers, passes
