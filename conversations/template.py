"""A tokenizer's chat template as it is used here: what it writes, and for whom."""

import hashlib
import json
import re
from datetime import date as Date
from functools import cached_property

from jinja2 import TemplateError

from common.errors import BadInput, first_line
from conversations.ends import Ends, closing, find_ends, find_lead, is_header
from conversations.thoughts import is_foreign, split_thoughts, styles_in

DATE_CALL = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")


class Refusal(BadInput):
    """Why a template cannot write a conversation, as one sentence."""


class ChatTemplate:
    """A tokenizer's chat template. Pickles, so that datasets can hand it to other processes.

    stops: the tokens on which the model stops (generation_config.eos_token_id), as far as they are known.
    kwargs: what the template may ask for, such as enable_thinking. date: for templates that print one.
    """

    def __init__(self, tokenizer, stops=(), kwargs: dict | None = None, date: Date | None = None):
        self.tokenizer, self.stops, self.kwargs = tokenizer, frozenset(stops), dict(kwargs or {})
        self.known = self.stops | {tokenizer.eos_token_id}
        self.name = tokenizer.name_or_path or "the tokenizer"
        day = date or Date.today()

        def dated(template: str) -> str:
            # A date for which it would ask the clock is written into it: the rows of the next day are the same.
            return DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), template)

        self.text = dated(tokenizer.get_chat_template())
        self.tools_text = dated(tokenizer.get_chat_template(tools=[]))  # some tokenizers have another one for tools
        self.asks_the_clock = "strftime_now(" in self.text + self.tools_text  # with a format that is no literal
        self.styles = styles_in(self.text + self.tools_text)  # of thoughts
        self.reads_thoughts = bool(self.styles or re.search(r"reasoning_content|\bthinking\b", self.text))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a conversation becomes."""
        tokenizer = self.tokenizer
        parts = [self.text, self.tools_text, self.kwargs, sorted(self.stops), tokenizer.special_tokens_map]
        parts += [str(Date.today())] * self.asks_the_clock
        text = json.dumps([*parts, tokenizer.backend_tokenizer.to_str()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    # ---- what it writes ----

    def render(self, messages: list[dict], tools: list | None = None, generate: bool = False) -> str:
        """The conversation as text; generate: with what comes before the assistant's next answer. Raises Refusal."""
        text = self.apply(messages, tools, tokenize=False, add_generation_prompt=generate)
        assert isinstance(text, str)
        return text

    def apply(self, messages: list[dict], tools: list | None = None, **how):
        """The tokenizer's `apply_chat_template`, in the way that this template can bear. Raises Refusal."""
        messages = [self.as_asked(message) for message in messages]
        ways = [(messages, tools)]
        if tools is None:  # some templates loop over tools without a look whether there are any
            ways.append((messages, []))
        if any("tool_calls" in message for message in messages):  # and some want arguments as JSON text
            ways.append(([with_json_arguments(message) for message in messages], tools))
        for turns, given in ways:
            try:
                template = self.tools_text if tools else self.text
                return self.tokenizer.apply_chat_template(
                    turns, tools=given, chat_template=template, **how, **self.kwargs
                )
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
                if type(error) is TemplateError:  # what raise_exception raises, and nothing else
                    raise Refusal(f"the chat template refuses it: {first_line(error)}") from error
                failure = error
        raise Refusal(f"the chat template fails on it: {first_line(failure)}") from failure

    def as_asked(self, message: dict) -> dict:
        """A turn with the names that this template knows."""
        message = {key: value for key, value in message.items() if key != "train"}
        if message["role"] == "developer" and "developer" not in self.text:
            message["role"] = "system"
        if message["role"] == "assistant" and self.reads_thoughts and is_foreign(message["content"], self.styles):
            thoughts, said = split_thoughts(message)  # in another model's tags
            message |= {"content": said.lstrip("\n"), "reasoning_content": thoughts.strip()}
        if "reasoning_content" in message:  # gpt-oss calls it thinking
            message["thinking"] = message["reasoning_content"]
        return message

    def context(self, messages: list[dict], tools: list | None = None) -> str:
        """What stands before an answer, as far as the template tells: without the EOS of a finished conversation."""
        text = self.render(messages, tools, generate=True)
        return text if self.asks else text.removesuffix(self.closing)

    def prompt(self, messages: list[dict], tools: list | None = None) -> str:
        """What the model reads before it answers."""
        return self.context(messages, tools) + self.header.rstrip(" ")  # "A:" and " so" are tokens

    # ---- what is known of it, from conversations of which each turn is a mark (conversations/ends.py) ----

    @cached_property
    def asks(self) -> bool:
        """Whether it heeds the wish for a prompt."""
        question = [{"role": "user", "content": "?"}]
        return not self.render(question).startswith(self.render(question, generate=True))

    @cached_property
    def ends(self) -> Ends:
        """Where its answers end. Raises Refusal if it does not write a plain conversation."""
        found = find_ends(self)
        if found is None:
            raise Refusal("the chat template does not write every turn")
        return found

    @cached_property
    def closing(self) -> str:
        """What it writes behind the last turn of a finished conversation: an EOS or nothing."""
        return closing(self)

    @cached_property
    def lead(self) -> str:
        """What it writes between the prompt for an answer and the answer's text."""
        return find_lead(self)

    @cached_property
    def header(self) -> str:
        """That text, if it is the header of the answer and no part of it."""
        return self.lead if is_header(self, self.lead) else ""

    # ---- tokens in its text ----

    @cached_property
    def added(self) -> re.Pattern:
        """Finds the tokens that are never a part of a longer one."""
        contents = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")

    def first_stop(self, text: str, stops: frozenset[int] | None = None) -> int:
        """Where in the text the first token ends on which the model stops; 0 if there is none, or a word before it."""
        stops = self.known if stops is None else stops
        at = 0
        for found in self.added.finditer(text):
            if text[at : found.start()].strip():
                return 0
            at = found.end()
            if self.tokenizer.convert_tokens_to_ids(found[0]) in stops:
                return at
        return 0

    def whole(self, text: str) -> str:
        """The text up to its last added token."""
        return text[: max((found.end() for found in self.added.finditer(text)), default=0)]


def with_json_arguments(message: dict) -> dict:
    """A turn whose tool calls have their arguments as JSON text."""

    def to_text(value):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    calls = [
        call | {"function": call["function"] | {"arguments": to_text(call["function"].get("arguments", {}))}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message
