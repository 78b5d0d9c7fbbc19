"""One decoder, one thread, a queue: answers one request after the other, token by token."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, cast

from transformers import set_seed

from decoding.decoder import Decoder
from decoding.judge import check_pass
from decoding.sampling import Sampling

logger = logging.getLogger(__name__)

PATIENCE = 0.5  # seconds until a request that waits asks whether its client is still there


class Wish(NamedTuple):
    """What one request wants."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    seed: int | None


class Full(Exception):
    """Too many requests wait."""


class Writer:
    """Decodes on the GPU (or CPU) in a thread of its own, in the order in which requests come.

    At temperature 0 it is the backbone's text; above, its distribution. A decoder's temperature is fixed, so there is
    one for greedy text and one for the last other temperature; each holds keys and values of max_length tokens.
    """

    def __init__(self, model, tree, max_length: int, ends: set[int], most_waiting: int, agree: bool = False):
        self.model, self.tree, self.max_length, self.ends = model, tree, max_length, ends
        self.most_waiting, self.agree = most_waiting, agree
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self.waiting = 0  # requests that are decoded or wait; of the event loop's thread
        self.decoders: dict[float, Decoder] = {}
        self.decoder(0.0)

    def decoder(self, temperature: float) -> Decoder:
        if temperature not in self.decoders:
            self.decoders = {t: old for t, old in self.decoders.items() if t == 0.0}
            sampling = Sampling(temperature)
            agree = self.agree and temperature == 0
            self.decoders[temperature] = Decoder(self.model, self.tree, 1, self.max_length, sampling, agree=agree)
            check_pass(self.decoders[temperature])
        return self.decoders[temperature]

    async def write(self, wish: Wish, gone: Callable[[], Awaitable[bool]]) -> AsyncGenerator[list[int], None]:
        """Yields the tokens that the prefill and each pass add. Stops if the client has gone, or if nobody asks for
        more; the decoder is free after the pass that runs. Raises Full if too many wait."""
        if self.waiting > self.most_waiting:
            raise Full
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        left = threading.Event()  # the client has gone

        def tell(piece):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work():
            try:
                if not left.is_set():
                    if wish.temperature > 0:
                        set_seed(wish.seed if wish.seed is not None else time.time_ns() % 2**32)
                    run = self.decoder(wish.temperature).run([wish.prompt], wish.max_new_tokens, self.ends)
                    with closing(cast(Generator[list[list[int]], None, None], run)) as passes:
                        for (tokens,) in passes:
                            tell(tokens)
                            if left.is_set():
                                break
                tell(None)
            except Exception as error:  # the request's, which must not end the server
                logger.exception("a request failed")
                tell(error)

        self.waiting += 1
        done = self.thread.submit(work)
        try:
            while not await gone():
                try:
                    piece = await asyncio.wait_for(pieces.get(), PATIENCE)
                except TimeoutError:
                    continue
                if piece is None:
                    return
                if isinstance(piece, Exception):
                    raise piece
                if piece:
                    yield piece
        finally:
            self.waiting -= 1
            left.set()
            done.cancel()
