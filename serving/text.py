"""Tokens as they come, as text that can be shown: whole characters, and nothing behind a stop string."""

from tokenizers.decoders import DecodeStream


class TextStream:
    """`add` tokens, and get the text that is certain. What may be the beginning of a stop string is held back; at a
    stop string `stopped` becomes True, and the text ends before it."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.stream = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.seen, self.held, self.stopped = "", "", False  # all text, what of it was not given out

    def add(self, tokens: list[int]) -> str:
        self.tokens += tokens
        new = "".join(self.stream.step(self.tokenizer.backend_tokenizer, token) or "" for token in tokens)
        self.seen, self.held = self.seen + new, self.held + new
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        text = self.held[: len(self.held) - keep]
        self.held = self.held[len(text) :]
        return text

    def end(self) -> str:
        """What was held back, if no stop string has come of it; and of a character that was not finished, a sign."""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        rest = whole[len(self.seen) :] if whole.startswith(self.seen) else ""
        text, self.held = self.held + rest, ""
        return text
