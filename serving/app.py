"""The HTTP server: /v1/chat/completions, /v1/completions and /v1/models, as OpenAI's clients expect them."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from conversations.template import ChatTemplate, Refusal
from serving.requests import Asked, Refused, asked, check_fields, messages
from serving.text import TextStream
from serving.writer import Full, Writer


class Api:
    """One model under one name. writer: who decodes; chat: writes prompts."""

    def __init__(self, writer: Writer, chat: ChatTemplate, name: str, temperature: float):
        self.writer, self.chat, self.name, self.temperature = writer, chat, name, temperature
        self.started = int(time.time())

    def app(self) -> Starlette:
        post = {"/v1/chat/completions": self.chat_completions, "/v1/completions": self.completions}
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()]
        routes += [Route("/v1/models", self.models), Route("/health", self.health)]
        handlers: dict = {Refused: refuse, Full: full, Exception: failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"waiting": self.writer.waiting})

    async def chat_completions(self, request: Request) -> Response:
        body = await read(request)
        check_fields(body, self.name)
        turns = messages(body)
        try:
            prompt = self.chat.prompt(turns)
        except Refusal as refusal:
            raise Refused(f"the chat template refuses these messages: {refusal}", "messages") from refusal
        ids = self.chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]

        def choice(text: str | None, finish: str | None, first: bool, whole: bool) -> dict:
            role = {"role": "assistant"} if first or whole else {}
            content = {} if text is None else {"content": text}
            return {"index": 0, "message" if whole else "delta": role | content, "finish_reason": finish}

        return await self.answer(request, body, ids, "chat.completion", "chat.completion.chunk", choice)

    async def completions(self, request: Request) -> Response:
        body = await read(request)
        check_fields(body, self.name)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            prompt = self.chat.tokenizer(prompt)["input_ids"]
        tokens = len(self.chat.tokenizer)
        if not isinstance(prompt, list) or not all(type(x) is int and 0 <= x < tokens for x in prompt) or not prompt:
            raise Refused("prompt must be a text, or a list of tokens, and not empty", "prompt")

        def choice(text: str | None, finish: str | None, first: bool, whole: bool) -> dict:
            return {"index": 0, "text": text or "", "finish_reason": finish, "logprobs": None}

        return await self.answer(request, body, prompt, "text_completion", "text_completion", choice)

    async def answer(self, request, body, ids: list[int], kind: str, chunk_kind: str, choice: Callable) -> Response:
        wanted = asked(body, ids, self.writer.max_length, self.temperature)
        if self.writer.waiting > self.writer.most_waiting:
            raise Refused(f"{self.writer.waiting} requests wait already: try again later", None, "overloaded", 429)
        prefix = "chatcmpl-" if kind.startswith("chat") else "cmpl-"
        head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": self.name}
        parts = self.parts(request, wanted)
        if wanted.stream:
            return StreamingResponse(
                events(parts, head | {"object": chunk_kind}, choice, wanted.usage), media_type="text/event-stream"
            )
        found = [part async for part in parts]
        if not found or found[-1][1] is None:  # the client has gone: nobody reads this
            return Response(status_code=499)
        text, (_, finish, usage) = "".join(part[0] for part in found), found[-1]
        return JSONResponse(head | {"object": kind, "choices": [choice(text, finish, True, True)], "usage": usage})

    async def parts(self, request: Request, wanted: Asked) -> AsyncIterator[tuple[str, str | None, dict]]:
        """(text, finish_reason, usage): usage and a reason come with the last part."""
        stream, tokens, passes, last = TextStream(self.chat.tokenizer, wanted.stops), 0, -1, None
        async with aclosing(self.writer.write(wanted.wish, request.is_disconnected)) as writing:
            async for new in writing:
                tokens, passes, last = tokens + len(new), passes + 1, new[-1]
                if text := stream.add(new):
                    yield text, None, {}
                if stream.stopped:
                    break
        if await request.is_disconnected():
            return
        ended = stream.stopped or last in self.writer.ends
        usage = {"prompt_tokens": len(wanted.wish.prompt), "completion_tokens": tokens}
        usage |= {"total_tokens": sum(usage.values()), "passes": passes}  # passes: of the backbone, beside the prefill
        yield "" if stream.stopped else stream.end(), "stop" if ended else "length", usage


async def read(request: Request):
    try:
        return await request.json()
    except ValueError as error:
        raise Refused("the request's body is not JSON") from error


async def refuse(request: Request, refused: Refused) -> Response:
    return JSONResponse(refused.body(), status_code=refused.status)


async def full(request: Request, error: Exception) -> Response:
    return await refuse(request, Refused("too many requests wait: try again later", None, "overloaded", 429))


async def failed(request: Request, error: Exception) -> Response:
    return await refuse(request, Refused(f"the request failed: {type(error).__name__}", status=500))


async def events(parts, head: dict, choice: Callable, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, one for each part."""

    def event(data: dict) -> str:
        return f"data: {json.dumps(head | data)}\n\n"

    first, more = True, {"usage": None} if with_usage else {}
    try:
        async for text, finish, usage in parts:
            if text:
                yield event({"choices": [choice(text, None, first, False)]} | more)
                first = False
            if finish:
                yield event({"choices": [choice(None, finish, first, False)]} | more)
                if with_usage:
                    yield event({"choices": [], "usage": usage})
    except Full:
        yield event(Refused("too many requests wait: try again later", None, "overloaded", 429).body())
    except Exception as error:  # the headers have gone out: it can only be said in the stream
        yield event(Refused(f"the request failed: {type(error).__name__}", status=500).body())
    yield "data: [DONE]\n\n"
