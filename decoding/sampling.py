"""How the backbone chooses a token: the most likely one, a draw, or a draw among those that are typical."""

from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """How the backbone chooses a token.

    temperature 0: the most likely one. Otherwise it draws from softmax(logits / temperature), and a guess is accepted
        if it is the token drawn: the text has exactly the distribution of plain sampling.
    typical: a guess is accepted if its probability exceeds min(epsilon, delta * exp(-entropy)). The token after the
        last accepted guess is drawn from those above that bound (paper, section 2.3.1). More guesses pass, and the
        distribution changes. With delta < 1 some token always passes: the likeliest has at least exp(-entropy).
    """

    temperature: float = 0.0
    typical: bool = False
    epsilon: float = 0.09
    delta: float = 0.3


GREEDY = Sampling()


def choose(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits `[B, n, V]` -> the backbone's token after each node `[B, n]`. For typical acceptance also
    log-probabilities `[B, n, V]`, -inf for tokens that would not be accepted."""
    if sampling.temperature == 0:
        return logits.argmax(-1), None
    logp = (logits.float() / sampling.temperature).log_softmax(-1)
    if sampling.typical:
        entropy = -(logp.exp() * logp).nansum(-1, keepdim=True)
        bound = (sampling.delta * (-entropy).exp()).clamp(max=sampling.epsilon)
        logp = logp.masked_fill(logp <= bound.log(), -torch.inf)
    noise = -torch.empty_like(logp).exponential_().log()  # Gumbel: the argmax is a draw from softmax(logp)
    return (logp + noise).argmax(-1), logp if sampling.typical else None
