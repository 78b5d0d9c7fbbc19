"""decoding/candidate_kernels.py against decoding/candidates.py, on a GPU or in Triton's interpreter."""

import pytest
import torch

from decoding import candidate_kernels, candidates
from decoding.candidates import Candidates
from decoding.tree import Layout


def random_candidates(batch, beam, levels, device, values=None) -> Candidates:
    """As a beam makes them: no child is likelier than its parent. values: how many different ones there are."""
    count = 1 + beam + (levels - 2) * beam**2
    chance, parent = torch.zeros(batch, count), torch.zeros(batch, count, dtype=torch.int64)
    for i in range(1, count):
        level = (i - 1) // beam if i <= beam else (i - 1 - beam) // beam**2
        first = 1 if i <= beam or level == 0 else 1 + beam + (level - 1) * beam**2
        if i > beam:  # any of the level before
            parent[:, i] = first + torch.randint(beam if level == 0 else beam**2, (batch,))
        step = torch.rand(batch) if values is None else torch.randint(values, (batch,)).float()
        chance[:, i] = chance.gather(1, parent[:, i : i + 1])[:, 0] - step
    token = torch.randint(1000, (batch, count))
    return Candidates(*(part.to(device) for part in (chance, token, parent)))


def room(batch, nodes, levels, device) -> tuple[torch.Tensor, Layout]:
    """Tokens and tree, with something in them."""
    shapes = [nodes], [nodes], [nodes], [nodes, nodes], [nodes, levels]
    tokens, *parts = (torch.full((batch, *shape), 7, device=device) for shape in ([nodes], *shapes))
    parts[3] = parts[3] > 0
    return tokens, Layout(*parts)


@pytest.mark.parametrize(("beam", "levels", "nodes", "values"), [(1, 3, 3, None), (3, 4, 12, 2), (8, 4, 33, None)])
def test_a_tree_is_laid_as_in_torch(beam, levels, nodes, values, device):
    found = random_candidates(2, beam, levels, device, values)
    results = []
    for steps in (candidates, candidate_kernels):
        tokens, tree = room(2, nodes, levels, device)
        results.append([steps.lay(found, beam, tokens, tree), tokens, *tree])
        assert tokens[:, 0].tolist() == [7, 7]  # the root's is there already
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("beam", "parents", "length"), [(1, 1, 1), (5, 1, 1), (5, 5, 2), (4, 4, 4)])
def test_parents_branch_as_in_torch(beam, parents, length, shared, device):
    first, count = 4 + parents, 4 + parents + 2 * parents * beam
    chance = -torch.rand(2, count, device=device)
    logp = -torch.randint(3, (2, 1 if shared else parents, beam), device=device) / 2  # many are equal
    best = torch.randint(1000, logp.shape, device=device)
    ids = torch.randint(1000, (2, 7, length), device=device)[:, :parents]  # strided, as the first level's are
    number = torch.stack([torch.randperm(first, device=device)[:parents] for _ in range(2)])
    results = []
    for steps in (candidates, candidate_kernels):
        found = Candidates(chance.clone(), *torch.full((2, 2, count), 7, device=device))
        results.append([*steps.branch(found, first, logp, best, ids, number), *found])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "count", "softcap"), [(5, 5, None), (4097, 3, None), (9000, 8, 2.0)])
def test_the_best_are_those_of_torch(size, count, softcap, dtype, device):
    """In bf16 logits tie; of equals the kernel takes the first, so it is compared with a stable sort."""
    logits = (3 * torch.randn(2, 3, size, device=device)).to(dtype)
    token_map = torch.randperm(size, device=device) if count == 3 else None
    others = (0.7 if count == 8 else 1.0, softcap, token_map)
    logp, tokens = candidate_kernels.best(logits, count, *others)
    torch.testing.assert_close(logp, candidates.best(logits, count, *others)[0], rtol=1e-5, atol=1e-5)
    want = logits.sort(descending=True, stable=True).indices[..., :count]
    assert torch.equal(tokens, want if token_map is None else token_map[want]) and logp.max() <= 0


def test_whatever_heads_say_guesses_are_tokens(device):
    """NaN and infinity. Each of the rows gets different tokens of the vocabulary, and chances that are no NaN."""
    logits = torch.full((5, 4099), torch.nan, device=device)
    logits[1], logits[2], logits[3, 4098], logits[4, 7] = -torch.inf, torch.inf, 1.0, torch.inf
    logp, tokens = candidate_kernels.best(logits, 4)
    assert not logp.isnan().any() and logp.max() <= 0
    assert all(len(set(row)) == 4 and set(row) <= set(range(4099)) for row in tokens.tolist())
    assert tokens[3, 0] == 4098 and tokens[4, 0] == 7
