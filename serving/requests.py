"""Requests in the form of OpenAI's API: what is taken, and one sentence for what is not."""

from typing import Any, NamedTuple

from serving.writer import Wish

# Accepted where they ask for nothing that differs from what is done.
NEUTRAL: dict[str, tuple] = {
    "n": (1,), "best_of": (1,), "top_p": (1, 1.0), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": (), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "store": (False,),
    "modalities": (["text"],), "parallel_tool_calls": (False, True), "service_tier": ("auto", "default"),
}  # fmt: skip
TAKEN = {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "stream"}
TAKEN |= {"stream_options", "user", "metadata"}


class Refused(Exception):
    """The request cannot be answered. code: what programs look at; param: which field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Asked(NamedTuple):
    wish: Wish
    stops: list[str]
    stream: bool
    usage: bool  # in a stream: a last chunk with the counts


def check_fields(body: Any, model: str):
    """Raises Refused for fields that would change the answer and are not known here."""
    if not isinstance(body, dict):
        raise Refused("the request's body is not a JSON object")
    if body.get("model") not in (None, model):
        message = f"there is no model {body['model']!r} here, only {model!r}"
        raise Refused(message, "model", "model_not_found", 404)
    for name, value in body.items():
        neutral = any(value == x and type(value) is type(x) for x in NEUTRAL.get(name, ()))
        if name not in TAKEN and value is not None and not neutral:
            raise Refused(f"{name}={value!r} is not supported by this server", name, "unsupported_parameter")


def number(body: dict, name: str, low: float, high: float, whole: bool, default):
    """Raises Refused unless it is a number within these bounds, or left out."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
        raise Refused(f"{name} must be a {'whole ' if whole else ''}number from {low:g} to {high:g}", name)
    return value


def messages(body: dict) -> list[dict]:
    """-> chat turns of text."""
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        raise Refused("messages must be a list of at least one message", "messages")
    turns = []
    for turn in found:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused("each message needs a role: system, developer, user or assistant", "messages")
        content = turn.get("content")
        if isinstance(content, list) and all(isinstance(x, dict) and x.get("type") == "text" for x in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise Refused("the content of each message must be text", "messages")
        for name, value in turn.items():
            if name not in ("role", "content") and value not in (None, [], ""):
                raise Refused(
                    f"a message's {name} is not supported by this server", "messages", "unsupported_parameter"
                )
        turns.append({"role": role, "content": content})
    return turns


def asked(body: dict, prompt: list[int], room: int, default_temperature: float) -> Asked:
    """room: tokens that prompt and answer may have together."""
    if len(prompt) >= room:
        message = f"the prompt has {len(prompt)} tokens, and there is room for {room} with the answer"
        raise Refused(message, "messages", "context_length_exceeded")
    left = room - len(prompt)
    most = number(body, "max_tokens", 1, 10**9, True, None)
    most = number(body, "max_completion_tokens", 1, 10**9, True, most)
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > 4:
        raise Refused("stop must be a text, or a list of at most four", "stop")
    options, stream = body.get("stream_options") or {}, body.get("stream") or False
    if not isinstance(options, dict) or not isinstance(stream, bool):
        raise Refused("stream must be true or false, and stream_options an object", "stream")
    wish = Wish(
        prompt,
        min(left, most or left),
        float(number(body, "temperature", 0, 2, False, default_temperature)),
        number(body, "seed", 0, 2**32 - 1, True, None),
    )
    return Asked(wish, stops, stream, bool(options.get("include_usage")))
