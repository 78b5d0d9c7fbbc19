"""Answers to a list of prompts, batch by batch, and what they took."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from decoding.decoder import Decoder, Sampling
from medusa_model import MedusaModel


@dataclass
class Decoded:
    """Answers and what they took. seconds and passes are counted after the prefill, which yields the first token."""

    name: str
    answers: list[list[int]] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)  # tokens that each pass added to each answer
    seconds: float = 0.0

    def figures(self) -> dict:
        """tokens and passes are without the prefill's; a pass over a batch is one pass for each row it advanced."""
        tokens, passes = sum(map(sum, self.pieces)), sum(map(len, self.pieces))
        return {
            "tokens": tokens,
            "passes": passes,
            "seconds": self.seconds,
            "tokens_per_s": tokens / self.seconds if tokens else 0.0,
            "tokens_per_pass": tokens / passes if passes else 1.0,
        }


def decode(decoder: Decoder, prompts, max_new_tokens: int, eos: set[int], name: str, show=None) -> Decoded:
    """All prompts, batch by batch. show(tokens) gets what a pass adds to an answer, then None."""
    out, batch_size = Decoded(name), len(decoder.tokens)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers, pieces = [[] for _ in batch], [[] for _ in batch]
        clock = None
        for new in decoder.run(batch, max_new_tokens, eos):
            for row, tokens in enumerate(new):
                answers[row] += tokens
                if clock is not None and tokens:
                    pieces[row].append(len(tokens))
                if show and tokens:
                    show(tokens)
            clock = clock or time.perf_counter()
        out.seconds += time.perf_counter() - clock
        if show:
            show(None)
        out.answers += answers
        out.pieces += pieces
    return out


def answer_all(
    model: MedusaModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    eos: set[int],
    temperature: float = 0.0,
) -> Iterator[list[int]]:
    """Plain decoding, batch by batch, of all prompts in one cache as long as the longest: yields each one's new
    tokens, in order, an EOS included if it was reached. Heads are not used."""
    if not prompts:
        return
    longest = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(model, [], min(batch_size, len(prompts)), longest, Sampling(temperature))
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers = [[] for _ in batch]
        for new in decoder.run(batch, max_new_tokens, eos):
            for answer, tokens in zip(answers, new, strict=True):
                answer += tokens
        yield from answers
