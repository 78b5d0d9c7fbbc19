"""decoding/decoder.py with sampling: exact samples are the backbone's, typical ones the paper's."""

import itertools

import pytest
import torch
from decoders import DEVICE, PROMPTS, VOCAB, bushy, decode, make_model

from decoding.decoder import Decoder
from decoding.growing import Adaptive
from decoding.sampling import Sampling

kinds = pytest.mark.parametrize("kind", ["medusa", "markov", "hydra"])


@kinds
def test_exact_sampling_draws_from_the_backbone(kind):
    """Two tokens after the first, 8,000 times: as often as the product of the backbone's probabilities says."""
    model, temperature, rows, rounds = make_model(kind=kind), 1.5, 1000, 8
    prompt = PROMPTS[0]
    chances = torch.zeros(VOCAB, VOCAB, VOCAB)
    with torch.inference_mode():
        for text in itertools.product(range(VOCAB), repeat=2):
            logits = model.backbone(torch.tensor([prompt + list(text)], device=DEVICE)).logits[0, -3:].cpu()
            p = (logits / temperature).softmax(-1)
            chances[text] = p[0, text[0]] * p[1, text[1]] * p[2]
    decoder = Decoder(model, bushy(2, 4), rows, 40, Sampling(temperature))
    counts, accepted = torch.zeros(VOCAB, VOCAB, VOCAB), 0
    for _ in range(rounds):
        answers, passes = decode(decoder, [prompt] * rows, 3)
        for answer in answers:
            counts[tuple(answer)] += 1
        accepted += 2 * rows - sum(passes)
    assert accepted > rows  # else the tree had no part in it
    total = rows * rounds
    frequent = chances * total > 5
    z = (counts - chances * total)[frequent] / (chances * (1 - chances) * total)[frequent].sqrt()
    assert frequent.sum() > 50
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean() < 1.25
    assert torch.isclose(counts[frequent].sum() / total, chances[frequent].sum(), atol=0.02)


def paper_bound(logits, sampling):
    """p and min(epsilon, delta * exp(-entropy)), as the paper has it."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    entropy = -(p * p.log()).sum()
    return p, min(sampling.epsilon, sampling.delta * torch.exp(-entropy).item())


@kinds
@pytest.mark.parametrize(
    "epsilon, delta, tree", [(0.09, 0.3, bushy(3)), (0.3, 0.9, bushy(3)), (0.02, 0.05, Adaptive(30, 5))]
)
def test_typical_acceptance_is_the_papers(epsilon, delta, tree, kind):
    """Each pass accepts the longest way whose tokens are all typical, and none other; of equal ones the likeliest.
    Looks at the second row of a batch."""
    model, sampling = make_model(kind=kind), Sampling(1.0, True, epsilon, delta)
    decoder = Decoder(model, tree, 2, 80, sampling, graph=False)  # or the next pass is under way already
    text, lengths, refused = list(PROMPTS[0]), [], 0
    generator = decoder.run([PROMPTS[2], PROMPTS[0]], 60)
    text += next(generator)[1]
    for _ in range(10):
        guesses = decoder.tokens[1].tolist()
        assert guesses[0] == text[-1]
        ways = {}
        for path, depth in zip(decoder.tree.path[1].tolist(), decoder.tree.depth[1].tolist(), strict=True):
            tokens = [guesses[node] for node in path[1 : depth + 1]]
            logits = model.backbone(torch.tensor([text + tokens], device=DEVICE)).logits[0, -len(tokens) - 1 :].cpu()
            chances, fine = 1.0, True
            for token, row in zip(tokens, logits, strict=False):
                p, bound = paper_bound(row, sampling)
                fine, chances = fine and p[token] > bound, chances * p[token].item()
            refused += not fine
            if fine:
                ways[tuple(tokens)] = (len(tokens), chances, *paper_bound(logits[-1], sampling))
        want = max(ways, key=lambda way: ways[way][:2])
        _, new = next(generator)
        assert tuple(new[:-1]) == want
        p, bound = ways[want][2:]
        assert p[new[-1]] > bound  # the token behind them is drawn from the typical ones
        text += new
        lengths.append(len(new))
    assert max(lengths) > 1
    assert refused > 0


def test_a_lower_temperature_is_less_random():
    model = make_model()
    colder = [decode(Decoder(model, bushy(3), 64, 40, Sampling(t)), [PROMPTS[0]] * 64, 20)[0] for t in (0.01, 3.0)]
    assert [len(set(map(tuple, answers))) > 32 for answers in colder] == [False, True]
