"""Decodes a list of prompts, batch by batch, and counts tokens, passes and seconds."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from decoding.decoder import Decoder
from decoding.judge import check_pass
from decoding.sampling import Sampling
from medusa_model import MedusaModel


@dataclass
class Decoded:
    """Answers, with the passes and seconds they took. Neither counts the prefill, which yields the first token."""

    name: str
    answers: list[list[int]] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)  # per answer: how many tokens each pass added
    seconds: list[float] = field(default_factory=list)  # per answer: its share of its batch's time
    prefills: list[float] = field(default_factory=list)  # the same, of the prefill

    def figures(self) -> dict:
        """Without the prefill and its tokens. A pass over a batch counts once for each row that it advanced."""
        tokens, passes, seconds = sum(map(sum, self.pieces)), sum(map(len, self.pieces)), sum(self.seconds)
        return {
            "tokens": tokens,
            "passes": passes,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds if tokens else 0.0,
            "tokens_per_pass": tokens / passes if passes else 1.0,
        }

    def only(self, numbers: list[int]) -> "Decoded":
        """The answers with these numbers."""
        answers, pieces = ([column[i] for i in numbers] for column in (self.answers, self.pieces))
        seconds, prefills = ([column[i] for i in numbers] for column in (self.seconds, self.prefills))
        return Decoded(self.name, answers, pieces, seconds, prefills)


def decode(decoder: Decoder, prompts, max_new_tokens: int, eos: set[int], name: str, show=None) -> Decoded:
    """Decodes all prompts. `show` gets the tokens that each pass adds, and None at the end of a batch."""
    out, batch_size = Decoded(name), len(decoder.tokens)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers: list[list[int]] = [[] for _ in batch]
        pieces: list[list[int]] = [[] for _ in batch]
        begin, clock = time.perf_counter(), None  # the second starts after the prefill
        for new in decoder.run(batch, max_new_tokens, eos):
            for row, tokens in enumerate(new):
                answers[row] += tokens
                if clock is not None and tokens:
                    pieces[row].append(len(tokens))
                if show and tokens:
                    show(tokens)
            clock = clock or time.perf_counter()
        assert clock is not None
        out.prefills += [(clock - begin) / len(batch)] * len(batch)
        out.seconds += [(time.perf_counter() - clock) / len(batch)] * len(batch)
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
    """Plain decoding of all prompts, without heads: yields the new tokens of each, in order, with the EOS if there is
    one. All batches share one decoder, whose cache fits the longest prompt."""
    if not prompts:
        return
    longest = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(model, [], min(batch_size, len(prompts)), longest, Sampling(temperature))
    check_pass(decoder)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers: list[list[int]] = [[] for _ in batch]
        for new in decoder.run(batch, max_new_tokens, eos):
            for answer, tokens in zip(answers, new, strict=True):
                answer += tokens
        yield from answers
